// The kernel that runs before every wide one: knots described, and the cubics of each interval of uneven knots.
#include "describe.cuh"
#include "polynomials.h"

namespace kan::cuda {

namespace {

__global__ void tabulate(Problem p, Described<float>* described, Cubic* uneven) {
  const int64_t i = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  if (i >= p.in_features) return;
  const float* t = static_cast<const float*>(p.grid) + i * p.knots();
  const Described<float> d = describe(p, t);
  if (threadIdx.x % 32 == 0) described[i] = d;
  if (d.inverse_h > 0) return;
  for (int j = threadIdx.x % 32; j < p.knots() - 1; j += 32)
    make_cubics(t, p.knots(), p.spline_order, j, p.n, uneven + (i * (p.knots() - 1) + j) * 4);
}

}  // namespace

int launch_cubics(const WideArguments& a, void* stream) {
  return launch(tabulate, Blocks{(a.p.in_features + 3) / 4}, 128, 0, stream, a.p, const_cast<Described<float>*>(a.described),
                const_cast<Cubic*>(a.uneven));
}

}  // namespace kan::cuda
