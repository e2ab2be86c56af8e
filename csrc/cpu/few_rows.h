// Batches of a few rows: buckets would hold hardly more than one. Inputs are prepared side by side, a vector of them at a
// time, and the sums of an output tile stay in registers while all inputs pass.
#pragma once
#include "bucket.h"

namespace kan::cpu::KAN_ISA::few {

// Time over the buckets' and over nn.Linear's of equal parameters, cubic, float32, AVX-512, one thread:
//   rows         1           2           4           8
//   256 x 256    0.42, 0.60  0.62, 0.53  0.95, 0.72  1.42, 0.99
//   784 x 64     0.32, 0.72                          1.26, 1.21
//   1024 x 1024  0.32, 0.48              1.12, 1.02  2.2,  1.83
constexpr int kRows = 2;
// Where outputs do not fill a vector, over the buckets' or the tables' (inputs x outputs):
//   rows         1      4      8      16
//   784 x 10     0.10   0.28   0.50   0.93
//   64 x 1       0.42   0.66   0.95   1.42
//   32 x 10      0.47   0.56   0.65   0.86
//   16 x 10      0.37   0.42   0.48   0.59
//   5 x 1        0.86   0.95   1.12   1.41
constexpr int kRowsOfNarrow = 8;

// One row of the batch, prepared: everything by input.
template <class T> struct Row {
  uint16_t* interval;    // of the input's grid; low + buckets where it has no spline
  T* w[kMaxOrder + 1];   // weights of the window in the order of window_row
  T* base;               // base activation
};

// Weights of one (or the other) kind, a vector of an input's row at a time. `place`: of its first number.
template <class T> struct WholeRows {
  const T* weights;
  KAN_INLINE Vec<T> at(ptrdiff_t place) const { return load<T>(weights + place); }
};
// The same where a vector is wider than a row: its lanes behind hold what the next rows make of it, which nobody stores. The last rows,
// behind which nothing may be read, are copied.
template <class T> struct NarrowRows {
  const T* weights;
  ptrdiff_t size, columns;
  KAN_INLINE Vec<T> at(ptrdiff_t place) const {
    if (place + Simd<T>::N <= size) return load<T>(weights + place);
    alignas(64) T last[Simd<T>::N] = {};
    memcpy(last, weights + place, sizeof(T) * size_t(columns));
    return load<T>(last);
  }
};

// total (V N) = one row's outputs o .. o + V N - 1; sums over inputs are blocked as the bucketed kernels' are.
// end: the interval without spline.
template <class T, int M, int V, class Rows>
KAN_INLINE void accumulate_row(const Problem<T>& p, const Row<T>& row, int end, int64_t o, Rows spline, Rows base, Vec<T> (&total)[V]) {
  using Vt = Vec<T>;
  constexpr int N = Simd<T>::N;
  const ptrdiff_t O = p.out_features, I = p.in_features, bases = p.bases();
  KAN_UNROLL for (int v = 0; v < V; ++v) total[v] = Vt{};
  for (ptrdiff_t i0 = 0; i0 < I; i0 += kBlockInputs) {
    Vt a[V] = {};
    const ptrdiff_t i1 = smaller<ptrdiff_t>(I, i0 + kBlockInputs);
    for (ptrdiff_t i = i0; i < i1; ++i) {
      if (row.interval[i] != end) {
        const ptrdiff_t first = ptrdiff_t(row.interval[i]) - p.spline_order, c = (i * bases + first) * O + o;
        const bool whole = first >= 0 && first + M <= bases;
        KAN_UNROLL for (int m = 0; m < M; ++m) {
          const int r = window_row<M>(m);
          if (!whole && (first + r < 0 || first + r >= bases)) continue;
          const T w = row.w[m][i];
          KAN_UNROLL for (int v = 0; v < V; ++v) a[v] += w * spline.at(c + r * O + v * N);
        }
      }
      if (p.base_weight) {
        const T s = row.base[i];
        KAN_UNROLL for (int v = 0; v < V; ++v) a[v] += s * base.at(i * O + o + v * N);
      }
    }
    KAN_UNROLL for (int v = 0; v < V; ++v) total[v] += a[v];
  }
}

template <class T, int M, int V> void accumulate_whole(const Problem<T>& p, const Row<T>& row, int end, int64_t o, T* y) {
  using Rows = WholeRows<T>;
  Vec<T> total[V];
  accumulate_row<T, M, V>(p, row, end, o, Rows{p.spline_weight}, Rows{p.base_weight}, total);
  KAN_UNROLL for (int v = 0; v < V; ++v) store<T>(y + v * Simd<T>::N, total[v]);
}
template <class T, int M> void accumulate_narrow(const Problem<T>& p, const Row<T>& row, int end, T* y) {
  using Rows = NarrowRows<T>;
  const ptrdiff_t O = p.out_features, edges = p.in_features * O;
  Vec<T> total[1];
  accumulate_row<T, M, 1>(p, row, end, 0, Rows{p.spline_weight, edges * p.bases(), O}, Rows{p.base_weight, edges, O}, total);
  alignas(64) T out[Simd<T>::N];
  store<T>(out, total[0]);
  memcpy(y, out, sizeof(T) * size_t(O));
}

constexpr int kWidest = kRegisters == 32 ? 8 : 4;  // vectors of a tile: as many as leave registers for sums and totals

template <class T, int M>
void accumulate(const Problem<T>& p, const Row<T>& row, int end, int64_t o0, int64_t o1, T* y) {
  constexpr int N = Simd<T>::N;
  if (p.out_features < N) return accumulate_narrow<T, M>(p, row, end, y);
  for (int64_t o = o0; o < o1;) {
    if (o1 - o >= kWidest * N) {
      accumulate_whole<T, M, kWidest>(p, row, end, o, y + o);
      o += kWidest * N;
    } else if (o1 - o >= 2 * N) {
      accumulate_whole<T, M, 2>(p, row, end, o, y + o);
      o += 2 * N;
    } else {
      // The last tile begins early enough to be whole: some outputs are computed twice, to the same bits.
      o = smaller(o, o1 - N);
      accumulate_whole<T, M, 1>(p, row, end, o, y + o);
      o += N;
    }
  }
}

template <class T> inline bool serves(const Problem<T>& p) {
  const int most = p.out_features < Simd<T>::N ? kRowsOfNarrow : kRows;
  return p.batch <= most && p.n_output == 0 && p.w_storage == Storage::same && p.x_storage == Storage::same;
}

// Rows [b0, b1) x outputs [o0, o1).
template <class T>
void output_range(const Problem<T>& p, const Runtime& runtime, int64_t b0, int64_t b1, int64_t o0, int64_t o1) {
  const Order<T> order(p, p.n_output, p.scale);
  const int64_t I = p.in_features;
  const int buckets = bucket_count(p), M = order.window;
  const int end = (p.outside == kZero ? 0 : p.spline_order) + buckets;
  Arena arena(runtime);
  KnotsOfBlock<T>::reserve(p, arena);
  Tiles<T>::reserve(order, 1, kBlockInputs, arena);
  arena.reserve<uint16_t>(size_t(I));
  for (int m = 0; m <= M; ++m) arena.reserve<T>(size_t(I));
  arena.commit();
  KnotsOfBlock<T> knots(p, arena);
  Tiles<T> tiles(order, 1, kBlockInputs, arena);
  Tile<T>& tile = tiles[0];
  Row<T> row;
  row.interval = arena.take<uint16_t>(size_t(I));
  for (int m = 0; m < M; ++m) row.w[m] = arena.take<T>(size_t(I));
  row.base = arena.take<T>(size_t(I));
  Located<T> at;
  alignas(64) T x[kBlockInputs + Simd<T>::N], scale[kBlockInputs + Simd<T>::N];

  for (int64_t b = b0; b < b1; ++b) {
    for (int64_t i0 = 0; i0 < I; i0 += kBlockInputs) {
      const int inputs = int(smaller<int64_t>(kBlockInputs, I - i0));
      if (b == b0 || I > kBlockInputs) knots.prepare(p, i0, inputs);
      for (int first = 0, last; first < inputs; first = last) {
        for (last = first + 1; last < inputs && knots.of[last] == knots.of[first]; ++last) {}
        const Knots<T>& k = *knots.of[first];
        const int64_t i = i0 + first;
        const int count = last - first;
        memset(x, 0, sizeof x);
        memcpy(x, p.x + b * I + i, sizeof(T) * size_t(count));
        if (p.scale) memcpy(scale, p.scale + b * I + i, sizeof(T) * size_t(count));
        locate_rows(p, k, order, M, buckets, x, count, at);
        prepare_tile(p, k, order, x, p.scale ? scale : nullptr, count, at, tile);
        memcpy(row.interval + i, at.interval, sizeof(uint16_t) * size_t(count));
        for (int q = 0; q < count; ++q) {
          T rest = order.scaled ? tile.total[q] : T(1);
          for (int m = 0; m < M - 1; ++m) {
            row.w[m][i + q] = tile.w[m][q];
            rest -= tile.w[m][q];
          }
          row.w[M - 1][i + q] = rest;
        }
        if (p.base_weight) memcpy(row.base + i, tile.base, sizeof(T) * size_t(count));
      }
    }
    T* y = p.y + b * p.out_features;
    switch (M) {
      case 1: accumulate<T, 1>(p, row, end, o0, o1, y); break;
      case 2: accumulate<T, 2>(p, row, end, o0, o1, y); break;
      case 3: accumulate<T, 3>(p, row, end, o0, o1, y); break;
      case 4: accumulate<T, 4>(p, row, end, o0, o1, y); break;
      case 5: accumulate<T, 5>(p, row, end, o0, o1, y); break;
      default: accumulate<T, 6>(p, row, end, o0, o1, y); break;
    }
  }
}

}  // namespace kan::cpu::KAN_ISA::few
