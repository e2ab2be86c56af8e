// The wide kernels' view of a tile of the batch. For one input, the rows of the tile are sorted by knot interval, so that
// a bucket shares the coefficient rows of its window in registers: 5 fused multiply-adds per 64-byte vector of outputs for
// a cubic layer, where a dense product needs grid_size + 4 (measured: 0.40-0.48 of its time at G = 5, 0.18 at G = 20).
// The weights of a window sum to one, which saves one of its products:
//   sum_m w_m c_m = c_r + sum_{m != r} w_m (c_m - c_r).
// r is in the middle of the window, where a weight is large (1/6 at the least, cubic): 1 - the others' sum is then as exact as they are. At
// the window's end, where weights go to 0, float32 errors were up to 200 times those of all products (order 5, coefficients of 1000, y of 2).
#pragma once
#include "arena.h"
#include "convert.h"
#include "features.h"

namespace kan::cpu::KAN_ISA {

// A change of bucket costs about 40 cycles (registers reloaded, a branch mispredicted), a row about 17: long tiles make
// long buckets, and 512 rows of 64 outputs (128 KB) still stay in L2 while the inputs pass.
constexpr int kTileRows = 512;
// From one column of a tile to the next: an odd number of cache lines, since a power of two would map all columns to the same few
// cache sets.
inline ptrdiff_t tile_stride(int64_t rows) { return ptrdiff_t(((rows + 15) / 16) | 1) * 16; }
constexpr int kBlockInputs = 32;  // also the length of a float sum before it is added to a longer one

// Of M rows of a window, in what order kernels have them: the one that the others' differences are taken from comes last.
template <int M> constexpr int window_row(int m) { return m == M - 1 ? M / 2 : m < M / 2 ? m : m + 1; }

// One derivative order of one input on one tile. Columns have the tile's rows in order.
template <class T> struct Tile {
  T* w[kMaxOrder];        // weights of the window in the order of window_row, all but the last
  T* total;               // sum of the window's weights, where `scaled`; else it is 1
  T* base;                // base activation
  const uint16_t* rows;   // rows sorted by bucket
  const uint16_t* start;  // (buckets + 2): first position of every bucket; the last bucket has no spline
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

// The tiles of a block of inputs, with no more columns than the order needs: what a call touches is what it costs in memory.
template <class T> class Tiles {
 public:
  static void reserve(const Order<T>& order, int inputs, int64_t rows, Arena& arena) {
    arena.reserve<Tile<T>>(size_t(inputs));
    arena.reserve<T>(size_t(inputs * columns(order) * tile_stride(rows)));
  }
  Tiles(const Order<T>& order, int inputs, int64_t rows, Arena& arena) : tiles_(arena.take<Tile<T>>(size_t(inputs))) {
    const ptrdiff_t stride = tile_stride(rows);
    T* next = arena.take<T>(size_t(inputs * columns(order) * stride));
    auto take = [&] { return next += stride, next - stride; };
    for (int i = 0; i < inputs; ++i) {
      Tile<T>& tile = tiles_[i];
      for (int m = 0; m < order.window - 1; ++m) tile.w[m] = take();
      tile.total = order.scaled ? take() : nullptr;
      tile.base = take();
    }
  }
  Tile<T>& operator[](int i) { return tiles_[i]; }

 private:
  static int columns(const Order<T>& order) { return order.window - 1 + int(order.scaled) + 1; }
  Tile<T>* tiles_;
};

// The sorted rows of one input on one tile.
struct alignas(64) Sorting {
  uint16_t rows[kTileRows + 32];
};

template <class T> inline int bucket_count(const Problem<T>& p) {
  return p.outside == kZero ? p.knots() - 1 : p.grid_size;
}

#if defined(KAN_ISA_AVX2)
struct CompressTable {  // lanes[mask]: the set bits of mask, ascending
  alignas(16) uint16_t lanes[256][8];
  CompressTable() {
    for (int mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (int bit = 0; bit < 8; ++bit)
        if (mask >> bit & 1) lanes[mask][count++] = uint16_t(bit);
      while (count < 8) lanes[mask][count++] = 0;
    }
  }
};
#endif

// The knots of a block of inputs. Inputs of equal knots, which a fresh layer's all are, share one preparation (160 cycles,
// more than the weights of 128 rows).
template <class T> struct KnotsOfBlock {
  const Knots<T>* of[kBlockInputs];

  static void reserve(const Problem<T>& p, Arena& arena) {
    arena.reserve<Knots<T>>(kBlockInputs);
    arena.reserve<T>(kBlockInputs * Knots<T>::scratch(p.knots(), p.spline_order));
  }
  KnotsOfBlock(const Problem<T>& p, Arena& arena)
      : each_(Knots<T>::scratch(p.knots(), p.spline_order)), knots_(arena.take<Knots<T>>(kBlockInputs)),
        memory_(arena.take<T>(kBlockInputs * each_)) {}
  void prepare(const Problem<T>& p, int64_t first, int inputs) {
    const size_t bytes = sizeof(T) * size_t(p.knots());
    for (int i = 0; i < inputs; ++i) {
      const T* stored = p.grid + (first + i) * p.knots();
      if (i > 0 && memcmp(stored, stored - p.knots(), bytes) == 0) {
        of[i] = of[i - 1];
        continue;
      }
      knots_[i].prepare(stored, p.knots(), p.spline_order, p.outside, memory_ + size_t(i) * each_);
      of[i] = knots_ + i;
    }
  }

 private:
  size_t each_;
  Knots<T>* knots_;
  T* memory_;
};

// Where the rows of one input fall: its interval, which is low + buckets where there is no spline, and on even knots the
// coordinate within it.
template <class T> struct alignas(64) Located {
  uint16_t interval[kTileRows];
  T u[kTileRows];
};

// Sorts the rows of a tile by bucket = interval - low; stable, so sums always run in the order of rows.
// interval (rows); sorted (rows); start (buckets + 2): first position of every bucket.
inline void sort_rows(const uint16_t* interval, int low, int rows, int buckets, uint16_t* sorted, uint16_t* start) {
#if defined(KAN_ISA_AVX512)
  if (buckets <= 64) {
    __m512i seen_low = _mm512_set1_epi16(-1), seen_high = _mm512_setzero_si512();
    const int chunks = (rows + 31) / 32;
    __mmask32 last = rows % 32 ? (1u << (rows % 32)) - 1 : ~0u;
    for (int c = 0; c < chunks; ++c) {
      __m512i b = _mm512_load_si512(interval + 32 * c);
      __mmask32 valid = c == chunks - 1 ? last : ~0u;
      seen_low = _mm512_mask_min_epu16(seen_low, valid, seen_low, b);
      seen_high = _mm512_mask_max_epu16(seen_high, valid, seen_high, b);
    }
    auto halves = [](__m512i v) { return _mm512_cvtepu16_epi32(_mm512_castsi512_si256(v)); };
    auto swapped = [](__m512i v) { return _mm512_shuffle_i64x2(v, v, 0x4e); };
    seen_low = _mm512_min_epu16(seen_low, swapped(seen_low));
    seen_high = _mm512_max_epu16(seen_high, swapped(seen_high));
    const int least = int(_mm512_reduce_min_epu32(halves(seen_low))), most = int(_mm512_reduce_max_epu32(halves(seen_high)));
    alignas(64) static const uint16_t iota[32] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                                  16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
    int position = 0;
    for (int g = 0; g <= buckets; ++g) {
      start[g] = uint16_t(position);
      if (low + g < least || low + g > most) continue;
      const __m512i wanted = _mm512_set1_epi16(short(low + g));
      __m512i index = _mm512_load_si512(iota);
      for (int c = 0; c < chunks; ++c) {
        __mmask32 mask = _mm512_mask_cmpeq_epi16_mask(c == chunks - 1 ? last : ~0u, _mm512_load_si512(interval + 32 * c), wanted);
        _mm512_storeu_si512(sorted + position, _mm512_maskz_compress_epi16(mask, index));
        position += __builtin_popcount(mask);
        index = _mm512_add_epi16(index, _mm512_set1_epi16(32));
      }
    }
    start[buckets + 1] = uint16_t(position);
    return;
  }
#endif
#if defined(KAN_ISA_AVX2)
  if (buckets <= 32) {  // a table turns the rows that match a bucket into a packed list: a third of the counting sort's time
    static const CompressTable table;
    uint16_t least = 0xffff, most = 0;
    for (int r = 0; r < rows; ++r) {
      least = interval[r] < least ? interval[r] : least;
      most = interval[r] > most ? interval[r] : most;
    }
    const int whole = rows / 8 * 8, rest = (1 << (rows - whole)) - 1;
    int position = 0;
    for (int g = 0; g <= buckets; ++g) {
      start[g] = uint16_t(position);
      if (low + g < least || low + g > most) continue;
      const __m128i wanted = _mm_set1_epi16(short(low + g));
      __m128i base = _mm_setzero_si128();
      for (int r = 0; r < rows; r += 8) {
        __m128i same = _mm_cmpeq_epi16(_mm_load_si128(reinterpret_cast<const __m128i*>(interval + r)), wanted);
        const int mask = _mm_movemask_epi8(_mm_packs_epi16(same, _mm_setzero_si128())) & (r < whole ? 0xff : rest);
        __m128i lanes = _mm_load_si128(reinterpret_cast<const __m128i*>(table.lanes[mask]));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(sorted + position), _mm_add_epi16(base, lanes));
        position += __builtin_popcount(unsigned(mask));
        base = _mm_add_epi16(base, _mm_set1_epi16(8));
      }
    }
    start[buckets + 1] = uint16_t(position);
    return;
  }
#endif
  for (int g = 0; g <= buckets + 1; ++g) start[g] = 0;
  for (int r = 0; r < rows; ++r) ++start[interval[r] - low + 1];
  for (int g = 0; g <= buckets; ++g) start[g + 1] = uint16_t(start[g + 1] + start[g]);
  // start[g] now is where bucket g begins; fill from there and shift back.
  for (int r = 0; r < rows; ++r) sorted[start[interval[r] - low]++] = uint16_t(r);
  for (int g = buckets + 1; g > 0; --g) start[g] = start[g - 1];
  start[0] = 0;
}

// `vanishes`: outside the range there is no spline (in "zero" mode, a derivative in "clamp", a second one in "linear").
template <bool EXACT, class T>
inline void locate(const Knots<T>& knots, int outside, bool vanishes, int buckets, const T* x, int rows, Located<T>& at) {
  const Knots<T> k = knots;  // a copy that the stores below cannot alias
  const bool half_open = outside == kZero;
  in_step<T>(rows, [&](auto lanes, int b) __attribute__((always_inline)) {
    using L = decltype(lanes);
    const L xs = load_lanes<T, L::kCount>(x + b);
    L u;
    auto j = find_span<EXACT>(k, into_range(k, xs), u);
    if (vanishes) {
      const auto gone = (xs < k.first) | (half_open ? xs >= k.last : xs > k.last);
      j = select(gone, all_int<T, L::kCount>(k.low + buckets), j);
    }
    store_short(at.interval + b, j);
    if (k.uniform) store(at.u + b, u);
  });
}

// Whether a derivative of this order has no spline outside the range at all.
template <class T> inline bool vanishes(const Problem<T>& p, const Order<T>& order) {
  return p.outside == kZero || !order.spline || order.n >= (p.outside == kClamp ? 1 : 2);
}

// smallest_window: of the orders that these intervals serve.
template <class T>
inline void locate_rows(const Problem<T>& p, const Knots<T>& k, const Order<T>& order, int smallest_window, int buckets,
                        const T* x, int rows, Located<T>& at) {
  // A derivative without spline has zeros for coefficients; NaN keeps a bucket there, where 0 times its total is NaN.
  if (!order.spline) for (int r = 0; r < rows; ++r) at.interval[r] = uint16_t(x[r] == x[r] ? k.low + buckets : k.low);
  else if (smallest_window <= 2) locate<true>(k, p.outside, vanishes(p, order), buckets, x, rows, at);
  else locate<false>(k, p.outside, vanishes(p, order), buckets, x, rows, at);
}

template <class T>
inline void sort_tile(const Problem<T>& p, const Knots<T>& k, const Order<T>& order, int smallest_window, int buckets,
                      const T* x, int rows, Located<T>& at, uint16_t* sorted, uint16_t* start) {
  locate_rows(p, k, order, smallest_window, buckets, x, rows, at);
  sort_rows(at.interval, k.low, rows, buckets, sorted, start);
}

template <int P, class T>
inline void fill_weights(const Knots<T>& knots, const Order<T>& order, int outside, const T* x, const T* scale, int rows,
                         const Located<T>& at, Tile<T>& tile) {
  const Knots<T> k = knots;
  const bool sloped = outside == kLinear && order.n == 0;
  in_step<T>(rows, [&](auto lanes, int b) __attribute__((always_inline)) {
    using L = decltype(lanes);
    L w[P + 1];
    if (k.uniform && !sloped) {
      const L u = load_lanes<T, L::kCount>(at.u + b);
      window_weights<P>(k, u, u, LanesInt<T, L::kCount>{}, w);
    } else {
      const L xs = load_lanes<T, L::kCount>(x + b), inside = into_range(k, xs), u = load_lanes<T, L::kCount>(at.u + b);
      auto j = load_short<T, L::kCount>(at.interval + b);
      j = select(j > k.high, all_int<T, L::kCount>(k.high), j);
      window_weights<P>(k, inside, u, j, w);
      if (sloped && any((xs < k.first) | (xs > k.last))) {
        L slope[P + 1];
        window_slopes<P>(k, inside, u, j, slope);
        const L distance = xs - inside;
        KAN_UNROLL for (int m = 0; m <= P; ++m) w[m] += slope[m] * distance;
      }
    }
    if (scale) {
      const L s = load_lanes<T, L::kCount>(scale + b);
      KAN_UNROLL for (int m = 0; m <= P; ++m) w[m] = w[m] * s;
    }
    KAN_UNROLL for (int m = 0; m < P; ++m) store(tile.w[m] + b, w[window_row<P + 1>(m)]);
  });
}

// Prepares one derivative order of one input on the tile of `rows` rows. x, scale: the input's column, readable up to a
// full vector. Loops are kept apart: short ones leave registers for vectors in step. `base` false leaves the base
// activation out.
template <class T>
inline void prepare_tile(const Problem<T>& p, const Knots<T>& k, const Order<T>& order, const T* x, const T* scale, int rows,
                         const Located<T>& at, Tile<T>& tile, bool base = true) {
  if (order.spline) switch (order.window) {
    case 2: fill_weights<1, T>(k, order, p.outside, x, scale, rows, at, tile); break;
    case 3: fill_weights<2, T>(k, order, p.outside, x, scale, rows, at, tile); break;
    case 4: fill_weights<3, T>(k, order, p.outside, x, scale, rows, at, tile); break;
    case 5: fill_weights<4, T>(k, order, p.outside, x, scale, rows, at, tile); break;
    case 6: fill_weights<5, T>(k, order, p.outside, x, scale, rows, at, tile); break;
  }
  if (order.scaled)
    for (int b = 0; b < rows; b += Simd<T>::N) {
      Vec<T> xs = load<T>(x + b), s = scale ? load<T>(scale + b) : broadcast<T>(1);
      store<T>(tile.total + b, xs == xs ? s : xs);
    }
  if (order.activation.activation == kNone || !base) return;
  auto fill = [&](auto activation) __attribute__((always_inline)) {
    in_step<T>(rows, [&](auto lanes, int b) __attribute__((always_inline)) {
      using L = decltype(lanes);
      L a = activation(load_lanes<T, L::kCount>(x + b));
      if (scale) a = a * load_lanes<T, L::kCount>(scale + b);
      store(tile.base + b, a);
    });
  };
  if (order.activation.is_silu(0)) fill([](auto x) { auto value = x, slope = x; silu(x, value, slope); return value; });
  else if (order.activation.is_silu(1)) fill([](auto x) { auto value = x, slope = x; silu(x, value, slope); return slope; });
  else fill([&](auto x) { return activate(order.activation, x); });
}

// One exponential for the base activation silu and its slope.
template <class T> inline void prepare_silu(const T* x, int rows, T* __restrict value, T* __restrict slope) {
  in_step<T>(rows, [&](auto lanes, int b) __attribute__((always_inline)) {
    decltype(lanes) v, s;
    silu(load_lanes<T, decltype(lanes)::kCount>(x + b), v, s);
    store(value + b, v);
    store(slope + b, s);
  });
}

// Fetches the rows of one input's coefficients before the kernel of the input in front of it has ended.
template <class T> KAN_INLINE void prefetch_rows(const T* rows, ptrdiff_t stride, int count, int columns) {
  for (int r = 0; r < count; ++r)
    for (int c = 0; c < columns; c += int(64 / sizeof(T))) __builtin_prefetch(rows + r * stride + c);
}

// Fetches share `part` of `parts` of the rows' next block of columns, while the kernels of this block run: rows lie far
// apart, and no hardware prefetcher follows (without, at 784 columns: two cycles a row and input lost in the transpose).
template <class T>
KAN_INLINE void prefetch_block(const T* in, ptrdiff_t ld, int rows, int64_t columns, int part, int parts) {
  const int step = (rows + parts - 1) / parts;
  const int end = smaller(rows, (part + 1) * step), width = int(smaller<int64_t>(columns, kBlockInputs));
  for (int r = part * step; r < end; ++r)
    for (int c = 0; c < width; c += int(64 / sizeof(T))) __builtin_prefetch(in + r * ld + c, 0, 2);
}

// The n-th difference of the coefficients c[index ..] of one input, `columns` of them: rows 0 .. bases + n - 1 of out.
template <class T>
inline void difference(const T* knots, int order, int n, int bases, Storage type, const T* c, ptrdiff_t index, ptrdiff_t stride,
                       int columns, int width, T* out) {
  for (int m = 0; m < bases; ++m) read_padded(type, c, index + m * stride, columns, width, out + m * width);
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

// Rows ahead to fetch when a tile is copied: its rows lie a full row of outputs apart, which no hardware prefetcher follows
// (without: 50 cycles a row of four lines).
constexpr int kRowsAhead = 8;

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
