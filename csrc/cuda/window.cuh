// Four neighbouring inputs of one row at a time: their x, their windows packed into words, their base activations.
#pragma once
#include "wide.cuh"

namespace kan::cuda {

// Every fourth number of x begins at a multiple of what four take.
KAN_DEVICE bool inputs_in_vectors(const Problem& p) { return p.in_features % 4 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0; }

// x of inputs i .. i + 3 of row b as it is stored, zeros outside the problem: unpacked when it is needed, so that nobody waits
// for the load before.
struct FourInputs {
  uint32_t raw[4];  // float32: one to a word; 16-bit types: two, in the first two

  KAN_DEVICE void load(const Problem& p, int64_t b, int64_t i, int64_t end, bool vectors) {
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m) raw[m] = 0;
    if (b >= p.batch || i >= end) return;
    const int64_t at = b * p.in_features + i;
    if (vectors && i + 4 <= end) {
      if (p.x_dtype == kFloat32) {
        const auto from = *reinterpret_cast<const Words<4>*>(static_cast<const float*>(p.x) + at);
        KAN_UNROLL_ALL
        for (int m = 0; m < 4; ++m) raw[m] = from.w[m];
      } else {
        const auto from = *reinterpret_cast<const Words<2>*>(static_cast<const uint16_t*>(p.x) + at);
        raw[0] = from.w[0], raw[1] = from.w[1];
      }
      return;
    }
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m) {
      if (i + m >= end) continue;
      if (p.x_dtype == kFloat32) raw[m] = static_cast<const uint32_t*>(p.x)[at + m];
      else raw[m / 2] |= uint32_t(static_cast<const uint16_t*>(p.x)[at + m]) << (16 * (m % 2));
    }
  }
  KAN_DEVICE void unpack(const Problem& p, float (&x)[4]) const {
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m) {
      if (p.x_dtype == kFloat32) x[m] = as_float(raw[m]);
      else if (p.x_dtype == kBFloat16) x[m] = as_float(m % 2 ? raw[m / 2] & 0xffff0000u : raw[m / 2] << 16);
      else x[m] = from_float16(uint16_t(raw[m / 2] >> (16 * (m % 2))));
    }
  }
};

// Of piece `piece` (16 bytes) of line `line` (128 bytes) of a tile with the 128-byte swizzle.
KAN_DEVICE int swizzled_piece(int line, int piece) { return line * 128 + (piece ^ line % 8) * 16; }

// Items of inputs i .. i + 3 of row b, times scale where there is one: body(m, item). Those of rows and inputs outside the problem
// are finite.
template <class Body>
KAN_DEVICE void for_four_items(const WideArguments& a, int64_t b, int64_t i, int64_t end, const float (&x)[4], const void* scale, Body body) {
  Even d[4];
  bool even = a.continuous;
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) {
    d[m] = even_knots(a.described[i + m < end ? i + m : end - 1]);
    even = even & (d[m].inverse_h > 0);
  }
  if (even) {
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m) body(m, even_window(a, d[m], x[m], scale != nullptr ? load_point(a.p, b, i + m).scale : 1.0f));
    return;
  }
  KAN_NO_UNROLL
  for (int m = 0; m < 4; ++m) {
    Point point = load_point(a.p, b, i + m);
    if (scale == nullptr) point.scale = 1;
    body(m, item_at(a, b, i + m < end ? i + m : a.p.in_features, point));
  }
}

template <Products P, bool kSparse>
KAN_DEVICE void make_items(const WideArguments& a, int64_t b, int64_t i, int64_t end, const float (&x)[4], Kept<P> (&items)[4]) {
  for_four_items(a, b, i, end, x, a.p.scale, [&](int m, const Item& item) {
    const Kept<P> made = keep<P, kSparse>(item);
    KAN_UNROLL_ALL
    for (int r = 0; r < 4; ++r)
      if (r == m) items[r] = made;  // an array indexed at run time would leave the registers
  });
}

// Dense: the window among eight bases, two neighbouring ones to a word; r[j] = bases 2 j, 2 j + 1. In place of a comparison for every
// base the window is turned by bytes, which puts it right wherever it exists, and the rest is masked.
KAN_DEVICE void spread_window(const uint32_t (&window)[2], int shift, uint32_t (&r)[4]) {
  const uint32_t turn = (0x3210u + 0x2222u * (uint32_t(-shift) & 3u)) & 0x7777u;
  const uint32_t even = permute_bytes(window[0], window[1], turn), odd = permute_bytes(window[0], window[1], turn ^ 0x4444u);
  // Bit f + 4: basis f is in the window. Four such bits times this constant are the highest bits of four bytes.
  const uint32_t there = shift_word_left(15u, shift + 4);
  const uint32_t low = (there >> 4 & 15u) * 0x10204080u, high = (there >> 8 & 15u) * 0x10204080u;
  // Two bytes filled with the highest bit of one, two with that of the next.
  r[0] = even & permute_bytes(low, 0, 0x9988u);
  r[1] = odd & permute_bytes(low, 0, 0xbbaau);
  r[2] = even & permute_bytes(high, 0, 0x9988u);
  r[3] = odd & permute_bytes(high, 0, 0xbbaau);
}

