// What the warpgroup kernels of float32 share: items in halves, and the copies of lines. A step is 32 deep (split.h): a line of the
// left operand has the 32 upper halves and then the 32 lower ones, or the first 32 lines are upper and the others lower ones.
#pragma once
#include "split.cuh"
#include "warpgroup_tile.cuh"

namespace kan::cuda {

constexpr int kSplitInputs = kSplitDepth / kStepBases;  // of a step
// A tile is 128 columns wide: a thread's sums twice are as many registers as those of 256 are once.
constexpr int kSplitColumns = 128, kSplitMultipliersRegisters = kMultipliersRegisters<256>,
              kSplitMakersRegisters = kMakersRegisters<256>;

// A ring of stages, which have both operands of a step, the left one first; makers copy the right one. One stage is multiplied,
// each group of makers has one; the others are in hand for whoever is late.
constexpr int kRing = 6, kRingStageBytes = kLeftBytes + kRightBytes<kSplitColumns>, kRingBytes = kRing * kRingStageBytes;
constexpr int kRingMade = 1, kRingRead = kRingMade + kRing, kRingTile = kRingRead + kRing, kRingEverybody = kRingTile + 1;
constexpr size_t kSplitShared = kAtomBytes + kRingBytes + kKnotsBytes;

KAN_DEVICE int next_in_ring(int stage, int by) { return stage + by < kRing ? stage + by : stage + by - kRing; }

// A makers' group's loop: of `steps` steps the two groups take turns. make(stage) begins the copies of the right operand and writes
// the left one.
template <class Make> KAN_DEVICE void make_ring(int steps, Make make) {
  int s = makers_group(), stage = s;
  KAN_NO_UNROLL
  for (; s < steps; s += 2) {
    if (s >= kRing) meet(kRingRead + stage, kHandover);
    make(stage);
    wait_for_copies<0>();
    show_to_tensor_cores();
    arrive(kRingMade + stage, kHandover);
    stage = next_in_ring(stage, 2);
  }
}

// Tensor cores cut sums off in place of rounding them: what is lost always makes them smaller, and adds up (of 768 products one
// after the other 1.4e-5 of the sum on an H200). So they sum up two steps, and what comes out is added to the sums proper; four
// steps are no faster, and twice as far off.
struct SplitSums {
  GroupSums<kSplitColumns> sums = {}, part;

  // left, right: 64 lines or pieces deep, upper halves first. Three products of 32.
  template <bool kLeftByLines, bool kRightByLines> KAN_DEVICE void multiply(const char* left, const char* right, bool kept) {
    const uint64_t a = describe_tile(left), b = describe_tile(right);
    constexpr int kLefts[] = {0, 1, 2, 3, 0, 1}, kRights[] = {2, 3, 0, 1, 0, 1};
    order_registers();
    KAN_UNROLL_ALL
    for (int k = 0; k < 6; ++k)
      wgmma_float16<kLeftByLines, kRightByLines>(part[0], a + kLefts[k] * (kLeftByLines ? kSixteenLines : kSixteenInLine),
                                                 b + kRights[k] * (kRightByLines ? kSixteenLines : kSixteenInLine), kept || k > 0);
    commit_products();
  }
  KAN_DEVICE void collect() {
    KAN_UNROLL_ALL
    for (int m = 0; m < 64; ++m) sums[0][m] += part[0][m];
  }

  // The multipliers' loop, two steps at a time: where registers of products under way meet those of another path, nvcc waits for
  // them. left(stage): where the rows of this warpgroup begin.
  template <bool kLeftByLines, bool kRightByLines, class Left> KAN_DEVICE void add_ring(int steps, const char* stages, Left left) {
    int stage = 0;
    auto begin = [&](int at, bool kept) {
      meet(kRingMade + at, kHandover);
      multiply<kLeftByLines, kRightByLines>(left(at), stages + at * kRingStageBytes + kLeftBytes, kept);
    };
    int s = 0;
    KAN_NO_UNROLL
    for (; s + 1 < steps; s += 2) {
      const int second = next_in_ring(stage, 1);
      begin(stage, false);
      begin(second, true);
      wait_for_products<0>();
      if (s + kRing < steps) arrive(kRingRead + stage, kHandover);
      if (s + 1 + kRing < steps) arrive(kRingRead + second, kHandover);
      collect();
      stage = next_in_ring(stage, 2);
    }
    if (s == steps) return;
    begin(stage, false);
    wait_for_products<0>();
    collect();
  }
};

// A window times `scale`, of eight bases from first_base on: 16 bytes of upper halves and 16 of lower ones.
KAN_DEVICE void write_split(const Item& item, float scale, int first_base, char* upper, char* lower) {
  float w[4];
  KAN_UNROLL_ALL
  for (int q = 0; q < 4; ++q) w[q] = item.w[q] * scale;
  uint32_t halves[2][2], words[4];
  split_all(w, halves[0], halves[1]);
  KAN_UNROLL_ALL
  for (int half = 0; half < 2; ++half) {
    spread_window(halves[half], item.first - first_base, words);
    store_16_bytes(half == 0 ? upper : lower, words);
  }
}

// Inputs i .. i + 3 of row b, one by one. Their x is read again: whoever tried a quicker way before needs not keep it. upper(m),
// lower(m): where the halves of input i + m go.
template <class Upper, class Lower>
KAN_DEVICE void write_general_split(const WideArguments& a, int64_t b, int i, float scale, int first_base, Upper upper,
                                    Lower lower) {
  KAN_NO_UNROLL
  for (int m = 0; m < kSplitInputs; ++m)
    write_split(item_at(a, b, i + m, load_point(a.p, b, i + m)), scale, first_base, upper(m), lower(m));
}

// Base activations of four inputs, times scale(m).
template <class Scale>
KAN_DEVICE void write_split_base(const WideArguments& a, float (&x)[4], Scale scale, char* upper, char* lower) {
  activate_all(a.activation, x);
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) x[m] *= scale(m);
  uint32_t halves[2][2];
  split_all(x, halves[0], halves[1]);
  store_8_bytes(upper, halves[0]);
  store_8_bytes(lower, halves[1]);
}

