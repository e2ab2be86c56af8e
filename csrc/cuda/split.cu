// Makes the operands in halves: largest magnitudes, from them powers of two, then the halves. A matrix is read two or three times,
// which takes a fortieth of the time of a product that is worth it.
#include "features.cuh"
#include "split.cuh"

namespace kan::cuda {

namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// What is no number, or endless, has no say in a scale: it stays what it is.
KAN_DEVICE float larger_magnitude(float most, float value) {
  const float magnitude = as_float(as_bits(value) & 0x7fffffffu);
  return magnitude > most && magnitude < INFINITY ? magnitude : most;
}
KAN_DEVICE float largest_of_warp(float most) {
  KAN_UNROLL_ALL
  for (int mask = 16; mask > 0; mask /= 2) most = larger_magnitude(most, shuffle_xor(most, mask));
  return most;
}

// A base activation is no larger than x held within these: silu and gelu of negative x end above -1, tanh does on both sides.
struct Range {
  float low = -INFINITY, high = INFINITY;

  KAN_DEVICE float hold(float x) const { return held(x, low, high); }
};
Range range_of(int activation) {
  return {activation == kIdentity ? -INFINITY : -1.0f, activation == kTanh ? 1.0f : INFINITY};
}

// Rows of one matrix and, behind them, of another, all of `columns` columns, in slices.
struct Stacked {
  const void *first, *second;
  int64_t rows_of_first, rows, columns;
  int dtype;
  Range range = {};

  KAN_DEVICE float number(int64_t row, int64_t column) const {
    const bool in_second = row >= rows_of_first;
    return read<float>(in_second ? second : first, (in_second ? row - rows_of_first : row) * columns + column, dtype);
  }
};

// maxima (slices, columns): a slice's largest magnitudes. A block: 32 columns, a warp every eighth row.
__global__ void __launch_bounds__(kThreads) column_maxima(Stacked m, int64_t slices, float* maxima) {
  float* shared = shared_memory<float>();  // (kWarps, 32)
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t first = int64_t(blockIdx.x) * 32, column = first + lane, each = (m.rows + slices - 1) / slices;
  const int columns = m.columns - first < 32 ? int(m.columns - first) : 32;
  for (int64_t slice = blockIdx.y; slice < slices; slice += gridDim.y) {
    const int64_t begin = slice * each, last = begin + each < m.rows ? begin + each : m.rows, end = lane < columns ? last : 0;
    float most = 0;
#pragma unroll 4
    for (int64_t row = begin + warp; row < end; row += kWarps) {
      most = larger_magnitude(most, m.range.hold(m.number(row, column)));
    }
    barrier();
    shared[thread] = most;
    barrier();
    if (thread < columns) {
      for (int w = 1; w < kWarps; ++w) most = larger_magnitude(most, shared[w * 32 + thread]);
      maxima[slice * m.columns + column] = most;
    }
  }
}

// scales (columns) from maxima (slices, columns). A thread a column.
__global__ void __launch_bounds__(kThreads) scale_columns(const float* maxima, int64_t slices, int64_t columns, float* scales) {
  const int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (column >= columns) return;
  float most = 0;
#pragma unroll 8
  for (int64_t slice = 0; slice < slices; ++slice) most = larger_magnitude(most, maxima[slice * columns + column]);
  scales[column] = scale_to_top(most);
}

// The scales of the features of x's rows: values of bases are at most 1. A warp a row.
__global__ void __launch_bounds__(kThreads) scale_rows(Problem p, Range range, float* scales) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= p.batch) return;
  float most = 1;
  if (p.base_weight != nullptr) {
#pragma unroll 8
    for (int64_t i = lane; i < p.in_features; i += 32)
      most = larger_magnitude(most, range.hold(read<float>(p.x, row * p.in_features + i, p.x_dtype)));
  }
  most = largest_of_warp(most);
  if (lane == 0) scales[row] = scale_to_top(most);
}

