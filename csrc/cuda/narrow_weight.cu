// contract_weight of narrow layers. A job is one input and kOut outputs. The warps of a team share the jobs of a tile of rows,
// a lane's rows of it being its own: it adds to sums of its own in shared memory, (basis, output, lane) so that lanes meet no
// bank twice, and nothing is atomic. A block leaves its sums, lanes added in a fixed order; a second kernel adds up the blocks.
#include "narrow.cuh"

namespace kan::cuda {

namespace {

template <class C, int kOut> __global__ void __launch_bounds__(kNarrowThreads, narrow_residents(Operation::weight, kOut)) weight_narrow(KAN_ARGUMENT NarrowArguments<C> a, C* parts) {
  const Problem& p = a.p;
  const NarrowPlan& plan = a.plan;
  char* shared = shared_memory<char>();
  make_tables(p, plan, a.uniform, shared, false);
  const int thread = threadIdx.x, threads = plan.warps * 32, lane = thread % 32, warp = thread / 32;
  const int team = warp / plan.team, member = warp % plan.team;
  const int inputs = int(p.in_features), outputs = int(p.out_features), pieces = plan.pieces, bases = p.bases();
  const int all_jobs = inputs * plan.groups, cells = (bases + 1) * kOut;
  char* stages = shared + plan.buffers;
  C* bins = at_offset<C>(shared, plan.bins);  // (team, job, basis or base branch, output of the job, lane)
  auto rows_from = [&](int64_t row) { return p.batch - row < plan.tile_rows ? int(p.batch - row) : plan.tile_rows; };
  auto fetch = [&](int64_t row, char* stage) {
    if (row < p.batch) {
      stage_rows(plan.x, plan.x.data + row * plan.x.row, rows_from(row), stage, thread, threads);
      if (plan.has_scale) stage_rows(plan.scale, plan.scale.data + row * plan.scale.row, rows_from(row), stage, thread, threads);
      stage_rows(plan.g, plan.g.data + row * plan.g.row, rows_from(row), stage, thread, threads);
    }
    commit_copies();
  };
  const int64_t step = int64_t(gridDim.x) * plan.tile_rows;
  const int team_rows = plan.tile_rows / plan.teams, first_window = (p.outside == kZero ? 0 : p.spline_order) - p.spline_order - 1;

  for (int share = blockIdx.y; share < plan.shares; share += gridDim.y) {
    const int first_job = share * plan.share, jobs = all_jobs - first_job < plan.share ? all_jobs - first_job : plan.share;
    for (int m = thread; m < plan.teams * jobs * cells * 32; m += threads) bins[m] = 0;
    int turn = 0;
    int64_t first = int64_t(blockIdx.x) * plan.tile_rows;
    fetch(first, stages);
    for (; first < p.batch; first += step, turn = plan.stage - turn) {
      wait_for_copies<0>();
      barrier();  // the tile is there, and nobody reads the one before
      fetch(first + step, stages + plan.stage - turn);
      const char* stage = stages + turn;
      const int rows = rows_from(first), end = rows < (team + 1) * team_rows ? rows : (team + 1) * team_rows;
      for (int job = member; job < jobs; job += plan.team) {
        const int i = (first_job + job) >> plan.group_bits, column = ((first_job + job) & (plan.groups - 1)) * kOut;
        const Place<C> axis = at_offset<Place<C>>(shared, plan.places)[i];
        const C* starts = at_offset<C>(shared, plan.starts) + i * pieces;
        const int* firsts = at_offset<int>(shared, plan.firsts) + i * pieces;
        const CubicOf<C>* windows = at_offset<CubicOf<C>>(shared, plan.cubics) + i * pieces * kWindowPitch;
        C* mine = bins + (team * jobs + job) * cells * 32 + lane;
        C base[kOut] = {};
        KAN_NO_UNROLL
        for (int row = team * team_rows + lane; row < end; row += 32) {
          const C x = read<C>(stage + plan.x.offset + row * plan.x.pitch, i, p.x_dtype);
          const C scale = plan.has_scale ? read<C>(stage + plan.scale.offset + row * plan.scale.pitch, i, p.x_dtype) : C(1);
          C g[kOut];
          KAN_UNROLL_ALL
          for (int o = 0; o < kOut; ++o)
            g[o] = column + o < outputs ? read<C>(stage + plan.g.offset + row * plan.g.pitch, column + o, p.weight_dtype) * scale : C(0);
          const Located<C> at = locate_one(p, plan, axis, starts, x);
          // Within even knots windows are alike: their cubics come with the kernel's arguments and not from 80 bytes of a table.
          const bool inner = at.piece > 0 && at.piece < pieces - 1;
          const int from = inner ? at.piece + first_window : firsts[at.piece];
          C w[kMaxCubicOrder + 1];
          if (inner && axis.slope > 0) {
            C factor = 1;
            for (int n = 0; n < p.n; ++n) factor *= axis.slope;
            KAN_UNROLL_ALL
            for (int q = 0; q <= kMaxCubicOrder; ++q) w[q] = a.uniform[q].at(at.u) * factor;
          } else {
            KAN_UNROLL_ALL
            for (int q = 0; q <= kMaxCubicOrder; ++q) w[q] = windows[at.piece * kWindowPitch + q].at(at.u);
          }
          bool exists[kMaxCubicOrder + 1];
          KAN_UNROLL_ALL
          for (int q = 0; q <= kMaxCubicOrder; ++q) exists[q] = q <= p.spline_order && unsigned(from + q) < unsigned(bases);
          // Four sums are read before they are written: they are different ones, which a compiler cannot see.
          C* target = mine + from * kOut * 32;
          KAN_UNROLL_ALL
          for (int o = 0; o < kOut; ++o) {
            C sums[kMaxCubicOrder + 1];
            KAN_UNROLL_ALL
            for (int q = 0; q <= kMaxCubicOrder; ++q)
              if (exists[q]) sums[q] = target[(q * kOut + o) * 32];
            KAN_UNROLL_ALL
            for (int q = 0; q <= kMaxCubicOrder; ++q)
              if (exists[q]) target[(q * kOut + o) * 32] = sums[q] + w[q] * g[o];
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
      const int job = first_job + m / cells, cell = m % cells, f = cell / kOut, o = (job & (plan.groups - 1)) * kOut + cell % kOut;
      if (o >= outputs) continue;
      C total = 0;
      for (int t = 0; t < plan.teams; ++t)
        for (int l = 0; l < 32; ++l) total += bins[(t * jobs * cells + m) * 32 + ((l + thread) & 31)];
      parts[((int64_t(job >> plan.group_bits) * (bases + 1) + f) * outputs + o) * gridDim.x + blockIdx.x] = total;
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
