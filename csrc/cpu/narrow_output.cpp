// contract_output of layers with few outputs: y[b, o] += sum over inputs, 16 rows at a time.
#include "narrow_layer.h"

namespace kan::cpu::KAN_ISA::narrow {
namespace {

// y[o][row] += features of one input * its edges. P = degree of the pieces; -1: no spline, only the base. Two vectors of
// rows at once share the tables and hide each other's latency.
template <class T, int P, int REGISTERS>
void accumulate(const Pieces<T>& t, int64_t input, const T* __restrict x, const T* __restrict scale, int rows,
                T* __restrict y) {
  constexpr int U = kVectors, N = Simd<T>::N;
  const Knots<T>& k = t.knots[input];
  const T *lower_knot = t.lower_knot(input), *polynomials = t.polynomials + input * t.outputs * t.edge_size();
  const T* base = t.base + input * t.base_stride;
  for (int b = 0; b < rows; b += U * N) {
    Vec<T> xs[U], s[U], u[U];
    VecInt<T> piece[U];
    KAN_UNROLL for (int v = 0; v < U; ++v) xs[v] = load<T>(x + b + v * N);
    KAN_UNROLL for (int v = 0; v < U; ++v) s[v] = base_feature(t, xs[v]);
    if constexpr (P >= 0) {
      KAN_UNROLL for (int v = 0; v < U; ++v) locate<P, REGISTERS, T>(t, k, lower_knot, xs[v], piece[v], u[v]);
    }
    const T* c = polynomials;
    for (int64_t o = 0; o < t.outputs; ++o, c += t.edge_size()) {
      T* out = y + o * kColumn + b;
      Vec<T> a[U];
      KAN_UNROLL for (int v = 0; v < U; ++v) a[v] = s[v] * base[o];
      if constexpr (P >= 0) {
        Vec<T> p[U];
        KAN_UNROLL for (int v = 0; v < U; ++v) p[v] = entry<REGISTERS, T>(c + P * t.stride, piece[v]);
        KAN_UNROLL for (int d = P - 1; d >= 0; --d) {
          KAN_UNROLL for (int v = 0; v < U; ++v) p[v] = p[v] * u[v] + entry<REGISTERS, T>(c + d * t.stride, piece[v]);
        }
        KAN_UNROLL for (int v = 0; v < U; ++v) a[v] += p[v];
      }
      if (scale) { KAN_UNROLL for (int v = 0; v < U; ++v) a[v] *= load<T>(scale + b + v * N); }
      KAN_UNROLL for (int v = 0; v < U; ++v) store<T>(out + v * N, load<T>(out + v * N) + a[v]);
    }
  }
}

template <class T, int P> OutputKernel<T> pick_registers(int registers) {
  return registers == 1 ? accumulate<T, P, 1> : registers == 2 ? accumulate<T, P, 2> : accumulate<T, P, 0>;
}

}  // namespace

template <class T> OutputKernel<T> pick_output(const Pieces<T>& t) {
  if (!t.order.spline) return accumulate<T, -1, 0>;
  switch (t.order.window) {
    case 1: return pick_registers<T, 0>(t.registers);
    case 2: return pick_registers<T, 1>(t.registers);
    case 3: return pick_registers<T, 2>(t.registers);
    case 4: return pick_registers<T, 3>(t.registers);
    case 5: return pick_registers<T, 4>(t.registers);
    default: return pick_registers<T, 5>(t.registers);
  }
}
template OutputKernel<float> pick_output(const Pieces<float>&);
template OutputKernel<double> pick_output(const Pieces<double>&);

namespace {

template <class T> struct Task {
  const Problem<T>& p;
  const Pieces<T>& pieces;
  int64_t rows;
};

template <class T> void output_rows(const Problem<T>& p, const Pieces<T>& t, int64_t b0, int64_t b1) {
  alignas(64) T column[kInputs * kColumn], scale_column[kInputs * kColumn];
  alignas(64) T y[kMaxOutputs * kColumn], block[kMaxOutputs * kColumn];
  const OutputKernel<T> kernel = pick_output(t);
  const int64_t I = p.in_features, O = p.out_features;
  for (int64_t b = b0; b < b1; b += kRows) {
    const int rows = int(smaller<int64_t>(kRows, b1 - b));
    for (int64_t i0 = 0; i0 < I; i0 += kInputs) {
      const int inputs = int(smaller<int64_t>(kInputs, I - i0));
      to_columns(p.x_storage, p.x, b * I + i0, I, rows, inputs, column);
      if (p.scale) to_columns(p.scale + b * I + i0, I, rows, inputs, scale_column);
      // A sum of its own for every block of inputs keeps float error near that of a blocked matrix product.
      T* sum = i0 == 0 ? y : block;
      memset(sum, 0, sizeof(T) * size_t(O) * kColumn);
      for (int i = 0; i < inputs; ++i)
        kernel(t, i0 + i, column + i * kColumn, p.scale ? scale_column + i * kColumn : nullptr, rows, sum);
      if (i0 > 0)
        for (int64_t q = 0; q < O * kColumn; q += Simd<T>::N) store<T>(y + q, load<T>(y + q) + load<T>(block + q));
    }
    from_columns(y, rows, int(O), p.w_storage, p.y, b * O, O);
  }
}

}  // namespace

template <class T> void contract_output(const Problem<T>& given, const Runtime& runtime) {
  Problem<T> p = given;
  const int64_t tasks = row_tasks(p, runtime.threads);
  Arena arena(runtime);
  const size_t inputs = size_t(p.in_features), outputs = size_t(p.out_features);
  const size_t per_input = Knots<T>::scratch(p.knots(), p.spline_order), scratch = size_t(p.bases() + p.n_output) * outputs;
  Pieces<T> pieces(p, p.n_output, p.scale);
  arena.reserve<Knots<T>>(inputs);
  arena.reserve<T>(per_input * inputs + scratch + outputs);
  reserve_pieces(pieces, p.in_features, true, arena);
  reserve_weights(p, arena);
  arena.commit();
  p = with_wide_weights(given, arena);
  Knots<T>* knots = arena.take<Knots<T>>(inputs);
  T *knots_memory = arena.take<T>(per_input * inputs), *zeros = arena.take<T>(outputs), *rest = arena.take<T>(scratch);
  memset(zeros, 0, sizeof(T) * outputs);
  pieces.set_base(p, zeros);
  take_pieces(p, pieces, prepare_knots(p, knots, knots_memory), true, rest, arena);

  const int64_t rows = rows_per_task(p.batch, tasks);
  Task<T> task{p, pieces, rows};
  auto body = [](void* context, int64_t index) {
    const Task<T>& k = *static_cast<Task<T>*>(context);
    output_rows(k.p, k.pieces, index * k.rows, smaller(k.p.batch, (index + 1) * k.rows));
  };
  runtime.parallel((p.batch + rows - 1) / rows, body, &task);
}

template void contract_output<float>(const Problem<float>&, const Runtime&);
template void contract_output<double>(const Problem<double>&, const Runtime&);

}  // namespace kan::cpu::KAN_ISA::narrow
