// From inputs to features: the interval of x, the weights of its window, and the base activation, a SIMD vector at a time.
#pragma once
#include <math.h>

#include "../bspline.h"
#include "../kernels.h"
#include "simd.h"

namespace kan::cpu::KAN_ISA {

// Base activation and its derivative of order n, n >= 0. With s the sigmoid, q = s (1 - s) and t = tanh, r = 1 - t^2,
// every derivative is q (or r) times a polynomial; gelu's are the normal density times one:
//   s^(m) = q Q_m(s),  Q_1 = 1,  Q_{m+1} = (1 - 2 s) Q_m + (s - s^2) Q_m'        silu^(n) = x s^(n) + n s^(n-1)
//   t^(m) = r R_m(t),  R_1 = 1,  R_{m+1} = -2 t R_m + (1 - t^2) R_m'
//   gelu^(n) = density(x) * (-1)^n (n He_{n-2} - x He_{n-1})(x) for n >= 2       gelu' = Phi + x density
// q and r come from exp(-|x|), so that they keep their relative accuracy in the tails.
template <class T> struct ActivationTable {
  static constexpr int kMaxDegree = 40;
  int activation, n;
  int degree_high = 0, degree_low = 0;  // polynomials of order n and, for silu, n - 1
  T high[kMaxDegree + 1] = {}, low[kMaxDegree + 1] = {};

  ActivationTable(int activation, int n) : activation(activation), n(n) {
    if (activation == kSilu || activation == kTanh) {
      sigmoid_like(n, high, degree_high);
      if (activation == kSilu && n >= 2) sigmoid_like(n - 1, low, degree_low);
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
  void sigmoid_like(int order, T* out, int& degree) {
    double p[kMaxDegree + 2] = {1};
    for (int m = 1; m < order; ++m) {
      double next[kMaxDegree + 2] = {};
      for (int d = 0; d < m; ++d) {
        if (activation == kSilu) {
          next[d] += p[d] + d * p[d];
          next[d + 1] += -2 * p[d] - d * p[d];
        } else {
          next[d + 1] += -2 * p[d] - d * p[d];
          if (d > 0) next[d - 1] += d * p[d];
        }
      }
      memcpy(p, next, sizeof p);
    }
    degree = order > 0 ? order - 1 : 0;
    for (int d = 0; d <= degree; ++d) out[d] = T(p[d]);
  }
};

template <class T> KAN_INLINE Vec<T> polynomial(const T* c, int degree, Vec<T> x) {
  Vec<T> p = broadcast<T>(c[degree]);
  for (int d = degree - 1; d >= 0; --d) p = p * x + c[d];
  return p;
}

KAN_INLINE Vec<float> normal_cdf(Vec<float> x) {
  Vec<float> p;
  for (int lane = 0; lane < Simd<float>::N; ++lane) p[lane] = 0.5f * erfcf(-0.70710678118654752f * x[lane]);
  return p;
}
KAN_INLINE Vec<double> normal_cdf(Vec<double> x) {
  Vec<double> p;
  for (int lane = 0; lane < Simd<double>::N; ++lane) p[lane] = 0.5 * erfc(-0.70710678118654752440 * x[lane]);
  return p;
}

template <class T> inline Vec<T> activate_rare(const ActivationTable<T>& table, Vec<T> x) {
  using V = Vec<T>;
  const int n = table.n;
  V zero{}, one = broadcast<T>(1), value = zero;
  V magnitude = x > 0 ? x : -x;
  switch (table.activation) {
    case kSilu: {
      V e = exp_clamped(-magnitude);
      V s = (x > 0 ? one : e) / (1 + e), q = e / ((1 + e) * (1 + e));
      V lower = n == 1 ? s : q * polynomial<T>(table.low, table.degree_low, s) * T(n);
      value = x * q * polynomial<T>(table.high, table.degree_high, s) + lower;
      break;
    }
    case kIdentity: value = n == 0 ? x : n == 1 ? one : zero; break;
    case kRelu: value = n == 0 ? (x > 0 ? x : zero) : n == 1 ? (x > 0 ? one : zero) : zero; break;
    case kTanh: {
      V e = exp_clamped(-2 * magnitude);
      V t = (1 - e) / (1 + e);
      t = x > 0 ? t : -t;
      value = n == 0 ? t : 4 * e / ((1 + e) * (1 + e)) * polynomial<T>(table.high, table.degree_high, t);
      break;
    }
    case kGelu: {
      V density = exp_clamped(x * x * T(-0.5)) * T(0.39894228040143267794);
      value = n == 0   ? x * normal_cdf(x)
              : n == 1 ? normal_cdf(x) + x * density
                       : density * polynomial<T>(table.high, table.degree_high, x);
      break;
    }
  }
  return x == x ? value : x;
}

// silu and its first derivative, the two that every training step needs. exp(-x), not exp(-|x|): both the sigmoid
// 1 / (1 + e) and its complement e / (1 + e) keep their relative accuracy.
template <class T> KAN_INLINE void silu(Vec<T> x, Vec<T>& value, Vec<T>& slope) {
  const Vec<T> e = exp_clamped(-x), s = reciprocal<T>(1 + e);
  value = x * s;
  slope = s + value * (e * s);
}

template <class T> KAN_INLINE Vec<T> activate(const ActivationTable<T>& table, Vec<T> x) {
  if (table.activation == kSilu && table.n <= 1) {
    Vec<T> value, slope;
    silu<T>(x, value, slope);
    return table.n == 0 ? value : slope;
  }
  return activate_rare<T>(table, x);
}

// The knots of one input, prepared for lane-wise use: `order` more knots on either side (their bases have no
// coefficients, so any increasing values will do), and on non-uniform grids the reciprocal widths of de Boor's triangle.
template <class T> struct Knots {
  int order, count, padded;  // count: stored knots; padded: count + 2 order
  int low, high;             // intervals that x may fall into
  int steps;                 // largest power of two <= high - low, for the binary search
  bool uniform;
  T first, last;             // zero mode: first and last knot; else the range [a, b]
  T inverse_h, origin;
  T* t;                      // t[order + j] = knot j
  T* recip[kMaxOrder + 1];   // recip[p][order + m] = 1 / (t_{m+p} - t_m), p = 1 .. order

  static size_t scratch(int knots, int order) {
    return size_t(order + 1) * size_t(knots + 2 * order + 2 * Simd<T>::N);
  }
  void prepare(const T* stored, int knots, int spline_order, int outside, T* memory) {
    order = spline_order;
    count = knots;
    padded = knots + 2 * order;
    const int stride = padded + 2 * Simd<T>::N;
    t = memory;
    uniform = is_uniform(stored, count, Simd<T>::kEpsilon);
    T h = (stored[count - 1] - stored[0]) / T(count - 1);
    T step = h > 0 ? h : T(1);
    for (int j = 0; j < count; ++j) t[order + j] = stored[j];
    for (int j = 1; j <= order; ++j) {
      t[order - j] = stored[0] - T(j) * step;
      t[order + count - 1 + j] = stored[count - 1] + T(j) * step;
    }
    for (int j = padded; j < stride; ++j) t[j] = t[padded - 1];
    inverse_h = 1 / step;
    origin = stored[0];
    low = outside == kZero ? 0 : order;
    high = outside == kZero ? count - 2 : count - 2 - order;
    while (high > low && outside != kZero && !(stored[high] < stored[high + 1])) --high;
    first = stored[low];
    last = outside == kZero ? stored[count - 1] : stored[count - 1 - order];
    for (steps = 1; steps * 2 <= high - low; steps *= 2) {}
    if (high == low) steps = 0;
    if (!uniform)
      for (int p = 1; p <= order; ++p) {
        recip[p] = memory + ptrdiff_t(p) * stride;
        for (int j = 0; j < stride; ++j) {
          T width = j + p < stride ? t[j + p] - t[j] : T(0);
          recip[p][j] = width > 0 ? 1 / width : T(0);
        }
      }
  }
};

// The interval j of every lane (x already within [first, last] or NaN).
template <class T> KAN_INLINE VecInt<T> find_span(const Knots<T>& k, Vec<T> x) {
  using I = VecInt<T>;
  const I low = I{} + k.low, high = I{} + k.high;
  I j;
  if (k.uniform) {  // the even spacing guesses, the stored knots decide
    Vec<T> guess = (x - k.origin) * k.inverse_h;
    guess = guess > T(k.low) ? guess : broadcast<T>(T(k.low));
    guess = guess < T(k.high) ? guess : broadcast<T>(T(k.high));
    j = to_int<T>(guess);
    I below = (I)(x < lookup<T>(k.t + k.order, k.count, j));
    I above = (I)(x >= lookup<T>(k.t + k.order, k.count, j + 1));
    j = j + below - above;
    j = j < low ? low : j;
    j = j > high ? high : j;
  } else {
    j = low;
    for (int step = k.steps; step > 0; step >>= 1) {
      I candidate = j + step;
      candidate = candidate > high ? high : candidate;
      j = x >= lookup<T>(k.t + k.order, k.count, candidate) ? candidate : j;
    }
  }
  return j;
}

// Weights w[0 .. P] of the window of order P in interval j at x.
template <int P, class T> KAN_INLINE void window_weights(const Knots<T>& k, Vec<T> x, VecInt<T> j, Vec<T>* w) {
  using V = Vec<T>;
  const VecInt<T> at = j + k.order;
  if (k.uniform) {
    V u = (x - lookup<T>(k.t + k.order, k.count, j)) * k.inverse_h;
    uniform_basis<P, T>(broadcast<T>(1), u, w);
  } else {
    basis<P>(broadcast<T>(1), [&](int i) { return x - lookup<T>(k.t, k.padded, at + (1 - i)); },
             [&](int i) { return lookup<T>(k.t, k.padded, at + i) - x; },
             [&](int p, int r) { return lookup<T>(k.recip[p], k.padded, at + (1 - p + r)); }, w);
  }
  if (P == 0) w[0] = x == x ? w[0] : x;
}

// As window_weights, for d/dx of the window of order P.
template <int P, class T> KAN_INLINE void window_slopes(const Knots<T>& k, Vec<T> x, VecInt<T> j, Vec<T>* w) {
  const VecInt<T> at = j + k.order;
  if constexpr (P == 0) {
    w[0] = Vec<T>{};
  } else {
    Vec<T> v[P];
    window_weights<P - 1, T>(k, x, j, v);
    if (k.uniform) differentiate<P>(v, [&](int, int) { return k.inverse_h / T(P); }, w);
    else differentiate<P>(v, [&](int p, int r) { return lookup<T>(k.recip[p], k.padded, at + (1 - p + r)); }, w);
  }
}

// x where the window is evaluated: within [first, last] except in "zero" mode, where lanes outside have no window at all.
template <class T> KAN_INLINE Vec<T> into_range(const Knots<T>& k, Vec<T> x) {
  x = x < k.first ? broadcast<T>(k.first) : x;
  return x > k.last ? broadcast<T>(k.last) : x;
}

// Window weights of the n-th derivative, P = order - n >= 0, in interval j, in every `outside` mode.
template <int P, class T>
KAN_INLINE void spline_weights(const Knots<T>& k, int outside, int n, Vec<T> x, VecInt<T> j, Vec<T>* w) {
  using I = VecInt<T>;
  if (outside == kZero) return window_weights<P, T>(k, x, j, w);
  const Vec<T> inside = into_range<T>(k, x);
  window_weights<P, T>(k, inside, j, w);
  if (outside != kLinear || n != 0) return;
  I gone = (I)(x < k.first) | (I)(x > k.last);
  if (!any<T>(gone)) return;
  Vec<T> slope[P + 1], distance = gone ? x - inside : Vec<T>{};
  window_slopes<P, T>(k, inside, j, slope);
  KAN_UNROLL for (int m = 0; m <= P; ++m) w[m] += slope[m] * distance;
}

// Interval and window weights together. Lanes without any spline get interval high + 1 ("none").
template <int P, class T>
KAN_INLINE void spline_features(const Knots<T>& k, int outside, int n, Vec<T> x, VecInt<T>& j, Vec<T>* w) {
  using I = VecInt<T>;
  I gone = outside == kZero ? (I)(x < k.first) | (I)(x >= k.last) : (I)(x < k.first) | (I)(x > k.last);
  j = find_span<T>(k, into_range<T>(k, x));
  spline_weights<P, T>(k, outside, n, x, j, w);
  if (outside == kZero || (outside == kClamp ? n >= 1 : n >= 2)) j = gone ? I{} + (k.high + 1) : j;
}

}  // namespace kan::cpu::KAN_ISA
