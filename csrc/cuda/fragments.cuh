// The left operand of the wide kernels: from the window of four bases that a thread has evaluated to the numbers that a
// tensor-core instruction wants. Global memory never sees it.
//
// Why the operand is exactly structured-sparse (orders 1, 2, 3; also 0). Take eight bases 8c .. 8c + 7 of one input. The
// non-zero ones are among `shift` .. shift + 3, shift = first - 8c, four neighbours, wherever x lies.
// - 16-bit types, 2 of 4: of four neighbours two are even and two are odd. So of the four even bases (0, 2, 4, 6) at most two
//   are non-zero, neighbours in that list, and so of the odd ones. With the bases reordered to 0 2 4 6 1 3 5 7 each group of
//   four holds at most two non-zero numbers, which is what the instruction asks for. In the list of parity p they stand at
//   (shift + 1 - p) >> 1 and the next place; kept at the list's ends, the pair holds whichever of the two exist.
// - tf32, 1 of 2: j and j + 4 are never both among four neighbours. With the bases in the order 0 4 1 5 2 6 3 7 each pair
//   holds at most one non-zero number: the upper one if j < shift, else the lower one (or none, then 0 is stored).
// No number is dropped and none is rounded otherwise than in the dense form: the products are the same. A test goes through
// all shifts, and through every cell of longer grids.
//
// Only contract_output has this form. In contract_input no operand of the product g W^T is sparse: phi weighs the result, in the
// epilogue. In contract_weight phi is an operand, but the sum runs over the batch: along it the non-zero numbers of a basis
// stand wherever x happens to lie, and nothing bounds them among neighbours.
#pragma once
#include "features.cuh"
#include "launch.h"

namespace kan::cuda {

template <Products P> constexpr bool kIsHalf = P == Products::bfloat16 || P == Products::float16;

template <Products P> KAN_DEVICE uint32_t pack(float low, float high) {
  return P == Products::bfloat16 ? pack_bfloat16(low, high) : pack_float16(low, high);
}

// Four windowed weights of bases first .. first + 3.
struct Item {
  float w[4];
  int first;
};

// A window as it is kept from one chunk to the next: 16-bit types two weights to a word, (0, 1) and (2, 3) or, sparse, (0, 2)
// and (1, 3).
template <Products P> struct Kept {
  uint32_t w[kIsHalf<P> ? 2 : 4];
  int first;
};
template <Products P, bool kSparse> KAN_DEVICE Kept<P> keep(const Item& item) {
  const float(&w)[4] = item.w;
  if constexpr (kIsHalf<P>) return {{pack<P>(w[0], w[kSparse ? 2 : 1]), pack<P>(w[kSparse ? 1 : 2], w[3])}, item.first};
  else return {{as_bits(w[0]), as_bits(w[1]), as_bits(w[2]), as_bits(w[3])}, item.first};
}

// The row of a stage of weights that basis f (0 .. 7) of an input goes to: the order of the operand's columns.
template <bool kSparse, bool kHalf> KAN_INLINE int place_of_basis(int f) {
  if (!kSparse) return f;
  return kHalf ? (f & 1) * 4 + (f >> 1) : (f & 3) * 2 + (f >> 2);
}
template <bool kSparse, bool kHalf> KAN_INLINE int basis_of_place(int place) {
  if (!kSparse) return place;
  return kHalf ? (place & 3) * 2 + (place >> 2) : (place & 1) * 4 + (place >> 1);
}

// 16-bit, dense: words of two neighbouring bases; r[j] = bases 2j, 2j + 1.
template <Products P> KAN_DEVICE void spread_words(const uint32_t (&window)[2], int shift, uint32_t (&r)[4]) {
  // 128 bits in two halves. Of two shifts in opposite directions one is by a negative number, that is by far too many bits.
  const uint64_t w = window[0] | uint64_t(window[1]) << 32;
  const uint32_t bits = uint32_t(shift) * 16u;
  const uint64_t low = shift_left(w, bits) | shift_right(w, 0u - bits), high = shift_left(w, bits - 64u) | shift_right(w, 64u - bits);
  r[0] = uint32_t(low), r[1] = uint32_t(low >> 32), r[2] = uint32_t(high), r[3] = uint32_t(high >> 32);
}

// 16-bit, sparse: where the pair of one parity stands before it is kept within the list, and the word that is stored then.
KAN_INLINE int pair_begin(int shift, int parity) { return (shift + 1 - parity) >> 1; }
KAN_INLINE int kept(int begin) { return begin < 0 ? 0 : begin > 2 ? 2 : begin; }
KAN_INLINE uint32_t kept_word(uint32_t word, int begin) {
  return begin >= 0 && begin <= 2 ? word : begin == -1 ? word >> 16 : begin == 3 ? word << 16 : 0u;
}
// Sparse: the pairs of the even and of the odd bases of a kept window as they are stored.
KAN_DEVICE void sparse_words(const uint32_t (&window)[2], int shift, uint32_t& even_word, uint32_t& odd_word) {
  const bool odd = shift & 1;
  even_word = kept_word(odd ? window[1] : window[0], pair_begin(shift, 0));
  odd_word = kept_word(odd ? window[0] : window[1], pair_begin(shift, 1));
}

// Metadata of both parities of one input: four bits each, places `begin` and the next.
KAN_INLINE uint32_t pair_metadata(int shift) {
  return uint32_t(5 * kept(pair_begin(shift, 0)) + 4) | uint32_t(5 * kept(pair_begin(shift, 1)) + 4) << 4;
}

// tf32: r[j] = the one number among bases j and j + 4 that may be other than zero.
KAN_INLINE void fold_pairs(const float (&w)[4], int shift, float (&r)[4]) {
  const bool one = shift & 1, two = shift & 2;
  const float a0 = one ? w[3] : w[0], a1 = one ? w[0] : w[1], a2 = one ? w[1] : w[2], a3 = one ? w[2] : w[3];
  const float b[4] = {two ? a2 : a0, two ? a3 : a1, two ? a0 : a2, two ? a1 : a3};
  KAN_UNROLL_WINDOW
  for (int j = 0; j < 4; ++j) r[j] = j + 4 >= shift && j - 3 <= shift ? b[j] : 0.0f;
}
KAN_INLINE bool upper_of_pair(int j, int shift) { return j < shift; }
// Metadata of the four pairs of one input: 0b1110 where the upper number is stored, else 0b0100.
KAN_INLINE uint32_t fold_metadata(int shift) {
  const int uppers = shift < 0 ? 0 : shift > 4 ? 4 : shift;
  return 0x4444u | (0xaaaau & ((1u << (4 * uppers)) - 1));
}

}  // namespace kan::cuda
