// What the wide kernels share: sizes, the evaluation of an item, the staging of weights.
#pragma once
#include "fragments.cuh"
#include "polynomials.h"

namespace kan::cuda {

// Rows of a block's tile; a step of a product's depth: 4 inputs with 8 bases each, 32 inputs of the base branch, or 32 rows of the
// batch.
constexpr int kWideRows = 128;
constexpr int kStepInputs = 4, kStepBases = 8, kStepDepth = kStepInputs * kStepBases;

template <Products P> struct StorageOf { using Type = float; };
template <> struct StorageOf<Products::bfloat16> { using Type = BFloat16; };
template <> struct StorageOf<Products::float16> { using Type = Float16; };
template <Products P> constexpr int kStoredAs = P == Products::bfloat16 ? kBFloat16 : P == Products::float16 ? kFloat16 : kFloat32;

// What even_window wants of an input's knots.
struct Even {
  float inverse_h, middle, first, last;
};
KAN_DEVICE Even even_knots(const Described<float>& d) { return {d.inverse_h, d.middle, d.first, d.last}; }

constexpr int kNowhere = 1 << 24;  // `first` of a window that touches no basis

// Memory, several words at once.
template <int kWords> struct alignas(4 * kWords) Words {
  uint32_t w[kWords];
};

// Neighbouring numbers of x or scale as they are stored: widened where they are needed, so that nobody waits for them before.
template <int kNumbers> struct Stored {
  alignas(4 * kNumbers) uint32_t raw[kNumbers];  // float32: one to a word; 16-bit types: two

  // All of them exist, and begin at a multiple of 16 bytes, or of what they take.
  KAN_DEVICE void load_whole(const void* data, int dtype, int at) {
    static_assert(kNumbers % 4 == 0);
    if constexpr (kNumbers == 8) {  // the first 16 bytes whatever they are
      const char* from = static_cast<const char*>(data) + int64_t(at) * (dtype == kFloat32 ? 4 : 2);
      *reinterpret_cast<Words<4>*>(raw) = *reinterpret_cast<const Words<4>*>(from);
      if (dtype == kFloat32) *reinterpret_cast<Words<4>*>(raw + 4) = *reinterpret_cast<const Words<4>*>(from + 16);
    } else if (dtype == kFloat32) {
      KAN_UNROLL_ALL
      for (int m = 0; m < kNumbers; m += 4)
        *reinterpret_cast<Words<4>*>(raw + m) = *reinterpret_cast<const Words<4>*>(static_cast<const uint32_t*>(data) + at + m);
    } else {
      using Half = Words<kNumbers / 2>;
      *reinterpret_cast<Half*>(raw) = *reinterpret_cast<const Half*>(static_cast<const uint16_t*>(data) + at);
    }
  }
  // `left` of them exist, the rest becomes 0. vectors: load_whole may serve where all do.
  KAN_DEVICE void load(const void* data, int dtype, int at, int left, bool vectors) {
    KAN_UNROLL_ALL
    for (int m = 0; m < kNumbers; ++m) raw[m] = 0;
    if constexpr (kNumbers % 4 == 0) {
      if (vectors && left >= kNumbers) return load_whole(data, dtype, at);
    }
    KAN_UNROLL_ALL
    for (int m = 0; m < kNumbers; ++m) {
      if (m >= left) continue;
      if (dtype == kFloat32) raw[m] = static_cast<const uint32_t*>(data)[at + m];
      else raw[m / 2] |= uint32_t(static_cast<const uint16_t*>(data)[at + m]) << (16 * (m % 2));
    }
  }
  KAN_DEVICE void widen(int dtype, float (&x)[kNumbers]) const {
    if (dtype == kFloat32) {
      KAN_UNROLL_ALL
      for (int m = 0; m < kNumbers; ++m) x[m] = as_float(raw[m]);
    } else if (dtype == kBFloat16) {
      KAN_UNROLL_ALL
      for (int m = 0; m < kNumbers; ++m) x[m] = as_float(m % 2 ? raw[m / 2] & 0xffff0000u : raw[m / 2] << 16);
    } else {
      KAN_UNROLL_ALL
      for (int m = 0; m < kNumbers; ++m) x[m] = from_float16(uint16_t(raw[m / 2] >> (16 * (m % 2))));
    }
  }
};

// Rows b0 .. of x or of scale. All numbers of a block's rows are within reach of an int: why_not_wide bounds in_features.
KAN_DEVICE const void* rows_from(const Problem& p, const void* data, int64_t b0) {
  return static_cast<const char*>(data) + b0 * p.in_features * (p.x_dtype == kFloat32 ? 4 : 2);
}

// The interval of x among even knots, and how far x is from its middle. Counted from the middle of all, where knots are small, and
// rounded once: v is off by few eps max|t| / h.
KAN_DEVICE int even_interval(const Problem& p, const Even& d, float x, float& v) {
  const float from_middle = x - d.middle, place = from_middle * d.inverse_h + kToNearest;
  v = from_middle * d.inverse_h - (place - kToNearest);
  return int(as_bits(place) - as_bits(kToNearest)) + middle_interval(p.knots());
}

// Window at x on even knots where the result is continuous (a.continuous): the spacing alone then says where x is, and no knot is
// read. Bases that do not exist come out as any finite number.
KAN_DEVICE Item even_window(const WideArguments& a, const Even& d, float x, float scale) {
  const Problem& p = a.p;
  const float at = held(x, d.first, d.last);
  float v;
  Item item;
  item.first = even_interval(p, d, at, v) - p.spline_order;
  KAN_UNROLL_WINDOW
  for (int q = 0; q < 4; ++q) {
    const float* c = a.centred[q].c;
    item.w[q] = ((c[3] * v + c[2]) * v + c[1]) * v + c[0];
  }
  if (!(x >= d.first && x <= d.last)) {
    if (x != x) item.first = 0;
    else if (a.vanishes) item.first = kNowhere;
    else if (p.outside == kLinear && p.n == 0) {
      const float distance = (x - at) * d.inverse_h;
      KAN_UNROLL_WINDOW
      for (int q = 0; q < 4; ++q) {
        const float* c = a.centred[q].c;
        item.w[q] += ((1.5f * (c[3] * v) + c[2]) * (v + v) + c[1]) * distance;  // no products of c alone: they would be kept in registers
      }
    }
  }
  if (p.n > 0 || p.scale != nullptr) {
    float factor = scale;
    for (int m = 0; m < p.n; ++m) factor *= d.inverse_h;
    KAN_UNROLL_WINDOW
    for (int q = 0; q < 4; ++q) item.w[q] *= factor;
  }
  return item;
}

// The same for any knots and n up to the order: the stored knots decide where x is. The weights of knots 1 apart serve all even
// knots, times 1 / h^n.
KAN_DEVICE Item any_window(const WideArguments& a, int64_t i, float x, float scale) {
  const Problem& p = a.p;
  const Described<float> d = a.described[i];
  const float* t = static_cast<const float*>(p.grid) + i * p.knots();
  float at = x == x ? x : d.first;
  at = at > d.first ? at : d.first;
  at = at < d.last ? at : d.last;
  const bool zero = p.outside == kZero, beyond = x != at || (zero && !(x < d.last));
  const int j = interval(t, d, at);
  const float here = t[j];
  Item item;
  item.first = j - p.spline_order;
  float per_width, factor = scale;
  Cubic cubic[kMaxCubicOrder + 1];
  if (d.inverse_h > 0) {
    per_width = d.inverse_h;
    for (int m = 0; m < p.n; ++m) factor *= d.inverse_h;
    KAN_UNROLL_WINDOW
    for (int q = 0; q < 4; ++q) cubic[q] = a.uniform[q];
  } else {
    const float width = t[j + 1] - here;
    per_width = width > 0 ? reciprocal(width) : 0.0f;
    const Cubic* table = a.uneven + (i * (p.knots() - 1) + j) * 4;
    KAN_UNROLL_WINDOW
    for (int q = 0; q < 4; ++q) cubic[q] = table[q];
  }
  const float u = (at - here) * per_width;
  KAN_UNROLL_WINDOW
  for (int q = 0; q < 4; ++q) {
    const float* c = cubic[q].c;
    float w = ((c[3] * u + c[2]) * u + c[1]) * u + c[0];
    if (beyond) {
      if (p.outside == kLinear && p.n == 0) w += ((3 * c[3] * u + 2 * c[2]) * u + c[1]) * per_width * (x - at);
      else if (zero || p.n > int(p.outside == kLinear)) w = 0;
      w = x == x ? w : x;
    }
    const int f = item.first + q;
    item.w[q] = f >= 0 && f < p.bases() && q <= p.spline_order ? w * factor : 0.0f;
  }
  return item;
}

// Window of input i at x.
KAN_DEVICE Item evaluate(const WideArguments& a, int64_t i, float x, float scale) {
  const Even d = even_knots(a.described[i]);
  return a.continuous && d.inverse_h > 0 ? even_window(a, d, x, scale) : any_window(a, i, x, scale);
}

// x and scale of one item; what lies outside the problem has none.
struct Point {
  float x, scale;
};
KAN_DEVICE Point load_point(const Problem& p, int64_t b, int64_t i) {
  if (b >= p.batch || i >= p.in_features) return {0.0f, 0.0f};
  const int64_t at = b * p.in_features + i;
  return {read<float>(p.x, at, p.x_dtype), p.scale ? read<float>(p.scale, at, p.x_dtype) : 1.0f};
}
KAN_DEVICE Item item_at(const WideArguments& a, int64_t b, int64_t i, Point point) {
  if (b >= a.p.batch || i >= a.p.in_features) return {{0.0f, 0.0f, 0.0f, 0.0f}, 0};
  return evaluate(a, i, point.x, point.scale);
}

// 16 bytes of a row of global memory, `left` of whose numbers exist, to shared memory; the rest becomes zeros.
template <class T> KAN_DEVICE void stage_16_bytes(T* to, const T* from, int64_t left, bool aligned) {
  constexpr int kNumbers = 16 / sizeof(T);
  if (aligned) {
    copy_16_bytes(to, left > 0 ? from : nullptr, left <= 0);
    return;
  }
  KAN_UNROLL_WINDOW
  for (int m = 0; m < kNumbers; ++m) to[m] = m < left ? from[m] : T{};
}

// kLines pieces of a thread in shared memory, kStep numbers apart there and `distance` apart at `from`, where `left` numbers of a
// row are left. The first belongs to row i, the others follow in steps of `next`; those from row `last` on are zeros.
template <int kLines, int kStep, class T>
KAN_DEVICE void stage_lines(const WideArguments& a, const T* from, uint64_t distance, T* to, int left, int i, int next, int last) {
  auto advance = [&] { to += kStep, from += distance, i += next; };
  if (a.aligned) {
    KAN_UNROLL_ALL
    for (int line = 0; line < kLines; ++line, advance()) copy_16_bytes(to, from, !(left > 0 && i < last));
  } else {
    KAN_NO_UNROLL
    for (int line = 0; line < kLines; ++line, advance()) stage_16_bytes(to, from, i < last ? left : 0, false);
  }
}

// Two neighbours at once, the first at a multiple of the size of both.
KAN_DEVICE void store_pair(float* to, float a, float b) { *reinterpret_cast<Words<2>*>(to) = {{as_bits(a), as_bits(b)}}; }
KAN_DEVICE void store_pair(BFloat16* to, float a, float b) { *reinterpret_cast<uint32_t*>(to) = pack_bfloat16(a, b); }
KAN_DEVICE void store_pair(Float16* to, float a, float b) { *reinterpret_cast<uint32_t*>(to) = pack_float16(a, b); }

// A warp's sums to columns `column` .. of the rows that row(line), lines 0 .., gives: pointers to column 0, or null.
template <int kHigh, int kTiles, class Row>
KAN_DEVICE void store_sums(const float (&sums)[kHigh][kTiles][4], int column, int columns, int lane, Row row) {
  const bool pairs = columns % 2 == 0;
  column += lane % 4 * 2;
  KAN_UNROLL_ALL
  for (int half = 0; half < 2 * kHigh; ++half) {
    auto* to = row(lane / 4 + 8 * half);
    if (to == nullptr) continue;
    to += column;
    KAN_UNROLL_ALL
    for (int n = 0; n < kTiles; ++n) {
      const float* sum = sums[half / 2][n] + half % 2 * 2;
      const int left = columns - column - 8 * n;
      if (left <= 0) break;
      if (pairs) {
        store_pair(to + 8 * n, sum[0], sum[1]);
      } else {
        put(to[8 * n], sum[0]);
        if (left > 1) put(to[8 * n + 1], sum[1]);
      }
    }
  }
}

}  // namespace kan::cuda
