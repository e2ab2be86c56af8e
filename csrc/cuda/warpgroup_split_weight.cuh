// contract_weight of wide float32 layers on Hopper (sm_90a): warpgroup_weight.cuh with operands in halves. A step is 32 rows of the
// batch.
#pragma once
#include "warpgroup_split.cuh"
#include "warpgroup_weight.cuh"

namespace kan::cuda {

struct SplitBatchStep {
  int64_t b, end;
  KAN_DEVICE int count() const { return int((end - b + kSplitDepth - 1) / kSplitDepth); }
  KAN_DEVICE static bool is_base() { return false; }
  KAN_DEVICE void advance() { b += kSplitDepth; }
};

// A maker's thread has four inputs of one row, half a line of a panel (or 32 inputs of the base branch): its lane says which row.
KAN_DEVICE void make_split_lines(const WideArguments& a, const Halves& h, const FeatureTile& tile, const SplitBatchStep& first, char* left) {
  const Problem& p = a.p;
  auto line = [] { return int(thread_now()) % kSplitDepth; };
  auto quarter = [] { return int(thread_now()) / kSplitDepth % 4; };  // half a panel
  auto place = [&](int stage, int lower, int piece) {
    return left + stage * kLeftBytes + quarter() / 2 * kPanelBytes + swizzled_piece(line() + lower * kSplitDepth, quarter() % 2 * 4 + piece);
  };
  const bool vectors = inputs_in_vectors(p, 4);
  int64_t b = first.b + line() + int(thread_now()) / (kMakers / 2) % 2 * kSplitDepth;
  Stored<4> ahead;
  auto load = [&](int64_t row, int i) { load_inputs(ahead, p, row < first.end ? row : p.batch, i, p.in_features, vectors); };
  if (tile.is_base) {
    const int i0 = tile.input + quarter() * kSplitDepth;
    load(b, i0);
    make_own_steps(first.count(), [&](int stage) {
      KAN_NO_UNROLL
      for (int m = 0; m < kSplitDepth / 4; ++m) {
        const bool last = m + 1 == kSplitDepth / 4;
        float x[4];
        ahead.widen(p.x_dtype, x);
        load(last ? b + 2 * kSplitDepth : b, last ? i0 : i0 + 4 * m + 4);
        const int i = i0 + 4 * m;
        write_split_base(a, x, [&](int n) { return i + n < int(p.in_features) ? h.inputs[i + n] : 1.0f; }, place(stage, 0, m / 2) + m % 2 * 8,
                         place(stage, 1, m / 2) + m % 2 * 8);
      }
      b += 2 * kSplitDepth;
    });
    return;
  }
  const int i = tile.input + quarter() * kSplitInputs;
  load(b, i);
  make_own_steps(first.count(), [&](int stage) {
    float x[4];
    ahead.widen(p.x_dtype, x);
    load(b + 2 * kSplitDepth, i);
    for_four_windows(a, b < first.end ? b : p.batch, i, p.in_features, x, [&](int m, const Item& item) {
      write_split(item, kSplitTop, tile.chunk * kStepBases, place(stage, 0, m), place(stage, 1, m));
    });
    b += 2 * kSplitDepth;
  });
}

__global__ void __launch_bounds__(kGroupThreads, 1)
    weight_split(WideArguments a, Halves h, float* spline, float* base, int64_t slices, int64_t rows_per_slice) {
#if KAN_WARPGROUPS
  const Problem& p = a.p;
  char* right = first_atom();
  char* left = right + kRightStages * kRightBytes<kSplitColumns>;
  const FeatureTile tile = feature_tile(p, blockIdx.x);
  const int64_t pitch = split_pitch(p.out_features);
  auto for_every_tile = [&](auto body) {
    for (int64_t slice = blockIdx.z; slice < slices; slice += gridDim.z)
      for (int64_t o0 = int64_t(blockIdx.y) * kSplitColumns; o0 < p.out_features; o0 += int64_t(gridDim.y) * kSplitColumns) {
        const int64_t begin = slice * rows_per_slice;
        body(SplitBatchStep{begin, begin + rows_per_slice < p.batch ? begin + rows_per_slice : p.batch}, o0, slice);
        meet(kTileBarrier, kGroupThreads);  // nobody makes or copies what belongs to the next tile while this one's is read
      }
  };
  if (int(threadIdx.x) >= kMultipliers) {
    set_registers<kSplitMakersRegisters>();
    for_every_tile([&](const SplitBatchStep& first, int64_t, int64_t) { make_split_lines(a, h, tile, first, left); });
  } else {
    set_registers<kSplitMultipliersRegisters>();
    for_every_tile([&](const SplitBatchStep& first, int64_t o0, int64_t slice) {
      const int group = multiplier_group();
      using Copies = LineCopies;
      const Copies copies(pitch, o0);
      const Float16* from = h.g + (first.b + Copies::line()) * pitch + Copies::column(o0);  // the first row of the step at hand
      SplitSums sums;
      multiply_steps<true, kSplitTogether>(
          first,
          [&](const SplitBatchStep& step, int stage) {
            const int there = step.end - step.b < kSplitDepth ? int(step.end - step.b) : kSplitDepth;
            copies.copy(right + stage * kRightBytes<kSplitColumns>, from, Copies::kRows * pitch, Copies::line(), Copies::kRows, there);
            from += kSplitDepth * pitch;
          },
          [&](bool, int left_stage, int stage, int number) {
            sums.multiply<true, true>(left + left_stage * kLeftBytes + group * kPanelBytes, right + stage * kRightBytes<kSplitColumns>, number);
          },
          [&] { sums.collect(); });
      for_every_pair(sums.sums, [&](int feature, int column, float low, float high) {
        const int64_t i = tile.input + (tile.is_base ? feature : feature / kStepBases), o = o0 + column;
        const int f = tile.chunk * kStepBases + feature % kStepBases;
        if (i >= p.in_features || o >= p.out_features || (!tile.is_base && f >= p.bases())) return;
        const int64_t row = slice * p.in_features + i, at = (tile.is_base ? row : row * p.bases() + f) * p.out_features;
        const float of_feature = tile.is_base ? inverse_of_scale(h.inputs[i]) : 1 / kSplitTop;
        low *= of_feature * inverse_of_scale(h.columns[o]);
        if (o + 1 < p.out_features) high *= of_feature * inverse_of_scale(h.columns[o + 1]);
        write_pair((tile.is_base ? base : spline) + at, o, p.out_features, p.out_features % 2 == 0, low, high);
      });
    });
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

}  // namespace kan::cuda
