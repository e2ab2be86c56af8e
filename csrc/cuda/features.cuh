// From an input to its features: the interval of x, the window of its spline, the base activation.
#pragma once
#include <math.h>

#include "arguments.h"
#include "instructions.cuh"
#include "polynomials.h"

namespace kan::cuda {

// Numbers of any dtype.
KAN_DEVICE float number(float value) { return value; }
KAN_DEVICE double number(double value) { return value; }
KAN_DEVICE float number(BFloat16 value) { return from_bfloat16(value.bits); }
KAN_DEVICE float number(Float16 value) { return from_float16(value.bits); }
KAN_DEVICE void put(float& to, float value) { to = value; }
KAN_DEVICE void put(double& to, double value) { to = value; }
KAN_DEVICE void put(BFloat16& to, float value) { to.bits = to_bfloat16(value); }
KAN_DEVICE void put(Float16& to, float value) { to.bits = to_float16(value); }

// Element i of x or scale, whose dtype is known at run time only: the branch is the same for all threads.
template <class C> KAN_DEVICE C read(const void* data, int64_t i, int dtype) {
  if constexpr (sizeof(C) == 8) return static_cast<const double*>(data)[i];
  else if (dtype == kFloat32) return static_cast<const float*>(data)[i];
  else if (dtype == kBFloat16) return number(static_cast<const BFloat16*>(data)[i]);
  else return number(static_cast<const Float16*>(data)[i]);
}
template <class C> KAN_DEVICE void write(void* data, int64_t i, int dtype, C value) {
  if constexpr (sizeof(C) == 8) static_cast<double*>(data)[i] = value;
  else if (dtype == kFloat32) static_cast<float*>(data)[i] = value;
  else if (dtype == kBFloat16) put(static_cast<BFloat16*>(data)[i], value);
  else put(static_cast<Float16*>(data)[i], value);
}

KAN_DEVICE float exponential(float x) { return expf(x); }
KAN_DEVICE double exponential(double x) { return exp(x); }
KAN_DEVICE float normal_cdf(float x) { return 0.5f * erfcf(-0.70710678118654752f * x); }
KAN_DEVICE double normal_cdf(double x) { return 0.5 * erfc(-0.70710678118654752440 * x); }

template <class C> KAN_DEVICE C polynomial(const C* c, int degree, C x) {
  C sum = c[degree];
  for (int d = degree - 1; d >= 0; --d) sum = sum * x + c[d];
  return sum;
}

// silu or its first derivative, with s = 1 / (1 + e), e = exp(-x), and s' = e s^2: nothing cancels. Rounding the argument of
// the exponential errs as much as rounding x would. Where x is held, s is 1e-35.
template <int N, class C> KAN_DEVICE C silu(C x) {
  const C reach = sizeof(C) == 8 ? C(700) : C(80), near = N == 0 ? larger(x, -reach) : held(x, -reach, reach);
  const C e = power_of_two(near * C(-1.4426950408889634074)), s = reciprocal_of_normal(1 + e);
  return N == 0 ? near * s : near * (e * s * s) + s;
}

// Base activation, derivative of order a.n, at x; formulas beside ActivationTable in csrc/cpu/features.h. Beyond `reach` the
// smooth ones and their derivatives are at their limits; a larger |x| would make denormals, whose reciprocal overflows, and
// multiply what is 1e-35 instead of 0. Only the value of order 0 goes on above it.
template <class C> KAN_DEVICE C activate(const Activation<C>& a, C x) {
  const int n = a.n;
  const C bound = sizeof(C) == 8 ? C(700) : C(80);
  const C reach = a.kind == kTanh ? bound / 2 : a.kind == kGelu ? C(sizeof(C) == 8 ? 37.4 : 12.6) : bound;
  const C above = x > -reach ? x : -reach, near = above < reach ? above : reach, magnitude = near > 0 ? near : -near;
  C value = 0;
  switch (a.kind) {
    case kSilu: {
      if (n == 0) value = silu<0>(x);
      else if (n == 1) value = silu<1>(x);
      else {
        const C e = exponential(-magnitude), r = reciprocal(1 + e), v = (near > 0 ? 1 - e : e - 1) * r;
        value = e * r * r * (near * polynomial(a.high, a.degree_high, v) + polynomial(a.low, a.degree_low, v));
      }
      break;
    }
    case kIdentity: value = n == 0 ? x : n == 1 ? C(1) : C(0); break;
    case kRelu: value = !(x > 0) ? C(0) : n == 0 ? x : n == 1 ? C(1) : C(0); break;
    case kTanh: {
      const C e = exponential(-2 * magnitude), r = reciprocal(1 + e);
      const C t = (near > 0 ? 1 - e : e - 1) * r;
      value = n == 0 ? t : 4 * e * r * r * polynomial(a.high, a.degree_high, t);
      break;
    }
    case kGelu: {
      const C density = exponential(near * near * C(-0.5)) * C(0.39894228040143267794);
      value = n == 0   ? above * normal_cdf(near)
              : n == 1 ? normal_cdf(near) + near * density
                       : density * polynomial(a.high, a.degree_high, near);
      break;
    }
    default: break;
  }
  return x == x ? value : x;
}

// The same in place of each of several x. silu's chains of instructions mix; the others' code is there once, and the numbers move
// along: registers have no index.
template <class C, int kCount> KAN_DEVICE void activate_all(const Activation<C>& a, C (&x)[kCount]) {
  if (a.kind == kSilu && a.n == 0) {
    KAN_UNROLL_ALL
    for (int m = 0; m < kCount; ++m) x[m] = silu<0>(x[m]);
  } else if (a.kind == kSilu && a.n == 1) {
    KAN_UNROLL_ALL
    for (int m = 0; m < kCount; ++m) x[m] = silu<1>(x[m]);
  } else {
    KAN_NO_UNROLL
    for (int m = 0; m < kCount; ++m) {
      const C value = activate(a, x[0]);
      KAN_UNROLL_ALL
      for (int r = 1; r < kCount; ++r) x[r - 1] = x[r];
      x[kCount - 1] = value;
    }
  }
}

// is_uniform() of bspline.h by kLanes neighbouring lanes, a knot to a lane; all lanes of the warp call it.
template <int kLanes, class C> KAN_DEVICE bool is_uniform_by_lanes(const C* t, int count, int lane) {
  const EvenSpacing<C> even(t, count, kEpsilon<C>);
  int off = 0;
  for (int j = 1 + lane; j < count - 1; j += kLanes) {
    const C deviation = even.deviation(t[j], C(j));
    if (!(deviation <= even.tolerance && deviation >= -even.tolerance)) off = 1;
  }
  for (int mask = kLanes / 2; mask > 0; mask /= 2) off |= shuffle_xor(off, mask);
  return even.h > even.tolerance && off == 0;
}

// The interval of x, which lies within [d.first, d.last].
template <class C> KAN_DEVICE int interval(const C* t, const Described<C>& d, C x) {
  if (!(d.inverse_h > 0)) return find_span(t, d.low, d.high, x);
  // The even spacing guesses, the stored knots decide.
  C guess = (x - d.origin) * d.inverse_h;
  guess = guess > C(d.low) ? guess : C(d.low);
  guess = guess < C(d.high) ? guess : C(d.high);
  int j = int(guess);
  j += int(x >= t[j + 1]) - int(x < t[j]);
  j = j > d.low ? j : d.low;
  return j < d.high ? j : d.high;
}

// The N-th derivative of the K + 1 bases of order K in the window of interval j. Bases that do not exist (their knots reach
// beyond the stored ones) come out as any finite number.
template <int K, int N, class C> KAN_DEVICE void derivative(const C* t, int count, C inverse_h, C x, int j, C* w) {
  if (inverse_h > 0) {
    uniform_basis<K - N, C>(C(1), (x - t[j]) * inverse_h, w);
    differentiate_up<K - N + 1, K>([&](int p, int) { return inverse_h * (1 / C(p)); }, w);
  } else {
    C near[2 * K + 1];  // knots j + 1 - K .. j + K
    KAN_UNROLL_WINDOW
    for (int m = 0; m < 2 * K; ++m) {
      int at = j + 1 - K + m;
      at = at > 0 ? at : 0;
      near[m] = t[at < count ? at : count - 1];
    }
    auto inverse = [&](int p, int r) {
      const C width = near[K + r] - near[K - p + r];
      return width > 0 ? reciprocal(width) : C(0);
    };
    basis<K - N>(C(1), [&](int i) { return x - near[K - i]; }, [&](int i) { return near[K - 1 + i] - x; }, inverse, w);
    differentiate_up<K - N + 1, K>(inverse, w);
  }
}

template <int K, int N, class C>
KAN_DEVICE void derivative_of_order(const C* t, int count, C inverse_h, C x, int j, int n, C* w) {
  if constexpr (N <= K) {
    if (n == N) derivative<K, N>(t, count, inverse_h, x, j, w);
    else derivative_of_order<K, N + 1>(t, count, inverse_h, x, j, n, w);
  } else {
    KAN_UNROLL_WINDOW
    for (int q = 0; q <= K; ++q) w[q] = 0;
  }
}

// w[0 .. K]: scale times the n-th derivative at x of bases `first` .. `first` + K, in every `outside` mode; those that do not
// exist (below 0 or beyond the last) come out as 0. The result is `first`. NaN in x: all w NaN, `first` a valid index.
template <int K, class C>
KAN_DEVICE int window_of_order(const Problem& p, const C* t, const Described<C>& d, C x, C scale, C* w) {
  const bool zero = p.outside == kZero;
  C at = x == x ? x : d.first;
  at = at > d.first ? at : d.first;
  at = at < d.last ? at : d.last;
  const bool beyond = x != at || (zero && !(x < d.last));
  const int j = interval(t, d, at);
  derivative_of_order<K, 0>(t, p.knots(), d.inverse_h, at, j, p.n, w);
  if (beyond) {
    const bool gone = zero || p.n > int(p.outside == kLinear);
    C slope[K + 1] = {};
    if (p.outside == kLinear && p.n == 0) derivative_of_order<K, 0>(t, p.knots(), d.inverse_h, at, j, 1, slope);
    const C distance = p.outside == kLinear ? x - at : C(0);
    KAN_UNROLL_WINDOW
    for (int q = 0; q <= K; ++q) w[q] = x != x ? x : gone ? C(0) : w[q] + slope[q] * distance;
  }
  const int first = j - K;
  KAN_UNROLL_WINDOW
  for (int q = 0; q <= K; ++q) w[q] = first + q >= 0 && first + q < p.bases() ? w[q] * scale : C(0);
  return first;
}

// The same for any order up to kMost; w[0 .. kMost], zeros at the end.
template <int kMost, class C>
KAN_DEVICE int window(const Problem& p, const C* t, const Described<C>& d, C x, C scale, C* w) {
  KAN_UNROLL_WINDOW
  for (int q = 0; q <= kMost; ++q) w[q] = 0;
  switch (p.spline_order) {
    case 0: return window_of_order<0>(p, t, d, x, scale, w);
    case 1: return window_of_order<1>(p, t, d, x, scale, w);
    case 2: return window_of_order<2>(p, t, d, x, scale, w);
    case 3: return window_of_order<3>(p, t, d, x, scale, w);
  }
  if constexpr (kMost >= 5) return p.spline_order == 4 ? window_of_order<4>(p, t, d, x, scale, w)
                                                       : window_of_order<5>(p, t, d, x, scale, w);
  return 0;
}

}  // namespace kan::cuda
