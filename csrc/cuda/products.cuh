// The products of the wide kernels: a warp's rows, kHigh tiles of 16, times 32 rows of weights or gradients in shared memory,
// kTiles tiles of 8 columns.
#pragma once
#include "wide.cuh"

namespace kan::cuda {

// A pitch of 16 bytes beyond a multiple of 128 (16-bit: ldmatrix) or 32 (tf32: lanes 4g + q read row q, column g) meets no
// bank twice.
template <int kColumns> constexpr int kPitchOf = kColumns + 8;
template <Products P, int kColumns>
constexpr size_t kStageBytesOf = kStepDepth * kPitchOf<kColumns> * sizeof(typename StorageOf<P>::Type);

// Row tile m, column tile n of a warp; sums of float32.
template <int kHigh, int kTiles> using SumsOf = float[kHigh][kTiles][4];

// Columns from `live` on do not exist: tiles of them are left out, four at a time, so that all others' instructions mix.
constexpr int kTilesAtOnce = 4;

// 16-bit dense: depth 16 from the stage's first row on.
template <Products P, int kPitch, int kHigh, int kTiles, class T>
KAN_DEVICE void multiply_half(SumsOf<kHigh, kTiles>& c, const uint32_t (&a)[kHigh][4], const T* stage, int live, int lane) {
  KAN_UNROLL_ALL
  for (int n = 0; n < kTiles; n += 2) {
    if (n % kTilesAtOnce == 0 && n * 8 >= live) break;
    uint32_t b[4];
    load_matrices_transposed(b, stage + (lane & 15) * kPitch + n * 8 + (lane >> 4) * 8);
    KAN_UNROLL_ALL
    for (int m = 0; m < kHigh; ++m) {
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
template <Products P, int kPitch, int kHigh, int kTiles, class T>
KAN_DEVICE void multiply_half_sparse(SumsOf<kHigh, kTiles>& c, const uint32_t (&a)[kHigh][4], const uint32_t (&e)[kHigh],
                                     const T* stage, int live, int lane) {
  KAN_UNROLL_ALL
  for (int n = 0; n < kTiles; ++n) {
    if (n % kTilesAtOnce == 0 && n * 8 >= live) break;
    uint32_t b[4];
    load_matrices_transposed(b, stage + lane * kPitch + n * 8);
    KAN_UNROLL_ALL
    for (int m = 0; m < kHigh; ++m) {
      if constexpr (P == Products::bfloat16) mma_sparse_bfloat16(c[m][n], a[m], b, e[m]);
      else mma_sparse_float16(c[m][n], a[m], b, e[m]);
    }
  }
}

// A float32 number for tensor cores: rounded to tf32 or, for true float32, as the sum of two numbers. `low` has at most a bit more
// than the 11 that are read of it, the last; NaN, which the rounding here may lose, is in it too.
template <Products P> KAN_DEVICE void split(float value, uint32_t& high, uint32_t& low) {
  if constexpr (P == Products::tf32x3) {
    high = (as_bits(value) + 0x1000u) & 0xffffe000u;
    low = as_bits(value - as_float(high));
  } else {
    high = to_tf32(value);
    low = 0;
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

// tf32, a as the bits of float32 numbers: depth 8 (dense) or 16 (sparse) from the stage's first row on.
template <Products P, bool kSparse, int kPitch, int kHigh, int kTiles>
KAN_DEVICE void multiply_tf32(SumsOf<kHigh, kTiles>& c, const uint32_t (&a)[kHigh][4], const uint32_t (&e)[kHigh], const float* stage,
                              int live, int lane) {
  constexpr int kRows = kSparse ? 4 : 2;
  uint32_t high[kHigh][4], low[kHigh][4];
  KAN_UNROLL_ALL
  for (int m = 0; m < kHigh; ++m)
    KAN_UNROLL_ALL
    for (int r = 0; r < 4; ++r) split<P>(as_float(a[m][r]), high[m][r], low[m][r]);
  const float* column = stage + (lane & 3) * kPitch + (lane >> 2);
  KAN_UNROLL_ALL
  for (int n = 0; n < kTiles; ++n) {
    if (n % kTilesAtOnce == 0 && n * 8 >= live) break;
    uint32_t b[4] = {}, b_low[4] = {};
    KAN_UNROLL_ALL
    for (int r = 0; r < kRows; ++r) split<P>(column[4 * r * kPitch + n * 8], b[r], b_low[r]);
    KAN_UNROLL_ALL
    for (int m = 0; m < kHigh; ++m) {
      auto product = [&](float(&to)[4], bool low_left, bool low_right) {
        const uint32_t(&left)[4] = low_left ? low[m] : high[m];
        const uint32_t(&right)[4] = low_right ? b_low : b;
        if constexpr (kSparse) mma_sparse_tf32(to, left, right, e[m]);
        else mma_tf32(to, left, right[0], right[1]);
      };
      if constexpr (P == Products::tf32x3) add_three_products(c[m][n], product);
      else product(c[m][n], false, false);
    }
  }
}

}  // namespace kan::cuda
