// contract_weight of narrow layers. A job is one input and kOut outputs. The warps of a team share the jobs of a tile of rows,
// a lane's rows of it being its own: it adds to sums of its own in shared memory, (basis, output, lane) so that lanes meet no
// bank twice, and nothing is atomic. A block leaves its sums, lanes added in a fixed order; a second kernel adds up the blocks.
#include "narrow.cuh"

namespace kan::cuda {

namespace {

template <class C, int kOut> __global__ void __launch_bounds__(kNarrowThreads, 3) weight_narrow(KAN_ARGUMENT NarrowArguments<C> a, C* parts) {
  const Problem& p = a.p;
  const NarrowPlan& plan = a.plan;
  char* shared = shared_memory<char>();
  make_tables(a, shared, false);
  const int thread = threadIdx.x, threads = plan.warps * 32, lane = thread % 32, warp = thread / 32;
  const int team = warp / plan.team, member = warp % plan.team;
  const int inputs = int(p.in_features), outputs = int(p.out_features), pieces = plan.pieces, bases = p.bases();
  const int all_jobs = inputs * plan.groups, cells = (bases + 1) * kOut;
  char* stages = shared + plan.buffers;
  C* bins = at_offset<C>(shared, plan.bins);  // (team, job, basis or base branch, output of the job, lane)
  const int tile_rows = plan.tile_rows, lane_rows = tile_rows / plan.teams / 32;
  auto fetch = [&](int64_t tile, char* stage) {
    if (tile < plan.tiles) {
      const int64_t first = tile * tile_rows;
      const int rows = p.batch - first < tile_rows ? int(p.batch - first) : tile_rows;
      stage_rows(plan.x, first, rows, stage, thread, threads);
      stage_rows(plan.scale, first, rows, stage, thread, threads);
      stage_rows(plan.g, first, rows, stage, thread, threads);
    }
    commit_copies();
  };

  for (int share = blockIdx.y; share < plan.shares; share += gridDim.y) {
    const int first_job = share * plan.share, jobs = all_jobs - first_job < plan.share ? all_jobs - first_job : plan.share;
    for (int m = thread; m < plan.teams * jobs * cells * 32; m += threads) bins[m] = 0;
    int turn = 0;
    fetch(blockIdx.x, stages);
    for (int64_t tile = blockIdx.x; tile < plan.tiles; tile += gridDim.x, turn ^= 1) {
      wait_for_copies<0>();
      barrier();  // the tile is there, and nobody reads the one before
      fetch(tile + gridDim.x, stages + (turn ^ 1) * plan.stage);
      const char* stage = stages + turn * plan.stage;
      const int first = team * lane_rows * 32 + lane;
      const int64_t left = p.batch - tile * tile_rows - first;
      for (int job = member; job < jobs; job += plan.team) {
        const int i = (first_job + job) / plan.groups, column = (first_job + job) % plan.groups * kOut;
        const Place<C> place = at_offset<Place<C>>(shared, plan.places)[i];
        const C* starts = at_offset<C>(shared, plan.starts) + i * pieces;
        const int* firsts = at_offset<int>(shared, plan.firsts) + i * pieces;
        const CubicOf<C>* cubics = at_offset<CubicOf<C>>(shared, plan.cubics) + i * pieces * (kMaxCubicOrder + 1);
        C* mine = bins + (team * jobs + job) * cells * 32 + lane;
        C base[kOut] = {};
        for (int r = 0; r < lane_rows; ++r) {
          if (r * 32 >= left) break;
          const int row = first + r * 32;
          const C x = read<C>(stage + plan.x.offset + row * plan.x.pitch, i, p.x_dtype);
          const C scale = plan.has_scale ? read<C>(stage + plan.scale.offset + row * plan.scale.pitch, i, p.x_dtype) : C(1);
          C g[kOut];
          KAN_UNROLL_ALL
          for (int o = 0; o < kOut; ++o)
            g[o] = column + o < outputs ? read<C>(stage + plan.g.offset + row * plan.g.pitch, column + o, p.weight_dtype) * scale : C(0);
          const Located<C> at = locate(p, plan, place, starts, x);
          const int from = firsts[at.piece];
          KAN_UNROLL_ALL
          for (int q = 0; q <= kMaxCubicOrder; ++q) {
            const int f = from + q;
            if (q > p.spline_order || f < 0 || f >= bases) continue;
            const C w = cubics[at.piece * (kMaxCubicOrder + 1) + q].at(at.u);
            KAN_UNROLL_ALL
            for (int o = 0; o < kOut; ++o) mine[(f * kOut + o) * 32] += w * g[o];
          }
          if (plan.has_base) {
            const C activation = plan.is_silu ? silu<0>(x) : activate(a.activation, x);
            KAN_UNROLL_ALL
            for (int o = 0; o < kOut; ++o) base[o] += activation * g[o];
          }
        }
        KAN_UNROLL_ALL
        for (int o = 0; o < kOut; ++o) mine[(bases * kOut + o) * 32] += base[o];
      }
    }
    wait_for_copies<0>();
    barrier();

    // A thread to each cell; it begins with the lane of its number, so that threads meet different banks.
    for (int m = thread; m < jobs * cells; m += threads) {
      const int job = first_job + m / cells, cell = m % cells, f = cell / kOut, o = job % plan.groups * kOut + cell % kOut;
      if (o >= outputs) continue;
      C total = 0;
      for (int t = 0; t < plan.teams; ++t)
        for (int l = 0; l < 32; ++l) total += bins[(t * jobs * cells + m) * 32 + ((l + thread) & 31)];
      parts[((int64_t(job / plan.groups) * (bases + 1) + f) * outputs + o) * gridDim.x + blockIdx.x] = total;
    }
    barrier();
  }
}

// d_spline and d_base from parts (in, bases + 1, out, blocks), a warp to each number.
template <class C> __global__ void add_parts(Problem p, const C* parts, int64_t blocks) {
  const int64_t m = int64_t(blockIdx.x) * 4 + threadIdx.x / 32, outputs = p.out_features, branches = p.bases() + 1;
  const int64_t i = m / outputs / branches, f = m / outputs % branches, o = m % outputs;
  if (i >= p.in_features) return;
  C total = 0;
  for (int64_t b = threadIdx.x % 32; b < blocks; b += 32) total += parts[m * blocks + b];
  for (int mask = 16; mask > 0; mask /= 2) total += shuffle_xor(total, mask);
  if (threadIdx.x % 32 != 0) return;
  if (f < p.bases()) write<C>(p.d_spline, (i * p.bases() + f) * outputs + o, p.weight_dtype, total);
  else if (p.d_base != nullptr) write<C>(p.d_base, i * outputs + o, p.weight_dtype, total);
}

template <class C, int kOut> int launch_columns(const NarrowArguments<C>& a, C* parts, void* stream) {
  return launch(weight_narrow<C, kOut>, Blocks{a.plan.blocks, a.plan.shares}, a.plan.warps * 32, size_t(a.plan.shared), stream, a, parts);
}

template <class C> int launch_sums(const NarrowArguments<C>& a, C* parts, void* stream) {
#define KAN_CALL(n) launch_columns<C, n>(a, parts, stream)
  KAN_BY_COLUMNS(a.plan.lane_columns, KAN_CALL)
#undef KAN_CALL
}

}  // namespace

template <> int launch_weight_narrow<float>(const NarrowArguments<float>& a, void* parts, void* stream) {
  if (int error = launch_sums(a, static_cast<float*>(parts), stream)) return error;
  const Problem& p = a.p;
  const int64_t numbers = p.in_features * (p.bases() + 1) * p.out_features;
  return launch(add_parts<float>, Blocks{(numbers + 3) / 4}, 128, 0, stream, p, static_cast<const float*>(parts), a.plan.blocks);
}

}  // namespace kan::cuda
