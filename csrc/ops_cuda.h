// The CUDA side of ops.cpp, which includes it among its own functions: the same checks, then device, stream, memory, launch.

namespace on_cuda {

int dtype_of(ScalarType type) {
  switch (type) {
    case ScalarType::Double: return kan::cuda::kFloat64;
    case ScalarType::BFloat16: return kan::cuda::kBFloat16;
    case ScalarType::Half: return kan::cuda::kFloat16;
    default: return kan::cuda::kFloat32;
  }
}

// A problem and the tensors that its pointers lead into.
struct Call {
  kan::cuda::Problem p{};
  std::vector<Tensor> held;

  const void* keep(const Tensor& t, ScalarType type) {
    held.push_back(prepared(t, type));
    return held.back().const_data_ptr();
  }
};

void expect_device(const char* name, const Tensor& x, const Tensor& t) {
  KAN_REQUIRE(t.is_cuda() && t.get_device_index() == x.get_device_index(),
          std::string(name) + " must be on the device of x, cuda:" + std::to_string(x.get_device_index()));
}

Call prepare(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& spline, const MaybeTensor& base, const MaybeTensor& g,
             const Tensor& grid, int64_t spline_order, int64_t activation, int64_t outside, int64_t n, int64_t precision) {
  Call call;
  auto& p = call.p;
  const Tensor& weights = spline ? *spline : *g;
  const ScalarType type = weights.scalar_type(), wide = is_double(x, weights) ? ScalarType::Double : ScalarType::Float;
  const std::pair<const char*, const MaybeTensor&> others[] = {
      {"scale", scale}, {"spline_weight", spline}, {"base_weight", base}, {"g", g}};
  expect_device("grid", x, grid);
  for (const auto& [name, tensor] : others) if (tensor) expect_device(name, x, *tensor);
  set_sizes(p, x, scale, spline, base, g, grid, spline_order, activation, outside);
  p.n = int(n);
  p.precision = precision == 0 ? kan::cuda::kHighest : kan::cuda::kTf32;
  p.weight_dtype = dtype_of(type);
  // One dtype for x and scale; the wider one where they differ.
  const ScalarType x_type = scale && scale->scalar_type() != x.scalar_type() ? wide : x.scalar_type();
  p.x_dtype = dtype_of(x_type);
  p.x = call.keep(x, x_type);
  p.grid = call.keep(grid, wide);
  if (scale) p.scale = call.keep(*scale, x_type);
  if (spline) p.spline_weight = call.keep(*spline, type);
  if (g) p.g = call.keep(*g, type);
  if (base) p.base_weight = call.keep(*base, type);
  return call;
}

// Queues a launch on the current stream of x's device, with scratch memory that the stream keeps until the kernels are done.
template <class P>
void run(const Tensor& x, const P& p, size_t (*workspace)(const P&, const kan::cuda::Device&),
         int (*launch)(const P&, const kan::cuda::Device&, void*, void*)) {
  KAN_REQUIRE(aoti_torch_get_current_cuda_stream != nullptr, "this torch has no CUDA");
  const int32_t index = x.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(index);
  const kan::cuda::Device& device = kan::cuda::device(index);
  const size_t bytes = workspace(p, device);
  Tensor scratch;
  if (bytes > 0) scratch = fresh(ScalarType::Byte, {int64_t(bytes)}, index);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index, &stream));
  if (int error = launch(p, device, bytes > 0 ? scratch.mutable_data_ptr() : nullptr, stream))
    throw std::runtime_error(std::string("kan_fast: CUDA: ") + kan::cuda::error_text(error));
}

Tensor contract_output(const Tensor& x, const MaybeTensor& scale, const Tensor& spline, const MaybeTensor& base,
                       const Tensor& grid, int64_t activation, int64_t outside, int64_t n, int64_t precision) {
  const int64_t order = checked_order(x, spline, base, grid, activation, outside, n);
  Call call = prepare(x, scale, spline, base, std::nullopt, grid, order, activation, outside, n, precision);
  Tensor y = fresh(spline.scalar_type(), {call.p.batch, call.p.out_features}, x.get_device_index());
  call.p.y = y.mutable_data_ptr();
  run(x, call.p, kan::cuda::workspace_of_output, kan::cuda::launch_contract_output);
  return y;
}

Tensor contract_input(const Tensor& x, const Tensor& spline, const MaybeTensor& base, const Tensor& g, const Tensor& grid,
                      int64_t activation, int64_t outside, int64_t n, int64_t precision) {
  const int64_t order = checked_order(x, spline, base, grid, activation, outside, n);
  Call call = prepare(x, std::nullopt, spline, base, g, grid, order, activation, outside, n, precision);
  Tensor dx = fresh(x.scalar_type(), {call.p.batch, call.p.in_features}, x.get_device_index());
  call.p.dx = dx.mutable_data_ptr();
  run(x, call.p, kan::cuda::workspace_of_input, kan::cuda::launch_contract_input);
  return dx;
}

