// Several vectors that take every step side by side. One chain of 20 dependent operations keeps a core's schedulers full
// of waiting work (silu: 32 cycles a vector, four vectors in step: 17); the functions of features.h are written for these.
#pragma once
#include "simd.h"

namespace kan::cpu::KAN_ISA {

constexpr int kInStep = sizeof(Vec<float>) == 64 ? 4 : 2;  // sets with 32 registers hold four chains, the others two

template <class T, int Q> struct LanesInt {
  VecInt<T> v[Q];
#define KAN_LANES(op)                                                                                       \
  friend KAN_INLINE LanesInt operator op(LanesInt a, LanesInt b) {                                            \
    KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = (VecInt<T>)(a.v[q] op b.v[q]);                            \
    return a;                                                                                                 \
  }                                                                                                           \
  friend KAN_INLINE LanesInt operator op(LanesInt a, int b) {                                                 \
    KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = (VecInt<T>)(a.v[q] op (VecInt<T>{} + b));                 \
    return a;                                                                                                 \
  }
  KAN_LANES(+) KAN_LANES(-) KAN_LANES(|) KAN_LANES(<) KAN_LANES(>)
#undef KAN_LANES
};

template <class T, int Q> struct Lanes {
  static constexpr int kCount = Q;
  Vec<T> v[Q];
#define KAN_LANES(op)                                                                                       \
  friend KAN_INLINE Lanes operator op(Lanes a, Lanes b) {                                                     \
    KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = a.v[q] op b.v[q];                                         \
    return a;                                                                                                 \
  }                                                                                                           \
  friend KAN_INLINE Lanes operator op(Lanes a, T b) {                                                         \
    KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = a.v[q] op b;                                              \
    return a;                                                                                                 \
  }                                                                                                           \
  friend KAN_INLINE Lanes operator op(T a, Lanes b) {                                                         \
    KAN_UNROLL for (int q = 0; q < Q; ++q) b.v[q] = a op b.v[q];                                              \
    return b;                                                                                                 \
  }
  KAN_LANES(+) KAN_LANES(-) KAN_LANES(*) KAN_LANES(/)
#undef KAN_LANES
#define KAN_LANES(op)                                                                                       \
  friend KAN_INLINE LanesInt<T, Q> operator op(Lanes a, Lanes b) {                                            \
    LanesInt<T, Q> mask;                                                                                      \
    KAN_UNROLL for (int q = 0; q < Q; ++q) mask.v[q] = (VecInt<T>)(a.v[q] op b.v[q]);                         \
    return mask;                                                                                              \
  }                                                                                                           \
  friend KAN_INLINE LanesInt<T, Q> operator op(Lanes a, T b) {                                                \
    LanesInt<T, Q> mask;                                                                                      \
    KAN_UNROLL for (int q = 0; q < Q; ++q) mask.v[q] = (VecInt<T>)(a.v[q] op b);                              \
    return mask;                                                                                              \
  }
  KAN_LANES(<) KAN_LANES(>) KAN_LANES(<=) KAN_LANES(>=) KAN_LANES(==)
#undef KAN_LANES
  friend KAN_INLINE Lanes operator-(Lanes a) {
    KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = -a.v[q];
    return a;
  }
  friend KAN_INLINE Lanes& operator+=(Lanes& a, Lanes b) { return a = a + b; }
  friend KAN_INLINE Lanes& operator-=(Lanes& a, Lanes b) { return a = a - b; }
};

template <class T, int Q> KAN_INLINE Lanes<T, Q> all(T value) {
  Lanes<T, Q> a;
  KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = broadcast<T>(value);
  return a;
}
template <class T, int Q> KAN_INLINE LanesInt<T, Q> all_int(int value) {
  LanesInt<T, Q> a;
  KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = VecInt<T>{} + value;
  return a;
}
template <class T, int Q> KAN_INLINE Lanes<T, Q> load_lanes(const T* p) {
  Lanes<T, Q> a;
  KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = load<T>(p + q * Simd<T>::N);
  return a;
}
template <class T, int Q> KAN_INLINE void store(T* p, Lanes<T, Q> a) {
  KAN_UNROLL for (int q = 0; q < Q; ++q) store<T>(p + q * Simd<T>::N, a.v[q]);
}
template <class T> struct Short { typedef uint16_t U __attribute__((vector_size(2 * Simd<T>::N), aligned(2), may_alias)); };
template <class T, int Q> KAN_INLINE LanesInt<T, Q> load_short(const uint16_t* p) {
  LanesInt<T, Q> a;
  KAN_UNROLL for (int q = 0; q < Q; ++q)
    a.v[q] = __builtin_convertvector(*reinterpret_cast<const typename Short<T>::U*>(p + q * Simd<T>::N), VecInt<T>);
  return a;
}
template <class T, int Q> KAN_INLINE void store_short(uint16_t* p, LanesInt<T, Q> a) {
  KAN_UNROLL for (int q = 0; q < Q; ++q)
    *reinterpret_cast<typename Short<T>::U*>(p + q * Simd<T>::N) = __builtin_convertvector(a.v[q], typename Short<T>::U);
}
template <class T, int Q> KAN_INLINE Lanes<T, Q> select(LanesInt<T, Q> mask, Lanes<T, Q> a, Lanes<T, Q> b) {
  KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = mask.v[q] ? a.v[q] : b.v[q];
  return a;
}
template <class T, int Q> KAN_INLINE LanesInt<T, Q> select(LanesInt<T, Q> mask, LanesInt<T, Q> a, LanesInt<T, Q> b) {
  KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = mask.v[q] ? a.v[q] : b.v[q];
  return a;
}
// The bound where a lane is beyond it or NaN.
template <class T, int Q> KAN_INLINE Lanes<T, Q> at_least(Lanes<T, Q> a, T bound) {
  KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = maximum<T>(a.v[q], broadcast<T>(bound));
  return a;
}
template <class T, int Q> KAN_INLINE Lanes<T, Q> at_most(Lanes<T, Q> a, T bound) {
  KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = minimum<T>(a.v[q], broadcast<T>(bound));
  return a;
}
// The bound where a lane is beyond it; NaN stays, which is what the order of the operands says.
template <class T, int Q> KAN_INLINE Lanes<T, Q> not_below(T bound, Lanes<T, Q> a) {
  KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = maximum<T>(broadcast<T>(bound), a.v[q]);
  return a;
}
template <class T, int Q> KAN_INLINE Lanes<T, Q> not_above(T bound, Lanes<T, Q> a) {
  KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = minimum<T>(broadcast<T>(bound), a.v[q]);
  return a;
}
template <class T, int Q> KAN_INLINE LanesInt<T, Q> to_int(Lanes<T, Q> a) {
  LanesInt<T, Q> i;
  KAN_UNROLL for (int q = 0; q < Q; ++q) i.v[q] = to_int<T>(a.v[q]);
  return i;
}
template <class T, int Q> KAN_INLINE Lanes<T, Q> lookup(const T* table, int length, LanesInt<T, Q> index) {
  Lanes<T, Q> a;
  KAN_UNROLL for (int q = 0; q < Q; ++q) a.v[q] = lookup<T>(table, length, index.v[q]);
  return a;
}
template <class T, int Q> KAN_INLINE LanesInt<T, Q> lookup_byte(const uint8_t* table, LanesInt<T, Q> index) {
  KAN_UNROLL for (int q = 0; q < Q; ++q) index.v[q] = lookup_byte<T>(table, index.v[q]);
  return index;
}
template <class T, int Q> KAN_INLINE bool any(LanesInt<T, Q> mask) {
  VecInt<T> joined = mask.v[0];
  KAN_UNROLL for (int q = 1; q < Q; ++q) joined |= mask.v[q];
  return any<T>(joined);
}
template <class T, int Q> KAN_INLINE Lanes<T, Q> reciprocal(Lanes<T, Q> a) {
  return 1 / a;
}
#if defined(KAN_ISA_AVX512)
// For d in [1, 1e38], to an ulp or so: 14 bits and a Newton step, a third of a division.
template <int Q> KAN_INLINE Lanes<float, Q> reciprocal(Lanes<float, Q> d) {
  Lanes<float, Q> r;
  KAN_UNROLL for (int q = 0; q < Q; ++q) r.v[q] = (Vec<float>)_mm512_rcp14_ps((__m512)d.v[q]);
  return r + r * (1.0f - d * r);
}
#endif

// exp(x) for |x| up to the limit of 80 (float) or 700 (double); relative error about 1 ulp (Cephes' argument reduction and,
// for float, its polynomial; Taylor to r^13 for double, where |r| <= ln(2)/2 leaves 4e-18). The magic number rounds to an
// integer and leaves it in the low bits. NaN gives NaN.
template <class T> struct Exponential;
template <> struct Exponential<float> {
  static constexpr float limit = 80, magic = 12582912, high = 0.693359375f, low = -2.12194440e-4f;
  static constexpr int degree = 5, shift = 23;
  static constexpr uint32_t bias = 127;
  static constexpr float c[] = {1.9875691500e-4f, 1.3981999507e-3f, 8.3334519073e-3f,
                                4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
};
template <> struct Exponential<double> {
  static constexpr double limit = 700, magic = 6755399441055744.0, high = 0.693145751953125, low = 1.42860682030941723212e-6;
  static constexpr int degree = 11, shift = 52;
  static constexpr uint64_t bias = 1023;
  static constexpr double c[] = {1.0 / 6227020800.0, 1.0 / 479001600.0, 1.0 / 39916800.0, 1.0 / 3628800.0,
                                 1.0 / 362880.0,     1.0 / 40320.0,     1.0 / 5040.0,     1.0 / 720.0,
                                 1.0 / 120.0,        1.0 / 24.0,        1.0 / 6.0,        0.5};
};
template <class T, int Q> KAN_INLINE Lanes<T, Q> exponential(Lanes<T, Q> x) {
  using E = Exponential<T>;
  const Lanes<T, Q> shifted = x * T(1.4426950408889634) + E::magic, n = shifted - E::magic;
  const Lanes<T, Q> r = (x - n * E::high) - n * E::low;
  Lanes<T, Q> p = r * E::c[0] + E::c[1];
  KAN_UNROLL for (int d = 2; d <= E::degree; ++d) p = p * r + E::c[d];
  p = p * (r * r) + (r + T(1));
  KAN_UNROLL for (int q = 0; q < Q; ++q) {
    // Unsigned: a NaN has any bits.
    const VecUnsigned<T> scale = ((VecUnsigned<T>)shifted.v[q] + E::bias) << E::shift;
    p.v[q] *= (Vec<T>)scale;
  }
  return p;
}

// Calls body(lanes, b) for rows b .. of whole vectors, kInStep vectors at a time and the rest one by one; lanes carries the
// number of vectors in its type.
template <class T, class Body> KAN_INLINE void in_step(int rows, Body body) {
  constexpr int N = Simd<T>::N;
  int b = 0;
  for (; b + (kInStep - 1) * N < rows; b += kInStep * N) body(Lanes<T, kInStep>{}, b);
  for (; b < rows; b += N) body(Lanes<T, 1>{}, b);
}

}  // namespace kan::cpu::KAN_ISA
