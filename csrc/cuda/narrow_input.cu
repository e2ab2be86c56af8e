// contract_input of narrow layers: a lane takes kNarrowRows rows and kOut outputs of all inputs. The edges' cubics are weighed
// by g and added up first, so that one is left to evaluate for an item.
#include "narrow.cuh"

namespace kan::cuda {

namespace {

// dx of kNarrowRows rows of all inputs from kOut outputs of g. x, results: as in add_inputs() of narrow_output.cu, and the place
// of a lane's first row. kPlain: x is of type X, and the base activation, if there is one, is silu.
template <bool kPlain, class X, class C, int kOut>
KAN_DEVICE void pull_inputs(const NarrowArguments<C>& a, Tables<C> tables, const char* x, int x_step, const C (&pulled)[kNarrowRows][kOut],
                            C* results, int result_step, bool writes) {
  const Problem& p = a.p;
  const NarrowPlan& plan = a.plan;
  KAN_NO_UNROLL
  for (int i = 0; i < int(p.in_features); ++i, tables.advance(plan)) {
    C here[kNarrowRows], value[kNarrowRows];
    KAN_UNROLL_ALL
    for (int r = 0; r < kNarrowRows; ++r)
      here[r] = kPlain ? C(number(reinterpret_cast<const X*>(x + r * x_step)[i])) : read<C>(x + r * x_step, i, p.x_dtype);
    Located<C> at[kNarrowRows];
    locate(p, plan, *tables.place, tables.starts, here, at);
    KAN_UNROLL_ALL
    for (int r = 0; r < kNarrowRows; ++r) {
      const CubicOf<C>* edge = tables.edges + at[r].piece * plan.edge_pitch;
      CubicOf<C> sum{};
      KAN_UNROLL_ALL
      for (int o = 0; o < kOut; ++o) sum += edge[o] * pulled[r][o];
      value[r] = sum.at(at[r].u);
    }
    if (plan.has_base) {
      C base[kOut];
      load_numbers(tables.base, base);
      if (kPlain) {
        KAN_UNROLL_ALL
        for (int r = 0; r < kNarrowRows; ++r) here[r] = silu<1>(here[r]);
      } else {
        activate_all(a.activation, here);
      }
      KAN_UNROLL_ALL
      for (int r = 0; r < kNarrowRows; ++r) {
        C weight = 0;
        KAN_UNROLL_ALL
        for (int o = 0; o < kOut; ++o) weight += base[o] * pulled[r][o];
        value[r] += here[r] * weight;
      }
    }
    KAN_UNROLL_ALL
    for (int r = 0; r < kNarrowRows; ++r) {
      for (int mask = 1 << plan.side; mask < 32; mask *= 2) value[r] += shuffle_xor(value[r], mask);
      if (writes) results[r * result_step + i] = value[r];
    }
  }
}

template <class C, int kOut> __global__ void __launch_bounds__(kNarrowThreads, narrow_residents(Operation::input, kOut)) input_narrow(KAN_ARGUMENT NarrowArguments<C> a) {
  const Problem& p = a.p;
  const NarrowPlan& plan = a.plan;
  char* shared = shared_memory<char>();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, side = 1 << plan.side;
  const int place = lane & (side - 1), group = lane >> plan.side, column = group * kOut;
  const int inputs = int(p.in_features), outputs = int(p.out_features);
  const bool full = plan.groups * kOut == outputs;
  const Buffers<C> buffers(plan, shared, warp);
  const Tables<C> tables(plan, shared, group);

  auto fetch = [&](int tile, int rows, char* stage) {
    stage_rows(plan.x, plan.x.of_tile(tile, plan.tile_rows), rows, stage, lane, 32);
    stage_rows(plan.g, plan.g.of_tile(tile, plan.tile_rows), rows, stage, lane, 32);
  };
  auto prepare = [&] { make_tables(p, plan, a.uniform, shared, true); };
  for_every_tile(plan, buffers, warp, fetch, prepare, [&](int tile, int first, int rows, char* stage) {
    const int staged = first + place;
    C pulled[kNarrowRows][kOut];
    by_dtype<C>(p.weight_dtype, [&](auto type) {
      KAN_UNROLL_ALL
      for (int r = 0; r < kNarrowRows; ++r) {
        const auto* g = reinterpret_cast<const decltype(type)*>(stage + plan.g.offset + (r * side + staged) * plan.g.pitch) + column;
        KAN_UNROLL_ALL
        for (int o = 0; o < kOut; ++o) pulled[r][o] = full || column + o < outputs ? C(number(g[o])) : C(0);
      }
    });
    const char* x = stage + plan.x.offset + staged * plan.x.pitch;
    const int x_step = side * plan.x.pitch, result_step = side * plan.result_pitch;
    C* to = buffers.results + place * plan.result_pitch;
    if (plan.is_plain) {
      by_dtype<C>(p.x_dtype, [&](auto type) {
        pull_inputs<true, decltype(type)>(a, tables, x, x_step, pulled, to, result_step, group == 0);
      });
    } else {
      pull_inputs<false, C>(a, tables, x, x_step, pulled, to, result_step, group == 0);
    }
    warp_barrier();
    write_rows(buffers.results, plan, inputs, p.dx, p.x_dtype, int64_t(tile) * (plan.tile_rows * inputs) + first * inputs, rows, lane);
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
