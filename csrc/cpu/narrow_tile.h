// The narrow kernels' view of a tile of the batch: every lane is a row. A layer of one or five outputs leaves most of a
// vector of outputs empty; here the features of 16 rows are computed at once and stay in registers. Every edge (input,
// output) is a table of polynomials, one per knot interval, in u = (x - t_j) / (t_{j+1} - t_j): for a cubic edge that is
// four lookups and four multiply-adds, whatever the knots, and with grid_size 5 a lookup is one register permuted.
#pragma once
#include "narrow.h"

namespace kan::cpu::KAN_ISA::narrow {

constexpr int kRows = 256;           // rows of a tile
constexpr int kColumn = kRows + 16;  // from one column to the next: a power of two would make stores and loads collide
constexpr int kVectors = kRegisters == 32 ? 2 : 1;  // vectors of rows worked on at once
constexpr int kInputs = 16;          // inputs of a block: one transpose; also the length of a float sum of its own

#if defined(KAN_ISA_AVX512)
KAN_INLINE __mmask16 equals(VecInt<float> a, int b) { return _mm512_cmpeq_epi32_mask((__m512i)a, _mm512_set1_epi32(b)); }
KAN_INLINE __mmask8 equals(VecInt<double> a, int b) { return _mm512_cmpeq_epi64_mask((__m512i)a, _mm512_set1_epi64(b)); }
KAN_INLINE Vec<float> select(__mmask16 mask, Vec<float> a, Vec<float> b) {
  return (Vec<float>)_mm512_mask_mov_ps((__m512)b, mask, (__m512)a);
}
KAN_INLINE Vec<double> select(__mmask8 mask, Vec<double> a, Vec<double> b) {
  return (Vec<double>)_mm512_mask_mov_pd((__m512d)b, mask, (__m512d)a);
}
#else
template <class I> KAN_INLINE I equals(I a, int b) { return (I)(a == b); }
template <class I, class V> KAN_INLINE V select(I mask, V a, V b) { return mask ? a : b; }
#endif

template <int REGISTERS, class T> KAN_INLINE Vec<T> entry(const T* table, VecInt<T> index) {
#if defined(KAN_ISA_AVX2)
  if constexpr (sizeof(T) == 4 && REGISTERS == 1)
    return (Vec<T>)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
#endif
  return lookup<T>(table, REGISTERS > 0 ? REGISTERS * Simd<T>::N : 1 << 30, index);
}

// The pieces of the splines of a layer at one derivative order: its knot intervals, in mode "linear" then the lines below
// and above the range, else a piece of zeros for lanes without spline. Prepared once a call, read by all threads.
template <class T> struct Pieces {
  Order<T> order;
  int outside, low, intervals, registers, degree;  // interval 0 is [t_low, t_low+1)
  bool extended;     // values of mode "linear": lines instead of zeros
  ptrdiff_t stride;  // entries of a table, in whole vectors
  int64_t outputs;
  const Knots<T>* knots;  // (in)
  T* geometry;     // (in, 2 + (degree + 1)^2, stride): t_j, 1 / (t_{j+1} - t_j), and weight m's coefficient of u^d
  int* first;      // (in) interval of the lower end of the range
  T* polynomials;  // (in, out, degree + 1, stride)
  const T* base;   // (in, out), or (out) zeros
  ptrdiff_t base_stride;

  Pieces(const Problem<T>& p, int n, const T* scale)
      : order(p, n, scale), outside(p.outside), low(p.outside == kZero ? 0 : p.spline_order), intervals(bucket_count(p)),
        degree(order.window - 1), extended(p.outside == kLinear && n == 0), outputs(p.out_features) {
    const int length = intervals + (extended ? 2 : 1);
    registers = table_registers<T>(length);
    stride = (length + Simd<T>::N - 1) / Simd<T>::N * Simd<T>::N;
  }
  void set_base(const Problem<T>& p, const T* zeros) {
    base = p.base_weight ? p.base_weight : zeros;
    base_stride = p.base_weight ? outputs : 0;
  }
  int none() const { return intervals; }
  bool vanishes() const { return outside == kZero || order.n >= (outside == kClamp ? 1 : 2); }
  ptrdiff_t geometry_size() const { return (2 + (degree + 1) * (degree + 1)) * stride; }
  ptrdiff_t edge_size() const { return (degree + 1) * stride; }
  const T* lower_knot(int64_t i) const { return geometry + i * geometry_size(); }
  const T* inverse_width(int64_t i) const { return lower_knot(i) + stride; }
  const T* weight(int64_t i, int m, int d) const { return lower_knot(i) + (2 + m * (degree + 1) + d) * stride; }
};

// Window weights of order P as polynomials in u, a vector of intervals at a time: de Boor's triangle (basis() in bspline.h)
// with x - t and t - x linear in u. Every factor has coefficients of at most 1, so nothing is lost to cancellation.
template <int P, class T> void expand_weights(const Knots<T>& k, const Pieces<T>& pieces, T* geometry) {
  using V = Vec<T>;
  const ptrdiff_t stride = pieces.stride;
  for (int b = 0; b < pieces.intervals; b += Simd<T>::N) {
    const T* t = k.t + k.order + pieces.low + b;  // read beyond the last interval, where the table is padded
    const V knot = load<T>(t), width = load<T>(t + 1) - knot, zero{};
    store<T>(geometry + b, knot);
    store<T>(geometry + stride + b, k.uniform ? broadcast<T>(k.inverse_h) : width > 0 ? 1 / width : zero);
    const V h = k.uniform ? broadcast<T>(1) : width;
    V w[P + 1][P + 1] = {};
    w[0][0] = broadcast<T>(1);
    KAN_UNROLL for (int q = 1; q <= P; ++q) {
      V saved[P + 1] = {};
      KAN_UNROLL for (int r = 0; r < q; ++r) {
        const V above = k.uniform ? broadcast<T>(T(r + 1)) : load<T>(t + r + 1) - knot;
        const V below = k.uniform ? broadcast<T>(T(q - r - 1)) : knot - load<T>(t + 1 - q + r);
        const V sum = above + below, recip = sum > 0 ? 1 / sum : zero;
        V term[P + 1];
        KAN_UNROLL for (int d = 0; d < q; ++d) term[d] = w[r][d] * recip;
        KAN_UNROLL for (int d = 0; d <= q; ++d) {
          const V same = d < q ? term[d] : zero, lower = d > 0 ? term[d - 1] * h : zero;
          w[r][d] = saved[d] + above * same - lower;
          saved[d] = below * same + lower;
        }
      }
      KAN_UNROLL for (int d = 0; d <= q; ++d) w[q][d] = saved[d];
    }
    KAN_UNROLL for (int m = 0; m <= P; ++m) {
      KAN_UNROLL for (int d = 0; d <= P; ++d) store<T>(geometry + (2 + m * (P + 1) + d) * stride + b, w[m][d]);
    }
  }
}

// The pieces beyond the intervals: lines through value and slope at the ends of the range, or zeros.
template <class T> void add_outer_pieces(const Knots<T>& k, const Pieces<T>& pieces, int first, T* geometry) {
  const int M = pieces.degree + 1, rest = int(pieces.stride) - pieces.intervals, last = k.high - k.low;
  for (int q = 0; q < 2 + M * M; ++q) memset(geometry + q * pieces.stride + pieces.intervals, 0, sizeof(T) * size_t(rest));
  T *knot = geometry, *inverse = knot + pieces.stride;
  knot[pieces.intervals] = k.first;  // of the zeros too: u must stay finite
  if (!pieces.extended) return;
  knot[pieces.intervals + 1] = k.last;
  inverse[pieces.intervals] = inverse[first];
  inverse[pieces.intervals + 1] = inverse[last];
  for (int m = 0; m < M; ++m) {
    T *w = geometry + (2 + m * M) * pieces.stride, value = 0, slope = 0;
    for (int d = 0; d < M; ++d) {
      value += w[d * pieces.stride + last];
      slope += T(d) * w[d * pieces.stride + last];
    }
    w[pieces.intervals] = w[first];
    w[pieces.intervals + 1] = value;
    if (M == 1) continue;
    w[pieces.stride + pieces.intervals] = w[pieces.stride + first];
    w[pieces.stride + pieces.intervals + 1] = slope;
  }
}

template <int P, class T> void prepare_geometry(const Problem<T>& p, const Pieces<T>& pieces) {
  for (int64_t i = 0; i < p.in_features; ++i) {
    const Knots<T>& k = pieces.knots[i];
    int first = 0;
    while (first < k.high - k.low && k.t[k.order + k.low + first + 1] <= k.first) ++first;
    pieces.first[i] = first;
    T* geometry = pieces.geometry + i * pieces.geometry_size();
    expand_weights<P, T>(k, pieces, geometry);
    add_outer_pieces(k, pieces, first, geometry);
  }
}

// scratch: (bases + n) * out entries; row: stride + degree + 1, the coefficients of one edge from its first window on.
template <class T> void prepare_polynomials(const Problem<T>& p, Pieces<T>& pieces, T* scratch, T* row) {
  const int n = pieces.order.n, bases = p.bases(), O = int(p.out_features), M = pieces.degree + 1;
  const ptrdiff_t stride = pieces.stride;
  const int begin = pieces.low - p.spline_order + n;  // row of the coefficients where the window of interval 0 begins
  const int count = bases + n, length = int(stride) + M;
  for (int64_t i = 0; i < p.in_features; ++i) {
    const T* c = p.spline_weight + i * bases * O;
    const int first = pieces.first[i], last = pieces.knots[i].high - pieces.knots[i].low;
    if (n > 0) {
      difference(p.grid + i * p.knots(), p.spline_order, n, bases, Storage::same, c, 0, O, O, O, scratch);
      c = scratch;
    }
    for (int o = 0; o < O; ++o) {
      for (int f = 0; f < length; ++f) {
        const int r = begin + f;
        row[f] = r >= 0 && r < count ? c[r * O + o] : T(0);
      }
      for (int d = 0; d < M; ++d) {
        T* to = pieces.polynomials + (i * O + o) * pieces.edge_size() + d * stride;
        for (ptrdiff_t b = 0; b < stride; b += Simd<T>::N) {
          Vec<T> a{};
          for (int m = 0; m < M; ++m) a += load<T>(pieces.weight(i, m, d) + b) * load<T>(row + b + m);
          store<T>(to + b, a);
        }
        if (pieces.extended) {
          T lower = 0, upper = 0;
          for (int m = 0; m < M; ++m) {
            lower += pieces.weight(i, m, d)[pieces.intervals] * row[first + m];
            upper += pieces.weight(i, m, d)[pieces.intervals + 1] * row[last + m];
          }
          to[pieces.intervals] = lower;
          to[pieces.intervals + 1] = upper;
        }
      }
    }
  }
}

// The piece of every lane and its coordinate in it, which is 0 where the piece is zero: infinite x must not make NaN.
template <int P, int REGISTERS, class T>
KAN_INLINE void locate(const Pieces<T>& t, const Knots<T>& k, const T* lower_knot, Vec<T> x, VecInt<T>& piece, Vec<T>& u) {
  using I = VecInt<T>;
  const int last = k.high - k.low;
  const bool vanishes = t.vanishes();
  Vec<T> at = vanishes || t.extended ? x : into_range<T>(k, x);
  I j;
  if (k.uniform) {
    Vec<T> guess = (at - lower_knot[0]) * k.inverse_h;
    guess = guess < T(last) ? guess : broadcast<T>(T(last));
    if constexpr (P < 2) {
      // The interval beside the right one costs the P-th power of a rounding; below that the stored knots must decide.
      j = to_int<T>(guess > 0 ? guess : Vec<T>{});
      const I below = (I)(at < entry<REGISTERS, T>(lower_knot, j));
      j = j + below < 0 ? I{} : j + below;
      const I next = j < last ? j + 1 : j;
      j = at >= entry<REGISTERS, T>(lower_knot, next) ? next : j;
    } else {
      j = to_int<T>(guess);  // negative below the range alone, where another piece takes over
    }
  } else {
    j = lookup_byte<T>(k.below, k.cell(Lanes<T, 1>{{at}}).v[0]);
    for (int step = k.steps; step > 0; step >>= 1) {
      I candidate = j + step;
      candidate = candidate > last ? I{} + last : candidate;
      j = at >= entry<REGISTERS, T>(lower_knot, candidate) ? candidate : j;
    }
  }
  if (t.extended) {
    j = x < k.first ? I{} + t.intervals : j;
    j = x > k.last ? I{} + (t.intervals + 1) : j;
  } else if (vanishes) {
    const I gone = (I)(x < k.first) | (t.outside == kZero ? (I)(x >= k.last) : (I)(x > k.last));
    j = gone ? I{} + t.none() : j;
    at = gone ? Vec<T>{} + k.first : at;
  }
  piece = j;
  u = at - entry<REGISTERS, T>(lower_knot, j);
  u *= k.uniform ? broadcast<T>(k.inverse_h) : entry<REGISTERS, T>(lower_knot + t.stride, j);
}

// The base activation; without one still a NaN where x is NaN, which the zeros of Pieces::base pass on.
template <class T> KAN_INLINE Vec<T> base_feature(const Pieces<T>& t, Vec<T> x) {
  if (t.order.activation.activation != kNone) return activate<T>(t.order.activation, x);
  return x == x ? Vec<T>{} : x;
}

#if defined(KAN_ISA_AVX512)
// 16 rows of C columns are C registers. Each wanted register takes its lanes from all of them, by permutes of one
// or two registers and masks.
template <int C> void split_columns(const float* in, int rows, float* out, ptrdiff_t ld) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int i = 0; i < C; ++i) {
    const __m512i flat = _mm512_add_epi32(_mm512_mullo_epi32(lane, _mm512_set1_epi32(C)), _mm512_set1_epi32(i));
    __mmask16 mask[(C + 1) / 2];  // lanes that come from each pair of registers
    KAN_UNROLL for (int s = 0; s < (C + 1) / 2; ++s)
      mask[s] = _mm512_cmpeq_epi32_mask(_mm512_srli_epi32(flat, 5), _mm512_set1_epi32(s));
    int b = 0;
    for (; b + 16 <= rows; b += 16) {
      const float* from = in + ptrdiff_t(b) * C;
      __m512 v = _mm512_permutex2var_ps(_mm512_loadu_ps(from), flat, _mm512_loadu_ps(from + 16));
      KAN_UNROLL for (int s = 2; s + 1 < C; s += 2) {
        const __m512 pair = _mm512_permutex2var_ps(_mm512_loadu_ps(from + 16 * s), flat, _mm512_loadu_ps(from + 16 * s + 16));
        v = _mm512_mask_mov_ps(v, mask[s / 2], pair);
      }
      if constexpr (C % 2) v = _mm512_mask_permutexvar_ps(v, mask[C / 2], flat, _mm512_loadu_ps(from + 16 * (C - 1)));
      _mm512_storeu_ps(out + i * ld + b, v);
    }
    for (; b < rows; ++b) out[i * ld + b] = in[ptrdiff_t(b) * C + i];
  }
}
template <int C> void join_columns(const float* in, ptrdiff_t ld, int rows, float* out) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  for (int s = 0; s < C; ++s) {
    const __m512i flat = _mm512_add_epi32(lane, _mm512_set1_epi32(16 * s));
    const __m512 ratio = _mm512_mul_ps(_mm512_add_ps(_mm512_cvtepi32_ps(flat), _mm512_set1_ps(0.5f)), _mm512_set1_ps(1.0f / C));
    const __m512i row = _mm512_cvttps_epi32(ratio);
    const __m512i column = _mm512_sub_epi32(flat, _mm512_mullo_epi32(row, _mm512_set1_epi32(C)));
    __mmask16 mask[C];
    KAN_UNROLL for (int c = 0; c < C; ++c) mask[c] = _mm512_cmpeq_epi32_mask(column, _mm512_set1_epi32(c));
    for (int b = 0; b < rows; b += 16) {
      __m512 v = _mm512_setzero_ps();
      KAN_UNROLL for (int c = 0; c < C; ++c) v = _mm512_mask_permutexvar_ps(v, mask[c], row, _mm512_loadu_ps(in + c * ld + b));
      _mm512_mask_storeu_ps(out + ptrdiff_t(b) * C + 16 * s, lanes16((rows - b) * C - 16 * s), v);
    }
  }
}
#define KAN_COLUMNS(function, ...)         \
  switch (columns) {                       \
    case 2: return function<2>(__VA_ARGS__); \
    case 3: return function<3>(__VA_ARGS__); \
    case 4: return function<4>(__VA_ARGS__); \
    case 5: return function<5>(__VA_ARGS__); \
    case 6: return function<6>(__VA_ARGS__); \
    case 7: return function<7>(__VA_ARGS__); \
    default: return function<8>(__VA_ARGS__); \
  }
