// contract_weight of wide layers on tensor cores: Phi^T g, where the batch is the depth of the product and is cut into slices
// that are summed apart and added in a fixed order.
#pragma once
#include "launch.h"
#include "products.cuh"

namespace kan::cuda {

// A block: 4 warps side by side in the inputs, each 4 inputs by 8 bases (or 32 inputs of the base branch), by 128 outputs.
// A step is 32 rows of the batch. A warp leaves the features of a step in shared memory, rows of the batch by its 32
// columns, and reads them back transposed.
constexpr int kWeightStages = 3, kFeaturePitch = 40;
template <Products P>
constexpr size_t kWeightShared =
    kWeightStages * kStageBytesOf<P, kWideColumns> + size_t(4) * kStepDepth * kFeaturePitch * sizeof(typename StorageOf<P>::Type);

template <class T> KAN_DEVICE void stage_gradients(const WideArguments& a, int64_t b0, int64_t end, int64_t o0, T* stage) {
  constexpr int kNumbers = 16 / sizeof(T), kPieces = kWideColumns / kNumbers;
  const Problem& p = a.p;
  for (int piece = threadIdx.x; piece < kStepDepth * kPieces; piece += kWideThreads) {
    const int row = piece / kPieces, column = piece % kPieces * kNumbers;
    const T* from = static_cast<const T*>(p.g) + (b0 + row) * p.out_features + o0 + column;
    stage_16_bytes(stage + row * kPitchOf<kWideColumns> + column, from, b0 + row < end ? p.out_features - o0 - column : 0, a.aligned);
  }
}

// features (32 rows of the batch, 4 inputs x 8 bases): lane = row.
template <class T> KAN_DEVICE void make_features(const WideArguments& a, int64_t b, int64_t end, int64_t i0, int chunk, T* row) {
  const Problem& p = a.p;
  for (int input = 0; input < kStepInputs; ++input) {
    T* to = row + input * kStepBases;
    KAN_UNROLL_ALL
    for (int f = 0; f < kStepBases; ++f) to[f] = T{};
    const int64_t i = i0 + input;
    if (b >= end || i >= p.in_features) continue;
    const Point point = load_point(p, b, i);
    const Item item = evaluate(a, i, point.x, point.scale);
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m) {
      const int f = item.first - chunk * kStepBases + m;
      if (f >= 0 && f < kStepBases) put(to[f], item.w[m]);
    }
  }
}

