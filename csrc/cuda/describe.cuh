// Windows of a tile of rows and inputs in shared memory, made once and read by every thread that needs them.
#pragma once
#include "features.cuh"
#include "launch.h"

namespace kan::cuda {

// Blocks of a multiprocessor at once that kernels of 256 threads are compiled for, at the least. Told no number, nvcc aims at more of them
// and spills registers for it.
constexpr int kResident = 2;

template <class C> struct Window {
  C w[kMaxOrder + 1];
  C base;
  int first;
};

template <class C> KAN_DEVICE const C* knots_of(const Problem& p, int64_t i) { return static_cast<const C*>(p.grid) + i * p.knots(); }

// item (row b, input i), both within the problem or not; scale only where the operation has one. kOrder: 3, or -1 for any, whose code is
// three times as long.
template <int kOrder, class C> KAN_DEVICE void make_window(const Arguments<C>& a, const Described<C>& described, int64_t b, int64_t i, Window<C>& to) {
  const Problem& p = a.p;
  if (b >= p.batch || i >= p.in_features) {
    to = Window<C>{};
    return;
  }
  const C x = read<C>(p.x, b * p.in_features + i, p.x_dtype);
  const C scale = p.scale ? read<C>(p.scale, b * p.in_features + i, p.x_dtype) : C(1);
  if constexpr (kOrder == 3) to.first = window_of_order<3>(p, knots_of<C>(p, i), described, x, scale, to.w);
  else to.first = window<kMaxOrder>(p, knots_of<C>(p, i), described, x, scale, to.w);
  to.base = p.activation == kNone ? C(0) : activate(a.activation, x) * scale;
}

constexpr int kDescribers = 8;  // lanes that look at an input's knots

template <class C> struct AnyMemory {
  Described<C> described[kAnyThreads / kRowsOfWarp];
  Window<C> windows[kAnyThreads];  // (rows, inputs)
};

// Described of the inputs from i0 on, `count` of them, kDescribers of the block's `threads` to each. All of them call it.
template <class C> KAN_DEVICE void describe_inputs(const Problem& p, int64_t i0, int count, int threads, Described<C>* described) {
  constexpr int kOfWarp = 32 / kDescribers;
  const int lane = threadIdx.x % kDescribers;
  for (int m = threadIdx.x / kDescribers; m / kOfWarp * kOfWarp < count; m += threads / kDescribers) {  // the same for all lanes
    const C* t = knots_of<C>(p, i0 + m < p.in_features ? i0 + m : p.in_features - 1);
    const bool uniform = is_uniform_by_lanes<kDescribers>(t, p.knots(), lane);
    if (lane == 0 && m < count) described[m] = describe(p, t, uniform);
  }
}

// Makes the windows of rows b0 .. and inputs i0 ..; the same barriers for all threads.
template <int kOrder, class C> KAN_DEVICE void make_windows(const Arguments<C>& a, AnyTile tile, int64_t b0, int64_t i0, AnyMemory<C>& memory) {
  const int thread = threadIdx.x, inputs = tile.inputs();
  barrier();
  describe_inputs(a.p, i0, inputs, kAnyThreads, memory.described);
  barrier();
  if (thread < tile.windows())
    make_window<kOrder>(a, memory.described[thread % inputs], b0 + thread / inputs, i0 + thread % inputs, memory.windows[thread]);
  barrier();
}

// Calls with(r, sum) for each of kRows rows of a warp: sum of what an input's bases and its base branch give to one output. spline, base: the
// input's rows of weights at that output. windows: the first row's; the others lie `pitch` further. kOrder: 3, or -1 for any. With the
// order known, the loads of all bases and rows are on their way together; each of the k + 1 steps of the loop waits for its own.
template <int kRows, int kOrder, class T, class C, class With>
KAN_DEVICE void contract_rows(const Problem& p, const Window<C>* windows, int pitch, const T* spline, const T* base, With with) {
  const int order = kOrder < 0 ? p.spline_order : kOrder, last = p.bases() - 1;
  C sums[kRows];
  const C of_base = base != nullptr ? number(*base) : C(0);
  KAN_UNROLL_ALL
  for (int r = 0; r < kRows; ++r) sums[r] = base != nullptr ? windows[r * pitch].base * of_base : C(0);
  auto add = [&](int q) {
    KAN_UNROLL_ALL
    for (int r = 0; r < kRows; ++r) {
      // A basis that does not exist has weight 0; its place is taken by one of the same window.
      const int f = windows[r * pitch].first + q, held = f < 0 ? 0 : f > last ? last : f;
      sums[r] += windows[r * pitch].w[q] * number(spline[int64_t(held) * p.out_features]);
    }
  };
  if constexpr (kOrder >= 0) {
    KAN_UNROLL_ALL
    for (int q = 0; q <= kOrder; ++q) add(q);
  } else {
    KAN_NO_UNROLL
    for (int q = 0; q <= order; ++q) add(q);
  }
  KAN_UNROLL_ALL
  for (int r = 0; r < kRows; ++r) with(r, sums[r]);
}

}  // namespace kan::cuda
