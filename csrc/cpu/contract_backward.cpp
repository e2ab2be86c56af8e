// contract_input(x, W, g, n)[b, i] = sum_{f,o} phi_f^(n)(x) W g   and   contract_weight(x, s, g, n)[i, f, o] =
// sum_b s phi_f^(n)(x) g, alone or together (the first backward): they share the tile's gradient in cache. Threads own
// inputs, so no two write one place and the result does not depend on their number.
#include "bucket.h"
#include "narrow.h"

namespace kan::cpu::KAN_ISA {
namespace {

// dx[row] += sum_o (window weights * coefficients + base)(row, o) g(row, o) for one input on one tile.
template <class T, int M, int V, bool BASE, bool SCALED>
void accumulate_input(const Tile<T>& given, const Window<T>& c, const T* base, const T* __restrict g, ptrdiff_t ld,
                      T* __restrict dx) {
  using Vt = Vec<T>;
  constexpr int N = Simd<T>::N;
  const Tile<T> tile = given;  // a copy that the stores below cannot alias
  alignas(64) static const T zeros[V * N] = {};
  Vt b[V];
  if (BASE) { KAN_UNROLL for (int v = 0; v < V; ++v) b[v] = load<T>(base + v * N); }
  for (int k = 0; k <= tile.buckets; ++k) {
    const uint16_t *row = tile.rows + tile.start[k], *end = tile.rows + tile.start[k + 1];
    if (row == end) continue;
    const bool spline = k < tile.buckets;
    if (!spline && !BASE) continue;
    Vt last[V], d[M > 1 ? M - 1 : 1][V];
    const T* p[M];
    KAN_UNROLL for (int m = 0; m < M; ++m) {
      const int r = k + c.offset + window_row<M>(m);
      p[m] = spline && r >= 0 && r < c.count ? c.rows + r * c.stride : zeros;
    }
    KAN_UNROLL for (int v = 0; v < V; ++v) {
      last[v] = load<T>(p[M - 1] + v * N);
      KAN_UNROLL for (int m = 0; m < M - 1; ++m) d[m][v] = load<T>(p[m] + v * N) - last[v];
    }
    auto dot = [&](ptrdiff_t r) {
      const T* gr = g + r * ld;
      Vt u[V];
      if (SCALED) {
        const T s = tile.total[r];
        KAN_UNROLL for (int v = 0; v < V; ++v) u[v] = s * last[v];
        if (BASE) { const T s = tile.base[r]; KAN_UNROLL for (int v = 0; v < V; ++v) u[v] += s * b[v]; }
      } else if (BASE) {
        const T s = tile.base[r];
        KAN_UNROLL for (int v = 0; v < V; ++v) u[v] = last[v] + s * b[v];
      } else {
        KAN_UNROLL for (int v = 0; v < V; ++v) u[v] = last[v];
      }
      KAN_UNROLL for (int m = 0; m < M - 1; ++m) {
        const T w = spline ? tile.w[m][r] : T(0);
        KAN_UNROLL for (int v = 0; v < V; ++v) u[v] += w * d[m][v];
      }
      Vt acc = u[0] * load<T>(gr);
      KAN_UNROLL for (int v = 1; v < V; ++v) acc += u[v] * load<T>(gr + v * N);
      return acc;
    };
    for (; row + 4 <= end; row += 4) {  // four rows share the reduction across lanes
      Vt acc[4];
      T out[4];
      KAN_UNROLL for (int q = 0; q < 4; ++q) acc[q] = dot(row[q]);
      sum4<T>(acc, out);
      KAN_UNROLL for (int q = 0; q < 4; ++q) dx[row[q]] += out[q];
    }
    for (; row < end; ++row) dx[*row] += sum<T>(dot(*row));
  }
}

// d (window rows) += sum over rows of weights * g, d_base += sum of base * g, for one input on one tile.
template <class T, int M, int V, bool BASE, bool SCALED>
void accumulate_weight(const Tile<T>& given, const T* __restrict g, ptrdiff_t ld, T* d, ptrdiff_t stride, int count,
                       int offset, T* d_base) {
  using Vt = Vec<T>;
  constexpr int N = Simd<T>::N;
  const Tile<T> tile = given;  // a copy that the stores below cannot alias
  Vt b[V];
  if (BASE) { KAN_UNROLL for (int v = 0; v < V; ++v) b[v] = Vt{}; }
  for (int k = 0; k <= tile.buckets; ++k) {
    const uint16_t *row = tile.rows + tile.start[k], *end = tile.rows + tile.start[k + 1];
    if (row == end) continue;
    if (k == tile.buckets) {
      if (BASE)
        do {
          const ptrdiff_t r = *row++;
          const T s = tile.base[r];
          KAN_UNROLL for (int v = 0; v < V; ++v) b[v] += s * load<T>(g + r * ld + v * N);
        } while (row < end);
      continue;
    }
    Vt total[V], a[M > 1 ? M - 1 : 1][V];
    KAN_UNROLL for (int v = 0; v < V; ++v) {
      total[v] = Vt{};
      KAN_UNROLL for (int m = 0; m < M - 1; ++m) a[m][v] = Vt{};
    }
    do {
      const ptrdiff_t r = *row++;
      Vt gr[V];
      KAN_UNROLL for (int v = 0; v < V; ++v) gr[v] = load<T>(g + r * ld + v * N);
      KAN_UNROLL for (int m = 0; m < M - 1; ++m) {
        const T w = tile.w[m][r];
        KAN_UNROLL for (int v = 0; v < V; ++v) a[m][v] += w * gr[v];
      }
      if (BASE) {
        const T s = tile.base[r];
        KAN_UNROLL for (int v = 0; v < V; ++v) b[v] += s * gr[v];
      }
      if (SCALED) {
        const T s = tile.total[r];
        KAN_UNROLL for (int v = 0; v < V; ++v) total[v] += s * gr[v];
      } else {
        KAN_UNROLL for (int v = 0; v < V; ++v) total[v] += gr[v];
      }
    } while (row < end);
    if (BASE) {  // a float sum no longer than a bucket
      KAN_UNROLL for (int v = 0; v < V; ++v) {
        store<T>(d_base + v * N, load<T>(d_base + v * N) + b[v]);
        b[v] = Vt{};
      }
    }
    KAN_UNROLL for (int m = 0; m < M; ++m) {
      const int r = k + offset + window_row<M>(m);
      if (r < 0 || r >= count) continue;
      T* to = d + r * stride;
      KAN_UNROLL for (int v = 0; v < V; ++v) {
        Vt value;
        if (m < M - 1) {
          value = a[m][v];
        } else {
          value = total[v];
          KAN_UNROLL for (int q = 0; q < M - 1; ++q) value -= a[q][v];
        }
        store<T>(to + v * N, load<T>(to + v * N) + value);
      }
    }
  }
  if (BASE) { KAN_UNROLL for (int v = 0; v < V; ++v) store<T>(d_base + v * N, load<T>(d_base + v * N) + b[v]); }
}

template <class T> using InputKernel = void (*)(const Tile<T>&, const Window<T>&, const T*, const T*, ptrdiff_t, T*);
template <class T> using WeightKernel = void (*)(const Tile<T>&, const T*, ptrdiff_t, T*, ptrdiff_t, int, int, T*);

template <class T> struct Kernels {
  InputKernel<T> input;
  WeightKernel<T> weight;
};
template <class T, int M, int V> Kernels<T> pick_flags(bool base, bool scaled) {
  if (base) {
    if (scaled) return {accumulate_input<T, M, V, true, true>, accumulate_weight<T, M, V, true, true>};
    return {accumulate_input<T, M, V, true, false>, accumulate_weight<T, M, V, true, false>};
  }
  if (scaled) return {accumulate_input<T, M, V, false, true>, accumulate_weight<T, M, V, false, true>};
  return {accumulate_input<T, M, V, false, false>, accumulate_weight<T, M, V, false, false>};
}
template <class T, int M> Kernels<T> pick_vectors(int vectors, bool base, bool scaled) {
  if constexpr (widest_tile(M) >= 4) { if (vectors == 4) return pick_flags<T, M, 4>(base, scaled); }
  if constexpr (widest_tile(M) >= 2) { if (vectors == 2) return pick_flags<T, M, 2>(base, scaled); }
  return pick_flags<T, M, 1>(base, scaled);
}
template <class T> Kernels<T> pick(int window, int vectors, bool base, bool scaled) {
  switch (window) {
    case 1: return pick_vectors<T, 1>(vectors, base, scaled);
    case 2: return pick_vectors<T, 2>(vectors, base, scaled);
    case 3: return pick_vectors<T, 3>(vectors, base, scaled);
    case 4: return pick_vectors<T, 4>(vectors, base, scaled);
    case 5: return pick_vectors<T, 5>(vectors, base, scaled);
    default: return pick_vectors<T, 6>(vectors, base, scaled);
  }
}

template <class T> struct BackwardTask {
  const Problem<T>& p;
  const Runtime& runtime;
  int64_t inputs_per_task;
};

// Inputs [first, end), all of the batch and all outputs.
template <class T> void backward_range(const Problem<T>& p, const Runtime& runtime, int64_t first, int64_t end) {
  constexpr int N = Simd<T>::N;
  const int64_t B = p.batch, O = p.out_features, I = p.in_features;
  const bool need_x = p.dx != nullptr, need_w = p.d_spline != nullptr, typed = p.w_storage != Storage::same;
  const Order<T> for_x(p, p.n_input, nullptr), for_w(p, p.n_weight, p.scale);
  const int bases = p.bases(), buckets = bucket_count(p), k = p.spline_order;
  const bool base_x = p.base_weight != nullptr, base_w = p.d_base != nullptr;
  const int narrowest = smaller(widest_tile(for_x.window), widest_tile(for_w.window));
  const int window_for_tile = widest_tile(for_x.window) < widest_tile(for_w.window) ? for_x.window : for_w.window;
  const int width = narrowest * N;
  const int shift = (p.outside == kZero ? 0 : k) - k;
  // Both orders sort alike except where only one of them still has a spline outside the range.
  const bool one_sorting = need_x && need_w && for_x.spline == for_w.spline &&
                           vanishes(p, for_x) == vanishes(p, for_w);
  const int smallest_window = need_x && need_w ? smaller(for_x.window, for_w.window) : need_x ? for_x.window : for_w.window;

  // One exponential serves the value and the slope of the first backward.
  const bool both_silu = need_x && need_w && p.activation == kSilu && for_x.n == 1 && for_w.n == 0 && !p.scale;

  Arena arena(runtime);
  KnotsOfBlock<T>::reserve(p, arena);
  const int block = int(smaller<int64_t>(kBlockInputs, end - first)), longest = int(smaller<int64_t>(kTileRows, B));
  const ptrdiff_t ld_tile = tile_stride(longest);
  Tiles<T>::reserve(for_x, block, longest, arena);
  Tiles<T>::reserve(for_w, block, longest, arena);
  arena.reserve<Sorting>(size_t(2 * block));
  arena.reserve<uint16_t>(size_t(2 * block * (buckets + 2)));
  arena.reserve<T>(size_t(3 * block * ld_tile) + size_t(longest) * width + 2 * size_t(bases + k + 3) * width);
  arena.commit();
  Tiles<T> tile_x(for_x, block, longest, arena), tile_w(for_w, block, longest, arena);
  Sorting* sorting = arena.take<Sorting>(size_t(2 * block));
  uint16_t* starts = arena.take<uint16_t>(size_t(2 * block * (buckets + 2)));
  T* column = arena.take<T>(size_t(block * ld_tile));
  T* scale_column = arena.take<T>(size_t(block * ld_tile));
  KnotsOfBlock<T> knots(p, arena);
  T* dx = arena.take<T>(size_t(block * ld_tile));
  T* g_tile = arena.take<T>(size_t(longest) * width);
  T* packed = arena.take<T>(size_t(bases + k + 1) * width);
  T* packed_base = arena.take<T>(width);
  T* d_packed = arena.take<T>(size_t(bases + k + 1) * width);
  T* d_packed_base = arena.take<T>(width);
  Located<T> at;

  for (int64_t i0 = first; i0 < end; i0 += kBlockInputs) {
    const int inputs = int(smaller<int64_t>(kBlockInputs, end - i0));
    knots.prepare(p, i0, inputs);
    for (int64_t b0 = 0; b0 < B; b0 += kTileRows) {
      const int rows = int(smaller<int64_t>(kTileRows, B - b0));
      const int64_t b1 = b0 + rows;
      transpose_from<T>(p.x_storage, p.x, b0 * I + i0, I, rows, inputs, column, ld_tile);
      if (p.scale) transpose<T>(p.scale + b0 * I + i0, I, rows, inputs, scale_column, ld_tile);
      for (int i = 0; i < inputs; ++i) {
        const T* x = column + i * ld_tile;
        auto prepare = [&](const Order<T>& order, Tile<T>& tile, int slot, const T* scale, bool sort) {
          uint16_t* start = starts + ptrdiff_t(slot) * (buckets + 2);
          if (sort) sort_tile(p, *knots.of[i], order, smallest_window, buckets, x, rows, at, sorting[slot].rows, start);
          tile.rows = sorting[slot].rows;
          tile.start = start;
          tile.buckets = buckets;
          prepare_tile(p, *knots.of[i], order, x, scale, rows, at, tile, !both_silu);
        };
        if (need_x) prepare(for_x, tile_x[i], i, nullptr, true);
        if (need_w)
          prepare(for_w, tile_w[i], one_sorting ? i : block + i, p.scale ? scale_column + i * ld_tile : nullptr,
                  !one_sorting);
        if (both_silu) prepare_silu(x, rows, tile_w[i].base, tile_x[i].base);
      }
      if (need_x) memset(dx, 0, sizeof(T) * size_t(inputs * ld_tile));
      for (int64_t o = 0; o < O;) {
        const OutputTile<T> out = output_tile<T>(o, O, window_for_tile);
        const int w = out.vectors * N;
        // Rows of g side by side: a stride of a page would map them all to the same few cache sets.
        const T* g = p.g + b0 * O + o;
        ptrdiff_t ld = O;
        if (!(out.whole() && O == w) || typed) {
          for (int64_t r = b0; r < b1; ++r) {
            if (r + kRowsAhead < b1 && !typed) prefetch_rows(p.g + (r + kRowsAhead) * O + o, O, 1, out.columns);
            read_padded(p.w_storage, p.g, r * O + o, out.columns, w, g_tile + (r - b0) * w);
          }
          g = g_tile;
          ld = w;
        }
        const InputKernel<T> input_kernel = pick<T>(for_x.window, out.vectors, base_x, for_x.scaled).input;
        const WeightKernel<T> weight_kernel = pick<T>(for_w.window, out.vectors, base_w, for_w.scaled).weight;
        for (int i = 0; i < inputs; ++i) {
          if (o == 0 && b1 < B && p.x_storage == Storage::same) {
            const int64_t next = smaller<int64_t>(B - b1, kTileRows);
            prefetch_block(p.x + b1 * I + i0, I, int(next), inputs, i, inputs);
          }
          const T* stored = p.grid + (i0 + i) * p.knots();
          const ptrdiff_t at = (i0 + i) * bases * O + o, next = at + bases * O;
          if (i + 1 < inputs) {
            if (need_w) prefetch_rows(p.d_spline + next, O, bases, out.columns);
            if (need_x && !typed) prefetch_rows(p.spline_weight + next, O, bases, out.columns);
            if (base_w) prefetch_rows(p.d_base + (i0 + i + 1) * O + o, O, 1, out.columns);
            if (base_x && !typed) prefetch_rows(p.base_weight + (i0 + i + 1) * O + o, O, 1, out.columns);
          }
          if (need_w) {
            const int n = for_w.n;
            const bool direct = for_w.spline && n == 0 && out.whole();
            T* d = direct ? p.d_spline + at : d_packed;
            const ptrdiff_t stride = direct ? O : w;
            const int count = !for_w.spline ? 0 : direct ? bases : bases + n;
            T* db = !base_w ? nullptr : out.whole() ? p.d_base + (i0 + i) * O + o : d_packed_base;
            const bool fresh = b0 == 0;
            if (!direct) memset(d, 0, sizeof(T) * size_t(larger(count, bases)) * size_t(w));
            else if (fresh) for (int f = 0; f < bases; ++f) memset(d + f * O, 0, sizeof(T) * size_t(w));
            if (db && (fresh || db == d_packed_base)) memset(db, 0, sizeof(T) * size_t(w));
            weight_kernel(tile_w[i], g, ld, d, stride, count, shift + n, db);
            if (!direct) {
              if (for_w.spline) difference_adjoint(stored, k, n, bases, w, d);
              for (int f = 0; f < bases; ++f) {
                T* to = p.d_spline + at + f * O;
                for (int c = 0; c < out.columns; ++c) to[c] = fresh ? d[f * w + c] : to[c] + d[f * w + c];
              }
            }
            if (db == d_packed_base && db) {
              T* to = p.d_base + (i0 + i) * O + o;
              for (int c = 0; c < out.columns; ++c) to[c] = fresh ? db[c] : to[c] + db[c];
            }
          }
          if (need_x) {
            const int n = for_x.n;
            const T* c = p.spline_weight + at;
            const T* b = base_x ? p.base_weight + (i0 + i) * O + o : nullptr;
            Window<T> window{c, O, bases, shift + n};
            if (!for_x.spline) {
              window.count = 0;
            } else if (n > 0 || !out.whole() || typed) {
              difference(stored, k, n, bases, p.w_storage, p.spline_weight, at, O, out.columns, w, packed);
              window = {packed, w, bases + n, window.offset};
            }
            if (base_x && (!out.whole() || typed)) {
              read_padded(p.w_storage, p.base_weight, (i0 + i) * O + o, out.columns, w, packed_base);
              b = packed_base;
            }
            input_kernel(tile_x[i], window, b, g, ld, dx + i * ld_tile);
          }
        }
        o += out.columns;
      }
      if (need_x) transpose_to<T>(p.x_storage, dx, ld_tile, inputs, rows, p.dx, b0 * I + i0, I);
    }
  }
}

}  // namespace

template <class T> void contract_backward(const Problem<T>& p, const Runtime& runtime) {
  const int64_t I = p.in_features;
  if (I == 0) return;
  if (p.batch == 0 || p.out_features == 0) {
    if (p.dx) memset(p.dx, 0, (p.x_storage == Storage::same ? sizeof(T) : 2) * size_t(p.batch) * size_t(I));
    if (p.d_spline) memset(p.d_spline, 0, sizeof(T) * size_t(I) * size_t(p.bases()) * size_t(p.out_features));
    if (p.d_base) memset(p.d_base, 0, sizeof(T) * size_t(I) * size_t(p.out_features));
    return;
  }
  if (narrow::serves_backward(p)) return narrow::contract_backward(p, runtime);
  // The weights and their gradients pass whole however few rows there are: a single row of 256 x 256 takes as long as ten more do.
  const int64_t work = (p.batch + p.bases()) * I * p.out_features;
  const int64_t threads = smaller<int64_t>(runtime.threads, larger<int64_t>(1, work / kMinimumWork));
  int64_t per_task = (I + threads - 1) / threads;
  if (per_task > 16) per_task = (per_task + 15) / 16 * 16;
  BackwardTask<T> task{p, runtime, per_task};
  auto body = [](void* context, int64_t index) {
    const BackwardTask<T>& k = *static_cast<BackwardTask<T>*>(context);
    const int64_t first = index * k.inputs_per_task;
    backward_range(k.p, k.runtime, first, smaller(k.p.in_features, first + k.inputs_per_task));
  };
  runtime.parallel((I + per_task - 1) / per_task, body, &task);
}

template void contract_backward<float>(const Problem<float>&, const Runtime&);
template void contract_backward<double>(const Problem<double>&, const Runtime&);

}  // namespace kan::cpu::KAN_ISA
