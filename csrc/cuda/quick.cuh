// The quick way of the warpgroups' makers: plain values on even knots. Eight neighbouring inputs of a row at a time, whose chains of instructions mix: a maker's warp has few others beside it that could hide a wait.
#pragma once
#include "window.cuh"

namespace kan::cuda {

constexpr int kQuickInputs = 8;

// An input's knots; NaN in `middle` says that they are not even.
struct QuickKnots {
  float inverse_h, middle;
};

// The knots of the 64 inputs that a warp is at, in shared memory of its own; those of the next 64 are on their way.
struct WarpKnots {
  static constexpr int kInputs = 64, kBytes = kInputs * sizeof(QuickKnots);
  QuickKnots* here;
  QuickKnots coming[2];

  KAN_DEVICE void load(const WideArguments& a, int first) {
    KAN_UNROLL_ALL
    for (int m = 0; m < 2; ++m) {
      const int i = first + int(thread_now()) % 32 + 32 * m;
      const Described<float>& d = a.described[i < int(a.p.in_features) ? i : 0];
      coming[m] = {d.inverse_h, d.middle};
    }
  }
  KAN_DEVICE void arrive() {
    warp_barrier();
    KAN_UNROLL_ALL
    for (int m = 0; m < 2; ++m) {
      const float none = as_float(0x7fffffffu);
      here[thread_now() % 32 + 32 * m] = {coming[m].inverse_h, coming[m].inverse_h > 0 ? coming[m].middle : none};
    }
    warp_barrier();
  }
};

// Items of eight inputs, eight bases each from `first_base` on, to the pieces of a line of a tile: `start` is where its piece number 0 lies, the pieces' places differ as
// their numbers do. False, and nothing is written, where one needs the general way: NaN, uneven knots, x beyond the range where that
// is extended.
template <Products P>
KAN_DEVICE bool write_quick_windows(const WideArguments& a, const QuickKnots* knots, const float (&x)[kQuickInputs], int first_base, char* start) {
  uint32_t low[kQuickInputs], high[kQuickInputs];
  uint32_t shift[kQuickInputs], farthest = 0;  // 8 times the window's first basis, counted from first_base
  const uint32_t first = a.quick.first + 8 * uint32_t(first_base);
  KAN_UNROLL_ALL
  for (int m = 0; m < kQuickInputs; m += 2) {
    const auto two = *reinterpret_cast<const Words<4>*>(knots + m);
    KAN_UNROLL_ALL
    for (int r = m; r < m + 2; ++r) {
      const float inverse_h = as_float(two.w[r % 2 * 2]), middle = as_float(two.w[r % 2 * 2 + 1]);
      const float place = held((x[r] - middle) * inverse_h, a.quick.lowest, a.quick.highest), whole = place + kToNearest;
      const float v = place - (whole - kToNearest);
      shift[r] = as_bits(whole) * 8 - first;
      farthest = farthest > shift[r] ? farthest : shift[r];
      float w[4];
      KAN_UNROLL_ALL
      for (int q = 0; q < 4; ++q) {
        const float* c = a.centred[q].c;
        w[q] = ((c[3] * v + c[2]) * v + c[1]) * v + c[0];
      }
      low[r] = pack<P>(w[0], w[1]), high[r] = pack<P>(w[2], w[3]);
    }
  }
  // Which byte of the window, or none, each byte of eight bases is: digits, shifted as the window is.
  constexpr uint32_t kWindow = 0x76543210u;
  const uint32_t zeros = a.quick.zeros;
  auto store = [&](int m, uint32_t lower, uint32_t upper) {
    const uint32_t words[4] = {permute_bytes(low[m], high[m], lower), permute_bytes(low[m], high[m], lower >> 16),
                               permute_bytes(low[m], high[m], upper), permute_bytes(low[m], high[m], upper >> 16)};
    store_16_bytes(start, words, m * 16);
  };
  if (farthest < a.quick.whole) {
    KAN_UNROLL_ALL
    for (int m = 0; m < kQuickInputs; ++m) store(m, shift_words_left(zeros, kWindow, shift[m]), shift_words_left(kWindow, zeros, shift[m]));
    return true;
  }
  farthest = 0;
  KAN_UNROLL_ALL
  for (int m = 0; m < kQuickInputs; ++m) {
    const uint32_t from_least = shift[m] + 8 * uint32_t(first_base) - a.quick.least;
    farthest = farthest > from_least ? farthest : from_least;
  }
  if (farthest > a.quick.span) return false;  // NaN is farther than all
  KAN_UNROLL_ALL
  for (int m = 0; m < kQuickInputs; ++m) {
    auto shifted = [&](int by) { return zeros ^ (shift_word_left(kWindow ^ zeros, by) | shift_word_right(kWindow ^ zeros, -by)); };
    store(m, shifted(int(shift[m])), shifted(int(shift[m]) - 32));
  }
  return true;
}

}  // namespace kan::cuda
