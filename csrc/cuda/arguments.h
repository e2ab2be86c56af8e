// What a kernel is given by value, and what is known of one input's knots.
#pragma once
#include "../bspline.h"
#include "../kernels.h"

namespace kan::cuda {

enum class Operation { output, input, weight };

// Storage types of the narrow dtypes; arithmetic is float.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T> struct ComputeOf { using Type = float; };
template <> struct ComputeOf<double> { using Type = double; };

// Base activation of derivative order n; the polynomials are those of csrc/cpu/features.h.
template <class C> struct Activation {
  static constexpr int kMaxDegree = 40;
  int kind, n, degree_high, degree_low;
  C high[kMaxDegree + 1], low[kMaxDegree + 1];
};
template <class C> Activation<C> make_activation(int kind, int n);  // activation.cpp

// One input's knots: found once per launch (wide layers) or per block (narrow ones).
template <class C> struct alignas(8) Described {
  C inverse_h;    // 1 / spacing where the knots are even to a few ulp, else 0
  C middle;       // halfway between knots `middle_interval` and the next
  C first, last;  // "zero": first and last knot; else the range [a, b]
  C origin;       // the first knot
  int low, high;  // intervals that x may fall into
};
KAN_INLINE int middle_interval(int knots) { return (knots - 2) / 2; }

template <class C> struct Arguments {
  Problem p;
  Activation<C> activation;
};

template <class C> constexpr C kEpsilon = sizeof(C) == 8 ? C(2.220446049250313e-16) : C(1.1920929e-7f);
// The smallest number that is not denormal; its reciprocal is finite.
template <class C> constexpr C kSmallest = sizeof(C) == 8 ? C(2.2250738585072014e-308) : C(1.17549435e-38f);

template <class C> KAN_INLINE Described<C> describe(const Problem& p, const C* t, bool uniform) {
  const int count = p.knots(), order = p.spline_order;
  Described<C> d;
  d.origin = t[0];
  d.middle = C(0.5) * (t[middle_interval(count)] + t[middle_interval(count) + 1]);
  d.inverse_h = uniform ? C(count - 1) / (t[count - 1] - t[0]) : C(0);
  const bool zero = p.outside == kZero;
  d.low = zero ? 0 : order;
  d.high = zero ? count - 2 : count - 2 - order;
  // At x = b: the last interval that is not empty.
  while (!zero && d.high > d.low && !(t[d.high] < t[d.high + 1])) --d.high;
  d.first = t[d.low];
  d.last = zero ? t[count - 1] : t[count - 1 - order];
  return d;
}
template <class C> KAN_INLINE Described<C> describe(const Problem& p, const C* t) {
  return describe(p, t, is_uniform(t, p.knots(), kEpsilon<C>));
}

}  // namespace kan::cuda