template <Products P>
__global__ void __launch_bounds__(kWideThreads)
    weight_wide(WideArguments a, void* spline, void* base, bool whole, int64_t slices, int64_t rows_per_slice) {
  using T = typename StorageOf<P>::Type;
  const Problem& p = a.p;
  constexpr int kStageNumbers = kStepDepth * kPitchOf<kWideColumns>;
  T* stages = shared_memory<T>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, q = lane & 3;
  T* features = stages + kWeightStages * kStageNumbers + warp * kStepDepth * kFeaturePitch;
  const int chunks = (p.bases() + kStepBases - 1) / kStepBases;
  const int spline_parts = int((p.in_features + 4 * kStepInputs - 1) / (4 * kStepInputs)) * chunks;
  const int part = int(blockIdx.x);
  const bool is_base = part >= spline_parts;
  const int chunk = is_base ? 0 : part % chunks;
  const int64_t i0 = is_base ? int64_t(part - spline_parts) * 128 + warp * 32 : int64_t(part / chunks) * 16 + warp * kStepInputs;

  for (int64_t slice = blockIdx.z; slice < slices; slice += gridDim.z)
    for (int64_t o0 = int64_t(blockIdx.y) * kWideColumns; o0 < p.out_features; o0 += int64_t(gridDim.y) * kWideColumns) {
      const int64_t begin = slice * rows_per_slice;
      const int64_t end = begin + rows_per_slice < p.batch ? begin + rows_per_slice : p.batch;
      const int live = p.out_features - o0 < kWideColumns ? int(p.out_features - o0) : kWideColumns;
      const int64_t steps = (end - begin + kStepDepth - 1) / kStepDepth;
      SumsOf<2, kWideColumns / 8> sums = {};
      barrier();
      for (int s = 0; s < kWeightStages - 1; ++s) {
        if (s < steps) stage_gradients(a, begin + s * kStepDepth, end, o0, stages + s * kStageNumbers);
        commit_copies();
      }
      int stage = 0, next_stage = kWeightStages - 1;
      for (int64_t s = 0; s < steps; ++s) {
        const int64_t b0 = begin + s * kStepDepth;
        warp_barrier();
        if (is_base) {
          const int64_t i = i0 + lane;
          for (int r = 0; r < kStepDepth; ++r) {
            const Point point = load_point(p, b0 + r, i);
            const bool inside = b0 + r < end && i < p.in_features;
            put(features[r * kFeaturePitch + lane], inside ? activate(a.activation, point.x) * point.scale : 0.0f);
          }
        } else {
          make_features(a, b0 + lane, end, i0, chunk, features + lane * kFeaturePitch);
        }
        warp_barrier();
        wait_for_copies<kWeightStages - 2>();
        barrier();
        if (s + kWeightStages - 1 < steps)
          stage_gradients(a, begin + (s + kWeightStages - 1) * kStepDepth, end, o0, stages + next_stage * kStageNumbers);
        commit_copies();
        const T* gradients = stages + stage * kStageNumbers;
        if constexpr (kIsHalf<P>) {
          KAN_UNROLL_ALL
          for (int k = 0; k < kStepDepth; k += 16) {
            uint32_t left[2][4];
            // Matrices of the fragment: rows of the batch k .. (lanes 0-15) and k + 8 .., columns 0 .. and 8 .. in turn.
            for (int m = 0; m < 2; ++m)
              load_matrices_transposed(left[m], features + (k + (lane & 7) + (lane >> 4) * 8) * kFeaturePitch + 16 * m + (lane & 8));
            multiply_half<P, kPitchOf<kWideColumns>>(sums, left, gradients + k * kPitchOf<kWideColumns>, live, lane);
          }
        } else {
          const uint32_t none[2] = {};
          for (int k = 0; k < kStepDepth; k += 8) {
            uint32_t left[2][4];
            KAN_UNROLL_ALL
            for (int m = 0; m < 2; ++m)
              KAN_UNROLL_ALL
              for (int r = 0; r < 4; ++r) left[m][r] = as_bits(features[(k + q + 4 * (r >> 1)) * kFeaturePitch + 16 * m + g + 8 * (r & 1)]);
            multiply_tf32<P, false, kPitchOf<kWideColumns>>(sums, left, none, gradients + k * kPitchOf<kWideColumns>, live, lane);
          }
        }
        stage = stage + 1 < kWeightStages ? stage + 1 : 0;
        next_stage = next_stage + 1 < kWeightStages ? next_stage + 1 : 0;
      }
      wait_for_copies<0>();

      for_every_sum(sums, lane, [&](int column, int output, float sum) {
        const int64_t i = i0 + (is_base ? column : column / kStepBases), o = o0 + output;
        const int f = chunk * kStepBases + column % kStepBases;
        if (i >= p.in_features || o >= p.out_features || (!is_base && f >= p.bases())) return;
        const int64_t row = slice * p.in_features + i, at = (is_base ? row : row * p.bases() + f) * p.out_features + o;
        void* to = is_base ? base : spline;
        if (whole) put(static_cast<T*>(to)[at], sum);
        else static_cast<float*>(to)[at] = sum;
      });
    }
}

template <Products P> int launch_weight_wide(const WideArguments& a, float* parts, Slices slices, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_cubics(a, stream)) return error;
  const int64_t chunks = (p.bases() + kStepBases - 1) / kStepBases;
  const int64_t base_parts = p.d_base != nullptr ? (p.in_features + 127) / 128 : 0;
  const Blocks blocks{(p.in_features + 15) / 16 * chunks + base_parts, (p.out_features + kWideColumns - 1) / kWideColumns, slices.count};
  void* spline = parts == nullptr ? p.d_spline : parts;
  void* base = parts == nullptr ? p.d_base : parts + slices.count * p.in_features * p.bases() * p.out_features;
  return launch(weight_wide<P>, blocks, kWideThreads, kWeightShared<P>, stream, a, spline, base, parts == nullptr, slices.count,
                slices.rows);
}

}  // namespace kan::cuda
