// Neighbouring inputs of one row at a time: their x, their windows packed into words, their base activations.
#pragma once
#include "warpgroup.cuh"
#include "wide.cuh"

namespace kan::cuda {

// Every `count`-th number of x begins at a multiple of what so many take, or of 16 bytes.
KAN_DEVICE bool inputs_in_vectors(const Problem& p, int count) {
  return p.in_features % count == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
}
// x of input i of row b and those behind it, below `end`; zeros outside the problem.
template <int kCount>
KAN_DEVICE void load_inputs(Stored<kCount>& to, const Problem& p, int64_t b, int64_t i, int64_t end, bool vectors) {
  const int64_t left = b < p.batch ? end - i : 0;
  to.load(rows_from(p, p.x, b), p.x_dtype, int(i), int(left < kCount ? left : kCount), vectors);
}

// Of piece `piece` (16 bytes) of line `line` (128 bytes) of a tile with the 128-byte swizzle.
KAN_DEVICE int swizzled_piece(int line, int piece) { return line * 128 + (piece ^ line % 8) * 16; }

// body(m, window) for inputs i .. i + 3 of row b, m = 0 .. 3; scale(m) where knots are even. Windows of rows and inputs outside the
// problem are finite.
template <class Scale, class Body>
KAN_DEVICE void for_four_windows(const WideArguments& a, int64_t b, int64_t i, int64_t end, const float (&x)[4], Scale scale, Body body) {
  Even d[4];
  bool even = a.continuous;
  KAN_UNROLL_ALL
  for (int m = 0; m < 4; ++m) {
    d[m] = even_knots(a.described[i + m < end ? i + m : end - 1]);
    even = even & (d[m].inverse_h > 0);
  }
  if (even) {
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m) body(m, even_window(a, d[m], x[m], scale(m)));
    return;
  }
  KAN_NO_UNROLL
  for (int m = 0; m < 4; ++m) body(m, item_at(a, b, i + m < end ? i + m : a.p.in_features, load_point(a.p, b, i + m)));
}

// Items of inputs i .. i + 3 of row b, times scale where there is one.
template <Products P, bool kSparse>
KAN_DEVICE void make_items(const WideArguments& a, int64_t b, int64_t i, int64_t end, const float (&x)[4], Kept<P> (&items)[4]) {
  const bool scaled = a.p.scale != nullptr;
  auto scale = [&](int m) { return scaled ? load_point(a.p, b, i + m).scale : 1.0f; };
  for_four_windows(a, b, i, end, x, scale, [&](int m, const Item& item) {
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

// Of inputs i .. i + 7 of row b, one by one. Their x is read again: whoever tried a quicker way before needs not keep it.
template <Products P> KAN_DEVICE void write_general_windows(const WideArguments& a, int64_t b, int64_t i, int first_base, char* tile, int line) {
  KAN_NO_UNROLL
  for (int m = 0; m < 8; ++m) {
    const Kept<P> kept = keep<P, false>(item_at(a, b, i + m, load_point(a.p, b, i + m)));
    uint32_t words[4];
    spread_window(kept.w, kept.first - first_base, words);
    store_16_bytes(tile + swizzled_piece(line, m), words);
  }
}

template <Products P, int kCount> KAN_DEVICE void pack_all(const float (&value)[kCount], uint32_t (&words)[kCount / 2]) {
  KAN_UNROLL_ALL
  for (int m = 0; m < kCount / 2; ++m) words[m] = pack<P>(value[2 * m], value[2 * m + 1]);
}

// silu, two to a word.
template <Products P, int kCount> KAN_DEVICE void silu_features(const float (&x)[kCount], uint32_t (&words)[kCount / 2]) {
  float value[kCount];
  KAN_UNROLL_ALL
  for (int m = 0; m < kCount; ++m) value[m] = silu<0>(x[m]);
  pack_all<P>(value, words);
}

// Base activations, or their derivatives, of row b's inputs i and behind it, two to a word; finite outside the problem. kScaled: times
// scale where there is one; else b and i are not read.
template <Products P, bool kScaled, int kCount>
KAN_DEVICE void base_features(const WideArguments& a, int64_t b, int64_t i, const float (&x)[kCount], uint32_t (&words)[kCount / 2]) {
  const Problem& p = a.p;
  float value[kCount];
  KAN_UNROLL_ALL
  for (int m = 0; m < kCount; ++m) value[m] = x[m];
  activate_all(a.activation, value);
  if (kScaled && p.scale != nullptr)
    for (int m = 0; m < kCount; ++m) value[m] *= load_point(p, b, i + m).scale;
  pack_all<P>(value, words);
}

}  // namespace kan::cuda
