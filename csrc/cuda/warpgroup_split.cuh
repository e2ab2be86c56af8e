// What the warpgroup kernels of float32 share: items in halves, and the copies of lines. A step is 32 deep (split.h): a line of the
// left operand has the 32 upper halves and then the 32 lower ones, or the first 32 lines are upper and the others lower ones.
#pragma once
#include "split.cuh"
#include "warpgroup_tile.cuh"

namespace kan::cuda {

constexpr int kSplitInputs = kSplitDepth / kStepBases;  // of a step
// A tile is 128 columns wide: a thread's sums twice are as many registers as those of 256 are once.
constexpr int kSplitColumns = 128, kSplitMultipliersRegisters = kMultipliersRegisters<256>, kSplitMakersRegisters = kMakersRegisters<256>;
constexpr size_t kSplitShared = kAtomBytes + kRightStages * kRightBytes<kSplitColumns> + kLeftStages * kLeftBytes;

// Tensor cores cut sums off in place of rounding them: what is lost always makes them smaller, and adds up (of 768 products one after
// the other 1.4e-5 of the sum on an H200). So they sum up so many steps, and what comes out is added to the sums proper.
constexpr int kSplitTogether = 2;
struct SplitSums {
  static constexpr int kTogether = kSplitTogether;
  GroupSums<kSplitColumns> sums = {}, part;

  template <bool kLeftByLines, bool kRightByLines> KAN_DEVICE void multiply(const char* left, const char* right, int step) {
    order_registers();
    multiply_group<Products::float16x3, kLeftByLines, kRightByLines>(part, left, right, step % kSplitTogether != 0);
    commit_products();
  }
  KAN_DEVICE void collect() {
    KAN_UNROLL_ALL
    for (int m = 0; m < 64; ++m) sums[0][m] += part[0][m];
  }
};

// body(m, window) for inputs i .. i + 3 of row b, m = 0 .. 3. Windows of rows and inputs outside the problem are finite.
template <class Body> KAN_DEVICE void for_four_windows(const WideArguments& a, int64_t b, int64_t i, int64_t end, const float (&x)[4], Body body) {
  Even d[4];
  bool even = a.continuous;
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) {
    d[m] = even_knots(a.described[i + m < end ? i + m : end - 1]);
    even = even & (d[m].inverse_h > 0);
  }
  if (even) {
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m) body(m, even_window(a, d[m], x[m], 1.0f));
    return;
  }
  KAN_NO_UNROLL
  for (int m = 0; m < 4; ++m) body(m, item_at(a, b, i + m < end ? i + m : a.p.in_features, load_point(a.p, b, i + m)));
}

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

// Base activations of four inputs, times scale(m).
template <class Scale> KAN_DEVICE void write_split_base(const WideArguments& a, float (&x)[4], Scale scale, char* upper, char* lower) {
  activate_all(a.activation, x);
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) x[m] *= scale(m);
  uint32_t halves[2][2];
  split_all(x, halves[0], halves[1]);
  store_8_bytes(upper, halves[0]);
  store_8_bytes(lower, halves[1]);
}

// One thread's pieces of a step's right operand: 8 columns of every kRows-th of 64 lines, 32 of upper halves and 32 of lower ones.
struct LineCopies {
  static constexpr int kPieces = kSplitColumns / 8, kRows = kMultipliers / kPieces;
  int place, left;

  KAN_DEVICE static int line() { return int(threadIdx.x) / kPieces; }
  // Of a row of halves, where this thread's columns begin.
  KAN_DEVICE static int64_t column(int64_t o0) { return split_place(o0 + int(threadIdx.x) % kPieces * 8); }
  KAN_DEVICE LineCopies(int64_t pitch, int64_t o0) {
    const int in_tile = int(threadIdx.x) % kPieces * 8;
    place = in_tile / kLineNumbers * kPanelBytes + swizzled(line(), in_tile % kLineNumbers);
    left = column(o0) < pitch ? 8 : 0;
  }
  // from: at those columns of the first row; the next ones are `distance` numbers apart, and number `index`, then `next` further and so
  // on: those from `end` on are zeros.
  KAN_DEVICE void copy(char* stage, const Float16* from, int64_t distance, int index, int next, int end) const {
    constexpr int kCount = kSplitDepth / kRows, kStep = kRows * kLineNumbers;
    Float16* to = reinterpret_cast<Float16*>(stage + place);
    copy_rows<kCount>(to, kStep, from, distance, left, index, next, end, true);
    copy_rows<kCount>(to + kCount * kStep, kStep, from + kSplitDepth, distance, left, index, next, end, true);
  }
};

}  // namespace kan::cuda
