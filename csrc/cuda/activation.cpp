// Arguments made on the host: the polynomials of the base activation's derivatives, as the CPU kernels have them, and those of
// a spline on even knots.
#include "../cpu/features.h"
#include "polynomials.h"

#include <bit>

namespace kan::cuda {

template <class C> Activation<C> make_activation(int kind, int n) {
  const cpu::KAN_ISA::ActivationTable<C> table(kind, n);
  Activation<C> a{kind, n, table.degree_high, table.degree_low, {}, {}};
  for (int d = 0; d <= table.degree_high; ++d) a.high[d] = table.high[d];
  for (int d = 0; d <= table.degree_low; ++d) a.low[d] = table.low[d];
  return a;
}

template Activation<float> make_activation<float>(int, int);
template Activation<double> make_activation<double>(int, int);

// On even knots the window's second weight is far above 0, or its third one 0 where order 1 has none: bytes 3 and 5 of a packed
// window are their signs.
Quick make_quick(const Problem& p, bool continuous) {
  const int middle = middle_interval(p.knots()), order = p.spline_order;
  Quick q;
  q.serves = continuous && p.n == 0 && p.scale == nullptr && p.in_features % 8 == 0 && reinterpret_cast<uintptr_t>(p.x) % 16 == 0;
  q.mirrored = order == 3;
  // Beyond the last knots: the next interval, which has no basis.
  q.lowest = float(-1 - middle), q.highest = float(p.knots() - 1 - middle);
  if (p.outside == kClamp) q.lowest = float(order - middle) - 0.5f, q.highest = float(order + p.grid_size - middle) - 0.5f;
  if (p.outside == kLinear) q.lowest = -1048576.0f, q.highest = 1048576.0f;
  q.first = std::bit_cast<uint32_t>(kToNearest + float(order - middle)) * 8;
  const bool extended = p.outside == kLinear;
  q.least = extended ? 0u : uint32_t(-8 * (order + 1));
  q.span = 8 * uint32_t(extended ? p.grid_size - 1 : p.bases() + order + 1);
  q.whole = !extended ? 8 * 5 : p.bases() > 8 ? 0 : 8 * uint32_t(p.grid_size < 5 ? p.grid_size : 5);
  q.zeros = order == 1 ? 0xddddddddu : 0xbbbbbbbbu;
  return q;
}

WideArguments make_wide(const Problem& p, void* workspace, size_t offset_of_cubics) {
  const auto* cubics = reinterpret_cast<const Cubic*>(static_cast<const char*>(workspace) + offset_of_cubics);
  const auto* described = static_cast<const Described<float>*>(workspace);
  WideArguments a{p, make_activation<float>(p.activation, p.n), described, cubics, {}, false, {}, false, false, {}};
  make_uniform_cubics(p, a.uniform);
  for (int q = 0; q <= kMaxCubicOrder; ++q) {
    const double c0 = a.uniform[q].c[0], c1 = a.uniform[q].c[1], c2 = a.uniform[q].c[2], c3 = a.uniform[q].c[3];
    a.centred[q] = {{float(c0 + c1 / 2 + c2 / 4 + c3 / 8), float(c1 + c2 + 0.75 * c3), float(c2 + 1.5 * c3), float(c3)}};
  }
  // A linear extension takes the slope at the end of the range, which must be continuous too.
  a.continuous = p.n + int(p.outside == kLinear && p.n == 0) < p.spline_order;
  a.vanishes = p.outside == kZero || p.n > int(p.outside == kLinear);
  a.quick = make_quick(p, a.continuous);
  const int64_t size = p.weight_dtype == kFloat32 ? 4 : 2;
  auto good = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  a.aligned = p.out_features * size % 16 == 0 && good(p.spline_weight) && good(p.base_weight) && good(p.g);
  return a;
}

}  // namespace kan::cuda
