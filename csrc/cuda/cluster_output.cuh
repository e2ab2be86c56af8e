// contract_output of wide layers by clusters (sm_90a), 16-bit types: the wide tiles of warpgroup_output.cuh, where a.quick serves and all inputs
// are in one slice. Two blocks, one below the other, copy half of a step's weights each, for both: 16 KB a block in place of 32.
#pragma once
#include "cluster_tile.cuh"
#include "warpgroup_output.cuh"

namespace kan::cuda {

constexpr int kOutputTall = 2;
using OutputPlace = ClusterPlace<kOutputTall, 1>;
constexpr int kOutputColumns = 256, kOutputRight = kRightBytes<kOutputColumns>;
constexpr size_t kClusterOutputShared = kGroupOutputShared<kOutputColumns> + sizeof(StageSignals<kRightStages>);

// Boxes of 64 outputs: of 8 bases of 8 inputs; of the base branch of 64 inputs. A box is a panel of lines.
struct OutputMaps {
  TensorMap spline, base;
};

// A cluster's tiles: those of the rows first.
template <Products P>
__global__ void __launch_bounds__(kGroupThreads, 1) output_cluster(KAN_ARGUMENT WideArguments a, KAN_ARGUMENT OutputMaps maps) {
#if KAN_WARPGROUPS
  const Problem& p = a.p;
  const GroupMemory<kOutputColumns> memory;
  auto& signals = *reinterpret_cast<StageSignals<kRightStages>*>(memory.knots + kKnotsBytes);
  const OutputPlace place;
  const int cluster = int(blockIdx.x) / kOutputTall, tall = int((p.batch + kOutputTall * kGroupRows - 1) / (kOutputTall * kGroupRows));
  const int64_t b0 = int64_t(cluster % tall * kOutputTall + place.tall) * kGroupRows;
  const int o0 = cluster / tall * kOutputColumns;
  const GroupStep first(0, p.in_features, (p.bases() + kStepBases - 1) / kStepBases, p.base_weight != nullptr);

  if (threadIdx.x == 0) signals.prepare_all(OutputPlace::kReaders);
  warp_barrier();
  meet_cluster();
  if (int(threadIdx.x) >= kMultipliers) {
    set_registers<kMakersRegisters<kOutputColumns>>();
    make_tile<P, false, true>(a, memory, first, b0);
  } else {
    set_registers<kMultipliersRegisters<kOutputColumns>>();
    GroupSums<kOutputColumns> sums = {};
    CopiedByEngine stages{place, signals, kOutputRight, [&](const GroupStep& step, int stage, Signal* copied) {
      constexpr int kPanels = kOutputColumns / kLineNumbers / kOutputTall;
      const bool is_base = step.is_base();
      const TensorMap& map = is_base ? maps.base : maps.spline;
      const int y = is_base ? step.block : step.chunk * kStepBases, z = is_base ? 0 : step.input();
      int panel = block_of_cluster() * kPanels;  // asked anew: registers are few
      KAN_NO_UNROLL
      for (int m = 0; m < kPanels; ++m, ++panel)
        copy_box(memory.right + stage * kOutputRight + panel * kPanelBytes, map, o0 + panel * kLineNumbers, y, z, copied,
                                 place.column());
    }};
    multiply_left<P, false>(memory, first, stages, sums);
    write_tile<P>(a, nullptr, b0, o0, sums);
  }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

template <Products P> int launch_output_cluster(const WideArguments& a, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_cubics(a, stream)) return error;
  const int64_t bytes = p.out_features * 2, bases = p.bases(), inputs = p.in_features;
  OutputMaps maps{map_tensor({p.spline_weight, {p.out_features, bases, inputs}, {bytes, bytes * bases}, {kLineNumbers, kStepBases, kGroupInputs}}), {}};
  if (p.base_weight != nullptr)
    maps.base = map_tensor({p.base_weight, {p.out_features, inputs, 1}, {bytes, bytes * inputs}, {kLineNumbers, kGroupDepth, 1}});
  const int64_t tall = (p.batch + kOutputTall * kGroupRows - 1) / (kOutputTall * kGroupRows);
  const int64_t wide = (p.out_features + kOutputColumns - 1) / kOutputColumns;
  return launch_clusters(output_cluster<P>, Blocks{tall * wide * kOutputTall}, Blocks{kOutputTall}, kGroupThreads, kClusterOutputShared, stream, a, maps);
}

}  // namespace kan::cuda
