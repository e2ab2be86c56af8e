// contract_weight of wide layers on Hopper (sm_90a): Phi^T g, 16-bit types. A block: 16 inputs by 8 bases (or 128 inputs of the base
// branch) by kColumns outputs, over one slice of the batch, which is the depth; slices are added in a fixed order afterwards.
//
// A step is 64 rows of the batch. Two warpgroups make the left operand by lines: a line is one row's 8 inputs x 8 bases (or 64
// base activations), and there are two panels of such lines. Two others multiply, and copy the rows of g.
#pragma once
#include "warpgroup_tile.cuh"
#include "weight_tiles.h"

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

static_assert(kTileFeatures == kGroupRows && kTileBases == kStepBases);

// A maker's thread: one line of a panel, that is 8 inputs of one row (or 64 of the base branch). What comes next is loaded before what
// is there is used. Outside the batch g's rows are zero; the quick way then takes the slice's last row again.
template <Products P>
KAN_DEVICE void make_lines(const WideArguments& a, const FeatureTile& tile, const BatchStep& first, char* left) {
  const Problem& p = a.p;
  const int thread = int(thread_now()) % (kMakers / 2), maker = makers_group();
  const int line = thread % kGroupDepth, panel = thread / kGroupDepth, i0 = tile.input + panel * kGroupInputs;
  const bool vectors = inputs_in_vectors(p, 4);
  Stored<4> ahead[2];
  auto load = [&](int half, int64_t b) {
    load_inputs(ahead[half], p, b < first.end ? b : p.batch, i0 + 4 * half, p.in_features, vectors);
  };
  KAN_UNROLL_ALL
  for (int half = 0; half < 2; ++half) load(half, first.b + maker * kGroupDepth + line);
  make_steps<true>(first, maker, [&](const BatchStep& step, int stage) {
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

// Where the quick way reads x in a group's own steps: row `line` of each, as far as they exist; then the last of them again, or the slice's
// last row. g's rows are zeros there.
struct QuickRows {
  const char* here;

  KAN_DEVICE QuickRows(const Problem& p, const BatchStep& first, int line) {
    const int64_t b = first.b + OwnSteps<true>::first() * kGroupDepth + line;
    here = static_cast<const char*>(rows_from(p, p.x, b < first.end ? b : first.end - 1));
  }
  // How many of all steps have row `line`.
  KAN_DEVICE static int steps(const BatchStep& first, int line) { return int((first.end - first.b + kGroupDepth - 1 - line) / kGroupDepth); }
  // To the next own step, where that has the row.
  KAN_DEVICE void advance(const Problem& p, int x_dtype, bool there) {
    if (there) here += 2 * kGroupDepth * p.in_features * (x_dtype == kFloat32 ? 4 : 2);
  }
};
// For eight inputs from i on: what does not exist is read as the last that does.
KAN_DEVICE int quick_input(const Problem& p, int i) {
  const int last = int(p.in_features) - kQuickInputs;
  return i < last ? i : last;
}

// kUsual: order 3, x of the weights' type.
template <Products P, bool kUsual>
KAN_DEVICE void make_lines_quickly(const WideArguments& a, const FeatureTile& tile, const BatchStep& first, char* lines, char* memory) {
  const Problem& p = a.p;
  const int first_base = tile.chunk * kStepBases, steps = first.count(), x_dtype = kUsual ? kStoredAs<P> : p.x_dtype;
  // Registers are few: what the usual way does not need in every step is computed where it is used.
  auto line = [] { return int(thread_now()) % kGroupDepth; };
  auto panel = [] { return int(thread_now()) / kGroupDepth % 2; };
  auto input = [&] { return tile.input + panel() * kGroupInputs; };
  char* first_line = pointer_now(lines + panel() * kPanelBytes + swizzled(line(), 0));
  WarpKnots knots(knots_of_warp(memory));
  knots.load(a, input());
  knots.arrive();
  OwnSteps<true> own;
  int s = own.first();
  Stored<kQuickInputs> ahead;
  QuickRows rows(p, first, line());
  auto load = [&] { ahead.load_whole(rows.here, x_dtype, quick_input(p, input())); };
  load();
  KAN_NO_UNROLL
  for (; s < steps; s += 2) {
    float x[kQuickInputs];
    ahead.widen(x_dtype, x);
    rows.advance(p, x_dtype, s + 2 < QuickRows::steps(first, line()));
    load();
    QuickWindows<P> windows;
    windows.template evaluate<kUsual>(a, knots, 0, x, first_base);
    own.begin();  // not before: until here nothing is written
    char* start = first_line + own.stage * kLeftBytes;
    if (!windows.write(a, first_base, start))
      write_general_windows<P>(a, first.b + int64_t(s) * kGroupDepth + line(), input(), first_base, start - swizzled(line(), 0), line());
    own.end();
  }
}

// The base branch, eight inputs at a time; the next ones are on their way.
template <Products P> KAN_DEVICE void make_base_lines(const WideArguments& a, const FeatureTile& tile, const BatchStep& first, char* left) {
  const Problem& p = a.p;
  const int panel = int(thread_now()) / kGroupDepth % 2, i0 = tile.input + panel * kGroupDepth;
  const int line = int(thread_now()) % kGroupDepth;
  const bool vectors = inputs_in_vectors(p, kQuickInputs);
  Stored<kQuickInputs> ahead;
  auto load = [&](int64_t b, int i) { load_inputs(ahead, p, b < first.end ? b : p.batch, i, p.in_features, vectors); };
  int64_t b = first.b + line + OwnSteps<true>::first() * kGroupDepth;
  load(b, i0);
  make_own_steps<true>(first.count(), [&](int stage) {
    char* lines = left + stage * kLeftBytes + panel * kPanelBytes;
    KAN_NO_UNROLL
    for (int m = 0; m < kGroupDepth; m += kQuickInputs) {
      const int next = m + kQuickInputs;
      float x[kQuickInputs];
      uint32_t words[4];
      ahead.widen(p.x_dtype, x);
      load(next < kGroupDepth ? b : b + 2 * kGroupDepth, i0 + next % kGroupDepth);
      base_features<P, true>(a, b, i0 + m, x, words);
      store_16_bytes(lines + swizzled(line, m), words);
    }
    b += 2 * kGroupDepth;
  });
}

// The same where all inputs come in whole groups of 8 and nothing scales. kUsual: silu, x of the weights' type.
template <Products P, bool kUsual>
KAN_DEVICE void make_base_lines_quickly(const WideArguments& a, const FeatureTile& tile, const BatchStep& first, char* left) {
  const Problem& p = a.p;
  const int panel = int(thread_now()) / kGroupDepth % 2, line = int(thread_now()) % kGroupDepth, i0 = tile.input + panel * kGroupDepth;
  const int steps = first.count(), there = QuickRows::steps(first, line), x_dtype = kUsual ? kStoredAs<P> : p.x_dtype;
  char* first_line = pointer_now(left + panel * kPanelBytes + swizzled(line, 0));
  constexpr int kAhead = kUsual ? 4 : 2, kEights = kGroupDepth / kQuickInputs;
  Stored<kQuickInputs> ahead[kAhead];
  QuickRows rows(p, first, line);
  auto load = [&](int m, int i) { ahead[m].load_whole(rows.here, x_dtype, quick_input(p, i)); };
  KAN_UNROLL_ALL
  for (int m = 0; m < kAhead; ++m) load(m, i0 + m * kQuickInputs);
  OwnSteps<true> own;
  KAN_NO_UNROLL
  for (int s = own.first(); s < steps; s += 2) {
    own.begin();
    char* start = first_line + own.stage * kLeftBytes;
    KAN_NO_UNROLL
    for (int begin = 0; begin < kEights; begin += kAhead) {
      const int next = (begin + kAhead) % kEights;
      if (next == 0) rows.advance(p, x_dtype, s + 2 < there);
      KAN_UNROLL_ALL
      for (int m = 0; m < kAhead; ++m) {
        float x[kQuickInputs];
        uint32_t words[4];
        ahead[m].widen(x_dtype, x);
        load(m, i0 + (next + m) * kQuickInputs);
        if (kUsual) silu_features<P>(x, words);
        else base_features<P, false>(a, 0, 0, x, words);
        store_16_bytes(start, words, (begin + m) * 16);
      }
    }
    own.end();
  }
}

// One thread's pieces of the steps of g, two rows of each.
template <int kColumns, class T> struct GradientCopies {
  PanelPieces pieces;
  int64_t at;  // where the first row of the step at hand begins: it runs along
  int left;
  bool whole;

  KAN_DEVICE GradientCopies(const Problem& p, const BatchStep& first, int64_t o0) : whole(p.out_features - o0 >= kColumns) {
    const int64_t o = o0 + pieces.column;
    at = (first.b + pieces.row) * p.out_features + o;
    left = columns_left(p, o);
  }
  // Of the step at hand, which is `step`; then to the next one.
  KAN_DEVICE void copy(const WideArguments& a, const BatchStep& step, char* stage) {
    const int there = step.end - step.b < kGroupDepth ? int(step.end - step.b) : kGroupDepth;
    const T* from = static_cast<const T*>(a.p.g) + at;
    pieces.copy<kColumns>(stage, from, from + PanelPieces::kNext * a.p.out_features, pieces.row < there,
                          pieces.row + PanelPieces::kNext < there, left, whole, a.aligned);
    at += kGroupDepth * a.p.out_features;
  }
};

// write(row of d_spline or d_base, o, place, low, high) for a multiplier's share of the block's sums, those of outputs o and o + 1. Of a
// block that leaves a part they belong to `place`, which is null otherwise.
template <int kColumns, int kParts, class Write>
KAN_DEVICE void for_every_weight(const Problem& p, const WeightBlock& block, float* parts, const float (&sums)[kParts][64], Write write) {
  const int pitch = part_pitch(p, kColumns);
  float* part = block.part < 0 ? nullptr : parts + int64_t(block.part) * kTileFeatures * pitch;
  for_every_pair(sums, [&](int feature, int column, float low, float high) {
    const int64_t row = block.tile.features.row(p, feature), o = block.tile.o0 + column;
    if (row >= 0 && o < p.out_features) write(row, o, part == nullptr ? nullptr : part + feature * pitch + column, low, high);
  });
}

// The makers' part of a block. kQuick: where a.quick serves.
template <Products P, bool kQuick>
KAN_DEVICE void make_features(const WideArguments& a, const FeatureTile& tile, const BatchStep& first, char* left, char* knots) {
  if constexpr (kQuick) {
    const bool silu = a.activation.kind == kSilu && a.activation.n == 0;
    const bool usual = a.p.x_dtype == kStoredAs<P> && (tile.is_base ? silu : a.quick.mirrored);
    if (tile.is_base && usual) make_base_lines_quickly<P, true>(a, tile, first, left);
    else if (tile.is_base) make_base_lines_quickly<P, false>(a, tile, first, left);
    else if (usual) make_lines_quickly<P, true>(a, tile, first, left, knots);
    else make_lines_quickly<P, false>(a, tile, first, left, knots);
  } else {
    if (tile.is_base) make_base_lines<P>(a, tile, first, left);
    else make_lines<P>(a, tile, first, left);
  }
}

// The multipliers' products. stages: as CopiedByThreads.
template <Products P, int kColumns, class Stages>
KAN_DEVICE void multiply_features(const BatchStep& first, const char* left, const char* right, Stages& stages, GroupSums<kColumns>& sums) {
  const uint64_t rights = describe_tile(right);
  const LoadedLeft loaded;
  uint32_t registers[kLoadedSets<kColumns>][4];
  multiply_steps<true>(first, stages, [&](bool, int left_stage, int stage, auto copy_now, auto left_read) {
    loaded.multiply_and_copy<P>(sums, registers, left + left_stage * kLeftBytes, further(rights, stage * kRightBytes<kColumns>), copy_now, left_read);
  });
}

// Their sums: to the block's part, or where they belong.
template <Products P, int kColumns>
KAN_DEVICE void write_features(const WideArguments& a, const WeightBlock& block, float* parts, const GroupSums<kColumns>& sums) {
  using T = typename StorageOf<P>::Type;
  const Problem& p = a.p;
  T* to = static_cast<T*>(block.tile.features.is_base ? p.d_base : p.d_spline);
  for_every_weight<kColumns>(p, block, parts, sums, [&](int64_t row, int64_t o, float* place, float low, float high) {
    if (place == nullptr) write_pair<P>(to + row * p.out_features, o, p.out_features, a.aligned, low, high);
    else write_pair(place, 0, 2, true, low, high);
  });
}

template <Products P, int kColumns, bool kQuick>
__global__ void __launch_bounds__(kGroupThreads, 1) weight_warpgroup(KAN_ARGUMENT WideArguments a, float* parts, TileCut cut) {
#if KAN_WARPGROUPS
  char* right = first_atom();
  char* left = right + kRightStages * kRightBytes<kColumns>;
  char* knots = left + kLeftStages * kLeftBytes;
  const WeightBlock block(a.p, kColumns, cut, int(blockIdx.x));
  const BatchStep first{block.begin, block.end};
  if (int(threadIdx.x) >= kMultipliers) {
    set_registers<256 - kLoadedRegisters<kColumns>>();
    make_features<P, kQuick>(a, block.tile.features, first, left, knots);
  } else {
    set_registers<kLoadedRegisters<kColumns>>();
    GroupSums<kColumns> sums = {};
    GradientCopies<kColumns, typename StorageOf<P>::Type> copies(a.p, first, block.tile.o0);
    CopiedByThreads stages{[&](const BatchStep& step, int stage) { copies.copy(a, step, right + stage * kRightBytes<kColumns>); }};
    multiply_features<P, kColumns>(first, left, right, stages, sums);
    write_features<P, kColumns>(a, block, parts, sums);
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

constexpr int kAddThreads = 256;  // of the numbers of a part, whose pitch is even, a divisor
// The tiles that were cut: d_spline and d_base from their parts, slice by slice. A thread a number: with four, or with eight loads under
// way by hand, it took an H200 1 to 3 us longer.
template <class T>
__global__ void __launch_bounds__(kAddThreads) add_parts(Problem p, int columns, TileCut cut, const float* parts) {
  const int pitch = part_pitch(p, columns), size = kTileFeatures * pitch, blocks = size / kAddThreads;
  const int number = int(blockIdx.x) / blocks, at = int(blockIdx.x) % blocks * kAddThreads + int(threadIdx.x);
  const WeightTile tile(p, columns, cut.whole + number);
  const int64_t row = tile.features.row(p, at / pitch), o = tile.o0 + at % pitch;
  if (row < 0 || o >= p.out_features) return;
  float total = 0;
  for (int slice = 0; slice < cut.slices; ++slice) total += parts[(int64_t(slice) * cut.rest + number) * size + at];
  put(static_cast<T*>(tile.features.is_base ? p.d_base : p.d_spline)[row * p.out_features + o], total);
}
template <class T> int launch_add_parts(const Problem& p, int columns, const TileCut& cut, const float* parts, void* stream) {
  if (cut.rest == 0) return 0;
  const int64_t blocks = int64_t(cut.rest) * (kTileFeatures * part_pitch(p, columns) / kAddThreads);
  return launch(add_parts<T>, Blocks{blocks}, kAddThreads, 0, stream, p, columns, cut, parts);
}

template <Products P> int launch_weight_warpgroup(const WideArguments& a, int columns, float* parts, TileCut cut, void* stream) {
  if (int error = launch_cubics(a, stream)) return error;
  const bool wide = columns == 256, quick = a.quick.serves;
  const auto kernel = quick ? wide ? weight_warpgroup<P, 256, true> : weight_warpgroup<P, 128, true>
                            : wide ? weight_warpgroup<P, 256, false> : weight_warpgroup<P, 128, false>;
  if (int error = launch(kernel, Blocks{cut.blocks()}, kGroupThreads, wide ? kGroupWeightShared<256> : kGroupWeightShared<128>, stream, a,
                         parts, cut))
    return error;
  return launch_add_parts<typename StorageOf<P>::Type>(a.p, columns, cut, parts, stream);
}

}  // namespace kan::cuda
