// The polynomials of the base activation's derivatives, as the CPU kernels have them.
#include "../cpu/features.h"
#include "arguments.h"

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

}  // namespace kan::cuda
