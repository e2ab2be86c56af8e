// Is the sparse form of a window exact? Every shift of a window of four within and beyond eight bases is spread out by the
// functions of csrc/cuda/fragments.cuh, and read back as the instruction reads it.
#include "emulation.h"

#include "cuda/fragments.cuh"

using namespace kan::cuda;

namespace {

// Column k of a group that is stored in part: which stored number the metadata gives it, or -1.
int stored_of_four(uint32_t bits, int k) { return k == int(bits & 3) ? 0 : k == int(bits >> 2 & 3) ? 1 : -1; }

int check(int shift) {
  const float w[4] = {1, 2, 3, 4};
  float row[8];
  for (int f = 0; f < 8; ++f) row[f] = f >= shift && f < shift + 4 ? w[f - shift] : 0.0f;
  int wrong = 0;

  // 16 bits, dense.
  const uint32_t window[2] = {pack_bfloat16(w[0], w[1]), pack_bfloat16(w[2], w[3])};
  uint32_t words[4];
  spread_words<Products::bfloat16>(window, shift, words);
  for (int f = 0; f < 8; ++f) wrong += from_bfloat16(uint16_t(words[f / 2] >> (16 * (f % 2)))) != row[f];

  // 16 bits, sparse: two groups of four columns, the even and the odd bases.
  const uint32_t pairs[2] = {pack_bfloat16(w[0], w[2]), pack_bfloat16(w[1], w[3])};
  const uint32_t metadata = pair_metadata(shift);
  for (int place = 0; place < 8; ++place) {
    const int parity = place / 4, f = basis_of_place<true, true>(place);
    wrong += f % 2 != parity || place_of_basis<true, true>(f) != place;
    const uint32_t word = kept_word(pairs[((shift & 1) + parity) & 1], pair_begin(shift, parity));
    const uint32_t bits = metadata >> (4 * parity) & 15;
    wrong += (bits & 3) >= (bits >> 2);
    const int stored = stored_of_four(bits, place % 4);
    const float read = stored < 0 ? 0.0f : from_bfloat16(uint16_t(word >> (16 * stored)));
    wrong += read != row[f];
  }

  // tf32, sparse: four pairs.
  float folded[4];
  fold_pairs(w, shift, folded);
  for (int place = 0; place < 8; ++place) {
    const int pair = place / 2, f = basis_of_place<true, false>(place);
    wrong += f % 4 != pair || place_of_basis<true, false>(f) != place;
    const uint32_t bits = fold_metadata(shift) >> (4 * pair) & 15;
    wrong += bits != 4 && bits != 14;
    wrong += (bits == 14) != upper_of_pair(pair, shift);
    wrong += ((place % 2 == 1) == (bits == 14) ? folded[pair] : 0.0f) != row[f];
  }
  return wrong;
}

}  // namespace

// How many numbers came out wrong over all shifts: windows of every cell of grids of any size, cut into chunks of eight, have
// no others but those that miss the chunk altogether, which are all alike.
extern "C" int kan_check_fragments() {
  int wrong = 0;
  for (int shift = -600; shift <= 600; ++shift) wrong += check(shift);
  return wrong;
}
