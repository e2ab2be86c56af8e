// Whole networks of narrow layers: a thread takes a row through all of them, and what is between the layers stays in shared
// memory. The backward goes through the layers again first; the sums of the weights' gradients go over the rows of a tile in
// their order, then over a block's tiles, then over the blocks: no atomics, the same bits on every run.
#include "describe.cuh"
#include "narrow.cuh"
#include "network.h"

namespace kan::cuda {

namespace {

// What a layer's tables say of an x of input i.
struct Met {
  Located<float> at;
  int row;  // of the tables: input and piece
  float inverse;
};

KAN_DEVICE Met meet(const NetworkLayerPlan& layer, char* shared, int i, float x) {
  const NarrowPlan& plan = layer.tables;
  const float* starts = at_offset<float>(shared, plan.starts) + i * plan.pieces;
  const Located<float> at = locate_one(layer.p, plan, at_offset<Place<float>>(shared, plan.places)[i], starts, x);
  return {at, i * plan.pieces + at.piece, starts[plan.inverses_behind + at.piece]};
}

// y = one layer of x, of this thread's row: columns.
KAN_DEVICE void through_layer(const NetworkArguments& a, const NetworkLayerPlan& layer, char* shared, const float* x, float* y) {
  const NarrowPlan& plan = layer.tables;
  const int inputs = int(layer.p.in_features), outputs = int(layer.p.out_features);
  const bool has_base = layer.p.base_weight != nullptr;
  for (int o = 0; o < outputs; ++o) y[o * kNetworkPitch] = 0;
  for (int i = 0; i < inputs; ++i) {
    const float here = x[i * kNetworkPitch];
    const Met met = meet(layer, shared, i, here);
    const Cubic* edges = at_offset<Cubic>(shared, plan.edges) + met.row * plan.edge_pitch;
    const float* base = at_offset<float>(shared, plan.base) + i * plan.base_pitch;
    const float activation = has_base ? activate(a.value, here) : 0.0f;
    for (int o = 0; o < outputs; ++o) {
      float value = edges[o].at(met.at.u);
      if (has_base) value += activation * base[o];
      y[o * kNetworkPitch] += value;
    }
  }
  if (layer.bias != nullptr)
    for (int o = 0; o < outputs; ++o) y[o * kNetworkPitch] += layer.bias[o];
}

KAN_DEVICE void make_all_tables(const NetworkArguments& a, char* shared) {
  for (int l = 0; l < a.depth; ++l) make_tables(a.layers[l].p, a.layers[l].tables, a.uniform, shared, true);
}

// One row of a matrix (batch, columns) to columns; zeros where there is no such row.
KAN_DEVICE void take_row(const void* from, int64_t row, bool exists, int columns, float* to) {
  for (int c = 0; c < columns; ++c) to[c * kNetworkPitch] = exists ? static_cast<const float*>(from)[row * columns + c] : 0.0f;
}
KAN_DEVICE void put_row(const float* from, int64_t row, int columns, void* to) {
  for (int c = 0; c < columns; ++c) static_cast<float*>(to)[row * columns + c] = from[c * kNetworkPitch];
}

__global__ void __launch_bounds__(kNetworkThreads, kResident) network_output(const __grid_constant__ NetworkArguments a) {
  char* shared = shared_memory<char>();
  make_all_tables(a, shared);
  const Problem &first = a.layers[0].p, &last = a.layers[a.depth - 1].p;
  float* columns = at_offset<float>(shared, a.columns) + threadIdx.x;
  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int64_t row = tile * kNetworkThreads + threadIdx.x;
    if (row >= first.batch) break;
    take_row(first.x, row, true, int(first.in_features), columns);
    int y = 0;
    for (int l = 0; l < a.depth; ++l) {
      const NetworkLayerPlan& layer = a.layers[l];
      y = layer.inputs + int(layer.p.in_features);
      through_layer(a, layer, shared, columns + layer.inputs * kNetworkPitch, columns + y * kNetworkPitch);
    }
    put_row(columns + y * kNetworkPitch, row, int(last.out_features), last.y);
  }
}

// The sums of one input over the rows of a tile, a thread to each; g: columns of all rows.
KAN_DEVICE void add_sums(const NetworkArguments& a, const NetworkLayerPlan& layer, char* shared, int i, const float* g) {
  const int outputs = int(layer.p.out_features), bases = layer.p.bases(), order = layer.p.spline_order;
  const float* windows = at_offset<float>(shared, a.windows);
  const float* activations = windows + (kMaxCubicOrder + 1) * kNetworkPitch;
  const int* firsts = reinterpret_cast<const int*>(activations + kNetworkPitch);
  float* sums = at_offset<float>(shared, a.sums) + layer.sums;
  const int cells = (bases + 1) * outputs, extra = i == 0 && layer.d_bias != nullptr ? outputs : 0;
  for (int cell = threadIdx.x; cell < cells + extra; cell += kNetworkThreads) {
    const int f = cell / outputs, o = cell - f * outputs;
    const float* pulled = g + o * kNetworkPitch;
    float total = 0;
    if (f < bases) {
      for (int r = 0; r < kNetworkThreads; ++r) {
        const int q = f - firsts[r];
        if (q >= 0 && q <= order) total += windows[q * kNetworkPitch + r] * pulled[r];
      }
    } else if (f == bases) {
      for (int r = 0; r < kNetworkThreads; ++r) total += activations[r] * pulled[r];
    } else {
      for (int r = 0; r < kNetworkThreads; ++r) total += pulled[r];
    }
    sums[f > bases ? int(layer.p.in_features) * cells + o : i * cells + cell] += total;
  }
}

__global__ void __launch_bounds__(kNetworkThreads, kResident)
    network_backward(const __grid_constant__ NetworkArguments a, float* parts) {
  char* shared = shared_memory<char>();
  make_all_tables(a, shared);
  const Problem &first = a.layers[0].p, &last = a.layers[a.depth - 1].p;
  const int thread = threadIdx.x;
  float *columns = at_offset<float>(shared, a.columns) + thread, *windows = at_offset<float>(shared, a.windows) + thread;
  float *g = at_offset<float>(shared, a.gradients), *dx = g + a.widest * kNetworkPitch, *sums = at_offset<float>(shared, a.sums);
  for (int m = thread; m < a.all_sums; m += kNetworkThreads) sums[m] = 0;

  for (int64_t tile = blockIdx.x; tile < a.tiles; tile += gridDim.x) {
    const int64_t row = tile * kNetworkThreads + thread;
    const bool exists = row < first.batch;
    take_row(first.x, row, exists, int(first.in_features), columns);
    for (int l = 0; l + 1 < a.depth; ++l)
      through_layer(a, a.layers[l], shared, columns + a.layers[l].inputs * kNetworkPitch,
                    columns + a.layers[l + 1].inputs * kNetworkPitch);
    take_row(last.g, row, exists, int(last.out_features), g + thread);
    for (int l = a.depth - 1; l >= 0; --l) {
      const NetworkLayerPlan& layer = a.layers[l];
      const NarrowPlan& plan = layer.tables;
      const int inputs = int(layer.p.in_features), outputs = int(layer.p.out_features);
      const bool has_base = layer.p.base_weight != nullptr;
      for (int i = 0; i < inputs; ++i) {
        const float x = columns[(layer.inputs + i) * kNetworkPitch];
        const Met met = meet(layer, shared, i, x);
        const Cubic* edges = at_offset<Cubic>(shared, plan.edges) + met.row * plan.edge_pitch;
        const float* base = at_offset<float>(shared, plan.base) + i * plan.base_pitch;
        Cubic sum{};
        float weight = 0;
        for (int o = 0; o < outputs; ++o) {
          const float pulled = g[o * kNetworkPitch + thread];
          sum += edges[o] * pulled;
          if (has_base) weight += base[o] * pulled;
        }
        float value = sum.slope_at(met.at.u) * met.inverse;
        if (has_base) value += activate(a.slope, x) * weight;
        dx[i * kNetworkPitch + thread] = exists ? value : 0.0f;
        if (!a.need_weights) continue;
        const Cubic* window = at_offset<Cubic>(shared, plan.cubics) + met.row * kWindowPitch;
        KAN_UNROLL_WINDOW
        for (int q = 0; q <= kMaxCubicOrder; ++q) windows[q * kNetworkPitch] = exists ? window[q].at(met.at.u) : 0.0f;
        windows[(kMaxCubicOrder + 1) * kNetworkPitch] = exists && has_base ? activate(a.value, x) : 0.0f;
        reinterpret_cast<int*>(windows)[(kMaxCubicOrder + 2) * kNetworkPitch] = at_offset<int>(shared, plan.firsts)[met.row];
        barrier();  // all windows of this input are there
        add_sums(a, layer, shared, i, g);
        barrier();  // nobody reads them any more
      }
      float* swap = g;
      g = dx;
      dx = swap;
    }
    if (exists && first.dx != nullptr) put_row(g + thread, row, int(first.in_features), first.dx);
  }
  if (!a.need_weights) return;
  for (int m = thread; m < a.all_sums; m += kNetworkThreads) parts[int64_t(m) * gridDim.x + blockIdx.x] = sums[m];
}

// The weights' gradients from parts (all_sums, blocks), a warp to each number.
__global__ void __launch_bounds__(128) add_parts_of_network(const __grid_constant__ NetworkArguments a, const float* parts) {
  const int64_t m = int64_t(blockIdx.x) * 4 + threadIdx.x / 32;
  if (m >= a.all_sums) return;
  float total = 0;
  for (int64_t b = threadIdx.x % 32; b < a.blocks; b += 32) total += parts[m * a.blocks + b];
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  if (threadIdx.x % 32 != 0) return;
  int l = 0;
  while (l + 1 < a.depth && m >= a.layers[l + 1].sums) ++l;
  const NetworkLayerPlan& layer = a.layers[l];
  const int cell = int(m) - layer.sums, outputs = int(layer.p.out_features), branches = layer.p.bases() + 1;
  const int o = cell % outputs, f = cell / outputs % branches, i = cell / outputs / branches;
  if (i >= layer.p.in_features) {
    if (layer.d_bias != nullptr) layer.d_bias[o] = total;
  } else if (f < layer.p.bases()) {
    static_cast<float*>(layer.p.d_spline)[(i * layer.p.bases() + f) * outputs + o] = total;
  } else if (layer.p.d_base != nullptr) {
    static_cast<float*>(layer.p.d_base)[i * outputs + o] = total;
  }
}

}  // namespace

int launch_output(const NetworkArguments& a, void* stream) {
  return launch(network_output, Blocks{a.blocks}, kNetworkThreads, size_t(a.shared), stream, a);
}

int launch_backward(const NetworkArguments& a, float* parts, void* stream) {
  if (int error = launch(network_backward, Blocks{a.blocks}, kNetworkThreads, size_t(a.shared), stream, a, parts)) return error;
  if (!a.need_weights) return 0;
  return launch(add_parts_of_network, Blocks{(int64_t(a.all_sums) + 3) / 4}, 128, 0, stream, a, static_cast<const float*>(parts));
}

}  // namespace kan::cuda
