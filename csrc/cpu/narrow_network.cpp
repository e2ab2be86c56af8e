// Stacks of narrow layers, layer after layer on one tile of the batch: what is between the layers stays in cache and in
// columns. The backward computes it again, which is cheaper than a tensor of it.
#include <new>

#include "narrow_layer.h"

namespace kan::cpu::KAN_ISA {
namespace narrow {
namespace {

// Objects without a default constructor, one a layer, constructed in order.
template <class L> struct Stack {
  alignas(64) unsigned char memory[kMaxDepth * sizeof(L)];
  template <class... A> L& construct(int at, A... a) { return *new (memory + size_t(at) * sizeof(L)) L(a...); }
  L& operator[](int at) { return reinterpret_cast<L*>(memory)[at]; }
  const L& operator[](int at) const { return reinterpret_cast<const L*>(memory)[at]; }
};

template <class T> int whole_rows(int rows) {
  constexpr int step = kVectors * Simd<T>::N;
  return (rows + step - 1) / step * step;
}

// Rows beyond the last are zeros, as to_columns leaves them, whatever the layer before makes of its own zeros.
template <class T> void clear_padding(T* columns, int64_t count, int rows) {
  const size_t beyond = size_t(whole_rows<T>(rows) - rows);
  if (beyond > 0)
    for (int64_t c = 0; c < count; ++c) memset(columns + c * kColumn + rows, 0, sizeof(T) * beyond);
}

// y = one layer of x, columns both.
template <class T>
void layer_columns(const NetworkLayer<T>& layer, const Pieces<T>& t, OutputKernel<T> kernel, const T* x, int rows, T* y) {
  const int64_t I = layer.problem.in_features, O = layer.problem.out_features;
  const int whole = whole_rows<T>(rows);
  for (int64_t o = 0; o < O; ++o) memset(y + o * kColumn, 0, sizeof(T) * size_t(whole));
  for (int64_t i = 0; i < I; ++i) kernel(t, i, x + i * kColumn, nullptr, rows, y);
  if (layer.bias)
    for (int64_t o = 0; o < O; ++o) {
      T* column = y + o * kColumn;
      for (int b = 0; b < whole; b += Simd<T>::N) store<T>(column + b, load<T>(column + b) + layer.bias[o]);
    }
}

template <class T> int64_t row_tasks(const Network<T>& network, int64_t threads) {
  int64_t work = 0;
  for (int l = 0; l < network.depth; ++l) {
    const Problem<T>& p = network.layers[l].problem;
    work += p.batch * p.in_features * (p.out_features + 8);
  }
  return larger<int64_t>(1, smaller(threads, work / kMinimumWork));
}

template <class T> struct OutputLayer {
  Pieces<T> pieces;
  OutputKernel<T> kernel;
  explicit OutputLayer(const Problem<T>* p) : pieces(*p, 0, nullptr), kernel(pick_output(pieces)) {}
};

template <class T> struct OutputTask {
  const Network<T>& network;
  const Stack<OutputLayer<T>>& layers;
  int64_t rows;
};

template <class T> void output_rows(const OutputTask<T>& task, int64_t b0, int64_t b1) {
  alignas(64) T columns[2][kMaxWidth * kColumn];
  const Network<T>& network = task.network;
  const Problem<T>&first = network.layers[0].problem, &last = network.layers[network.depth - 1].problem;
  const int64_t I = first.in_features, O = last.out_features;
  for (int64_t b = b0; b < b1; b += kRows) {
    const int rows = int(smaller<int64_t>(kRows, b1 - b));
    T *x = columns[0], *y = columns[1];
    to_columns(first.x + b * I, I, rows, int(I), x);
    for (int l = 0; l < network.depth; ++l) {
      if (l > 0) clear_padding(x, network.layers[l].problem.in_features, rows);
      layer_columns(network.layers[l], task.layers[l].pieces, task.layers[l].kernel, x, rows, y);
      T* swap = x;
      x = y;
      y = swap;
    }
    from_columns(x, rows, int(O), last.y + b * O, O);
  }
}

template <class T> struct BackwardLayer {
  LayerBackward<T> gradients;
  OutputKernel<T> kernel;
  T* d_bias = nullptr;  // (parts, out)
  BackwardLayer(const Problem<T>* p, int64_t parts, bool need_x, bool need_weights)
      : gradients(*p, parts, need_x, need_weights), kernel(pick_output(gradients.values())) {}
};

template <class T> struct BackwardTask {
  const Network<T>& network;
  const Stack<BackwardLayer<T>>& layers;
  int64_t rows;
  T* columns;         // (parts, columns of all layers' inputs, kColumn)
  int64_t per_part;
};

template <class T> void backward_rows(const BackwardTask<T>& task, int64_t part) {
  alignas(64) T gradients[2][kMaxWidth * kColumn];
  Features<T> features;
  const Network<T>& network = task.network;
  const Problem<T>&first = network.layers[0].problem, &last = network.layers[network.depth - 1].problem;
  const int64_t I = first.in_features, O = last.out_features, b1 = smaller(first.batch, (part + 1) * task.rows);
  T* x[kMaxDepth];  // columns of every layer's inputs
  x[0] = task.columns + part * task.per_part;
  for (int l = 0; l < network.depth; ++l) {
    const NetworkLayer<T>& layer = network.layers[l];
    if (l + 1 < network.depth) x[l + 1] = x[l] + layer.problem.in_features * kColumn;
    task.layers[l].gradients.clear(part, 0, layer.problem.in_features);
    const int64_t outputs = layer.problem.out_features;
    if (layer.d_bias) memset(task.layers[l].d_bias + part * outputs, 0, sizeof(T) * size_t(outputs));
  }
  for (int64_t b = part * task.rows; b < b1; b += kRows) {
    const int rows = int(smaller<int64_t>(kRows, b1 - b)), whole = whole_rows<T>(rows);
    to_columns(first.x + b * I, I, rows, int(I), x[0]);
    for (int l = 0; l + 1 < network.depth; ++l) {
      const BackwardLayer<T>& layer = task.layers[l];
      layer_columns(network.layers[l], layer.gradients.values(), layer.kernel, x[l], rows, x[l + 1]);
      clear_padding(x[l + 1], network.layers[l].problem.out_features, rows);
    }
    T *g = gradients[0], *dx = gradients[1];
    to_columns(last.g + b * O, O, rows, int(O), g);
    for (int l = network.depth - 1; l >= 0; --l) {
      const BackwardLayer<T>& layer = task.layers[l];
      const int64_t inputs = network.layers[l].problem.in_features, outputs = network.layers[l].problem.out_features;
      for (int64_t i = 0; i < inputs; ++i)
        layer.gradients.add(part, i, x[l] + i * kColumn, nullptr, g, rows, dx + i * kColumn, features);
      if (layer.d_bias)
        for (int64_t o = 0; o < outputs; ++o) {
          Vec<T> total{};
          for (int q = 0; q < whole; q += Simd<T>::N) total += load<T>(g + o * kColumn + q);
          layer.d_bias[part * outputs + o] += sum<T>(total);
        }
      if (l > 0) clear_padding(dx, inputs, rows);
      T* swap = g;
      g = dx;
      dx = swap;
    }
    if (first.dx) from_columns(g, rows, int(I), first.dx + b * I, I);
  }
}

}  // namespace
}  // namespace narrow

template <class T> void network_output(const Network<T>& network, const Runtime& runtime) {
  using namespace narrow;
  const int64_t batch = network.layers[0].problem.batch;
  if (batch == 0) return;
  Stack<OutputLayer<T>> layers;
  Arena arena(runtime);
  for (int l = 0; l < network.depth; ++l) {
    const Problem<T>& p = network.layers[l].problem;
    const OutputLayer<T>& layer = layers.construct(l, &p);
    arena.reserve<Knots<T>>(size_t(p.in_features));
    arena.reserve<T>(Knots<T>::scratch(p.knots(), p.spline_order) * size_t(p.in_features));
    reserve_pieces(layer.pieces, p.in_features, true, arena);
    arena.reserve<T>(size_t(p.out_features));
  }
  arena.commit();
  for (int l = 0; l < network.depth; ++l) {
    const Problem<T>& p = network.layers[l].problem;
    Pieces<T>& pieces = layers[l].pieces;
    Knots<T>* knots = arena.take<Knots<T>>(size_t(p.in_features));
    prepare_knots(p, knots, arena.take<T>(Knots<T>::scratch(p.knots(), p.spline_order) * size_t(p.in_features)));
    T* zeros = arena.take<T>(size_t(p.out_features));
    memset(zeros, 0, sizeof(T) * size_t(p.out_features));
    pieces.set_base(p, zeros);
    take_pieces(p, pieces, knots, true, static_cast<T*>(nullptr), arena);  // no differences at order 0
  }
  const int64_t rows = rows_per_task(batch, row_tasks(network, runtime.threads));
  OutputTask<T> task{network, layers, rows};
  auto body = [](void* context, int64_t index) {
    const OutputTask<T>& k = *static_cast<OutputTask<T>*>(context);
    output_rows(k, index * k.rows, smaller(k.network.layers[0].problem.batch, (index + 1) * k.rows));
  };
  runtime.parallel((batch + rows - 1) / rows, body, &task);
}

template <class T> void network_backward(const Network<T>& network, const Runtime& runtime) {
  using namespace narrow;
  const Problem<T>& first = network.layers[0].problem;
  const bool need_weights = first.d_spline != nullptr;
  const int64_t batch = larger<int64_t>(1, first.batch);  // an empty one has one part too, whose sums are zeros
  const int64_t rows = rows_per_task(batch, row_tasks(network, runtime.threads)), parts = (batch + rows - 1) / rows;
  Stack<BackwardLayer<T>> layers;
  Arena arena(runtime);
  int64_t width = 0;
  for (int l = 0; l < network.depth; ++l) {
    const Problem<T>& p = network.layers[l].problem;
    layers.construct(l, &p, parts, l > 0 || first.dx != nullptr, need_weights).gradients.reserve(arena, l + 1 < network.depth);
    arena.reserve<T>(size_t(parts * p.out_features));
    width += p.in_features;
  }
  const int64_t per_part = width * kColumn;
  arena.reserve<T>(size_t(parts * per_part));
  arena.commit();
  for (int l = 0; l < network.depth; ++l) {
    layers[l].gradients.prepare(arena, l + 1 < network.depth);
    if (network.layers[l].d_bias) layers[l].d_bias = arena.take<T>(size_t(parts * network.layers[l].problem.out_features));
  }
  BackwardTask<T> task{network, layers, rows, arena.take<T>(size_t(parts * per_part)), per_part};
  auto body = [](void* context, int64_t part) { backward_rows(*static_cast<BackwardTask<T>*>(context), part); };
  runtime.parallel(parts, body, &task);
  for (int l = 0; l < network.depth; ++l) {
    layers[l].gradients.finish();
    const int64_t O = network.layers[l].problem.out_features;
    if (network.layers[l].d_bias)
      for (int64_t o = 0; o < O; ++o) {
        T total = layers[l].d_bias[o];
        for (int64_t part = 1; part < parts; ++part) total += layers[l].d_bias[part * O + o];
        network.layers[l].d_bias[o] = total;
      }
  }
}

// A large batch: the layers' own kernels may be faster, and the cost of a few calls is no matter then.
template <class T> bool network_pays(const Network<T>& network) {
  for (int l = 0; l < network.depth; ++l) {
    const Problem<T>& p = network.layers[l].problem;
    if (!narrow::serves_output(p) || !narrow::serves_backward(p)) return false;
  }
  return true;
}

template void network_output<float>(const Network<float>&, const Runtime&);
template void network_output<double>(const Network<double>&, const Runtime&);
template void network_backward<float>(const Network<float>&, const Runtime&);
template void network_backward<double>(const Network<double>&, const Runtime&);
template bool network_pays<float>(const Network<float>&);
template bool network_pays<double>(const Network<double>&);

}  // namespace kan::cpu::KAN_ISA
