// contract_input of wide layers on Hopper (sm_90a), 16-bit types: the product g W^T, whose epilogue weighs by phi^(n) and sums over
// the bases. A block: 128 rows of the batch by as many inputs as have their bases and their base branch among 256 columns. Depth:
// the outputs, contiguous in both operands. Two warpgroups copy and multiply.
#pragma once
#include "warpgroup_tile.cuh"

namespace kan::cuda {

constexpr int kInputColumns = 256, kGroupInputStage = kLeftBytes + kRightBytes<kInputColumns>;
// After the products the sums (128 rows) lie where the stages were.
constexpr int kGroupSumsPitch = kInputColumns + 1;
constexpr size_t kGroupInputShared = kAtomBytes + kRightStages * kGroupInputStage;
static_assert(size_t(kGroupRows) * kGroupSumsPitch * sizeof(float) <= kRightStages * kGroupInputStage);

KAN_INLINE int inputs_of_tile(const Problem& p) { return kInputColumns / (p.bases() + 1); }

struct OutputStep {
  int64_t o, end;
  KAN_DEVICE int count() const { return int((end - o + kGroupDepth - 1) / kGroupDepth); }
  KAN_DEVICE static bool is_base() { return false; }
  KAN_DEVICE void advance() { o += kGroupDepth; }
};

// One thread's pieces of every step: 8 outputs of every 32nd row of g, and of every 32nd column. Columns: the bases of the tile's
// inputs, then their base branch. Only `o` changes from step to step.
template <class T> struct OperandCopies {
  static constexpr int kNext = kMultipliers / 8, kRows = kGroupRows / kNext, kTileColumns = kInputColumns / kNext;
  const T *rows, *columns[kTileColumns];
  uint32_t missing = 0;  // bit m: row or, 8 bits higher, column m
  int place;

  KAN_DEVICE OperandCopies(const Problem& p, int64_t b0, int64_t i0) {
    const int line = int(threadIdx.x) / 8, number = int(threadIdx.x) % 8 * 8;
    place = swizzled(line, number);
    rows = static_cast<const T*>(p.g) + (b0 + line) * p.out_features + number;
    const int inputs = inputs_of_tile(p), of_spline = inputs * p.bases();
    const int64_t inside = p.in_features - i0 < inputs ? p.in_features - i0 : inputs;
    KAN_UNROLL_ALL
    for (int m = 0; m < kRows; ++m) missing |= uint32_t(b0 + line + m * kNext >= p.batch) << m;
    KAN_UNROLL_ALL
    for (int m = 0; m < kTileColumns; ++m) {
      const int column = line + m * kNext;
      const bool is_base = column >= of_spline;
      const bool exists = is_base ? p.base_weight != nullptr && column - of_spline < inside : column < inside * p.bases();
      const T* from = is_base ? static_cast<const T*>(p.base_weight) + (i0 + column - of_spline) * p.out_features
                              : static_cast<const T*>(p.spline_weight) + (i0 * p.bases() + column) * p.out_features;
      columns[m] = from + number;
      missing |= uint32_t(!exists) << (8 + m);
    }
  }
  KAN_DEVICE void copy(const WideArguments& a, const OutputStep& step, char* left, char* right) const {
    const Problem& p = a.p;
    const int there = columns_left(p, step.o + int(threadIdx.x) % 8 * 8);
    const uint32_t none = there > 0 ? missing : ~0u;
    T *to_rows = reinterpret_cast<T*>(left + place), *to_columns = reinterpret_cast<T*>(right + place);
    if (a.aligned) {
      KAN_UNROLL_ALL
      for (int m = 0; m < kRows; ++m)
        copy_16_bytes(to_rows + m * kNext * kLineNumbers, rows + step.o + m * kNext * p.out_features, none >> m & 1u);
      KAN_UNROLL_ALL
      for (int m = 0; m < kTileColumns; ++m) copy_16_bytes(to_columns + m * kNext * kLineNumbers, columns[m] + step.o, none >> (8 + m) & 1u);
      return;
    }
    KAN_UNROLL_ALL
    for (int m = 0; m < kRows + kTileColumns; ++m) {
      const bool is_row = m < kRows;
      const T* from = is_row ? rows + m * kNext * p.out_features : columns[is_row ? 0 : m - kRows];
      T* to = is_row ? to_rows + m * kNext * kLineNumbers : to_columns + (m - kRows) * kNext * kLineNumbers;
      const bool gone = none >> (is_row ? m : 8 + m - kRows) & 1u;
      KAN_NO_UNROLL
      for (int r = 0; r < 8; ++r) to[r] = gone || r >= there ? T{} : from[step.o + r];
    }
  }
};

// dx of inputs i .. i + 3 of row b.
KAN_DEVICE void write_four(const Problem& p, int64_t b, int64_t i, int count, bool vectors, const float (&value)[4]) {
  const int64_t at = b * p.in_features + i;
  if (vectors && count == 4 && p.x_dtype != kFloat32) {
    const bool bfloat16 = p.x_dtype == kBFloat16;
    const Words<2> words = {{bfloat16 ? pack_bfloat16(value[0], value[1]) : pack_float16(value[0], value[1]),
                          bfloat16 ? pack_bfloat16(value[2], value[3]) : pack_float16(value[2], value[3])}};
    *reinterpret_cast<Words<2>*>(static_cast<uint16_t*>(p.dx) + at) = words;
    return;
  }
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m)
    if (m < count) write<float>(p.dx, at + m, p.x_dtype, value[m]);
}