// A window that lies within the eight bases, its first one at `shift` = 0 .. 4: then one mask tells which of the turned window's
// four weights belong to the first four bases, and the others belong to the last four.
KAN_DEVICE void spread_inside(uint32_t low, uint32_t high, int shift, uint32_t (&r)[4]) {
  const uint32_t turn = (0xba98u - 0x2222u * uint32_t(shift)) & 0x7777u;
  const uint32_t even = permute_bytes(low, high, turn), odd = permute_bytes(low, high, turn ^ 0x4444u);
  const int bits = 16 * shift, more = bits - 32;
  r[0] = even & shift_word_left(~0u, bits);
  r[1] = odd & shift_word_left(~0u, more > 0 ? more : 0);
  r[2] = even ^ r[0];
  r[3] = odd ^ r[1];
}

// Plain values on even knots; where it holds, `write_quick_windows` serves x within the grid.
KAN_DEVICE bool quick_windows(const WideArguments& a) { return a.continuous && a.p.n == 0 && a.p.scale == nullptr; }

// Items of inputs i .. i + 3 of a row, dense, all bases in one step, to pieces `piece` .. of line `line` of a tile; false, and nothing
// written, where one of them needs the general way. 40 instructions an item, in place of 80.
template <Products P>
KAN_DEVICE bool write_quick_windows(const WideArguments& a, int i, int end, const float (&x)[4], char* tile, int line, int piece) {
  if (i + 4 > end) return false;
  // Intervals 0 .. 4 of the range, as even_interval counts them; an x that rounding puts beyond its ends is kept in the last one.
  const int last = a.p.grid_size - 1;
  const float lowest = kToNearest + float(a.p.spline_order - middle_interval(a.p.knots()));
  const float highest = lowest + float(last < 4 ? last : 4);
  uint32_t low[4], high[4];
  int shift[4];
  bool inside = true;
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) {
    const Even d = even_knots(a.described[i + m]);
    const float from_middle = x[m] - d.middle, place = fminf(fmaxf(from_middle * d.inverse_h + kToNearest, lowest), highest);
    const float v = from_middle * d.inverse_h - (place - kToNearest);
    shift[m] = int(as_bits(place) - as_bits(lowest));
    inside = inside & (fabsf(v) <= 0.5f + 3.8e-6f) & (d.inverse_h > 0);  // NaN is not
    float w[4];
    KAN_UNROLL_ALL
    for (int q = 0; q < 4; ++q) {
      const float* c = a.centred[q].c;
      w[q] = ((c[3] * v + c[2]) * v + c[1]) * v + c[0];
    }
    low[m] = pack<P>(w[0], w[1]), high[m] = pack<P>(w[2], w[3]);
  }
  if (!inside) return false;
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) {
    uint32_t words[4];
    spread_inside(low[m], high[m], shift[m], words);
    store_16_bytes(tile + swizzled_piece(line, piece + m), words);
  }
  return true;
}

// The general way, of eight bases from `first_base` on.
template <Products P>
KAN_DEVICE void write_windows(const Kept<P> (&items)[4], int first_base, char* tile, int line, int piece) {
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) {
    uint32_t words[4];
    spread_window(items[m].w, items[m].first - first_base, words);
    store_16_bytes(tile + swizzled_piece(line, piece + m), words);
  }
}

// Base activations, or their derivatives, at four x.
KAN_DEVICE void activate_four(const Activation<float>& a, const float (&x)[4], float (&value)[4]) {
  if (a.kind == kSilu && a.n < 2) {
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m) value[m] = a.n == 0 ? silu<0>(x[m]) : silu<1>(x[m]);
    return;
  }
  KAN_NO_UNROLL
  for (int m = 0; m < 4; ++m) {
    float one = 0;
    KAN_UNROLL_ALL
    for (int r = 0; r < 4; ++r) one = r == m ? x[r] : one;
    one = activate(a, one);
    KAN_UNROLL_ALL
    for (int r = 0; r < 4; ++r) value[r] = r == m ? one : value[r];
  }
}

// Of inputs i .. i + 3 of row b, times scale, two to a word; finite outside the problem.
template <Products P>
KAN_DEVICE void base_features(const WideArguments& a, int64_t b, int64_t i, const float (&x)[4], uint32_t* words) {
  const Problem& p = a.p;
  float value[4];
  activate_four(a.activation, x, value);
  if (p.scale != nullptr)
    for (int m = 0; m < 4; ++m) value[m] *= load_point(p, b, i + m).scale;
  KAN_UNROLL_ALL
  for (int m = 0; m < 2; ++m) words[m] = pack<P>(value[2 * m], value[2 * m + 1]);
}

}  // namespace kan::cuda
