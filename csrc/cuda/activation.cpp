// Arguments made on the host: the polynomials of the base activation's derivatives, as the CPU kernels have them, and those of
// a spline on even knots.
#include "../cpu/features.h"
#include "polynomials.h"

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

WideArguments make_wide(const Problem& p, void* workspace, size_t offset_of_cubics) {
  const auto* cubics = reinterpret_cast<const Cubic*>(static_cast<const char*>(workspace) + offset_of_cubics);
  const auto* described = static_cast<const Described<float>*>(workspace);
  WideArguments a{p, make_activation<float>(p.activation, p.n), described, cubics, {}, false, {}, false, false};
  make_uniform_cubics(p, a.uniform);
  for (int q = 0; q <= kMaxCubicOrder; ++q) {
    const double c0 = a.uniform[q].c[0], c1 = a.uniform[q].c[1], c2 = a.uniform[q].c[2], c3 = a.uniform[q].c[3];
    a.centred[q] = {{float(c0 + c1 / 2 + c2 / 4 + c3 / 8), float(c1 + c2 + 0.75 * c3), float(c2 + 1.5 * c3), float(c3)}};
  }
  // A linear extension takes the slope at the end of the range, which must be continuous too.
  a.continuous = p.n + int(p.outside == kLinear && p.n == 0) < p.spline_order;
  a.vanishes = p.outside == kZero || p.n > int(p.outside == kLinear);
  const int64_t size = p.weight_dtype == kFloat32 ? 4 : 2;
  auto good = [](const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; };
  a.aligned = p.out_features * size % 16 == 0 && good(p.spline_weight) && good(p.base_weight) && good(p.g);
  return a;
}

}  // namespace kan::cuda