template <Products P> __global__ void __launch_bounds__(kMultipliers, 1) input_warpgroup(WideArguments a) {
#if KAN_WARPGROUPS
  using T = typename StorageOf<P>::Type;
  const Problem& p = a.p;
  char* stages = first_atom();
  float* values = reinterpret_cast<float*>(stages);
  const int thread = int(threadIdx.x), inputs = inputs_of_tile(p), of_spline = inputs * p.bases();
  const int64_t b0 = int64_t(blockIdx.x) * kGroupRows;

  for (int64_t i0 = int64_t(blockIdx.y) * inputs; i0 < p.in_features; i0 += int64_t(gridDim.y) * inputs) {
    GroupSums<kInputColumns> sums = {};
    const OperandCopies<T> copies(p, b0, i0);
    multiply_steps<false>(
        OutputStep{0, p.out_features},
        [&](const OutputStep& step, int stage) {
          char* left = stages + stage * kGroupInputStage;
          copies.copy(a, step, left, left + kLeftBytes);
        },
        [&](bool, int, int stage) {
          const char* left = stages + stage * kGroupInputStage;
          order_registers();
          multiply_group<P, false, false>(sums, left + thread / 128 * (kLeftBytes / 2), left + kLeftBytes);
          commit_products();
        });
    meet(kTileBarrier, kMultipliers);  // both groups have read the stages
    for_every_pair(sums, [&](int row, int column, float low, float high) {
      values[row * kGroupSumsPitch + column] = low;
      values[row * kGroupSumsPitch + column + 1] = high;
    });
    meet(kTileBarrier, kMultipliers);
    // A thread: one row, every other four inputs.
    const int64_t b = b0 + thread % kGroupRows;
    const int count = p.in_features - i0 < inputs ? int(p.in_features - i0) : inputs;
    const bool vectors = inputs_in_vectors(p) && i0 % 4 == 0;
    const float* row = values + thread % kGroupRows * kGroupSumsPitch;
    for (int j = thread / kGroupRows * 4; b < p.batch && j < count; j += kMultipliers / kGroupRows * 4) {
      FourInputs four;
      float x[4], total[4], factor[4];
      four.load(p, b, i0 + j, p.in_features, vectors);
      four.unpack(p, x);
      if (p.base_weight != nullptr) activate_four(a.activation, x, factor);
      KAN_UNROLL_ALL
      for (int m = 0; m < 4; ++m) total[m] = p.base_weight != nullptr && j + m < count ? factor[m] * row[of_spline + j + m] : 0.0f;
      for_four_items(a, b, i0 + j, p.in_features, x, nullptr, [&](int m, const Item& item) {
        float sum = 0;
        KAN_UNROLL_ALL
        for (int q = 0; q < 4; ++q) {
          const int f = item.first + q;
          if (f >= 0 && f < p.bases() && j + m < count) sum += item.w[q] * row[(j + m) * p.bases() + f];
        }
        KAN_UNROLL_ALL
        for (int r = 0; r < 4; ++r) total[r] += r == m ? sum : 0.0f;
      });
      write_four(p, b, i0 + j, count - j < 4 ? count - j : 4, vectors, total);
    }
    meet(kTileBarrier, kMultipliers);  // the sums have been read
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

template <Products P> int launch_input_warpgroup(const WideArguments& a, void* stream) {
  if (int error = launch_cubics(a, stream)) return error;
  const int64_t inputs = inputs_of_tile(a.p);
  const Blocks blocks{(a.p.batch + kGroupRows - 1) / kGroupRows, (a.p.in_features + inputs - 1) / inputs};
  return launch(input_warpgroup<P>, blocks, kMultipliers, kGroupInputShared, stream, a);
}

}  // namespace kan::cuda
