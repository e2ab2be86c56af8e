// Whole networks of narrow layers: part of ops.cpp, which includes it.
#pragma once

// What a layer has among the tensors of a network; those that it lacks are null.
struct LayerTensors {
  const Tensor *spline, *grid, *base, *bias;
  int64_t order;
};

int64_t network_depth(const std::vector<Tensor>& layers, int64_t activation, bool bias) {
  const size_t each = 2 + size_t(activation != kan::kNone) + size_t(bias), depth = layers.size() / each;
  KAN_REQUIRE(depth * each == layers.size() && depth >= 1 && depth <= size_t(kan::kMaxDepth),
          "layers must hold " + std::to_string(each) + " tensors for each of 1.." + std::to_string(kan::kMaxDepth) +
              " layers, got " + std::to_string(layers.size()));
  return int64_t(depth);
}

bool network_is_double(const Tensor& x) {
  const bool wide = x.scalar_type() == ScalarType::Double;
  KAN_REQUIRE(wide || x.scalar_type() == ScalarType::Float, "x must be float32 or float64");
  return wide;
}

// Calls body(tensors) for every layer in turn, once its shapes and dtypes are known to fit.
template <class Body>
void for_every_layer(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias, Body body) {
  KAN_REQUIRE(x.dim() == 2, "x must have shape (batch, in), got " + shape_of(x));
  network_is_double(x);
  check_codes(activation, outside, 0);
  const int64_t depth = network_depth(layers, activation, bias);
  int64_t width = x.size(1);
  auto next = layers.begin();
  for (int64_t l = 0; l < depth; ++l) {
    LayerTensors tensors{&*next++, &*next++, nullptr, nullptr, 0};
    const Tensor &spline = *tensors.spline, &grid = *tensors.grid;
    KAN_REQUIRE(spline.dim() == 3 && spline.size(0) == width && spline.scalar_type() == x.scalar_type(),
            "spline_weight must have the dtype of x and shape (" + std::to_string(width) +
                ", grid_size + spline_order, out), got " + shape_of(spline));
    KAN_REQUIRE(grid.dim() == 2 && grid.size(0) == width,
            "grid must have shape (" + std::to_string(width) + ", grid_size + 2 * spline_order + 1), got " + shape_of(grid));
    tensors.order = grid.size(1) - spline.size(1) - 1;
    const int64_t out = spline.size(2);
    check_order(tensors.order, grid);
    KAN_REQUIRE(width >= 1 && width <= kan::kMaxWidth && out >= 1 && out <= kan::kMaxWidth,
            "layers must have 1.." + std::to_string(kan::kMaxWidth) + " inputs and outputs, got " + std::to_string(width) + " and " +
                std::to_string(out));
    if (activation != kan::kNone) {
      tensors.base = &*next++;
      expect_shape("base_weight", *tensors.base, {width, out});
      KAN_REQUIRE(tensors.base->scalar_type() == x.scalar_type(), "base_weight must have the dtype of spline_weight");
    }
    if (bias) {
      tensors.bias = &*next++;
      expect_shape("bias", *tensors.bias, {out});
      KAN_REQUIRE(tensors.bias->scalar_type() == x.scalar_type(), "bias must have the dtype of spline_weight");
    }
    body(tensors);
    width = out;
  }
}

// Sizes and codes of the problem of a layer, the CPU's or CUDA's.
template <class P>
P problem_of(const LayerTensors& tensors, int64_t batch, int64_t activation, int64_t outside) {
  P p{};
  p.batch = batch;
  p.in_features = tensors.spline->size(0);
  p.out_features = tensors.spline->size(2);
  p.grid_size = int(tensors.grid->size(1) - 2 * tensors.order - 1);
  p.spline_order = int(tensors.order);
  p.activation = int(activation);
  p.outside = int(outside);
  return p;
}

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

