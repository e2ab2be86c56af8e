// contract_weight of wide float32 layers on Hopper (sm_90a): warpgroup_weight.cuh with operands in halves. A step is 32 rows of the
// batch.
#pragma once
#include "warpgroup_split.cuh"
#include "warpgroup_weight.cuh"

namespace kan::cuda {

// The rows of a slice.
struct Rows {
  int64_t begin, end;
  KAN_DEVICE int steps() const { return int((end - begin + kSplitDepth - 1) / kSplitDepth); }
};

// A maker's thread has four inputs of one row, half a line of a panel (or 32 inputs of the base branch): its lane says which row.
template <bool kQuick, bool kBase>
KAN_DEVICE void make_split_lines(const WideArguments& a, const Halves& h, const FeatureTile& tile, const Rows& rows, int64_t o0,
                                 char* stages, char* memory) {
  const Problem& p = a.p;
  const int64_t pitch = split_pitch(p.out_features);
  const HalvesCopies copies(pitch, o0);
  auto line = [] { return int(thread_now()) % kSplitDepth; };
  auto quarter = [] { return int(thread_now()) / kSplitDepth % 4; };  // half a panel
  auto place = [&](int stage, int lower, int piece) {
    return stages + stage * kRingStageBytes + quarter() / 2 * kPanelBytes +
           swizzled_piece(line() + lower * kSplitDepth, quarter() % 2 * 4 + piece);
  };
  const bool vectors = kQuick || inputs_in_vectors(p, 4);
  int64_t b = rows.begin + makers_group() * kSplitDepth;  // the first row of the step at hand
  auto copy = [&](int stage) {
    const int there = rows.end - b < kSplitDepth ? int(rows.end - b) : kSplitDepth;
    copies.copy(stages + stage * kRingStageBytes + kLeftBytes, h.g + (b + copies.line) * pitch, 8 * pitch, copies.line, 8, there);
  };
  Stored<4> ahead;
  auto load = [&](int64_t first, int i) {
    const int64_t row = first + line();
    if (!kQuick) load_inputs(ahead, p, row < rows.end ? row : p.batch, i, p.in_features, vectors);
    else ahead.load_whole(rows_from(p, p.x, row < rows.end ? row : rows.end - 1), p.x_dtype, i < p.in_features ? i : 0);
  };
  if constexpr (kBase) {
    const int i0 = tile.input + quarter() * kSplitDepth;
    load(b, i0);
    make_ring(rows.steps(), [&](int stage) {
      copy(stage);
      KAN_NO_UNROLL
      for (int m = 0; m < kSplitDepth / 4; ++m) {
        const bool last = m + 1 == kSplitDepth / 4;
        const int i = i0 + 4 * m;
        float x[4];
        ahead.widen(p.x_dtype, x);
        load(last ? b + 2 * kSplitDepth : b, last ? i0 : i + 4);
        write_split_base(
            a, x, [&](int n) { return i + n < int(p.in_features) ? h.inputs[i + n] : 1.0f; }, place(stage, 0, m / 2) + m % 2 * 8,
            place(stage, 1, m / 2) + m % 2 * 8);
      }
      b += 2 * kSplitDepth;
    });
  } else {
    const int i = tile.input + quarter() * kSplitInputs;
    WarpKnots knots(knots_of_warp(memory));
    if (kQuick) {
      knots.load(a, tile.input);
      knots.arrive();
    }
    load(b, i);
    make_ring(rows.steps(), [&](int stage) {
      copy(stage);
      float x[4];
      ahead.widen(p.x_dtype, x);
      b += 2 * kSplitDepth;
      load(b, i);
      const int first_base = tile.chunk * kStepBases;
      auto upper = [&](int m) { return place(stage, 0, m); };
      auto lower = [&](int m) { return place(stage, 1, m); };
      if constexpr (kQuick) {
        if (write_quick_split(a, knots, quarter() * kSplitInputs, x, kSplitTop, first_base, upper(0), lower(0))) return;
        write_general_split(a, b - 2 * kSplitDepth + line(), i, kSplitTop, first_base, upper, lower);
      } else {
        const int64_t here = b - 2 * kSplitDepth + line();
        for_four_windows(a, here < rows.end ? here : p.batch, i, p.in_features, x, [](int) { return 1.0f; },
                         [&](int m, const Item& item) { write_split(item, kSplitTop, first_base, upper(m), lower(m)); });
      }
    });
  }
}

template <bool kQuick>
__global__ void __launch_bounds__(kGroupThreads, 1) weight_split(KAN_ARGUMENT WideArguments a, Halves h, float* parts, TileCut cut) {
#if KAN_WARPGROUPS
  const Problem& p = a.p;
  char* stages = first_atom();
  char* knots = stages + kRingBytes;
  const WeightBlock block(p, kSplitColumns, cut, int(blockIdx.x));
  const FeatureTile& tile = block.tile.features;
  const Rows rows{block.begin, block.end};
  if (int(threadIdx.x) >= kMultipliers) {
    set_registers<kSplitMakersRegisters>();
    if (tile.is_base) make_split_lines<kQuick, true>(a, h, tile, rows, block.tile.o0, stages, knots);
    else make_split_lines<kQuick, false>(a, h, tile, rows, block.tile.o0, stages, knots);
  } else {
    set_registers<kSplitMultipliersRegisters>();
    const int group = multiplier_group();
    SplitSums sums;
    sums.add_ring<true, true>(rows.steps(), stages, [&](int stage) { return stages + stage * kRingStageBytes + group * kPanelBytes; });
    float* to = static_cast<float*>(tile.is_base ? p.d_base : p.d_spline);
    for_every_weight<kSplitColumns>(p, block, parts, sums.sums, [&](int64_t row, int64_t o, float* place, float low, float high) {
      const float of_feature = tile.is_base ? inverse_of_scale(h.inputs[row]) : 1 / kSplitTop;
      low *= of_feature * inverse_of_scale(h.columns[o]);
      if (o + 1 < p.out_features) high *= of_feature * inverse_of_scale(h.columns[o + 1]);
      if (place == nullptr) write_pair(to + row * p.out_features, o, p.out_features, p.out_features % 2 == 0, low, high);
      else write_pair(place, 0, 2, true, low, high);
    });
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

}  // namespace kan::cuda
