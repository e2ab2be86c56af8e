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

void require(bool condition, const std::string& message) {
  if (!condition) throw std::invalid_argument("kan_fast: " + message);
}

std::string shape_of(const Tensor& t) {
  std::string text = "(";
  for (int64_t d = 0; d < t.dim(); ++d) text += (d ? ", " : "") + std::to_string(t.size(d));
  return text + ")";
}

void expect_shape(const char* name, const Tensor& t, std::initializer_list<int64_t> sizes) {
  bool same = t.dim() == int64_t(sizes.size());
  int64_t d = 0;
  std::string wanted = "(";
  for (int64_t size : sizes) {
    same = same && t.size(d) == size;
    wanted += (d ? ", " : "") + std::to_string(size);
    ++d;
  }
  if (!same) require(false, std::string(name) + " must have shape " + wanted + "), got " + shape_of(t));
}

bool is_floating(ScalarType type) {
  return type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16 || type == ScalarType::Half;
}

// Whether to compute in float64 (as float64 weights ask for) or in float32. x may be narrower or wider than the weights,
// but float64 goes with float64 only.
bool is_double(const Tensor& x, const Tensor& weights) {
  require(is_floating(x.scalar_type()), "x must be floating point");
  require(is_floating(weights.scalar_type()), "weights must be floating point");
  const bool wide = weights.scalar_type() == ScalarType::Double;
  require(wide == (x.scalar_type() == ScalarType::Double), "x and the weights must both be float64 or both narrower");
  return wide;
}

