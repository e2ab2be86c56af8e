// bfloat16 and float16 to float32 and back, rounding to nearest even. Plain integer arithmetic: every instruction set gets
// the same bits, and the compiler turns the loops into vectors of it.
#include "../bspline.h"
#include "../kernels.h"
#include "simd.h"

namespace kan::cpu::KAN_ISA {
namespace {

KAN_INLINE uint32_t bits(float f) {
  uint32_t u;
  memcpy(&u, &f, sizeof u);
  return u;
}
KAN_INLINE float real(uint32_t u) {
  float f;
  memcpy(&f, &u, sizeof f);
  return f;
}

KAN_INLINE float from_bfloat16(uint16_t h) { return real(uint32_t(h) << 16); }
KAN_INLINE uint16_t to_bfloat16(float f) {
  const uint32_t u = bits(f), rounded = (u + 0x7fff + (u >> 16 & 1)) >> 16;
  return uint16_t((u & 0x7fffffff) > 0x7f800000 ? 0x7fc0 : rounded);
}

// Subnormal halves are normal floats: adding and subtracting 2^-14 shifts their bits into place.
KAN_INLINE float from_half(uint16_t h) {
  const uint32_t shifted = uint32_t(h & 0x7fff) << 13, exponent = shifted & 0x0f800000, sign = uint32_t(h & 0x8000) << 16;
  const uint32_t normal = shifted + (112u << 23), special = shifted + (224u << 23);
  const uint32_t subnormal = bits(real(normal + (1u << 23)) - real(113u << 23));
  return real((exponent == 0x0f800000 ? special : exponent == 0 ? subnormal : normal) | sign);
}
// Adding 0.5 to what will be subnormal leaves its rounded bits in the low end; normal ones round by an integer addition.
KAN_INLINE uint16_t to_half(float f) {
  const uint32_t u = bits(f), magnitude = u & 0x7fffffff, sign = u >> 16 & 0x8000;
  const uint32_t subnormal = bits(real(magnitude) + 0.5f) - bits(0.5f);
  const uint32_t normal = (magnitude - (112u << 23) + 0xfff + (magnitude >> 13 & 1)) >> 13;
  const uint32_t large = magnitude > 0x7f800000 ? 0x7e00 : 0x7c00;
  return uint16_t((magnitude >= 0x47800000 ? large : magnitude < 0x38800000 ? subnormal : normal) | sign);
}

}  // namespace

void widen(Narrow type, const uint16_t* from, float* to, int64_t count) {
  if (type == Narrow::bfloat16) for (int64_t q = 0; q < count; ++q) to[q] = from_bfloat16(from[q]);
  else for (int64_t q = 0; q < count; ++q) to[q] = from_half(from[q]);
}

void narrow_down(Narrow type, const float* from, uint16_t* to, int64_t count) {
  if (type == Narrow::bfloat16) for (int64_t q = 0; q < count; ++q) to[q] = to_bfloat16(from[q]);
  else for (int64_t q = 0; q < count; ++q) to[q] = to_half(from[q]);
}

}  // namespace kan::cpu::KAN_ISA
