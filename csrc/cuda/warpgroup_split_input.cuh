// contract_input of wide float32 layers on Hopper (sm_90a): warpgroup_input.cuh with operands in halves, 32 outputs to a step. A
// block's inputs are those whose bases and base branch are among 128 columns. Two warpgroups copy, two multiply, all weigh.
#pragma once
#include "warpgroup_input.cuh"
#include "warpgroup_split.cuh"

namespace kan::cuda {

// After the products the sums (128 rows) lie where the stages were. Behind them the knots of the tile's inputs.
constexpr size_t kSplitInputShared = kAtomBytes + kRingBytes + kSplitColumns / 2 * sizeof(TileKnots);
static_assert(kGroupRows * kSplitColumns * int(sizeof(float)) <= kRingBytes);

KAN_INLINE int inputs_of_split_tile(const Problem& p) { return kSplitColumns / (p.bases() + 1); }
// Of the tile from input i0 on, those that exist.
KAN_DEVICE int inputs_there(const Problem& p, int64_t i0) {
  return p.in_features - i0 < inputs_of_split_tile(p) ? int(p.in_features - i0) : inputs_of_split_tile(p);
}

// One copier's pieces of every step: 8 halves of every 16th row of g, and of every 16th column. Columns: the bases of the tile's
// inputs, then their base branch.
struct SplitCopies {
  static constexpr int kNext = kMakers / 2 / 8, kRows = kGroupRows / kNext, kTileColumns = kSplitColumns / kNext;
  const Float16 *rows, *spline, *base;  // the first of each, as if all columns were of that kind
  int64_t distance;
  uint32_t missing = 0;  // bit m: row or, 8 bits higher, column m
  uint32_t of_base = 0;  // bit m: column m
  int place;

  KAN_DEVICE SplitCopies(const Problem& p, const Halves& h, int64_t b0, int64_t i0) {
    const int line = int(threadIdx.x) % (kMakers / 2) / 8, number = int(threadIdx.x) % 8 * 8;
    const int64_t pitch = split_pitch(p.out_features);
    const int of_spline = inputs_of_split_tile(p) * p.bases(), inside = inputs_there(p, i0);
    place = swizzled(line, number);
    distance = kNext * pitch;
    rows = h.g + (b0 + line) * pitch + number;
    spline = h.spline + (i0 * p.bases() + line) * pitch + number;
    base = h.base + (i0 + line - of_spline) * pitch + number;
    KAN_UNROLL_ALL
    for (int m = 0; m < kRows; ++m) missing |= uint32_t(b0 + line + m * kNext >= p.batch) << m;
    KAN_UNROLL_ALL
    for (int m = 0; m < kTileColumns; ++m) {
      const int column = line + m * kNext;
      const bool is_base = column >= of_spline;
      const bool exists = is_base ? p.base_weight != nullptr && column - of_spline < inside : column < inside * p.bases();
      missing |= uint32_t(!exists) << (8 + m);
      of_base |= uint32_t(is_base) << m;
    }
  }
  // Of step s. Four at a time: of all at once the compiler would keep every pointer in registers.
  KAN_DEVICE void copy(int s, char* left) const {
    const int64_t at = int64_t(s) * kGroupDepth;
    auto copy_four = [&](Float16* to, const Float16* from, const Float16* other, uint32_t kinds, uint32_t gone) {
      KAN_UNROLL_ALL
      for (int r = 0; r < 4; ++r)
        copy_16_bytes(to + r * kNext * kLineNumbers, (kinds >> r & 1u ? other : from) + r * distance, gone >> r & 1u);
    };
    Float16* to = reinterpret_cast<Float16*>(left + place);
    const Float16 *from = rows + at, *other;
    KAN_NO_UNROLL
    for (int m = 0; m < kRows; m += 4, to += 4 * kNext * kLineNumbers, from += 4 * distance)
      copy_four(to, from, from, 0, missing >> m);
    to = reinterpret_cast<Float16*>(left + kLeftBytes + place), from = spline + at, other = base + at;
    KAN_NO_UNROLL
    for (int m = 0; m < kTileColumns; m += 4, to += 4 * kNext * kLineNumbers, from += 4 * distance, other += 4 * distance)
      copy_four(to, from, other, of_base >> m, missing >> (8 + m));
  }
};

// The copiers' loop: two groups of them take turns, each one step ahead of the one whose copies it waits for.
KAN_DEVICE void copy_ring(const SplitCopies& copies, int steps, char* stages) {
  int s = makers_group(), stage = s, before = -1;
  KAN_NO_UNROLL
  for (; s < steps; s += 2) {
    if (s >= kRing) meet(kRingRead + stage, kHandover);
    copies.copy(s, stages + stage * kRingStageBytes);
    commit_copies();
    if (before >= 0) {
      wait_for_copies<1>();
      show_to_tensor_cores();
      arrive(kRingMade + before, kHandover);
    }
    before = stage;
    stage = next_in_ring(stage, 2);
  }
  if (before < 0) return;
  wait_for_copies<0>();
  show_to_tensor_cores();
  arrive(kRingMade + before, kHandover);
}

// The epilogue of a tile, by all threads: a thread has one row, and of its inputs every fourth four. x is on its way before the
// sums are there.
struct SplitEpilogue {
  static constexpr int kNext = kGroupThreads / kGroupRows * 4;
  int i0, count;
  int together;
  Stored<4> ahead;

