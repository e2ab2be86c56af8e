// The wide kernels' view of a tile of the batch. For one input, the rows of the tile are sorted by knot interval, so that
// a bucket shares the coefficient rows of its window in registers: 5 fused multiply-adds per 64-byte vector of outputs for
// a cubic layer, where a dense product needs grid_size + 4 (measured: 0.40-0.48 of its time at G = 5, 0.18 at G = 20).
// The weights of a window of order p sum to one, which saves one of its p + 1 products:
//   sum_m w_m c_m = c_p + sum_{m<p} w_m (c_m - c_p).
#pragma once
#include "arena.h"
#include "features.h"

namespace kan::cpu::KAN_ISA {

constexpr int kTileRows = 256;    // row indices fit a byte; fewer rows make buckets too short (128: +10 % at G = 20)
constexpr int kBlockInputs = 32;  // also the length of a float sum before it is added to a longer one

// One derivative order of one input on one tile, rows in tile order.
template <class T> struct alignas(64) Tile {
  T w[kMaxOrder][kTileRows];  // weights of the window, all but the last
  T total[kTileRows];         // sum of the window's weights; 1 unless scaled
  T base[kTileRows];          // base activation
  uint8_t rows[kTileRows + 64];  // rows sorted by bucket
  uint16_t* start;            // (buckets + 2): first position of every bucket; the last bucket has no spline
  int buckets;
};

// What a kernel reads of the coefficients of one input: rows low .. high-1 of a matrix with leading dimension `stride`.
template <class T> struct Window {
  const T* rows;
  ptrdiff_t stride;
  int count;    // valid rows 0 .. count-1; others are zero
  int offset;   // bucket b begins at row b + offset
};

template <class T> struct Order {  // how one derivative order is prepared
  int n;
  int window;      // weights of a window: order - n + 1, at least 1
  bool spline;     // n <= order
  bool scaled;     // weights do not sum to one
  ActivationTable<T> activation;
  Order(const Problem<T>& p, int n, const T* scale)
      : n(n), window(larger(p.spline_order - n, 0) + 1), spline(n <= p.spline_order),
        // A window of one weight has nothing but its total to carry NaN.
        scaled(scale != nullptr || window == 1), activation(p.activation, n) {}
};

template <int P, class T>
inline void fill_tile(const Knots<T>& k, const Order<T>& order, int outside, const T* x, const T* scale, int rows,
                      Tile<T>& tile, typename Simd<T>::Int* bucket) {
  constexpr int N = Simd<T>::N;
  using I = VecInt<T>;
  for (int b = 0; b < rows; b += N) {
    Vec<T> xs = load<T>(x + b), w[P + 1], s = broadcast<T>(1);
    I j;
    if (scale) s = load<T>(scale + b);
    if (order.spline) {
      spline_features<P, T>(k, outside, order.n, xs, j, w);
      if (scale) { KAN_UNROLL for (int m = 0; m < P; ++m) w[m] *= s; }
      KAN_UNROLL for (int m = 0; m < P; ++m) store<T>(tile.w[m] + b, w[m]);
    } else {
      j = I{} + (k.high + 1);
    }
    if (order.scaled) store<T>(tile.total + b, xs == xs ? s : xs);
    if (order.activation.activation != kNone) {
      Vec<T> a = activate<T>(order.activation, xs);
      store<T>(tile.base + b, scale ? a * s : a);
    }
    *reinterpret_cast<I*>(bucket + b) = j - k.low;
  }
}

// Sorts the rows of a tile by bucket; stable, so sums always run in the order of rows.
template <class Int> inline void sort_rows(const Int* bucket, int rows, int buckets, uint8_t* sorted, uint16_t* start) {
#if defined(KAN_ISA_AVX512)
  if (buckets <= 48) {
    alignas(64) uint8_t narrow[kTileRows];
    alignas(64) static const struct Iota {
      uint8_t v[kTileRows];
      constexpr Iota() : v() { for (int i = 0; i < kTileRows; ++i) v[i] = uint8_t(i); }
    } iota;
    for (int r = 0; r < rows; ++r) narrow[r] = uint8_t(bucket[r]);
    const int chunks = (rows + 63) / 64;
    __mmask64 valid[kTileRows / 64];
    for (int c = 0; c < chunks; ++c) {
      int left = rows - 64 * c;
      valid[c] = left >= 64 ? ~0ull : (1ull << left) - 1;
    }
    int position = 0;
    for (int g = 0; g <= buckets; ++g) {
      start[g] = uint16_t(position);
      for (int c = 0; c < chunks; ++c) {
        __mmask64 mask = _mm512_mask_cmpeq_epi8_mask(valid[c], _mm512_load_si512(narrow + 64 * c), _mm512_set1_epi8(char(g)));
        _mm512_storeu_si512(sorted + position, _mm512_maskz_compress_epi8(mask, _mm512_load_si512(iota.v + 64 * c)));
        position += __builtin_popcountll(mask);
      }
    }
    start[buckets + 1] = uint16_t(position);
    return;
  }
#endif
  for (int g = 0; g <= buckets + 1; ++g) start[g] = 0;
  for (int r = 0; r < rows; ++r) ++start[bucket[r] + 1];
  for (int g = 0; g <= buckets; ++g) start[g + 1] = uint16_t(start[g + 1] + start[g]);
  // start[g] now is where bucket g begins; fill from there and shift back.
  for (int r = 0; r < rows; ++r) sorted[start[bucket[r]]++] = uint8_t(r);
  for (int g = buckets + 1; g > 0; --g) start[g] = start[g - 1];
  start[0] = 0;
}

template <class T> inline int bucket_count(const Problem<T>& p) {
  return p.outside == kZero ? p.knots() - 1 : p.grid_size;
}

// Prepares the tile of `rows` rows (x, scale: one input's column, readable up to a full vector).
template <class T>
inline void prepare_tile(const Problem<T>& p, const Knots<T>& k, const Order<T>& order, const T* x, const T* scale, int rows,
                         Tile<T>& tile) {
  alignas(64) typename Simd<T>::Int bucket[kTileRows];
  switch (order.window) {
    case 1: fill_tile<0, T>(k, order, p.outside, x, scale, rows, tile, bucket); break;
    case 2: fill_tile<1, T>(k, order, p.outside, x, scale, rows, tile, bucket); break;
    case 3: fill_tile<2, T>(k, order, p.outside, x, scale, rows, tile, bucket); break;
    case 4: fill_tile<3, T>(k, order, p.outside, x, scale, rows, tile, bucket); break;
    case 5: fill_tile<4, T>(k, order, p.outside, x, scale, rows, tile, bucket); break;
    case 6: fill_tile<5, T>(k, order, p.outside, x, scale, rows, tile, bucket); break;
  }
  // `high` may lie below the last inner interval on degenerate grids; the "none" bucket must not move.
  const int none = k.high + 1 - k.low;
  if (none != tile.buckets)
    for (int r = 0; r < rows; ++r) bucket[r] = bucket[r] == none ? tile.buckets : bucket[r];
  sort_rows(bucket, rows, tile.buckets, tile.rows, tile.start);
}

// The n-th difference of the coefficients of one input, `columns` of them: rows 0 .. bases + n - 1 of out.
template <class T>
inline void difference(const T* knots, int order, int n, int bases, const T* c, ptrdiff_t stride, int columns, int width,
                       T* out) {
  for (int m = 0; m < bases; ++m) copy_padded(c + m * stride, columns, width, out + m * width);
  if (n > 0) memset(out + ptrdiff_t(bases) * width, 0, sizeof(T) * size_t(n) * size_t(width));
  for (int s = 1; s <= n; ++s)
    for (int m = bases + s - 1; m >= 0; --m) {
      const T factor = difference_factor(knots, order - s + 1, m);
      T* to = out + ptrdiff_t(m) * width;
      if (m > 0) for (int o = 0; o < width; ++o) to[o] = (to[o] - to[o - width]) * factor;
      else for (int o = 0; o < width; ++o) to[o] *= factor;
    }
}

// Its adjoint, in place: from the gradient of the differences (bases + n rows) to that of the coefficients (bases rows).
template <class T> inline void difference_adjoint(const T* knots, int order, int n, int bases, int width, T* rows) {
  for (int s = n; s >= 1; --s)
    for (int m = 0; m < bases + s - 1; ++m) {
      const T here = difference_factor(knots, order - s + 1, m), next = difference_factor(knots, order - s + 1, m + 1);
      T* to = rows + ptrdiff_t(m) * width;
      for (int o = 0; o < width; ++o) to[o] = here * to[o] - next * to[o + width];
    }
}

// Widths of an output tile in vectors. A window of four needs 4 * 4 + 4 registers of coefficients for 4 vectors; sets
// with 16 registers, and windows of five and six, take 2.
constexpr int kRegisters = sizeof(Vec<float>) == 64 ? 32 : 16;
constexpr int widest_tile(int window) { return kRegisters == 32 ? (window <= 4 ? 4 : 2) : (window <= 4 ? 2 : 1); }

template <class T> struct OutputTile {
  int64_t first;
  int columns;  // real outputs
  int vectors;  // 1, 2 or 4
  bool whole() const { return columns == vectors * Simd<T>::N; }
};
template <class T> inline OutputTile<T> output_tile(int64_t first, int64_t end, int window) {
  constexpr int N = Simd<T>::N;
  int vectors = widest_tile(window);
  while (vectors > 1 && end - first <= int64_t(vectors / 2) * N) vectors /= 2;
  return {first, int(smaller(end - first, int64_t(vectors) * N)), vectors};
}

}  // namespace kan::cpu::KAN_ISA
