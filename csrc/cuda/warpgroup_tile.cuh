// What the warpgroup kernels share: a block's tile of 128 x kColumns sums, held by two warpgroups; its layouts in shared memory;
// the loop over steps that are 64 deep.
//
// Layouts, by 9.7.15.5.1.2 of the PTX ISA, "Shared Memory Matrix Layout", 128-byte swizzle: lines of 128 bytes, whose pieces of
// 16 bytes stand at their number xor line % 8; eight lines, 1024 bytes, are an atom, which begins at a multiple of its size.
// Depth contiguous ("K-major"): a line is 64 numbers of one row or column. Else ("MN-major"): a line is 64 rows or columns at one
// depth, and panels of 64 such lines follow each other.
#pragma once
#include "launch.h"
#include "quick.cuh"

namespace kan::cuda {

constexpr int kMultipliers = 256, kMakers = 256, kGroupThreads = kMultipliers + kMakers;
// Of the 65536 registers of a multiprocessor, which the launch shares out evenly: 128 each. ptxas keeps 24 below the sums and wants two
// more than the left operand's above: with fewer every product waits for the one before (C7512).
template <int kColumns> constexpr int kMultipliersRegisters = kColumns == 256 ? 168 : 120;
template <int kColumns> constexpr int kMakersRegisters = 256 - kMultipliersRegisters<kColumns>;
constexpr int kGroupRows = 128, kGroupDepth = 64, kGroupInputs = kGroupDepth / kStepBases;
// Left: while one is multiplied each group of makers has one. Copied: one is multiplied, one may still be by whoever is behind, the
// others are on their way.
constexpr int kLeftStages = 3, kRightStages = 4;
constexpr int kAtomBytes = 1024, kLineNumbers = 64, kPanelBytes = kGroupDepth * 2 * kLineNumbers;
constexpr int kLeftBytes = kGroupRows * kGroupDepth * 2;
template <int kColumns> constexpr int kRightBytes = kColumns * kGroupDepth * 2;

// The first multiple of an atom in the block's shared memory.
KAN_DEVICE char* first_atom() {
  char* memory = shared_memory<char>();
  return memory + (kAtomBytes - shared_address(memory) % kAtomBytes) % kAtomBytes;
}
// Of number `number` of line `line`, a multiple of 8.
KAN_DEVICE int swizzled(int line, int number) { return swizzled_piece(line, number / 8); }
// Columns from o on; more than a tile has count as that many.
KAN_DEVICE int columns_left(const Problem& p, int64_t o) { return p.out_features - o < 256 ? int(p.out_features - o) : 256; }

// 9.7.15.5.1.2.2, "Matrix Descriptor Format": offsets without their last four bits, from bit 0, 16 and 32; the swizzle from bit 62.
// Here panel to panel, which has no meaning where the depth is contiguous, and atom to atom.
KAN_DEVICE uint64_t describe_tile(const char* tile) {
  constexpr uint64_t kLeading = kPanelBytes, kStride = kAtomBytes, kSwizzle128 = 1;
  return (shared_address(tile) & 0x3ffff) >> 4 | kLeading >> 4 << 16 | kStride >> 4 << 32 | kSwizzle128 << 62;
}
// To the descriptor of what is so many bytes further.
KAN_DEVICE uint64_t further(uint64_t descriptor, int bytes) { return descriptor + uint32_t(bytes >> 4); }
// To the descriptor of what is 16 deeper: two pieces of every line, or two atoms.
constexpr uint64_t kSixteenInLine = 32 >> 4, kSixteenLines = 2 * kAtomBytes >> 4;

// A warpgroup's 64 rows of the tile. 128 columns to an instruction: with 256, whose sums alone are 128 registers, nothing is
// compiled for 512 threads, however many registers the multipliers take later.
template <int kColumns> using GroupSums = float[kColumns / 128][64];

// Where a multiplier's thread finds its part of the left operand, 16 deep. An instruction that reads that operand in shared memory
// itself does so once for every 128 columns: m64n256k16 alone comes to 625 TFLOP/s that way on an H200, and to 933 with it in
// registers. By lines: a line is one depth, and a group's 64 rows are a panel; else a line is a row.
template <bool kByLines> struct LeftPieces {
  int place;

  KAN_DEVICE LeftPieces() {
    const int warp = int(thread_now()) / 32, lane = int(thread_now()) % 32;
    if (kByLines) place = warp / 4 * kPanelBytes + swizzled_piece(lane / 16 * 8 + lane % 8, warp % 4 * 2 + lane / 8 % 2);
    else place = swizzled_piece(warp * 16 + lane % 16, lane / 16);
  }
  // Of the depths 16 k and on.
  KAN_DEVICE void load(uint32_t (&left)[4], const char* tile, int k) const {
    if constexpr (kByLines) load_matrices_transposed(left, tile + place + k * 16 * 2 * kLineNumbers);
    else load_matrices(left, tile + (place ^ k * 32));
  }
};

template <Products P, bool kRightByLines, int kSums> KAN_DEVICE void multiply_dense(float (&c)[kSums], const uint32_t (&left)[4], uint64_t right) {
  if constexpr (P == Products::bfloat16) wgmma_bfloat16<kRightByLines>(c, left, right);
  else wgmma_float16<kRightByLines>(c, left, right);
}

// A step's product as multiply_steps wants it, in turns through kSets sets of registers, so that some instructions are under way while
// the next registers are loaded. copy_now(), which begins copies, comes once the first instructions are on their way: those behind them
// wait for room among the tensor cores' work, and so would what follows them all. The registers are in use until the product has been
// waited for.
template <Products P, bool kLeftByLines, bool kRightByLines, int kSets, int kParts, class Copy>
KAN_DEVICE void multiply_and_copy(float (&sums)[kParts][64], uint32_t (&left)[kSets][4], const LeftPieces<kLeftByLines>& pieces,
                                  const char* tile, uint64_t right, Copy copy_now) {
  // 128 columns further: two panels of lines, or 128 lines.
  constexpr uint64_t kPart = (kRightByLines ? 2 * kPanelBytes : 128 * 2 * kLineNumbers) >> 4;
  KAN_UNROLL_ALL
  for (int k = 0; k < kGroupDepth / 16; ++k) {
    // What these registers were in is done; what is still under way has the others.
    wait_for_products<kSets - 1>();
    pieces.load(left[k % kSets], tile, k);
    order_registers();
    KAN_UNROLL_ALL
    for (int part = 0; part < kParts; ++part)
      multiply_dense<P, kRightByLines>(sums[part], left[k % kSets], right + k * (kRightByLines ? kSixteenLines : kSixteenInLine) + part * kPart);
    commit_products();
    if (k == kSets - 1) copy_now();  // elsewhere ptxas gives up on the order of these registers (C7513)
  }
}
// So many sets that about four instructions are under way.
template <int kColumns> constexpr int kLeftSets = kColumns == 256 ? 2 : 4;

// 8 numbers of every one of kRows rows, to shared memory: row `row`, `next` rows further and so on, as far as they lie below
// `end`; only `left` columns exist. What does not exist becomes zeros.
template <int kRows, class T>
KAN_DEVICE void copy_rows(T* to, int to_next, const T* from, int64_t from_next, int left, int row, int next, int end, bool aligned) {
  if (aligned) {
    const int rows = left > 0 ? (end - row + next - 1) / next : 0;
    KAN_UNROLL_ALL
    for (int m = 0; m < kRows; ++m) {
      copy_16_bytes(to + m * to_next, from, m >= rows);
      from += from_next;
    }
    return;
  }
  KAN_NO_UNROLL
  for (int m = 0; m < kRows * 8; ++m) {
    to[m / 8 * to_next + m % 8] = row < end && m % 8 < left ? from[m % 8] : T{};
    if (m % 8 == 7) row += next, from += from_next;
  }
}

// A thread's pieces of a step's kGroupDepth rows, by lines: 8 columns of every panel, of row `row` and of row `row` + kNext. From panel to
// panel, and from row to row, all places differ alike.
struct PanelPieces {
  static constexpr int kNext = kGroupDepth / 2;
  int row, column;

