// contract_input of wide layers on Hopper (sm_90a), 16-bit types: the product g W^T, whose epilogue weighs by phi^(n) and sums over
// the bases. A block: 128 rows of the batch by as many inputs as have their bases and their base branch among kColumns columns. Depth:
// the outputs, contiguous in both operands. Two warpgroups copy and multiply.
//
// Of 128 columns two blocks share a multiprocessor, so that one multiplies during the other's epilogue; of 256 a block copies three
// quarters as much for the same products. On an H200 the former took 0.75 to 0.9 of the latter's time for 64 to 4096 rows of 256 and 784
// inputs, and 1.05 at 16384 x 1024 x 1024.
#pragma once
#include "warpgroup_tile.cuh"

namespace kan::cuda {

// An input's knots, and what the n-th derivative of the cubics is to be multiplied with.
struct alignas(16) TileKnots {
  Even even;
  float scale;
};

template <int kColumns> constexpr int kInputStages = kColumns == 256 ? kRightStages : 3;
template <int kColumns> constexpr int kInputBlocks = kColumns == 256 ? 1 : 2;  // of a multiprocessor
template <int kColumns> constexpr int kGroupInputStage = kLeftBytes + kRightBytes<kColumns>;
// After the products the sums (128 rows) lie where the stages were. Behind them the knots of the tile's inputs.
template <int kColumns>
constexpr size_t kGroupInputShared = kAtomBytes + kInputStages<kColumns> * kGroupInputStage<kColumns> + kColumns / 2 * sizeof(TileKnots);

// Of sum (row, column). Neither a warp's fragments, eight rows by eight columns, meet a bank twice when they are written two by two,
// nor, but for rows 4 apart, 32 rows of a column when they are read.
template <int kColumns> KAN_DEVICE int place_of_sum(int row, int column) {
  return row * kColumns + column / 32 * 32 + (column % 32 ^ (row % 4 * 8 + row / 8 % 4 * 2));
}

KAN_INLINE int inputs_of_tile(const Problem& p, int columns) { return columns / (p.bases() + 1); }

struct OutputStep {
  int64_t o, end;
  KAN_DEVICE int count() const { return int((end - o + kGroupDepth - 1) / kGroupDepth); }
  KAN_DEVICE static bool is_base() { return false; }
  KAN_DEVICE void advance() { o += kGroupDepth; }
};

// One thread's pieces of every step: 8 outputs of every 32nd row of g, and of every 32nd column. Columns: the bases of the tile's
// inputs, then their base branch. Only `o` changes from step to step.
template <int kColumns, class T> struct OperandCopies {
  static constexpr int kNext = kMultipliers / 8, kRows = kGroupRows / kNext, kTileColumns = kColumns / kNext;
  const T *rows, *columns[kTileColumns];
  uint32_t missing = 0;  // bit m: row or, 8 bits higher, column m
  int place;

  KAN_DEVICE OperandCopies(const Problem& p, int64_t b0, int64_t i0) {
    const int line = int(threadIdx.x) / 8, number = int(threadIdx.x) % 8 * 8;
    place = swizzled(line, number);
    rows = static_cast<const T*>(p.g) + (b0 + line) * p.out_features + number;
    const int inputs = inputs_of_tile(p, kColumns), of_spline = inputs * p.bases();
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

// How many neighbouring inputs of x and dx are read and written at once, of a tile's from i0 on: 4, 2 or 1.
KAN_DEVICE int inputs_together(const Problem& p, int64_t i0) {
  return inputs_in_vectors(p, 4) && i0 % 4 == 0 ? 4 : inputs_in_vectors(p, 2) && i0 % 2 == 0 ? 2 : 1;
}
// x of inputs i .. i + 3 of row b, as far as they lie below `end`.
KAN_DEVICE void load_four(Stored<4>& to, const Problem& p, int64_t b, int64_t i, int64_t end, int together) {
  if (together != 2) return load_inputs(to, p, b, i, end, together == 4);
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) to.raw[m] = 0;
  const void* row = rows_from(p, p.x, b);
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; m += 2) {
    if (b >= p.batch || i + m >= end) continue;
    if (p.x_dtype == kFloat32) *reinterpret_cast<Words<2>*>(to.raw + m) = *reinterpret_cast<const Words<2>*>(static_cast<const float*>(row) + i + m);
    else to.raw[m / 2] = *reinterpret_cast<const uint32_t*>(static_cast<const uint16_t*>(row) + i + m);
  }
}
// dx of the same, of which `count` exist.
KAN_DEVICE void write_four(const Problem& p, int64_t b, int64_t i, int count, int together, const float (&value)[4]) {
  const int64_t at = b * p.in_features + i;
  int done = 0;
  if (together > 1 && p.x_dtype != kFloat32) {
    const bool bfloat16 = p.x_dtype == kBFloat16;
    const Words<2> words = {{bfloat16 ? pack_bfloat16(value[0], value[1]) : pack_float16(value[0], value[1]),
                          bfloat16 ? pack_bfloat16(value[2], value[3]) : pack_float16(value[2], value[3])}};
    uint16_t* to = static_cast<uint16_t*>(p.dx) + at;
    if (together == 4 && count >= 4) {
      *reinterpret_cast<Words<2>*>(to) = words;
      return;
    }
    if (count > 1) *reinterpret_cast<uint32_t*>(to) = words.w[0];
    if (count > 3) *reinterpret_cast<uint32_t*>(to + 2) = words.w[1];
    done = count < 4 ? count / 2 * 2 : 4;
  }
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m)
    if (done <= m && m < count) write<float>(p.dx, at + m, p.x_dtype, value[m]);
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
// The quick way takes the last input again for those that do not exist. x moves along where an input needs the general way: registers have no index.
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
  bool even = a.continuous && !(p.outside == kLinear && p.n == 0);
  auto there = [&](int m) { return m < count ? m : count - 1; };
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) even = even && knots[there(m)].even.inverse_h > 0;
  if (even) {
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m)
      total[m] += weigh_sums(a, knots[there(m)], x[m], [&](int f) { return sum(spline + there(m) * p.bases() + f); });
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

