// y[b, o] = sum_{i, f} scale phi_f^(n)(x[b, i]) W[i, f, o] for every dtype, order and shape, by plain multiply-add: k + 1 rows
// of weights and the base row for each row and input.
#include "describe.cuh"
#include "launch.h"

namespace kan::cuda {

namespace {

constexpr int kRows = 32, kInputs = 8, kColumns = 64, kThreads = 256, kWarps = kThreads / 32;
static_assert(kRows * kInputs == kThreads, "one window per thread");

// A warp takes one row after another, its lanes two outputs each: all lanes read the same window and consecutive weights.
template <class T> __global__ void __launch_bounds__(kThreads, kResident) output_any(Arguments<typename ComputeOf<T>::Type> a) {
  using C = typename ComputeOf<T>::Type;
  const Problem& p = a.p;
  Window<C>* windows = shared_memory<Window<C>>();  // (kRows, kInputs)
  const T* spline = static_cast<const T*>(p.spline_weight);
  const T* base = static_cast<const T*>(p.base_weight);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, bases = p.bases();
  const int64_t outputs = p.out_features, b0 = int64_t(blockIdx.x) * kRows;

  for (int64_t o0 = int64_t(blockIdx.y) * kColumns; o0 < outputs; o0 += int64_t(gridDim.y) * kColumns) {
    const int64_t o = o0 + lane;
    C total[kRows / kWarps][2] = {};
    for (int64_t i0 = 0; i0 < p.in_features; i0 += kInputs) {
      barrier();
      make_window(a, b0 + thread / kInputs, i0 + thread % kInputs, windows[thread]);
      barrier();
      const int64_t inputs = p.in_features - i0 < kInputs ? p.in_features - i0 : kInputs;
      for (int i = 0; i < inputs; ++i)
        for (int r = 0; r < kRows / kWarps; ++r) {
          const Window<C>& window = windows[(warp * (kRows / kWarps) + r) * kInputs + i];
          for (int q = 0; q <= p.spline_order; ++q) {
            const int f = window.first + q;
            if (f < 0 || f >= bases) continue;
            const T* row = spline + ((i0 + i) * bases + f) * outputs + o;
            if (o < outputs) total[r][0] += window.w[q] * number(row[0]);
            if (o + 32 < outputs) total[r][1] += window.w[q] * number(row[32]);
          }
          if (base == nullptr) continue;
          const T* row = base + (i0 + i) * outputs + o;
          if (o < outputs) total[r][0] += window.base * number(row[0]);
          if (o + 32 < outputs) total[r][1] += window.base * number(row[32]);
        }
    }
    for (int r = 0; r < kRows / kWarps; ++r) {
      const int64_t b = b0 + warp * (kRows / kWarps) + r;
      if (b >= p.batch) break;
      T* row = static_cast<T*>(p.y) + b * outputs + o;
      if (o < outputs) put(row[0], total[r][0]);
      if (o + 32 < outputs) put(row[32], total[r][1]);
    }
  }
}

}  // namespace

template <class T> int launch_output_any(const Problem& p, void* workspace, void* stream) {
  using C = typename ComputeOf<T>::Type;
  const Blocks blocks{(p.batch + kRows - 1) / kRows, (p.out_features + kColumns - 1) / kColumns};
  if (blocks.x * blocks.y == 0) return 0;
  Arguments<C> a;
  if (int error = launch_describe(p, workspace, stream, a)) return error;
  return launch(output_any<T>, blocks, kThreads, kThreads * sizeof(Window<C>), stream, a);
}

KAN_FOR_EVERY_TYPE(launch_output_any)

}  // namespace kan::cuda