  KAN_DEVICE PanelPieces() : row(int(thread_now() / 8)), column(int(thread_now() % 8 * 8)) {
    static_assert(kMultipliers / 8 == kNext);
  }
  // To shared memory, from the two rows, of which columns `column` and further are at hand: `left` of them exist, of a row that is there.
  // whole: all panels do. What does not exist becomes zeros.
  template <int kColumns, class T>
  KAN_DEVICE void copy(char* stage, const T* first, const T* second, bool first_there, bool second_there, int left, bool whole, bool aligned) const {
    constexpr int kPanels = kColumns / kLineNumbers, kPanelNumbers = kPanelBytes / int(sizeof(T));
    T* to = reinterpret_cast<T*>(stage + swizzled(row, column));
    if (aligned && whole) {
      KAN_UNROLL_ALL
      for (int m = 0; m < kPanels; ++m) copy_16_bytes(to + m * kPanelNumbers, first + m * kLineNumbers, !first_there);
      KAN_UNROLL_ALL
      for (int m = 0; m < kPanels; ++m) copy_16_bytes(to + m * kPanelNumbers + kNext * kLineNumbers, second + m * kLineNumbers, !second_there);
      return;
    }
    if (aligned) {
      KAN_UNROLL_ALL
      for (int m = 0; m < kPanels; ++m) copy_16_bytes(to + m * kPanelNumbers, first + m * kLineNumbers, !first_there || left <= m * kLineNumbers);
      KAN_UNROLL_ALL
      for (int m = 0; m < kPanels; ++m)
        copy_16_bytes(to + m * kPanelNumbers + kNext * kLineNumbers, second + m * kLineNumbers, !second_there || left <= m * kLineNumbers);
      return;
    }
    KAN_NO_UNROLL
    for (int m = 0; m < kPanels * kLineNumbers; m = m % 8 == 7 ? m - 7 + kLineNumbers : m + 1) {
      T* number = to + m / kLineNumbers * kPanelNumbers + m % 8;
      *number = first_there && m < left ? first[m] : T{};
      number[kNext * kLineNumbers] = second_there && m < left ? second[m] : T{};
    }
  }
};

// Numbered barriers: of each left stage one for "made" and, for each group of makers, one for "read"; and one for everybody. The groups
// have a stage in turns: at one barrier a group two steps ahead would take what the other one is about to wait for.
constexpr int kMadeBarrier = 1, kReadBarrier = kMadeBarrier + kLeftStages, kTileBarrier = kReadBarrier + 2 * kLeftStages;
constexpr int kHandover = kMultipliers + kMakers / 2;  // threads of both: one of the makers' groups

template <int kStages> KAN_DEVICE int next_of(int stage) {
  if constexpr ((kStages & (kStages - 1)) == 0) return (stage + 1) & (kStages - 1);
  else return stage + 1 < kStages ? stage + 1 : 0;
}

// Every maker's warp has its part.
constexpr int kKnotsBytes = kMakers / 32 * WarpKnots::kBytes;
KAN_DEVICE QuickKnots* knots_of_warp(char* knots) {
  return reinterpret_cast<QuickKnots*>(knots + (threadIdx.x - kMultipliers) / 32 * WarpKnots::kBytes);
}

// Of the makers' groups the one that the thread belongs to.
KAN_DEVICE int makers_group() { return int(thread_now()) / (kMakers / 2) % 2; }

// Around what a maker writes to `stage`, for the multipliers' threads to load.
KAN_DEVICE void begin_step(int stage) { meet(kReadBarrier + stage + kLeftStages * makers_group(), kHandover); }
KAN_DEVICE void end_step(int stage) { arrive(kMadeBarrier + stage, kHandover); }

// The steps of a makers' group: of all steps the two groups take turns, for making one may take as long as multiplying two.
struct OwnSteps {
  int stage = first();

