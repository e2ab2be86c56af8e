// The only file that knows torch: checks, conversions, allocation, launch. Bound through torch's stable ABI, so that one
// library serves torch 2.10 and every later version, on every Python.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "kernels.h"
#ifdef KAN_BUILT_CUDA
#include <torch/csrc/stable/accelerator.h>

#include "cuda/device.h"

// Hidden behind USE_CUDA in the headers of CPU builds of torch, one of which may be the one that compiles this; weak,
// because libraries of CPU builds lack it.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);
#endif

namespace {

using kan::Problem;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// A macro, so that nobody writes the message of an error that is none: a dozen of them took a microsecond of every call.
#define KAN_REQUIRE(condition, message)                                                  \
  do {                                                                                   \
    if (!(condition)) throw std::invalid_argument(std::string("kan_fast: ") + (message)); \
  } while (0)

std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

void expect_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  for (int64_t d = 0; same && d < t.dim(); ++d) same = t.size(d) == sizes.begin()[d];
  if (same) return;
  std::string wanted;
  for (int64_t size : sizes) wanted += (wanted.empty() ? "" : ", ") + std::to_string(size);
  KAN_REQUIRE(same, std::string(name) + " must have shape (" + wanted + "), got " + shape_of(t));
}

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half;
}
kan::Storage storage_of(ScalarType type) {
  return type == ScalarType::BFloat16 ? kan::Storage::bfloat16 : type == ScalarType::Half ? kan::Storage::half : kan::Storage::same;
}

// Whether to compute in float64 (as float64 weights ask for) or in float32. x may be narrower or wider than the weights,
// but float64 goes with float64 only.
bool is_double(const Tensor& x, const Tensor& weights) {
  KAN_REQUIRE(is_floating(x.scalar_type()), "x must be floating point");
  KAN_REQUIRE(is_floating(weights.scalar_type()), "weights must be floating point");
  const bool wide = weights.scalar_type() == ScalarType::Double;
  KAN_REQUIRE(wide == (x.scalar_type() == ScalarType::Double), "x and the weights must both be float64 or both narrower");
  return wide;
}

// Contiguous and of this type; the tensor itself where it is so already.
Tensor prepared(const Tensor& t, ScalarType type) {
  if (t.scalar_type() != type) return torch::stable::contiguous(torch::stable::to(t, type));
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
}
Tensor as_type(Tensor t, ScalarType type) { return t.scalar_type() == type ? t : torch::stable::to(t, type); }

// A new tensor in memory of the CPU or of the GPU `index`, without the call by name through torch's dispatcher that
// torch::stable::new_empty is: 0.7 us on a CPU.
Tensor fresh(ScalarType type, std::initializer_list<int64_t> sizes, int32_t index = -1) {
  int64_t strides[8], step = 1;
  for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
    strides[d] = step;
    step *= std::max<int64_t>(1, sizes.begin()[d]);
  }
  AtenTensorHandle handle;
  const int32_t dtype = type == ScalarType::Double     ? aoti_torch_dtype_float64()
                        : type == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                        : type == ScalarType::Half     ? aoti_torch_dtype_float16()
                        : type == ScalarType::Byte     ? aoti_torch_dtype_uint8()
                                                       : aoti_torch_dtype_float32();
  const int32_t device = index < 0 ? aoti_torch_device_type_cpu() : aoti_torch_device_type_cuda();
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(int64_t(sizes.size()), sizes.begin(), strides, dtype, device, index, &handle));
  return Tensor(handle);
}

struct AlignedBuffer {
  char* memory = nullptr;
  size_t size = 0;
  ~AlignedBuffer() { std::free(memory); }
};

char* workspace(size_t bytes) {
  // Kept for the life of the thread: a fresh block of this size would be a fresh mapping, and page faults, on every call.
  thread_local AlignedBuffer buffer;
  if (buffer.size < bytes) {
    std::free(buffer.memory);
    buffer.size = (bytes + 4095) / 4096 * 4096;
    buffer.memory = static_cast<char*>(std::aligned_alloc(4096, buffer.size));
    if (!buffer.memory) {
      buffer.size = 0;
      throw std::bad_alloc();
    }
  }
  return buffer.memory;
}

void parallel(int64_t tasks, void (*body)(void*, int64_t), void* context) {
  if (tasks == 1) return body(context, 0);
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) body(context, task);
  });
}

kan::Runtime runtime() { return {int(torch::stable::get_num_threads()), parallel, workspace}; }

