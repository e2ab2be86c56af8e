// Host side of the kernels of narrow layers: whether they serve a problem, and where things lie in shared memory.
#include "narrow.h"

#include <math.h>

namespace kan::cuda {

namespace {

// Bytes of shared memory that leave room for some blocks more.
constexpr int64_t kRoomy = 56 * 1024;
// Bytes of a warp's tile at the most where it takes more than one turn of its lanes.
constexpr int64_t kTile = 2560;

int64_t round_up(int64_t bytes) { return (bytes + 15) / 16 * 16; }
int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
int size_of(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
bool is_aligned(const void* data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// 16 bytes beyond a multiple of 32, so that lanes in a column of a tile meet few banks twice.
int64_t pitch_of(int64_t bytes) { return bytes % 32 == 0 ? bytes + 16 : bytes; }

// 2^32 / n, rounded up.
uint32_t per(int n) { return uint32_t(((uint64_t(1) << 32) - 1) / uint64_t(n) + 1); }

Staged staged(const void* data, int64_t columns, int dtype, int64_t rows, int64_t& offset) {
  const int row = int(columns * size_of(dtype)), pitch = int(pitch_of(row));
  const Staged m{static_cast<const char*>(data), row, pitch, int(offset), per(row), is_aligned(data)};
  if (data != nullptr) offset = round_up(offset + rows * m.pitch);
  return m;
}

// Bytes of the operands' tiles.
int64_t stage_of(const Problem& p, Operation operation, int64_t rows, NarrowPlan& plan) {
  int64_t bytes = 0;
  plan.x = staged(p.x, p.in_features, p.x_dtype, rows, bytes);
  plan.scale = staged(p.scale, p.in_features, p.x_dtype, rows, bytes);
  plan.g = staged(operation == Operation::output ? nullptr : p.g, p.out_features, p.weight_dtype, rows, bytes);
  return bytes;
}

// A warp walks by itself, over tiles of its own: as large as kTile lets them be, and of a size that gives every warp as many.
void plan_walk(const Problem& p, const Device& device, Operation operation, int64_t number, NarrowPlan& plan) {
  const int64_t results = operation == Operation::output ? p.out_features : p.in_features, rows = int64_t(kNarrowRows) << plan.side;
  plan.result_pitch = int(pitch_of(results * number) / number);
  plan.per_result = per(int(results));
  plan.result = int(round_up(rows * plan.result_pitch * number));
  const int64_t residents = narrow_residents(operation, plan.lane_columns), warps = residents * kNarrowWarps * device.multiprocessors;
  const int64_t room = (at_most(kRoomy, device.shared_memory / residents - 1024) - plan.buffers) / kNarrowWarps - plan.result;
  const int64_t turns = (p.batch + rows * warps - 1) / (rows * warps);
  const int64_t most = at_most(kTile, room / 2) / stage_of(p, operation, rows, plan);
  const int64_t tiles = most > 1 ? (turns + most - 1) / most : turns;
  plan.tile_rows = int((turns + tiles - 1) / tiles * rows);
  plan.stage = int(stage_of(p, operation, plan.tile_rows, plan));
  plan.aligned = is_aligned(operation == Operation::output ? p.y : p.dx);
  plan.tiles = (p.batch + plan.tile_rows - 1) / plan.tile_rows;
  plan.last_rows = int(p.batch - (plan.tiles - 1) * plan.tile_rows);
  plan.warps = kNarrowWarps;
  auto shared = [&] { return plan.buffers + int64_t(plan.warps) * (2 * plan.stage + plan.result); };
  // Half the warps where a block would leave too little to others.
  while (plan.warps > 1 && shared() > kRoomy) plan.warps /= 2;
  plan.shared = shared();
  plan.blocks = (plan.tiles + plan.warps - 1) / plan.warps;
}

// The warps of a block share tiles.
void plan_teams(const Problem& p, int64_t number, NarrowPlan& plan) {
  const int64_t jobs = p.in_features * plan.groups, sums = (p.bases() + 1) * plan.lane_columns * 32 * number;  // of a job
  int lane_rows = 4;
  auto shared = [&] {
    plan.tile_rows = plan.teams * lane_rows * 32;
    plan.stage = int(stage_of(p, Operation::weight, plan.tile_rows, plan));
    plan.bins = int(plan.buffers + 2 * int64_t(plan.stage));
    return plan.bins + plan.teams * plan.share * sums;
  };
  plan.teams = plan.share = 1;
  while (lane_rows > 1 && shared() > kRoomy) lane_rows /= 2;
  const int64_t room = (kRoomy - (shared() - sums)) / sums, most = at_most(jobs, room > 1 ? room : 1);
  plan.shares = int((jobs + most - 1) / most);
  plan.share = int((jobs + plan.shares - 1) / plan.shares);
  plan.shares = int((jobs + plan.share - 1) / plan.share);
  const int turns = (plan.share + kNarrowWarps - 1) / kNarrowWarps;
  plan.team = (plan.share + turns - 1) / turns;
  plan.teams = kNarrowWarps / plan.team;
  while (plan.teams > 1 && shared() > kRoomy) --plan.teams;
  plan.shared = shared();
  plan.warps = plan.team * plan.teams;
  plan.tiles = plan.blocks = (p.batch + plan.tile_rows - 1) / plan.tile_rows;
}

}  // namespace

void plan_pieces(const Problem& p, NarrowPlan& plan) {
  plan.pieces = (p.outside == kZero ? p.knots() - 1 : p.grid_size) + 2;
  plan.above = float(plan.pieces - 1);
  plan.reach = p.outside == kLinear ? INFINITY : 1e30f;
}

NarrowPlan plan_narrow(const Problem& p, const Device& device, Operation operation) {
  NarrowPlan plan{};
  const bool is_double = p.weight_dtype == kFloat64, is_weight = operation == Operation::weight;
  const int64_t number = is_double ? 8 : 4, inputs = p.in_features, outputs = p.out_features;
  plan.groups = outputs <= kNarrowColumns ? 1 : outputs <= 2 * kNarrowColumns ? 2 : 4;
  plan.lane_columns = int((outputs + plan.groups - 1) / plan.groups);
  if (plan.lane_columns == 7) plan.lane_columns = 8;
  plan.group_bits = plan.groups / 2;  // of 1, 2, 4
  plan.side = 5 - plan.group_bits;
  const int columns = plan.groups * plan.lane_columns;
  plan_pieces(p, plan);
  plan.edge_pitch = columns | 1;  // 16 bytes each: pieces in different banks
  plan.base_pitch = plan.groups * base_of_group(plan.lane_columns);

  plan.has_scale = p.scale != nullptr;
  plan.has_base = is_weight ? p.activation != kNone : p.base_weight != nullptr;
  plan.is_silu = p.activation == kSilu && p.n == (operation == Operation::input ? 1 : 0);
  plan.is_plain = !plan.has_scale && (plan.is_silu || !plan.has_base);

  int64_t offset = 0;
  auto reserve = [&](int64_t bytes) {
    const int64_t begin = offset;
    offset = round_up(offset + bytes);
    return int(begin);
  };
  const int64_t rows = inputs * plan.pieces;
  plan.places = reserve(inputs * (is_double ? 32 : 16));
  plan.starts = reserve(rows * number);
  plan.inverses = reserve(rows * number);
  plan.inverses_behind = int((plan.inverses - plan.starts) / number);
  plan.base = reserve(p.base_weight ? inputs * plan.base_pitch * number : 0);
  plan.edges = reserve(is_weight ? 0 : rows * plan.edge_pitch * 4 * number);
  auto reserve_scratch = [&] {
    plan.knots = reserve(inputs * (p.knots() + (is_weight ? 0 : (p.bases() + 1) * outputs)) * number);
    plan.described = reserve(inputs * int64_t(is_double ? sizeof(Described<double>) : sizeof(Described<float>)));
  };
  auto reserve_windows = [&] {
    plan.cubics = reserve(rows * kWindowPitch * 4 * number);
    plan.firsts = reserve(rows * 4);
  };
  // What only makes other tables lies where tiles will, if possible behind the first ones.
  if (is_weight) {
    reserve_windows();
    plan.buffers = int(offset);
    reserve_scratch();
    plan_teams(p, number, plan);
  } else {
    plan.buffers = int(offset);
    plan_walk(p, device, operation, number, plan);
    auto reserve_behind = [&](int64_t bytes) {
      offset = plan.buffers + bytes;
      reserve_windows();
      reserve_scratch();
      return offset <= plan.shared;
    };
    plan.fetches_early = reserve_behind(int64_t(plan.warps) * plan.stage);
    if (!plan.fetches_early) reserve_behind(0);
  }
  if (plan.shared < offset) plan.shared = offset;

  // As many blocks as are at work at once.
  const int64_t threads = int64_t(narrow_residents(operation, plan.lane_columns)) * kNarrowThreads;
  const int64_t resident = at_most((device.shared_memory + 1024) / (plan.shared + 1024), threads / (plan.warps * 32));
  const int64_t together = (resident > 0 ? resident : 1) * device.multiprocessors, shares = is_weight ? plan.shares : 1;
  plan.blocks = at_most(plan.blocks, (together + shares - 1) / shares);
  return plan;
}

const char* why_not_narrow(const Problem& p, const Device& device, Operation operation) {
  if (p.weight_dtype == kFloat64) return "float64";
  if (p.spline_order > kMaxCubicOrder) return "spline orders above 3";
  if (p.batch == 0 || p.in_features == 0 || p.out_features == 0) return "empty tensors";
  if (p.out_features > 4 * kNarrowColumns) return "more than 32 outputs";
  if (p.batch >> 34 > 0) return "so many rows";  // an int counts their tiles
  constexpr int64_t kMany = int64_t(1) << 16;  // no offset of theirs exceeds an int
  if (p.in_features > kMany || p.in_features * p.knots() > kMany || plan_narrow(p, device, operation).shared > device.shared_memory)
    return "tables beyond the shared memory";
  return nullptr;
}

template <class C> NarrowArguments<C> make_narrow(const Problem& p, const NarrowPlan& plan) {
  NarrowArguments<C> a{p, make_activation<C>(p.activation, p.n), {}, plan};
  make_uniform_cubics(p, a.uniform);
  return a;
}
template NarrowArguments<float> make_narrow<float>(const Problem&, const NarrowPlan&);

}  // namespace kan::cuda
