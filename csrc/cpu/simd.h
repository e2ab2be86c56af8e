// Vectors of the instruction set this file is compiled for. GCC/Clang vector extensions do the arithmetic on every
// machine; intrinsics stand only where a shuffle decides the speed. Nothing here may come from the standard library's
// templates: the linker would merge a copy compiled for AVX-512 into code that must run without it.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef KAN_ISA
#define KAN_ISA baseline
#endif
#if defined(KAN_ISA_AVX512)
#define KAN_BYTES 64
#elif defined(KAN_ISA_AVX2)
#define KAN_BYTES 32
#else
#define KAN_BYTES 16
#endif

#define KAN_UNROLL _Pragma("GCC unroll 16")

namespace kan::cpu::KAN_ISA {

template <class T> struct Simd;
template <> struct Simd<float> {
  static constexpr int N = KAN_BYTES / 4;
  typedef float V __attribute__((vector_size(KAN_BYTES), may_alias));
  typedef float U __attribute__((vector_size(KAN_BYTES), aligned(4), may_alias));
  typedef int32_t I __attribute__((vector_size(KAN_BYTES)));
  typedef uint32_t Unsigned __attribute__((vector_size(KAN_BYTES)));
  using Int = int32_t;
  static constexpr float kEpsilon = 1.1920929e-7f;
};
template <> struct Simd<double> {
  static constexpr int N = KAN_BYTES / 8;
  typedef double V __attribute__((vector_size(KAN_BYTES), may_alias));
  typedef double U __attribute__((vector_size(KAN_BYTES), aligned(8), may_alias));
  typedef int64_t I __attribute__((vector_size(KAN_BYTES)));
  typedef uint64_t Unsigned __attribute__((vector_size(KAN_BYTES)));
  using Int = int64_t;
  static constexpr double kEpsilon = 2.220446049250313e-16;
};

template <class T> using Vec = typename Simd<T>::V;
template <class T> using VecInt = typename Simd<T>::I;
template <class T> using VecUnsigned = typename Simd<T>::Unsigned;

template <class T> KAN_INLINE Vec<T> load(const T* p) { return *reinterpret_cast<const typename Simd<T>::U*>(p); }
template <class T> KAN_INLINE void store(T* p, Vec<T> v) { *reinterpret_cast<typename Simd<T>::U*>(p) = v; }
template <class T> KAN_INLINE Vec<T> broadcast(T a) { return a - Vec<T>{}; }
template <class T> KAN_INLINE VecInt<T> to_int(Vec<T> v) { return __builtin_convertvector(v, VecInt<T>); }
template <class T> KAN_INLINE Vec<T> to_real(VecInt<T> v) { return __builtin_convertvector(v, Vec<T>); }
template <class T> KAN_INLINE bool any(VecInt<T> mask) {
  typename Simd<T>::Int bits = 0;
  for (int lane = 0; lane < Simd<T>::N; ++lane) bits |= mask[lane];
  return bits != 0;
}
#if defined(KAN_ISA_AVX512)
template <> KAN_INLINE bool any<float>(VecInt<float> mask) {
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
}
#endif

// The second operand where the first is NaN, as the instructions have it; GCC does not recognise them.
template <class T> KAN_INLINE Vec<T> maximum(Vec<T> a, Vec<T> b) { return a > b ? a : b; }
template <class T> KAN_INLINE Vec<T> minimum(Vec<T> a, Vec<T> b) { return a < b ? a : b; }
#if defined(KAN_ISA_AVX512)
template <> KAN_INLINE Vec<float> maximum<float>(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_max_ps((__m512)a, (__m512)b); }
template <> KAN_INLINE Vec<float> minimum<float>(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm512_min_ps((__m512)a, (__m512)b); }
#elif defined(KAN_ISA_AVX2)
template <> KAN_INLINE Vec<float> maximum<float>(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_max_ps((__m256)a, (__m256)b); }
template <> KAN_INLINE Vec<float> minimum<float>(Vec<float> a, Vec<float> b) { return (Vec<float>)_mm256_min_ps((__m256)a, (__m256)b); }
#endif

template <class T> KAN_INLINE T smaller(T a, T b) { return a < b ? a : b; }
template <class T> KAN_INLINE T larger(T a, T b) { return a > b ? a : b; }

// A lane-wise table: entry index[lane] for every lane. Up to two registers of entries are permuted (with AVX-512 four), longer
// ones gathered. The table must be readable up to a multiple of the vector length.
template <class T> KAN_INLINE Vec<T> lookup(const T* table, int length, VecInt<T> index) {
#if defined(KAN_ISA_AVX512)
  if constexpr (sizeof(T) == 4) {
    if (length <= 16) return (Vec<T>)_mm512_permutexvar_ps((__m512i)index, _mm512_loadu_ps(table));
    if (length <= 32)
      return (Vec<T>)_mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)index, _mm512_loadu_ps(table + 16));
    if (length <= 64) {
      const __m512 low = _mm512_permutex2var_ps(_mm512_loadu_ps(table), (__m512i)index, _mm512_loadu_ps(table + 16));
      const __m512 high = _mm512_permutex2var_ps(_mm512_loadu_ps(table + 32), (__m512i)index, _mm512_loadu_ps(table + 48));
      return (Vec<T>)_mm512_mask_mov_ps(low, _mm512_test_epi32_mask((__m512i)index, _mm512_set1_epi32(32)), high);
    }
    return (Vec<T>)_mm512_mask_i32gather_ps(_mm512_setzero_ps(), 0xffff, (__m512i)index, table, 4);
  } else {
    if (length <= 8) return (Vec<T>)_mm512_permutexvar_pd((__m512i)index, _mm512_loadu_pd(table));
    if (length <= 16)
      return (Vec<T>)_mm512_permutex2var_pd(_mm512_loadu_pd(table), (__m512i)index, _mm512_loadu_pd(table + 8));
    return (Vec<T>)_mm512_mask_i64gather_pd(_mm512_setzero_pd(), 0xff, (__m512i)index, table, 8);
  }