// A problem and the tensors that its pointers lead into; those that an operator lacks are null.
template <class T> struct Call {
  static constexpr ScalarType kType = sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float;
  Problem<T> p{};
  std::vector<Tensor> held;

  // `storage`: where the kernels read 16 bits themselves, what tells them so; other tensors are converted.
  void input(const Tensor& t, const T*& pointer, kan::Storage* storage = nullptr) {
    if (storage) *storage = storage_of(t.scalar_type());
    held.push_back(prepared(t, storage && *storage != kan::Storage::same ? t.scalar_type() : kType));
    pointer = static_cast<const T*>(held.back().const_data_ptr());
  }
};

void check_codes(int64_t activation, int64_t outside, int64_t n) {
  KAN_REQUIRE(activation >= kan::kNone && activation <= kan::kTanh, "activation code must be 0..5, got " + std::to_string(activation));
  KAN_REQUIRE(outside >= kan::kZero && outside <= kan::kClamp, "outside code must be 0..2, got " + std::to_string(outside));
  KAN_REQUIRE(n >= 0 && n <= 32, "derivative order n must be 0..32, got " + std::to_string(n));
}

int64_t order_of(const Tensor& x, const Tensor& spline, const Tensor& grid) {
  KAN_REQUIRE(x.dim() == 2, "x must have shape (batch, in), got " + shape_of(x));
  KAN_REQUIRE(spline.dim() == 3 && spline.size(0) == x.size(1),
          "spline_weight must have shape (" + std::to_string(x.size(1)) + ", grid_size + spline_order, out), got " + shape_of(spline));
  KAN_REQUIRE(grid.dim() == 2 && grid.size(0) == x.size(1),
          "grid must have shape (" + std::to_string(x.size(1)) + ", grid_size + 2 * spline_order + 1), got " + shape_of(grid));
  return grid.size(1) - spline.size(1) - 1;
}

void check_order(int64_t order, const Tensor& grid) {
  KAN_REQUIRE(order >= 0 && order <= kan::kMaxOrder, "spline_order must be 0.." + std::to_string(kan::kMaxOrder) +
                                                     " here, got " + std::to_string(order));
  KAN_REQUIRE(grid.size(1) - 2 * order - 1 >= 1,
          "grid must hold at least one interval, got " + std::to_string(grid.size(1)) + " knots for spline_order " + std::to_string(order));
  KAN_REQUIRE(grid.scalar_type() == ScalarType::Float || grid.scalar_type() == ScalarType::Double, "grid must be float32 or float64");
}

// The CPU's kernels keep the interval of a row, and numbers a little past the last one, in 16 bits: larger ones would wrap
// around to other intervals.
void check_intervals(const Tensor& grid, int64_t order, int64_t outside) {
  const int64_t grid_size = grid.size(1) - 2 * order - 1, most = 65534 - (outside == kan::kZero ? 3 : 1) * order;
  KAN_REQUIRE(grid_size <= most, "grid must hold at most " + std::to_string(most) + " intervals for spline_order " +
                                     std::to_string(order) + " on a CPU, got " + std::to_string(grid_size));
}

// What an operator with spline weights is given, but for shapes that set_sizes checks; the spline's order.
int64_t checked_order(const Tensor& x, const Tensor& spline, const MaybeTensor& base, const Tensor& grid, int64_t activation,
                      int64_t outside, int64_t n) {
  const int64_t order = order_of(x, spline, grid);
  check_order(order, grid);
  check_codes(activation, outside, n);
  KAN_REQUIRE((activation == kan::kNone) == !base, "base_weight must be given exactly when activation is not none");
  return order;
}

// The same for contract_weight, which has none.
void check_without_weights(const Tensor& x, const Tensor& grid, int64_t spline_order, int64_t activation, int64_t outside,
                           int64_t n) {
  KAN_REQUIRE(x.dim() == 2, "x must have shape (batch, in), got " + shape_of(x));
  KAN_REQUIRE(grid.dim() == 2 && grid.size(0) == x.size(1),
          "grid must have shape (" + std::to_string(x.size(1)) + ", knots), got " + shape_of(grid));
  check_order(spline_order, grid);
  check_codes(activation, outside, n);
}

