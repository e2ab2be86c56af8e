// contract_output(x, s, W, n)[b, o] = sum_{i,f} s phi_f^(n)(x) W: the forward pass, and every derivative's share of it.
#include "bucket.h"
#include "few_rows.h"
#include "narrow.h"

namespace kan::cpu::KAN_ISA {
namespace {

// One input on one tile: y[row][0 .. V N) += window weights * coefficients (+ base), bucket by bucket.
//   y (rows, V N) packed; c: coefficient window; base: row of base weights (V N) or null.
template <class T, int M, int V, bool BASE, bool SCALED>
void accumulate_outputs(const Tile<T>& given, const Window<T>& c, const T* base, T* __restrict y) {
  using Vt = Vec<T>;
  constexpr int N = Simd<T>::N;
  alignas(64) static const T zeros[V * N] = {};
  const Tile<T> tile = given;  // a copy that the stores below cannot alias
  Vt b[V];
  if (BASE) { KAN_UNROLL for (int v = 0; v < V; ++v) b[v] = load<T>(base + v * N); }
  for (int g = 0; g <= tile.buckets; ++g) {
    const uint16_t *row = tile.rows + tile.start[g], *end = tile.rows + tile.start[g + 1];
    if (row == end) continue;
    if (g == tile.buckets) {
      if (BASE)
        do {
          T* out = y + ptrdiff_t(*row) * (V * N);
          const T s = tile.base[*row++];
          KAN_UNROLL for (int v = 0; v < V; ++v) store<T>(out + v * N, load<T>(out + v * N) + s * b[v]);
        } while (row < end);
      continue;
    }
    const T* p[M];
    KAN_UNROLL for (int m = 0; m < M; ++m) {
      const int r = g + c.offset + window_row<M>(m);
      p[m] = r >= 0 && r < c.count ? c.rows + r * c.stride : zeros;
    }
    Vt last[V], d[M > 1 ? M - 1 : 1][V];
    KAN_UNROLL for (int v = 0; v < V; ++v) {
      last[v] = load<T>(p[M - 1] + v * N);
      KAN_UNROLL for (int m = 0; m < M - 1; ++m) d[m][v] = load<T>(p[m] + v * N) - last[v];
    }
    do {
      const ptrdiff_t r = *row++;
      T* out = y + r * (V * N);
      Vt a[V];
      if (SCALED) {
        const T s = tile.total[r];
        KAN_UNROLL for (int v = 0; v < V; ++v) a[v] = load<T>(out + v * N) + s * last[v];
      } else {
        KAN_UNROLL for (int v = 0; v < V; ++v) a[v] = load<T>(out + v * N) + last[v];
      }
      KAN_UNROLL for (int m = 0; m < M - 1; ++m) {
        const T w = tile.w[m][r];
        KAN_UNROLL for (int v = 0; v < V; ++v) a[v] += w * d[m][v];
      }
      if (BASE) {
        const T s = tile.base[r];
        KAN_UNROLL for (int v = 0; v < V; ++v) a[v] += s * b[v];
      }
      KAN_UNROLL for (int v = 0; v < V; ++v) store<T>(out + v * N, a[v]);
    } while (row < end);
  }
}

template <class T> using OutputKernel = void (*)(const Tile<T>&, const Window<T>&, const T*, T*);

template <class T, int M, int V> OutputKernel<T> pick_flags(bool base, bool scaled) {
  if (base) return scaled ? accumulate_outputs<T, M, V, true, true> : accumulate_outputs<T, M, V, true, false>;
  return scaled ? accumulate_outputs<T, M, V, false, true> : accumulate_outputs<T, M, V, false, false>;
}
template <class T, int M> OutputKernel<T> pick_vectors(int vectors, bool base, bool scaled) {
  if constexpr (widest_tile(M) >= 4) { if (vectors == 4) return pick_flags<T, M, 4>(base, scaled); }
  if constexpr (widest_tile(M) >= 2) { if (vectors == 2) return pick_flags<T, M, 2>(base, scaled); }
  return pick_flags<T, M, 1>(base, scaled);
}
template <class T> OutputKernel<T> pick(int window, int vectors, bool base, bool scaled) {
  switch (window) {
    case 1: return pick_vectors<T, 1>(vectors, base, scaled);
    case 2: return pick_vectors<T, 2>(vectors, base, scaled);
    case 3: return pick_vectors<T, 3>(vectors, base, scaled);
    case 4: return pick_vectors<T, 4>(vectors, base, scaled);
    case 5: return pick_vectors<T, 5>(vectors, base, scaled);
    default: return pick_vectors<T, 6>(vectors, base, scaled);
  }
}

// How a call is cut into tasks: by rows, and very small batches by outputs as well, though every task then prepares x for
// itself. Inputs are not split: adding up the parts moves them from core to core, which at 256 x 64 x 64 on two threads
// costs more than the longer buckets save.
template <class T> struct Partition {
  int64_t rows, outs;  // of a task
  int64_t row_tasks, out_tasks;

  static int64_t parts(int64_t whole, int64_t part) { return (whole + part - 1) / part; }
  Partition(const Problem<T>& p, int64_t threads) : outs(p.out_features), out_tasks(1) {
    const int64_t work = p.batch * p.in_features * p.out_features;
    threads = smaller(threads, larger<int64_t>(1, work / kMinimumWork));
    rows = parts(p.batch, threads);
    if (threads > 1 && rows < kTileRows / 8 && p.out_features >= 128) {
      rows = p.batch;
      outs = parts(parts(p.out_features, smaller(threads, p.out_features / 64)), 64) * 64;
      out_tasks = parts(p.out_features, outs);
    }
    rows = smaller<int64_t>(kTileRows, rows);
    row_tasks = parts(p.batch, rows);
  }
};

template <class T> struct OutputTask {
  const Problem<T>& p;
  const Runtime& runtime;
  const Partition<T>& cut;
};

// Rows [b0, b1) x outputs [o0, o1): for each block of inputs, prepare all tiles once, then run every output tile over them.
template <class T> void output_range(const Problem<T>& p, const Runtime& runtime, int64_t b0, int64_t b1, int64_t o0,
                                     int64_t o1) {
  constexpr int N = Simd<T>::N;
  const Order<T> order(p, p.n_output, p.scale);
  const int64_t O = p.out_features, I = p.in_features;
  const int bases = p.bases(), buckets = bucket_count(p), n = order.n;
  const bool base = p.base_weight != nullptr;
  const int width = widest_tile(order.window) * N;
  // Sums over blocks of inputs need the compute type: where y has another, they are kept here to the end.
  const bool typed = p.w_storage != Storage::same;
  const ptrdiff_t ld = typed ? o1 - o0 : O;
  const int rows = int(b1 - b0), block = int(smaller<int64_t>(kBlockInputs, I));
  const ptrdiff_t ld_tile = tile_stride(rows);

  Arena arena(runtime);
  KnotsOfBlock<T>::reserve(p, arena);
  Tiles<T>::reserve(order, block, rows, arena);
  arena.reserve<Sorting>(size_t(block));
  arena.reserve<uint16_t>(size_t(block * (buckets + 2)));
  arena.reserve<T>(size_t((p.scale ? 2 : 1) * block * ld_tile) + size_t(bases + n + 2) * width + size_t(rows) * width +
                   (typed ? size_t(rows) * size_t(ld) : 0));
  arena.commit();
  Tiles<T> tile(order, block, rows, arena);
  Sorting* sorting = arena.take<Sorting>(size_t(block));
  uint16_t* starts = arena.take<uint16_t>(size_t(block * (buckets + 2)));
  T* column = arena.take<T>(size_t(block * ld_tile));
  T* scale_column = p.scale ? arena.take<T>(size_t(block * ld_tile)) : nullptr;
  KnotsOfBlock<T> knots(p, arena);
  T* packed = arena.take<T>(size_t(bases + n + 1) * width);
  T* packed_base = arena.take<T>(width);
  T* y = arena.take<T>(size_t(rows) * width);
  T* result = typed ? arena.take<T>(size_t(rows) * size_t(ld)) : p.y + b0 * O + o0;
  Located<T> at;

  for (int64_t i0 = 0; i0 < I; i0 += kBlockInputs) {
    const int inputs = int(smaller<int64_t>(kBlockInputs, I - i0));
    transpose_from<T>(p.x_storage, p.x, b0 * I + i0, I, rows, inputs, column, ld_tile);
    if (p.scale) transpose<T>(p.scale + b0 * I + i0, I, rows, inputs, scale_column, ld_tile);
    knots.prepare(p, i0, inputs);
    for (int i = 0; i < inputs; ++i) {
      const T *x = column + i * ld_tile, *scale = p.scale ? scale_column + i * ld_tile : nullptr;
      uint16_t* start = starts + i * (buckets + 2);
      sort_tile(p, *knots.of[i], order, order.window, buckets, x, rows, at, sorting[i].rows, start);
      tile[i].rows = sorting[i].rows;
      tile[i].start = start;
      tile[i].buckets = buckets;
      prepare_tile(p, *knots.of[i], order, x, scale, rows, at, tile[i]);
    }
    for (int64_t o = o0; o < o1;) {
      const OutputTile<T> out = output_tile<T>(o, o1, order.window);
      const int w = out.vectors * N;
      const OutputKernel<T> kernel = pick<T>(order.window, out.vectors, base, order.scaled);
      // A sum of its own for every block of inputs keeps float error near that of a blocked matrix product.
      memset(y, 0, sizeof(T) * size_t(rows) * size_t(w));
      for (int i = 0; i < inputs; ++i) {
        const ptrdiff_t at_spline = (i0 + i) * bases * O + o, at_base = (i0 + i) * O + o;
        const T* c = p.spline_weight + at_spline;
        const T* b = base ? p.base_weight + at_base : nullptr;
        Window<T> window{c, O, bases, (p.outside == kZero ? 0 : p.spline_order) - p.spline_order + n};
        if (!order.spline) {
          window.count = 0;
        } else if (n > 0 || !out.whole() || typed) {
          difference(p.grid + (i0 + i) * p.knots(), p.spline_order, n, bases, p.w_storage, p.spline_weight, at_spline, O,
                     out.columns, w, packed);
          window = {packed, w, bases + n, window.offset};
        }
        if (i + 1 < inputs && !typed) {
          if (order.spline) prefetch_rows(c + bases * O, O, bases, out.columns);
          if (base) prefetch_rows(b + O, O, 1, out.columns);
        }
        if (o == o0 && i0 + inputs < I && p.x_storage == Storage::same)
          prefetch_block(p.x + b0 * I + i0 + inputs, I, rows, I - i0 - inputs, i, inputs);
        if (base && (!out.whole() || typed)) {
          read_padded(p.w_storage, p.base_weight, at_base, out.columns, w, packed_base);
          b = packed_base;
        }
        kernel(tile[i], window, b, y);
      }
      for (int64_t r = b0; r < b1; ++r) {
        const T* from = y + (r - b0) * w;
        T* to = result + (r - b0) * ld + (o - o0);
        if (r + kRowsAhead < b1) prefetch_rows(to + kRowsAhead * ld, ld, 1, out.columns);
        if (i0 == 0) {
          memcpy(to, from, sizeof(T) * size_t(out.columns));
        } else {
          int c = 0;
          for (; c + N <= out.columns; c += N) store<T>(to + c, load<T>(to + c) + load<T>(from + c));
          for (; c < out.columns; ++c) to[c] += from[c];
        }
      }
      o += out.columns;
    }
  }
  if (typed) for (int r = 0; r < rows; ++r) write_row(p.w_storage, result + r * ld, ld, p.y, (b0 + r) * O + o0);
}

}  // namespace

template <class T> void contract_output(const Problem<T>& p, const Runtime& runtime) {
  if (p.batch == 0 || p.out_features == 0) return;
  if (p.in_features == 0) {
    memset(p.y, 0, (p.w_storage == Storage::same ? sizeof(T) : 2) * size_t(p.batch) * size_t(p.out_features));
    return;
  }
  if (!few::serves(p) && narrow::serves_output(p)) return narrow::contract_output(p, runtime);
  const Partition<T> cut(p, runtime.threads);
  OutputTask<T> task{p, runtime, cut};
  auto body = [](void* context, int64_t index) {
    const OutputTask<T>& k = *static_cast<OutputTask<T>*>(context);
    const int64_t b = index / k.cut.out_tasks * k.cut.rows, o = index % k.cut.out_tasks * k.cut.outs;
    const auto range = few::serves(k.p) ? few::output_range<T> : output_range<T>;
    range(k.p, k.runtime, b, smaller(k.p.batch, b + k.cut.rows), o, smaller(k.p.out_features, o + k.cut.outs));
  };
  runtime.parallel(cut.row_tasks * cut.out_tasks, body, &task);
}

template void contract_output<float>(const Problem<float>&, const Runtime&);
template void contract_output<double>(const Problem<double>&, const Runtime&);

}  // namespace kan::cpu::KAN_ISA
