// What the operators ask of the kernels: plain structs of raw pointers, no torch.
#pragma once
#include <cstddef>
#include <cstdint>

#if defined(__CUDACC__)
#define KAN_HOST_DEVICE __host__ __device__
#else
#define KAN_HOST_DEVICE
#endif

namespace kan {

enum Activation : int { kNone = 0, kSilu = 1, kIdentity = 2, kGelu = 3, kRelu = 4, kTanh = 5 };
enum Outside : int { kZero = 0, kLinear = 1, kClamp = 2 };

constexpr int kMaxOrder = 5;

// What stands behind a pointer to float: floats, or 16 bits that the kernels widen where they read a tile and round where
// they write one.
enum class Storage : int { same, bfloat16, half };

// One of the three contractions of T_n = sum s phi^(n)(x) W g, or the fused first backward. All tensors contiguous, of one
// type T (float or double), but for those that x_storage and w_storage speak of. A null output is not computed.
template <class T>
struct Problem {
  int64_t batch, in_features, out_features;
  int grid_size, spline_order;
  int activation, outside;
  const T* x;              // (batch, in)
  const T* scale;          // (batch, in) or null
  const T* spline_weight;  // (in, grid_size + spline_order, out)
  const T* base_weight;    // (in, out) or null
  const T* grid;           // (in, grid_size + 2 spline_order + 1)
  const T* g;              // (batch, out)
  int n_output, n_input, n_weight;  // derivative order of each contraction
  T* y;                    // (batch, out):  contract_output
  T* dx;                   // (batch, in):   contract_input
  T* d_spline;             // as spline_weight: contract_weight
  T* d_base;               // as base_weight or null
  Storage x_storage = Storage::same;  // of x and dx
  Storage w_storage = Storage::same;  // of spline_weight, base_weight, g and y

  int bases() const { return grid_size + spline_order; }
  int knots() const { return grid_size + 2 * spline_order + 1; }
};

// A layer of a network: its problem in orders n_output = 0, n_input = 1, n_weight = 0 and with full storage, and its bias.
template <class T>
struct NetworkLayer {
  Problem<T> problem;
  const T* bias;  // (out) or null
  T* d_bias;      // (out) or null
};

constexpr int kMaxDepth = 16;  // layers of a network
constexpr int kMaxWidth = 16;  // inputs and outputs of its layers

// Layers of which each takes the outputs of the one before it. x and dx of the first, y and g of the last are given, others
// null; either every weight's gradient is given or none.
template <class T>
struct Network {
  int depth;
  const NetworkLayer<T>* layers;  // (depth)
};

// How a kernel spreads its tasks over threads and where it gets scratch memory from.
struct Runtime {
  int threads;
  // Calls body(context, task) for every task in [0, tasks), each once, on any thread.
  void (*parallel)(int64_t tasks, void (*body)(void* context, int64_t task), void* context);
  // At least `bytes` of 64-byte aligned memory, private to the calling thread until its next request.
  char* (*workspace)(size_t bytes);
};

namespace cpu {
template <class T> void contract_output(const Problem<T>&, const Runtime&);
template <class T> void contract_backward(const Problem<T>&, const Runtime&);  // dx, d_spline, d_base: any subset
template <class T> void network_output(const Network<T>&, const Runtime&);     // y
template <class T> void network_backward(const Network<T>&, const Runtime&);   // dx and the weights' gradients, or one of them
template <class T> bool network_pays(const Network<T>&);  // for any batch, by the time of the layers' own kernels
}  // namespace cpu

namespace cuda {

enum Dtype : int { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// How float32 products are computed: torch.get_float32_matmul_precision() 'highest', or anything below it.
enum Precision : int { kHighest = 0, kTf32 = 1 };

// As kan::Problem, of any dtypes: weights, g, y and the weights' gradients share one, x, scale and dx another; float64 goes
// with float64 only. grid: float64 for float64 weights, else float32.
struct Problem {
  int64_t batch, in_features, out_features;
  int grid_size, spline_order;
  int activation, outside;
  int n;  // derivative order
  int x_dtype, weight_dtype, precision;
  const void *x, *scale, *spline_weight, *base_weight, *grid, *g;
  void *y, *dx, *d_spline, *d_base;

  KAN_HOST_DEVICE int bases() const { return grid_size + spline_order; }
  KAN_HOST_DEVICE int knots() const { return grid_size + 2 * spline_order + 1; }
};

// A layer of a network: its problem in order n = 0, and its bias of the weights' dtype.
struct NetworkLayer {
  Problem problem;
  const void* bias;  // (out) or null
  void* d_bias;      // (out) or null
};

// As kan::Network.
struct Network {
  int depth;
  const NetworkLayer* layers;  // (depth)
};

// What a launch must know of the GPU: compute capability (80, 90, ...), and the shared memory that a block may ask for.
struct Device {
  int architecture, multiprocessors;
  int64_t shared_memory;
};

// Bytes of scratch memory, 256-byte aligned, that a launch needs.
size_t workspace_of_output(const Problem&, const Device&);
size_t workspace_of_input(const Problem&, const Device&);
size_t workspace_of_weight(const Problem&, const Device&);

// Each queues its kernels on a stream of the current device; the result is a cudaError_t. Which kernel: launch.cpp.
int launch_contract_output(const Problem&, const Device&, void* workspace, void* stream);  // y
int launch_contract_input(const Problem&, const Device&, void* workspace, void* stream);   // dx
int launch_contract_weight(const Problem&, const Device&, void* workspace, void* stream);  // d_spline, d_base

// The same for whole networks, where there is a kernel for them: network.cpp.
const char* why_not_network(const Network&, const Device&);  // null, or what it does not serve
size_t workspace_of_network_output(const Network&, const Device&);
size_t workspace_of_network_backward(const Network&, const Device&);
int launch_network_output(const Network&, const Device&, void* workspace, void* stream);    // y
int launch_network_backward(const Network&, const Device&, void* workspace, void* stream);  // dx, and weights' gradients or none

}  // namespace cuda

}  // namespace kan
