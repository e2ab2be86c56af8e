// contract_output of wide layers on tensor cores: y = Phi W, where Phi (batch, in * bases) is made a step at a time in shared
// memory. Each warp makes a share of the next step's operand and multiplies its part of this step's; four of them begin with the
// one, four with the other, so that both kinds of units are always busy.
#pragma once
#include "launch.h"
#include "operand.cuh"

namespace kan::cuda {

// The steps of a slice: groups of 4 inputs, each with all its chunks of 8 bases; then the base branch, 32 inputs a step.
struct Step {
  int input;
  int chunk;  // -1: base branch

  KAN_DEVICE void advance(int chunks, int begin, int end, bool has_base) {
    if (chunk < 0) input += kStepDepth;
    else if (++chunk == chunks) {
      chunk = 0;
      input += kStepInputs;
      if (input >= end && has_base) input = begin, chunk = -1;
    }
  }
};

// 32 rows of weights.
template <Products P, bool kSparse, int kColumns, class T = typename StorageOf<P>::Type>
KAN_DEVICE void stage_weights(const WideArguments& a, const Step& step, int end, int o0, T* stage) {
  const Problem& p = a.p;
  constexpr int kNumbers = 16 / sizeof(T), kRows = kThreads / (kColumns / kNumbers);
  static_assert(kRows % kStepBases == 0, "all of a thread's rows are of one basis");
  const unsigned thread = thread_now();
  const int row = int(thread / (kColumns / kNumbers)), column = o0 + int(thread % (kColumns / kNumbers)) * kNumbers;
  const bool is_base = step.chunk < 0;
  const int f = step.chunk * kStepBases + basis_of_place<kSparse, kIsHalf<P>>(row % kStepBases), bases = p.bases();
  const int i = step.input + (is_base ? row : row / kStepBases);
  const int last = is_base || f < bases ? end : 0, next = is_base ? kRows : kRows / kStepBases;
  const unsigned outputs = unsigned(p.out_features), line = is_base ? i : i * bases + f, lines = is_base ? next : next * bases;
  const T* from = static_cast<const T*>(is_base ? p.base_weight : p.spline_weight) + uint64_t(line) * outputs + column;
  T* to = stage + row * kPitchOf<kColumns> + column - o0;
  stage_lines<kStepDepth / kRows, kRows * kPitchOf<kColumns>>(a, from, uint64_t(lines) * outputs, to, int(outputs) - column, i, next, last);
}

// A warp's part of a step. kSparseStep: the operand is in its sparse form.
template <Products P, bool kSparseStep, class Tile, class T>
KAN_DEVICE void multiply_step(SumsOf<Tile::kHigh, Tile::kTiles>& sums, const char* operand, const char* metadata, const T* weights,
                              int row, int live, int lane) {
  constexpr int kHere = kPieces<P, kSparseStep>, kDepth = kStepDepth / (kHere / 2), kDeep = kIsHalf<P> ? 1 : 2;
  const int place = piece_offset<kHere>(row + (lane & 15), lane >> 4);
  KAN_UNROLL_ALL
  for (int k = 0; k < kHere / 2; k += kDeep) {
    uint32_t left[kDeep][Tile::kHigh][4], e[kDeep][Tile::kHigh] = {};
    KAN_UNROLL_ALL
    for (int d = 0; d < kDeep; ++d)
      KAN_UNROLL_ALL
      for (int m = 0; m < Tile::kHigh; ++m) {
        load_matrices(left[d][m], operand + (place ^ 2 * (k + d) * 16) + 16 * m * kHere * 16);
        if constexpr (kSparseStep) {
          const int at = metadata_offset<P>(row + 16 * m + lane / 4, 2 * (k + d) + (lane & 1));
          e[d][m] = *reinterpret_cast<const uint32_t*>(metadata + at);
        }
      }
    const T* rows = weights + k * kDepth * Tile::kPitch;
    if constexpr (!kIsHalf<P>) multiply_tf32<P, kSparseStep, Tile::kPitch>(sums, left, e, rows, live, lane);
    else if constexpr (kSparseStep) multiply_half_sparse<P, Tile::kPitch>(sums, left[0], e[0], rows, live, lane);
    else multiply_half<P, Tile::kPitch>(sums, left[0], rows, live, lane);
  }
}

template <Products P, bool kSparse, int kColumns>
__global__ void __launch_bounds__(kThreads, 1)
    output_wide(WideArguments a, float* parts, int slices, int inputs_per_slice) {
  using T = typename StorageOf<P>::Type;
  using Tile = WarpTile<P, kColumns>;
  constexpr int kStages = Tile::kStages;
  const Problem& p = a.p;
  T* stages = shared_memory<T>();
  char* operands = shared_memory<char>() + Tile::kBytesOfStages;
  char* metadata = operands + 2 * kOperandBytes<P>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % Tile::kDown * Tile::kRows, warp_column = warp / Tile::kDown * Tile::kTiles * 8;
  const int64_t b0 = int64_t(blockIdx.x) * kWideRows;
  const int chunks = (p.bases() + kStepBases - 1) / kStepBases;
  const bool has_base = p.base_weight != nullptr;
  const int rows = p.batch - b0 < kWideRows ? int(p.batch - b0) : kWideRows;
  ThreadWindows<P, kSparse, kStepInputs> windows;

  for (int slice = blockIdx.z; slice < slices; slice += gridDim.z)
    for (int o0 = blockIdx.y * kColumns; o0 < p.out_features; o0 += gridDim.y * kColumns) {
      const int begin = slice * inputs_per_slice, inputs = int(p.in_features);
      const int end = inputs - begin > inputs_per_slice ? begin + inputs_per_slice : inputs;
      const int live = (p.out_features - o0 < kColumns ? int(p.out_features - o0) : kColumns) - warp_column;
      const int steps =
          (end - begin + kStepInputs - 1) / kStepInputs * chunks + (has_base ? (end - begin + kStepDepth - 1) / kStepDepth : 0);
      SumsOf<Tile::kHigh, Tile::kTiles> sums = {};
      Step coming{begin, 0}, making{begin, 0};
      barrier();
      windows.load(a, b0, rows, begin, end);
      // Step s is made, multiplied at once or, by half of the warps, while the others make the next, and the weights of
      // s + kStages - 1 set out.
      bool is_base = false;
      KAN_NO_UNROLL
      for (int s = 1 - kStages; s <= steps; ++s) {
        const bool was_base = is_base;
        if (s >= 0 && s < steps) {
          char* operand = operands + (s & 1) * kOperandBytes<P>;
          is_base = making.chunk < 0;
          if (is_base) {
            constexpr int kHere = kPieces<P, false>;
            auto place = [&](int row, int piece) { return operand + piece_offset<kHere>(row, piece); };
            write_base<P, kHere>(a, b0, rows, making.input, end, place);
          } else {
            if (making.chunk == 0) {
              windows.evaluate(a, b0, rows, making.input, end);
              windows.load(a, b0, rows, making.input + kStepInputs, end);
            }
            windows.for_each([&](const Kept<P>& window, int row, int input) {
              write_window<P, kSparse>(operand, metadata + (s & 1) * kMetadataBytes<P, kSparse>, window, making.chunk, row, input);
            });
          }
          making.advance(chunks, begin, end, has_base);
        }
        KAN_NO_UNROLL
        for (int phase = 0; phase < 2; ++phase) {
          if (phase == warp / 4) {
            wait_for_copies<kStages - 2>();
            barrier();
            if (s + kStages - 1 < steps) {
              T* stage = stages + unsigned(s + kStages - 1) % kStages * Tile::kStageNumbers;
              stage_weights<P, kSparse, kColumns>(a, coming, end, o0, stage);
            }
            commit_copies();
            coming.advance(chunks, begin, end, has_base);
          } else if (const int step = s - warp / 4; step >= 0 && step < steps) {
            const T* weights = stages + unsigned(step) % kStages * Tile::kStageNumbers + warp_column;
            const char* operand = operands + (step & 1) * kOperandBytes<P>;
            const char* chosen = metadata + (step & 1) * kMetadataBytes<P, kSparse>;
            if (kSparse && !(warp / 4 ? was_base : is_base))
              multiply_step<P, kSparse, Tile>(sums, operand, chosen, weights, warp_row, live, lane);
            else
              multiply_step<P, false, Tile>(sums, operand, nullptr, weights, warp_row, live, lane);
          }
        }
      }
      wait_for_copies<0>();

      auto store = [&](auto* y) {
        store_sums(sums, o0 + warp_column, int(p.out_features), lane, [&](int row) {
          const int64_t b = b0 + warp_row + row;
          return b < p.batch ? y + b * p.out_features : nullptr;
        });
      };
      if (parts != nullptr) store(parts + int64_t(slice) * p.batch * p.out_features);
      else store(static_cast<T*>(p.y));
    }
}

template <Products P, bool kSparse>
int launch_output_wide(const WideArguments& a, int columns, float* parts, Slices slices, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_cubics(a, stream)) return error;
  auto start = [&](auto kernel, size_t stages) {
    const size_t shared = stages + 2 * (kOperandBytes<P> + kMetadataBytes<P, kSparse>);
    const Blocks blocks{(p.batch + kWideRows - 1) / kWideRows, (p.out_features + columns - 1) / columns, slices.count};
    return launch(kernel, blocks, kThreads, shared, stream, a, parts, int(slices.count), int(slices.rows));
  };
  if constexpr (kIsHalf<P>)
    if (columns == 256) return start(output_wide<P, kSparse, 256>, WarpTile<P, 256>::kBytesOfStages);
  return start(output_wide<P, kSparse, 128>, WarpTile<P, 128>::kBytesOfStages);
}

}  // namespace kan::cuda
