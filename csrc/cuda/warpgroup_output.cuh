// contract_output of wide layers on Hopper (sm_90a): y = Phi W, where Phi (batch, in * bases) is made in shared memory by two
// warpgroups while two others multiply what these made a step before.
//
// A block: 128 rows by kColumns outputs. A step: 8 inputs x 8 bases, or the base branch of 64 inputs, 64 deep either way. Makers
// take turns, and a thread has one row: an item (row, input) is 16 bytes of the left operand, one store. Every 64
// inputs end with a step of the base branch, whose features were made along with the splines', so x is read once. The weights
// come by cp.async from the multipliers, which have nothing else to do.
//
// A multiprocessor's four schedulers have four warps each: two that multiply, two that make. Within 2048 cycles, what the tensor
// cores take for two steps of 256 columns, a maker's warp must make one: see quick.cuh.
//
// Sparse form: see fragments.cuh. A row of the left operand is then 64 bytes, four numbers an item, and comes into the
// multipliers' registers by ldmatrix, along with the metadata that the maker left beside it.
//
// 16-bit types only. Of 32-bit numbers the instruction wants the depth contiguous (only .f16 and .bf16 have imm-trans-b), and ours
// have the columns so. And it would read weights cut off to tf32, where wide_output.cuh rounds them.
#pragma once
#include "warpgroup_tile.cuh"

namespace kan::cuda {

// The base branch's features: one is multiplied, one is made, but only one step in nine is theirs.
constexpr int kBaseStages = 2, kMetadataBytes = kGroupRows * kGroupInputs;
template <int kColumns>
constexpr size_t kGroupOutputShared = kAtomBytes + kRightStages * kRightBytes<kColumns> + (kLeftStages + kBaseStages) * kLeftBytes +
                                      kLeftStages * kMetadataBytes + kKnotsBytes;

template <Products P, int kSums>
KAN_DEVICE void multiply_sparse(float (&c)[kSums], const uint32_t (&left)[4], uint64_t right, const uint32_t& metadata) {
  if constexpr (P == Products::bfloat16) wgmma_sparse_bfloat16(c, left, right, metadata);
  else wgmma_sparse_float16(c, left, right, metadata);
}

// The steps of a slice, in order: of every 64 inputs the groups of 8 with all chunks of 8 bases, then the base branch.
struct GroupStep {
  int block, end;  // first of the 64 inputs; end of the slice
  int chunks, chunk = 0;
  int at, left;  // first of the 8 inputs; steps of the block's splines that are left, this one included
  bool has_base;

  KAN_DEVICE GroupStep(int64_t begin, int64_t end, int chunks, bool has_base)
      : block(int(begin)), end(int(end)), chunks(chunks), has_base(has_base) {
    start();
  }
  KAN_DEVICE int count() const {
    const int inputs = end - block;
    return (inputs + kGroupInputs - 1) / kGroupInputs * chunks + (has_base ? (inputs + kGroupDepth - 1) / kGroupDepth : 0);
  }
  KAN_DEVICE bool more() const { return block < end; }
  KAN_DEVICE bool is_base() const { return left == 0; }
  KAN_DEVICE int input() const { return at; }
  KAN_DEVICE int group() const { return (at - block) / kGroupInputs; }
  KAN_DEVICE void advance() {
    const bool last = ++chunk == chunks;
    chunk = last ? 0 : chunk;
    at += last ? kGroupInputs : 0;
    if (--left < int(!has_base)) {
      block += kGroupDepth;
      start();
    }
  }

