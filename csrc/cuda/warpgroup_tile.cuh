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
// Of the 65536 registers of a multiprocessor, which the launch shares out evenly: 128 each.
template <int kColumns> constexpr int kMultipliersRegisters = kColumns == 256 ? 160 : 112;
template <int kColumns> constexpr int kMakersRegisters = 256 - kMultipliersRegisters<kColumns>;
// Of the threads that multiply: which of the two warpgroups, the same in all lanes as nvcc sees it.
KAN_DEVICE int multiplier_group() { return shuffle(int(threadIdx.x) / 128, 0); }
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

// A step's product, of depths kFirst .. kLast - 1 of kGroupDepth / 16. By lines: of that operand a line is one depth.
template <Products P, bool kLeftByLines, bool kRightByLines, int kFirst = 0, int kLast = kGroupDepth / 16, int kParts>
KAN_DEVICE void multiply_group(float (&sums)[kParts][64], uint64_t left, uint64_t right) {
  // 128 columns further: two panels of lines, or 128 lines.
  constexpr uint64_t kPart = (kRightByLines ? 2 * kPanelBytes : 128 * 2 * kLineNumbers) >> 4;
  KAN_UNROLL_ALL
  for (int k = kFirst; k < kLast; ++k)
    KAN_UNROLL_ALL
    for (int part = 0; part < kParts; ++part) {
      const uint64_t left_k = left + k * (kLeftByLines ? kSixteenLines : kSixteenInLine);
      const uint64_t right_k = right + k * (kRightByLines ? kSixteenLines : kSixteenInLine) + part * kPart;
      if constexpr (P == Products::bfloat16) wgmma_bfloat16<kLeftByLines, kRightByLines>(sums[part], left_k, right_k);
      else wgmma_float16<kLeftByLines, kRightByLines>(sums[part], left_k, right_k);
    }
}
template <Products P, bool kLeftByLines, bool kRightByLines, int kParts>
KAN_DEVICE void multiply_group(float (&sums)[kParts][64], const char* left, const char* right) {
  multiply_group<P, kLeftByLines, kRightByLines>(sums, describe_tile(left), describe_tile(right));
}

// A step's product as multiply_steps wants it, in two commits. copy_now(), which begins copies, comes once the first instructions are on
// their way: those behind them wait for room among the tensor cores' work, and so would what follows them all.
template <Products P, bool kLeftByLines, bool kRightByLines, int kParts, class Copy>
KAN_DEVICE void multiply_and_copy(float (&sums)[kParts][64], uint64_t left, uint64_t right, Copy copy_now) {
  order_registers();
  multiply_group<P, kLeftByLines, kRightByLines, 0, 1>(sums, left, right);
  commit_products();
  copy_now();
  order_registers();
  multiply_group<P, kLeftByLines, kRightByLines, 1>(sums, left, right);
  commit_products();
}

// The same with the left operand in registers, by lines: read from shared memory once for all columns. In turns through two or four sets of
// registers, so that about four instructions are under way while the next ones are loaded. left_read() comes when all are. The registers
// are in use until the product has been waited for.
template <int kColumns> constexpr int kLoadedSets = kColumns == 256 ? 2 : 4;
template <int kColumns> constexpr int kLoadedRegisters = kMultipliersRegisters<kColumns> + 8;
struct LoadedLeft {
  int place;

