// The kernel that runs before every wide one of numbers as they are.
#include "tabulate.cuh"

namespace kan::cuda {

namespace {

__global__ void tabulate_inputs(Problem p, Described<float>* described, Cubic* uneven) {
  const int64_t i = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  if (i < p.in_features) tabulate(p, described, uneven, i, threadIdx.x % 32);
}

}  // namespace

int launch_cubics(const WideArguments& a, void* stream) {
  return launch(tabulate_inputs, Blocks{(a.p.in_features + 3) / 4}, 128, 0, stream, a.p, const_cast<Described<float>*>(a.described),
                const_cast<Cubic*>(a.uneven));
}

}  // namespace kan::cuda
