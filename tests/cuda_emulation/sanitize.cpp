// Every operation on small awkward shapes, for a build with a sanitizer. Values are compared elsewhere: here each access is
// watched, every tensor in memory of its own.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <exception>
#include <memory>
#include <vector>

#include "kernels.h"

using namespace kan::cuda;

namespace {

size_t size_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }

struct Memory {
  std::vector<std::unique_ptr<char, decltype(&std::free)>> blocks;

  char* bytes(size_t count) {
    blocks.emplace_back(static_cast<char*>(std::aligned_alloc(16, (count + 15) / 16 * 16)), &std::free);
    return blocks.back().get();
  }
  // Numbers in [-1.5, 1.5] with few bits, exact in every dtype.
  void* numbers(int64_t count, int dtype) {
    char* data = static_cast<char*>(std::malloc(size_t(count) * size_of(dtype) + 1));
    blocks.emplace_back(data, &std::free);
    for (int64_t i = 0; i < count; ++i) {
      const float value = float(std::rand() % 49 - 24) / 16;
      const double wide = value;
      uint32_t bits;
      std::memcpy(&bits, &value, 4);
      const _Float16 half = _Float16(value);
      const void* from = dtype == kFloat64 ? static_cast<const void*>(&wide) : dtype == kFloat32 ? &value : static_cast<const void*>(&half);
      if (dtype == kBFloat16) bits >>= 16, from = &bits;
      std::memcpy(data + size_t(i) * size_of(dtype), from, size_of(dtype));
    }
    return data;
  }
  void* grid(int64_t inputs, int intervals, int order, bool even, int dtype) {
    const int count = intervals + 2 * order + 1;
    char* data = static_cast<char*>(std::malloc(size_t(inputs * count) * size_of(dtype) + 1));
    blocks.emplace_back(data, &std::free);
    for (int64_t m = 0; m < inputs * count; ++m) {
      const int j = int(m % count);
      const double knot = -1 + 2.0 * (j - order) / intervals + (even || j % 3 ? 0 : 0.3 / intervals);
      const float narrow = float(knot);
      std::memcpy(data + size_t(m) * size_of(dtype), dtype == kFloat64 ? static_cast<const void*>(&knot) : &narrow, size_of(dtype));
    }
    return data;
  }
};

int run(int64_t batch, int64_t inputs, int64_t outputs, int intervals, int order, int dtype, int x_dtype, int outside, int precision) {
  const Device device{90, batch < 2000 ? 4 : 1, 99 * 1024};  // one of which walks over many tiles
  // Every other problem that tensor cores serve, whatever its size, in the sparse form, 16-bit ones by warpgroups, some by clusters, and
  // some of float32 in halves; the rest by choice, which is the narrow kernels for most of them.
  const bool forced = precision == 1 && batch * inputs * outputs > 0 && order <= 3 && dtype != kFloat64;
  const bool clamped = outside == kan::kClamp;
  const char* half = outside == kan::kLinear ? "wgmma" : clamped && outputs == 200 ? "cluster" : "wgmma_sparse";
  setenv("KAN_FAST_CUDA_KERNEL", !forced ? "" : dtype != kFloat32 ? half : clamped ? "wgmma" : "sparse", 1);
  for (int operation = 0; operation < 3; ++operation) {
    Memory memory;
    Problem p{};
    p.batch = batch, p.in_features = inputs, p.out_features = outputs;
    p.grid_size = intervals, p.spline_order = order, p.outside = outside, p.precision = precision;
    p.activation = kan::kSilu;
    p.n = operation == 1;
    p.x_dtype = x_dtype, p.weight_dtype = dtype;
    const int wide = dtype == kFloat64 ? kFloat64 : kFloat32;
    p.x = memory.numbers(batch * inputs, x_dtype);
    p.grid = memory.grid(inputs, intervals, order, outside != kan::kLinear, wide);
    const int64_t edges = inputs * outputs;
    if (operation < 2) {
      p.spline_weight = memory.numbers(edges * p.bases(), dtype);
      p.base_weight = memory.numbers(edges, dtype);
    }
    if (operation > 0) p.g = memory.numbers(batch * outputs, dtype);
    auto scratch = operation == 0 ? workspace_of_output : operation == 1 ? workspace_of_input : workspace_of_weight;
    auto launch = operation == 0 ? launch_contract_output : operation == 1 ? launch_contract_input : launch_contract_weight;
    if (operation == 0) p.y = memory.numbers(batch * outputs, dtype);
    if (operation == 1) p.dx = memory.numbers(batch * inputs, x_dtype);
    if (operation == 2) p.d_spline = memory.numbers(edges * p.bases(), dtype), p.d_base = memory.numbers(edges, dtype);
    const int error = launch(p, device, memory.bytes(scratch(p, device)), nullptr);
    if (error != 0) return error;
  }
  return 0;
}

