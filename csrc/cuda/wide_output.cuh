// contract_output of wide layers on tensor cores: y = Phi W, where Phi (batch, in * bases) is made a step at a time in shared
// memory.
#pragma once
#include "launch.h"
#include "operand.cuh"
#include "products.cuh"

namespace kan::cuda {

// A block: 128 rows by kColumns outputs, 8 warps. Each makes a share of the next step's operand and multiplies its part of this
// step's, kRows by 64; four of them begin with the one, four with the other, so that both kinds of units are always busy.
template <Products P, int kColumns> struct OutputTile {
  static constexpr int kRows = kColumns == 256 ? 64 : 32, kHigh = kRows / 16, kTiles = 8, kDown = kWideRows / kRows;
  static constexpr int kPitch = kPitchOf<kColumns>, kStageNumbers = kStepDepth * kPitch;
  // Stages of weights in flight; with fewer bytes to a number there is room for more.
  static constexpr int kStages = kIsHalf<P> ? 4 : 3;
  static constexpr size_t kStageBytes = kStageBytesOf<P, kColumns>;
  static_assert(kColumns == kOutputThreads / 32 / kDown * kTiles * 8);

  template <bool kSparse> static constexpr size_t shared() {
    return kStages * kStageBytes + 2 * (kOperandBytes<P> + kMetadataBytes<P, kSparse>);
  }
};

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

// 32 rows of weights. A thread's pieces stand under each other, so that one address leads to the next.
template <Products P, bool kSparse, int kColumns, class T = typename StorageOf<P>::Type>
KAN_DEVICE void stage_weights(const WideArguments& a, const Step& step, int end, int o0, T* stage) {
  const Problem& p = a.p;
  constexpr int kNumbers = 16 / sizeof(T), kRows = kOutputThreads / (kColumns / kNumbers);
  static_assert(kRows % kStepBases == 0, "all of a thread's rows are of one basis");
  const unsigned thread = thread_now();
  const int row = int(thread / (kColumns / kNumbers)), column = o0 + int(thread % (kColumns / kNumbers)) * kNumbers;
  const bool is_base = step.chunk < 0;
  const int f = step.chunk * kStepBases + basis_of_place<kSparse, kIsHalf<P>>(row % kStepBases), bases = p.bases();
  int i = step.input + (is_base ? row : row / kStepBases);
  const int last = is_base || f < bases ? end : 0, next = is_base ? kRows : kRows / kStepBases;
  const unsigned outputs = unsigned(p.out_features), line = is_base ? i : i * bases + f, lines = is_base ? next : next * bases;
  const T* from = static_cast<const T*>(is_base ? p.base_weight : p.spline_weight) + uint64_t(line) * outputs + column;
  const uint64_t distance = uint64_t(lines) * outputs;
  T* to = stage + row * kPitchOf<kColumns> + (column - o0);
  auto advance = [&] { to += kRows * kPitchOf<kColumns>, from += distance, i += next; };
  if (a.aligned) {
    const bool live = column < p.out_features;
    KAN_UNROLL_ALL
    for (int r = 0; r < kStepDepth; r += kRows, advance()) copy_16_bytes(to, live && i < last ? from : nullptr, !(live && i < last));
  } else {
    KAN_NO_UNROLL
    for (int r = 0; r < kStepDepth; r += kRows, advance()) stage_16_bytes(to, from, i < last ? p.out_features - column : 0, false);
  }
}

// A warp's part of a step. kSparseStep: the operand is in its sparse form.
template <Products P, bool kSparseStep, class Tile, class T>
KAN_DEVICE void multiply_step(SumsOf<Tile::kHigh, Tile::kTiles>& sums, const char* operand, const char* metadata, const T* weights,
                              int row, int live, int lane) {
  constexpr int kHere = kPieces<P, kSparseStep>, kDepth = kStepDepth / (kHere / 2);
  KAN_UNROLL_ALL
  for (int k = 0; k < kHere / 2; ++k) {
    uint32_t left[Tile::kHigh][4], e[Tile::kHigh];
    KAN_UNROLL_ALL
    for (int m = 0; m < Tile::kHigh; ++m) {
      load_matrices(left[m], operand + piece_offset<kHere>(row + 16 * m + (lane & 15), 2 * k + (lane >> 4)));
      e[m] = 0;
      if constexpr (kSparseStep)
        e[m] = *reinterpret_cast<const uint32_t*>(metadata + metadata_offset<P>(row + 16 * m + lane / 4, 2 * k + (lane & 1)));
    }
    const T* rows = weights + k * kDepth * Tile::kPitch;
    if constexpr (!kIsHalf<P>) multiply_tf32<P, kSparseStep, Tile::kPitch>(sums, left, e, rows, live, lane);
    else if constexpr (kSparseStep) multiply_half_sparse<P, Tile::kPitch>(sums, left, e, rows, live, lane);
    else multiply_half<P, Tile::kPitch>(sums, left, rows, live, lane);
  }
}

// A warp's sums to rows b .., columns o .. of y or of a slice's part of it.
template <int kHigh, int kTiles, class To>
KAN_DEVICE void store_sums(const SumsOf<kHigh, kTiles>& sums, To* y, const Problem& p, int64_t b, int64_t o, int lane) {
  b += lane / 4, o += lane % 4 * 2;
  const bool pairs = p.out_features % 2 == 0;
  KAN_UNROLL_ALL
  for (int half = 0; half < 2 * kHigh; ++half) {
    if (b + 8 * half >= p.batch) break;
    To* row = y + (b + 8 * half) * p.out_features + o;
    KAN_UNROLL_ALL
    for (int n = 0; n < kTiles; ++n) {
      const float *sum = sums[half / 2][n] + half % 2 * 2;
      const int64_t left = p.out_features - o - 8 * n;
      if (left <= 0) break;
      if (pairs) store_pair(row + 8 * n, sum[0], sum[1]);
      else {
        put(row[8 * n], sum[0]);
        if (left > 1) put(row[8 * n + 1], sum[1]);
      }
    }
  }
}

template <Products P, bool kSparse, int kColumns>
__global__ void __launch_bounds__(kOutputThreads)
    output_wide(WideArguments a, float* parts, int slices, int inputs_per_slice) {
  using T = typename StorageOf<P>::Type;
  using Tile = OutputTile<P, kColumns>;
  constexpr int kStages = Tile::kStages;
  const Problem& p = a.p;
  T* stages = shared_memory<T>();
  char* operands = shared_memory<char>() + kStages * Tile::kStageBytes;
  char* metadata = operands + 2 * kOperandBytes<P>;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warp_row = warp % Tile::kDown * Tile::kRows, warp_column = warp / Tile::kDown * Tile::kTiles * 8;
  const int64_t b0 = int64_t(blockIdx.x) * kWideRows;
  const int chunks = (p.bases() + kStepBases - 1) / kStepBases;
  const bool has_base = p.base_weight != nullptr;
  ThreadWindows<P, kSparse> windows;

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
      windows.load(a, b0, begin, end);
      auto make = [&](int turn) {
        char* operand = operands + turn * kOperandBytes<P>;
        if (making.chunk < 0) {
          write_base<P>(a, b0, making.input, end, operand);
        } else {
          if (making.chunk == 0) {
            windows.evaluate(a, b0, making.input, end);
            windows.load(a, b0, making.input + kStepInputs, end);
          }
          windows.write(operand, metadata + turn * kMetadataBytes<P, kSparse>, making.chunk);
        }
      };

      // Step s is multiplied, s + 1 is made, and the weights of s + kStages - 1 set out.
      bool is_base = false;
      KAN_NO_UNROLL
      for (int s = 1 - kStages; s < steps; ++s) {
        wait_for_copies<kStages - 2>();
        barrier();
        if (s + kStages - 1 < steps)
          stage_weights<P, kSparse, kColumns>(a, coming, end, o0, stages + unsigned(s + kStages - 1) % kStages * Tile::kStageNumbers);
        commit_copies();
        coming.advance(chunks, begin, end, has_base);
        KAN_NO_UNROLL
        for (int phase = 0; phase < 2; ++phase) {
          if (phase == warp / 4) {
            if (s >= -1 && s + 1 < steps) make((s + 1) & 1);
          } else if (s >= 0) {
            const T* weights = stages + unsigned(s) % kStages * Tile::kStageNumbers + warp_column;
            const char *operand = operands + (s & 1) * kOperandBytes<P>, *chosen = metadata + (s & 1) * kMetadataBytes<P, kSparse>;
            if (kSparse && !is_base) multiply_step<P, kSparse, Tile>(sums, operand, chosen, weights, warp_row, live, lane);
            else multiply_step<P, false, Tile>(sums, operand, nullptr, weights, warp_row, live, lane);
          }
        }
        if (s < -1) continue;
        is_base = making.chunk < 0;
        making.advance(chunks, begin, end, has_base);
      }
      wait_for_copies<0>();

      const int64_t b = b0 + warp_row, o = o0 + warp_column;
      if (parts != nullptr) store_sums(sums, parts + int64_t(slice) * p.batch * p.out_features, p, b, o, lane);
      else store_sums(sums, static_cast<T*>(p.y), p, b, o, lane);
    }
}

template <Products P, bool kSparse>
int launch_output_wide(const WideArguments& a, int columns, float* parts, Slices slices, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_cubics(a, stream)) return error;
  auto start = [&](auto kernel, size_t shared) {
    const Blocks blocks{(p.batch + kWideRows - 1) / kWideRows, (p.out_features + columns - 1) / columns, slices.count};
    return launch(kernel, blocks, kOutputThreads, shared, stream, a, parts, int(slices.count), int(slices.rows));
  };
  if constexpr (kIsHalf<P>)
    if (columns == 256) return start(output_wide<P, kSparse, 256>, OutputTile<P, 256>::template shared<kSparse>());
  return start(output_wide<P, kSparse, 128>, OutputTile<P, 128>::template shared<kSparse>());
}

}  // namespace kan::cuda
