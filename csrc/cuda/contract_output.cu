// y[b, o] = sum_{i, f} scale phi_f^(n)(x[b, i]) W[i, f, o] for every dtype, order and shape, by plain multiply-add: k + 1 rows
// of weights and the base row for each row and input.
#include "describe.cuh"
#include "launch.h"

#include <type_traits>

namespace kan::cuda {

namespace {

constexpr int kColumns = 32;

template <class C> union OutputMemory {
  AnyMemory<C> making;
  C sums[kAnyWarps][kRowsOfWarp][kColumns];
};

// Warps that share rows split the inputs of each step; their sums are added at the end, in a fixed order. Y: the type of the
// results, T itself or that of the sums of a slice of inputs. kRows: of a warp.
template <class T, class Y, int kOrder, int kRows>
__global__ void __launch_bounds__(kAnyThreads, 1)
    output_any(Arguments<typename ComputeOf<T>::Type> a, AnyTile tile, Y* y, int64_t slices, int64_t inputs_of_slice) {
  using C = typename ComputeOf<T>::Type;
  const Problem& p = a.p;
  OutputMemory<C>& memory = *shared_memory<OutputMemory<C>>();
  const T* spline = static_cast<const T*>(p.spline_weight);
  const T* base = static_cast<const T*>(p.base_weight);
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32, bases = p.bases();
  const int groups = tile.groups(), row = warp % groups * kRows, part_of_warp = warp / groups;
  const int64_t outputs = p.out_features, b0 = int64_t(blockIdx.x) * tile.rows;

  for (int64_t slice = blockIdx.z; slice < slices; slice += gridDim.z)
  for (int64_t o0 = int64_t(blockIdx.y) * kColumns; o0 < outputs; o0 += int64_t(gridDim.y) * kColumns) {
    const int64_t column = o0 + lane < outputs ? o0 + lane : outputs - 1, begin = slice * inputs_of_slice;
    const int64_t end = begin + inputs_of_slice < p.in_features ? begin + inputs_of_slice : p.in_features;
    C total[kRows] = {};
    for (int64_t i0 = begin; i0 < end; i0 += tile.inputs()) {
      make_windows<kOrder>(a, tile, b0, i0, memory.making);
      KAN_NO_UNROLL
      for (int turn = 0; turn < tile.turns; ++turn) {
        const int m = turn * tile.side() + part_of_warp;
        const int64_t i = i0 + m;
        if (i >= end) break;
        contract_rows<kRows, kOrder>(p, memory.making.windows + row * tile.inputs() + m, tile.inputs(), spline + i * bases * outputs + column,
                              base == nullptr ? base : base + i * outputs + column, [&](int r, C sum) { total[r] += sum; });
      }
    }
    barrier();
    KAN_UNROLL_ALL
    for (int r = 0; r < kRows; ++r) memory.sums[warp][r][lane] = total[r];
    barrier();
    for (int at = warp; at < tile.rows; at += kAnyWarps) {
      const int64_t b = b0 + at;
      if (b >= p.batch || o0 + lane >= outputs) break;
      C sum = 0;
      for (int part = 0; part < tile.side(); ++part) sum += memory.sums[part * tile.groups() + at / kRows][at % kRows][lane];
      put(y[(slice * p.batch + b) * outputs + o0 + lane], sum);
    }
  }
}

template <class T, class Y> int launch_order(const Problem& p, AnyTile tile, Y* y, const Slices& slices, void* stream) {
  using C = typename ComputeOf<T>::Type;
  const Blocks blocks{(p.batch + tile.rows - 1) / tile.rows, (p.out_features + kColumns - 1) / kColumns, slices.count};
  const Arguments<C> a{p, make_activation<C>(p.activation, p.n)};
  auto kernel = output_any<T, Y, 3, kRowsOfWarp>;
  if constexpr (std::is_same_v<T, Y>) {
    if (p.spline_order != 3) kernel = output_any<T, Y, -1, kRowsOfWarp>;
    else if constexpr (sizeof(T) < 8) {
      if (tile.rows_of_warp() == 1) kernel = output_any<T, Y, 3, 1>;
    }
  }
  return launch(kernel, blocks, kAnyThreads, sizeof(OutputMemory<C>), stream, a, tile, y, slices.count, slices.rows);
}

}  // namespace

template <class T> int launch_output_any(const Problem& p, AnyTile tile, const Slices& slices, void* workspace, void* stream) {
  using C = typename ComputeOf<T>::Type;
  if (p.batch == 0 || p.out_features == 0) return 0;
  if (slices.count == 1) return launch_order<T>(p, tile, static_cast<T*>(p.y), slices, stream);
  C* parts = reinterpret_cast<C*>(static_cast<char*>(workspace) + slices.offset);
  if (int error = launch_order<T>(p, tile, parts, slices, stream)) return error;
  return launch_add<T>(parts, p.y, p.batch * p.out_features, slices.count, stream);
}

#define KAN_INSTANTIATE(T) template int launch_output_any<T>(const Problem&, AnyTile, const Slices&, void*, void*);
KAN_INSTANTIATE(float)
KAN_INSTANTIATE(double)
KAN_INSTANTIATE(BFloat16)
KAN_INSTANTIATE(Float16)
#undef KAN_INSTANTIATE

}  // namespace kan::cuda