  KAN_DEVICE static int row() { return int(thread_now()) % kGroupRows; }
  KAN_DEVICE static int64_t batch_row() { return int64_t(blockIdx.x) * kGroupRows + row(); }
  KAN_DEVICE static int first() { return int(thread_now()) / kGroupRows * 4; }
  KAN_DEVICE void load(const Problem& p, int j) { load_four(ahead, p, batch_row(), i0 + j, i0 + count, together); }
  KAN_DEVICE SplitEpilogue(const Problem& p, int64_t i0)
      : i0(int(i0)), count(inputs_there(p, i0)), together(inputs_together(p, i0)) {
    load(p, first());
  }
  KAN_DEVICE void run(const WideArguments& a, const float* scales, const TileKnots* knots, const float* values) {
    const Problem& p = a.p;
    const int of_spline = inputs_of_split_tile(p) * p.bases();
    auto sum = [&](int column) { return values[place_of_sum<kSplitColumns>(row(), column)]; };
    KAN_NO_UNROLL
    for (int j = first(); batch_row() < p.batch && j < count; j += kNext) {
      float x[4], total[4];
      ahead.widen(p.x_dtype, x);
      load(p, j + kNext);
      weigh_four(a, knots + j, i0 + j, count - j, j * p.bases(), of_spline + j, x, sum, total);
      KAN_UNROLL_ALL
      for (int m = 0; m < 4; ++m) total[m] *= inverse_of_scale(scales[batch_row()]);
      write_four(p, batch_row(), i0 + j, count - j, together, total);
    }
  }
};

__global__ void __launch_bounds__(kGroupThreads, 1) input_split(WideArguments a, Halves h) {
#if KAN_WARPGROUPS
  const Problem& p = a.p;
  char* stages = first_atom();
  float* values = reinterpret_cast<float*>(stages);
  TileKnots* knots = reinterpret_cast<TileKnots*>(stages + kRingBytes);
  const int steps = int(split_pitch(p.out_features) / kGroupDepth);
  auto for_every_input_tile = [&](auto body) {
    const int inputs = inputs_of_split_tile(p);
    for (int64_t i0 = int64_t(blockIdx.y) * inputs; i0 < p.in_features; i0 += int64_t(gridDim.y) * inputs) {
      body(i0);
      meet(kRingEverybody, kGroupThreads);  // the sums have been read
    }
  };
  if (int(threadIdx.x) >= kMultipliers) {
    set_registers<kSplitMakersRegisters>();
    for_every_input_tile([&](int64_t i0) {
      copy_ring(SplitCopies(p, h, int64_t(blockIdx.x) * kGroupRows, i0), steps, stages);
      for (int j = int(threadIdx.x) - kMultipliers; j < inputs_there(p, i0); j += kMakers) {
        const Even even = even_knots(a.described[i0 + j]);
        knots[j] = {even, 1};
        for (int m = 0; m < p.n; ++m) knots[j].scale *= even.inverse_h;
      }
      SplitEpilogue epilogue(p, i0);
      meet(kRingEverybody, kGroupThreads);
      epilogue.run(a, h.rows, knots, values);
    });
  } else {
    set_registers<kSplitMultipliersRegisters>();
    for_every_input_tile([&](int64_t i0) {
      const int group = multiplier_group();
      SplitSums sums;
      sums.add_ring<false, false>(steps, stages,
                                  [&](int stage) { return stages + stage * kRingStageBytes + group * (kLeftBytes / 2); });
      meet(kRingTile, kMultipliers);  // both groups have read the stages
      for_every_pair(sums.sums, [&](int row, int column, float low, float high) {
        *reinterpret_cast<Pair*>(values + place_of_sum<kSplitColumns>(row, column)) = {low, high};
      });
      SplitEpilogue epilogue(p, i0);
      meet(kRingEverybody, kGroupThreads);
      epilogue.run(a, h.rows, knots, values);
    });
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

}  // namespace kan::cuda