  KAN_DEVICE LoadedLeft() {
    const int warp = int(thread_now()) / 32, lane = int(thread_now()) % 32;
    place = warp / 4 * kPanelBytes + swizzled_piece(lane / 16 * 8 + lane % 8, warp % 4 * 2 + lane / 8 % 2);
  }
  template <Products P, int kSets, int kParts, class Copy, class Read>
  KAN_DEVICE void multiply_and_copy(float (&sums)[kParts][64], uint32_t (&registers)[kSets][4], const char* left, uint64_t right, Copy copy_now,
                                    Read left_read) const {
    constexpr uint64_t kPart = 2 * kPanelBytes >> 4;  // 128 columns further
    constexpr int kTurns = kGroupDepth / 16;
    KAN_UNROLL_ALL
    for (int k = 0; k < kTurns; ++k) {
      wait_for_products<kSets - 1>();  // what is still under way has the other registers
      load_matrices_transposed(registers[k % kSets], left + place + k * 16 * 2 * kLineNumbers);
      order_registers();
      KAN_UNROLL_ALL
      for (int part = 0; part < kParts; ++part) {
        const uint64_t right_k = right + k * kSixteenLines + part * kPart;
        if constexpr (P == Products::bfloat16) wgmma_bfloat16<true>(sums[part], registers[k % kSets], right_k);
        else wgmma_float16<true>(sums[part], registers[k % kSets], right_k);
      }
      commit_products();
      if (k == kSets - 1) copy_now();  // elsewhere ptxas gives up on the order of these registers (C7513)
    }
    left_read();
  }
};

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

  KAN_DEVICE PanelPieces() : row(int(threadIdx.x) / 8), column(int(threadIdx.x) % 8 * 8) {
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

template <int kStages> KAN_DEVICE int before_of(int stage) {
  if constexpr ((kStages & (kStages - 1)) == 0) return (stage - 1) & (kStages - 1);
  else return stage > 0 ? stage - 1 : kStages - 1;
}

// Every maker's warp has its part.
constexpr int kKnotsBytes = kMakers / 32 * WarpKnots::kBytes;
KAN_DEVICE QuickKnots* knots_of_warp(char* knots) {
  return reinterpret_cast<QuickKnots*>(knots + (threadIdx.x - kMultipliers) / 32 * WarpKnots::kBytes);
}

// Of the makers' groups the one that the thread belongs to.
KAN_DEVICE int makers_group() { return int(thread_now()) / (kMakers / 2) % 2; }

// Around what a maker writes to `stage`, for the tensor cores, or for the multipliers' threads to load.
KAN_DEVICE void begin_step(int stage) { meet(kReadBarrier + stage + kLeftStages * makers_group(), kHandover); }
template <bool kLoaded = false> KAN_DEVICE void end_step(int stage) {
  if (!kLoaded) show_to_tensor_cores();
  arrive(kMadeBarrier + stage, kHandover);
}

// The steps of a makers' group: of all steps the two groups take turns, for making one may take as long as multiplying two.
template <bool kLoaded = false> struct OwnSteps {
  int stage = first();

  KAN_DEVICE static int first() { return makers_group(); }
  KAN_DEVICE void begin() const { begin_step(stage); }
  KAN_DEVICE void end() {
    end_step<kLoaded>(stage);
    stage = before_of<kLeftStages>(stage);  // two further
  }
};
// Of `steps` steps a group's own: make(stage) writes what the tensor cores will read.
template <bool kLoaded, class Make> KAN_DEVICE void make_own_steps(int steps, Make make) {
  OwnSteps<kLoaded> own;
  KAN_NO_UNROLL
  for (int s = own.first(); s < steps; s += 2) {
    own.begin();
    make(own.stage);
    own.end();
  }
}
// The same for steps that have to be gone through one by one: make(step, stage).
template <bool kLoaded, class Step, class Make> KAN_DEVICE void make_steps(Step step, int group, Make make) {
  const int steps = step.count();
  int stage = 0;
  KAN_NO_UNROLL
  for (int s = 0; s < steps; ++s) {
    if ((s & 1) == group) {
      begin_step(stage);
      make(step, stage);
      end_step<kLoaded>(stage);
    }
    step.advance();
    stage = next_of<kLeftStages>(stage);
  }
}

// How a step's operands come to shared memory: copy(step, stage) by the multipliers' threads, or by the copy engine (cluster_tile.cuh).
template <class Copy> struct CopiedByThreads {
  static constexpr bool kMeet = true;  // what the others have copied is there once all have met
  Copy copy;

  template <class Step> KAN_DEVICE void begin(const Step& step, int stage, bool exists) {
    if (exists) copy(step, stage);
    commit_copies();
  }
  // Until the copies of a step are there, but for those of `kLater` steps that began behind them.
  template <int kLater> KAN_DEVICE void wait(int) {
    wait_for_copies<kLater>();
    show_to_tensor_cores();
  }
  // This warp's products have read the stage.
  KAN_DEVICE void release(int) {}
  KAN_DEVICE void end() { wait_for_copies<0>(); }
};
template <class Copy> CopiedByThreads(Copy) -> CopiedByThreads<Copy>;

// The multipliers' loop. copies: as CopiedByThreads; multiply(is_base, left stage, right stage) begins a step's
// product, with a fence before and a commit behind; with a fourth parameter it calls that once meanwhile,
// which begins further copies, and commits twice; with a fifth one it calls that once the left operand is in registers, and waits for
// products itself. Without makers only the multipliers meet.
//
// kStages: of what is copied. With three a step's product ends before the next one begins, for the copies that begin then are to lie
// where it is read.
template <bool kMade, int kStages = kRightStages, class Step, class Copies, class Multiply>
KAN_DEVICE void multiply_steps(Step coming, Copies& copies, Multiply multiply) {
  constexpr int kAhead = kRightStages - 2;  // steps whose copies are under way
  const int steps = coming.count();
  uint32_t kinds = 0;  // is_base of the steps whose copies have begun, the last one's in bit 0
  int uncopied = steps;
  auto copy_next = [&](int stage) {
    kinds = kinds << 1 | uint32_t(coming.is_base());
    copies.begin(coming, stage, uncopied-- > 0);
    coming.advance();
  };
  for (int s = 0; s < kAhead; ++s) copy_next(s);
  KAN_UNROLL_ALL
  for (int s = 0; kMade && s < kLeftStages; ++s)
    if (s < steps) arrive(kReadBarrier + s + kLeftStages * (s & 1), kHandover);
  int left = 0, before = kLeftStages - 1, right = 0, next = kAhead;
  KAN_NO_UNROLL
  for (int s = 0; s < steps; ++s) {
    // This step's copies are there, and what has been made, for everybody. What the step before last used has been read by both groups.
    copies.template wait<kAhead - 1>(right);
    if (kMade) meet(kMadeBarrier + left, kHandover);
    else if (Copies::kMeet) meet(kTileBarrier, kMultipliers);
    const bool is_base = kinds >> (kAhead - 1) & 1u;
    auto copy_now = [&] { copy_next(next); };
    auto left_read = [&] {
      if (kMade && s + kLeftStages < steps) arrive(kReadBarrier + left + kLeftStages * (~s & 1), kHandover);
    };
    constexpr bool kLoaded = requires { multiply(is_base, left, right, copy_now, left_read); };
    if constexpr (kLoaded) {
      multiply(is_base, left, right, copy_now, left_read);
    } else if constexpr (requires { multiply(is_base, left, right, copy_now); }) {
      multiply(is_base, left, right, copy_now);
      wait_for_products<2>();
    } else {
      multiply(is_base, left, right);
      copy_now();
      wait_for_products<kStages == 3 ? 0 : 1>();
    }
    // The stage of the last product that has been waited for, where the next copies go to it.
    if (uncopied > 0 && (kStages == 3 || s > 0)) copies.release(kStages == 3 ? right : before_of<kStages>(right));
    if (kMade && !kLoaded && s > 0 && s - 1 + kLeftStages < steps) arrive(kReadBarrier + before + kLeftStages * (s & 1), kHandover);
    before = left;
    left = next_of<kLeftStages>(left), right = next_of<kStages>(right), next = next_of<kStages>(next);
  }
  wait_for_products<0>();
  copies.end();
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