#elif defined(KAN_ISA_AVX2)
  if constexpr (sizeof(T) == 4) {
    if (length <= 16) {  // two permutes and a blend: half the time of a gather
      __m256 low = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
      __m256 high = _mm256_permutevar8x32_ps(_mm256_loadu_ps(table + 8), (__m256i)index);
      return (Vec<T>)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32((__m256i)index, 28)));
    }
    return (Vec<T>)_mm256_i32gather_ps(table, (__m256i)index, 4);
  }
  else return (Vec<T>)_mm256_i64gather_pd(table, (__m256i)index, 8);
#else
  (void)length;
  Vec<T> result;
  for (int lane = 0; lane < Simd<T>::N; ++lane) result[lane] = table[index[lane]];
  return result;
#endif
}

// The same of a table of kTableBytes bytes.
constexpr int kTableBytes = KAN_BYTES == 64 ? 64 : 32;
template <class T> KAN_INLINE VecInt<T> lookup_byte(const uint8_t* table, VecInt<T> index) {
#if defined(KAN_ISA_AVX512)
  constexpr __mmask64 kLowest = sizeof(T) == 4 ? 0x1111111111111111u : 0x0101010101010101u;
  return (VecInt<T>)_mm512_maskz_permutexvar_epi8(kLowest, (__m512i)index, _mm512_loadu_si512(table));
#elif defined(KAN_ISA_AVX2)
  auto half = [](const uint8_t* from) { return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))); };
  // A set highest bit makes a zero; bit 4 of an index becomes the highest one of its byte.
  const __m256i wanted = (__m256i)(index | (VecInt<T>{} + typename Simd<T>::Int(sizeof(T) == 4 ? 0x80808000u : 0x8080808080808000u)));
  const __m256i low = _mm256_shuffle_epi8(half(table), wanted), high = _mm256_shuffle_epi8(half(table + 16), wanted);
  return (VecInt<T>)_mm256_blendv_epi8(low, high, _mm256_slli_epi32((__m256i)index, 3));
