// contract_input of wide layers on Hopper (sm_90a), 16-bit types: the product g W^T, whose epilogue weighs by phi^(n) and sums over
// the bases. A block: 128 rows of the batch by as many inputs as have their bases and their base branch among 256 columns. Depth:
// the outputs, contiguous in both operands. Two warpgroups copy and multiply.
#pragma once
#include "warpgroup_tile.cuh"

namespace kan::cuda {

// An input's knots, and what the n-th derivative of the cubics is to be multiplied with.
struct alignas(16) TileKnots {
  Even even;
  float scale;
};

constexpr int kInputColumns = 256, kGroupInputStage = kLeftBytes + kRightBytes<kInputColumns>;
// After the products the sums (128 rows) lie where the stages were. Behind them the knots of the tile's inputs.
constexpr size_t kGroupInputShared = kAtomBytes + kRightStages * kGroupInputStage + kInputColumns / 2 * sizeof(TileKnots);
static_assert(size_t(kGroupRows) * kInputColumns * sizeof(float) <= kRightStages * kGroupInputStage);

// Of sum (row, column). Neither a warp's fragments, eight rows by eight columns, meet a bank twice when they are written two by two,
// nor, but for rows 4 apart, 32 rows of a column when they are read.
template <int kColumns> KAN_DEVICE int place_of_sum(int row, int column) {
  return row * kColumns + column / 32 * 32 + (column % 32 ^ (row % 4 * 8 + row / 8 % 4 * 2));
}

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

// The sums of one input's bases, sum(f), weighed by phi^(n) at x where even_window serves and nothing is extended. No branches: several
// inputs' chains of instructions mix.
template <class Sum> KAN_DEVICE float weigh_sums(const WideArguments& a, const TileKnots& knots, float x, Sum sum) {
  const Problem& p = a.p;
  float v;
  const int first = even_interval(p, knots.even, held(x, knots.even.first, knots.even.last), v) - p.spline_order;
  float total = v * 0.0f;  // NaN is in no interval
  KAN_UNROLL_ALL
  for (int q = 0; q < 4; ++q) {
    const float* c = a.centred[q].c;
    const bool there = unsigned(first + q) < unsigned(p.bases());
    const float w = ((c[3] * v + c[2]) * v + c[1]) * v + c[0];
    total += (there ? w : 0.0f) * sum(there ? first + q : 0);
  }
  return total * knots.scale * (a.vanishes && !(x >= knots.even.first && x <= knots.even.last) ? 0.0f : 1.0f);
}

// dx of inputs i .. i + 3, of which `count` exist, from the sums of their bases, `spline` and on, and of their base branch, `base` and on.
// x moves along where an input needs the general way: registers have no index.
template <class Sum>
KAN_DEVICE void weigh_four(const WideArguments& a, const TileKnots* knots, int64_t i, int count, int spline, int base, float (&x)[4], Sum sum,
                           float (&total)[4]) {
  const Problem& p = a.p;
  float factor[4];
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) total[m] = 0, factor[m] = x[m];
  if (p.base_weight != nullptr) {
    activate_all(a.activation, factor);
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m) total[m] = m < count ? factor[m] * sum(base + m) : 0.0f;
  }
  bool even = a.continuous && 4 <= count && !(p.outside == kLinear && p.n == 0);
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) even = even && knots[m].even.inverse_h > 0;
  if (even) {
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m) total[m] += weigh_sums(a, knots[m], x[m], [&](int f) { return sum(spline + m * p.bases() + f); });
  } else {
    KAN_NO_UNROLL
    for (int m = 0; m < 4 && m < count; ++m) {
      const Item item = evaluate(a, i + m, x[0], 1.0f);
      float one = 0;
      KAN_UNROLL_ALL
      for (int q = 0; q < 4; ++q) {
        const int f = item.first + q;
        if (f >= 0 && f < p.bases()) one += item.w[q] * sum(spline + m * p.bases() + f);
      }
      KAN_UNROLL_ALL
      for (int r = 0; r < 4; ++r) total[r] += r == m ? one : 0.0f, x[r] = r < 3 ? x[r + 1] : x[r];
    }
  }
}

template <Products P> __global__ void __launch_bounds__(kMultipliers, 1) input_warpgroup(WideArguments a) {
#if KAN_WARPGROUPS
  using T = typename StorageOf<P>::Type;
  const Problem& p = a.p;
  char* stages = first_atom();
  float* values = reinterpret_cast<float*>(stages);
  TileKnots* knots = reinterpret_cast<TileKnots*>(stages + kRightStages * kGroupInputStage);
  const int thread = int(threadIdx.x), inputs = inputs_of_tile(p), of_spline = inputs * p.bases();
  const int64_t b0 = int64_t(blockIdx.x) * kGroupRows;

  for (int64_t i0 = int64_t(blockIdx.y) * inputs; i0 < p.in_features; i0 += int64_t(gridDim.y) * inputs) {
    const int count = p.in_features - i0 < inputs ? int(p.in_features - i0) : inputs;
    for (int j = thread; j < count; j += kMultipliers) {
      const Even even = even_knots(a.described[i0 + j]);
      knots[j] = {even, 1};
      for (int m = 0; m < p.n; ++m) knots[j].scale *= even.inverse_h;
    }
    const LeftPieces<false> pieces;
    uint32_t registers[kLeftSets<kInputColumns>][4];
    GroupSums<kInputColumns> sums = {};
    const OperandCopies<T> copies(p, b0, i0);
    multiply_steps<false>(
        OutputStep{0, p.out_features},
        [&](const OutputStep& step, int stage) {
          char* left = stages + stage * kGroupInputStage;
          copies.copy(a, step, left, left + kLeftBytes);
        },
        [&](bool, int, int stage, auto copy_now, auto) {
          const char* left = stages + stage * kGroupInputStage;
          multiply_and_copy<P, false, false>(sums, registers, pieces, left, describe_tile(left + kLeftBytes), copy_now);
        });
    // A thread's share of the epilogue: one row, every other four inputs. Their x comes while the sums are moved.
    constexpr int kAhead = 4, kNext = kMultipliers / kGroupRows * 4;
    const int64_t b = b0 + thread % kGroupRows;
    const bool vectors = inputs_in_vectors(p, 4) && i0 % 4 == 0;
    Stored<4> ahead[kAhead];
    auto load = [&](Stored<4>& to, int j) { load_inputs(to, p, b, i0 + j, i0 + count, vectors); };
    KAN_UNROLL_ALL
    for (int m = 0; m < kAhead; ++m) load(ahead[m], thread / kGroupRows * 4 + m * kNext);
    meet(kTileBarrier, kMultipliers);  // both groups have read the stages
    for_every_pair(sums, [&](int row, int column, float low, float high) {
      *reinterpret_cast<Pair*>(values + place_of_sum<kInputColumns>(row, column)) = {low, high};
    });
    meet(kTileBarrier, kMultipliers);
    auto sum = [&](int column) { return values[place_of_sum<kInputColumns>(thread % kGroupRows, column)]; };
    KAN_NO_UNROLL
    for (int j = thread / kGroupRows * 4; b < p.batch && j < count; j += kNext) {
      float x[4], total[4];
      ahead[0].widen(p.x_dtype, x);
      KAN_UNROLL_ALL
      for (int m = 1; m < kAhead; ++m) ahead[m - 1] = ahead[m];
      load(ahead[kAhead - 1], j + kAhead * kNext);
      weigh_four(a, knots + j, i0 + j, count - j, j * p.bases(), of_spline + j, x, sum, total);
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