// Sizes and codes of a problem of the CPU's or of CUDA's kernels, once shapes and dtypes are known to fit.
template <class P>
void set_sizes(P& p, const Tensor& x, const MaybeTensor& scale, const MaybeTensor& spline, const MaybeTensor& base,
               const MaybeTensor& g, const Tensor& grid, int64_t spline_order, int64_t activation, int64_t outside) {
  p.batch = x.size(0);
  p.in_features = x.size(1);
  p.spline_order = int(spline_order);
  p.grid_size = int(grid.size(1) - 2 * spline_order - 1);
  p.activation = int(activation);
  p.outside = int(outside);
  if (scale) expect_shape("scale", *scale, {p.batch, p.in_features});
  if (g) KAN_REQUIRE(g->dim() == 2, "g must have shape (batch, out), got " + shape_of(*g));
  p.out_features = spline ? spline->size(2) : g->size(1);
  if (g) {
    expect_shape("g", *g, {p.batch, p.out_features});
    KAN_REQUIRE(!spline || g->scalar_type() == spline->scalar_type(), "g must have the dtype of spline_weight");
  }
  if (base) {
    expect_shape("base_weight", *base, {p.in_features, p.out_features});
    KAN_REQUIRE(base->scalar_type() == spline->scalar_type(), "base_weight must have the dtype of spline_weight");
  }
}

template <class T>
Call<T> prepare(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& spline, const MaybeTensor& base,
                const MaybeTensor& g, const Tensor& grid, int64_t spline_order, int64_t activation, int64_t outside) {
  Call<T> call;
  Problem<T>& p = call.p;
  set_sizes(p, x, scale, spline, base, g, grid, spline_order, activation, outside);
  check_intervals(grid, spline_order, outside);
  call.input(x, p.x, &p.x_storage);
  call.input(grid, p.grid);
  if (scale) call.input(*scale, p.scale);
  if (spline) call.input(*spline, p.spline_weight, &p.w_storage);
  if (g) call.input(*g, p.g, &p.w_storage);
  if (base) call.input(*base, p.base_weight, &p.w_storage);
  return call;
}

template <class T>
Tensor output(const Tensor& x, const MaybeTensor& scale, const Tensor& spline, const MaybeTensor& base, const Tensor& grid,
              int64_t order, int64_t activation, int64_t outside, int64_t n) {
  Call<T> call = prepare<T>(x, scale, spline, base, std::nullopt, grid, order, activation, outside);
  call.p.n_output = int(n);
  Tensor y = fresh(spline.scalar_type(), {call.p.batch, call.p.out_features});
  call.p.y = static_cast<T*>(y.mutable_data_ptr());
  kan::cpu::contract_output<T>(call.p, runtime());
  return y;
}

Tensor contract_output(const Tensor& x, const MaybeTensor& scale, const Tensor& spline, const MaybeTensor& base,
                       const Tensor& grid, int64_t activation, int64_t outside, int64_t n, int64_t) {
  const int64_t order = checked_order(x, spline, base, grid, activation, outside, n);
  auto run = is_double(x, spline) ? output<double> : output<float>;
  return run(x, scale, spline, base, grid, order, activation, outside, n);
}

struct Gradients {
  Tensor dx, d_spline, d_base;
};

// dx of order n_input where spline weights are given, weight gradients of order n_weight where want_weight.
template <class T>
Gradients gradients(const Tensor& x, const MaybeTensor& scale, const MaybeTensor& spline, const MaybeTensor& base,
                    const Tensor& g, const Tensor& grid, int64_t order, int64_t activation, int64_t outside,
                    int64_t n_input, int64_t n_weight, bool want_weight) {
  Call<T> call = prepare<T>(x, scale, spline, base, g, grid, order, activation, outside);
  Problem<T>& p = call.p;
  p.n_input = int(n_input);
  p.n_weight = int(n_weight);
  Gradients out;
  if (spline) {
    out.dx = fresh(x.scalar_type(), {p.batch, p.in_features});
    p.dx = static_cast<T*>(out.dx.mutable_data_ptr());
  }
  if (want_weight) {  // summed in place, so in the compute type
    const bool with_base = activation != kan::kNone;
    out.d_spline = fresh(Call<T>::kType, {p.in_features, p.bases(), p.out_features});
    out.d_base = fresh(Call<T>::kType, {with_base ? p.in_features : 0, p.out_features});
    p.d_spline = static_cast<T*>(out.d_spline.mutable_data_ptr());
    if (with_base) p.d_base = static_cast<T*>(out.d_base.mutable_data_ptr());
  }
  kan::cpu::contract_backward<T>(p, runtime());
  if (want_weight) {
    out.d_spline = as_type(out.d_spline, g.scalar_type());
    out.d_base = as_type(out.d_base, g.scalar_type());
  }
  return out;
}

