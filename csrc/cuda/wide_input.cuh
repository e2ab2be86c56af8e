// contract_input of wide layers on tensor cores: the product g W^T, whose epilogue weighs by phi^(n) and sums over the bases.
#pragma once
#include "launch.h"
#include "operand.cuh"

namespace kan::cuda {

// A block: 8 warps, 128 rows of the batch by kInputs inputs with 8 bases each, and the base branch of these inputs. A warp: kRows
// rows by 8 inputs, a tile of 8 columns each, and one tile for their base branch.
template <Products P> struct InputTile {
  static constexpr int kHigh = kIsHalf<P> ? 4 : 2, kRows = 16 * kHigh, kDown = kWideRows / kRows, kAcross = kThreads / 32 / kDown;
  static constexpr int kInputs = 8 * kAcross, kBaseRow = kWideRows + kInputs * kStepBases;
  // A stage: 64 bytes of outputs, of the rows of g, of the weights of all bases and of the base weights.
  static constexpr int kStages = 3, kLineBytes = 64, kStageBytes = (kBaseRow + kInputs) * kLineBytes;
  // After the products a warp's sums, 16 rows at a time, lie where the stages were.
  static constexpr int kSumsPitch = 8 * kStepBases + 8 + 1;
  static_assert(kThreads / 32 * 16 * kSumsPitch * sizeof(float) <= kStages * kStageBytes);
  static constexpr size_t kShared = kStages * kStageBytes + size_t(kWideRows) * kInputs * sizeof(float);
  using Sums = SumsOf<kHigh, 9>;
};

// sum += a b^T of one column tile. low: of numbers split in two.
template <Products P>
KAN_DEVICE void add_product(float (&sum)[4], const uint32_t (&high)[4], const uint32_t (&low)[4], uint32_t b0, uint32_t b1) {
  if constexpr (P == Products::bfloat16) {
    mma_bfloat16(sum, high, b0, b1);
  } else if constexpr (P == Products::float16) {
    mma_float16(sum, high, b0, b1);
  } else {
    uint32_t b[2], b_low[2];
    split<P>(as_float(b0), b[0], b_low[0]);
    split<P>(as_float(b1), b[1], b_low[1]);
    if constexpr (P == Products::tf32) {
      mma_tf32(sum, high, b[0], b[1]);
    } else {
      add_three_products<1>(sum, [&](float(&to)[4], int, bool low_left, bool low_right) {
        mma_tf32(to, low_left ? low : high, low_right ? b_low[0] : b[0], low_right ? b_low[1] : b[1]);
      });
    }
  }
}

// A warp's part of a stage.
template <Products P, class Tile>
KAN_DEVICE void multiply_rows(typename Tile::Sums& sums, const char* stage, bool has_base, int warp, int lane) {
  const int across = warp / Tile::kDown, left_place = piece_offset<4>(warp % Tile::kDown * Tile::kRows + (lane & 15), lane >> 4);
  const int spline_place = piece_offset<4>(kWideRows + 64 * across + (lane & 7) + (lane >> 4) * 8, lane >> 3 & 1);
  const int base_place = piece_offset<4>(Tile::kBaseRow + 8 * across + (lane & 7), lane >> 3 & 1);
  auto half = [&](int k) {
    uint32_t high[Tile::kHigh][4], low[Tile::kHigh][4];
    KAN_UNROLL_ALL
    for (int m = 0; m < Tile::kHigh; ++m) {
      load_matrices(high[m], stage + (left_place ^ 2 * k * 16) + 16 * m * Tile::kLineBytes);
      KAN_UNROLL_ALL
      for (int r = 0; r < 4; ++r) {
        low[m][r] = 0;
        if constexpr (!kIsHalf<P>) split<P>(as_float(high[m][r]), high[m][r], low[m][r]);
      }
    }
    KAN_UNROLL_ALL
    for (int n = 0; n <= 8; n += 2) {
      if (n == 8 && !has_base) break;
      uint32_t b[4];
      load_matrices(b, stage + (n < 8 ? (spline_place ^ 2 * k * 16) + 8 * n * Tile::kLineBytes : base_place ^ 2 * k * 16));
      KAN_UNROLL_ALL
      for (int m = 0; m < Tile::kHigh; ++m) {
        add_product<P>(sums[m][n], high[m], low[m], b[0], b[1]);
        if (n < 8) add_product<P>(sums[m][n + (n < 8)], high[m], low[m], b[2], b[3]);
      }
    }
  };
  if constexpr (P == Products::tf32x3) {
    // Mixed with each other, the two would want more registers than there are.
    KAN_NO_UNROLL
    for (int k = 0; k < 2; ++k) half(k);
  } else {
    half(0), half(1);
  }
}

// Outputs o0 .. of g's rows b0 .. and of the weights of inputs i0 .., bases 8 chunk ..; the base branch where it has its turn.
template <class Tile, class T>
KAN_DEVICE void stage_rows(const WideArguments& a, int64_t b0, int rows, int i0, int chunk, bool has_base, int o0, char* stage) {
  const Problem& p = a.p;
  constexpr int kRows = kThreads / 4, kPitch = Tile::kLineBytes / sizeof(T), kInputs = kRows / kStepBases;
  const unsigned thread = thread_now();
  const int row = int(thread / 4), column = o0 + int(thread % 4) * int(16 / sizeof(T)), f = chunk * kStepBases + row % kStepBases;
  const int inputs = int(p.in_features), bases = p.bases(), i = i0 + row / kStepBases;
  const unsigned outputs = unsigned(p.out_features);
  T* to = reinterpret_cast<T*>(stage + piece_offset<4>(row, int(thread % 4)));
  const int left = int(outputs) - column;
  auto line = [&](const void* data, int64_t number) { return static_cast<const T*>(data) + number * outputs + column; };
  stage_lines<kWideRows / kRows, kRows * kPitch>(a, line(p.g, b0 + row), uint64_t(kRows) * outputs, to, left, row, kRows, rows);
  const uint64_t distance = uint64_t(unsigned(kInputs * bases)) * outputs;
  stage_lines<Tile::kInputs / kInputs, kRows * kPitch>(a, line(p.spline_weight, i * bases + f), distance, to + kWideRows * kPitch, left,
                                                       i, kInputs, f < bases ? inputs : 0);
  if (has_base && row < Tile::kInputs)
    stage_lines<1, 0>(a, line(p.base_weight, i0 + row), uint64_t(0), to + Tile::kBaseRow * kPitch, left, i0 + row, 0, inputs);
}

template <Products P> __global__ void __launch_bounds__(kThreads, 1) input_wide(WideArguments a) {
  using T = typename StorageOf<P>::Type;
  using Tile = InputTile<P>;
  constexpr int kDepth = Tile::kLineBytes / sizeof(T), kStages = Tile::kStages;
  const Problem& p = a.p;
  char* stages = shared_memory<char>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t b0 = int64_t(blockIdx.x) * kWideRows;
  const int rows = p.batch - b0 < kWideRows ? int(p.batch - b0) : kWideRows;
  const int inputs = int(p.in_features), steps = (int(p.out_features) + kDepth - 1) / kDepth;
  const int chunks = (p.bases() + kStepBases - 1) / kStepBases;

  for (int i0 = blockIdx.y * Tile::kInputs; i0 < inputs; i0 += gridDim.y * Tile::kInputs)
    for (int chunk = 0; chunk < chunks; ++chunk) {
      const bool has_base = p.base_weight != nullptr && chunk == 0;
      typename Tile::Sums sums = {};
      barrier();
      KAN_NO_UNROLL
      for (int s = 1 - kStages; s < steps; ++s) {
        wait_for_copies<kStages - 2>();
        barrier();
        if (const int coming = s + kStages - 1; coming < steps) {
          char* stage = stages + unsigned(coming) % kStages * Tile::kStageBytes;
          stage_rows<Tile, T>(a, b0, rows, i0, chunk, has_base, coming * kDepth, stage);
        }
        commit_copies();
        if (s >= 0) multiply_rows<P, Tile>(sums, stages + unsigned(s) % kStages * Tile::kStageBytes, has_base, warp, lane);
      }
      wait_for_copies<0>();
      barrier();

      // Lane: one of the warp's 8 inputs, one of 4 rows at a time. 16 rows' sums come from the lanes that have them; the code
      // stands here once, and the sums move along.
      float* values = shared_memory<float>() + warp * 16 * Tile::kSumsPitch;
      float* totals = reinterpret_cast<float*>(stages + kStages * Tile::kStageBytes);  // (128 rows, kInputs)
      const int input = warp / Tile::kDown * 8 + lane % 8, i = i0 + input;
      const Even even = i < inputs ? even_knots(a.described[i]) : Even{};
      KAN_NO_UNROLL
      for (int m = 0; m < Tile::kHigh; ++m) {
        const int first_row = warp % Tile::kDown * Tile::kRows + 16 * m + lane / 8;
        Stored<1> stored[4];
        KAN_UNROLL_ALL
        for (int r = 0; r < 4; ++r) {
          const int row = first_row + 4 * r;
          stored[r].load(rows_from(p, p.x, b0), p.x_dtype, row * inputs + i, row < rows && i < inputs, false);
        }
        KAN_UNROLL_ALL
        for (int n = 0; n < 9; ++n)
          KAN_UNROLL_ALL
          for (int r = 0; r < 4; ++r)
            values[(lane / 4 + 8 * (r >> 1)) * Tile::kSumsPitch + 8 * n + 2 * (lane % 4) + (r & 1)] = sums[0][n][r];
        KAN_UNROLL_ALL
        for (int h = 1; h < Tile::kHigh; ++h)
          KAN_UNROLL_ALL
          for (int n = 0; n < 9; ++n)
            KAN_UNROLL_ALL
            for (int r = 0; r < 4; ++r) sums[h - 1][n][r] = sums[h][n][r];
        warp_barrier();
        KAN_NO_UNROLL
        for (int r = 0; r < 4; ++r) {
          float x[1];
          stored[0].widen(p.x_dtype, x);
          KAN_UNROLL_ALL
          for (int h = 1; h < 4; ++h) stored[h - 1] = stored[h];
          const int row = first_row + 4 * r;
          if (row >= rows || i >= inputs) continue;
          const Item item = a.continuous && even.inverse_h > 0 ? even_window(a, even, x[0], 1.0f) : any_window(a, i, x[0], 1.0f);
          const float* line = values + (lane / 8 + 4 * r) * Tile::kSumsPitch;
          float total = 0;
          KAN_UNROLL_ALL
          for (int q = 0; q < 4; ++q) {
            const int f = item.first - chunk * kStepBases + q;
            if (f >= 0 && f < kStepBases) total += item.w[q] * line[lane % 8 * kStepBases + f];
          }
          if (has_base) total += activate(a.activation, x[0]) * line[8 * kStepBases + lane % 8];
          float* sum = totals + row * Tile::kInputs + input;
          if (chunk > 0) total += *sum;
          *sum = total;
          if (chunk == chunks - 1) write<float>(p.dx, (b0 + row) * inputs + i, p.x_dtype, total);
        }
        warp_barrier();
      }
    }
}

template <Products P> int launch_input_wide(const WideArguments& a, void* stream) {
  using Tile = InputTile<P>;
  if (int error = launch_cubics(a, stream)) return error;
  const Blocks blocks{(a.p.batch + kWideRows - 1) / kWideRows, (a.p.in_features + Tile::kInputs - 1) / Tile::kInputs};
  return launch(input_wide<P>, blocks, kThreads, Tile::kShared, stream, a);
}

}  // namespace kan::cuda