// Forward and backward of a network of three layers.
int run_network(int64_t batch, int outside) {
  const Device device{90, 1, 99 * 1024};
  const int64_t widths[] = {2, 5, 3, 1};
  for (bool backward : {false, true}) {
    Memory memory;
    NetworkLayer layers[3]{};
    for (int l = 0; l < 3; ++l) {
      Problem& p = layers[l].problem;
      p.batch = batch, p.in_features = widths[l], p.out_features = widths[l + 1];
      p.grid_size = 5, p.spline_order = 3, p.outside = outside, p.activation = kan::kSilu;
      const int64_t edges = p.in_features * p.out_features;
      p.grid = memory.grid(p.in_features, 5, 3, outside != kan::kLinear, kFloat32);
      p.spline_weight = memory.numbers(edges * p.bases(), kFloat32);
      p.base_weight = memory.numbers(edges, kFloat32);
      layers[l].bias = memory.numbers(p.out_features, kFloat32);
      if (!backward) continue;
      p.d_spline = memory.numbers(edges * p.bases(), kFloat32);
      p.d_base = memory.numbers(edges, kFloat32);
      layers[l].d_bias = memory.numbers(p.out_features, kFloat32);
    }
    layers[0].problem.x = memory.numbers(batch * 2, kFloat32);
    if (backward) layers[0].problem.dx = memory.numbers(batch * 2, kFloat32);
    else layers[2].problem.y = memory.numbers(batch, kFloat32);
    layers[2].problem.g = memory.numbers(batch, kFloat32);
    const Network network{3, layers};
    const auto scratch = backward ? workspace_of_network_backward : workspace_of_network_output;
    const auto launch = backward ? launch_network_backward : launch_network_output;
    if (int error = launch(network, device, memory.bytes(scratch(network, device)), nullptr)) return error;
  }
  return 0;
}

}  // namespace

int main() {
  const int64_t shapes[][3] = {{0, 3, 4}, {5, 0, 4}, {1, 1, 1}, {33, 3, 5}, {70, 17, 66}, {1100, 9, 16}, {140, 40, 200}, {2700, 5, 1}};
  const int dtypes[][2] = {{kFloat32, kFloat32}, {kFloat32, kBFloat16}, {kBFloat16, kBFloat16}, {kFloat16, kFloat32}, {kFloat64, kFloat64}};
  int runs = 0;
  try {
    for (auto& shape : shapes)
      for (auto& dtype : dtypes)
        for (int outside = 0; outside < 3; ++outside) {
          const int order = runs % 5 == 4 ? 5 : 3, intervals = runs % 4 == 3 ? 20 : 5;
          if (run(shape[0], shape[1], shape[2], intervals, order, dtype[0], dtype[1], outside, runs % 2) != 0) return 2;
          ++runs;
        }
    for (int64_t batch : {0, 1, 700})
      for (int outside = 0; outside < 3; ++outside, ++runs)
        if (run_network(batch, outside) != 0) return 2;
  } catch (const std::exception& error) {
    std::printf("%s\n", error.what());
    return 1;
  }
  std::printf("%d problems ran\n", runs);
  return 0;
}
