// What the kernels of narrow layers share. Such a layer is bound by reading x and writing y, so that little may be done to an
// item, one row and input: a block first turns weights and knots into tables in shared memory, then walks over the batch. The
// function on an edge (input i, output o) is one cubic in u on every piece of i's axis, so that an item costs its piece and u,
// and an edge 16 bytes and a few multiply-adds; order, derivative, even or uneven knots and what lies outside are all in the
// tables. Tiles of rows are copied asynchronously, 16 bytes at a time, one tile ahead.
#pragma once
#include <type_traits>

#include "describe.cuh"
#include "narrow.h"

namespace kan::cuda {

// Where x of one input falls. Even knots guess the piece, and sureness says how far from the next one a guess is to be believed;
// the stored knots decide all others.
template <class C> struct alignas(16) Place {
  C slope, offset, sureness;  // x * slope + offset is the piece and a fraction in [-1/2, 1/2]; slope: 1 / spacing
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

  // Edges and base of the outputs of a group.
  KAN_DEVICE Tables(const NarrowPlan& plan, char* shared, int group)
      : place(at_offset<Place<C>>(shared, plan.places)),
        starts(at_offset<C>(shared, plan.starts)),
        base(at_offset<C>(shared, plan.base) + group * base_of_group(plan.lane_columns)),
        edges(at_offset<CubicOf<C>>(shared, plan.edges) + group * plan.lane_columns) {}
  KAN_DEVICE void advance(const NarrowPlan& plan) {
    ++place;
    starts += plan.pieces;
    base += plan.base_pitch;
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

// Several x of one input. What the guess is not sure of for one of them is looked up for all: the same, by one branch.
template <class C, int kCount>
KAN_DEVICE void locate(const Problem& p, const NarrowPlan& plan, const Place<C>& place, const C* starts, const C (&x)[kCount],
                       Located<C> (&found)[kCount]) {
  C inverse[kCount];
  bool sure = true;
  KAN_UNROLL_ALL
  for (int m = 0; m < kCount; ++m) {
    const C guess = within(x[m] * place.slope + place.offset, 0, C(plan.above));
    const C off = guess - nearest(guess, found[m].piece);
    sure &= magnitude(off) <= place.sureness;
    inverse[m] = place.slope;
  }
  if (!sure) {
    const int above = plan.pieces - 1;
    KAN_UNROLL_ALL
    for (int m = 0; m < kCount; ++m) {
      const bool beyond = p.outside == kZero ? x[m] >= starts[above] : x[m] > starts[above];
      found[m].piece = x[m] < starts[1] ? 0 : beyond ? above : find_span(starts, 1, place.top, x[m]);
      inverse[m] = starts[plan.inverses_behind + found[m].piece];
    }
  }
  // What lies outside is 0 or a constant, which an infinite u would spoil.
  KAN_UNROLL_ALL
  for (int m = 0; m < kCount; ++m) found[m].u = held((x[m] - starts[found[m].piece]) * inverse[m], -C(plan.reach), C(plan.reach));
}

template <class C>
KAN_DEVICE Located<C> locate_one(const Problem& p, const NarrowPlan& plan, const Place<C>& place, const C* starts, C x) {
  const C all[1] = {x};
  Located<C> found[1];
  locate(p, plan, place, starts, all, found);
  return found[0];
}

// The cubic beyond a range that ends at u = 0 or 1 of a cubic for derivative order n.
template <class C> KAN_DEVICE CubicOf<C> beyond(const CubicOf<C>& w, int outside, int n, C u) {
  if (outside == kClamp && n == 0) return {{w.at(u), 0, 0, 0}};
  if (outside == kLinear && n == 0) return {{w.at(u), w.slope_at(u), 0, 0}};
  if (outside == kLinear && n == 1) return {{w.at(u), 0, 0, 0}};
  return {};
}

// make_cubics() of uneven knots, straight to shared memory: long, and a call of its own keeps its registers from the kernel.
template <class C> KAN_DEVICE_CALL void make_uneven_cubics(const C* t, int count, int order, int j, int n, CubicOf<C>* w) {
  make_cubics(t, count, order, j, n, w);
}

// All tables of a block. Piece m - 1 of an input is its interval low + m, as Described counts them. uniform: make_uniform_cubics.
template <class C>
KAN_DEVICE void make_tables(const Problem& p, const NarrowPlan& plan, const CubicOf<C>* uniform, char* shared, bool with_edges) {
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
    const Described<C> d = describe(p, t, is_uniform_by_lanes<32>(t, count, thread % 32));
    if (thread % 32 != 0) continue;
    described[i] = d;
    const C near = t[0] < 0 ? -t[0] : t[0], far = t[count - 1] < 0 ? -t[count - 1] : t[count - 1];
    Place<C> place{0, 0, -1, d.high - d.low + 1};
    if (d.inverse_h > 0) {
      place.slope = d.inverse_h;
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
    CubicOf<C>* w = cubics + m * kWindowPitch;
    if (d.inverse_h > 0) {
      C factor = 1;
      for (int n = 0; n < p.n; ++n) factor *= d.inverse_h;
      KAN_UNROLL_WINDOW
      for (int q = 0; q <= kMaxCubicOrder; ++q) w[q] = uniform[q] * factor;
    } else {
      make_uneven_cubics(t, count, p.spline_order, j, p.n, w);
    }
    starts[m] = below ? d.first : above ? d.last : t[j];
    // Finite and above 0 whatever the width: u is then a number for every x that is not NaN.
    inverses[m] = d.inverse_h > 0 ? d.inverse_h : reciprocal(width > kSmallest<C> ? width : kSmallest<C>);
    firsts[m] = j - p.spline_order;
    if (!below && !above) continue;
    KAN_UNROLL_WINDOW
    for (int q = 0; q <= kMaxCubicOrder; ++q) w[q] = beyond(w[q], p.outside, p.n, C(above));
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
    const int i = m / columns, o = m - i * columns, group = o / plan.lane_columns;
    const int at = i * plan.base_pitch + group * base_of_group(plan.lane_columns) + o - group * plan.lane_columns;
    base[at] = o < outputs ? raw_base[i * outputs + o] : C(0);
  }
  barrier();
}

// call(T()) with the type of numbers of a dtype.
template <class C, class Call> KAN_DEVICE void by_dtype(int dtype, Call call) {
  if constexpr (sizeof(C) == 8) call(double());
  else if (dtype == kFloat32) call(float());
  else if (dtype == kBFloat16) call(BFloat16());
  else call(Float16());
}

// kCount numbers, four at a time: they begin at a multiple of four if there are as many.
template <class C, int kCount> KAN_DEVICE void load_numbers(const C* from, C (&to)[kCount]) {
  KAN_UNROLL_ALL
  for (int m = 0; m + 3 < kCount; m += 4) {
    const CubicOf<C> four = *reinterpret_cast<const CubicOf<C>*>(from + m);
    KAN_UNROLL_ALL
    for (int k = 0; k < 4; ++k) to[m + k] = four.c[k];
  }
  KAN_UNROLL_ALL
  for (int m = kCount / 4 * 4; m < kCount; ++m) to[m] = from[m];
}

// `rows` rows of a matrix, from `from` on, into a stage, by `all` threads of which this is number `me`.
KAN_DEVICE void stage_rows(const Staged& m, const char* from, int rows, char* stage, int me, int all) {
  char* to = stage + m.offset;
  const int bytes = rows * m.row;
  auto place = [&](int at) { return at + int(high_half_of_product(uint32_t(at), m.per_row)) * (m.pitch - m.row); };
  int done = 0;
  if (m.aligned) {
    if (m.pitch == m.row) {
      KAN_NO_UNROLL
      for (int at = me * 16; at + 16 <= bytes; at += all * 16) copy_16_bytes(to + at, from + at, false);
    } else {
      KAN_NO_UNROLL
      for (int at = me * 16; at + 16 <= bytes; at += all * 16) copy_16_bytes(to + place(at), from + at, false);
    }
    done = bytes / 16 * 16;
  }
  if (done == bytes) return;
  KAN_NO_UNROLL
  for (int at = done + me * 2; at < bytes; at += all * 2)
    *reinterpret_cast<uint16_t*>(to + place(at)) = *reinterpret_cast<const uint16_t*>(from + at);
}

// Four numbers of type T.
template <class T> struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) Four {
  uint32_t words[sizeof(T)];
};
template <class T, class C> KAN_DEVICE Four<T> four_numbers(const C* from) {
  if constexpr (std::is_same_v<T, C>) {
    return *reinterpret_cast<const Four<T>*>(from);
  } else {
    const CubicOf<C> v = *reinterpret_cast<const CubicOf<C>*>(from);
    if constexpr (std::is_same_v<T, BFloat16>) return {{pack_bfloat16(v.c[0], v.c[1]), pack_bfloat16(v.c[2], v.c[3])}};
    else return {{pack_float16(v.c[0], v.c[1]), pack_float16(v.c[2], v.c[3])}};
  }
}

// A warp's results, `rows` rows (plan.result_pitch) of `columns` numbers, to element `begin` of a matrix and on.
template <class C>
KAN_DEVICE void write_rows(const C* results, const NarrowPlan& plan, int columns, void* to, int dtype, int64_t begin, int rows, int lane) {
  const int gap = plan.result_pitch - columns, total = rows * columns, fours = plan.aligned ? total / 4 : 0;
  auto place = [&](int e) { return e + int(high_half_of_product(uint32_t(e), plan.per_result)) * gap; };
  by_dtype<C>(dtype, [&](auto type) {
    using T = decltype(type);
    Four<T>* target = reinterpret_cast<Four<T>*>(static_cast<T*>(to) + begin);
    constexpr int kTogether = 3;  // under way at once
    KAN_NO_UNROLL
    for (int m = lane; m < fours; m += 32 * kTogether) {
      Four<T> four[kTogether];
      KAN_UNROLL_ALL
      for (int k = 0; k < kTogether; ++k) four[k] = four_numbers<T>(results + place(4 * (m + 32 * k < fours ? m + 32 * k : m)));
      KAN_UNROLL_ALL
      for (int k = 0; k < kTogether; ++k)
        if (m + 32 * k < fours) target[m + 32 * k] = four[k];
    }
  });
  KAN_NO_UNROLL
  for (int e = 4 * fours + lane; e < total; e += 32) write<C>(to, begin + e, dtype, results[place(e)]);
}

// A warp's buffers: two stages, and its results.
template <class C> struct Buffers {
  char *stage, *next;
  C* results;

  // The first stages of all warps lie together: tables are made while tiles come into them.
  KAN_DEVICE Buffers(const NarrowPlan& plan, char* shared, int warp)
      : stage(shared + plan.buffers + warp * plan.stage),
        next(shared + plan.buffers + plan.warps * plan.stage + warp * (plan.stage + plan.result)),
        results(at_offset<C>(next, plan.stage)) {}
};

// Walks a warp over its tiles: fetch(tile, rows, stage) begins to copy one, the next one while body does its work, which is called
// for as many rows as a warp takes at once: body(tile, first row within it, rows, stage). Nobody reads the results of one call any
// more when the next begins. prepare() is what a block does before, and while the first tiles come if there is room for them.
template <class C, class Fetch, class Prepare, class Body>
KAN_DEVICE void for_every_tile(const NarrowPlan& plan, Buffers<C> buffers, int warp, Fetch fetch, Prepare prepare, Body body) {
  const int tiles = int(plan.tiles), step = int(gridDim.x) * plan.warps;
  const int turn_rows = kNarrowRows << plan.side;
  auto rows_of = [&](int tile) { return tile == tiles - 1 ? plan.last_rows : plan.tile_rows; };
  auto fetch_one = [&](int tile, char* stage) {
    if (tile < tiles) fetch(tile, rows_of(tile), stage);
    commit_copies();
  };
  int tile = int(blockIdx.x) * plan.warps + warp;
  if (plan.fetches_early) fetch_one(tile, buffers.stage);
  prepare();
  if (!plan.fetches_early) fetch_one(tile, buffers.stage);
  KAN_NO_UNROLL
  for (; tile < tiles; tile += step) {
    wait_for_copies<0>();
    warp_barrier();  // the tile is there, and nobody reads the one before
    fetch_one(tile + step, buffers.next);
    const int rows = rows_of(tile);
    KAN_NO_UNROLL
    for (int first = 0; first < rows; first += turn_rows) {
      if (first > 0) warp_barrier();
      body(tile, first, rows - first < turn_rows ? rows - first : turn_rows, buffers.stage);
    }
    char* const swap = buffers.stage;
    buffers.stage = buffers.next;
    buffers.next = swap;
  }
  wait_for_copies<0>();
}

}  // namespace kan::cuda
