// contract_input of wide layers by clusters (sm_90a), 16-bit types: the narrow tiles of warpgroup_input.cuh and their epilogue, two blocks to
// a multiprocessor. One more warp, of which one thread works, has the copies made: of four blocks, two by two, each copies 8 KB of g
// and 8 KB of the weights, 64 deep, where a block on its own takes 16 and 16, and one with a wide tile 16 and 32 for twice the product.
#pragma once
#include "cluster_tile.cuh"
#include "warpgroup_input.cuh"

namespace kan::cuda {

constexpr int kInputTall = 2, kInputWide = 2, kInputColumns = 128, kInputRing = kInputStages<kInputColumns>;
using InputPlace = ClusterPlace<kInputTall, kInputWide>;
using InputSignals = StageSignals<kInputRing>;
constexpr int kInputStageBytes = kGroupInputStage<kInputColumns>;
constexpr size_t kClusterInputShared = kGroupInputShared<kInputColumns> + sizeof(InputSignals);

// Of a tile: as many as share out evenly.
KAN_INLINE int inputs_of_cluster_tile(const Problem& p) { return inputs_of_tile(p, kInputColumns) / kInputTall * kInputTall; }

// Boxes: 128 / kInputWide rows of g; the bases, and the base branch, of a tile's inputs / kInputTall. All 64 outputs deep.
struct InputMaps {
  TensorMap g, spline, base;
};

// Lines of the right operand that no input has: zeros, in all stages.
KAN_DEVICE void fill_lines(char* stages, int lines, int thread) {
  constexpr int kPieces = 2 * kLineNumbers / 16;
  const uint32_t zeros[4] = {};
  for (int at = lines * kPieces + thread; at < kInputColumns * kPieces; at += kMultipliers)
    for (int stage = 0; stage < kInputRing; ++stage) store_16_bytes(stages + stage * kInputStageBytes + kLeftBytes + at * 16, zeros);
}

// By one thread: every step's copies, as soon as their stage is free.
KAN_DEVICE void copy_operands(const Problem& p, const InputMaps& maps, const InputPlace& place, char* stages, InputSignals& signals, int64_t b0,
                              int64_t i0, int inputs) {
  constexpr int kRows = kGroupRows / kInputWide, kLineBytes = 2 * kLineNumbers;
  const int bases = p.bases(), share = inputs / kInputTall, first = place.tall * share;
  const bool has_base = p.base_weight != nullptr;
  const int bytes = kLeftBytes + inputs * (bases + int(has_base)) * kLineBytes;
  Turn<kInputRing> turn;
  KAN_NO_UNROLL
  for (int o = 0; o < p.out_features; o += kGroupDepth) {
    char* left = stages + turn.stage * kInputStageBytes;
    char* right = left + kLeftBytes;
    Signal* copied = signals.copied + turn.stage;
    wait_for(signals.released + turn.stage, turn.parity ^ 1);
    announce_bytes(copied, bytes);
    copy_box(left + place.wide * kRows * kLineBytes, maps.g, o, int(b0) + place.wide * kRows, 0, copied, place.row());
    copy_box(right + first * bases * kLineBytes, maps.spline, o, (int(i0) + first) * bases, 0, copied, place.column());
    if (has_base) copy_box(right + (inputs * bases + first) * kLineBytes, maps.base, o, int(i0) + first, 0, copied, place.column());
    turn.advance();
  }
}

// A tile's product.
template <Products P>
KAN_DEVICE void multiply_operands(int steps, const InputPlace& place, const char* stages, InputSignals& signals, GroupSums<kInputColumns>& sums) {
  const uint64_t lefts = describe_tile(stages + multiplier_group() * (kLeftBytes / 2)), rights = describe_tile(stages + kLeftBytes);
  Turn<kInputRing> turn;
  int before = 0;
  KAN_NO_UNROLL
  for (int s = 0; s < steps; ++s) {
    wait_for(signals.copied + turn.stage, turn.parity);
    const int offset = turn.stage * kInputStageBytes;
    order_registers();
    multiply_group<P, false, false>(sums, further(lefts, offset), further(rights, offset));
    commit_products();
    wait_for_products<1>();
    if (s > 0 && s - 1 + kInputRing < steps) signals.release(place, before);
    before = turn.stage;
    turn.advance();
  }
  wait_for_products<0>();
}

// A cluster's tiles: those of the rows first. Tiles beyond the batch or the inputs copy and multiply as the others do, which count on it.
template <Products P>
__global__ void __launch_bounds__(kMultipliers + 32, kInputBlocks<kInputColumns>)
    input_cluster(KAN_ARGUMENT WideArguments a, KAN_ARGUMENT InputMaps maps) {
#if KAN_WARPGROUPS
  const Problem& p = a.p;
  char* stages = first_atom();
  TileKnots* knots = reinterpret_cast<TileKnots*>(stages + kInputRing * kInputStageBytes);
  InputSignals& signals = *reinterpret_cast<InputSignals*>(knots + kInputColumns / 2);
  const InputPlace place;
  const int inputs = inputs_of_cluster_tile(p), thread = int(threadIdx.x);
  const int cluster = int(blockIdx.x) / InputPlace::kBlocks, tall = int((p.batch + kInputTall * kGroupRows - 1) / (kInputTall * kGroupRows));
  const int64_t b0 = int64_t(cluster % tall * kInputTall + place.tall) * kGroupRows;
  const int64_t i0 = int64_t(cluster / tall * kInputWide + place.wide) * inputs;
  const int count = p.in_features - i0 < inputs ? int(p.in_features - i0) : inputs;

  if (thread == kMultipliers) signals.prepare_all(InputPlace::kReaders);
  if (thread < kMultipliers) {
    load_tile_knots(a, knots, i0, count, thread);
    fill_lines(stages, inputs * (p.bases() + int(p.base_weight != nullptr)), thread);
    show_to_tensor_cores();
  }
  warp_barrier();
  meet_cluster();
  if (thread < kMultipliers) {
    GroupSums<kInputColumns> sums = {};
    multiply_operands<P>(int((p.out_features + kGroupDepth - 1) / kGroupDepth), place, stages, signals, sums);
    weigh_tile<kInputColumns>(a, knots, reinterpret_cast<float*>(stages), inputs, b0, i0, count, sums);
  } else if (thread == kMultipliers) {
    copy_operands(p, maps, place, stages, signals, b0, i0, inputs);
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

template <Products P> int launch_input_cluster(const WideArguments& a, void* stream) {
  if (int error = launch_cubics(a, stream)) return error;
  const Problem& p = a.p;
  const int64_t bytes = p.out_features * 2, rows = p.in_features * p.bases();
  const int inputs = inputs_of_cluster_tile(p), share = inputs / kInputTall;
  auto map = [&](const void* numbers, int64_t rows, int lines) {
    return map_tensor({numbers, {p.out_features, rows, 1}, {bytes, bytes * rows}, {kLineNumbers, lines, 1}});
  };
  InputMaps maps{map(p.g, p.batch, kGroupRows / kInputWide), map(p.spline_weight, rows, share * p.bases()), {}};
  if (p.base_weight != nullptr) maps.base = map(p.base_weight, p.in_features, share);
  constexpr int kBlocks = InputPlace::kBlocks;
  const int64_t tall = (p.batch + kInputTall * kGroupRows - 1) / (kInputTall * kGroupRows);
  const int64_t wide = (p.in_features + kInputWide * inputs - 1) / (kInputWide * inputs);
  return launch_clusters(input_cluster<P>, Blocks{tall * wide * kBlocks}, Blocks{kBlocks}, kMultipliers + 32, kClusterInputShared, stream, a, maps);
}

}  // namespace kan::cuda
