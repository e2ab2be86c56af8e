// contract_output of narrow layers: a lane takes kNarrowRows rows and kOut outputs through all inputs.
#include "narrow.cuh"

namespace kan::cuda {

namespace {

// Adds what all inputs give to kNarrowRows rows and kOut outputs. x, scale: a lane's first row; its next ones lie *_step bytes
// further. kPlain: x is of type X, there is no scale, and the base activation, if there is one, is silu.
template <bool kPlain, class X, class C, int kOut>
KAN_DEVICE void add_inputs(const NarrowArguments<C>& a, Tables<C> tables, const char* x, int x_step, const char* scale, int scale_step,
                           C (&total)[kNarrowRows][kOut]) {
  const Problem& p = a.p;
  const NarrowPlan& plan = a.plan;
  KAN_NO_UNROLL
  for (int i = 0; i < int(p.in_features); ++i, tables.advance(plan)) {
    C here[kNarrowRows], factor[kNarrowRows];
    KAN_UNROLL_ALL
    for (int r = 0; r < kNarrowRows; ++r) {
      here[r] = kPlain ? C(number(reinterpret_cast<const X*>(x + r * x_step)[i])) : read<C>(x + r * x_step, i, p.x_dtype);
      factor[r] = !kPlain && plan.has_scale ? read<C>(scale + r * scale_step, i, p.x_dtype) : C(1);
    }
    Located<C> at[kNarrowRows];
    locate(p, plan, *tables.place, tables.starts, here, at);
    KAN_UNROLL_ALL
    for (int r = 0; r < kNarrowRows; ++r) {
      const CubicOf<C>* edge = tables.edges + at[r].piece * plan.edge_pitch;
      KAN_UNROLL_ALL
      for (int o = 0; o < kOut; ++o) total[r][o] += kPlain ? edge[o].at(at[r].u) : edge[o].at(at[r].u) * factor[r];
    }
    if (!plan.has_base) continue;
    C base[kOut];
    load_numbers(tables.base, base);
    if (kPlain) {
      KAN_UNROLL_ALL
      for (int r = 0; r < kNarrowRows; ++r) here[r] = silu<0>(here[r]);
    } else {
      activate_all(a.activation, here);
    }
    KAN_UNROLL_ALL
    for (int r = 0; r < kNarrowRows; ++r) {
      const C activation = here[r] * factor[r];
      KAN_UNROLL_ALL
      for (int o = 0; o < kOut; ++o) total[r][o] += activation * base[o];
    }
  }
}

template <class C, int kOut> __global__ void __launch_bounds__(kNarrowThreads, narrow_residents(Operation::output, kOut)) output_narrow(KAN_ARGUMENT NarrowArguments<C> a) {
  const Problem& p = a.p;
  const NarrowPlan& plan = a.plan;
  char* shared = shared_memory<char>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, side = 1 << plan.side;
  const int place = lane & (side - 1), group = lane >> plan.side, column = group * kOut, outputs = int(p.out_features);
  const bool full = plan.groups * kOut == outputs;
  const Buffers<C> buffers(plan, shared, warp);
  const Tables<C> tables(plan, shared, group);

  auto fetch = [&](int tile, int rows, char* stage) {
    stage_rows(plan.x, plan.x.of_tile(tile, plan.tile_rows), rows, stage, lane, 32);
    if (plan.has_scale) stage_rows(plan.scale, plan.scale.of_tile(tile, plan.tile_rows), rows, stage, lane, 32);
  };
  auto prepare = [&] { make_tables(p, plan, a.uniform, shared, true); };
  for_every_tile(plan, buffers, warp, fetch, prepare, [&](int tile, int first, int rows, char* stage) {
    const int staged = first + place;
    const char* x = stage + plan.x.offset + staged * plan.x.pitch;
    const char* scale = stage + plan.scale.offset + staged * plan.scale.pitch;
    const int x_step = side * plan.x.pitch, scale_step = side * plan.scale.pitch;
    C total[kNarrowRows][kOut] = {};
    if (plan.is_plain) {
      by_dtype<C>(p.x_dtype, [&](auto type) { add_inputs<true, decltype(type)>(a, tables, x, x_step, scale, scale_step, total); });
    } else {
      add_inputs<false, C>(a, tables, x, x_step, scale, scale_step, total);
    }
    KAN_UNROLL_ALL
    for (int r = 0; r < kNarrowRows; ++r) {
      C* row = buffers.results + (r * side + place) * plan.result_pitch + column;
      if (kOut % 4 == 0 && full) {
        KAN_UNROLL_ALL
        for (int o = 0; o + 3 < kOut; o += 4)
          *reinterpret_cast<CubicOf<C>*>(row + o) = {{total[r][o], total[r][o + 1], total[r][o + 2], total[r][o + 3]}};
      } else {
        KAN_UNROLL_ALL
        for (int o = 0; o < kOut; ++o)
          if (full || column + o < outputs) row[o] = total[r][o];
      }
    }
    warp_barrier();
    write_rows(buffers.results, plan, outputs, p.y, p.weight_dtype, int64_t(tile) * (plan.tile_rows * outputs) + first * outputs, rows, lane);
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
