// The spline mathematics, once for C++ and CUDA. Scalars on the device, scalars or SIMD vectors on the host.
//
// A spline of order k over knots t_0 <= ... <= t_{G+2k} is sum_f c_f B_{f,k}(x); basis f lives on [t_f, t_{f+k+1}).
// In the interval [t_j, t_{j+1}) only the bases j-k .. j are not zero: the "window" of j. Everything here speaks of
// that window; nothing ever holds all G + k bases.
#pragma once

#if defined(__CUDACC__)
#define KAN_INLINE __host__ __device__ __forceinline__
#define KAN_UNROLL_WINDOW _Pragma("unroll")
#else
#define KAN_INLINE inline __attribute__((always_inline))
#define KAN_UNROLL_WINDOW _Pragma("GCC unroll 8")
#endif

namespace kan {

// Values of the p+1 bases of order p in the window of one interval (de Boor's triangle; Piegl & Tiller, A2.2).
//   left(i)     = x - t[j + 1 - i]                      i = 1 .. p
//   right(i)    = t[j + i] - x                          i = 1 .. p
//   recip(q, r) = 1 / (t[j + r + 1] - t[j + 1 - q + r]) q = 1 .. p, r = 0 .. q-1; 0 where the knots coincide
//   w[0 .. p]   : out, bases j-p .. j
template <int P, class V, class Left, class Right, class Recip>
KAN_INLINE void basis(V one, Left left, Right right, Recip recip, V* w) {
  w[0] = one;
KAN_UNROLL_WINDOW
  for (int q = 1; q <= P; ++q) {
    V saved = one - one;
KAN_UNROLL_WINDOW
    for (int r = 0; r < q; ++r) {
      V term = w[r] * recip(q, r);
      w[r] = saved + right(r + 1) * term;
      saved = left(q - r) * term;
    }
    w[q] = saved;
  }
}

// The same on even knots, with u = (x - t[j]) / h in [0, 1): cardinal B-splines. Orders 2 and 3 in their expanded form, which
// takes half the operations of the triangle.
template <int P, class T, class V>
KAN_INLINE void uniform_basis(V one, V u, V* w) {
  if constexpr (P == 3) {
    const V v = one - u, u2 = u * u, v2 = v * v, u3 = u2 * u, v3 = v2 * v;
    w[0] = v3 * (T(1) / 6);
    w[1] = u3 * T(0.5) + ((T(2) / 3) - u2);
    w[2] = v3 * T(0.5) + ((T(2) / 3) - v2);
    w[3] = u3 * (T(1) / 6);
  } else if constexpr (P == 2) {
    const V v = one - u, u2 = u * u;
    w[0] = v * v * T(0.5);
    w[1] = (T(0.5) + u) - u2;
    w[2] = u2 * T(0.5);
  } else {
    basis<P>(one, [&](int i) { return u + T(i - 1); }, [&](int i) { return T(i) - u; },
             [&](int p, int) { return T(1) / T(p); }, w);
  }
}

// First derivatives of the p+1 bases of order p from the p values of order p-1 in the same window (A2.3, eq. 2.7):
//   w'[r] = p * (v[r-1] * recip(p, r-1) - v[r] * recip(p, r))
template <int P, class V, class Recip>
KAN_INLINE void differentiate(const V* v, Recip recip, V* w) {
KAN_UNROLL_WINDOW
  for (int r = 0; r <= P; ++r) {
    V value = v[0] - v[0];
    if (r > 0) value += v[r - 1] * recip(P, r - 1);
    if (r < P) value -= v[r] * recip(P, r);
    w[r] = value * P;
  }
}

// The same derivative seen from the coefficients: d/dx sum_m c_m B_{m,p} = sum_m c'_m B_{m,p-1} with
//   c'_m = factor(m) * (c_m - c_{m-1}),   factor(m) = p / (t[m+p] - t[m]),   c_{-1} = c_M = 0.
// n such steps turn the n-th derivative into a spline of order k-n, whose window weights again sum to one.
template <class T>
KAN_INLINE T difference_factor(const T* knots, int p, int m) {
  T width = knots[m + p] - knots[m];
  return width > T(0) ? T(p) / width : T(0);
}

// Knots that differ from an even spacing by rounding alone take the closed form. Tolerance: a stored knot carries half
// an ulp of max|t|, the computed even knot t_0 + j h two more.
template <class T> struct EvenSpacing {
  T first, h, tolerance;
  KAN_INLINE EvenSpacing(const T* knots, int count, T epsilon) : first(knots[0]) {
    const T last = knots[count - 1];
    const T a = first < 0 ? -first : first, b = last < 0 ? -last : last;
    h = (last - first) / T(count - 1);
    tolerance = 4 * epsilon * (a > b ? a : b);
  }
  template <class V> KAN_INLINE V deviation(V knot, V j) const { return knot - (j * h + first); }
};
template <class T>
KAN_INLINE bool is_uniform(const T* knots, int count, T epsilon) {
  const EvenSpacing<T> even(knots, count, epsilon);
  bool uniform = even.h > even.tolerance;
  for (int j = 1; j < count - 1; ++j) {
    T off = even.deviation(knots[j], T(j));
    uniform = uniform && off <= even.tolerance && off >= -even.tolerance;
  }
  return uniform;
}

// The last j in [low, high] with knots[j] <= x (low if there is none).
template <class T>
KAN_INLINE int find_span(const T* knots, int low, int high, T x) {
  while (low < high) {
    int middle = (low + high + 1) >> 1;
    if (knots[middle] <= x) low = middle;
    else high = middle - 1;
  }
  return low;
}

}  // namespace kan
