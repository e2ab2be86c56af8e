// contract_input of wide layers by clusters (sm_90a), 16-bit types: the tiles and the epilogue are those of warpgroup_input.cuh. One more
// warp, of which one thread works, has the copies made.
//
// Of both operands, 64 deep, a block of 128 x 256 copies 16 and 16 KB where blocks on their own take 16 and 32, and one of 128 x 128, of
// four, 8 and 8 in place of 16 and 16.
#pragma once
#include "cluster_tile.cuh"
#include "warpgroup_input.cuh"

namespace kan::cuda {

template <int kColumns> constexpr int kInputTall = 2;
template <int kColumns> constexpr int kInputWide = kColumns == 256 ? 1 : 2;
template <int kColumns> using InputPlace = ClusterPlace<kInputTall<kColumns>, kInputWide<kColumns>>;
template <int kColumns> constexpr size_t kClusterInputShared = kGroupInputShared<kColumns> + sizeof(StageSignals<kInputStages<kColumns>>);

// Of a tile: as many as share out evenly.
template <int kColumns> KAN_INLINE int inputs_of_cluster_tile(const Problem& p) {
  return inputs_of_tile(p, kColumns) / kInputTall<kColumns> * kInputTall<kColumns>;
}

// Boxes: 128 / kInputWide rows of g; the bases, and the base branch, of a tile's inputs / kInputTall. All 64 outputs deep.
struct InputMaps {
  TensorMap g, spline, base;
};

// Lines of the right operand that no input has: zeros, in all stages.
template <int kColumns> KAN_DEVICE void fill_lines(char* stages, int lines, int thread) {
  constexpr int kPieces = 2 * kLineNumbers / 16;
  const uint32_t zeros[4] = {};
  for (int at = lines * kPieces + thread; at < kColumns * kPieces; at += kMultipliers)
    for (int stage = 0; stage < kInputStages<kColumns>; ++stage) store_16_bytes(stages + stage * kGroupInputStage<kColumns> + kLeftBytes + at * 16, zeros);
}

// By one thread: every step's copies, as soon as their stage is free.
template <int kColumns>
KAN_DEVICE void copy_operands(const Problem& p, const InputMaps& maps, const InputPlace<kColumns>& place, char* stages,
                              StageSignals<kInputStages<kColumns>>& signals, int64_t b0, int64_t i0, int inputs) {
  constexpr int kTall = kInputTall<kColumns>, kWide = kInputWide<kColumns>, kRows = kGroupRows / kWide, kLineBytes = 2 * kLineNumbers;
  const int bases = p.bases(), share = inputs / kTall, first = place.tall * share;
  const bool has_base = p.base_weight != nullptr;
  const int bytes = kLeftBytes + inputs * (bases + int(has_base)) * kLineBytes;
  Turn<kInputStages<kColumns>> turn;
  KAN_NO_UNROLL
  for (int o = 0; o < p.out_features; o += kGroupDepth) {
    char* left = stages + turn.stage * kGroupInputStage<kColumns>;
    char* right = left + kLeftBytes;
    Signal* copied = signals.copied + turn.stage;
    wait_for(signals.released + turn.stage, turn.parity ^ 1);
    announce_bytes(copied, bytes);
    copy_shared<kWide>(left + place.wide * kRows * kLineBytes, maps.g, o, int(b0) + place.wide * kRows, 0, copied, place.row());
    copy_shared<kTall>(right + first * bases * kLineBytes, maps.spline, o, (int(i0) + first) * bases, 0, copied, place.column());
    if (has_base) copy_shared<kTall>(right + (inputs * bases + first) * kLineBytes, maps.base, o, int(i0) + first, 0, copied, place.column());
    turn.advance();
  }
}

// A tile's product.
template <Products P, int kColumns>
KAN_DEVICE void multiply_operands(int steps, const InputPlace<kColumns>& place, const char* stages, StageSignals<kInputStages<kColumns>>& signals,
                                  GroupSums<kColumns>& sums) {
  constexpr int kStages = kInputStages<kColumns>;
  const uint64_t lefts = describe_tile(stages + multiplier_group() * (kLeftBytes / 2)), rights = describe_tile(stages + kLeftBytes);
  Turn<kStages> turn;
  int before = 0;
  KAN_NO_UNROLL
  for (int s = 0; s < steps; ++s) {
    wait_for(signals.copied + turn.stage, turn.parity);
    const int offset = turn.stage * kGroupInputStage<kColumns>;
    order_registers();
    multiply_group<P, false, false>(sums, further(lefts, offset), further(rights, offset));
    commit_products();
    wait_for_products<1>();
    if (s > 0 && s - 1 + kStages < steps) signals.release(place, before);
    before = turn.stage;
    turn.advance();
  }
  wait_for_products<0>();
}

// A cluster's tiles: those of the rows first. Tiles beyond the batch or the inputs copy and multiply as the others do, which count on it.
template <Products P, int kColumns>
__global__ void __launch_bounds__(kMultipliers + 32, kInputBlocks<kColumns>)
    input_cluster(KAN_ARGUMENT WideArguments a, KAN_ARGUMENT InputMaps maps) {
#if KAN_WARPGROUPS
  constexpr int kStages = kInputStages<kColumns>;
  using Place = InputPlace<kColumns>;
  const Problem& p = a.p;
  char* stages = first_atom();
  TileKnots* knots = reinterpret_cast<TileKnots*>(stages + kStages * kGroupInputStage<kColumns>);
  auto& signals = *reinterpret_cast<StageSignals<kStages>*>(knots + kColumns / 2);
  const Place place;
  const int inputs = inputs_of_cluster_tile<kColumns>(p), thread = int(threadIdx.x);
  const int cluster = int(blockIdx.x) / Place::kBlocks, tall = int((p.batch + kInputTall<kColumns> * kGroupRows - 1) / (kInputTall<kColumns> * kGroupRows));
  const int64_t b0 = int64_t(cluster % tall * kInputTall<kColumns> + place.tall) * kGroupRows;
  const int64_t i0 = int64_t(cluster / tall * kInputWide<kColumns> + place.wide) * inputs;
  const int count = p.in_features - i0 < inputs ? int(p.in_features - i0) : inputs;

  if (thread == kMultipliers) signals.prepare_all(Place::kReaders);
  if (thread < kMultipliers) {
    load_tile_knots(a, knots, i0, count, thread);
    fill_lines<kColumns>(stages, inputs * (p.bases() + int(p.base_weight != nullptr)), thread);
    show_to_tensor_cores();
  }
  warp_barrier();
  meet_cluster();
  if (thread < kMultipliers) {
    GroupSums<kColumns> sums = {};
    multiply_operands<P, kColumns>(int((p.out_features + kGroupDepth - 1) / kGroupDepth), place, stages, signals, sums);
    weigh_tile<kColumns, 2>(a, knots, reinterpret_cast<float*>(stages), inputs, b0, i0, count, sums);
  } else if (thread == kMultipliers) {
    copy_operands<kColumns>(p, maps, place, stages, signals, b0, i0, inputs);
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

template <Products P, int kColumns> int launch_input_cluster_of(const WideArguments& a, void* stream) {
  constexpr int kTall = kInputTall<kColumns>, kWide = kInputWide<kColumns>;
  const Problem& p = a.p;
  const int64_t bytes = p.out_features * 2, rows = p.in_features * p.bases();
  const int inputs = inputs_of_cluster_tile<kColumns>(p), share = inputs / kTall;
  auto map = [&](const void* numbers, int64_t rows, int lines) {
    return map_tensor({numbers, {p.out_features, rows, 1}, {bytes, bytes * rows}, {kLineNumbers, lines, 1}});
  };
  InputMaps maps{map(p.g, p.batch, kGroupRows / kWide), map(p.spline_weight, rows, share * p.bases()), {}};
  if (p.base_weight != nullptr) maps.base = map(p.base_weight, p.in_features, share);
  const int64_t tall = (p.batch + kTall * kGroupRows - 1) / (kTall * kGroupRows), wide = (p.in_features + kWide * inputs - 1) / (kWide * inputs);
  constexpr int kBlocks = kTall * kWide;
  return launch_clusters(input_cluster<P, kColumns>, Blocks{tall * wide * kBlocks}, Blocks{kBlocks}, kMultipliers + 32, kClusterInputShared<kColumns>,
                         stream, a, maps);
}

template <Products P> int launch_input_cluster(const WideArguments& a, int columns, void* stream) {
  if (int error = launch_cubics(a, stream)) return error;
  return columns == 256 ? launch_input_cluster_of<P, 256>(a, stream) : launch_input_cluster_of<P, 128>(a, stream);
}

}  // namespace kan::cuda
