// dx[b, i] = sum_{f, o} phi_f^(n)(x[b, i]) W[i, f, o] g[b, o] for every dtype, order and shape, by plain multiply-add.
#include "describe.cuh"
#include "launch.h"

namespace kan::cuda {

namespace {

constexpr int kRows = 32, kInputs = 8, kThreads = 256, kWarps = kThreads / 32, kPerLane = 4;
static_assert(kRows * kInputs == kThreads, "one window per thread");

// A warp takes one row after another; its lanes share the outputs, and their sums are added at the end, in a fixed order.
template <class T> __global__ void __launch_bounds__(kThreads, kResident) input_any(Arguments<typename ComputeOf<T>::Type> a) {
  using C = typename ComputeOf<T>::Type;
  const Problem& p = a.p;
  Window<C>* windows = shared_memory<Window<C>>();  // (kRows, kInputs)
  const T* spline = static_cast<const T*>(p.spline_weight);
  const T* base = static_cast<const T*>(p.base_weight);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, bases = p.bases();
  const int64_t outputs = p.out_features, b0 = int64_t(blockIdx.x) * kRows;

  for (int64_t i0 = int64_t(blockIdx.y) * kInputs; i0 < p.in_features; i0 += int64_t(gridDim.y) * kInputs) {
    const int64_t inputs = p.in_features - i0 < kInputs ? p.in_features - i0 : kInputs;
    barrier();
    make_window(a, b0 + thread / kInputs, i0 + thread % kInputs, windows[thread]);
    barrier();
    for (int r = warp * (kRows / kWarps); r < (warp + 1) * (kRows / kWarps); ++r) {
      if (b0 + r >= p.batch) break;
      const T* pulled = static_cast<const T*>(p.g) + (b0 + r) * outputs;
      C total[kInputs] = {};
      for (int64_t o0 = 0; o0 < outputs; o0 += 32 * kPerLane) {
        C g[kPerLane];
        for (int m = 0; m < kPerLane; ++m) g[m] = o0 + 32 * m + lane < outputs ? number(pulled[o0 + 32 * m + lane]) : C(0);
        KAN_UNROLL_WINDOW
        for (int i = 0; i < kInputs; ++i) {
          if (i >= inputs) break;
          const Window<C>& window = windows[r * kInputs + i];
          for (int m = 0; m < kPerLane; ++m) {
            const int64_t o = o0 + 32 * m + lane;
            if (o >= outputs) break;
            C sum = 0;
            for (int q = 0; q <= p.spline_order; ++q) {
              const int f = window.first + q;
              if (f >= 0 && f < bases) sum += window.w[q] * number(spline[((i0 + i) * bases + f) * outputs + o]);
            }
            if (base != nullptr) sum += window.base * number(base[(i0 + i) * outputs + o]);
            total[i] += sum * g[m];
          }
        }
      }
      KAN_UNROLL_WINDOW
      for (int i = 0; i < kInputs; ++i) {
        C sum = total[i];
        for (int mask = 16; mask > 0; mask /= 2) sum += shuffle_xor(sum, mask);
        if (lane == 0 && i < inputs) write<C>(p.dx, (b0 + r) * p.in_features + i0 + i, p.x_dtype, sum);
      }
    }
  }
}

}  // namespace

template <class T> int launch_input_any(const Problem& p, void* workspace, void* stream) {
  using C = typename ComputeOf<T>::Type;
  const Blocks blocks{(p.batch + kRows - 1) / kRows, (p.in_features + kInputs - 1) / kInputs};
  if (blocks.x * blocks.y == 0) return 0;
  Arguments<C> a;
  if (int error = launch_describe(p, workspace, stream, a)) return error;
  return launch(input_any<T>, blocks, kThreads, kThreads * sizeof(Window<C>), stream, a);
}

KAN_FOR_EVERY_TYPE(launch_input_any)

}  // namespace kan::cuda