  KAN_DEVICE static int first() { return makers_group(); }
  KAN_DEVICE void begin() const { begin_step(stage); }
  KAN_DEVICE void end() {
    end_step(stage);
    stage = stage > 0 ? stage - 1 : kLeftStages - 1;  // two further
  }
};
// Of `steps` steps a group's own: make(stage) writes what the multipliers will load.
template <class Make> KAN_DEVICE void make_own_steps(int steps, Make make) {
  OwnSteps own;
  KAN_NO_UNROLL
  for (int s = own.first(); s < steps; s += 2) {
    own.begin();
    make(own.stage);
    own.end();
  }
}
// The same for steps that have to be gone through one by one: make(step, stage).
template <class Step, class Make> KAN_DEVICE void make_steps(Step step, int group, Make make) {
  const int steps = step.count();
  int stage = 0;
  KAN_NO_UNROLL
  for (int s = 0; s < steps; ++s) {
    if ((s & 1) == group) {
      begin_step(stage);
      make(step, stage);
      end_step(stage);
    }
    step.advance();
    stage = next_of<kLeftStages>(stage);
  }
}

// The multipliers' loop. copy(step, stage) begins the copies of a step; multiply(is_base, left stage, right stage, copy_now, left_read)
// begins its product, commits it, calls copy_now once meanwhile, which begins further copies, and left_read once the left operand is in
// registers; it has waited for the step before when it returns. Without makers (kMade) the left operand is copied along with the right
// one, and only the multipliers meet.
template <bool kMade, class Step, class Copy, class Multiply> KAN_DEVICE void multiply_steps(Step coming, Copy copy, Multiply multiply) {
  const int steps = coming.count();
  uint32_t kinds = 0;  // is_base of the steps whose copies have begun, the last one's in bit 0
  int uncopied = steps;
  auto copy_next = [&](int stage) {
    kinds = kinds << 1 | uint32_t(coming.is_base());
    if (uncopied-- > 0) copy(coming, stage);
    commit_copies();
    coming.advance();
  };
  for (int s = 0; s < kRightStages - 2; ++s) copy_next(s);
  KAN_UNROLL_ALL
  for (int s = 0; kMade && s < kLeftStages; ++s)
    if (s < steps) arrive(kReadBarrier + s + kLeftStages * (s & 1), kHandover);
  int left = 0, right = 0, next = kRightStages - 2;
  KAN_NO_UNROLL
  for (int s = 0; s < steps; ++s) {
    // This step's copies are there, and what has been made, for everybody. What the step before last used has been read by both groups.
    wait_for_copies<kRightStages - 3>();
    show_to_tensor_cores();
    if (kMade) meet(kMadeBarrier + left, kHandover);
    else meet(kTileBarrier, kMultipliers);
    const bool is_base = kinds >> (kRightStages - 3) & 1u;
    auto copy_now = [&] { copy_next(next); };
    multiply(is_base, left, right, copy_now, [&] {
      if (kMade && s + kLeftStages < steps) arrive(kReadBarrier + left + kLeftStages * (~s & 1), kHandover);
    });
    left = next_of<kLeftStages>(left), right = next_of<kRightStages>(right), next = next_of<kRightStages>(next);
  }
  wait_for_products<0>();
  wait_for_copies<0>();
}

// Two sums at once, as the floats that they are: their bits, as other registers, would be taken before the products are waited for.
struct alignas(8) Pair {
  float low, high;
};

// body(row, column, sum, next column's sum) for a multiplier's share of the tile.
template <int kParts, class Body> KAN_DEVICE void for_every_pair(const float (&sums)[kParts][64], Body body) {
  const int thread = int(thread_now()), row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  KAN_UNROLL_ALL
  for (int part = 0; part < kParts; ++part)
    KAN_UNROLL_ALL
    for (int j = 0; j < 16; ++j)
      KAN_UNROLL_ALL
      for (int r = 0; r < 2; ++r)
        body(row + 8 * r, 128 * part + 8 * j + column, sums[part][4 * j + 2 * r], sums[part][4 * j + 2 * r + 1]);
}

// Two neighbouring outputs o, o + 1 of a row of numbers: 16-bit or float32. `aligned`: the row's length is even.
template <Products P> KAN_DEVICE void write_pair(typename StorageOf<P>::Type* row, int64_t o, int64_t outputs, bool aligned, float low, float high) {
  if (aligned) {
    *reinterpret_cast<uint32_t*>(row + o) = pack<P>(low, high);
    return;
  }
  put(row[o], low);
  if (o + 1 < outputs) put(row[o + 1], high);
}
KAN_DEVICE void write_pair(float* row, int64_t o, int64_t outputs, bool aligned, float low, float high) {
  if (aligned) {
    *reinterpret_cast<Pair*>(row + o) = {low, high};
    return;
  }
  row[o] = low;
  if (o + 1 < outputs) row[o + 1] = high;
}

}  // namespace kan::cuda