// A matrix in halves, every column times its scale; a warp a row. By rows: every column divided by its scale, then the row times
// what its largest number asks for, which goes to `of_rows`.
template <bool kByRows>
__global__ void __launch_bounds__(kThreads)
    split_rows(const float* matrix, int64_t rows, int64_t columns, const float* scales, float* of_rows, Float16* halves) {
  const int lane = threadIdx.x % 32;
  const int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  if (row >= rows) return;
  const float* from = matrix + row * columns;
  auto scaled = [](float value, float scale) { return value * (kByRows ? inverse_of_scale(scale) : scale); };
  float of_row = 1;
  if (kByRows) {
    float most = 0;
#pragma unroll 8
    for (int64_t column = lane; column < columns; column += 32) most = larger_magnitude(most, scaled(from[column], scales[column]));
    of_row = scale_to_top(largest_of_warp(most));
    if (lane == 0) of_rows[row] = of_row;
  }
  Float16* to = halves + row * split_pitch(columns);
  const bool vectors = columns % 4 == 0 && reinterpret_cast<uintptr_t>(matrix) % 16 == 0;
#pragma unroll 4
  for (int64_t column = lane * 4; column < split_pitch(columns) / 2; column += 32 * 4) {
    float value[4];
    if (vectors && column < columns) {
      struct alignas(16) Four {
        float of[4];
      };
      const Four four = *reinterpret_cast<const Four*>(from + column), by = *reinterpret_cast<const Four*>(scales + column);
      KAN_UNROLL_ALL
      for (int m = 0; m < 4; ++m) value[m] = scaled(four.of[m], by.of[m]) * of_row;
    } else {
      KAN_UNROLL_ALL
      for (int m = 0; m < 4; ++m) value[m] = column + m < columns ? scaled(from[column + m], scales[column + m]) * of_row : 0.0f;
    }
    struct alignas(8) Two {
      uint32_t words[2];
    } upper, lower;
    split_all(value, upper.words, lower.words);
    *reinterpret_cast<Two*>(to + split_place(column)) = upper;
    *reinterpret_cast<Two*>(to + split_place(column) + kSplitDepth) = lower;
  }
}

int launch_scales(const Stacked& m, float* maxima, float* scales, void* stream) {
  if (int error = launch(column_maxima, Blocks{(m.columns + 31) / 32, kMaximaSlices}, kThreads, kThreads * sizeof(float), stream, m,
                         kMaximaSlices, maxima))
    return error;
  return launch(scale_columns, Blocks{(m.columns + kThreads - 1) / kThreads}, kThreads, 0, stream, maxima, kMaximaSlices, m.columns,
                scales);
}
template <bool kByRows>
int launch_split(const void* matrix, int64_t rows, int64_t columns, const float* scales, float* of_rows, const Float16* to,
                 void* stream) {
  return launch(split_rows<kByRows>, Blocks{(rows + kWarps - 1) / kWarps}, kThreads, 0, stream, static_cast<const float*>(matrix),
                rows, columns, scales, of_rows, const_cast<Float16*>(to));
}

}  // namespace

int launch_halves(const Problem& p, Operation operation, const Halves& h, void* stream) {
  const int64_t of_spline = p.in_features * p.bases(), outputs = p.out_features;
  int error = 0;
  if (operation == Operation::weight) {
    if (p.d_base != nullptr)
      error = launch_scales({p.x, nullptr, p.batch, p.batch, p.in_features, p.x_dtype, range_of(p.activation)}, h.maxima, h.inputs,
                            stream);
    if (error == 0) error = launch_scales({p.g, nullptr, p.batch, p.batch, outputs, kFloat32}, h.maxima, h.columns, stream);
    return error != 0 ? error : launch_split<false>(p.g, p.batch, outputs, h.columns, nullptr, h.g, stream);
  }
  const int64_t of_base = p.base_weight != nullptr ? p.in_features : 0;
  error = launch_scales({p.spline_weight, p.base_weight, of_spline, of_spline + of_base, outputs, kFloat32}, h.maxima, h.columns,
                        stream);
  if (error == 0) error = launch_split<false>(p.spline_weight, of_spline, outputs, h.columns, nullptr, h.spline, stream);
  if (error == 0 && of_base > 0) error = launch_split<false>(p.base_weight, of_base, outputs, h.columns, nullptr, h.base, stream);
  if (error != 0) return error;
  if (operation == Operation::input) return launch_split<true>(p.g, p.batch, outputs, h.columns, h.rows, h.g, stream);
  return launch(scale_rows, Blocks{(p.batch + kWarps - 1) / kWarps}, kThreads, 0, stream, p, range_of(p.activation), h.rows);
}

}  // namespace kan::cuda
