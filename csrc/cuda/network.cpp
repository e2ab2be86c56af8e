// Host side of the kernels of whole networks: whether they serve one, and where things lie in shared memory.
#include "network.h"

namespace kan::cuda {

namespace {

int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }

// Tables of one layer, from `offset` on.
NarrowPlan plan_tables(const Problem& p, int64_t& offset) {
  auto reserve = [&](int64_t bytes) {
    const int64_t begin = offset;
    offset = round_up(offset + bytes);
    return int(begin);
  };
  NarrowPlan plan{};
  plan.warps = kNetworkThreads / 32;
  plan.groups = 1;
  plan.lane_columns = int(p.out_features);
  plan.base_pitch = base_of_group(plan.lane_columns);
  plan_pieces(p, plan);
  plan.edge_pitch = plan.lane_columns | 1;
  const int64_t rows = p.in_features * plan.pieces;
  plan.places = reserve(p.in_features * 16);
  plan.starts = reserve(rows * 4);
  plan.inverses = reserve(rows * 4);
  plan.inverses_behind = (plan.inverses - plan.starts) / 4;
  plan.firsts = reserve(rows * 4);
  plan.base = reserve(p.base_weight ? p.in_features * plan.base_pitch * 4 : 0);
  plan.edges = reserve(rows * plan.edge_pitch * int64_t(sizeof(Cubic)));
  plan.cubics = reserve(rows * kWindowPitch * int64_t(sizeof(Cubic)));
  plan.described = reserve(p.in_features * int64_t(sizeof(Described<float>)));
  return plan;
}

NetworkArguments make_network(const Network& network, const Device& device, bool backward) {
  const Problem &first = network.layers[0].problem, &last = network.layers[network.depth - 1].problem;
  NetworkArguments a{};
  a.depth = network.depth;
  a.value = make_activation<float>(first.activation, 0);
  a.slope = make_activation<float>(first.activation, 1);
  a.need_weights = first.d_spline != nullptr;
  make_uniform_cubics(first, a.uniform);
  int64_t offset = 0;
  int column = 0;
  for (int l = 0; l < network.depth; ++l) {
    const NetworkLayer& layer = network.layers[l];
    const Problem& p = layer.problem;
    const int in = int(p.in_features), out = int(p.out_features);
    a.layers[l] = {p, plan_tables(p, offset), static_cast<const float*>(layer.bias), static_cast<float*>(layer.d_bias), column,
                   a.all_sums};
    column += in;
    a.all_sums += in * (p.bases() + 1) * out + out;
    a.widest = a.widest > in ? a.widest : in;
    a.widest = a.widest > out ? a.widest : out;
  }
  // Numbers that tables are made from: one layer's after another's.
  int64_t raw = 0;
  for (int l = 0; l < network.depth; ++l) {
    const Problem& p = network.layers[l].problem;
    const int64_t bytes = p.in_features * (p.knots() + (p.bases() + 1) * p.out_features) * 4;
    a.layers[l].tables.knots = int(offset);
    raw = raw > bytes ? raw : bytes;
  }
  offset = round_up(offset + raw);
  auto columns = [&](int64_t number) {
    const int64_t begin = offset;
    offset = round_up(offset + number * kNetworkPitch * 4);
    return int(begin);
  };
  a.columns = columns(column + last.out_features);
  if (backward) {
    a.gradients = columns(2 * a.widest);
    a.windows = columns(kMaxCubicOrder + 3);
    a.sums = int(offset);
    offset = round_up(offset + int64_t(a.all_sums) * 4);
  }
  a.shared = offset;
  a.tiles = (first.batch + kNetworkThreads - 1) / kNetworkThreads;
  // As many blocks as are at work at once, 512 threads of a multiprocessor: the tables of a block cost as much as some tiles.
  int64_t resident = (device.shared_memory + 1024) / (a.shared + 1024);
  resident = resident < 1 ? 1 : resident > 4 ? 4 : resident;
  const int64_t together = resident * device.multiprocessors;
  a.blocks = a.tiles < together ? a.tiles : together;
  if (backward && a.blocks < 1) a.blocks = 1;  // an empty batch has gradients too: zeros
  return a;
}

}  // namespace

const char* why_not_network(const Network& network, const Device& device) {
  if (network.depth > kNetworkDepth) return "so many layers";
  for (int l = 0; l < network.depth; ++l) {
    const Problem& p = network.layers[l].problem;
    if (p.weight_dtype != kFloat32 || p.x_dtype != kFloat32) return "other dtypes than float32";
    if (p.spline_order > kMaxCubicOrder) return "spline orders above 3";
    if (p.spline_order != network.layers[0].problem.spline_order) return "layers of different spline orders";
    if (p.in_features < 1 || p.out_features < 1 || p.in_features > kMaxWidth || p.out_features > kMaxWidth) return "such widths";
    if (p.grid_size > 1 << 12) return "so many knots";  // no offset exceeds an int
  }
  return make_network(network, device, true).shared > device.shared_memory ? "tables beyond the shared memory" : nullptr;
}

size_t workspace_of_network_output(const Network&, const Device&) { return 0; }
size_t workspace_of_network_backward(const Network& network, const Device& device) {
  const NetworkArguments a = make_network(network, device, true);
  return a.need_weights ? size_t(a.all_sums) * size_t(a.blocks) * 4 : 0;
}

int launch_network_output(const Network& network, const Device& device, void*, void* stream) {
  const NetworkArguments a = make_network(network, device, false);
  return a.blocks == 0 ? 0 : launch_output(a, stream);
}

int launch_network_backward(const Network& network, const Device& device, void* workspace, void* stream) {
  return launch_backward(make_network(network, device, true), static_cast<float*>(workspace), stream);
}

}  // namespace kan::cuda
