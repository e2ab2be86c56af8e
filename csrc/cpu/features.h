// From inputs to features: the interval of x, the weights of its window, and the base activation, some vectors at a time.
#pragma once
#include <math.h>

#include "../bspline.h"
#include "../kernels.h"
#include "lanes.h"

namespace kan::cpu::KAN_ISA {

// Base activation and its derivative of order n, n >= 0. With t = tanh and r = 1 - t^2 every derivative of tanh is r times a
// polynomial in t; those of the sigmoid, (1 + tanh(x / 2)) / 2, follow; gelu's are the normal density times a polynomial in x:
//   t^(m) = r R_m(t),  R_1 = 1,  R_{m+1} = -2 t R_m + (1 - t^2) R_m'
//   silu^(n) = x s^(n) + n s^(n-1),  s^(m) = q R_m(v) / 2^(m-1)  with s the sigmoid, v = tanh(x / 2), q = s (1 - s)
//   gelu^(n) = density(x) * (-1)^n (n He_{n-2} - x He_{n-1})(x) for n >= 2       gelu' = Phi + x density
// q and r come from exp(-|x|), so that they keep their relative accuracy in the tails. A polynomial in s would lose 200 epsilons
// by n = 7, by terms of the order of n! that cancel towards s = 1.
template <class T> struct ActivationTable {
  static constexpr int kMaxDegree = 40;
  int activation, n;
  T reach;  // beyond it the smooth activations and their derivatives are at their limits
  int degree_high = 0, degree_low = 0;
  T high[kMaxDegree + 1] = {}, low[kMaxDegree + 1] = {};  // silu^(n) = q (x high(v) + low(v)); the others have high alone

  bool is_silu(int order) const { return activation == kSilu && n == order; }
  ActivationTable(int activation, int n) : activation(activation), n(n), reach(Exponential<T>::limit) {
    if (activation == kTanh) reach /= 2;                            // exp(-2 |x|)
    if (activation == kGelu) reach = T(sqrt(2 * double(reach)));    // exp(-x^2 / 2)
    if (activation == kTanh) {
      tanh_like(n, 1, high, degree_high);
    } else if (activation == kSilu && n >= 2) {
      tanh_like(n, ldexp(1, 1 - n), high, degree_high);
      tanh_like(n - 1, n * ldexp(1, 2 - n), low, degree_low);
    } else if (activation == kGelu && n >= 2) {
      double a[kMaxDegree + 2] = {1}, b[kMaxDegree + 2] = {0, 1};  // He_0, He_1
      for (int m = 2; m <= n - 1; ++m) {                           // He_m = x He_{m-1} - (m-1) He_{m-2}
        double c[kMaxDegree + 2] = {};
        for (int d = 0; d <= m; ++d) c[d] = (d > 0 ? b[d - 1] : 0) - (m - 1) * a[d];
        memcpy(a, b, sizeof a);
        memcpy(b, c, sizeof b);
      }
      double sign = n % 2 ? -1 : 1;
      degree_high = n;
      for (int d = 0; d <= n; ++d) high[d] = T(sign * (n * a[d] - (d > 0 ? b[d - 1] : 0)));
    }
  }

 private:
  // scale * R_order
  void tanh_like(int order, double scale, T* out, int& degree) {
    double p[kMaxDegree + 2] = {scale};
    for (int m = 1; m < order; ++m) {
      double next[kMaxDegree + 2] = {};
      for (int d = 0; d < m; ++d) {
        next[d + 1] -= (2 + d) * p[d];
        if (d > 0) next[d - 1] += d * p[d];
      }
      memcpy(p, next, sizeof p);
    }
    degree = order > 0 ? order - 1 : 0;
    for (int d = 0; d <= degree; ++d) out[d] = T(p[d]);
  }
};

template <class T, int Q> KAN_INLINE Lanes<T, Q> polynomial(const T* c, int degree, Lanes<T, Q> x) {
  Lanes<T, Q> p = all<T, Q>(c[degree]);
  for (int d = degree - 1; d >= 0; --d) p = p * x + c[d];
  return p;
}

KAN_INLINE float complementary_error(float x) { return erfcf(x); }
KAN_INLINE double complementary_error(double x) { return erfc(x); }
template <class T, int Q> KAN_INLINE Lanes<T, Q> normal_cdf(Lanes<T, Q> x) {
  Lanes<T, Q> p;
  for (int q = 0; q < Q; ++q)
    for (int lane = 0; lane < Simd<T>::N; ++lane)
      p.v[q][lane] = T(0.5) * complementary_error(T(-0.70710678118654752440) * x.v[q][lane]);
  return p;
}

// silu and its first derivative, the two that every training step needs. exp(-x), not exp(-|x|): both the sigmoid
// 1 / (1 + e) and its complement e / (1 + e) keep their relative accuracy. The value is that of x = -limit below it, 1e-33 of
// zero, and x itself far above; the slope's factor x is bounded on both sides, or a large one would bring 1e-35 back.
template <class T, int Q> KAN_INLINE void silu(Lanes<T, Q> x, Lanes<T, Q>& value, Lanes<T, Q>& slope) {
  const Lanes<T, Q> above = not_below(-Exponential<T>::limit, x), near = not_above(Exponential<T>::limit, above);
  const Lanes<T, Q> e = exponential(-near), s = reciprocal(T(1) + e);
  value = above * s;
  slope = s + near * s * (e * s);
}

template <class T, int Q> KAN_INLINE Lanes<T, Q> activate(const ActivationTable<T>& table, Lanes<T, Q> x) {
  using L = Lanes<T, Q>;
  const int n = table.n;
  const L zero = all<T, Q>(0), one = all<T, Q>(1);
  if (table.is_silu(0) || table.is_silu(1)) {
    L value, slope;
    silu(x, value, slope);
    return n == 0 ? value : slope;
  }
  const L above = not_below(-table.reach, x), near = not_above(table.reach, above);
  const L magnitude = select(near > zero, near, -near);
  L value = zero;
  switch (table.activation) {
    case kSilu: {
      const L e = exponential(-magnitude), r = one / (one + e), half = (one - e) * r;
      const L v = select(near > zero, half, -half);
      const L sum = near * polynomial(table.high, table.degree_high, v) + polynomial(table.low, table.degree_low, v);
      value = e * r * r * sum;
      break;
    }
    case kIdentity: value = n == 0 ? x : n == 1 ? one : zero; break;
    case kRelu: value = n == 0 ? select(x > zero, x, zero) : n == 1 ? select(x > zero, one, zero) : zero; break;
    case kTanh: {
      const L e = exponential(magnitude * T(-2)), r = one / (one + e);
      L t = (one - e) * r;
      t = select(near > zero, t, -t);
      value = n == 0 ? t : e * r * r * T(4) * polynomial(table.high, table.degree_high, t);
      break;
    }
    case kGelu: {
      const L density = exponential(near * near * T(-0.5)) * T(0.39894228040143267794);
      value = n == 0   ? above * normal_cdf(near)
              : n == 1 ? normal_cdf(near) + near * density
                       : density * polynomial(table.high, table.degree_high, near);
      break;
    }
  }
  return select(x == x, value, x);
}
template <class T> KAN_INLINE Vec<T> activate(const ActivationTable<T>& table, Vec<T> x) {
  return activate(table, Lanes<T, 1>{{x}}).v[0];
}

// The knots of one input, prepared for lane-wise use: `order` more knots on either side (their bases have no
// coefficients, so any increasing values will do), and on non-uniform grids the reciprocal widths of de Boor's triangle and
// cells: [first, last] cut evenly into kTableBytes. An x meets its cell by the very operations that its knots met theirs, and these
// are monotone; so its interval is that of the cell's lower end or one of as many after it as knots fell into the cell. A binary
// search among those is one comparison on most grids, where one among all intervals of grid_size 5 takes four.
template <class T> struct Knots {
  int order, count, padded;  // count: stored knots; padded: count + 2 order
  int low, high;             // intervals that x may fall into
  int steps;                 // largest power of two <= most knots in a cell
  bool uniform;
  T cells_per_unit;
  uint8_t below[kTableBytes];  // interval of a cell's lower end, less `low`
  T first, last;             // zero mode: first and last knot; else the range [a, b]
  T inverse_h, origin;
  T* t;                      // t[order + j] = knot j
  T* recip[kMaxOrder + 1];   // recip[p][order + m] = 1 / (t_{m+p} - t_m), p = 1 .. order

  // Rows of knots and reciprocals, each readable a whole vector beyond its end.
  static size_t scratch(int knots, int order) {
    return size_t(order + 1) * size_t(knots + 2 * order + 2 * Simd<T>::N);
  }
  void prepare(const T* stored, int knots, int spline_order, int outside, T* memory) {
    order = spline_order;
    count = knots;
    padded = knots + 2 * order;
    const int stride = padded + 2 * Simd<T>::N;
    t = memory;
    constexpr int N = Simd<T>::N;
    const EvenSpacing<T> even(stored, count, Simd<T>::kEpsilon);
    const T step = even.h > 0 ? even.h : T(1);
    T* real = t + order;
    memcpy(real, stored, sizeof(T) * size_t(count));
    for (int j = 1; j <= order; ++j) {
      t[order - j] = stored[0] - T(j) * step;
      real[count - 1 + j] = stored[count - 1] + T(j) * step;
    }
    store<T>(t + padded, broadcast<T>(t[padded - 1]));
    store<T>(t + padded + N, broadcast<T>(t[padded - 1]));
    Vec<T> index, worst{};
    for (int lane = 0; lane < N; ++lane) index[lane] = T(lane);
    for (int j = 0; j < count; j += N, index += T(N)) {
      const Vec<T> off = even.deviation(load<T>(real + j), index), size = off < 0 ? -off : off;
      worst = index < T(count) && size > worst ? size : worst;
    }
    uniform = even.h > even.tolerance && !any<T>((VecInt<T>)(worst > even.tolerance));
    inverse_h = 1 / step;
    origin = stored[0];
    low = outside == kZero ? 0 : order;
    high = outside == kZero ? count - 2 : count - 2 - order;
    while (high > low && outside != kZero && !(stored[high] < stored[high + 1])) --high;
    first = stored[low];
    last = outside == kZero ? stored[count - 1] : stored[count - 1 - order];
    if (uniform) return;
    cut_into_cells();
    for (int p = 1; p <= order; ++p) {
      recip[p] = memory + ptrdiff_t(p) * stride;
      for (int j = 0; j < stride; ++j) {
        T width = j + p < stride ? t[j + p] - t[j] : T(0);
        recip[p][j] = width > 0 ? 1 / width : T(0);
      }
    }
  }
  // NaN lies in cell 0. x may lie beyond the range.
  template <int Q> KAN_INLINE LanesInt<T, Q> cell(Lanes<T, Q> x) const {
    return to_int(at_most(at_least((x - first) * cells_per_unit, T(0)), T(kTableBytes - 1)));
  }

 private:
  void cut_into_cells() {
    constexpr int N = Simd<T>::N;
    const T* real = t + order;
    cells_per_unit = T(kTableBytes) / (last - first);
    // Too many intervals for a byte, or a range that has no such number: one cell holds everything.
    if (high - low > 255 || !(cells_per_unit > 0 && cells_per_unit * T(0) == 0)) cells_per_unit = 0;
    uint8_t written[2 * kTableBytes] = {};
    int most = 0, run = 0, before = -1;
    for (int j = low + 1; j <= high; j += N) {
      const VecInt<T> cells = cell(Lanes<T, 1>{{load<T>(real + j)}}).v[0];
      for (int lane = 0; lane < N && j + lane <= high; ++lane) {
        const int here = int(cells[lane]);
        run = here == before ? run + 1 : 1;
        most = larger(most, run);
        before = here;
        if (cells_per_unit > 0) memset(written + here + 1, j + lane - low, kTableBytes);
      }
    }
    memcpy(below, written, kTableBytes);
    for (steps = 1; steps * 2 <= most; steps *= 2) {}
    if (most == 0) steps = 0;
  }
};

// The knots and reciprocals that windows of the intervals reach begin behind the first one stored and end before the last: of
// grid_size 20 and order 3, two registers of 16.
constexpr int kFirstReached = 1;
template <class T> KAN_INLINE int reached(const Knots<T>& k) { return k.padded - 2 * kFirstReached; }

// x where the window is evaluated: within [first, last], or NaN.
template <class T, int Q> KAN_INLINE Lanes<T, Q> into_range(const Knots<T>& k, Lanes<T, Q> x) {
  x = select(x < k.first, all<T, Q>(k.first), x);
  return select(x > k.last, all<T, Q>(k.last), x);
}
template <class T> KAN_INLINE Vec<T> into_range(const Knots<T>& k, Vec<T> x) { return into_range(k, Lanes<T, 1>{{x}}).v[0]; }

// The interval j of every lane (x already within [first, last] or NaN), and on even knots its coordinate u = (x - t_j) / h.
// There the even spacing guesses. EXACT: the stored knots decide; else x within a rounding of a knot may get the interval
// beside it, with u that much below 0 or above 1, which costs windows of order P the P-th power of that rounding.
template <bool EXACT, class T, int Q>
KAN_INLINE LanesInt<T, Q> find_span(const Knots<T>& k, Lanes<T, Q> x, Lanes<T, Q>& u) {
  using I = LanesInt<T, Q>;
  if (k.uniform) {
    I j = to_int(at_most(at_least((x - k.origin) * k.inverse_h, T(k.low)), T(k.high)));
    if constexpr (EXACT) {
      const I below = x < lookup(k.t + k.order, k.count, j), above = x >= lookup(k.t + k.order, k.count, j + 1);
      j = j + below - above;
      j = select(j < k.low, all_int<T, Q>(k.low), j);
      j = select(j > k.high, all_int<T, Q>(k.high), j);
    }
    u = (x - lookup(k.t + k.order, k.count, j)) * k.inverse_h;
    return j;
  }
  I j = lookup_byte(k.below, k.cell(x)) + k.low;
  for (int step = k.steps; step > 0; step >>= 1) {
    I candidate = j + step;
    candidate = select(candidate > k.high, all_int<T, Q>(k.high), candidate);
    j = select(x >= lookup(k.t + k.order, k.count, candidate), candidate, j);
  }
  u = x;
  return j;
}

// Weights w[0 .. P] of the window of order P in interval j at x, or at u on even knots.
template <int P, class T, int Q>
KAN_INLINE void window_weights(const Knots<T>& k, Lanes<T, Q> x, Lanes<T, Q> u, LanesInt<T, Q> j, Lanes<T, Q>* w) {
  const Lanes<T, Q> one = all<T, Q>(1);
  if (k.uniform) {
    uniform_basis<P, T>(one, u, w);
  } else {
    const LanesInt<T, Q> at = j + (k.order - kFirstReached);
    const T* t = k.t + kFirstReached;
    basis<P>(one, [&](int i) { return x - lookup(t, reached(k), at + (1 - i)); },
             [&](int i) { return lookup(t, reached(k), at + i) - x; },
             [&](int p, int r) { return lookup(k.recip[p] + kFirstReached, reached(k), at + (1 - p + r)); }, w);
  }
  if (P == 0) w[0] = select(x == x, w[0], x);
}

// As window_weights, for d/dx of the window of order P.
template <int P, class T, int Q>
KAN_INLINE void window_slopes(const Knots<T>& k, Lanes<T, Q> x, Lanes<T, Q> u, LanesInt<T, Q> j, Lanes<T, Q>* w) {
  if constexpr (P == 0) {
    w[0] = all<T, Q>(0);
  } else {
    Lanes<T, Q> v[P];
    window_weights<P - 1>(k, x, u, j, v);
    if (k.uniform) {
      differentiate<P>(v, [&](int, int) { return k.inverse_h / T(P); }, w);
    } else {
      const LanesInt<T, Q> at = j + (k.order - kFirstReached);
      differentiate<P>(v, [&](int p, int r) { return lookup(k.recip[p] + kFirstReached, reached(k), at + (1 - p + r)); }, w);
    }
  }
}

}  // namespace kan::cpu::KAN_ISA
