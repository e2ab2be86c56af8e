// What the wide kernels share: sizes, the evaluation of an item, the staging of weights.
#pragma once
#include "fragments.cuh"
#include "polynomials.h"

namespace kan::cuda {

// A block: 4 warps under each other, each 32 rows by all columns. All of a row's columns in one warp means that no window is
// evaluated twice in a block; two row tiles to a warp halve the reads of weights from shared memory.
constexpr int kWideThreads = 128, kWideRows = 128, kWideColumns = 128;
constexpr int kStepInputs = 4, kStepBases = 8, kStepDepth = kStepInputs * kStepBases;
constexpr int kBasePitch = 40;  // base activations of a row and 32 inputs

template <Products P> struct StorageOf { using Type = float; };
template <> struct StorageOf<Products::bfloat16> { using Type = BFloat16; };
template <> struct StorageOf<Products::float16> { using Type = Float16; };

// Window of input i at x. The weights of knots 1 apart serve all even knots, times 1 / h^n.
KAN_DEVICE Item evaluate(const WideArguments& a, int64_t i, float x, float scale) {
  const Problem& p = a.p;
  const float* t = static_cast<const float*>(p.grid) + i * p.knots();
  const Described<float> d = a.described[i];
  float at = x == x ? x : d.first;
  at = at > d.first ? at : d.first;
  at = at < d.last ? at : d.last;
  const bool zero = p.outside == kZero, beyond = x != at || (zero && !(x < d.last));
  const int j = interval(t, d, at);
  const float here = t[j];
  Item item;
  item.first = j - p.spline_order;
  float per_width, factor = scale;
  Cubic cubic[kMaxCubicOrder + 1];
  if (d.inverse_h > 0) {
    per_width = d.inverse_h;
    for (int m = 0; m < p.n; ++m) factor *= d.inverse_h;
    KAN_UNROLL_WINDOW
    for (int q = 0; q < 4; ++q) cubic[q] = a.uniform[q];
  } else {
    const float width = t[j + 1] - here;
    per_width = width > 0 ? reciprocal(width) : 0.0f;
    const Cubic* table = a.uneven + (i * (p.knots() - 1) + j) * 4;
    KAN_UNROLL_WINDOW
    for (int q = 0; q < 4; ++q) cubic[q] = table[q];
  }
  const float u = (at - here) * per_width;
  KAN_UNROLL_WINDOW
  for (int q = 0; q < 4; ++q) {
    const float* c = cubic[q].c;
    float w = ((c[3] * u + c[2]) * u + c[1]) * u + c[0];
    if (beyond) {
      if (p.outside == kLinear && p.n == 0) w += ((3 * c[3] * u + 2 * c[2]) * u + c[1]) * per_width * (x - at);
      else if (zero || p.n > int(p.outside == kLinear)) w = 0;
      w = x == x ? w : x;
    }
    const int f = item.first + q;
    item.w[q] = f >= 0 && f < p.bases() && q <= p.spline_order ? w * factor : 0.0f;
  }
  return item;
}

// x and scale of one item; what lies outside the problem has none.
struct Point {
  float x, scale;
};
KAN_DEVICE Point load_point(const Problem& p, int64_t b, int64_t i) {
  if (b >= p.batch || i >= p.in_features) return {0.0f, 0.0f};
  const int64_t at = b * p.in_features + i;
  return {read<float>(p.x, at, p.x_dtype), p.scale ? read<float>(p.scale, at, p.x_dtype) : 1.0f};
}
KAN_DEVICE Item item_at(const WideArguments& a, int64_t b, int64_t i, Point point) {
  if (b >= a.p.batch || i >= a.p.in_features) return {{0.0f, 0.0f, 0.0f, 0.0f}, 0};
  return evaluate(a, i, point.x, point.scale);
}

// Base activations of a warp's rows b0 .. b0 + kRows - 1 and 32 inputs from `first` on, none beyond `end`: values (kRows,
// kBasePitch), each lane an input. They are then read as fragments.
template <int kRows, class T>
KAN_DEVICE void write_base_values(const WideArguments& a, int64_t b0, int64_t first, int64_t end, int lane, T* values) {
  warp_barrier();
  const int64_t i = first + lane;
  for (int r = 0; r < kRows; ++r) {
    const Point point = load_point(a.p, b0 + r, i);
    const bool inside = b0 + r < a.p.batch && i < end;
    put(values[r * kBasePitch + lane], inside ? activate(a.activation, point.x) * point.scale : 0.0f);
  }
  warp_barrier();
}

// 16 bytes of a row of global memory, `left` of whose numbers exist, to shared memory; the rest becomes zeros.
template <class T> KAN_DEVICE void stage_16_bytes(T* to, const T* from, int64_t left, bool aligned) {
  constexpr int kNumbers = 16 / sizeof(T);
  if (aligned) {
    copy_16_bytes(to, left > 0 ? from : nullptr, left <= 0);
    return;
  }
  KAN_UNROLL_WINDOW
  for (int m = 0; m < kNumbers; ++m) to[m] = m < left ? from[m] : T{};
}

// body(row, column, sum) for the lane's share of a warp's sums, by the layout of the instructions' result.
template <int kTiles, class Body> KAN_DEVICE void for_every_sum(const float (&sums)[2][kTiles][4], int lane, Body body) {
  KAN_UNROLL_ALL
  for (int m = 0; m < 2; ++m)
    KAN_UNROLL_ALL
    for (int n = 0; n < kTiles; ++n)
      KAN_UNROLL_ALL
      for (int r = 0; r < 4; ++r) body(16 * m + lane / 4 + 8 * (r >> 1), 8 * n + 2 * (lane % 4) + (r & 1), sums[m][n][r]);
}

}  // namespace kan::cuda