std::tuple<Tensor, Tensor> contract_weight(const Tensor& x, const MaybeTensor& scale, const Tensor& g, const Tensor& grid,
                                           int64_t spline_order, int64_t activation, int64_t outside, int64_t n,
                                           int64_t precision) {
  check_without_weights(x, grid, spline_order, activation, outside, n);
  Call call = prepare(x, scale, std::nullopt, std::nullopt, g, grid, spline_order, activation, outside, n, precision);
  auto& p = call.p;
  const bool base = activation != kan::kNone;
  Tensor d_spline = fresh(g.scalar_type(), {p.in_features, p.bases(), p.out_features}, x.get_device_index());
  Tensor d_base = fresh(g.scalar_type(), {base ? p.in_features : 0, p.out_features}, x.get_device_index());
  p.d_spline = d_spline.mutable_data_ptr();
  if (base) p.d_base = d_base.mutable_data_ptr();
  run(x, p, kan::cuda::workspace_of_weight, kan::cuda::launch_contract_weight);
  return {d_spline, d_base};
}

std::tuple<Tensor, Tensor, Tensor> contract_backward(const Tensor& x, const Tensor& spline, const MaybeTensor& base,
                                                     const Tensor& g, const Tensor& grid, int64_t activation,
                                                     int64_t outside, int64_t n, int64_t precision) {
  Tensor dx = contract_input(x, spline, base, g, grid, activation, outside, n + 1, precision);
  auto [d_spline, d_base] =
      contract_weight(x, std::nullopt, g, grid, order_of(x, spline, grid), activation, outside, n, precision);
  return {dx, d_spline, d_base};
}

// A network and the tensors that its pointers lead into.
struct NetworkCall {
  std::vector<kan::cuda::NetworkLayer> layers;
  std::vector<Tensor> held;

  kan::cuda::Network network() const { return {int(layers.size()), layers.data()}; }
  const void* input(const char* name, const Tensor& x, const Tensor& t) {
    expect_device(name, x, t);
    held.push_back(prepared(t, x.scalar_type()));
    return held.back().const_data_ptr();
  }
};

NetworkCall prepare_network(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias) {
  NetworkCall call;
  for_every_layer(x, layers, activation, outside, bias, [&](const LayerTensors& tensors) {
    auto p = problem_of<kan::cuda::Problem>(tensors, x.size(0), activation, outside);
    p.x_dtype = p.weight_dtype = dtype_of(x.scalar_type());
    p.spline_weight = call.input("spline_weight", x, *tensors.spline);
    p.grid = call.input("grid", x, *tensors.grid);
    if (tensors.base) p.base_weight = call.input("base_weight", x, *tensors.base);
    call.layers.push_back({p, tensors.bias ? call.input("bias", x, *tensors.bias) : nullptr, nullptr});
  });
  call.layers.front().problem.x = call.input("x", x, x);
  return call;
}

// By counting instructions: with more rows, sums that one thread makes for all rows of a tile take longer than the launches of
// the layers' own kernels.
constexpr int64_t kMostRows = 1 << 16;

bool network_pays(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias) {
  const NetworkCall call = prepare_network(x, layers, activation, outside, bias);
  const kan::cuda::Device& device = kan::cuda::device(x.get_device_index());
  const char* wanted = std::getenv("KAN_FAST_CUDA_KERNEL");  // names kernels of layers
  const bool free = wanted == nullptr || *wanted == '\0';
  return free && x.size(0) <= kMostRows && kan::cuda::why_not_network(call.network(), device) == nullptr;
}

void expect_served(const Tensor& x, const NetworkCall& call) {
  const char* no = kan::cuda::why_not_network(call.network(), kan::cuda::device(x.get_device_index()));
  KAN_REQUIRE(no == nullptr, std::string("no CUDA kernel serves networks with ") + no);
}

Tensor network_output(const Tensor& x, const std::vector<Tensor>& layers, int64_t activation, int64_t outside, bool bias) {
  NetworkCall call = prepare_network(x, layers, activation, outside, bias);
  expect_served(x, call);
  auto& last = call.layers.back().problem;
  Tensor y = fresh(x.scalar_type(), {last.batch, last.out_features}, x.get_device_index());
  last.y = y.mutable_data_ptr();
  run(x, call.network(), kan::cuda::workspace_of_network_output, kan::cuda::launch_network_output);
  return y;
}

std::vector<Tensor> network_backward(const Tensor& x, const std::vector<Tensor>& layers, const Tensor& g, int64_t activation,
                                     int64_t outside, bool bias, bool need_x, bool need_weights) {
  NetworkCall call = prepare_network(x, layers, activation, outside, bias);
  expect_served(x, call);
  auto& last = call.layers.back().problem;
  expect_shape("g", g, {last.batch, last.out_features});
  KAN_REQUIRE(g.scalar_type() == x.scalar_type(), "g must have the dtype of spline_weight");
  last.g = call.input("g", x, g);
  std::vector<Tensor> results = network_results(call.layers, need_x, need_weights, [&](std::initializer_list<int64_t> sizes) {
    return fresh(x.scalar_type(), sizes, x.get_device_index());
  });
  if (!results.empty()) run(x, call.network(), kan::cuda::workspace_of_network_backward, kan::cuda::launch_network_backward);
  return results;
}

}  // namespace on_cuda
