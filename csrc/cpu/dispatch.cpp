// Chooses the kernels of the widest instruction set that this build and this CPU share.
#include "../isa.h"
#include "../kernels.h"

namespace kan::cpu {

#define KAN_DECLARE(isa)                                                        \
  namespace isa {                                                               \
  template <class T> void contract_output(const Problem<T>&, const Runtime&);   \
  template <class T> void contract_backward(const Problem<T>&, const Runtime&); \
  template <class T> void network_output(const Network<T>&, const Runtime&);    \
  template <class T> void network_backward(const Network<T>&, const Runtime&);  \
  template <class T> bool network_pays(const Network<T>&);                      \
  }
KAN_DECLARE(baseline)
#ifdef KAN_BUILT_AVX2
KAN_DECLARE(avx2)
#endif
#ifdef KAN_BUILT_AVX512
KAN_DECLARE(avx512)
#endif

static Isa isa() {
  static const Isa chosen = chosen_isa();
  return chosen;
}

#ifdef KAN_BUILT_AVX512
#define KAN_AVX512_CASE(call) case Isa::avx512: return avx512::call;
#else
#define KAN_AVX512_CASE(call)
#endif
#ifdef KAN_BUILT_AVX2
#define KAN_AVX2_CASE(call) case Isa::avx2: return avx2::call;
#else
#define KAN_AVX2_CASE(call)
#endif
#define KAN_DISPATCH(call)  \
  switch (isa()) {          \
    KAN_AVX512_CASE(call)   \
    KAN_AVX2_CASE(call)     \
    default: return baseline::call; \
  }

template <class T> void contract_output(const Problem<T>& p, const Runtime& r) { KAN_DISPATCH(contract_output(p, r)) }
template <class T> void contract_backward(const Problem<T>& p, const Runtime& r) { KAN_DISPATCH(contract_backward(p, r)) }
template <class T> void network_output(const Network<T>& n, const Runtime& r) { KAN_DISPATCH(network_output(n, r)) }
template <class T> void network_backward(const Network<T>& n, const Runtime& r) { KAN_DISPATCH(network_backward(n, r)) }
template <class T> bool network_pays(const Network<T>& n) { KAN_DISPATCH(network_pays(n)) }

template void contract_output<float>(const Problem<float>&, const Runtime&);
template void contract_output<double>(const Problem<double>&, const Runtime&);
template void contract_backward<float>(const Problem<float>&, const Runtime&);
template void contract_backward<double>(const Problem<double>&, const Runtime&);
template void network_output<float>(const Network<float>&, const Runtime&);
template void network_output<double>(const Network<double>&, const Runtime&);
template void network_backward<float>(const Network<float>&, const Runtime&);
template void network_backward<double>(const Network<double>&, const Runtime&);
template bool network_pays<float>(const Network<float>&);
template bool network_pays<double>(const Network<double>&);

}  // namespace kan::cpu
