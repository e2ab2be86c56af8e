// contract_weight of wide layers on tensor cores: Phi^T g, where the batch is the depth of the product and is cut into slices
// that are summed apart and added in a fixed order. The features of a step are made as contract_output's are, but stand in
// shared memory as they are, rows of the batch, and are read transposed.
#pragma once
#include "launch.h"
#include "operand.cuh"

namespace kan::cuda {

// A block: 16 inputs by 8 bases, or 128 inputs of the base branch, by kColumns outputs; a step: 32 rows of the batch.
constexpr int kBlockInputs = kWideRows / kStepBases;

// A row of 128 features. 16-bit types: 16 pieces, those of eight rows at one place in different banks. tf32: a pitch, for the
// transposed reading is of single numbers.
template <Products P> struct FeatureRow {
  static constexpr int kPieces = kIsHalf<P> ? 16 : 32, kPitch = kIsHalf<P> ? 256 : 4 * kPitchOf<kWideRows>;
  static constexpr int kBytes = kStepDepth * kPitch;
  KAN_DEVICE static int piece_at(int row, int piece) { return row * kPitch + (kIsHalf<P> ? piece ^ (row & 7) : piece) * 16; }
};

template <Products P> KAN_DEVICE void write_features(char* features, const Kept<P>& window, int chunk, int row, int input) {
  using Row = FeatureRow<P>;
  const int shift = window.first - chunk * kStepBases;
  if constexpr (kIsHalf<P>) {
    Words<4> words;
    spread_words<P>(window.w, shift, words.w);
    *reinterpret_cast<Words<4>*>(features + Row::piece_at(row, input)) = words;
  } else {
    Words<4> lower, upper;
    spread_numbers<false>(window.w, shift, lower, upper);
    *reinterpret_cast<Words<4>*>(features + Row::piece_at(row, 2 * input)) = lower;
    *reinterpret_cast<Words<4>*>(features + Row::piece_at(row, 2 * input + 1)) = upper;
  }
}

// A warp's part of a step: features `column` .. by its columns of the gradients.
template <Products P, class Tile, class T>
KAN_DEVICE void multiply_features(SumsOf<Tile::kHigh, Tile::kTiles>& sums, const char* features, const T* gradients, int column,
                                  int live, int lane) {
  using Row = FeatureRow<P>;
  // Matrices of a 16-bit fragment: rows of the batch k .. (lanes 0-15) and k + 8 .., columns 0 .. and 8 .. in turn.
  const int place = Row::piece_at((lane & 7) + (lane >> 4) * 8, column / 8 + (lane >> 3 & 1));
  KAN_UNROLL_ALL
  for (int k = 0; k < kStepDepth; k += 16) {
    const T* rows = gradients + k * Tile::kPitch;
    if constexpr (kIsHalf<P>) {
      uint32_t left[Tile::kHigh][4];
      KAN_UNROLL_ALL
      for (int m = 0; m < Tile::kHigh; ++m) load_matrices_transposed(left[m], features + (place ^ 2 * m * 16) + k * Row::kPitch);
      multiply_half<P, Tile::kPitch>(sums, left, rows, live, lane);
    } else {
      uint32_t left[2][Tile::kHigh][4];
      const uint32_t none[2][Tile::kHigh] = {};
      KAN_UNROLL_ALL
      for (int d = 0; d < 2; ++d)
        KAN_UNROLL_ALL
        for (int m = 0; m < Tile::kHigh; ++m)
          KAN_UNROLL_ALL
          for (int r = 0; r < 4; ++r) {
            const int line = k + 8 * d + (lane & 3) + 4 * (r >> 1), at = column + 16 * m + lane / 4 + 8 * (r & 1);
            left[d][m][r] = as_bits(reinterpret_cast<const float*>(features + line * Row::kPitch)[at]);
          }
      multiply_tf32<P, false, Tile::kPitch>(sums, left, none, rows, live, lane);
    }
  }
}

template <Products P, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    weight_wide(WideArguments a, void* spline, void* base, bool whole, int slices, int64_t rows_per_slice) {
  using T = typename StorageOf<P>::Type;
  using Tile = WarpTile<P, kColumns>;
  constexpr int kStages = Tile::kStages, kNumbers = 16 / sizeof(T), kRows = kThreads / (kColumns / kNumbers);
  const Problem& p = a.p;
  T* stages = shared_memory<T>();
  char* features = shared_memory<char>() + Tile::kBytesOfStages;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % Tile::kDown * Tile::kRows, warp_column = warp / Tile::kDown * Tile::kTiles * 8;
  const int inputs = int(p.in_features), outputs = int(p.out_features), bases = p.bases();
  const int chunks = (bases + kStepBases - 1) / kStepBases, spline_parts = (inputs + kBlockInputs - 1) / kBlockInputs * chunks;
  const int part = int(blockIdx.x);
  const bool is_base = part >= spline_parts;
  const int chunk = is_base ? 0 : part % chunks, i0 = is_base ? (part - spline_parts) * kWideRows : part / chunks * kBlockInputs;
  ThreadWindows<P, false, kBlockInputs> windows;

  for (int slice = blockIdx.z; slice < slices; slice += gridDim.z)
    for (int o0 = blockIdx.y * kColumns; o0 < outputs; o0 += gridDim.y * kColumns) {
      const int64_t begin = slice * rows_per_slice, end = begin + rows_per_slice < p.batch ? begin + rows_per_slice : p.batch;
      const int steps = int((end - begin + kStepDepth - 1) / kStepDepth), live = outputs - o0 - warp_column;
      auto rows_of = [&](int s) {
        const int64_t left = end - begin - int64_t(s) * kStepDepth;
        return left >= kStepDepth ? kStepDepth : left > 0 ? int(left) : 0;
      };
      SumsOf<Tile::kHigh, Tile::kTiles> sums = {};
      barrier();
      if (!is_base) windows.load(a, begin, rows_of(0), i0, inputs);
      // As in contract_output.
      KAN_NO_UNROLL
      for (int s = 1 - kStages; s <= steps; ++s) {
        if (s >= 0 && s < steps) {
          char* to = features + (s & 1) * FeatureRow<P>::kBytes;
          const int64_t b0 = begin + int64_t(s) * kStepDepth;
          if (is_base) {
            auto place = [&](int row, int piece) { return to + FeatureRow<P>::piece_at(row, piece); };
            write_base<P, FeatureRow<P>::kPieces>(a, b0, rows_of(s), i0, inputs, place);
          } else {
            windows.evaluate(a, b0, rows_of(s), i0, inputs);
            windows.load(a, b0 + kStepDepth, rows_of(s + 1), i0, inputs);
            windows.for_each([&](const Kept<P>& window, int row, int input) { write_features<P>(to, window, chunk, row, input); });
          }
        }
        KAN_NO_UNROLL
        for (int phase = 0; phase < 2; ++phase) {
          if (phase == warp / 4) {
            wait_for_copies<kStages - 2>();
            barrier();
            const int coming = s + kStages - 1;
            if (coming < steps) {
              const unsigned thread = thread_now();
              const int row = int(thread / (kColumns / kNumbers)), column = o0 + int(thread % (kColumns / kNumbers)) * kNumbers;
              const T* from = static_cast<const T*>(p.g) + (begin + int64_t(coming) * kStepDepth + row) * outputs + column;
              T* to = stages + unsigned(coming) % kStages * Tile::kStageNumbers + row * Tile::kPitch + column - o0;
              const uint64_t distance = uint64_t(kRows) * unsigned(outputs);
              stage_lines<kStepDepth / kRows, kRows * Tile::kPitch>(a, from, distance, to, outputs - column, row, kRows, rows_of(coming));
            }
            commit_copies();
          } else if (const int step = s - warp / 4; step >= 0 && step < steps) {
            const T* gradients = stages + unsigned(step) % kStages * Tile::kStageNumbers + warp_column;
            multiply_features<P, Tile>(sums, features + (step & 1) * FeatureRow<P>::kBytes, gradients, warp_row, live, lane);
          }
        }
      }
      wait_for_copies<0>();

      auto store = [&](auto* to) {
        store_sums(sums, o0 + warp_column, outputs, lane, [&](int row) {
          row += warp_row;
          const int i = i0 + (is_base ? row : row / kStepBases), f = chunk * kStepBases + row % kStepBases;
          const int64_t line = int64_t(slice) * inputs + i;
          if (i >= inputs || (!is_base && f >= bases)) return static_cast<decltype(to)>(nullptr);
          return to + (is_base ? line : line * bases + f) * outputs;
        });
      };
      void* to = is_base ? base : spline;
      if (whole) store(static_cast<T*>(to));
      else store(static_cast<float*>(to));
    }
}

template <Products P> int launch_weight_wide(const WideArguments& a, int columns, float* parts, Slices slices, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_cubics(a, stream)) return error;
  const int64_t chunks = (p.bases() + kStepBases - 1) / kStepBases;
  const int64_t base_parts = p.d_base != nullptr ? (p.in_features + kWideRows - 1) / kWideRows : 0;
  const int64_t spline_parts = (p.in_features + kBlockInputs - 1) / kBlockInputs * chunks;
  void* spline = parts == nullptr ? p.d_spline : parts;
  void* base = parts == nullptr ? p.d_base : parts + slices.count * p.in_features * p.bases() * p.out_features;
  auto start = [&](auto kernel, size_t stages) {
    const Blocks blocks{spline_parts + base_parts, (p.out_features + columns - 1) / columns, slices.count};
    const size_t shared = stages + 2 * FeatureRow<P>::kBytes;
    return launch(kernel, blocks, kThreads, shared, stream, a, spline, base, parts == nullptr, int(slices.count), slices.rows);
  };
  if constexpr (kIsHalf<P>)
    if (columns == 256) return start(weight_wide<P, 256>, WarpTile<P, 256>::kBytesOfStages);
  return start(weight_wide<P, 128>, WarpTile<P, 128>::kBytesOfStages);
}

}  // namespace kan::cuda