// The knots of a tile's `count` inputs from i0 on, by thread `thread` of kMultipliers.
KAN_DEVICE void load_tile_knots(const WideArguments& a, TileKnots* knots, int64_t i0, int count, int thread) {
  for (int j = thread; j < count; j += kMultipliers) {
    const Even even = even_knots(a.described[i0 + j]);
    knots[j] = {even, 1};
    for (int m = 0; m < a.p.n; ++m) knots[j].scale *= even.inverse_h;
  }
}

// The epilogue of a tile whose first `count` inputs exist: dx from the multipliers' sums, which go through `values`, where the stages
// were. A thread's share: one row, every other four inputs. Their x comes while the sums are moved.
template <int kColumns>
KAN_DEVICE void weigh_tile(const WideArguments& a, const TileKnots* knots, float* values, int inputs, int64_t b0, int64_t i0, int count,
                           const GroupSums<kColumns>& sums) {
  constexpr int kAhead = kColumns / 64, kNext = kMultipliers / kGroupRows * 4;
  const Problem& p = a.p;
  const int thread = int(thread_now()), of_spline = inputs * p.bases();
  const int64_t b = b0 + thread % kGroupRows;
  const int together = inputs_together(p, i0);
  Stored<4> ahead[kAhead];
  auto load = [&](Stored<4>& to, int j) { load_four(to, p, b, i0 + j, i0 + count, together); };
  KAN_UNROLL_ALL
  for (int m = 0; m < kAhead; ++m) load(ahead[m], thread / kGroupRows * 4 + m * kNext);
  meet(kTileBarrier, kMultipliers);  // both groups have read the stages
  for_every_pair(sums, [&](int row, int column, float low, float high) {
    *reinterpret_cast<Pair*>(values + place_of_sum<kColumns>(row, column)) = {low, high};
  });
  meet(kTileBarrier, kMultipliers);
  auto sum = [&](int column) { return values[place_of_sum<kColumns>(thread % kGroupRows, column)]; };
  KAN_NO_UNROLL
  for (int j = thread / kGroupRows * 4; b < p.batch && j < count; j += kNext) {
    float x[4], total[4];
    ahead[0].widen(p.x_dtype, x);
    KAN_UNROLL_ALL
    for (int m = 1; m < kAhead; ++m) ahead[m - 1] = ahead[m];
    load(ahead[kAhead - 1], j + kAhead * kNext);
    weigh_four(a, knots + j, i0 + j, count - j, j * p.bases(), of_spline + j, x, sum, total);
    write_four(p, b, i0 + j, count - j, together, total);
  }
}

template <Products P, int kColumns> __global__ void __launch_bounds__(kMultipliers, kInputBlocks<kColumns>) input_warpgroup(WideArguments a) {
#if KAN_WARPGROUPS
  static_assert(kGroupRows * kColumns * int(sizeof(float)) <= kInputStages<kColumns> * kGroupInputStage<kColumns>);
  using T = typename StorageOf<P>::Type;
  const Problem& p = a.p;
  char* stages = first_atom();
  TileKnots* knots = reinterpret_cast<TileKnots*>(stages + kInputStages<kColumns> * kGroupInputStage<kColumns>);
  const int inputs = inputs_of_tile(p, kColumns);
  const int64_t b0 = int64_t(blockIdx.x) * kGroupRows;

  for (int64_t i0 = int64_t(blockIdx.y) * inputs; i0 < p.in_features; i0 += int64_t(gridDim.y) * inputs) {
    auto count = [&] { return p.in_features - i0 < inputs ? int(p.in_features - i0) : inputs; };
    load_tile_knots(a, knots, i0, count(), int(threadIdx.x));
    const int group = multiplier_group();
    GroupSums<kColumns> sums = {};
    const OperandCopies<kColumns, T> copies(p, b0, i0);
    CopiedByThreads copied{[&](const OutputStep& step, int stage) {
      char* left = stages + stage * kGroupInputStage<kColumns>;
      copies.copy(a, step, left, left + kLeftBytes);
    }};
    multiply_steps<false, kInputStages<kColumns>>(OutputStep{0, p.out_features}, copied, [&](bool, int, int stage) {
      const char* left = stages + stage * kGroupInputStage<kColumns>;
      order_registers();
      multiply_group<P, false, false>(sums, left + group * (kLeftBytes / 2), left + kLeftBytes);
      commit_products();
    });
    weigh_tile<kColumns>(a, knots, reinterpret_cast<float*>(stages), inputs, b0, i0, count(), sums);
    meet(kTileBarrier, kMultipliers);  // the sums have been read
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

template <Products P> int launch_input_warpgroup(const WideArguments& a, int columns, void* stream) {
  if (int error = launch_cubics(a, stream)) return error;
  const int64_t inputs = inputs_of_tile(a.p, columns);
  const Blocks blocks{(a.p.batch + kGroupRows - 1) / kGroupRows, (a.p.in_features + inputs - 1) / inputs};
  if (columns == 256) return launch(input_warpgroup<P, 256>, blocks, kMultipliers, kGroupInputShared<256>, stream, a);
  return launch(input_warpgroup<P, 128>, blocks, kMultipliers, kGroupInputShared<128>, stream, a);
}

}  // namespace kan::cuda