 private:
  KAN_DEVICE void start() {
    const int inputs = end - block < kGroupDepth ? end - block : kGroupDepth;
    at = block, chunk = 0, left = (inputs + kGroupInputs - 1) / kGroupInputs * chunks;
  }
};

// Where everything lies in shared memory.
template <int kColumns> struct GroupMemory {
  char *right, *left, *base, *metadata, *knots;

  KAN_DEVICE GroupMemory() {
    right = first_atom();
    left = right + kRightStages * kRightBytes<kColumns>;
    base = left + kLeftStages * kLeftBytes;
    metadata = base + kBaseStages * kLeftBytes;
    knots = metadata + kLeftStages * kMetadataBytes;
  }
};

// One thread's pieces of the steps' weights, two rows of a step, of one basis or of the base branch.
template <bool kSparse, int kColumns, class T> struct WeightCopies {
  static constexpr int kInputs = PanelPieces::kNext / kStepBases;  // from row to row
  PanelPieces pieces;
  int64_t spline;  // where the first row of the step at hand begins, of the splines' weights: it runs along
  int64_t column;
  int64_t of_input, to_inputs;  // from an input's weights to the next one's; from the last chunk to the next inputs' first one
  int basis, left;
  bool whole;

  KAN_DEVICE WeightCopies(const Problem& p, const GroupStep& first, int64_t o0) : whole(p.out_features - o0 >= kColumns) {
    basis = basis_of_place<kSparse, true>(pieces.row % kStepBases);
    column = o0 + pieces.column;
    left = columns_left(p, column);
    spline = (int64_t(first.block + pieces.row / kStepBases) * p.bases() + basis) * p.out_features + column;
    of_input = p.bases() * p.out_features;
    to_inputs = kGroupInputs * of_input - (first.chunks - 1) * kStepBases * p.out_features;
  }
  // Of the step at hand, which is `step`; then to the next one.
  KAN_DEVICE void copy(const WideArguments& a, const GroupStep& step, char* stage) {
    const Problem& p = a.p;
    if (step.is_base()) {
      const int i = step.block + pieces.row;
      const T* from = static_cast<const T*>(p.base_weight) + i * p.out_features + column;
      pieces.copy<kColumns>(stage, from, from + PanelPieces::kNext * p.out_features, i < step.end, i + PanelPieces::kNext < step.end, left,
                            whole, a.aligned);
    } else {
      const int i = step.input() + pieces.row / kStepBases, end = step.chunk * kStepBases + basis < p.bases() ? step.end : 0;
      const T* from = static_cast<const T*>(p.spline_weight) + spline;
      pieces.copy<kColumns>(stage, from, from + kInputs * of_input, i < end, i + kInputs < end, left, whole, a.aligned);
      spline += step.chunk + 1 < step.chunks ? kStepBases * p.out_features : to_inputs;
    }
  }
};

// Four items of a row in the sparse form: the first or the second half of its 64 bytes.
template <Products P>
KAN_DEVICE void write_sparse_windows(const Kept<P> (&items)[4], int first_base, char* left, char* metadata, int row, int half) {
  metadata += half * (kMetadataBytes / 2) + row / 16 * 64 + row % 8 * 8 + row / 8 % 2 * 2;
  KAN_UNROLL_ALL
  for (int m = 0; m < 2; ++m) {
    uint32_t words[4], bits = 0;
    KAN_UNROLL_ALL
    for (int r = 0; r < 2; ++r) {
      const int shift = items[2 * m + r].first - first_base;
      sparse_words(items[2 * m + r].w, shift, words[2 * r], words[2 * r + 1]);
      bits |= pair_metadata(shift) << (8 * r);
    }
    store_16_bytes(left + row * kGroupDepth + ((2 * half + m) ^ row / 2 % 4) * 16, words);
    *reinterpret_cast<uint16_t*>(metadata + m * 4) = uint16_t(bits);
  }
}

// The base branch's features that nobody made, of inputs that do not exist: zeros.
KAN_DEVICE void fill_base(char* base, int row, int groups) {
  const uint32_t zeros[4] = {};
  for (int group = groups; group < kGroupInputs; ++group) store_16_bytes(base + swizzled(row, group * 8), zeros);
}

// A maker's thread, of rows from b0 on.
template <Products P, bool kSparse, int kColumns>
KAN_DEVICE void make_left(const WideArguments& a, const GroupMemory<kColumns>& memory, const GroupStep& first, int64_t b0) {
  const Problem& p = a.p;
  const int row = int(thread_now()) % kGroupRows, maker = int(thread_now()) / kGroupRows % 2;
  const int64_t b = b0 + row;
  const bool vectors = inputs_in_vectors(p, 4);
  Stored<4> ahead[2];
  int coming = first.chunks == 1 ? first.block + maker * kGroupInputs : first.block;  // the input whose x they are
  KAN_UNROLL_ALL
  for (int half = 0; half < 2; ++half) load_inputs(ahead[half], p, b, coming + 4 * half, first.end, vectors);
  make_steps<false>(first, maker, [&](const GroupStep& step, int stage) {
    char* base = memory.base + (step.block - first.block) / kGroupDepth % kBaseStages * kLeftBytes;
    if (step.is_base()) return fill_base(base, row, (step.end - step.block + kGroupInputs - 1) / kGroupInputs);
    char* left = memory.left + stage * kLeftBytes;
    const bool expected = coming == step.input();
    // This maker's next one, in groups from here: every other step, and the base branch has one as well.
    int skipped = !step.has_base || step.group() < 6 ? 2 : step.group() == 6 ? 3 : 1;
    if (step.chunks > 1) skipped = step.chunk + 2 < step.chunks ? 0 : 1;
    coming = step.input() + skipped * kGroupInputs;
    KAN_UNROLL_ALL
    for (int half = 0; half < 2; ++half) {
      const int i = step.input() + 4 * half, first_base = step.chunk * kStepBases;
      float x[4];
      if (!expected) load_inputs(ahead[half], p, b, i, step.end, vectors);
      ahead[half].widen(p.x_dtype, x);
      load_inputs(ahead[half], p, b, coming + 4 * half, step.end, vectors);
      if (step.has_base && step.chunk == 0) {
        uint32_t words[2];
        base_features<P, true>(a, b, i, x, words);
        store_8_bytes(base + swizzled(row, step.group() * 8) + 8 * half, words);
      }
      Kept<P> items[4];
      make_items<P, kSparse>(a, b, i, step.end, x, items);
      if constexpr (kSparse) write_sparse_windows(items, first_base, left, memory.metadata + stage * kMetadataBytes, row, half);
      else write_windows(items, first_base, left, row, 4 * half);
    }
  });
}

// The same where the quick way serves most items, of rows from b0 on, and all inputs come in whole groups of 8. Below the batch its last
// row is made again, for sums that nobody writes. kUsual: order 3, not more than eight bases, a base branch of silu, x of the weights' type;
// then nothing is asked again in every step.
template <Products P, bool kUsual, int kColumns>
KAN_DEVICE void make_left_quickly(const WideArguments& a, const GroupMemory<kColumns>& memory, const GroupStep& first, int64_t b0) {
  const Problem& p = a.p;
  const int chunks = kUsual ? 1 : first.chunks, x_dtype = kUsual ? kStoredAs<P> : p.x_dtype;
  const bool has_base = kUsual || first.has_base;
  // Registers are few: what the usual way does not need in every step is computed where it is used.
  auto place = [] { return int(thread_now()) % kGroupRows; };
  auto row = [&] { return b0 + place() < p.batch ? b0 + place() : p.batch - 1; };
  const void* x_row = rows_from(p, p.x, row());
  char* left = pointer_now(memory.left + swizzled(place(), 0));
  WarpKnots knots(knots_of_warp(memory.knots));
  OwnSteps<> own;
  int number = own.first();  // of the block's steps
  Stored<kQuickInputs> ahead;
  auto load = [&](int i) { ahead.load_whole(x_row, x_dtype, i < first.end - kQuickInputs ? i : first.end - kQuickInputs); };
  auto first_input = [&](int number) { return chunks == 1 ? number * kGroupInputs : 0; };  // of a block's first or second step
  load(first.block + first_input(number));
  knots.load(a, first.block);
  KAN_NO_UNROLL
  for (int block = first.block; block < first.end; block += kGroupDepth) {
    knots.arrive();
    knots.load(a, block + kGroupDepth);
    const int inputs = first.end - block < kGroupDepth ? first.end - block : kGroupDepth, steps = inputs / kGroupInputs * chunks;
    char* base = left + (memory.base - memory.left) + ((block - first.block) & kGroupDepth) * (kLeftBytes / kGroupDepth);
    int input = 0, chunk = chunks == 1 ? 0 : number;  // of the step at hand, where inputs have several
    KAN_NO_UNROLL
    for (; number < steps; number += 2) {
      float x[kQuickInputs];
      ahead.widen(x_dtype, x);
      const int at = chunks == 1 ? number * kGroupInputs : input, first_base = chunk * kStepBases;
      if (chunks > 1 && (chunk += 2) >= chunks) chunk -= chunks, input += kGroupInputs;
      // Of the next block both groups make their first step, where the base branch's is not in between.
      const int after = number + 2 - steps;
      load(block + (after >= 0 ? kGroupDepth + first_input(after ^ int(has_base)) : chunks == 1 ? at + 2 * kGroupInputs : input));
      QuickWindows<P> windows;
      uint32_t words[4];
      if (kUsual) {
        windows.template evaluate<true>(a, knots, at, x, 0);
        silu_features<P>(x, words);  // in one piece with what is above: their instructions mix
      } else {
        if (has_base && first_base == 0) base_features<P, false>(a, b0, 0, x, words);
        windows.template evaluate<false>(a, knots, at, x, first_base);
      }
      own.begin();  // not before: until here nothing is written
      if (has_base && first_base == 0) store_16_bytes(base, words, at * 2);
      char* start = left + own.stage * kLeftBytes;
      if (!windows.write(a, first_base, start))
        write_general_windows<P>(a, row(), block + at, first_base, start - swizzled(place(), 0), place());
      own.end();
    }
    if (has_base && number == steps) {
      own.begin();
      fill_base(base - swizzled(place(), 0), place(), inputs / kGroupInputs);
      own.end();
      number += 2;
    }
    number -= steps + int(has_base);
  }
}

// stages: as CopiedByThreads.
template <Products P, bool kSparse, int kColumns, class Stages>
KAN_DEVICE void multiply_left(const GroupMemory<kColumns>& memory, const GroupStep& first, Stages& stages, GroupSums<kColumns>& sums) {
  const uint64_t lefts = describe_tile(memory.left + multiplier_group() * (kLeftBytes / 2)), rights = describe_tile(memory.right);
  int base_stage = 0;
  uint32_t left[2][4], metadata[2];  // of the sparse form: in use until the product has been waited for
  auto multiply = [&](bool is_base, int left_stage, int stage, auto copy_now) {
    if (!kSparse || is_base) {
      if (kSparse) wait_for_products<0>();  // products of two shapes may not be under way on the same sums
      // The base branch's stages follow the splines'.
      const int tile = is_base ? kLeftStages + base_stage : left_stage;
      multiply_and_copy<P, false, true>(sums, further(lefts, tile * kLeftBytes), further(rights, stage * kRightBytes<kColumns>), copy_now);
    } else if constexpr (kSparse) {
      // The other group multiplies while this one waits.
      wait_for_products<0>();
      const int thread = int(thread_now()), warp = thread / 32, lane = thread % 32;
      const char* rows = memory.left + left_stage * kLeftBytes + (16 * warp + lane % 16) * kGroupDepth;
      const char* bits = memory.metadata + left_stage * kMetadataBytes + warp * 64 + lane / 4 * 8 + lane % 2 * 4;
      KAN_UNROLL_ALL
      for (int k = 0; k < 2; ++k) {
        load_matrices(left[k], rows + ((2 * k + lane / 16) ^ lane / 2 % 4) * 16);
        metadata[k] = *reinterpret_cast<const uint32_t*>(bits + k * (kMetadataBytes / 2));
      }
      KAN_UNROLL_ALL
      for (int k = 0; k < 2; ++k) {
        order_registers();
        KAN_UNROLL_ALL
        for (int part = 0; part < kColumns / 128; ++part)
          multiply_sparse<P>(sums[part], left[k], further(rights, stage * kRightBytes<kColumns> + part * 2 * kPanelBytes) + 2 * k * kSixteenLines,
                             metadata[k]);
        commit_products();
        if (k == 0) copy_now();
      }
    }
    if (is_base) base_stage = 1 - base_stage;
  };
  multiply_steps<true>(first, stages, multiply);
}

// body(steps, o0, slice) for the block's tiles. In between, nobody makes or copies what belongs to the next tile while this one's
// is read.
template <int kColumns, int kBarrier, class Step, class Body>
KAN_DEVICE void for_every_tile(const Problem& p, int64_t slices, int64_t inputs_per_slice, Body body) {
  const int chunks = (p.bases() + kStepBases - 1) / kStepBases;
  for (int64_t slice = blockIdx.z; slice < slices; slice += gridDim.z)
    for (int64_t o0 = int64_t(blockIdx.y) * kColumns; o0 < p.out_features; o0 += int64_t(gridDim.y) * kColumns) {
      const int64_t begin = slice * inputs_per_slice;
      const int64_t end = begin + inputs_per_slice < p.in_features ? begin + inputs_per_slice : p.in_features;
      body(Step(begin, end, chunks, p.base_weight != nullptr), o0, slice);
      meet(kBarrier, kGroupThreads);
    }
}

// The makers' part of a tile. kQuick: where a.quick serves. Both ways in one kernel would compete for registers.
template <Products P, bool kSparse, bool kQuick, int kColumns>
KAN_DEVICE void make_tile(const WideArguments& a, const GroupMemory<kColumns>& memory, const GroupStep& first, int64_t b0) {
  if constexpr (kQuick) {
    const bool usual = a.quick.mirrored && first.chunks == 1 && first.has_base && a.activation.kind == kSilu && a.p.x_dtype == kStoredAs<P>;
    if (usual) make_left_quickly<P, true>(a, memory, first, b0);
    else make_left_quickly<P, false>(a, memory, first, b0);
  } else {
    make_left<P, kSparse>(a, memory, first, b0);
  }
}

// The multipliers' sums: to y, or to `parts` (batch, out).
template <Products P, int kParts>
KAN_DEVICE void write_tile(const WideArguments& a, float* parts, int64_t b0, int64_t o0, const float (&sums)[kParts][64]) {
  using T = typename StorageOf<P>::Type;
  const Problem& p = a.p;
  for_every_pair(sums, [&](int row, int column, float low, float high) {
    const int64_t b = b0 + row, o = o0 + column;
    if (b >= p.batch || o >= p.out_features) return;
    if (parts != nullptr) write_pair(parts + b * p.out_features, o, p.out_features, a.aligned, low, high);
    else write_pair<P>(static_cast<T*>(p.y) + b * p.out_features, o, p.out_features, a.aligned, low, high);
  });
}

template <Products P, bool kSparse, int kColumns, bool kQuick>
__global__ void __launch_bounds__(kGroupThreads, 1)
    output_warpgroup(WideArguments a, float* parts, int64_t slices, int64_t inputs_per_slice) {
#if KAN_WARPGROUPS
  const GroupMemory<kColumns> memory;
  const int thread = int(threadIdx.x);
  const int64_t b0 = int64_t(blockIdx.x) * kGroupRows;
  if (thread >= kMultipliers) {
    set_registers<kMakersRegisters<kColumns>>();
    for_every_tile<kColumns, kTileBarrier, GroupStep>(a.p, slices, inputs_per_slice, [&](const GroupStep& first, int64_t, int64_t) {
      make_tile<P, kSparse, kQuick>(a, memory, first, b0);
    });
  } else {
    set_registers<kMultipliersRegisters<kColumns>>();
    for_every_tile<kColumns, kTileBarrier, GroupStep>(a.p, slices, inputs_per_slice, [&](const GroupStep& first, int64_t o0, int64_t slice) {
      GroupSums<kColumns> sums = {};
      WeightCopies<kSparse, kColumns, typename StorageOf<P>::Type> copies(a.p, first, o0);
      CopiedByThreads stages{[&](const GroupStep& step, int stage) { copies.copy(a, step, memory.right + stage * kRightBytes<kColumns>); }};
      multiply_left<P, kSparse>(memory, first, stages, sums);
      write_tile<P>(a, parts != nullptr ? parts + slice * a.p.batch * a.p.out_features : nullptr, b0, o0, sums);
    });
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

// Of columns 128 or 256; sparse 128 alone.
template <Products P, bool kSparse>
int launch_output_warpgroup(const WideArguments& a, int columns, float* parts, Slices slices, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_cubics(a, stream)) return error;
  const Blocks blocks{(p.batch + kGroupRows - 1) / kGroupRows, (p.out_features + columns - 1) / columns, slices.count};
  const bool wide = columns == 256, quick = !kSparse && a.quick.serves;
  auto kernel = wide ? output_warpgroup<P, kSparse, kSparse ? 128 : 256, false> : output_warpgroup<P, kSparse, 128, false>;
  if constexpr (!kSparse)
    if (quick) kernel = wide ? output_warpgroup<P, false, 256, true> : output_warpgroup<P, false, 128, true>;
  return launch(kernel, blocks, kGroupThreads, wide ? kGroupOutputShared<256> : kGroupOutputShared<128>, stream, a, parts, slices.count, slices.rows);
}

}  // namespace kan::cuda