// Contiguous and of the compute type; the tensor itself where it is so already.
Tensor prepared(const Tensor& t, ScalarType type) {
  if (t.scalar_type() != type) return torch::stable::contiguous(torch::stable::to(t, type));
  return t.is_contiguous() ? t : torch::stable::contiguous(t);
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

// Shapes and codes shared by all operators. Tensors that an operator lacks are null. The kernels read and write most tensors
// of 16 bits themselves; scale and the weights' gradients, which are summed in place, stand in as float32 copies in one block
// of memory, filled before the launch and written back after it.
template <class T> class Call {
 public:
  Problem<T> p{};

  explicit Call(const Tensor& like) : like_(like) {}
  Call(const Call&) = delete;  // the copies remember where in p their pointers stand

  // `storage`: where the kernels read 16 bits themselves, what is to tell them so.
  void input(const Tensor& t, const T*& pointer, kan::Storage* storage = nullptr) {
    if (is_narrow(t) && storage) {
      held_.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
      pointer = static_cast<const T*>(held_.back().const_data_ptr());
      *storage = kind(t);
    } else if (is_narrow(t)) {
      held_.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
      copies_.push_back({const_cast<void*>(held_.back().const_data_ptr()), &pointer, nullptr, t.numel(), kind(t)});
    } else {
      held_.push_back(prepared(t, sizeof(T) == 8 ? ScalarType::Double : ScalarType::Float));
      pointer = static_cast<const T*>(held_.back().const_data_ptr());
    }
  }
  Tensor output(std::initializer_list<int64_t> sizes, ScalarType type, T*& pointer, bool by_kernels = false) {
    Tensor t = torch::stable::new_empty(like_, sizes, type);
    if (is_narrow(t) && !by_kernels) copies_.push_back({t.mutable_data_ptr(), nullptr, &pointer, t.numel(), kind(t)});
    else pointer = static_cast<T*>(t.mutable_data_ptr());
    return t;
  }
  template <class Kernel> void launch(Kernel kernel) {
    if constexpr (sizeof(T) == 4) {
      int64_t total = 0;
      for (const Copy& copy : copies_) total += padded(copy.count);
      if (total > 0) {
        held_.push_back(torch::stable::new_empty(like_, {total}, ScalarType::Float));
        float* next = static_cast<float*>(held_.back().mutable_data_ptr());
        for (Copy& copy : copies_) {
          copy.wide = next;
          if (copy.in) *copy.in = next;
          else *copy.out = next;
          next += padded(copy.count);
        }
      }
    }
    convert(true);
    kernel(p, runtime());
    convert(false);
  }

 private:
  struct Copy {
    void* narrow;
    const T** in;  // one of the two is null
    T** out;
    int64_t count;
    kan::Storage type;
    float* wide = nullptr;
  };
  static constexpr int64_t kChunk = 1 << 15;  // elements a task converts: about 5 us

  static bool is_narrow(const Tensor& t) {
    return t.scalar_type() == ScalarType::BFloat16 || t.scalar_type() == ScalarType::Half;
  }
  static kan::Storage kind(const Tensor& t) {
    return t.scalar_type() == ScalarType::BFloat16 ? kan::Storage::bfloat16 : kan::Storage::half;
  }
  static int64_t padded(int64_t count) { return (count + 15) / 16 * 16; }

  void convert(bool inputs) {
    int64_t chunks = 0;
    for (const Copy& copy : copies_)
      if ((copy.in != nullptr) == inputs) chunks += (copy.count + kChunk - 1) / kChunk;
    if (chunks == 0) return;
    struct Context {
      const std::vector<Copy>& copies;
      bool inputs;
    } context{copies_, inputs};
    parallel(chunks, [](void* data, int64_t index) {
      const Context& c = *static_cast<const Context*>(data);
      for (const Copy& copy : c.copies) {
        if ((copy.in != nullptr) != c.inputs) continue;
        const int64_t here = (copy.count + kChunk - 1) / kChunk;
        if (index >= here) {
          index -= here;
          continue;
        }
        const int64_t first = index * kChunk, count = std::min(kChunk, copy.count - first);
        uint16_t* narrow = static_cast<uint16_t*>(copy.narrow) + first;
        if (c.inputs) kan::cpu::widen(copy.type, narrow, copy.wide + first, count);
        else kan::cpu::narrow(copy.type, copy.wide + first, narrow, count);
        return;
      }
    }, &context);
  }

  const Tensor& like_;
  std::vector<Tensor> held_;
  std::vector<Copy> copies_;
};

void check_codes(int64_t activation, int64_t outside, int64_t n) {
  require(activation >= kan::kNone && activation <= kan::kTanh, "activation code must be 0..5, got " + std::to_string(activation));
  require(outside >= kan::kZero && outside <= kan::kClamp, "outside code must be 0..2, got " + std::to_string(outside));
  require(n >= 0 && n <= 32, "derivative order n must be 0..32, got " + std::to_string(n));
}

template <class T>
void prepare(Call<T>& call, const Tensor& x, const MaybeTensor& scale, const MaybeTensor& spline, const MaybeTensor& base,
             const MaybeTensor& g, const Tensor& grid, int64_t spline_order, int64_t activation, int64_t outside) {
  Problem<T>& p = call.p;
  p.batch = x.size(0);
  p.in_features = x.size(1);
  p.spline_order = int(spline_order);
  p.grid_size = int(grid.size(1) - 2 * spline_order - 1);
  p.activation = int(activation);
  p.outside = int(outside);
  call.input(x, p.x, &p.x_storage);
  call.input(grid, p.grid);
  if (scale) {
    expect_shape("scale", *scale, {p.batch, p.in_features});
    call.input(*scale, p.scale);
  }
  if (spline) {
    p.out_features = spline->size(2);
    call.input(*spline, p.spline_weight, &p.w_storage);
  }
  if (g) {
    require(g->dim() == 2, "g must have shape (batch, out), got " + shape_of(*g));
    if (!spline) p.out_features = g->size(1);
    expect_shape("g", *g, {p.batch, p.out_features});
    require(!spline || g->scalar_type() == spline->scalar_type(), "g must have the dtype of spline_weight");
    call.input(*g, p.g, &p.w_storage);
  }
  if (base) {
    expect_shape("base_weight", *base, {p.in_features, p.out_features});
    require(base->scalar_type() == spline->scalar_type(), "base_weight must have the dtype of spline_weight");
    call.input(*base, p.base_weight, &p.w_storage);
  }
}

int64_t order_of(const Tensor& x, const Tensor& spline, const Tensor& grid) {
  require(x.dim() == 2, "x must have shape (batch, in), got " + shape_of(x));
  require(spline.dim() == 3 && spline.size(0) == x.size(1),
          "spline_weight must have shape (" + std::to_string(x.size(1)) + ", grid_size + spline_order, out), got " + shape_of(spline));
  require(grid.dim() == 2 && grid.size(0) == x.size(1),
          "grid must have shape (" + std::to_string(x.size(1)) + ", grid_size + 2 * spline_order + 1), got " + shape_of(grid));
  return grid.size(1) - spline.size(1) - 1;
}

void check_order(int64_t order, const Tensor& grid) {
  require(order >= 0 && order <= kan::kMaxOrder, "spline_order must be 0.." + std::to_string(kan::kMaxOrder) +
                                                     " here, got " + std::to_string(order));
  require(grid.size(1) - 2 * order - 1 >= 1,
          "grid must hold at least one interval, got " + std::to_string(grid.size(1)) + " knots for spline_order " + std::to_string(order));
  require(grid.scalar_type() == ScalarType::Float || grid.scalar_type() == ScalarType::Double, "grid must be float32 or float64");
}

void check_base(const MaybeTensor& base, int64_t activation) {
  require((activation == kan::kNone) == !base, "base_weight must be given exactly when activation is not none");
}

template <class T>
Tensor output(const Tensor& x, const MaybeTensor& scale, const Tensor& spline, const MaybeTensor& base, const Tensor& grid,
              int64_t order, int64_t activation, int64_t outside, int64_t n) {
  Call<T> call(x);
  prepare(call, x, scale, spline, base, std::nullopt, grid, order, activation, outside);
  call.p.n_output = int(n);
  Tensor y = call.output({call.p.batch, call.p.out_features}, spline.scalar_type(), call.p.y, true);
  call.launch(kan::cpu::contract_output<T>);
  return y;
}

Tensor contract_output(const Tensor& x, const MaybeTensor& scale, const Tensor& spline, const MaybeTensor& base,
                       const Tensor& grid, int64_t activation, int64_t outside, int64_t n, int64_t) {
  const int64_t order = order_of(x, spline, grid);
  check_order(order, grid);
  check_codes(activation, outside, n);
  check_base(base, activation);
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
  Call<T> call(x);
  prepare(call, x, scale, spline, base, g, grid, order, activation, outside);
  Problem<T>& p = call.p;
  p.n_input = int(n_input);
  p.n_weight = int(n_weight);
  Gradients out;
  if (spline) out.dx = call.output({p.batch, p.in_features}, x.scalar_type(), p.dx, true);
  if (want_weight) {
    out.d_spline = call.output({p.in_features, p.bases(), p.out_features}, g.scalar_type(), p.d_spline);
    const int64_t base_rows = activation == kan::kNone ? 0 : p.in_features;
    out.d_base = call.output({base_rows, p.out_features}, g.scalar_type(), p.d_base);
    if (activation == kan::kNone) p.d_base = nullptr;
  }
  call.launch(kan::cpu::contract_backward<T>);
  return out;
}

Tensor contract_input(const Tensor& x, const Tensor& spline, const MaybeTensor& base, const Tensor& g, const Tensor& grid,
                      int64_t activation, int64_t outside, int64_t n, int64_t) {
  const int64_t order = order_of(x, spline, grid);
  check_order(order, grid);
  check_codes(activation, outside, n);
  check_base(base, activation);
  auto run = is_double(x, spline) ? gradients<double> : gradients<float>;
  return run(x, std::nullopt, spline, base, g, grid, order, activation, outside, n, 0, false).dx;
}

std::tuple<Tensor, Tensor> contract_weight(const Tensor& x, const MaybeTensor& scale, const Tensor& g, const Tensor& grid,
                                           int64_t spline_order, int64_t activation, int64_t outside, int64_t n, int64_t) {
  require(x.dim() == 2, "x must have shape (batch, in), got " + shape_of(x));
  require(grid.dim() == 2 && grid.size(0) == x.size(1), "grid must have shape (" + std::to_string(x.size(1)) + ", knots), got " + shape_of(grid));
  check_order(spline_order, grid);
  check_codes(activation, outside, n);
  auto run = is_double(x, g) ? gradients<double> : gradients<float>;
  Gradients d = run(x, scale, std::nullopt, std::nullopt, g, grid, spline_order, activation, outside, 0, n, true);
  return {d.d_spline, d.d_base};
}

std::tuple<Tensor, Tensor, Tensor> contract_backward(const Tensor& x, const Tensor& spline, const MaybeTensor& base,
                                                     const Tensor& g, const Tensor& grid, int64_t activation,
                                                     int64_t outside, int64_t n, int64_t) {
  const int64_t order = order_of(x, spline, grid);
  check_order(order, grid);
  check_codes(activation, outside, n);
  check_base(base, activation);
  auto run = is_double(x, spline) ? gradients<double> : gradients<float>;
  Gradients d = run(x, std::nullopt, spline, base, g, grid, order, activation, outside, n + 1, n, true);
  return {d.dx, d.d_spline, d.d_base};
}

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
}

STABLE_TORCH_LIBRARY_IMPL(kan_fast_native, CPU, m) {
  m.impl("contract_output", TORCH_BOX(&contract_output));
  m.impl("contract_input", TORCH_BOX(&contract_input));
  m.impl("contract_weight", TORCH_BOX(&contract_weight));
  m.impl("contract_backward", TORCH_BOX(&contract_backward));
}

#ifdef KAN_BUILT_CUDA
STABLE_TORCH_LIBRARY_IMPL(kan_fast_native, CUDA, m) {
  m.impl("contract_output", TORCH_BOX(&on_cuda::contract_output));
  m.impl("contract_input", TORCH_BOX(&on_cuda::contract_input));
  m.impl("contract_weight", TORCH_BOX(&on_cuda::contract_weight));
  m.impl("contract_backward", TORCH_BOX(&on_cuda::contract_backward));
}
#endif