inline void split_packed(const float* in, int rows, int columns, float* out) {
  KAN_COLUMNS(split_columns, in, rows, out, kColumn)
}
inline void join_packed(const float* in, int rows, int columns, float* out) {
  KAN_COLUMNS(join_columns, in, kColumn, rows, out)
}
#undef KAN_COLUMNS
#endif

// Rows of `columns` values, ld apart, to columns, zeros up to a whole number of kVectors vectors.
template <class T> inline void to_columns(const T* in, int64_t ld, int rows, int columns, T* out) {
  constexpr int step = kVectors * Simd<T>::N;
  const int whole = (rows + step - 1) / step * step;
  if (ld == 1) return read_padded(Storage::same, in, 0, rows, whole, out);
  bool done = false;
#if defined(KAN_ISA_AVX512)
  if constexpr (sizeof(T) == 4)
    if (ld == columns && columns <= 8) {
      split_packed(in, rows, columns, out);
      done = true;
    }
#endif
  if (!done) transpose<T>(in, ld, rows, columns, out, kColumn);
  for (int i = 0; i < columns; ++i)
    for (int b = rows; b < whole; ++b) out[i * kColumn + b] = 0;
}
template <class T> inline void from_columns(const T* in, int rows, int columns, T* out, int64_t ld) {
  if (ld == 1) return read_row(Storage::same, in, 0, rows, out);
#if defined(KAN_ISA_AVX512)
  if constexpr (sizeof(T) == 4)
    if (ld == columns && columns <= 8) return join_packed(in, rows, columns, out);
#endif
  transpose<T>(in, kColumn, columns, rows, out, ld);
}

