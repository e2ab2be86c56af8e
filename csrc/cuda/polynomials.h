// The window of a spline of order up to 3 as four cubics in u = (x - t_j) / (t_{j+1} - t_j), the place within the interval:
// the formulas of bspline.h, run on polynomials in place of numbers. 12 multiply-adds then evaluate any order and derivative.
#pragma once
#include "arguments.h"

namespace kan::cuda {

constexpr int kMaxCubicOrder = 3;
constexpr float kToNearest = 12582912.0f;  // 1.5 2^23, where float32 numbers are 1 apart

template <class C> struct alignas(16) CubicOf {
  C c[4];  // c[0] + c[1] u + c[2] u^2 + c[3] u^3

  KAN_INLINE C at(C u) const { return ((c[3] * u + c[2]) * u + c[1]) * u + c[0]; }
  KAN_INLINE C slope_at(C u) const { return (3 * c[3] * u + 2 * c[2]) * u + c[1]; }

  friend KAN_INLINE CubicOf operator+(const CubicOf& a, const CubicOf& b) {
    return {{a.c[0] + b.c[0], a.c[1] + b.c[1], a.c[2] + b.c[2], a.c[3] + b.c[3]}};
  }
  friend KAN_INLINE CubicOf operator-(const CubicOf& a, const CubicOf& b) {
    return {{a.c[0] - b.c[0], a.c[1] - b.c[1], a.c[2] - b.c[2], a.c[3] - b.c[3]}};
  }
  friend KAN_INLINE CubicOf operator*(const CubicOf& a, C s) { return {{a.c[0] * s, a.c[1] * s, a.c[2] * s, a.c[3] * s}}; }
  // Of degree 3 or less, as all products here are.
  friend KAN_INLINE CubicOf operator*(const CubicOf& a, const CubicOf& b) {
    return {{a.c[0] * b.c[0], a.c[0] * b.c[1] + a.c[1] * b.c[0], a.c[0] * b.c[2] + a.c[1] * b.c[1] + a.c[2] * b.c[0],
             a.c[0] * b.c[3] + a.c[1] * b.c[2] + a.c[2] * b.c[1] + a.c[3] * b.c[0]}};
  }
  KAN_INLINE CubicOf& operator+=(const CubicOf& b) { return *this = *this + b; }
  KAN_INLINE CubicOf& operator-=(const CubicOf& b) { return *this = *this - b; }
};
using Cubic = CubicOf<float>;

// w: the values of order P - 1 in a window become the derivatives of order P, and so on up to K.
template <int P, int K, class V, class Inverse> KAN_INLINE void differentiate_up(Inverse inverse, V* w) {
  if constexpr (P <= K) {
    V v[P];
    KAN_UNROLL_WINDOW
    for (int r = 0; r < P; ++r) v[r] = w[r];
    differentiate<P>(v, inverse, w);
    differentiate_up<P + 1, K>(inverse, w);
  }
}

// n-th derivative of the window of order K in interval j; knots beyond the stored ones are of no consequence.
template <int K, int N, class C> KAN_INLINE void cubics_of_order(const C* t, int count, int j, int n, CubicOf<C>* w) {
  if constexpr (N <= K) {
    if (n != N) return cubics_of_order<K, N + 1>(t, count, j, n, w);
    C near[2 * K + 1];  // knots j + 1 - K .. j + K
    KAN_UNROLL_WINDOW
    for (int m = 0; m < 2 * K; ++m) {
      int at = j + 1 - K + m;
      at = at > 0 ? at : 0;
      near[m] = t[at < count ? at : count - 1];
    }
    const C here = t[j], width = t[j + 1] - here;
    auto inverse = [&](int p, int r) {
      const C support = near[K + r] - near[K - p + r];
      return support > 0 ? 1 / support : C(0);
    };
    basis<K - N>(CubicOf<C>{{1, 0, 0, 0}}, [&](int i) { return CubicOf<C>{{here - near[K - i], width, 0, 0}}; },
                 [&](int i) { return CubicOf<C>{{near[K - 1 + i] - here, -width, 0, 0}}; }, inverse, w);
    differentiate_up<K - N + 1, K>(inverse, w);
  }
}

// w[0 .. 3]; what an order below 3 lacks is zero, and so is a derivative above the order.
template <class C> KAN_INLINE void make_cubics(const C* t, int count, int order, int j, int n, CubicOf<C>* w) {
  for (int q = 0; q <= kMaxCubicOrder; ++q) w[q] = CubicOf<C>{};
  if (order == 0) cubics_of_order<0, 0>(t, count, j, n, w);
  else if (order == 1) cubics_of_order<1, 0>(t, count, j, n, w);
  else if (order == 2) cubics_of_order<2, 0>(t, count, j, n, w);
  else cubics_of_order<3, 0>(t, count, j, n, w);
}

// The same for knots 1 apart; knots h apart: times 1 / h^n.
template <class C> inline void make_uniform_cubics(const Problem& p, CubicOf<C>* w) {
  constexpr int kKnots = 2 * kMaxCubicOrder + 2;
  C knots[kKnots];
  for (int j = 0; j < kKnots; ++j) knots[j] = C(j);
  make_cubics(knots, kKnots, p.spline_order, p.spline_order, p.n, w);
}

// How quick.cuh evaluates a spline on even knots; a place is counted as even_interval (wide.cuh) does.
struct Quick {
  bool serves;            // plain values, eight inputs at a time
  bool mirrored;          // the window's weights q and 3 - q at v and -v are the same
  float lowest, highest;  // where a place is kept
  uint32_t first;         // 8 times the bits of kToNearest + the interval whose window begins with basis 0
  uint32_t least, span;   // served: windows that begin with basis least / 8, below 0 or not, and as many further as span / 8
  uint32_t whole;         // 8 times how many places a window may begin at to lie within eight bases, 0 where that does not suffice
  uint32_t zeros;         // for permute_bytes, four times: the sign of a weight that is never below 0
};

// What the wide kernels are given. `uniform`: the cubics of knots 1 apart; `uneven` (in_features, knots - 1, 4): of all others.
struct WideArguments {
  Problem p;
  Activation<float> activation;
  const Described<float>* described;
  const Cubic* uneven;
  Cubic uniform[kMaxCubicOrder + 1];
  bool aligned;  // rows of weights and of g begin at multiples of 16 bytes
  // On even knots: the cubics of v = u - 1/2; whether it does not matter which of two intervals a knot is counted to, for the
  // result is continuous there; whether it is 0 beyond Described's first and last.
  Cubic centred[kMaxCubicOrder + 1];
  bool continuous, vanishes;
  Quick quick;
};

// Bytes of `uneven` behind `described`, and the arguments themselves.
inline size_t size_of_cubics(const Problem& p) { return size_t(p.in_features) * size_t(p.knots() - 1) * 4 * sizeof(Cubic); }
WideArguments make_wide(const Problem& p, void* workspace, size_t offset_of_cubics);  // activation.cpp
int launch_cubics(const WideArguments&, void* stream);                              // polynomials.cu

}  // namespace kan::cuda
