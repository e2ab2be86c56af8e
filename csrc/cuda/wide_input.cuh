// contract_input of wide layers on tensor cores: the product g W^T, whose epilogue weighs by phi^(n) and sums over the bases.
#pragma once
#include "launch.h"
#include "products.cuh"

namespace kan::cuda {

// A block: 128 rows of the batch (4 warps of 32) by 8 inputs with 8 bases each, and the base branch of these inputs: 80 rows
// of weights, the last 8 of which are padding. Stages are 64 bytes of outputs deep.
constexpr int kTileInputs = 8, kTileWeights = kTileInputs * kStepBases + 2 * 8, kInputStages = 3;
constexpr int kDepthBytes = 64, kInputPitchBytes = kDepthBytes + 16;  // a pitch of 80 bytes meets no bank twice
constexpr size_t kInputStageBytes = size_t(kWideRows + kTileWeights) * kInputPitchBytes;
// After its products a warp's sums (32 rows, 73 to a row) lie where the stages were.
constexpr int kSumsPitch = kTileInputs * kStepBases + kTileInputs + 1;
constexpr size_t kInputSums = size_t(kWideRows) * kSumsPitch * sizeof(float);
constexpr size_t kInputShared = (kInputStages * kInputStageBytes > kInputSums ? kInputStages * kInputStageBytes : kInputSums) +
                                size_t(kWideRows) * kTileInputs * sizeof(float);

using InputSums = float[2][kTileInputs + 1][4];

template <Products P, class T> KAN_DEVICE void multiply_rows(InputSums& c, const T* left_rows, const T* weights, bool has_base, int lane) {
  constexpr int kPitch = kInputPitchBytes / sizeof(T), kDepth = kDepthBytes / sizeof(T);
  const int g = lane >> 2, q = lane & 3;
  if constexpr (kIsHalf<P>) {
    KAN_UNROLL_ALL
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t a[2][4];
      for (int m = 0; m < 2; ++m) load_matrices(a[m], left_rows + (16 * m + (lane & 15)) * kPitch + k + (lane >> 4) * 8);
      KAN_UNROLL_ALL
      for (int n = 0; n <= kTileInputs; n += 2) {
        if (n == kTileInputs && !has_base) break;
        uint32_t b[4];
        load_matrices(b, weights + (8 * n + (lane & 7) + (lane >> 4) * 8) * kPitch + k + (lane & 8));
        KAN_UNROLL_ALL
        for (int m = 0; m < 2; ++m) {
          if constexpr (P == Products::bfloat16) {
            mma_bfloat16(c[m][n], a[m], b[0], b[1]);
            if (n < kTileInputs) mma_bfloat16(c[m][n + (n < kTileInputs)], a[m], b[2], b[3]);
          } else {
            mma_float16(c[m][n], a[m], b[0], b[1]);
            if (n < kTileInputs) mma_float16(c[m][n + (n < kTileInputs)], a[m], b[2], b[3]);
          }
        }
      }
    }
  } else {
    constexpr bool kSplit = P == Products::tf32x3;
    KAN_UNROLL_ALL
    for (int k = 0; k < kDepth; k += 8) {
      uint32_t high[2][4], low[2][4];
      KAN_UNROLL_ALL
      for (int m = 0; m < 2; ++m)
        KAN_UNROLL_ALL
        for (int r = 0; r < 4; ++r) {
          const float value = left_rows[(16 * m + g + 8 * (r & 1)) * kPitch + k + q + 4 * (r >> 1)];
          high[m][r] = to_tf32(value);
          low[m][r] = kSplit ? to_tf32(value - as_float(high[m][r])) : 0u;
        }
      KAN_UNROLL_ALL
      for (int n = 0; n <= kTileInputs; ++n) {
        if (n == kTileInputs && !has_base) break;
        uint32_t b[2], b_low[2];
        KAN_UNROLL_ALL
        for (int r = 0; r < 2; ++r) {
          const float value = weights[(8 * n + g) * kPitch + k + q + 4 * r];
          b[r] = to_tf32(value);
          b_low[r] = kSplit ? to_tf32(value - as_float(b[r])) : 0u;
        }
        KAN_UNROLL_ALL
        for (int m = 0; m < 2; ++m) {
          auto product = [&](float(&to)[4], bool low_left, bool low_right) {
            const uint32_t(&right)[2] = low_right ? b_low : b;
            mma_tf32(to, low_left ? low[m] : high[m], right[0], right[1]);
          };
          if constexpr (kSplit) add_three_products(c[m][n], product);
          else product(c[m][n], false, false);
        }
      }
    }
  }
}