// A makers' group begins the copies of a step's right operand, 32 lines of upper halves and 32 of lower ones: a thread 8 columns of
// every eighth line. row: of halves, that of its first line; the next ones are `distance` numbers further each, and
// have the numbers `index`, then `next` further and so on: from `end` on they are zeros.
struct HalvesCopies {
  int line, place, left;
  int64_t column;

  KAN_DEVICE HalvesCopies(int64_t pitch, int64_t o0) {
    constexpr int kPieces = kSplitColumns / 8;
    static_assert(kMakers / 2 / kPieces == 8);
    const int thread = int(thread_now()) % (kMakers / 2), in_tile = thread % kPieces * 8;
    line = thread / kPieces;
    place = in_tile / kLineNumbers * kPanelBytes + swizzled(line, in_tile % kLineNumbers);
    column = split_place(o0 + in_tile);
    left = column < pitch ? 8 : 0;
  }
  KAN_DEVICE void copy(char* right, const Float16* row, int64_t distance, int index, int next, int end) const {
    constexpr int kCount = kSplitDepth / 8;
    Float16* to = reinterpret_cast<Float16*>(right + place);
    copy_rows<kCount>(to, 8 * kLineNumbers, row + column, distance, left, index, next, end, true);
    copy_rows<kCount>(to + kSplitDepth * kLineNumbers, 8 * kLineNumbers, row + column + kSplitDepth, distance, left, index, next,
                      end, true);
    commit_copies();
  }
};

// The quick way, as quick.cuh's for 16-bit types: of four inputs. Upper halves are cut off, so that the lower one of the window's
// second weight, whose sign fills the zeros, is not below 0 either.
KAN_DEVICE bool write_quick_split(const WideArguments& a, const WarpKnots& knots, int at, const float (&x)[kSplitInputs],
                                  float scale, int first_base, char* upper, char* lower) {
  uint32_t words[kSplitInputs][2][2], shift[kSplitInputs];
  const uint32_t first = a.quick.first + 8 * uint32_t(first_base);
  KAN_UNROLL_ALL
  for (int m = 0; m < kSplitInputs; m += 2) {
    QuickKnots two[2];
    knots.read(at + m, two);
    KAN_UNROLL_ALL
    for (int r = m; r < m + 2; ++r) {
      float w[4];
      quick_weights(a, quick_place(a, two[r - m], x[r], first, shift[r]), w);
      KAN_UNROLL_ALL
      for (int half = 0; half < 2; ++half)
        cut_pair(w[2 * half] * scale, w[2 * half + 1] * scale, words[r][0][half], words[r][1][half]);
    }
  }
  // NaN is farther than all.
  uint32_t farthest = 0;
  KAN_UNROLL_ALL
  for (int m = 0; m < kSplitInputs; ++m) {
    const uint32_t from_least = shift[m] + 8 * uint32_t(first_base) - a.quick.least;
    farthest = farthest > from_least ? farthest : from_least;
  }
  if (farthest > a.quick.span) return false;
  constexpr uint32_t kWindow = 0x76543210u;
  const uint32_t zeros = a.quick.zeros;
  KAN_UNROLL_ALL
  for (int m = 0; m < kSplitInputs; ++m) {
    auto shifted = [&](int by) { return zeros ^ (shift_word_left(kWindow ^ zeros, by) | shift_word_right(kWindow ^ zeros, -by)); };
    const uint32_t chosen[2] = {shifted(int(shift[m])), shifted(int(shift[m]) - 32)};
    KAN_UNROLL_ALL
    for (int half = 0; half < 2; ++half) {
      uint32_t bases[4];
      KAN_UNROLL_ALL
      for (int n = 0; n < 4; ++n) bases[n] = permute_bytes(words[m][half][0], words[m][half][1], chosen[n / 2] >> (16 * (n % 2)));
      store_16_bytes(half == 0 ? upper : lower, bases, m * 16);
    }
  }
  return true;
}

}  // namespace kan::cuda
