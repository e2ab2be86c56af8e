// contract_output of wide float32 layers on Hopper (sm_90a): warpgroup_output.cuh with operands in halves. A step is four inputs with
// eight bases each, or, behind all those of a slice, the base branch of 32 inputs.
#pragma once
#include "warpgroup_split.cuh"

namespace kan::cuda {

// The steps of a slice of inputs, in order.
struct SplitStep {
  int begin, end, chunks, input, chunk = 0;
  bool has_base, is_of_base = false;

  KAN_DEVICE SplitStep(int64_t begin, int64_t end, int chunks, bool has_base)
      : begin(int(begin)), end(int(end)), chunks(chunks), input(int(begin)), has_base(has_base) {}
  KAN_DEVICE int count() const {
    const int inputs = end - begin;
    return (inputs + kSplitInputs - 1) / kSplitInputs * chunks + (has_base ? (inputs + kSplitDepth - 1) / kSplitDepth : 0);
  }
  KAN_DEVICE bool is_base() const { return is_of_base; }
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

// A maker's thread has one row.
KAN_DEVICE void make_split_left(const WideArguments& a, const Halves& h, const SplitStep& first, int64_t b0, char* left) {
  const Problem& p = a.p;
  auto line = [] { return int(thread_now()) % kGroupRows; };
  const bool vectors = inputs_in_vectors(p, 4);
  SplitStep now = first;
  if (int(thread_now()) / kGroupRows % 2 == 1) now.advance();
  Stored<4> ahead;
  auto load = [&](int i) { load_inputs(ahead, p, b0 + line(), i, first.end, vectors); };
  load(now.input);
  make_own_steps(first.count(), [&](int stage) {
    auto piece = [&](int number) { return left + stage * kLeftBytes + swizzled_piece(line(), number); };
    const int input = now.input, first_base = now.chunk * kStepBases;
    const bool is_base = now.is_of_base;
    const float scale = h.rows[b0 + line() < p.batch ? b0 + line() : p.batch - 1];
    now.advance(), now.advance();
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
    for_four_windows(a, b0 + line(), input, first.end, x,
                     [&](int m, const Item& item) { write_split(item, scale, first_base, piece(m), piece(m + 4)); });
  });
}

KAN_DEVICE void multiply_split_left(const WideArguments& a, const Halves& h, const SplitStep& first, int64_t o0, char* right, const char* left,
                                    SplitSums& sums) {
  using Copies = LineCopies;
  const Problem& p = a.p;
  const int64_t pitch = split_pitch(p.out_features), of_input = p.bases() * pitch;
  const Copies copies(pitch, o0);
  const int group = multiplier_group(), basis = Copies::line() % kStepBases;
  constexpr int kInputs = Copies::kRows / kStepBases;  // from a thread's row to its next one
  // The first row of the step at hand.
  const Float16* spline = h.spline + (first.begin + Copies::line() / kStepBases) * of_input + basis * pitch + Copies::column(o0);
  const Float16* base = h.base + (first.begin + Copies::line()) * pitch + Copies::column(o0);
  multiply_steps<true, kSplitTogether>(
      first,
      [&](const SplitStep& step, int stage) {
        char* to = right + stage * kRightBytes<kSplitColumns>;
        if (step.is_of_base) {
          copies.copy(to, base, Copies::kRows * pitch, step.input + Copies::line(), Copies::kRows, step.end);
          base += kSplitDepth * pitch;
        } else {
          const bool exists = step.chunk * kStepBases + basis < p.bases();
          copies.copy(to, spline, kInputs * of_input, step.input + Copies::line() / kStepBases, kInputs, exists ? step.end : 0);
          spline += step.chunk + 1 < step.chunks ? kStepBases * pitch : kSplitInputs * of_input - (step.chunks - 1) * kStepBases * pitch;
        }
      },
      [&](bool, int left_stage, int stage, int number) {
        sums.multiply<false, true>(left + left_stage * kLeftBytes + group * (kLeftBytes / 2), right + stage * kRightBytes<kSplitColumns>, number);
      },
      [&] { sums.collect(); });
}

__global__ void __launch_bounds__(kGroupThreads, 1) output_split(WideArguments a, Halves h, float* parts, int64_t slices, int64_t inputs_per_slice) {
#if KAN_WARPGROUPS
  const Problem& p = a.p;
  char* right = first_atom();
  char* left = right + kRightStages * kRightBytes<kSplitColumns>;
  const int64_t b0 = int64_t(blockIdx.x) * kGroupRows;
  const int chunks = (p.bases() + kStepBases - 1) / kStepBases;
  auto for_every_tile = [&](auto body) {
    for (int64_t slice = blockIdx.z; slice < slices; slice += gridDim.z)
      for (int64_t o0 = int64_t(blockIdx.y) * kSplitColumns; o0 < p.out_features; o0 += int64_t(gridDim.y) * kSplitColumns) {
        const int64_t begin = slice * inputs_per_slice;
        const int64_t end = begin + inputs_per_slice < p.in_features ? begin + inputs_per_slice : p.in_features;
        body(SplitStep(begin, end, chunks, p.base_weight != nullptr), o0, slice);
        meet(kTileBarrier, kGroupThreads);  // nobody makes or copies what belongs to the next tile while this one's is read
      }
  };
  if (int(threadIdx.x) >= kMultipliers) {
    set_registers<kSplitMakersRegisters>();
    for_every_tile([&](const SplitStep& first, int64_t, int64_t) { make_split_left(a, h, first, b0, left); });
  } else {
    set_registers<kSplitMultipliersRegisters>();
    for_every_tile([&](const SplitStep& first, int64_t o0, int64_t slice) {
      SplitSums sums;
      multiply_split_left(a, h, first, o0, right, left, sums);
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