// Outputs o0 .. of g's rows b0 .. and of the weights of inputs i0 .., bases 8 chunk ..; the base branch with the first chunk.
template <class T> KAN_DEVICE void stage_rows(const WideArguments& a, int64_t b0, int64_t i0, int chunk, int64_t o0, char* stage) {
  const Problem& p = a.p;
  for (int piece = threadIdx.x; piece < (kWideRows + kTileWeights) * 4; piece += kWideThreads) {
    const int row = piece / 4, w = row - kWideRows, offset = piece % 4 * int(16 / sizeof(T));
    const T* from;
    bool exists;
    if (w < 0) {
      exists = b0 + row < p.batch;
      from = static_cast<const T*>(p.g) + (b0 + row) * p.out_features;
    } else if (w < kTileInputs * kStepBases) {
      const int64_t i = i0 + w / kStepBases;
      const int f = chunk * kStepBases + w % kStepBases;
      exists = i < p.in_features && f < p.bases();
      from = static_cast<const T*>(p.spline_weight) + (i * p.bases() + f) * p.out_features;
    } else {
      const int64_t i = i0 + w - kTileInputs * kStepBases;
      exists = p.base_weight != nullptr && chunk == 0 && w < kTileWeights - 8 && i < p.in_features;
      from = static_cast<const T*>(p.base_weight) + i * p.out_features;
    }
    T* to = reinterpret_cast<T*>(stage + row * kInputPitchBytes) + offset;
    stage_16_bytes(to, from + o0 + offset, exists ? p.out_features - o0 - offset : 0, a.aligned);
  }
}

template <Products P> __global__ void __launch_bounds__(kWideThreads) input_wide(WideArguments a) {
  using T = typename StorageOf<P>::Type;
  constexpr int kDepth = kDepthBytes / sizeof(T);
  const Problem& p = a.p;
  char* stages = shared_memory<char>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  float* values = shared_memory<float>() + warp * 32 * kSumsPitch;
  float* totals = reinterpret_cast<float*>(stages + kInputShared) - (4 - warp) * 32 * kTileInputs;  // (32 rows, 8 inputs)
  const int64_t b0 = int64_t(blockIdx.x) * kWideRows, steps = (p.out_features + kDepth - 1) / kDepth;
  const int chunks = (p.bases() + kStepBases - 1) / kStepBases;

  for (int64_t i0 = int64_t(blockIdx.y) * kTileInputs; i0 < p.in_features; i0 += int64_t(gridDim.y) * kTileInputs)
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool has_base = p.base_weight != nullptr && chunk == 0;
      InputSums sums = {};
      barrier();
      for (int s = 0; s < kInputStages - 1; ++s) {
        if (s < steps) stage_rows<T>(a, b0, i0, chunk, s * kDepth, stages + s * kInputStageBytes);
        commit_copies();
      }
      int stage = 0, next_stage = kInputStages - 1;
      for (int64_t s = 0; s < steps; ++s) {
        wait_for_copies<kInputStages - 2>();
        barrier();
        if (s + kInputStages - 1 < steps)
          stage_rows<T>(a, b0, i0, chunk, (s + kInputStages - 1) * kDepth, stages + next_stage * kInputStageBytes);
        commit_copies();
        const char* rows = stages + stage * kInputStageBytes;
        multiply_rows<P>(sums, reinterpret_cast<const T*>(rows + warp * 32 * kInputPitchBytes),
                         reinterpret_cast<const T*>(rows + kWideRows * kInputPitchBytes), has_base, lane);
        stage = stage + 1 < kInputStages ? stage + 1 : 0;
        next_stage = next_stage + 1 < kInputStages ? next_stage + 1 : 0;
      }
      wait_for_copies<0>();
      barrier();
      for_every_sum(sums, lane, [&](int row, int column, float sum) { values[row * kSumsPitch + column] = sum; });
      warp_barrier();
      // Lane: one of 8 inputs, one of 4 rows at a time.
      const int64_t i = i0 + lane % kTileInputs;
      for (int r = lane / kTileInputs; r < 32; r += 32 / kTileInputs) {
        const int64_t b = b0 + warp * 32 + r;
        if (b >= p.batch || i >= p.in_features) continue;
        const Point point = load_point(p, b, i);
        const Item item = evaluate(a, i, point.x, 1.0f);
        const float* row = values + r * kSumsPitch;
        float total = 0;
        KAN_UNROLL_ALL
        for (int m = 0; m < 4; ++m) {
          const int f = item.first - chunk * kStepBases + m;
          if (f >= 0 && f < kStepBases) total += item.w[m] * row[lane % kTileInputs * kStepBases + f];
        }
        if (has_base) total += activate(a.activation, point.x) * row[kTileInputs * kStepBases + lane % kTileInputs];
        float* sum = totals + r * kTileInputs + lane % kTileInputs;
        if (chunk > 0) total += *sum;
        *sum = total;
        if (chunk == chunks - 1) write<float>(p.dx, b * p.in_features + i, p.x_dtype, total);
      }
    }
}

template <Products P> int launch_input_wide(const WideArguments& a, void* stream) {
  if (int error = launch_cubics(a, stream)) return error;
  const Blocks blocks{(a.p.batch + kWideRows - 1) / kWideRows, (a.p.in_features + kTileInputs - 1) / kTileInputs};
  return launch(input_wide<P>, blocks, kWideThreads, kInputShared, stream, a);
}

}  // namespace kan::cuda
