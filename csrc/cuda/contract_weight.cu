// d_W[i, f, o] = sum_b scale phi_f^(n)(x[b, i]) g[b, o] for every dtype, order and shape. Slices of the batch are summed
// apart, then added in a fixed order: no atomics, the same bits on every run.
#include "describe.cuh"
#include "launch.h"

namespace kan::cuda {

namespace {

constexpr int kThreads = 128, kBases = 32;

// A tile: one input, `columns` outputs (a power of two up to 32), up to kBases bases and the base branch, one slice of the
// batch. kThreads / columns rows go side by side; each column of each of them has sums of its own in shared memory, and the
// first threads add them up at the end. P: the type of the sums that a slice leaves, T itself where there is one slice.
template <class T, class P>
__global__ void __launch_bounds__(kThreads, kResident)
    weight_any(Arguments<typename ComputeOf<T>::Type> a, P* spline, P* base, int columns, int64_t slices, int64_t rows) {
  using C = typename ComputeOf<T>::Type;
  const Problem& p = a.p;
  Described<C>* described = shared_memory<Described<C>>();      // of the block's input
  Window<C>* windows = reinterpret_cast<Window<C>*>(described + 1);  // (kThreads)
  C* sums = reinterpret_cast<C*>(windows + kThreads);          // (kBases + 1, kThreads)
  const int thread = threadIdx.x, column = thread % columns, row = thread / columns, side = kThreads / columns;
  const int bases = p.bases();
  const int64_t outputs = p.out_features, i = blockIdx.x, wide = (outputs + columns - 1) / columns;
  describe_inputs(p, i, 1, kThreads, described);

  for (int64_t slice = blockIdx.z; slice < slices; slice += gridDim.z)
  for (int64_t part = blockIdx.y; part < wide; part += gridDim.y)
  for (int f0 = 0; f0 < bases; f0 += kBases) {
    const int64_t o = part * columns + column;
    const int64_t end = (slice + 1) * rows < p.batch ? (slice + 1) * rows : p.batch;
    for (int f = 0; f <= kBases; ++f) sums[f * kThreads + thread] = 0;
    for (int64_t b0 = slice * rows; b0 < end; b0 += kThreads) {
      barrier();
      make_window<-1>(a, *described, b0 + thread < end ? b0 + thread : p.batch, i, windows[thread]);
      barrier();
      for (int r = row; r < kThreads; r += side) {
        if (b0 + r >= end || o >= outputs) break;
        const Window<C>& window = windows[r];
        const C g = number(static_cast<const T*>(p.g)[(b0 + r) * outputs + o]);
        for (int q = 0; q <= p.spline_order; ++q) {
          const int f = window.first + q - f0;
          if (f >= 0 && f < kBases && f + f0 < bases) sums[f * kThreads + thread] += window.w[q] * g;
        }
        sums[kBases * kThreads + thread] += window.base * g;
      }
    }
    barrier();
    if (row == 0 && o < outputs)
      for (int f = 0; f <= kBases; ++f) {
        const bool is_base = f == kBases;
        if (is_base ? base == nullptr || f0 > 0 : f0 + f >= bases) continue;
        C total = 0;
        for (int s = 0; s < side; ++s) total += sums[f * kThreads + s * columns + column];
        if (is_base) put(base[(slice * p.in_features + i) * outputs + o], total);
        else put(spline[((slice * p.in_features + i) * bases + f0 + f) * outputs + o], total);
      }
    barrier();
  }
}

}  // namespace

// to[m] = sum over slices of parts[slice, m], slice by slice.
template <class T, class P> __global__ void add_slices(const P* parts, T* to, int64_t size, int64_t slices) {
  const int64_t m = int64_t(blockIdx.x) * 256 + threadIdx.x;
  if (m >= size) return;
  P total = 0;
  for (int64_t s = 0; s < slices; ++s) total += parts[s * size + m];
  put(to[m], total);
}

template <class T> int launch_add(const void* parts, void* to, int64_t size, int64_t slices, void* stream) {
  using C = typename ComputeOf<T>::Type;
  return launch(add_slices<T, C>, Blocks{(size + 255) / 256}, 256, 0, stream, static_cast<const C*>(parts), static_cast<T*>(to), size,
                slices);
}

template <class T> int launch_add_slices(const Problem& p, const void* parts, int64_t slices, void* stream) {
  using C = typename ComputeOf<T>::Type;
  const int64_t base_size = p.in_features * p.out_features, size = base_size * p.bases();
  const int error = launch_add<T>(parts, p.d_spline, size, slices, stream);
  if (error != 0 || p.d_base == nullptr) return error;
  return launch_add<T>(static_cast<const C*>(parts) + slices * size, p.d_base, base_size, slices, stream);
}

template <class T> int launch_weight_any(const Problem& p, const Slices& slices, void* workspace, void* stream) {
  using C = typename ComputeOf<T>::Type;
  if (p.in_features == 0 || p.out_features == 0) return 0;
  const Arguments<C> a{p, make_activation<C>(p.activation, p.n)};
  int columns = 1;
  while (columns < 32 && columns < p.out_features) columns *= 2;
  const Blocks blocks{p.in_features, (p.out_features + columns - 1) / columns, slices.count};
  const size_t shared = sizeof(Described<C>) + kThreads * sizeof(Window<C>) + (kBases + 1) * kThreads * sizeof(C);
  if (slices.count == 1)
    return launch(weight_any<T, T>, blocks, kThreads, shared, stream, a, static_cast<T*>(p.d_spline),
                  static_cast<T*>(p.d_base), columns, slices.count, slices.rows);
  C* parts = reinterpret_cast<C*>(static_cast<char*>(workspace) + slices.offset);
  C* base_parts = p.d_base ? parts + slices.count * p.in_features * p.bases() * p.out_features : nullptr;
  if (int error = launch(weight_any<T, C>, blocks, kThreads, shared, stream, a, parts, base_parts, columns, slices.count,
                         slices.rows))
    return error;
  return launch_add_slices<T>(p, parts, slices.count, stream);
}

#define KAN_INSTANTIATE(T)                                                               \
  template int launch_weight_any<T>(const Problem&, const Slices&, void*, void*);        \
  template int launch_add<T>(const void*, void*, int64_t, int64_t, void*);               \
  template int launch_add_slices<T>(const Problem&, const void*, int64_t, void*);
KAN_INSTANTIATE(float)
KAN_INSTANTIATE(double)
KAN_INSTANTIATE(BFloat16)
KAN_INSTANTIATE(Float16)
#undef KAN_INSTANTIATE

}  // namespace kan::cuda
