// contract_input of narrow layers: a lane takes kNarrowRows rows and kOut outputs of all inputs. The edges' cubics are weighed
// by g and added up first, so that one is left to evaluate for an item.
#include "narrow.cuh"

namespace kan::cuda {

namespace {

template <class C, int kOut> __global__ void __launch_bounds__(kNarrowThreads, narrow_residents(Operation::input, kOut)) input_narrow(KAN_ARGUMENT NarrowArguments<C> a) {
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
    const char* xs[kNarrowRows];
    C pulled[kNarrowRows][kOut];
    KAN_UNROLL_ALL
    for (int r = 0; r < kNarrowRows; ++r) {
      const int row = first_staged + r * side + place;
      xs[r] = stage + plan.x.offset + row * plan.x.pitch;
      KAN_UNROLL_ALL
      for (int o = 0; o < kOut; ++o)
        pulled[r][o] = column + o < outputs ? read<C>(stage + plan.g.offset + row * plan.g.pitch, column + o, p.weight_dtype) : C(0);
    }
    Tables<C> tables(plan, shared, column);
    KAN_NO_UNROLL
    for (int i = 0; i < inputs; ++i, tables.advance(plan)) {
      const Place<C> axis = *tables.place;
      KAN_UNROLL_ALL
      for (int r = 0; r < kNarrowRows; ++r) {
        const C x = read<C>(xs[r], i, p.x_dtype);
        const Located<C> at = locate(p, plan, axis, tables.starts, x);
        const CubicOf<C>* edge = tables.edges + at.piece * plan.edge_pitch;
        CubicOf<C> sum{};
        KAN_UNROLL_ALL
        for (int o = 0; o < kOut; ++o) sum += edge[o] * pulled[r][o];
        C value = sum.at(at.u);
        if (plan.has_base) {
          C weight = 0;
          KAN_UNROLL_ALL
          for (int o = 0; o < kOut; ++o) weight += tables.base[o] * pulled[r][o];
          value += (plan.is_silu ? silu<1>(x) : activate(a.activation, x)) * weight;
        }
        for (int mask = side; mask < 32; mask *= 2) value += shuffle_xor(value, mask);
        if (column == 0) results[(r * side + place) * plan.result_pitch + i] = value;
      }
    }
    warp_barrier();
    write_rows(results, plan.result_pitch, inputs, p.dx, p.x_dtype, first, rows, plan.aligned, lane);
  });
}

template <class C, int kOut> int launch_columns(const NarrowArguments<C>& a, void* stream) {
  return launch(input_narrow<C, kOut>, Blocks{a.plan.blocks}, a.plan.warps * 32, size_t(a.plan.shared), stream, a);
}

}  // namespace

template <> int launch_input_narrow<float>(const NarrowArguments<float>& a, void* stream) {
#define KAN_CALL(n) launch_columns<float, n>(a, stream)
  KAN_BY_COLUMNS(a.plan.lane_columns, KAN_CALL)
#undef KAN_CALL
}

}  // namespace kan::cuda
