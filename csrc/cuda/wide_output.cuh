// contract_output of wide layers on tensor cores: y = Phi W, where Phi (batch, in * bases) is made in registers.
#pragma once
#include "launch.h"
#include "products.cuh"

namespace kan::cuda {

// Stages of weights in flight; with fewer bytes to a number there is room for more.
template <Products P> constexpr int kOutputStages = kIsHalf<P> ? 4 : 3;
template <Products P>
constexpr size_t kOutputShared = kOutputStages<P> * kStageBytes<P> + kWideRows * kBasePitch * sizeof(typename StorageOf<P>::Type);

// The steps of a slice: groups of 4 inputs, each with all its chunks of 8 bases; then the base branch, 32 inputs a step.
struct Step {
  int64_t input;
  int chunk;  // -1: base branch

  KAN_DEVICE void advance(int chunks, int64_t begin, int64_t end, bool has_base) {
    if (chunk < 0) input += kStepDepth;
    else if (++chunk == chunks) {
      chunk = 0;
      input += kStepInputs;
      if (input >= end && has_base) input = begin, chunk = -1;
    }
  }
};

template <Products P, bool kSparse, class T = typename StorageOf<P>::Type>
KAN_DEVICE void stage_weights(const WideArguments& a, const Step& step, int64_t end, int64_t o0, T* stage) {
  const Problem& p = a.p;
  constexpr int kNumbers = 16 / sizeof(T), kPieces = kWideColumns / kNumbers;
  KAN_UNROLL_ALL
  for (int piece = threadIdx.x; piece < kStepDepth * kPieces; piece += kWideThreads) {
    const int row = piece / kPieces, column = piece % kPieces * kNumbers;
    const bool is_base = step.chunk < 0;
    const int64_t i = step.input + (is_base ? row : row / kStepBases);
    const int f = step.chunk * kStepBases + basis_of_place<kSparse, kIsHalf<P>>(row % kStepBases);
    const T* from = is_base ? static_cast<const T*>(p.base_weight) + i * p.out_features
                            : static_cast<const T*>(p.spline_weight) + (i * p.bases() + f) * p.out_features;
    const bool exists = i < end && (is_base || f < p.bases());
    stage_16_bytes(stage + row * kStagePitch + column, from + o0 + column, exists ? p.out_features - o0 - column : 0, a.aligned);
  }
}

template <Products P, bool kSparse>
__global__ void __launch_bounds__(kWideThreads) output_wide(WideArguments a, float* parts, int64_t slices, int64_t inputs_per_slice) {
  using T = typename StorageOf<P>::Type;
  constexpr int kStages = kOutputStages<P>;
  const Problem& p = a.p;
  T* stages = shared_memory<T>();
  constexpr int kStageNumbers = kStepDepth * kStagePitch;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, q = lane & 3;
  T* base_values = stages + kStages * kStageNumbers + warp * 32 * kBasePitch;  // (32 rows, 32 inputs) of this warp
  const int64_t b0 = int64_t(blockIdx.x) * kWideRows + warp * 32;
  const int chunks = (p.bases() + kStepBases - 1) / kStepBases;
  const bool has_base = p.base_weight != nullptr;

  for (int64_t slice = blockIdx.z; slice < slices; slice += gridDim.z)
    for (int64_t o0 = int64_t(blockIdx.y) * kWideColumns; o0 < p.out_features; o0 += int64_t(gridDim.y) * kWideColumns) {
      const int64_t begin = slice * inputs_per_slice;
      const int64_t end = begin + inputs_per_slice < p.in_features ? begin + inputs_per_slice : p.in_features;
      const int live = p.out_features - o0 < kWideColumns ? int(p.out_features - o0) : kWideColumns;
      const int64_t steps = (end - begin + kStepInputs - 1) / kStepInputs * chunks +
                            (has_base ? (end - begin + kStepDepth - 1) / kStepDepth : 0);
      Sums sums = {};
      Step coming{begin, 0}, now{begin, 0};
      barrier();
      for (int s = 0; s < kStages - 1; ++s) {
        if (s < steps) stage_weights<P, kSparse>(a, coming, end, o0, stages + s * kStageNumbers);
        commit_copies();
        coming.advance(chunks, begin, end, has_base);
      }
      // Items of row tile m, half h; their x is loaded a group of inputs ahead.
      const int64_t row = b0 + g + 8 * (q & 1);
      Item items[2][2];
      Point points[2][2];
      KAN_UNROLL_ALL
      for (int m = 0; m < 4; ++m) points[m / 2][m % 2] = load_point(p, row + 16 * (m / 2), begin + 2 * (m % 2) + (q >> 1));

      int stage = 0, next_stage = kStages - 1;
      for (int64_t s = 0; s < steps; ++s) {
        wait_for_copies<kStages - 2>();
        barrier();
        if (s + kStages - 1 < steps) stage_weights<P, kSparse>(a, coming, end, o0, stages + next_stage * kStageNumbers);
        commit_copies();
        coming.advance(chunks, begin, end, has_base);
        const T* weights = stages + stage * kStageNumbers;

        if (now.chunk < 0) {
          write_base_values<32>(a, b0, now.input, end, lane, base_values);
          if constexpr (kIsHalf<P>) {
            KAN_UNROLL_ALL
            for (int k = 0; k < kStepDepth; k += 16) {
              uint32_t left[2][4];
              for (int m = 0; m < 2; ++m)
                load_matrices(left[m], base_values + (16 * m + (lane & 15)) * kBasePitch + k + (lane >> 4) * 8);
              multiply_half<P>(sums, left, weights, k, live, lane);
            }
          } else {
            const uint32_t none[2] = {};
            for (int k = 0; k < kStepDepth; k += 8) {
              float left[2][4];
              for (int m = 0; m < 2; ++m)
                for (int r = 0; r < 4; ++r) left[m][r] = base_values[(16 * m + g + 8 * (r & 1)) * kBasePitch + k + q + 4 * (r >> 1)];
              multiply_tf32<P, false>(sums, left, none, weights, k, live, lane);
            }
          }
        } else {
          if (now.chunk == 0) {
            KAN_UNROLL_ALL
            for (int m = 0; m < 4; ++m) {
              const int64_t b = row + 16 * (m / 2), i = now.input + 2 * (m % 2) + (q >> 1);
              items[m / 2][m % 2] = item_at(a, b, i < end ? i : p.in_features, points[m / 2][m % 2]);
              points[m / 2][m % 2] = load_point(p, b, i + kStepInputs);
            }
          }
          const int first_base = now.chunk * kStepBases;
          if constexpr (kIsHalf<P> && kSparse) {
            uint32_t left[2][4], metadata[2];
            KAN_UNROLL_ALL
            for (int m = 0; m < 2; ++m) {
              uint32_t windows[2][2];
              int shifts[2];
              KAN_UNROLL_ALL
              for (int h = 0; h < 2; ++h) {
                const float(&w)[4] = items[m][h].w;
                windows[h][0] = pack<P>(w[0], w[2]);
                windows[h][1] = pack<P>(w[1], w[3]);
                shifts[h] = items[m][h].first - first_base;
              }
              half_sparse(windows, shifts, lane, left[m], metadata[m]);
            }
            multiply_half_sparse<P>(sums, left, metadata, weights, live, lane);
          } else if constexpr (kIsHalf<P>) {
            KAN_UNROLL_ALL
            for (int h = 0; h < 2; ++h) {
              uint32_t left[2][4];
              for (int m = 0; m < 2; ++m) {
                const float(&w)[4] = items[m][h].w;
                const uint32_t window[2] = {pack<P>(w[0], w[1]), pack<P>(w[2], w[3])};
                half_dense<P>(window, items[m][h].first - first_base, lane, left[m]);
              }
              multiply_half<P>(sums, left, weights, 16 * h, live, lane);
            }
          } else {
            KAN_UNROLL_ALL
            for (int h = 0; h < 2; ++h) {
              float pairs[2][4];
              uint32_t marks[2];
              for (int m = 0; m < 2; ++m) {
                const int shift = items[m][h].first - first_base;
                tf32_pairs(items[m][h].w, shift, lane, pairs[m]);
                marks[m] = kSparse ? tf32_metadata(shift, lane) : tf32_uppers(shift, lane);
              }
              if constexpr (kSparse) {
                multiply_tf32<P, true>(sums, pairs, marks, weights, 16 * h, live, lane);
              } else {
                KAN_UNROLL_ALL
                for (int input = 0; input < 2; ++input) {
                  float left[2][4];
                  const uint32_t none[2] = {};
                  for (int m = 0; m < 2; ++m)
                    for (int r = 0; r < 2; ++r) {
                      const bool upper = marks[m] >> (4 * (2 * input + r)) & 1u;
                      const float value = pairs[m][2 * input + r];
                      left[m][r] = upper ? 0.0f : value;
                      left[m][r + 2] = upper ? value : 0.0f;
                    }
                  multiply_tf32<P, false>(sums, left, none, weights, 16 * h + 8 * input, live, lane);
                }
              }
            }
          }
        }
        now.advance(chunks, begin, end, has_base);
        stage = stage + 1 < kStages ? stage + 1 : 0;
        next_stage = next_stage + 1 < kStages ? next_stage + 1 : 0;
      }
      wait_for_copies<0>();

      for_every_sum(sums, lane, [&](int row, int column, float sum) {
        const int64_t b = b0 + row, o = o0 + column;
        if (b >= p.batch || o >= p.out_features) return;
        if (parts != nullptr) parts[(slice * p.batch + b) * p.out_features + o] = sum;
        else put(static_cast<T*>(p.y)[b * p.out_features + o], sum);
      });
    }
}

template <Products P, bool kSparse> int launch_output_wide(const WideArguments& a, float* parts, Slices slices, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_cubics(a, stream)) return error;
  const Blocks blocks{(p.batch + kWideRows - 1) / kWideRows, (p.out_features + kWideColumns - 1) / kWideColumns, slices.count};
  return launch(output_wide<P, kSparse>, blocks, kWideThreads, kOutputShared<P>, stream, a, parts, slices.count, slices.rows);
}

}  // namespace kan::cuda
