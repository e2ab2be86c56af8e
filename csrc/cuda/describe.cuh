// The first kernel of most launches: what is known of every input's knots.
#pragma once
#include "features.cuh"

namespace kan::cuda {

// Blocks of a multiprocessor at once that kernels are compiled for, at the least. Told no number, nvcc aims at more of them and
// spills registers for it.
constexpr int kResident = 2;

template <class C> __global__ void describe_knots(Problem p, Described<C>* described) {
  const int64_t i = int64_t(blockIdx.x) * 128 + threadIdx.x;
  if (i < p.in_features) described[i] = describe(p, static_cast<const C*>(p.grid) + i * p.knots());
}

// Describes the knots, into the workspace, and gathers what the kernels behind are given.
template <class C> inline int launch_describe(const Problem& p, void* workspace, void* stream, Arguments<C>& to) {
  Described<C>* described = static_cast<Described<C>*>(workspace);
  to = {p, make_activation<C>(p.activation, p.n), described};
  if (p.in_features == 0) return 0;
  return launch(describe_knots<C>, Blocks{(p.in_features + 127) / 128}, 128, 0, stream, p, described);
}

// Windows of a tile of rows and inputs in shared memory, made once and read by every thread that needs them.
template <class C> struct Window {
  C w[kMaxOrder + 1];
  C base;
  int first;
};

// item (row b, input i), both within the problem or not; scale only where the operation has one.
template <class C> KAN_DEVICE void make_window(const Arguments<C>& a, int64_t b, int64_t i, Window<C>& to) {
  const Problem& p = a.p;
  if (b >= p.batch || i >= p.in_features) {
    to = Window<C>{};
    return;
  }
  const C x = read<C>(p.x, b * p.in_features + i, p.x_dtype);
  const C scale = p.scale ? read<C>(p.scale, b * p.in_features + i, p.x_dtype) : C(1);
  to.first = window<kMaxOrder>(p, static_cast<const C*>(p.grid) + i * p.knots(), a.described[i], x, scale, to.w);
  to.base = p.activation == kNone ? C(0) : activate(a.activation, x) * scale;
}

}  // namespace kan::cuda
