// contract_output of wide float32 layers on Hopper (sm_90a): warpgroup_output.cuh with operands in halves. A step is four inputs
// with eight bases each, or the base branch of 32 inputs.
#pragma once
#include "warpgroup_output.cuh"
#include "warpgroup_split.cuh"

namespace kan::cuda {

// The steps of a slice of inputs, in order: four of them with eight bases each, one chunk of bases after the other; behind all of
// them the base branch.
struct SplitStep {
  int begin, end, chunks, input, chunk = 0;
  bool has_base, is_of_base = false;

  KAN_DEVICE SplitStep(int64_t begin, int64_t end, int chunks, bool has_base)
      : begin(int(begin)), end(int(end)), chunks(chunks), input(int(begin)), has_base(has_base) {}
  KAN_DEVICE int count() const {
    const int inputs = end - begin;
    return (inputs + kSplitInputs - 1) / kSplitInputs * chunks + (has_base ? (inputs + kSplitDepth - 1) / kSplitDepth : 0);
  }
  KAN_DEVICE void advance() {
    if (is_of_base) {
      input += kSplitDepth;
      return;
    }
    if (++chunk < chunks) return;
    chunk = 0, input += kSplitInputs;
    if (input >= end) input = begin, is_of_base = true;
  }
};

// The copies of a step's weights.
KAN_DEVICE void copy_split_weights(const Problem& p, const Halves& h, const HalvesCopies& copies, int input, int first_base,
                                   bool is_base, int end, char* right) {
  const int64_t pitch = split_pitch(p.out_features);
  const int line = copies.line, basis = first_base + line;
  if (is_base) copies.copy(right, h.base + int64_t(input + line) * pitch, 8 * pitch, input + line, 8, end);
  else
    copies.copy(right, h.spline + (int64_t(input) * p.bases() + basis) * pitch, p.bases() * pitch, input, 1,
                basis < p.bases() ? end : 0);
}

// A maker's thread has one row. The quick way has the last row again below the batch, for sums that nobody writes.
template <bool kQuick>
KAN_DEVICE void make_split_left(const WideArguments& a, const Halves& h, const SplitStep& first, int64_t b0, int64_t o0,
                                char* stages, char* memory) {
  const Problem& p = a.p;
  auto line = [] { return int(thread_now()) % kGroupRows; };
  auto row = [&] { return !kQuick || b0 + line() < p.batch ? b0 + line() : p.batch - 1; };
  const bool vectors = inputs_in_vectors(p, 4);
  const HalvesCopies copies(split_pitch(p.out_features), o0);
  auto scale_of_row = [&] { return h.rows[b0 + line() < p.batch ? b0 + line() : p.batch - 1]; };
  const float kept = kQuick ? scale_of_row() : 0.0f;  // the general way has no register left for it
  SplitStep now = first;
  if (makers_group() == 1) now.advance();
  Stored<4> ahead;
  auto load = [&](int i) {
    if (!kQuick) load_inputs(ahead, p, row(), i, first.end, vectors);
    else if (i < first.end) ahead.load_whole(rows_from(p, p.x, row()), p.x_dtype, i);
  };
  load(now.input);
  WarpKnots knots(knots_of_warp(memory));
  int known = first.begin;  // inputs whose knots are here end there
  if (kQuick) knots.load(a, known);
  make_ring(first.count(), [&](int stage) {
    char* left = stages + stage * kRingStageBytes;
    auto piece = [&](int number) { return left + swizzled_piece(line(), number); };
    const int input = now.input, first_base = now.chunk * kStepBases;
    const bool is_base = now.is_of_base;
    const float scale = kQuick ? kept : scale_of_row();
    now.advance(), now.advance();
    copy_split_weights(p, h, copies, input, first_base, is_base, first.end, left + kLeftBytes);
    float x[4];
    if (is_base) {
      KAN_NO_UNROLL
      for (int m = 0; m < kSplitDepth / 4; ++m) {
        ahead.widen(p.x_dtype, x);
        load(m + 1 < kSplitDepth / 4 ? input + 4 * m + 4 : now.input);
        write_split_base(a, x, [&](int) { return scale; }, piece(m / 2) + m % 2 * 8, piece(m / 2 + 4) + m % 2 * 8);
      }
      return;
    }
    ahead.widen(p.x_dtype, x);
    load(now.input);
    if constexpr (kQuick) {
      if (input >= known) {
        knots.arrive();
        known += WarpKnots::kInputs;
        knots.load(a, known);
      }
      if (write_quick_split(a, knots, (input - first.begin) % WarpKnots::kInputs, x, scale, first_base, piece(0), piece(4))) return;
      write_general_split(a, row(), input, scale, first_base, piece, [&](int m) { return piece(m + 4); });
    } else {
      for_four_windows(a, row(), input, first.end, x, [](int) { return 1.0f; },
                       [&](int m, const Item& item) { write_split(item, scale, first_base, piece(m), piece(m + 4)); });
    }
  });
}

template <bool kQuick>
__global__ void __launch_bounds__(kGroupThreads, 1)
    output_split(WideArguments a, Halves h, float* parts, int64_t slices, int64_t inputs_per_slice) {
#if KAN_WARPGROUPS
  const Problem& p = a.p;
  char* stages = first_atom();
  char* knots = stages + kRingBytes;
  const int64_t b0 = int64_t(blockIdx.x) * kGroupRows;
  if (int(threadIdx.x) >= kMultipliers) {
    set_registers<kSplitMakersRegisters>();
    for_every_tile<kSplitColumns, kRingTile, SplitStep>(p, slices, inputs_per_slice, [&](const SplitStep& first, int64_t o0, int64_t) {
      make_split_left<kQuick>(a, h, first, b0, o0, stages, knots);
    });
  } else {
    set_registers<kSplitMultipliersRegisters>();
    for_every_tile<kSplitColumns, kRingTile, SplitStep>(p, slices, inputs_per_slice, [&](const SplitStep& first, int64_t o0, int64_t slice) {
      const int group = multiplier_group();
      SplitSums sums;
      sums.add_ring<false, true>(first.count(), stages,
                                 [&](int stage) { return stages + stage * kRingStageBytes + group * (kLeftBytes / 2); });
      for_every_pair(sums.sums, [&](int row, int column, float low, float high) {
        const int64_t b = b0 + row, o = o0 + column;
        if (b >= p.batch || o >= p.out_features) return;
        const float of_row = inverse_of_scale(h.rows[b]);
        low = low * inverse_of_scale(h.columns[o]) * of_row;
        if (o + 1 < p.out_features) high = high * inverse_of_scale(h.columns[o + 1]) * of_row;
        float* to = (parts != nullptr ? parts + slice * p.batch * p.out_features : static_cast<float*>(p.y)) + b * p.out_features;
        write_pair(to, o, p.out_features, p.out_features % 2 == 0, low, high);
      });
    });
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

}  // namespace kan::cuda
