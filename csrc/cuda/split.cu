// Makes the operands in halves, and the tables of knots: one kernel finds largest magnitudes, one makes powers of two of them, one
// the halves. A matrix is read two or three times, which takes a fortieth of the time of a product that is worth it.
#include "split.cuh"
#include "tabulate.cuh"

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

// Rows of one matrix and, behind them, of another, all of `columns` columns.
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

// Columns that are to be scaled: maxima (kMaximaSlices, columns) are found first, the largest magnitudes in each slice of the rows,
// then scales (columns).
struct Scaled {
  Stacked matrix;
  float *maxima, *scales;

  KAN_INLINE int64_t tiles() const { return (matrix.columns + 31) / 32; }
  KAN_INLINE int64_t blocks() const { return tiles() * kMaximaSlices; }
};

// Maxima of 32 columns in a slice, by a block: a warp takes every eighth row.
KAN_DEVICE void column_maxima(const Scaled& to, int64_t tile, int64_t slice) {
  float* shared = shared_memory<float>();  // (kWarps, 32)
  const Stacked& m = to.matrix;
  const int thread = threadIdx.x, lane = thread % 32, warp = thread / 32;
  const int64_t first = tile * 32, column = first + lane, each = (m.rows + kMaximaSlices - 1) / kMaximaSlices;
  const int columns = m.columns - first < 32 ? int(m.columns - first) : 32;
  const int64_t begin = slice * each, last = begin + each < m.rows ? begin + each : m.rows, end = lane < columns ? last : 0;
  float most = 0;
#pragma unroll 4
  for (int64_t row = begin + warp; row < end; row += kWarps) {
    most = larger_magnitude(most, m.range.hold(m.number(row, column)));
  }
  shared[thread] = most;
  barrier();
  if (thread < columns) {
    for (int w = 1; w < kWarps; ++w) most = larger_magnitude(most, shared[w * 32 + thread]);
    to.maxima[slice * m.columns + column] = most;
  }
}

// The scale of the features of a row of x, by a warp: values of bases are at most 1.
KAN_DEVICE void scale_row(const Problem& p, const Range& range, int64_t row, int lane, float* scales) {
  float most = 1;
  if (p.base_weight != nullptr) {
#pragma unroll 8
    for (int64_t i = lane; i < p.in_features; i += 32)
      most = larger_magnitude(most, range.hold(read<float>(p.x, row * p.in_features + i, p.x_dtype)));
  }
  most = largest_of_warp(most);
  if (lane == 0) scales[row] = scale_to_top(most);
}

KAN_INLINE int64_t blocks_of_warps(int64_t warps) { return (warps + kWarps - 1) / kWarps; }

// All that needs nothing but the operands: blocks for the maxima of two matrices (or one: the other has no columns), behind them a
// warp for the scale of each of `rows` rows of x, then a warp for the tables of each input.
struct Survey {
  Problem p;
  Scaled matrices[2];
  int64_t rows;
  float* scales_of_rows;
  Range range;
  Described<float>* described;
  Cubic* uneven;
};

__global__ void __launch_bounds__(kThreads) survey(KAN_ARGUMENT Survey s) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  int64_t block = blockIdx.x;
  KAN_UNROLL_ALL
  for (int m = 0; m < 2; ++m) {
    const Scaled& matrix = s.matrices[m];
    if (block < matrix.blocks()) return column_maxima(matrix, block % matrix.tiles(), block / matrix.tiles());
    block -= matrix.blocks();
  }
  if (block < blocks_of_warps(s.rows)) {
    const int64_t row = block * kWarps + warp;
    if (row < s.rows) scale_row(s.p, s.range, row, lane, s.scales_of_rows);
    return;
  }
  const int64_t i = (block - blocks_of_warps(s.rows)) * kWarps + warp;
  if (i < s.p.in_features) tabulate(s.p, s.described, s.uneven, i, lane);
}

// The scales of the columns of both matrices, a thread each.
__global__ void __launch_bounds__(kThreads) scale_columns(Scaled one, Scaled other) {
  int64_t column = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  const bool in_other = column >= one.matrix.columns;
  if (in_other) column -= one.matrix.columns;
  const float* maxima = in_other ? other.maxima : one.maxima;
  const int64_t columns = in_other ? other.matrix.columns : one.matrix.columns;
  if (column >= columns) return;
  float most = 0;
#pragma unroll 8
  for (int64_t slice = 0; slice < kMaximaSlices; ++slice) most = larger_magnitude(most, maxima[slice * columns + column]);
  (in_other ? other.scales : one.scales)[column] = scale_to_top(most);
}

