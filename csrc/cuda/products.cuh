// The products of the wide kernels: a warp's 32 rows, made of registers, times a stage of 32 rows of weights or gradients.
#pragma once
#include "wide.cuh"

namespace kan::cuda {

// A pitch of 16 bytes beyond a multiple of 128 (16-bit: ldmatrix) or 32 (tf32: lanes 4g + q read row q, column g) meets no
// bank twice.
constexpr int kStagePitch = kWideColumns + 8;
template <Products P> constexpr size_t kStageBytes = kStepDepth * kStagePitch * sizeof(typename StorageOf<P>::Type);

// Row tile m, column tile n of a warp; sums of float32.
using Sums = float[2][kWideColumns / 8][4];

// 16-bit dense: depth 16 from row k of the stage.
template <Products P, class T> KAN_DEVICE void multiply_half(Sums& c, const uint32_t (&a)[2][4], const T* stage, int k, int live, int lane) {
  KAN_UNROLL_ALL
  for (int n = 0; n < kWideColumns / 8; n += 2) {
    if (n * 8 >= live) break;
    uint32_t b[4];
    load_matrices_transposed(b, stage + (k + (lane & 15)) * kStagePitch + n * 8 + (lane >> 4) * 8);
    KAN_UNROLL_ALL
    for (int m = 0; m < 2; ++m) {
      if constexpr (P == Products::bfloat16) {
        mma_bfloat16(c[m][n], a[m], b[0], b[1]);
        mma_bfloat16(c[m][n + 1], a[m], b[2], b[3]);
      } else {
        mma_float16(c[m][n], a[m], b[0], b[1]);
        mma_float16(c[m][n + 1], a[m], b[2], b[3]);
      }
    }
  }
}

// 16-bit sparse: the whole stage, depth 32.
template <Products P, class T>
KAN_DEVICE void multiply_half_sparse(Sums& c, const uint32_t (&a)[2][4], const uint32_t (&e)[2], const T* stage, int live, int lane) {
  KAN_UNROLL_ALL
  for (int n = 0; n < kWideColumns / 8; ++n) {
    if (n * 8 >= live) break;
    uint32_t b[4];
    load_matrices_transposed(b, stage + lane * kStagePitch + n * 8);
    KAN_UNROLL_ALL
    for (int m = 0; m < 2; ++m) {
      if constexpr (P == Products::bfloat16) mma_sparse_bfloat16(c[m][n], a[m], b, e[m]);
      else mma_sparse_float16(c[m][n], a[m], b, e[m]);
    }
  }
}

// sum += a b in true float32: three products of numbers split in two (the fourth is below float32's rounding), the small ones
// first. Tensor cores cut sums off instead of rounding them, always towards zero: they add up these three alone, and the long
// sum is rounded to nearest by ordinary additions.
template <class Product> KAN_DEVICE void add_three_products(float (&sum)[4], Product product) {
  float part[4] = {};
  product(part, true, false);
  product(part, false, true);
  product(part, false, false);
  KAN_UNROLL_ALL
  for (int r = 0; r < 4; ++r) sum[r] += part[r];
}

// tf32, a as float32 numbers.
template <Products P, bool kSparse>
KAN_DEVICE void multiply_tf32(Sums& c, const float (&a)[2][4], const uint32_t (&e)[2], const float* stage, int k, int live, int lane) {
  constexpr int kRows = kSparse ? 4 : 2;
  constexpr bool kSplit = P == Products::tf32x3;
  uint32_t high[2][4], low[2][4];
  KAN_UNROLL_ALL
  for (int m = 0; m < 2; ++m)
    KAN_UNROLL_ALL
    for (int r = 0; r < 4; ++r) {
      high[m][r] = to_tf32(a[m][r]);
      low[m][r] = kSplit ? to_tf32(a[m][r] - as_float(high[m][r])) : 0u;
    }
  const float* column = stage + (k + (lane & 3)) * kStagePitch + (lane >> 2);
  KAN_UNROLL_ALL
  for (int n = 0; n < kWideColumns / 8; ++n) {
    if (n * 8 >= live) break;
    uint32_t b[4] = {}, b_low[4] = {};
    KAN_UNROLL_ALL
    for (int r = 0; r < kRows; ++r) {
      const float value = column[4 * r * kStagePitch + n * 8];
      b[r] = to_tf32(value);
      b_low[r] = kSplit ? to_tf32(value - as_float(b[r])) : 0u;
    }
    KAN_UNROLL_ALL
    for (int m = 0; m < 2; ++m) {
      auto product = [&](float(&to)[4], bool low_left, bool low_right) {
        const uint32_t(&left)[4] = low_left ? low[m] : high[m];
        const uint32_t(&right)[4] = low_right ? b_low : b;
        if constexpr (kSparse) mma_sparse_tf32(to, left, right, e[m]);
        else mma_tf32(to, left, right[0], right[1]);
      };
      if constexpr (kSplit) add_three_products(c[m][n], product);
      else product(c[m][n], false, false);
    }
  }
}

}  // namespace kan::cuda
