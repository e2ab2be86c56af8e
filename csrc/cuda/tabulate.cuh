// What a wide kernel is told of an input's knots, by the kernel that runs before it.
#pragma once
#include "features.cuh"
#include "polynomials.h"

namespace kan::cuda {

// By a warp: described[i], and the cubics of each interval of uneven knots, uneven (in_features, knots - 1, 4).
KAN_DEVICE void tabulate(const Problem& p, Described<float>* described, Cubic* uneven, int64_t i, int lane) {
  const float* t = static_cast<const float*>(p.grid) + i * p.knots();
  const Described<float> d = describe(p, t);
  if (lane == 0) described[i] = d;
  if (d.inverse_h > 0) return;
  for (int j = lane; j < p.knots() - 1; j += 32)
    make_cubics(t, p.knots(), p.spline_order, j, p.n, uneven + (i * (p.knots() - 1) + j) * 4);
}

}  // namespace kan::cuda
