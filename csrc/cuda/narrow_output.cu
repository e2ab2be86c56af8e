// contract_output of narrow layers: a lane takes kNarrowRows rows and kOut outputs through all inputs.
#include "narrow.cuh"

namespace kan::cuda {

namespace {

template <class C, int kOut> __global__ void __launch_bounds__(kNarrowThreads, narrow_residents(Operation::output, kOut)) output_narrow(KAN_ARGUMENT NarrowArguments<C> a) {
  const Problem& p = a.p;
  const NarrowPlan& plan = a.plan;
  char* shared = shared_memory<char>();
  make_tables(p, plan, a.uniform, shared, true);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, side = 1 << plan.side;
  const int place = lane & (side - 1), column = (lane >> plan.side) * kOut;
  const int inputs = int(p.in_features), outputs = int(p.out_features);
  char* buffers = shared + plan.buffers + warp * (2 * plan.stage + plan.result);
  C* results = at_offset<C>(buffers, 2 * plan.stage);

  for_every_tile(plan, p.batch, buffers, warp, lane, [&](int64_t first, int rows, char* stage, int first_staged) {
    const char *xs[kNarrowRows], *scales[kNarrowRows];
    KAN_UNROLL_ALL
    for (int r = 0; r < kNarrowRows; ++r) {
      const int row = first_staged + r * side + place;
      xs[r] = stage + plan.x.offset + row * plan.x.pitch;
      scales[r] = stage + plan.scale.offset + row * plan.scale.pitch;
    }
    C total[kNarrowRows][kOut] = {};
    Tables<C> tables(plan, shared, column);
    KAN_NO_UNROLL
    for (int i = 0; i < inputs; ++i, tables.advance(plan)) {
      const Place<C> axis = *tables.place;
      KAN_UNROLL_ALL
      for (int r = 0; r < kNarrowRows; ++r) {
        const C x = read<C>(xs[r], i, p.x_dtype);
        const C scale = plan.has_scale ? read<C>(scales[r], i, p.x_dtype) : C(1);
        const Located<C> at = locate(p, plan, axis, tables.starts, x);
        const CubicOf<C>* edge = tables.edges + at.piece * plan.edge_pitch;
        KAN_UNROLL_ALL
        for (int o = 0; o < kOut; ++o) total[r][o] += edge[o].at(at.u) * scale;
        if (plan.has_base) {
          const C activation = (plan.is_silu ? silu<0>(x) : activate(a.activation, x)) * scale;
          KAN_UNROLL_ALL
          for (int o = 0; o < kOut; ++o) total[r][o] += activation * tables.base[o];
        }
      }
    }
    KAN_UNROLL_ALL
    for (int r = 0; r < kNarrowRows; ++r) {
      C* row = results + (r * side + place) * plan.result_pitch + column;
      if (kOut % 4 == 0 && plan.groups * kOut == outputs) {
        KAN_UNROLL_ALL
        for (int o = 0; o + 3 < kOut; o += 4)
          *reinterpret_cast<CubicOf<C>*>(row + o) = {{total[r][o], total[r][o + 1], total[r][o + 2], total[r][o + 3]}};
      } else {
        KAN_UNROLL_ALL
        for (int o = 0; o < kOut; ++o)
          if (column + o < outputs) row[o] = total[r][o];
      }
    }
    warp_barrier();
    write_rows(results, plan.result_pitch, outputs, p.y, p.weight_dtype, first, rows, plan.aligned, lane);
  });
}

template <class C, int kOut> int launch_columns(const NarrowArguments<C>& a, void* stream) {
  return launch(output_narrow<C, kOut>, Blocks{a.plan.blocks}, a.plan.warps * 32, size_t(a.plan.shared), stream, a);
}

}  // namespace

template <> int launch_output_narrow<float>(const NarrowArguments<float>& a, void* stream) {
#define KAN_CALL(n) launch_columns<float, n>(a, stream)
  KAN_BY_COLUMNS(a.plan.lane_columns, KAN_CALL)
#undef KAN_CALL
}

}  // namespace kan::cuda