#else
  VecInt<T> result;
  for (int lane = 0; lane < Simd<T>::N; ++lane) result[lane] = table[index[lane]];
  return result;
#endif
}

template <class T> KAN_INLINE T sum(Vec<T> v) {
  T total = 0;
  for (int lane = 0; lane < Simd<T>::N; ++lane) total += v[lane];
  return total;
}

// out[q] = sum of the lanes of a[q], q = 0 .. 3.
template <class T> KAN_INLINE void sum4(const Vec<T>* a, T* out) {
  KAN_UNROLL for (int q = 0; q < 4; ++q) out[q] = sum<T>(a[q]);
}
#if defined(KAN_ISA_AVX512)
template <> KAN_INLINE void sum4<float>(const Vec<float>* a, float* out) {
  __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[0], (__m512)a[1]), _mm512_unpackhi_ps((__m512)a[0], (__m512)a[1]));
  __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a[2], (__m512)a[3]), _mm512_unpackhi_ps((__m512)a[2], (__m512)a[3]));
  __m512d lo = _mm512_unpacklo_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512d hi = _mm512_unpackhi_pd(_mm512_castps_pd(ab), _mm512_castps_pd(cd));
  __m512 abcd = _mm512_add_ps(_mm512_castpd_ps(lo), _mm512_castpd_ps(hi));
  __m256 half = _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_extractf32x8_ps(abcd, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
template <> KAN_INLINE float sum<float>(Vec<float> v) { return _mm512_reduce_add_ps((__m512)v); }
#elif defined(KAN_ISA_AVX2)
template <> KAN_INLINE void sum4<float>(const Vec<float>* a, float* out) {
  __m256 ab = _mm256_hadd_ps((__m256)a[0], (__m256)a[1]), cd = _mm256_hadd_ps((__m256)a[2], (__m256)a[3]);
  __m256 abcd = _mm256_hadd_ps(ab, cd);
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(abcd), _mm256_extractf128_ps(abcd, 1)));
}
#endif

// out[i * ld_out + b] = in[b * ld_in + i] for b < rows, i < columns; float in blocks of registers.
template <class T>
inline void transpose(const T* in, ptrdiff_t ld_in, int64_t rows, int64_t columns, T* out, ptrdiff_t ld_out) {
  for (int64_t b0 = 0; b0 < rows; b0 += 16) {
    int64_t b1 = b0 + 16 < rows ? b0 + 16 : rows;
    for (int64_t i = 0; i < columns; ++i)
      for (int64_t b = b0; b < b1; ++b) out[i * ld_out + b] = in[b * ld_in + i];
  }
}
#if defined(KAN_ISA_AVX512)
static inline __mmask16 lanes16(int64_t n) { return n >= 16 ? 0xffff : n <= 0 ? 0 : (__mmask16)((1u << n) - 1); }

