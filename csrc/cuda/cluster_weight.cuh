// contract_weight of wide layers by clusters (sm_90a), 16-bit types: the wide tiles of warpgroup_weight.cuh, where a.quick serves. Two blocks, of
// neighbouring features and the same outputs and rows, copy half of a step's g each, for both: 16 KB a block in place of 32.
#pragma once
#include "cluster_tile.cuh"
#include "warpgroup_weight.cuh"

namespace kan::cuda {

constexpr int kWeightTall = 2;
using WeightPlace = ClusterPlace<kWeightTall, 1>;
constexpr int kWeightColumns = 256, kWeightRight = kRightBytes<kWeightColumns>;
constexpr size_t kClusterWeightShared = kGroupWeightShared<kWeightColumns> + sizeof(StageSignals<kRightStages>);

// g: boxes of 64 rows of 64 outputs, a panel of lines.
template <Products P>
__global__ void __launch_bounds__(kGroupThreads, 1)
    weight_cluster(KAN_ARGUMENT WideArguments a, KAN_ARGUMENT TensorMap g, float* parts, TileCut cut) {
#if KAN_WARPGROUPS
  char* right = first_atom();
  char* left = right + kRightStages * kWeightRight;
  char* knots = left + kLeftStages * kLeftBytes;
  auto& signals = *reinterpret_cast<StageSignals<kRightStages>*>(knots + kKnotsBytes);
  const WeightPlace place;
  const WeightBlock block(a.p, kWeightColumns, cut, int(blockIdx.x));
  const BatchStep first{block.begin, block.end};
  if (threadIdx.x == 0) signals.prepare_all(WeightPlace::kReaders);
  warp_barrier();
  meet_cluster();
  if (int(threadIdx.x) >= kMultipliers) {
    set_registers<256 - kLoadedRegisters<kWeightColumns>>();
    make_features<P, true>(a, block.tile.features, first, left, knots);
  } else {
    set_registers<kLoadedRegisters<kWeightColumns>>();
    GroupSums<kWeightColumns> sums = {};
    CopiedByEngine stages{place, signals, kWeightRight, [&](const BatchStep& step, int stage, Signal* copied) {
      constexpr int kPanels = kWeightColumns / kLineNumbers / kWeightTall;
      int panel = block_of_cluster() * kPanels;  // asked anew: registers are few
      KAN_NO_UNROLL
      for (int m = 0; m < kPanels; ++m, ++panel)
        copy_box(right + stage * kWeightRight + panel * kPanelBytes, g, int(block.tile.o0) + panel * kLineNumbers,
                                 int(step.b), 0, copied, place.column());
    }};
    multiply_features<P, kWeightColumns>(first, left, right, stages, sums);
    write_features<P, kWeightColumns>(a, block, parts, sums);
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

// Blocks 2 k and 2 k + 1 differ in their features alone: pairs_features (weight_tiles.h).
template <Products P> int launch_weight_cluster(const WideArguments& a, float* parts, TileCut cut, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_cubics(a, stream)) return error;
  const int64_t bytes = p.out_features * 2;
  const TensorMap g = map_tensor({p.g, {p.out_features, p.batch, 1}, {bytes, bytes * p.batch}, {kLineNumbers, kGroupDepth, 1}});
  if (int error = launch_clusters(weight_cluster<P>, Blocks{cut.blocks()}, Blocks{kWeightTall}, kGroupThreads, kClusterWeightShared, stream, a, g,
                                  parts, cut))
    return error;
  return launch_add_parts<typename StorageOf<P>::Type>(p, kWeightColumns, cut, parts, stream);
}

}  // namespace kan::cuda
