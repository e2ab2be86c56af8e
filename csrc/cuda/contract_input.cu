// dx[b, i] = sum_{f, o} phi_f^(n)(x[b, i]) W[i, f, o] g[b, o] for every dtype, order and shape, by plain multiply-add.
#include "describe.cuh"
#include "launch.h"

namespace kan::cuda {

namespace {

// A warp goes through all outputs for one input after another; the sums of its lanes are added at the end, in a fixed order.
template <class T, int kOrder>
__global__ void __launch_bounds__(kAnyThreads, 1) input_any(Arguments<typename ComputeOf<T>::Type> a, AnyTile tile) {
  using C = typename ComputeOf<T>::Type;
  const Problem& p = a.p;
  AnyMemory<C>& memory = *shared_memory<AnyMemory<C>>();
  const T* spline = static_cast<const T*>(p.spline_weight);
  const T* base = static_cast<const T*>(p.base_weight);
  const T* pulled = static_cast<const T*>(p.g);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, bases = p.bases();
  const int groups = tile.groups(), row = warp % groups * kRowsOfWarp, side = tile.side();
  const int64_t outputs = p.out_features, b0 = int64_t(blockIdx.x) * tile.rows;

  for (int64_t i0 = int64_t(blockIdx.y) * tile.inputs(); i0 < p.in_features; i0 += int64_t(gridDim.y) * tile.inputs()) {
    make_windows<kOrder>(a, tile, b0, i0, memory);
    KAN_NO_UNROLL
    for (int turn = 0; turn < tile.turns; ++turn) {
      const int m = turn * side + warp / groups;
      const int64_t i = i0 + m;
      if (i >= p.in_features) break;
      Window<C>* windows = memory.windows + row * tile.inputs() + m;
      C total[kRowsOfWarp] = {};
      KAN_NO_UNROLL
      for (int64_t o0 = 0; o0 < outputs; o0 += 32) {
        const int64_t column = o0 + lane < outputs ? o0 + lane : outputs - 1;
        C g[kRowsOfWarp];
        KAN_UNROLL_ALL
        for (int r = 0; r < kRowsOfWarp; ++r) {
          const int64_t b = b0 + row + r < p.batch ? b0 + row + r : p.batch - 1;
          g[r] = number(pulled[b * outputs + column]);
        }
        contract_rows<kRowsOfWarp, kOrder>(p, windows, tile.inputs(), spline + i * bases * outputs + column,
                                           base == nullptr ? base : base + i * outputs + column,
                                           [&](int r, C sum) { total[r] += o0 + lane < outputs ? sum * g[r] : C(0); });
      }
      warp_barrier();
      KAN_UNROLL_ALL
      for (int r = 0; r < kRowsOfWarp; ++r) {
        C sum = total[r];
        for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane == 0) windows[r * tile.inputs()].base = sum;  // which nobody else reads
      }
    }
    barrier();
    const int64_t b = b0 + thread / tile.inputs(), i = i0 + thread % tile.inputs();
    if (thread < tile.windows() && b < p.batch && i < p.in_features) write<C>(p.dx, b * p.in_features + i, p.x_dtype, memory.windows[thread].base);
  }
}

}  // namespace

template <class T> int launch_input_any(const Problem& p, AnyTile tile, void* stream) {
  using C = typename ComputeOf<T>::Type;
  const Blocks blocks{(p.batch + tile.rows - 1) / tile.rows, (p.in_features + tile.inputs() - 1) / tile.inputs()};
  if (blocks.x * blocks.y == 0) return 0;
  const Arguments<C> a{p, make_activation<C>(p.activation, p.n)};
  // In float64 twice as many registers would be needed.
  constexpr int kCubic = sizeof(T) == 8 ? -1 : 3;
  const auto kernel = p.spline_order == 3 ? input_any<T, kCubic> : input_any<T, -1>;
  return launch(kernel, blocks, kAnyThreads, sizeof(AnyMemory<C>), stream, a, tile);
}

#define KAN_INSTANTIATE(T) template int launch_input_any<T>(const Problem&, AnyTile, void*);
KAN_INSTANTIATE(float)
KAN_INSTANTIATE(double)
KAN_INSTANTIATE(BFloat16)
KAN_INSTANTIATE(Float16)
#undef KAN_INSTANTIATE

}  // namespace kan::cuda
