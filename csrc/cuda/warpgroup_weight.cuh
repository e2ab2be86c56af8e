// contract_weight of wide layers on Hopper (sm_90a): Phi^T g, 16-bit types. A block: 16 inputs by 8 bases (or 128 inputs of the base
// branch) by kColumns outputs, over one slice of the batch, which is the depth; slices are added in a fixed order afterwards.
//
// A step is 64 rows of the batch. Two warpgroups make the left operand by lines: a line is one row's 8 inputs x 8 bases (or 64
// base activations), and there are two panels of such lines. Two others multiply, and copy the rows of g.
#pragma once
#include "warpgroup_tile.cuh"

namespace kan::cuda {

template <int kColumns>
constexpr size_t kGroupWeightShared = kAtomBytes + kRightStages * kRightBytes<kColumns> + kLeftStages * kLeftBytes + kKnotsBytes;

struct BatchStep {
  int64_t b, end;
  KAN_DEVICE int count() const { return int((end - b + kGroupDepth - 1) / kGroupDepth); }
  KAN_DEVICE static bool is_base() { return false; }
  KAN_DEVICE bool more() const { return b < end; }
  KAN_DEVICE void advance() { b += kGroupDepth; }
};

// Which inputs and bases a block has. The base branch first: its features take longer, and a round of blocks should not end with it.
struct FeatureTile {
  bool is_base;
  int chunk;
  int input;  // first of 16, or of 128
};
KAN_DEVICE FeatureTile feature_tile(const Problem& p, int64_t number) {
  const int chunks = (p.bases() + kStepBases - 1) / kStepBases;
  const int64_t of_base = p.d_base != nullptr ? (p.in_features + kGroupRows - 1) / kGroupRows : 0;
  if (number < of_base) return {true, 0, int(number) * kGroupRows};
  number -= of_base;
  return {false, int(number % chunks), int(number / chunks) * 16};
}

inline int64_t weight_tiles(const Problem& p) {
  const int64_t chunks = (p.bases() + kStepBases - 1) / kStepBases, of_base = p.d_base != nullptr ? (p.in_features + kGroupRows - 1) / kGroupRows : 0;
  return (p.in_features + 15) / 16 * chunks + of_base;
}

// A maker's thread: one line of a panel, that is 8 inputs of one row (or 64 of the base branch). What comes next is loaded before what
// is there is used. Outside the batch g's rows are zero; the quick way then takes the slice's last row again.
template <Products P>
KAN_DEVICE void make_lines(const WideArguments& a, const FeatureTile& tile, const BatchStep& first, char* left) {
  const Problem& p = a.p;
  const int thread = int(thread_now()) % (kMakers / 2), maker = int(thread_now()) / (kMakers / 2) % 2;
  const int line = thread % kGroupDepth, panel = thread / kGroupDepth, i0 = tile.input + panel * kGroupInputs;
  const bool vectors = inputs_in_vectors(p, 4);
  Stored<4> ahead[2];
  auto load = [&](int half, int64_t b) {
    load_inputs(ahead[half], p, b < first.end ? b : p.batch, i0 + 4 * half, p.in_features, vectors);
  };
  KAN_UNROLL_ALL
  for (int half = 0; half < 2; ++half) load(half, first.b + maker * kGroupDepth + line);
  make_steps(first, maker, [&](const BatchStep& step, int stage) {
    char* lines = left + stage * kLeftBytes + panel * kPanelBytes;
    const int64_t b = step.b + line;
    KAN_UNROLL_ALL
    for (int half = 0; half < 2; ++half) {
      float x[4];
      Kept<P> items[4];
      ahead[half].widen(p.x_dtype, x);
      load(half, b + 2 * kGroupDepth);
      make_items<P, false>(a, b, i0 + 4 * half, p.in_features, x, items);
      write_windows(items, tile.chunk * kStepBases, lines, line, 4 * half);
    }
  });
}

// x of eight inputs from i on, of row b, as far as they exist.
KAN_DEVICE void load_quickly(Stored<kQuickInputs>& to, const Problem& p, int64_t b, int64_t end, int i) {
  const int last = int(p.in_features) - kQuickInputs;
  to.load_whole(rows_from(p, p.x, b < end ? b : end - 1), p.x_dtype, i < last ? i : last);
}

template <Products P>
KAN_DEVICE void make_lines_quickly(const WideArguments& a, const FeatureTile& tile, const BatchStep& first, char* left, char* memory) {
  const Problem& p = a.p;
  const int panel = int(thread_now()) / kGroupDepth % 2, i0 = tile.input + panel * kGroupInputs;
  const int line = int(thread_now()) % kGroupDepth;
  int64_t b = first.b + line + int(thread_now()) / (kMakers / 2) % 2 * kGroupDepth;
  WarpKnots knots{knots_of_warp(memory), {}};
  knots.load(a, i0);
  knots.arrive();
  Stored<kQuickInputs> ahead;
  load_quickly(ahead, p, b, first.end, i0);
  make_own_steps(first.count(), [&](int stage) {
    char* lines = left + stage * kLeftBytes + panel * kPanelBytes;
    float x[kQuickInputs];
    ahead.widen(p.x_dtype, x);
    b += 2 * kGroupDepth;
    load_quickly(ahead, p, b, first.end, i0);
    const int first_base = tile.chunk * kStepBases;
    if (!write_quick_windows<P>(a, knots.here, x, first_base, lines + swizzled(line, 0)))
      write_general_windows<P>(a, b - 2 * kGroupDepth, i0, first_base, lines, line);
  });
}

// The base branch, eight inputs at a time; the next eights are on their way.
template <Products P, bool kQuick>
KAN_DEVICE void make_base_lines(const WideArguments& a, const FeatureTile& tile, const BatchStep& first, char* left) {
  const Problem& p = a.p;
  const int panel = int(thread_now()) / kGroupDepth % 2, i0 = tile.input + panel * kGroupDepth;
  const int line = int(thread_now()) % kGroupDepth;
  constexpr int kAhead = kQuick ? 4 : 1, kEights = kGroupDepth / kQuickInputs;
  const bool vectors = inputs_in_vectors(p, kQuickInputs);
  Stored<kQuickInputs> ahead[kAhead];
  auto load = [&](Stored<kQuickInputs>& to, int64_t b, int i) {
    if (kQuick) load_quickly(to, p, b, first.end, i);
    else load_inputs(to, p, b < first.end ? b : p.batch, i, p.in_features, vectors);
  };
  int64_t b = first.b + line + int(thread_now()) / (kMakers / 2) % 2 * kGroupDepth;
  KAN_UNROLL_ALL
  for (int m = 0; m < kAhead; ++m) load(ahead[m], b, i0 + m * kQuickInputs);
  make_own_steps(first.count(), [&](int stage) {
    char* lines = left + stage * kLeftBytes + panel * kPanelBytes;
    KAN_NO_UNROLL
    for (int begin = 0; begin < kEights; begin += kAhead)
      KAN_UNROLL_ALL
      for (int m = 0; m < kAhead; ++m) {
        const int piece = begin + m, next = piece + kAhead, i = i0 + piece * kQuickInputs;
        float x[kQuickInputs];
        uint32_t words[4];
        ahead[m].widen(p.x_dtype, x);
        load(ahead[m], next < kEights ? b : b + 2 * kGroupDepth, i0 + next % kEights * kQuickInputs);
        base_features<P, !kQuick>(a, b, i, x, words);
        store_16_bytes(lines + swizzled(line, piece * 8), words);
      }
    b += 2 * kGroupDepth;
  });
}

// One thread's pieces of a step of g: 8 columns of every kRows-th row.
template <int kColumns, class T> KAN_DEVICE void copy_gradients(const WideArguments& a, const BatchStep& step, int64_t o0, char* stage) {
  const Problem& p = a.p;
  constexpr int kPieces = kColumns / 8, kRows = kMultipliers / kPieces;
  const int column = int(threadIdx.x) % kPieces * 8, row = int(threadIdx.x) / kPieces;
  const T* from = static_cast<const T*>(p.g) + (step.b + row) * p.out_features + o0 + column;
  const int there = step.end - step.b < kGroupDepth ? int(step.end - step.b) : kGroupDepth;
  char* to = stage + column / kLineNumbers * kPanelBytes + swizzled(row, column % kLineNumbers);
  copy_rows<kGroupDepth / kRows>(reinterpret_cast<T*>(to), kRows * kLineNumbers, from, kRows * p.out_features, columns_left(p, o0 + column), row,
                                 kRows, there, a.aligned);
}

// kQuick: where a.quick serves.
template <Products P, int kColumns, bool kQuick>
__global__ void __launch_bounds__(kGroupThreads, 1)
    weight_warpgroup(WideArguments a, void* spline, void* base, bool whole, int64_t slices, int64_t rows_per_slice) {
#if KAN_WARPGROUPS
  using T = typename StorageOf<P>::Type;
  const Problem& p = a.p;
  char* right = first_atom();
  char* left = right + kRightStages * kRightBytes<kColumns>;
  char* knots = left + kLeftStages * kLeftBytes;
  const int thread = int(threadIdx.x);
  const FeatureTile tile = feature_tile(p, blockIdx.x);
  auto for_every_tile = [&](auto body) {
    for (int64_t slice = blockIdx.z; slice < slices; slice += gridDim.z)
      for (int64_t o0 = int64_t(blockIdx.y) * kColumns; o0 < p.out_features; o0 += int64_t(gridDim.y) * kColumns) {
        const int64_t begin = slice * rows_per_slice;
        body(BatchStep{begin, begin + rows_per_slice < p.batch ? begin + rows_per_slice : p.batch}, o0, slice);
        meet(kTileBarrier, kGroupThreads);  // nobody makes or copies what belongs to the next tile while this one's is read
      }
  };
  if (thread >= kMultipliers) {
    set_registers<kMakersRegisters<kColumns>>();
    for_every_tile([&](const BatchStep& first, int64_t, int64_t) {
      if (tile.is_base) make_base_lines<P, kQuick>(a, tile, first, left);
      else if constexpr (kQuick) make_lines_quickly<P>(a, tile, first, left, knots);
      else make_lines<P>(a, tile, first, left);
    });
  } else {
    set_registers<kMultipliersRegisters<kColumns>>();
    for_every_tile([&](const BatchStep& first, int64_t o0, int64_t slice) {
      const int group = multiplier_group();
      GroupSums<kColumns> sums = {};
      multiply_steps<true>(
          first,
          [&](const BatchStep& step, int stage) { copy_gradients<kColumns, T>(a, step, o0, right + stage * kRightBytes<kColumns>); },
          [&](bool, int left_stage, int stage, int) {
            order_registers();
            multiply_group<P, true, true>(sums, left + left_stage * kLeftBytes + group * kPanelBytes, right + stage * kRightBytes<kColumns>);
            commit_products();
          });
      for_every_pair(sums, [&](int feature, int column, float low, float high) {
        const int64_t i = tile.input + (tile.is_base ? feature : feature / kStepBases), o = o0 + column;
        const int f = tile.chunk * kStepBases + feature % kStepBases;
        if (i >= p.in_features || o >= p.out_features || (!tile.is_base && f >= p.bases())) return;
        const int64_t row = slice * p.in_features + i, at = (tile.is_base ? row : row * p.bases() + f) * p.out_features;
        void* to = tile.is_base ? base : spline;
        if (whole) write_pair<P>(static_cast<T*>(to) + at, o, p.out_features, a.aligned, low, high);
        else write_pair(static_cast<float*>(to) + at, o, p.out_features, a.aligned, low, high);
      });
    });
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

template <Products P> int launch_weight_warpgroup(const WideArguments& a, int columns, float* parts, Slices slices, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_cubics(a, stream)) return error;
  const Blocks blocks{weight_tiles(p), (p.out_features + columns - 1) / columns, slices.count};
  void* spline = parts == nullptr ? p.d_spline : parts;
  void* base = parts == nullptr ? p.d_base : parts + slices.count * p.in_features * p.bases() * p.out_features;
  const bool wide = columns == 256, quick = a.quick.serves;
  const auto kernel = quick ? wide ? weight_warpgroup<P, 256, true> : weight_warpgroup<P, 128, true>
                            : wide ? weight_warpgroup<P, 256, false> : weight_warpgroup<P, 128, false>;
  return launch(kernel, blocks, kGroupThreads, wide ? kGroupWeightShared<256> : kGroupWeightShared<128>, stream, a, spline, base,
                parts == nullptr, slices.count, slices.rows);
}

}  // namespace kan::cuda