// The same from and to tensors of other storage: `columns` values from base[index] on in every row.
template <class T>
inline void to_columns(Storage type, const T* base, int64_t index, int64_t ld, int rows, int columns, T* out) {
  if (type == Storage::same) return to_columns(base + index, ld, rows, columns, out);
  alignas(64) T wide[kRows * kInputs + 16];
  if (ld == columns) read_row(type, base, index, int64_t(rows) * columns, wide);
  else for (int r = 0; r < rows; ++r) read_row(type, base, index + r * ld, columns, wide + r * columns);
  to_columns(wide, columns, rows, columns, out);
}
template <class T>
inline void from_columns(const T* in, int rows, int columns, Storage type, T* base, int64_t index, int64_t ld) {
  if (type == Storage::same) return from_columns(in, rows, columns, base + index, ld);
  alignas(64) T wide[kRows * kInputs + 16];
  from_columns(in, rows, columns, wide, columns);
  if (ld == columns) write_row(type, wide, int64_t(rows) * columns, base, index);
  else for (int r = 0; r < rows; ++r) write_row(type, wide + r * columns, columns, base, index + r * ld);
}

// The problem with weights of type T, which the tables are made from.
template <class T> inline void reserve_weights(const Problem<T>& p, Arena& arena) {
  if (p.w_storage != Storage::same) arena.reserve<T>(size_t(p.in_features * (p.bases() + 1) * p.out_features) + 16);
}
template <class T> inline Problem<T> with_wide_weights(const Problem<T>& p, Arena& arena) {
  Problem<T> wide = p;
  if (p.w_storage == Storage::same) return wide;
  const int64_t edges = p.in_features * p.out_features;
  T *spline = arena.take<T>(size_t(edges * p.bases())), *base = arena.take<T>(size_t(edges));
  if (p.spline_weight) read_row(p.w_storage, p.spline_weight, 0, edges * p.bases(), spline);
  if (p.base_weight) read_row(p.w_storage, p.base_weight, 0, edges, base);
  if (p.spline_weight) wide.spline_weight = spline;
  if (p.base_weight) wide.base_weight = base;
  return wide;
}

