// The quick way of the warpgroups' makers: plain values on even knots. Eight neighbouring inputs of a row at a time, whose chains of
// instructions mix: a maker's warp has few others beside it that could hide a wait.
#pragma once
#include "window.cuh"

namespace kan::cuda {

constexpr int kQuickInputs = 8;

// An input's knots: inverse_h x + offset is the place of x, counted from the middle interval. NaN in `offset` says that they are not even.
struct QuickKnots {
  float inverse_h, offset;
};

// The knots of the 64 inputs that a warp is at, in shared memory of its own; those of the next 64 are on their way.
class WarpKnots {
 public:
  static constexpr int kInputs = 64, kBytes = kInputs * sizeof(QuickKnots);

  KAN_DEVICE explicit WarpKnots(QuickKnots* memory) : here(pointer_now(memory)) {}
  KAN_DEVICE void load(const WideArguments& a, int first) {
    KAN_UNROLL_ALL
    for (int m = 0; m < 2; ++m) {
      const int i = first + int(thread_now()) % 32 + 32 * m;
      const Described<float>& d = a.described[i < int(a.p.in_features) ? i : 0];
      inverse_h[m] = d.inverse_h, middle[m] = d.middle;
    }
  }
  KAN_DEVICE void arrive() {
    warp_barrier();
    KAN_UNROLL_ALL
    for (int m = 0; m < 2; ++m) {
      const uint32_t offset = inverse_h[m] > 0 ? as_bits(-middle[m] * inverse_h[m]) : 0x7fffffffu;
      store_8_bytes(here + thread_now() % 32 + 32 * m, {as_bits(inverse_h[m]), offset});
    }
    warp_barrier();
  }
  // Of inputs `at` and the next one.
  KAN_DEVICE void read(int at, QuickKnots (&two)[2]) const {
    uint32_t words[4];
    load_16_bytes(words, here + at);
    two[0] = {as_float(words[0]), as_float(words[1])}, two[1] = {as_float(words[2]), as_float(words[3])};
  }

 private:
  QuickKnots* here;
  float inverse_h[2], middle[2];
};

// Of number(0) .. number(7), in pairs: no chain of eight.
template <class Number> KAN_DEVICE uint32_t largest(Number number) {
  uint32_t best[kQuickInputs];
  KAN_UNROLL_ALL
  for (int m = 0; m < kQuickInputs; ++m) best[m] = number(m);
  KAN_UNROLL_ALL
  for (int count = kQuickInputs / 2; count > 0; count /= 2)
    KAN_UNROLL_ALL
    for (int m = 0; m < count; ++m) best[m] = best[m] > best[m + count] ? best[m] : best[m + count];
  return best[0];
}

// Where x lies within its interval, counted from its middle; shift: 8 times the first basis of its window, counted from `first` / 8.
KAN_DEVICE float quick_place(const WideArguments& a, const QuickKnots& knots, float x, uint32_t first, uint32_t& shift) {
  const float place = held(x * knots.inverse_h + knots.offset, a.quick.lowest, a.quick.highest), whole = place + kToNearest;
  const float v = place - (whole - kToNearest);
  shift = as_bits(whole) * 8 - first;
  return v;
}
// A window's four weights there.
KAN_DEVICE void quick_weights(const WideArguments& a, float v, float (&w)[4]) {
  KAN_UNROLL_ALL
  for (int q = 0; q < 4; ++q) {
    const float* c = a.centred[q].c;
    w[q] = ((c[3] * v + c[2]) * v + c[1]) * v + c[0];
  }
}

// The windows of eight inputs of a row.
template <Products P> struct QuickWindows {
  uint32_t low[kQuickInputs], high[kQuickInputs];  // weights 0, 1 and 2, 3
  uint32_t shift[kQuickInputs], farthest;          // 8 times the window's first basis, counted from a first one

  // Of inputs `at` and further, counted from first_base. kMirrored: where a.quick.mirrored; three multiply-adds in four then do.
  template <bool kMirrored>
  KAN_DEVICE void evaluate(const WideArguments& a, const WarpKnots& knots, int at, const float (&x)[kQuickInputs], int first_base) {
    const uint32_t first = a.quick.first + 8 * uint32_t(first_base);
    KAN_UNROLL_ALL
    for (int m = 0; m < kQuickInputs; m += 2) {
      QuickKnots two[2];
      knots.read(at + m, two);
      KAN_UNROLL_ALL
      for (int r = m; r < m + 2; ++r) {
        const float v = quick_place(a, two[r - m], x[r], first, shift[r]);
        float w[4];
        if constexpr (kMirrored) {
          const float square = v * v;
          KAN_UNROLL_ALL
          for (int q = 2; q < 4; ++q) {
            const float* c = a.centred[q].c;
            const float even = c[2] * square + c[0], odd = c[3] * square + c[1];
            w[q] = odd * v + even, w[3 - q] = odd * -v + even;
          }
        } else {
          quick_weights(a, v, w);
        }
        low[r] = pack<P>(w[0], w[1]), high[r] = pack<P>(w[2], w[3]);
      }
    }
    farthest = largest([&](int m) { return shift[m]; });
  }

  // To the pieces of a line of a tile: `start` is where its piece number 0 lies, the pieces' places differ as their numbers do. False, and
  // nothing is written, where an item needs the general way: NaN, uneven knots, x beyond the range where that is extended.
  KAN_DEVICE bool write(const WideArguments& a, int first_base, char* start) const {
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
    // NaN is farther than all.
    if (largest([&](int m) { return shift[m] + 8 * uint32_t(first_base) - a.quick.least; }) > a.quick.span) return false;
    KAN_UNROLL_ALL
    for (int m = 0; m < kQuickInputs; ++m) {
      auto shifted = [&](int by) { return zeros ^ (shift_word_left(kWindow ^ zeros, by) | shift_word_right(kWindow ^ zeros, -by)); };
      store(m, shifted(int(shift[m])), shifted(int(shift[m]) - 32));
    }
    return true;
  }
};

}  // namespace kan::cuda