Tensor contract_input(const Tensor& x, const Tensor& spline, const MaybeTensor& base, const Tensor& g, const Tensor& grid,
                      int64_t activation, int64_t outside, int64_t n, int64_t) {
  const int64_t order = checked_order(x, spline, base, grid, activation, outside, n);
  auto run = is_double(x, spline) ? gradients<double> : gradients<float>;
  return run(x, std::nullopt, spline, base, g, grid, order, activation, outside, n, 0, false).dx;
}

std::tuple<Tensor, Tensor> contract_weight(const Tensor& x, const MaybeTensor& scale, const Tensor& g, const Tensor& grid,
                                           int64_t spline_order, int64_t activation, int64_t outside, int64_t n, int64_t) {
  check_without_weights(x, grid, spline_order, activation, outside, n);
  auto run = is_double(x, g) ? gradients<double> : gradients<float>;
  Gradients d = run(x, scale, std::nullopt, std::nullopt, g, grid, spline_order, activation, outside, 0, n, true);
  return {d.d_spline, d.d_base};
}

std::tuple<Tensor, Tensor, Tensor> contract_backward(const Tensor& x, const Tensor& spline, const MaybeTensor& base,
                                                     const Tensor& g, const Tensor& grid, int64_t activation,
                                                     int64_t outside, int64_t n, int64_t) {
  const int64_t order = checked_order(x, spline, base, grid, activation, outside, n);
  auto run = is_double(x, spline) ? gradients<double> : gradients<float>;
  Gradients d = run(x, std::nullopt, spline, base, g, grid, order, activation, outside, n + 1, n, true);
  return {d.dx, d.d_spline, d.d_base};
}

#include "ops_network.h"
#ifdef KAN_BUILT_CUDA
#include "ops_cuda.h"
#endif

}  // namespace

STABLE_TORCH_LIBRARY(kan_fast_native, m) {
  // precision: how a GPU multiplies float32 numbers, 0 for torch.get_float32_matmul_precision() 'highest', 1 for less.
  m.def("contract_output(Tensor x, Tensor? scale, Tensor spline_weight, Tensor? base_weight, Tensor grid, int activation, "
        "int outside, int n, int precision=0) -> Tensor");
  m.def("contract_input(Tensor x, Tensor spline_weight, Tensor? base_weight, Tensor g, Tensor grid, int activation, "
        "int outside, int n, int precision=0) -> Tensor");
  m.def("contract_weight(Tensor x, Tensor? scale, Tensor g, Tensor grid, int spline_order, int activation, int outside, "
        "int n, int precision=0) -> (Tensor, Tensor)");
  m.def("contract_backward(Tensor x, Tensor spline_weight, Tensor? base_weight, Tensor g, Tensor grid, int activation, "
        "int outside, int n, int precision=0) -> (Tensor, Tensor, Tensor)");
  // layers: spline_weight, grid, base_weight unless activation is none, bias if bias, of each layer in turn.
  m.def("network_output(Tensor x, Tensor[] layers, int activation, int outside, bool bias) -> Tensor");
  m.def("network_backward(Tensor x, Tensor[] layers, Tensor g, int activation, int outside, bool bias, bool need_x, "
        "bool need_weights) -> Tensor[]");
  m.def("network_pays(Tensor x, Tensor[] layers, int activation, int outside, bool bias) -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(kan_fast_native, CPU, m) {
  m.impl("contract_output", TORCH_BOX(&contract_output));
  m.impl("contract_input", TORCH_BOX(&contract_input));
  m.impl("contract_weight", TORCH_BOX(&contract_weight));
  m.impl("contract_backward", TORCH_BOX(&contract_backward));
  m.impl("network_output", TORCH_BOX(&network_output));
  m.impl("network_backward", TORCH_BOX(&network_backward));
  m.impl("network_pays", TORCH_BOX(&network_pays));
}

#ifdef KAN_BUILT_CUDA
STABLE_TORCH_LIBRARY_IMPL(kan_fast_native, CUDA, m) {
  m.impl("contract_output", TORCH_BOX(&on_cuda::contract_output));
  m.impl("contract_input", TORCH_BOX(&on_cuda::contract_input));
  m.impl("contract_weight", TORCH_BOX(&on_cuda::contract_weight));
  m.impl("contract_backward", TORCH_BOX(&on_cuda::contract_backward));
  m.impl("network_output", TORCH_BOX(&on_cuda::network_output));
  m.impl("network_backward", TORCH_BOX(&on_cuda::network_backward));
  m.impl("network_pays", TORCH_BOX(&on_cuda::network_pays));
}
#endif