template <class T>
NetworkCall<T> prepare_network(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias) {
  NetworkCall<T> call;
  call.layers.reserve(layers.size() / 2);
  call.held.reserve(layers.size() + 2);
  for_every_layer(x, layers, activation, outside, bias, [&](const LayerTensors& tensors) {
    kan::NetworkLayer<T> layer{problem_of<Problem<T>>(tensors, x.size(0), activation, outside), nullptr, nullptr};
    Problem<T>& p = layer.problem;
    check_intervals(*tensors.grid, tensors.order, outside);
    p.n_input = 1;
    p.spline_weight = call.input(*tensors.spline);
    p.grid = call.input(*tensors.grid);
    if (tensors.base) p.base_weight = call.input(*tensors.base);
    if (tensors.bias) layer.bias = call.input(*tensors.bias);
    call.layers.push_back(layer);
  });
  call.first().x = call.input(x);
  return call;
}

template <class T>
Tensor run_network(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias) {
  NetworkCall<T> call = prepare_network<T>(x, layers, activation, outside, bias);
  Tensor y = fresh(x.scalar_type(), {call.last().batch, call.last().out_features});
  call.last().y = static_cast<T*>(y.mutable_data_ptr());
  kan::cpu::network_output<T>(call.network(), runtime());
  return y;
}

Tensor network_output(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias) {
  return (network_is_double(x) ? run_network<double> : run_network<float>)(x, layers, activation, outside, bias);
}

// Makes dx where need_x, then of every layer the gradients of spline_weight, base_weight and bias, as far as it has them, where
// need_weights; the layers are told.
template <class Layer, class Make>
std::vector<Tensor> network_results(std::vector<Layer>& layers, bool need_x, bool need_weights, Make make) {
  std::vector<Tensor> results;
  results.reserve(1 + 3 * layers.size());
  auto result = [&](auto*& pointer, std::initializer_list<int64_t> sizes) {
    results.push_back(make(sizes));
    pointer = static_cast<std::remove_reference_t<decltype(pointer)>>(results.back().mutable_data_ptr());
  };
  auto& first = layers.front().problem;
  if (need_x) result(first.dx, {first.batch, first.in_features});
  if (need_weights)
    for (Layer& layer : layers) {
      auto& p = layer.problem;
      result(p.d_spline, {p.in_features, p.bases(), p.out_features});
      if (p.base_weight) result(p.d_base, {p.in_features, p.out_features});
      if (layer.bias) result(layer.d_bias, {p.out_features});
    }
  return results;
}

// The gradients that network_results makes.
template <class T>
std::vector<Tensor> network_gradients(const Tensor& x, const std::vector<Tensor>& layers, const Tensor& g, int64_t activation,
                                      int64_t outside, bool bias, bool need_x, bool need_weights) {
  NetworkCall<T> call = prepare_network<T>(x, layers, activation, outside, bias);
  expect_shape("g", g, {call.last().batch, call.last().out_features});
  KAN_REQUIRE(g.scalar_type() == x.scalar_type(), "g must have the dtype of spline_weight");
  call.last().g = call.input(g);
  std::vector<Tensor> results = network_results(
      call.layers, need_x, need_weights, [&](std::initializer_list<int64_t> sizes) { return fresh(x.scalar_type(), sizes); });
  if (!results.empty()) kan::cpu::network_backward<T>(call.network(), runtime());
  return results;
}

std::vector<Tensor> network_backward(const Tensor& x, const std::vector<Tensor>& layers, const Tensor& g, int64_t activation,
                                     int64_t outside, bool bias, bool need_x, bool need_weights) {
  auto run = network_is_double(x) ? network_gradients<double> : network_gradients<float>;
  return run(x, layers, g, activation, outside, bias, need_x, need_weights);
}

// Whether one call is the faster way, whatever it saves in calls.
bool network_pays(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias) {
  if (network_is_double(x)) return kan::cpu::network_pays(prepare_network<double>(x, layers, activation, outside, bias).network());
  return kan::cpu::network_pays(prepare_network<float>(x, layers, activation, outside, bias).network());
}