template <class T> inline const Knots<T>* prepare_knots(const Problem<T>& p, Knots<T>* knots, T* memory) {
  const size_t each = Knots<T>::scratch(p.knots(), p.spline_order);
  for (int64_t i = 0; i < p.in_features; ++i)
    knots[i].prepare(p.grid + i * p.knots(), p.knots(), p.spline_order, p.outside, memory + size_t(i) * each);
  return knots;
}

// Memory of the pieces of one order, without or with the coefficients of every edge.
template <class T> inline void reserve_pieces(const Pieces<T>& t, int64_t inputs, bool polynomials, Arena& arena) {
  arena.reserve<int>(size_t(inputs));
  arena.reserve<T>(size_t(inputs * t.geometry_size()));
  if (polynomials) arena.reserve<T>(size_t(inputs * t.outputs * t.edge_size()) + size_t(t.stride) + 2 * size_t(t.degree) + 64);
}
template <class T>
inline void take_pieces(const Problem<T>& p, Pieces<T>& t, const Knots<T>* knots, bool polynomials, T* scratch, Arena& arena) {
  t.knots = knots;
  t.first = arena.take<int>(size_t(p.in_features));
  t.geometry = arena.take<T>(size_t(p.in_features * t.geometry_size()));
  switch (t.degree) {
    case 0: prepare_geometry<0, T>(p, t); break;
    case 1: prepare_geometry<1, T>(p, t); break;
    case 2: prepare_geometry<2, T>(p, t); break;
    case 3: prepare_geometry<3, T>(p, t); break;
    case 4: prepare_geometry<4, T>(p, t); break;
    default: prepare_geometry<5, T>(p, t); break;
  }
  if (!polynomials) return;
  t.polynomials = arena.take<T>(size_t(p.in_features * t.outputs * t.edge_size()));
  if (t.order.spline) prepare_polynomials(p, t, scratch, arena.take<T>(size_t(t.stride + t.degree + 1)));
}

// Rows a task takes: all of them, or an even share of about 10 us of work or more, in whole vectors.
template <class T> inline int64_t row_tasks(const Problem<T>& p, int64_t threads) {
  const int64_t work = p.batch * p.in_features * (p.out_features + 8);  // the features of a row cost as much as 8 outputs
  return larger<int64_t>(1, smaller(threads, work / kMinimumWork));
}
inline int64_t rows_per_task(int64_t batch, int64_t tasks) { return ((batch + tasks - 1) / tasks + 15) / 16 * 16; }

}  // namespace kan::cpu::KAN_ISA::narrow
