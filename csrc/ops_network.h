// Whole networks of narrow layers: part of ops.cpp, which includes it.
#pragma once

// A network and the tensors that its pointers lead into.
template <class T> struct NetworkCall {
  static constexpr ScalarType kType = Call<T>::kType;
  std::vector<kan::NetworkLayer<T>> layers;
  std::vector<Tensor> held;

  kan::Network<T> network() const { return {int(layers.size()), layers.data()}; }
  Problem<T>& first() { return layers.front().problem; }
  Problem<T>& last() { return layers.back().problem; }

  const T* input(const Tensor& t) {
    held.push_back(prepared(t, kType));
    return static_cast<const T*>(held.back().const_data_ptr());
  }
};

int64_t network_depth(const std::vector<Tensor>& layers, int64_t activation, bool bias) {
  const size_t each = 2 + size_t(activation != kan::kNone) + size_t(bias), depth = layers.size() / each;
  require(depth * each == layers.size() && depth >= 1 && depth <= size_t(kan::kMaxDepth),
          "layers must hold " + std::to_string(each) + " tensors for each of 1.." + std::to_string(kan::kMaxDepth) +
              " layers, got " + std::to_string(layers.size()));
  return int64_t(depth);
}

template <class T>
NetworkCall<T> prepare_network(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias) {
  require(x.dim() == 2, "x must have shape (batch, in), got " + shape_of(x));
  check_codes(activation, outside, 0);
  const int64_t depth = network_depth(layers, activation, bias), batch = x.size(0);
  int64_t width = x.size(1);
  NetworkCall<T> call;
  call.layers.reserve(size_t(depth));
  call.held.reserve(layers.size() + 2);
  auto next = layers.begin();
  for (int64_t l = 0; l < depth; ++l) {
    const Tensor &spline = *next++, &grid = *next++;
    require(spline.dim() == 3 && spline.size(0) == width && spline.scalar_type() == x.scalar_type(),
            "spline_weight must have the dtype of x and shape (" + std::to_string(width) +
                ", grid_size + spline_order, out), got " + shape_of(spline));
    require(grid.dim() == 2 && grid.size(0) == width,
            "grid must have shape (" + std::to_string(width) + ", grid_size + 2 * spline_order + 1), got " + shape_of(grid));
    const int64_t order = grid.size(1) - spline.size(1) - 1, out = spline.size(2);
    check_order(order, grid);
    require(width >= 1 && width <= kan::kMaxWidth && out >= 1 && out <= kan::kMaxWidth,
            "layers must have 1.." + std::to_string(kan::kMaxWidth) + " inputs and outputs, got " + std::to_string(width) + " and " +
                std::to_string(out));
    kan::NetworkLayer<T> layer{};
    Problem<T>& p = layer.problem;
    p.batch = batch;
    p.in_features = width;
    p.out_features = out;
    p.grid_size = int(grid.size(1) - 2 * order - 1);
    p.spline_order = int(order);
    p.activation = int(activation);
    p.outside = int(outside);
    p.n_input = 1;
    p.spline_weight = call.input(spline);
    p.grid = call.input(grid);
    if (activation != kan::kNone) {
      const Tensor& base = *next++;
      expect_shape("base_weight", base, {width, out});
      require(base.scalar_type() == x.scalar_type(), "base_weight must have the dtype of spline_weight");
      p.base_weight = call.input(base);
    }
    if (bias) {
      const Tensor& shift = *next++;
      expect_shape("bias", shift, {out});
      require(shift.scalar_type() == x.scalar_type(), "bias must have the dtype of spline_weight");
      layer.bias = call.input(shift);
    }
    call.layers.push_back(layer);
    width = out;
  }
  call.first().x = call.input(x);
  return call;
}

template <class T>
Tensor run_network(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias) {
  NetworkCall<T> call = prepare_network<T>(x, layers, activation, outside, bias);
  Tensor y = fresh<T>({call.last().batch, call.last().out_features});
  call.last().y = static_cast<T*>(y.mutable_data_ptr());
  kan::cpu::network_output<T>(call.network(), runtime());
  return y;
}

bool network_is_double(const Tensor& x) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  require(wide || x.scalar_type() == ScalarType::Float, "x must be float32 or float64");
  return wide;
}

Tensor network_output(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias) {
  return (network_is_double(x) ? run_network<double> : run_network<float>)(x, layers, activation, outside, bias);
}

// dx where need_x, then of every layer the gradients of spline_weight, base_weight and bias, as far as it has them, where
// need_weights.
template <class T>
std::vector<Tensor> network_gradients(const Tensor& x, const std::vector<Tensor>& layers, const Tensor& g, int64_t activation,
                                      int64_t outside, bool bias, bool need_x, bool need_weights) {
  NetworkCall<T> call = prepare_network<T>(x, layers, activation, outside, bias);
  expect_shape("g", g, {call.last().batch, call.last().out_features});
  require(g.scalar_type() == x.scalar_type(), "g must have the dtype of spline_weight");
  call.last().g = call.input(g);
  std::vector<Tensor> results;
  results.reserve(1 + 3 * call.layers.size());
  auto result = [&](std::initializer_list<int64_t> sizes) {
    results.push_back(fresh<T>(sizes));
    return static_cast<T*>(results.back().mutable_data_ptr());
  };
  if (need_x) call.first().dx = result({call.first().batch, call.first().in_features});
  if (need_weights)
    for (kan::NetworkLayer<T>& layer : call.layers) {
      Problem<T>& p = layer.problem;
      p.d_spline = result({p.in_features, p.bases(), p.out_features});
      if (p.base_weight) p.d_base = result({p.in_features, p.out_features});
      if (layer.bias) layer.d_bias = result({p.out_features});
    }
  if (!results.empty()) kan::cpu::network_backward<T>(call.network(), runtime());
  return results;
}

std::vector<Tensor> network_backward(const Tensor& x, const std::vector<Tensor>& layers, const Tensor& g, int64_t activation,
                                     int64_t outside, bool bias, bool need_x, bool need_weights) {
  auto run = network_is_double(x) ? network_gradients<double> : network_gradients<float>;
  return run(x, layers, g, activation, outside, bias, need_x, need_weights);
}

// Whether one call is the faster way for batches of any size.
bool network_pays(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias) {
  if (network_is_double(x)) return kan::cpu::network_pays(prepare_network<double>(x, layers, activation, outside, bias).network());
  return kan::cpu::network_pays(prepare_network<float>(x, layers, activation, outside, bias).network());
}