// A row `from` in halves, every column times its scale, by a warp. By rows: every column divided by its scale, then the row times
// what its largest number asks for, which goes to `scale_of_row`.
template <bool kByRows>
KAN_DEVICE void split_row(const float* from, int64_t columns, const float* scales, float* scale_of_row, int lane, Float16* to) {
  auto scaled = [](float value, float scale) { return value * (kByRows ? inverse_of_scale(scale) : scale); };
  float of_row = 1;
  if (kByRows) {
    float most = 0;
#pragma unroll 8
    for (int64_t column = lane; column < columns; column += 32) most = larger_magnitude(most, scaled(from[column], scales[column]));
    of_row = scale_to_top(largest_of_warp(most));
    if (lane == 0) *scale_of_row = of_row;
  }
  const bool vectors = columns % 4 == 0 && reinterpret_cast<uintptr_t>(from) % 16 == 0;
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

// Rows of two matrices, and behind them of a third one by rows, if there is one; a warp each. All have the columns of the first.
struct Split {
  Stacked plain;
  Float16 *first, *second;
  const float* by_rows;
  int64_t rows;
  float* scales_of_rows;
  Float16* halves_by_rows;
  const float* scales;  // (columns)
};

__global__ void __launch_bounds__(kThreads) split_rows(Split s) {
  const int lane = threadIdx.x % 32;
  int64_t row = int64_t(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t columns = s.plain.columns, pitch = split_pitch(columns);
  if (row < s.plain.rows) {
    const bool in_second = row >= s.plain.rows_of_first;
    if (in_second) row -= s.plain.rows_of_first;
    const float* from = static_cast<const float*>(in_second ? s.plain.second : s.plain.first) + row * columns;
    return split_row<false>(from, columns, s.scales, nullptr, lane, (in_second ? s.second : s.first) + row * pitch);
  }
  row -= s.plain.rows;
  if (row < s.rows) split_row<true>(s.by_rows + row * columns, columns, s.scales, s.scales_of_rows + row, lane, s.halves_by_rows + row * pitch);
}

}  // namespace

int launch_operands(const WideArguments& a, Operation operation, const Halves& h, void* stream) {
  const Problem& p = a.p;
  const int64_t of_spline = p.in_features * p.bases(), of_base = p.base_weight != nullptr ? p.in_features : 0;
  const bool weight = operation == Operation::weight;
  const Stacked g{p.g, nullptr, p.batch, p.batch, p.out_features, kFloat32};
  const Stacked weights{p.spline_weight, p.base_weight, of_spline, of_spline + of_base, p.out_features, kFloat32};
  // For contract_weight the sums run over the batch: its right operand is g, its left one has the base branch's x.
  Stacked inputs{p.x, nullptr, p.batch, p.batch, 0, p.x_dtype, range_of(p.activation)};
  if (weight && p.d_base != nullptr) inputs.columns = p.in_features;
  const Scaled columns{weight ? g : weights, h.maxima, h.columns}, of_inputs{inputs, h.maxima_of_inputs, h.inputs};
  const Survey looked{p, {columns, of_inputs}, operation == Operation::output ? p.batch : 0, h.rows, range_of(p.activation),
                      const_cast<Described<float>*>(a.described), const_cast<Cubic*>(a.uneven)};
  const int64_t blocks = columns.blocks() + of_inputs.blocks() + blocks_of_warps(looked.rows) + blocks_of_warps(p.in_features);
  if (int error = launch(survey, Blocks{blocks}, kThreads, kThreads * sizeof(float), stream, looked)) return error;
  const int64_t scales = columns.matrix.columns + inputs.columns;
  if (int error = launch(scale_columns, Blocks{(scales + kThreads - 1) / kThreads}, kThreads, 0, stream, columns, of_inputs)) return error;
  const int64_t by_rows = operation == Operation::input ? p.batch : 0;
  const Split split{columns.matrix, weight ? h.g : h.spline, h.base, static_cast<const float*>(p.g), by_rows, h.rows, h.g, h.columns};
  return launch(split_rows, Blocks{blocks_of_warps(split.plain.rows + by_rows)}, kThreads, 0, stream, split);
}

}  // namespace kan::cuda
