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

// sum += a b in true float32, kDeep fragments deep: three products each of numbers split in two (the fourth is below float32's
// rounding), the small ones first. Tensor cores cut sums off instead of rounding them, always towards zero: they add up these few
// alone, and the long sum is rounded to nearest by ordinary additions.
template <int kDeep, class Product> KAN_DEVICE void add_three_products(float (&sum)[4], Product product) {
  float part[4] = {};
  KAN_UNROLL_ALL
  for (int d = 0; d < kDeep; ++d) {
    product(part, d, true, false);
    product(part, d, false, true);
  }
  KAN_UNROLL_ALL
  for (int d = 0; d < kDeep; ++d) product(part, d, false, false);
  KAN_UNROLL_ALL
  for (int r = 0; r < 4; ++r) sum[r] += part[r];
}

// tf32, a as the bits of float32 numbers: kDeep fragments of depth 8 (dense) or 16 (sparse) from the stage's first row on.
template <Products P, bool kSparse, int kPitch, int kDeep, int kHigh, int kTiles>
KAN_DEVICE void multiply_tf32(SumsOf<kHigh, kTiles>& c, const uint32_t (&a)[kDeep][kHigh][4], const uint32_t (&e)[kDeep][kHigh],
                              const float* stage, int live, int lane) {
  constexpr int kRows = kSparse ? 4 : 2;
  uint32_t high[kDeep][kHigh][4], low[kDeep][kHigh][4];
  KAN_UNROLL_ALL
  for (int d = 0; d < kDeep; ++d)
    KAN_UNROLL_ALL
    for (int m = 0; m < kHigh; ++m)
      KAN_UNROLL_ALL
      for (int r = 0; r < 4; ++r) split<P>(as_float(a[d][m][r]), high[d][m][r], low[d][m][r]);
  const float* column = stage + (lane & 3) * kPitch + (lane >> 2);
  KAN_UNROLL_ALL
  for (int n = 0; n < kTiles; ++n) {
    if (n % kTilesAtOnce == 0 && n * 8 >= live) break;
    uint32_t b[kDeep][4] = {}, b_low[kDeep][4] = {};
    KAN_UNROLL_ALL
    for (int d = 0; d < kDeep; ++d)
      KAN_UNROLL_ALL
      for (int r = 0; r < kRows; ++r) split<P>(column[4 * (d * kRows + r) * kPitch + n * 8], b[d][r], b_low[d][r]);
    KAN_UNROLL_ALL
    for (int m = 0; m < kHigh; ++m) {
      auto product = [&](float(&to)[4], int d, bool low_left, bool low_right) {
        const uint32_t(&left)[4] = low_left ? low[d][m] : high[d][m];
        const uint32_t(&right)[4] = low_right ? b_low[d] : b[d];
        if constexpr (kSparse) mma_sparse_tf32(to, left, right, e[d][m]);
        else mma_tf32(to, left, right[0], right[1]);
      };
      if constexpr (P == Products::tf32x3) {
        add_three_products<kDeep>(c[m][n], product);
      } else {
        KAN_UNROLL_ALL
        for (int d = 0; d < kDeep; ++d) product(c[m][n], d, false, false);
      }
    }
  }
}

}  // namespace kan::cuda