static inline void transpose16(__m512* r) {
  __m512 t[16];
  auto pd = [](__m512 v) { return _mm512_castps_pd(v); };
  auto ps = [](__m512d v) { return _mm512_castpd_ps(v); };
  KAN_UNROLL for (int i = 0; i < 8; ++i) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  KAN_UNROLL for (int i = 0; i < 4; ++i) {
    r[4 * i] = ps(_mm512_unpacklo_pd(pd(t[4 * i]), pd(t[4 * i + 2])));
    r[4 * i + 1] = ps(_mm512_unpackhi_pd(pd(t[4 * i]), pd(t[4 * i + 2])));
    r[4 * i + 2] = ps(_mm512_unpacklo_pd(pd(t[4 * i + 1]), pd(t[4 * i + 3])));
    r[4 * i + 3] = ps(_mm512_unpackhi_pd(pd(t[4 * i + 1]), pd(t[4 * i + 3])));
  }
  KAN_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0x88);
    t[4 + i] = _mm512_shuffle_f32x4(r[i], r[4 + i], 0xdd);
    t[8 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0x88);
    t[12 + i] = _mm512_shuffle_f32x4(r[8 + i], r[12 + i], 0xdd);
  }
  KAN_UNROLL for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0x88);
    r[8 + i] = _mm512_shuffle_f32x4(t[i], t[8 + i], 0xdd);
    r[4 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0x88);
    r[12 + i] = _mm512_shuffle_f32x4(t[4 + i], t[12 + i], 0xdd);
  }
}

template <>
inline void transpose<float>(const float* in, ptrdiff_t ld_in, int64_t rows, int64_t columns, float* out,
                             ptrdiff_t ld_out) {
  for (int64_t b0 = 0; b0 < rows; b0 += 16) {
    // The next 16 rows: far apart, so no hardware prefetcher follows them.
    const int64_t ahead = smaller<int64_t>(rows, b0 + 32);
    for (int64_t b = b0 + 16; b < ahead; ++b)
      for (int64_t i = 0; i < columns; i += 16) __builtin_prefetch(in + b * ld_in + i);
    for (int64_t i0 = 0; i0 < columns; i0 += 16) {
      __m512 r[16];
      __mmask16 in_mask = lanes16(columns - i0), out_mask = lanes16(rows - b0);
      KAN_UNROLL for (int k = 0; k < 16; ++k)
        r[k] = b0 + k < rows ? _mm512_maskz_loadu_ps(in_mask, in + (b0 + k) * ld_in + i0) : _mm512_setzero_ps();
      transpose16(r);
      int64_t count = columns - i0 < 16 ? columns - i0 : 16;
      for (int k = 0; k < count; ++k) _mm512_mask_storeu_ps(out + (i0 + k) * ld_out + b0, out_mask, r[k]);
    }
  }
}
#endif

#if defined(KAN_ISA_AVX2)
static inline void transpose8(__m256* r) {
  __m256 t[8];
  KAN_UNROLL for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  KAN_UNROLL for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  KAN_UNROLL for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2f128_ps(r[i], r[i + 4], 0x31);
  }
  KAN_UNROLL for (int i = 0; i < 8; ++i) r[i] = t[i];
}

template <>
inline void transpose<float>(const float* in, ptrdiff_t ld_in, int64_t rows, int64_t columns, float* out,
                             ptrdiff_t ld_out) {
  const int64_t whole_rows = rows / 8 * 8, whole_columns = columns / 8 * 8;
  for (int64_t b0 = 0; b0 < whole_rows; b0 += 8) {
    const int64_t ahead = smaller<int64_t>(rows, b0 + 16);
    for (int64_t b = b0 + 8; b < ahead; ++b)
      for (int64_t i = 0; i < columns; i += 16) __builtin_prefetch(in + b * ld_in + i);
    for (int64_t i0 = 0; i0 < whole_columns; i0 += 8) {
      __m256 r[8];
      KAN_UNROLL for (int k = 0; k < 8; ++k) r[k] = _mm256_loadu_ps(in + (b0 + k) * ld_in + i0);
      transpose8(r);
      KAN_UNROLL for (int k = 0; k < 8; ++k) _mm256_storeu_ps(out + (i0 + k) * ld_out + b0, r[k]);
    }
    for (int64_t i = whole_columns; i < columns; ++i)
      for (int64_t b = b0; b < b0 + 8; ++b) out[i * ld_out + b] = in[b * ld_in + i];
  }
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t b = whole_rows; b < rows; ++b) out[i * ld_out + b] = in[b * ld_in + i];
}
#endif

}  // namespace kan::cpu::KAN_ISA
