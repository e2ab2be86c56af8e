// Numbers in halves, as threads make them.
#pragma once
#include "instructions.cuh"
#include "split.h"

namespace kan::cuda {

// Two numbers within float16's range: their upper and their lower halves, two to a word.
KAN_DEVICE void split_pair(float a, float b, uint32_t& upper, uint32_t& lower) {
  upper = pack_float16(a, b);
  lower = pack_float16(a - from_float16(uint16_t(upper)), b - from_float16(uint16_t(upper >> 16)));
}
// The same with the upper halves cut off, not rounded: of numbers that are not below 0 neither are the lower ones.
KAN_DEVICE void cut_pair(float a, float b, uint32_t& upper, uint32_t& lower) {
  upper = pack_float16_cut(a, b);
  lower = pack_float16(a - from_float16(uint16_t(upper)), b - from_float16(uint16_t(upper >> 16)));
}
template <int kCount>
KAN_DEVICE void split_all(const float (&value)[kCount], uint32_t (&upper)[kCount / 2], uint32_t (&lower)[kCount / 2]) {
  KAN_UNROLL_ALL
  for (int m = 0; m < kCount / 2; ++m) split_pair(value[2 * m], value[2 * m + 1], upper[m], lower[m]);
}

// The power of two that brings `largest` to 2^14 and above, below 2^15; 2^100 at the most.
KAN_DEVICE float scale_to_top(float largest) {
  const uint32_t exponent = 268u - (as_bits(largest) >> 23);  // biased by 127
  return as_float((exponent < 227u ? exponent : 227u) << 23);
}
// 1 / scale, of such a power of two.
KAN_DEVICE float inverse_of_scale(float scale) { return as_float((254u << 23) - as_bits(scale)); }

}  // namespace kan::cuda
