// What the kernels of narrow layers share. Such a layer is bound by reading x and writing y, so that little may be done to an
// item, one row and input: a block first turns weights and knots into tables in shared memory, then walks over the batch. The
// function on an edge (input i, output o) is one cubic in u on every piece of i's axis, so that an item costs its piece and u,
// and an edge 16 bytes and a few multiply-adds; order, derivative, even or uneven knots and what lies outside are all in the
// tables. Tiles of rows are copied asynchronously, 16 bytes at a time, one tile ahead.
#pragma once
#include "describe.cuh"
#include "narrow.h"

namespace kan::cuda {

// Where x of one input falls. Even knots guess the piece, and sureness says how far from the next one a guess is to be believed;
// the stored knots decide all others.
template <class C> struct alignas(16) Place {
  C slope, offset, sureness;  // x * slope + offset is the piece and a fraction in [-1/2, 1/2]
  C inverse;                  // 1 / spacing
  C low, high;                // x is held within them
  C above;                    // the last piece
  int top;                    // the last piece, below the one above, that is not empty
};

template <class C> struct Located {
  int piece;
  C u;  // place within the piece
};

template <class C> KAN_DEVICE C* at_offset(char* shared, int offset) { return reinterpret_cast<C*>(shared + offset); }

// The tables of one input, as a kernel walks through them.
template <class C> struct Tables {
  const Place<C>* place;
  const C *starts, *base;
  const CubicOf<C>* edges;  // (pieces, plan.edge_pitch)

  // Edges and base from output `column` on.
  KAN_DEVICE Tables(const NarrowPlan& plan, char* shared, int column)
      : place(at_offset<Place<C>>(shared, plan.places)),
        starts(at_offset<C>(shared, plan.starts)),
        base(at_offset<C>(shared, plan.base) + column),
        edges(at_offset<CubicOf<C>>(shared, plan.edges) + column) {}
  KAN_DEVICE void advance(const NarrowPlan& plan) {
    ++place;
    starts += plan.pieces;
    base += plan.groups * plan.lane_columns;
    edges += plan.pieces * plan.edge_pitch;
  }
};

// The integer nearest to x in [0, 2^22), as a number and as an int: at a distance of 3 * 2^22 numbers are integers.
KAN_DEVICE float nearest(float x, int& whole) {
  const float far = x + 12582912.0f;
  whole = int(as_bits(far) & 0x3fffffu);
  return far - 12582912.0f;
}
KAN_DEVICE double nearest(double x, int& whole) { return whole = int(x + 0.5); }
KAN_DEVICE float magnitude(float x) { return fabsf(x); }
KAN_DEVICE double magnitude(double x) { return fabs(x); }
// x within [low, high]; NaN becomes `low`.
KAN_DEVICE float within(float x, float low, float high) { return fminf(fmaxf(x, low), high); }
KAN_DEVICE double within(double x, double low, double high) { return fmin(fmax(x, low), high); }

template <class C>
KAN_DEVICE Located<C> locate(const Problem& p, const NarrowPlan& plan, const Place<C>& place, const C* starts, C x) {
  const C guess = within(x * place.slope + place.offset, 0, place.above);
  Located<C> found;
  const C off = guess - nearest(guess, found.piece);
  C inverse = place.inverse;
  if (!(magnitude(off) <= place.sureness)) {
    const int above = plan.pieces - 1;
    const bool beyond = p.outside == kZero ? x >= starts[above] : x > starts[above];
    found.piece = x < starts[1] ? 0 : beyond ? above : find_span(starts, 1, place.top, x);
    inverse = starts[plan.inverses_behind + found.piece];
  }
  found.u = (held(x, place.low, place.high) - starts[found.piece]) * inverse;
  return found;
}

// The cubic beyond a range that ends at u = 0 or 1 of a cubic for derivative order n.
template <class C> KAN_DEVICE CubicOf<C> beyond(const CubicOf<C>& w, int outside, int n, C u) {
  if (outside == kClamp && n == 0) return {{w.at(u), 0, 0, 0}};
  if (outside == kLinear && n == 0) return {{w.at(u), w.slope_at(u), 0, 0}};
  if (outside == kLinear && n == 1) return {{w.at(u), 0, 0, 0}};
  return {};
}

// is_uniform() of bspline.h, a knot to a lane.
template <class C> KAN_DEVICE bool is_uniform_by_warp(const C* t, int count, int lane) {
  const EvenSpacing<C> even(t, count, kEpsilon<C>);
  int off = 0;
  for (int j = 1 + lane; j < count - 1; j += 32) {
    const C deviation = even.deviation(t[j], C(j));
    if (!(deviation <= even.tolerance && deviation >= -even.tolerance)) off = 1;
  }
  for (int mask = 16; mask > 0; mask /= 2) off |= shuffle_xor(off, mask);
  return even.h > even.tolerance && off == 0;
}

// All tables of a block. Piece m - 1 of an input is its interval low + m, as Described counts them. uniform: make_uniform_cubics.
template <class C>
KAN_DEVICE_CALL void make_tables(const Problem& p, const NarrowPlan& plan, const CubicOf<C>* uniform, char* shared, bool with_edges) {
  const int thread = threadIdx.x, threads = plan.warps * 32, inputs = int(p.in_features), outputs = int(p.out_features);
  const int count = p.knots(), pieces = plan.pieces;
  // All numbers are asked for at once, and turned into tables from shared memory: a block waits for global memory only once.
  C* knots = at_offset<C>(shared, plan.knots);  // (in, knots), then the weights: (in, bases, out), (in, out)
  const int of_knots = inputs * count, of_spline = with_edges ? inputs * p.bases() * outputs : 0;
  const bool has_base = p.base_weight != nullptr;
  const int of_base = with_edges && has_base ? inputs * outputs : 0;
  const C *spline = knots + of_knots, *raw_base = spline + of_spline;
  for (int m = thread; m < of_knots + of_spline + of_base; m += threads) {
    const int n = m - of_knots;
    knots[m] = n < 0 ? static_cast<const C*>(p.grid)[m]
                     : n < of_spline ? read<C>(p.spline_weight, n, p.weight_dtype) : read<C>(p.base_weight, n - of_spline, p.weight_dtype);
  }
  Described<C>* described = at_offset<Described<C>>(shared, plan.described);
  Place<C>* places = at_offset<Place<C>>(shared, plan.places);
  C *starts = at_offset<C>(shared, plan.starts), *inverses = at_offset<C>(shared, plan.inverses);
  int* firsts = at_offset<int>(shared, plan.firsts);
  CubicOf<C>* cubics = at_offset<CubicOf<C>>(shared, plan.cubics);
  barrier();

  for (int i = thread / 32; i < inputs; i += plan.warps) {
    const C* t = knots + i * count;
    const Described<C> d = describe(p, t, is_uniform_by_warp(t, count, thread % 32));
    if (thread % 32 != 0) continue;
    described[i] = d;
    const C endless = C(INFINITY);
    const C near = t[0] < 0 ? -t[0] : t[0], far = t[count - 1] < 0 ? -t[count - 1] : t[count - 1];
    Place<C> place{0, 0, -1, 0, p.outside == kLinear ? -endless : d.first, p.outside == kLinear ? endless : d.last, C(pieces - 1),
                   d.high - d.low + 1};
    if (d.inverse_h > 0) {
      place.slope = place.inverse = d.inverse_h;
      place.offset = C(0.5) - d.first * d.inverse_h;
      // Knots lie up to 4 roundings of the largest off the even ones, a guess up to as many of itself.
      place.sureness = C(0.5) - 16 * kEpsilon<C> * ((near > far ? near : far) * d.inverse_h + C(pieces));
    }
    places[i] = place;
  }
  barrier();
  for (int m = thread; m < inputs * pieces; m += threads) {
    const int i = m / pieces, piece = m - i * pieces;
    const C* t = knots + i * count;
    const Described<C>& d = described[i];
    const bool below = piece == 0, above = piece == pieces - 1;
    const int j = below ? interval(t, d, d.first) : above ? interval(t, d, d.last) : d.low + piece - 1;
    const C width = t[j + 1] - t[j];
    CubicOf<C> w[kMaxCubicOrder + 1];
    if (d.inverse_h > 0) {
      C factor = 1;
      for (int n = 0; n < p.n; ++n) factor *= d.inverse_h;
      KAN_UNROLL_WINDOW
      for (int q = 0; q <= kMaxCubicOrder; ++q) w[q] = uniform[q] * factor;
    } else {
      make_cubics(t, count, p.spline_order, j, p.n, w);
    }
    starts[m] = below ? d.first : above ? d.last : t[j];
    inverses[m] = d.inverse_h > 0 ? d.inverse_h : width > 0 ? reciprocal(width) : C(0);
    firsts[m] = j - p.spline_order;
    KAN_UNROLL_WINDOW
    for (int q = 0; q <= kMaxCubicOrder; ++q)
      cubics[m * kWindowPitch + q] = below || above ? beyond(w[q], p.outside, p.n, C(above)) : w[q];
  }
  barrier();
  if (!with_edges) return;
  const int columns = plan.groups * plan.lane_columns;
  CubicOf<C>* edges = at_offset<CubicOf<C>>(shared, plan.edges);
  for (int m = thread; m < inputs * pieces * columns; m += threads) {
    const int row = m / columns, o = m - row * columns, i = row / pieces;
    CubicOf<C> edge{};
    KAN_UNROLL_WINDOW
    for (int q = 0; q <= kMaxCubicOrder; ++q) {
      const int f = firsts[row] + q;
      if (q <= p.spline_order && o < outputs && f >= 0 && f < p.bases())
        edge += cubics[row * kWindowPitch + q] * spline[(i * p.bases() + f) * outputs + o];
    }
    edges[row * plan.edge_pitch + o] = edge;
  }
  C* base = at_offset<C>(shared, plan.base);
  for (int m = thread; m < inputs * columns && has_base; m += threads) {
    const int i = m / columns, o = m - i * columns;
    base[m] = o < outputs ? raw_base[i * outputs + o] : C(0);
  }
  barrier();
}

// Rows first .. first + rows - 1 of a matrix into a stage, by `all` threads of which this is number `me`.
KAN_DEVICE void stage_rows(const Staged& m, int64_t first, int rows, char* stage, int me, int all) {
  if (m.data == nullptr) return;
  const char* from = m.data + first * m.row;
  char* to = stage + m.offset;
  const int bytes = rows * m.row;
  auto place = [&](int at) { return at + int(high_half_of_product(uint32_t(at), m.per_row)) * (m.pitch - m.row); };
  int done = 0;
  if (m.aligned) {
    KAN_NO_UNROLL
    for (int at = me * 16; at + 16 <= bytes; at += all * 16) copy_16_bytes(to + place(at), from + at, false);
    done = bytes / 16 * 16;
  }
  KAN_NO_UNROLL
  for (int at = done + me * 2; at < bytes; at += all * 2)
    *reinterpret_cast<uint16_t*>(to + place(at)) = *reinterpret_cast<const uint16_t*>(from + at);
}

// `rows` rows of results (rows, pitch) to a matrix of `columns` columns, 16 bytes at a time, by one warp.
template <class C>
KAN_DEVICE void write_rows(const C* results, int pitch, int columns, void* to, int dtype, int64_t first, int rows, bool aligned, int lane) {
  struct alignas(16) Bytes {
    uint32_t words[4];
  };
  struct alignas(16) Numbers {
    C of[16 / sizeof(C)];
  };
  const int size = sizeof(C) == 8 ? 8 : dtype == kFloat32 ? 4 : 2, each = 16 / size, total = rows * columns;
  if (aligned && size == int(sizeof(C)) && pitch == columns && total % each == 0) {
    Numbers* target = reinterpret_cast<Numbers*>(static_cast<C*>(to) + first * columns);
    KAN_NO_UNROLL
    for (int m = lane; m < total / each; m += 32) target[m] = reinterpret_cast<const Numbers*>(results)[m];
    return;
  }
  KAN_NO_UNROLL
  for (int e = lane * each; e < total; e += 32 * each) {
    const C* from = results + (pitch == columns ? e : e / columns * pitch + e % columns);
    const int64_t at = first * columns + e;
    if (!aligned || e + each > total) {
      for (int m = 0; m < each && e + m < total; ++m) write<C>(to, at + m, dtype, from[m]);
    } else if (size == int(sizeof(C))) {
      *reinterpret_cast<Numbers*>(static_cast<C*>(to) + at) = *reinterpret_cast<const Numbers*>(from);
    } else if constexpr (sizeof(C) == 4) {
      Bytes bytes;
      KAN_UNROLL_ALL
      for (int m = 0; m < 4; ++m)
        bytes.words[m] = dtype == kBFloat16 ? pack_bfloat16(from[2 * m], from[2 * m + 1]) : pack_float16(from[2 * m], from[2 * m + 1]);
      *reinterpret_cast<Bytes*>(static_cast<uint16_t*>(to) + at) = bytes;
    }
  }
}

// Walks a warp over its tiles: body(first row, rows, stage, that row in the stage) on as many of them as a warp takes at once,
// the next tile under way meanwhile. Nobody reads the results of one call any more when the next begins.
template <class Body> KAN_DEVICE void for_every_tile(const NarrowPlan& plan, int64_t batch, char* stages, int warp, int lane, Body body) {
  const int turn_rows = kNarrowRows << plan.side;
  const int64_t step = int64_t(gridDim.x) * (plan.warps * plan.tile_rows);
  auto rows_from = [&](int64_t row) { return batch - row < plan.tile_rows ? int(batch - row) : plan.tile_rows; };
  auto fetch = [&](int64_t row, char* stage) {
    if (row < batch) {
      stage_rows(plan.x, row, rows_from(row), stage, lane, 32);
      stage_rows(plan.scale, row, rows_from(row), stage, lane, 32);
      stage_rows(plan.g, row, rows_from(row), stage, lane, 32);
    }
    commit_copies();
  };
  int stage = 0;
  int64_t row = (int64_t(blockIdx.x) * plan.warps + warp) * plan.tile_rows;
  fetch(row, stages);
  for (; row < batch; row += step, stage = plan.stage - stage) {
    wait_for_copies<0>();
    warp_barrier();  // the tile is there, and nobody reads the one before
    fetch(row + step, stages + plan.stage - stage);
    const int rows = rows_from(row);
    KAN_NO_UNROLL
    for (int first = 0; first < rows; first += turn_rows) {
      if (first > 0) warp_barrier();
      body(row + first, rows - first < turn_rows ? rows - first : turn_rows, stages + stage, first);
    }
  }
  wait_for_copies<0>();
}

}  // namespace kan::cuda
