// bfloat16 and float16 to float32 and back, rounding to nearest even. Plain integer arithmetic: every instruction set gets
// the same bits, and the compiler turns the loops into vectors of it.
#pragma once
#include "../bspline.h"
#include "../kernels.h"
#include "simd.h"

namespace kan::cpu::KAN_ISA {

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

inline void widen(Storage type, const uint16_t* __restrict from, float* __restrict to, int64_t count) {
  if (type == Storage::bfloat16) for (int64_t q = 0; q < count; ++q) to[q] = from_bfloat16(from[q]);
  else for (int64_t q = 0; q < count; ++q) to[q] = from_half(from[q]);
}
inline void narrow_down(Storage type, const float* __restrict from, uint16_t* __restrict to, int64_t count) {
  if (type == Storage::bfloat16) for (int64_t q = 0; q < count; ++q) to[q] = to_bfloat16(from[q]);
  else for (int64_t q = 0; q < count; ++q) to[q] = to_half(from[q]);
}

// `count` values from base[index] on, as T.
template <class T> KAN_INLINE void read_row(Storage type, const T* base, ptrdiff_t index, int64_t count, T* out) {
  if constexpr (sizeof(T) == 4)
    if (type != Storage::same) return widen(type, reinterpret_cast<const uint16_t*>(base) + index, out, count);
  memcpy(out, base + index, sizeof(T) * size_t(count));
}
template <class T> KAN_INLINE void write_row(Storage type, const T* values, int64_t count, T* base, ptrdiff_t index) {
  if constexpr (sizeof(T) == 4)
    if (type != Storage::same) return narrow_down(type, values, reinterpret_cast<uint16_t*>(base) + index, count);
  memcpy(base + index, values, sizeof(T) * size_t(count));
}
// Filled up with zeros to `width`.
template <class T>
KAN_INLINE void read_padded(Storage type, const T* base, ptrdiff_t index, int64_t count, int64_t width, T* out) {
  read_row(type, base, index, count, out);
  if (width > count) memset(out + count, 0, sizeof(T) * size_t(width - count));
}

// As transpose, from and to tensors of other storage; at most kColumnsAtOnce columns of the tensor.
constexpr int kColumnsAtOnce = 32;
template <class T>
inline void transpose_from(Storage type, const T* base, ptrdiff_t index, ptrdiff_t ld, int64_t rows, int64_t columns, T* out,
                           ptrdiff_t ld_out) {
  if (type == Storage::same) return transpose<T>(base + index, ld, rows, columns, out, ld_out);
  alignas(64) T wide[16 * kColumnsAtOnce];
  for (int64_t b = 0; b < rows; b += 16) {
    const int64_t count = smaller<int64_t>(16, rows - b);
    for (int64_t r = 0; r < count; ++r) read_row(type, base, index + (b + r) * ld, columns, wide + r * kColumnsAtOnce);
    transpose<T>(wide, kColumnsAtOnce, count, columns, out + b, ld_out);
  }
}
template <class T>
inline void transpose_to(Storage type, const T* in, ptrdiff_t ld_in, int64_t columns, int64_t rows, T* base, ptrdiff_t index,
                         ptrdiff_t ld) {
  if (type == Storage::same) return transpose<T>(in, ld_in, columns, rows, base + index, ld);
  alignas(64) T wide[16 * kColumnsAtOnce];
  for (int64_t b = 0; b < rows; b += 16) {
    const int64_t count = smaller<int64_t>(16, rows - b);
    transpose<T>(in + b, ld_in, columns, count, wide, kColumnsAtOnce);
    for (int64_t r = 0; r < count; ++r) write_row(type, wide + r * kColumnsAtOnce, columns, base, index + (b + r) * ld);
  }
}

}  // namespace kan::cpu::KAN_ISA
