// contract_input and contract_weight of layers with few outputs. Rows are split over threads as long as there are fewer
// blocks of inputs than threads; each part keeps its own sums, which are added in order, so that results depend on the
// number of threads alone.
#include "narrow_layer.h"

namespace kan::cpu::KAN_ISA::narrow {
namespace {

// dx[row] = sum over outputs of g * (piece + base): the polynomials are summed over outputs first.
template <class T, int P, int REGISTERS>
void input_gradient(const Pieces<T>& t, int64_t input, const T* __restrict x, const T* __restrict g, int rows,
                    T* __restrict dx) {
  constexpr int M = P + 1;
  const Knots<T>& k = t.knots[input];
  const T *lower_knot = t.lower_knot(input), *polynomials = t.polynomials + input * t.outputs * t.edge_size();
  const T* base = t.base + input * t.base_stride;
  for (int b = 0; b < rows; b += Simd<T>::N) {
    const Vec<T> xs = load<T>(x + b), s = base_feature(t, xs);
    Vec<T> sum[M > 0 ? M : 1], base_sum{}, u;
    VecInt<T> piece{};
    if constexpr (P >= 0) locate<P, REGISTERS, T>(t, k, lower_knot, xs, piece, u);
    KAN_UNROLL for (int d = 0; d < M; ++d) sum[d] = Vec<T>{};
    const T *c = polynomials, *from = g + b;
    for (int64_t o = 0; o < t.outputs; ++o, from += kColumn, c += t.edge_size()) {
      const Vec<T> gs = load<T>(from);
      base_sum += gs * base[o];
      KAN_UNROLL for (int d = 0; d < M; ++d) sum[d] += gs * entry<REGISTERS, T>(c + d * t.stride, piece);
    }
    Vec<T> value = s * base_sum;
    if constexpr (P >= 0) {
      KAN_UNROLL for (int d = P - 1; d >= 0; --d) sum[d] += sum[d + 1] * u;
      value += sum[0];
    }
    store<T>(dx + b, value);
  }
}

// Weights of the window of every lane, and the interval where it begins, which may be `intervals` or more: then no row of
// bases picks the lane.
template <int P, int REGISTERS, class T>
KAN_INLINE void window_weights(const Pieces<T>& t, int64_t input, Vec<T> x, VecInt<T> piece, Vec<T> u, const Vec<T>& s,
                               Features<T>& f, int b) {
  const Knots<T>& k = t.knots[input];
  Vec<T> w[P + 1];
  if (k.uniform && P > 0 && !(t.extended && any<T>((VecInt<T>)(piece >= t.intervals)))) {
    uniform_basis<P, T>(broadcast<T>(1), u, w);
  } else {
    KAN_UNROLL for (int m = 0; m <= P; ++m) {
      const T* c = t.weight(input, m, 0);
      w[m] = entry<REGISTERS, T>(c + P * t.stride, piece);
      KAN_UNROLL for (int d = P - 1; d >= 0; --d) w[m] = w[m] * u + entry<REGISTERS, T>(c + d * t.stride, piece);
    }
    if (P == 0) w[0] = x == x ? w[0] : x;
    if (t.extended) {
      const VecInt<T> first = VecInt<T>{} + t.first[input], last = VecInt<T>{} + (k.high - k.low);
      piece = piece == t.intervals ? first : piece;
      piece = piece > t.intervals ? last : piece;
    }
  }
  if (t.vanishes()) piece = piece == t.none() ? VecInt<T>{} + (t.intervals + P + 1) : piece;
  KAN_UNROLL for (int m = 0; m <= P; ++m) store<T>(f.w[m] + b, w[m] * s);
  *reinterpret_cast<VecInt<T>*>(f.interval + b) = piece;
}

template <class T, int P, int REGISTERS>
void prepare_features(const Pieces<T>& t, int64_t input, const T* x, const T* scale, int rows, Features<T>& f) {
  for (int b = 0; b < rows; b += Simd<T>::N) {
    const Vec<T> xs = load<T>(x + b), s = scale ? load<T>(scale + b) : broadcast<T>(1);
    if constexpr (P >= 0) {
      Vec<T> u;
      VecInt<T> piece;
      locate<P, REGISTERS, T>(t, t.knots[input], t.lower_knot(input), xs, piece, u);
      window_weights<P, REGISTERS, T>(t, input, xs, piece, u, s, f, b);
    }
    store<T>(f.base + b, base_feature(t, xs) * s);
  }
}

// The first backward of splines that are zero outside: input_gradient at n + 1 and prepare_features at n, which meet at
// the same piece and share the exponential of silu.
template <class T, int P, int REGISTERS>
void both_gradients(const Pieces<T>& t, const Pieces<T>& w, int64_t input, const T* __restrict x, const T* __restrict g,
                    int rows, T* __restrict dx, Features<T>& f) {
  const Knots<T>& k = t.knots[input];
  const T *lower_knot = t.lower_knot(input), *polynomials = t.polynomials + input * t.outputs * t.edge_size();
  const T* base = t.base + input * t.base_stride;
  const bool silu_pair = w.order.activation.is_silu(0);
  constexpr int U = kVectors, N = Simd<T>::N;
  for (int b = 0; b < rows; b += U * N) {
    Lanes<T, U> value, slope;
    const Lanes<T, U> xs = load_lanes<T, U>(x + b);
    Vec<T> u[U], sum[U][P], base_sum[U];
    VecInt<T> piece[U];
    if (silu_pair) {
      silu(xs, value, slope);
    } else {
      for (int v = 0; v < U; ++v) {
        value.v[v] = base_feature(w, xs.v[v]);
        slope.v[v] = base_feature(t, xs.v[v]);
      }
    }
    KAN_UNROLL for (int v = 0; v < U; ++v) {
      store<T>(f.base + b + v * N, value.v[v]);
      locate<P - 1, REGISTERS, T>(w, k, lower_knot, xs.v[v], piece[v], u[v]);
      base_sum[v] = Vec<T>{};
      KAN_UNROLL for (int d = 0; d < P; ++d) sum[v][d] = Vec<T>{};
    }
    KAN_UNROLL for (int v = 0; v < U; ++v)
      window_weights<P, REGISTERS, T>(w, input, xs.v[v], piece[v], u[v], broadcast<T>(1), f, b + v * N);
    const T *c = polynomials, *from = g + b;
    for (int64_t o = 0; o < t.outputs; ++o, from += kColumn, c += t.edge_size()) {
      KAN_UNROLL for (int v = 0; v < U; ++v) {
        const Vec<T> gs = load<T>(from + v * N);
        base_sum[v] += gs * base[o];
        KAN_UNROLL for (int d = 0; d < P; ++d) sum[v][d] += gs * entry<REGISTERS, T>(c + d * t.stride, piece[v]);
      }
    }
    KAN_UNROLL for (int v = 0; v < U; ++v) {
      KAN_UNROLL for (int d = P - 2; d >= 0; --d) sum[v][d] += sum[v][d + 1] * u[v];
      store<T>(dx + b + v * N, slope.v[v] * base_sum[v] + sum[v][0]);
    }
  }
}

// d[row][o] += sum over the batch of basis * g, four rows of bases (from `first` on, counted as windows are) times OUT
// outputs at once: their vectors of bases are picked from the window by the interval and never stored.
template <class T, int M, int OUT>
void weight_rows(const Features<T>& f, const T* __restrict g, int rows, int first, T* __restrict d, ptrdiff_t stride) {
  constexpr int R = 4;
  Vec<T> sum[OUT][R];
  KAN_UNROLL for (int o = 0; o < OUT; ++o) { KAN_UNROLL for (int r = 0; r < R; ++r) sum[o][r] = Vec<T>{}; }
  for (int b = 0; b < rows; b += Simd<T>::N) {
    const VecInt<T> index = *reinterpret_cast<const VecInt<T>*>(f.interval + b);
    decltype(equals(index, 0)) here[R + M - 1];  // lanes whose window begins at row first - (M - 1) + q
    KAN_UNROLL for (int q = 0; q < R + M - 1; ++q) here[q] = equals(index, first - (M - 1) + q);
    Vec<T> basis[R];
    KAN_UNROLL for (int r = 0; r < R; ++r) {
      basis[r] = Vec<T>{};
      KAN_UNROLL for (int m = 0; m < M; ++m) basis[r] = select(here[r + M - 1 - m], load<T>(f.w[m] + b), basis[r]);
    }
    KAN_UNROLL for (int o = 0; o < OUT; ++o) {
      const Vec<T> gs = load<T>(g + o * kColumn + b);
      KAN_UNROLL for (int r = 0; r < R; ++r) sum[o][r] += basis[r] * gs;
    }
  }
  KAN_UNROLL for (int o = 0; o < OUT; ++o) {
    T total[R];
    sum4<T>(sum[o], total);
    KAN_UNROLL for (int r = 0; r < R; ++r) d[o * stride + r] += total[r];
  }
}

template <class T, int P> InputKernel<T> pick_registers(int registers) {
  return registers == 1 ? input_gradient<T, P, 1> : registers == 2 ? input_gradient<T, P, 2> : input_gradient<T, P, 0>;
}
template <class T> InputKernel<T> pick_input(const Pieces<T>& t) {
  if (!t.order.spline) return input_gradient<T, -1, 0>;
  switch (t.order.window) {
    case 1: return pick_registers<T, 0>(t.registers);
    case 2: return pick_registers<T, 1>(t.registers);
    case 3: return pick_registers<T, 2>(t.registers);
    case 4: return pick_registers<T, 3>(t.registers);
    case 5: return pick_registers<T, 4>(t.registers);
    default: return pick_registers<T, 5>(t.registers);
  }
}

template <class T, int P, int REGISTERS> WeightKernels<T> weight_kernels() {
  WeightKernels<T> k{prepare_features<T, P, REGISTERS>, nullptr, {}};
  if constexpr (P >= 1) k.both = both_gradients<T, P, REGISTERS>;
  if constexpr (P >= 0) {
    k.rows[1] = weight_rows<T, P + 1, 1>;
    k.rows[2] = weight_rows<T, P + 1, 2>;
    if constexpr (kWidest == 5) {
      k.rows[3] = weight_rows<T, P + 1, 3>;
      k.rows[4] = weight_rows<T, P + 1, 4>;
      k.rows[5] = weight_rows<T, P + 1, 5>;
    }
  }
  return k;
}
template <class T, int P> WeightKernels<T> pick_weight_registers(int registers) {
  return registers == 1 ? weight_kernels<T, P, 1>() : registers == 2 ? weight_kernels<T, P, 2>() : weight_kernels<T, P, 0>();
}
template <class T> WeightKernels<T> pick_weight(const Pieces<T>& t) {
  if (!t.order.spline) return weight_kernels<T, -1, 0>();
  switch (t.order.window) {
    case 1: return pick_weight_registers<T, 0>(t.registers);
    case 2: return pick_weight_registers<T, 1>(t.registers);
    case 3: return pick_weight_registers<T, 2>(t.registers);
    case 4: return pick_weight_registers<T, 3>(t.registers);
    case 5: return pick_weight_registers<T, 4>(t.registers);
    default: return pick_weight_registers<T, 5>(t.registers);
  }
}

}  // namespace

template <class T>
LayerBackward<T>::LayerBackward(const Problem<T>& p, int64_t parts, bool need_x, bool need_weights)
    : p_(p), parts_(parts), need_x_(need_x), need_w_(need_weights), for_x_(p, p.n_input, nullptr),
      for_w_(p, p.n_weight, p.scale), input_(pick_input(for_x_)), weight_(pick_weight(for_w_)),
      together_(need_x && need_weights && !p.scale && p.outside == kZero && p.n_input == p.n_weight + 1 &&
                for_x_.order.spline),
      count_(p.bases() + (p.outside == kZero ? p.n_weight : 0)), stride_((count_ + 3) / 4 * 4),
      offset_(for_w_.low - p.spline_order + p.n_weight) {}

template <class T> void LayerBackward<T>::reserve(Arena& arena, bool with_values) const {
  const size_t inputs = size_t(p_.in_features), sums = need_w_ ? size_t(parts_) * edges() : 0;
  arena.reserve<Knots<T>>(inputs);
  arena.reserve<T>(Knots<T>::scratch(p_.knots(), p_.spline_order) * inputs);
  arena.reserve<T>(sums * size_t(stride_ + 1) + packed_size() + size_t(p_.out_features));
  reserve_pieces(for_x_, p_.in_features, true, arena);
  reserve_pieces(for_w_, p_.in_features, with_values, arena);
  reserve_weights(p_, arena);
}

template <class T> void LayerBackward<T>::prepare(Arena& arena, bool with_values) {
  p_ = with_wide_weights(p_, arena);
  const size_t inputs = size_t(p_.in_features), sums = need_w_ ? size_t(parts_) * edges() : 0;
  Knots<T>* knots = arena.take<Knots<T>>(inputs);
  prepare_knots(p_, knots, arena.take<T>(Knots<T>::scratch(p_.knots(), p_.spline_order) * inputs));
  packed_ = arena.take<T>(packed_size());
  T* zeros = arena.take<T>(size_t(p_.out_features));
  memset(zeros, 0, sizeof(T) * size_t(p_.out_features));
  for_x_.set_base(p_, zeros);
  for_w_.set_base(p_, zeros);
  if (need_x_) take_pieces(p_, for_x_, knots, true, packed_, arena);
  if (need_w_ || with_values) take_pieces(p_, for_w_, knots, with_values, packed_, arena);
  d_spline_ = arena.take<T>(sums * size_t(stride_));
  d_base_ = arena.take<T>(sums);
}

template <class T> void LayerBackward<T>::clear(int64_t part, int64_t first, int64_t end) const {
  if (!need_w_) return;
  const int64_t I = p_.in_features, O = p_.out_features;
  memset(d_spline_ + (part * I + first) * O * stride_, 0, sizeof(T) * size_t((end - first) * O * stride_));
  memset(d_base_ + (part * I + first) * O, 0, sizeof(T) * size_t((end - first) * O));
}

template <class T>
void LayerBackward<T>::add(int64_t part, int64_t input, const T* x, const T* scale, const T* g, int rows, T* dx,
                           Features<T>& features) const {
  if (together_) {
    weight_.both(for_x_, for_w_, input, x, g, rows, dx, features);
  } else {
    if (need_x_) input_(for_x_, input, x, g, rows, dx);
    if (!need_w_) return;
    weight_.features(for_w_, input, x, scale, rows, features);
  }
  const int64_t O = p_.out_features;
  T *d = d_spline_ + (part * p_.in_features + input) * O * stride_, *d_base = d_base_ + (part * p_.in_features + input) * O;
  if (for_w_.order.spline)
    for (int64_t o = 0; o < O;) {
      // Seven outputs as four and three: five and two would pick the bases as often but fill fewer registers.
      const int64_t left = O - o, kernels = (left + kWidest - 1) / kWidest, out = (left + kernels - 1) / kernels;
      for (int r = 0; r < stride_; r += 4)
        weight_.rows[out](features, g + o * kColumn, rows, r - offset_, d + o * stride_ + r, stride_);
      o += out;
    }
  if (p_.d_base)
    for (int64_t o = 0; o < O; ++o) {
      Vec<T> total{};
      for (int q = 0; q < rows; q += Simd<T>::N) total += load<T>(features.base + q) * load<T>(g + o * kColumn + q);
      d_base[o] += sum<T>(total);
    }
}

template <class T> void LayerBackward<T>::finish() const {
  if (!need_w_) return;
  const int64_t I = p_.in_features, O = p_.out_features;
  const int n = for_w_.order.n, bases = p_.bases();
  for (int64_t i = 0; i < I; ++i) {
    T* to = p_.d_spline + i * bases * O;
    if (!for_w_.order.spline) {
      memset(to, 0, sizeof(T) * size_t(bases * O));
    } else {
      T* rows = n > 0 ? packed_ : to;
      for (int r = 0; r < count_; ++r)
        for (int64_t o = 0; o < O; ++o) {
          const T* from = d_spline_ + (i * O + o) * stride_ + r;
          T total = *from;
          for (int64_t part = 1; part < parts_; ++part) total += from[part * I * O * stride_];
          rows[r * O + o] = total;
        }
      if (n > 0) {
        memset(packed_ + count_ * O, 0, sizeof(T) * size_t((bases + n - count_) * O));
        difference_adjoint(p_.grid + i * p_.knots(), p_.spline_order, n, bases, int(O), packed_);
        memcpy(to, packed_, sizeof(T) * size_t(bases * O));
      }
    }
    if (p_.d_base)
      for (int64_t o = 0; o < O; ++o) {
        T total = d_base_[i * O + o];
        for (int64_t part = 1; part < parts_; ++part) total += d_base_[(part * I + i) * O + o];
        p_.d_base[i * O + o] = total;
      }
  }
}

template class LayerBackward<float>;
template class LayerBackward<double>;

namespace {

template <class T> struct Task {
  const LayerBackward<T>& layer;
  int64_t row_tasks, rows, inputs;
};

template <class T> void backward_range(const Task<T>& task, int64_t part, int64_t first, int64_t end) {
  const LayerBackward<T>& layer = task.layer;
  const Problem<T>& p = layer.problem();
  alignas(64) T column[kInputs * kColumn], scale_column[kInputs * kColumn], dx[kInputs * kColumn];
  alignas(64) T g[kMaxOutputs * kColumn];
  Features<T> features;
  const int64_t I = p.in_features, O = p.out_features;
  layer.clear(part, first, end);
  const int64_t b1 = smaller(p.batch, (part + 1) * task.rows);
  for (int64_t b = part * task.rows; b < b1; b += kRows) {
    const int rows = int(smaller<int64_t>(kRows, b1 - b));
    to_columns(p.w_storage, p.g, b * O, O, rows, int(O), g);
    for (int64_t i0 = first; i0 < end; i0 += kInputs) {
      const int inputs = int(smaller<int64_t>(kInputs, end - i0));
      to_columns(p.x_storage, p.x, b * I + i0, I, rows, inputs, column);
      if (p.scale) to_columns(p.scale + b * I + i0, I, rows, inputs, scale_column);
      for (int i = 0; i < inputs; ++i)
        layer.add(part, i0 + i, column + i * kColumn, p.scale ? scale_column + i * kColumn : nullptr, g, rows,
                  dx + i * kColumn, features);
      if (p.dx) from_columns(dx, rows, inputs, p.x_storage, p.dx, b * I + i0, I);
    }
  }
}

}  // namespace

template <class T> void contract_backward(const Problem<T>& p, const Runtime& runtime) {
  const int64_t I = p.in_features, threads = row_tasks(p, runtime.threads);
  const int64_t input_tasks = smaller(threads, (I + kInputs - 1) / kInputs);
  const int64_t inputs = ((I + input_tasks - 1) / input_tasks + kInputs - 1) / kInputs * kInputs;
  const int64_t rows = rows_per_task(p.batch, larger<int64_t>(1, threads / input_tasks));
  const int64_t parts = (p.batch + rows - 1) / rows;

  LayerBackward<T> layer(p, parts, p.dx != nullptr, p.d_spline != nullptr);
  Arena arena(runtime);
  layer.reserve(arena, false);
  arena.commit();
  layer.prepare(arena, false);

  Task<T> task{layer, parts, rows, inputs};
  auto body = [](void* context, int64_t index) {
    const Task<T>& k = *static_cast<Task<T>*>(context);
    const int64_t first = index / k.row_tasks * k.inputs;
    backward_range(k, index % k.row_tasks, first, smaller(k.layer.problem().in_features, first + k.inputs));
  };
  runtime.parallel(parts * ((I + inputs - 1) / inputs), body, &task);
  layer.finish();
}

template void contract_backward<float>(const Problem<float>&, const Runtime&);
template void contract_backward<double>(const Problem<double>&, const Runtime&);

}  // namespace kan::cpu::KAN_ISA::narrow
