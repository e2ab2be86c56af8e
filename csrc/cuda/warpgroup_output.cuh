// contract_output of wide layers by warpgroups (sm_90a): y = Phi W as in wide_output.cuh. A product of 64 rows goes on by itself,
// and meanwhile the warps make the left operand of the next one in registers.
//
// Weights come by cp.async, in the layout that the tensor cores read through a descriptor. 9.7.15.5.1.2 of the PTX ISA,
// "Shared Memory Matrix Layout", MN-major with the 128-byte swizzle: rows of 64 columns (128 bytes), whose pieces of 16 bytes
// stand at their number xor row % 8; eight rows, 1024 bytes, are an atom, which begins at a multiple of its size; `stride` is
// the distance from atom to atom down the rows, `leading` the one to the next 64 columns.
//
// 16-bit types only. Of 32-bit numbers the instruction wants the depth contiguous (only .f16 and .bf16 have imm-trans-b), and ours
// have the columns so: 4 bytes a copy in place of 16, 32 copies of each thread for a step of 256 columns, about as long as the
// step's products. And it would read weights cut off to tf32, where wide_output.cuh rounds them.
//
// Not yet run on a GPU.
#pragma once
#include "launch.h"
#include "warpgroup.cuh"
#include "wide.cuh"

namespace kan::cuda {

constexpr int kGroups = 2, kGroupThreads = 128 * kGroups, kGroupRows = 64 * kGroups;
// Of weights: one is multiplied, one is multiplied by whoever is behind, the others are on their way.
constexpr int kGroupStages = 4;
constexpr int kAtomColumns = 64, kAtomBytes = 1024, kPanelBytes = kStepDepth * 2 * kAtomColumns;
template <int kColumns> constexpr int kGroupStageBytes = kColumns / kAtomColumns * kPanelBytes;
// The first stage begins at the next multiple of an atom.
template <int kColumns>
constexpr size_t kGroupShared = kAtomBytes + kGroupStages * kGroupStageBytes<kColumns> + kGroupRows * kBasePitch * 2;

// 9.7.15.5.1.2.2, "Matrix Descriptor Format": offsets without their last four bits, from bit 0, 16 and 32; the swizzle from bit 62.
KAN_DEVICE uint64_t describe_weights(uint32_t address) {
  constexpr uint64_t kLeading = kPanelBytes, kStride = kAtomBytes, kSwizzle128 = 1;
  return (address & 0x3ffff) >> 4 | kLeading >> 4 << 16 | kStride >> 4 << 32 | kSwizzle128 << 62;
}
constexpr uint64_t kSixteenRows = 2 * kAtomBytes >> 4;  // the descriptor of the rows 16 further

// The steps of a slice: groups of 4 inputs, each with all its chunks of 8 bases; then the base branch, 32 inputs a step. An
// even number of either: what comes too much lies beyond the inputs, where everything is zero.
struct GroupSteps {
  int64_t begin, end, of_spline, all;
  int chunks;

  KAN_DEVICE GroupSteps(int64_t begin, int64_t end, int chunks, bool has_base) : begin(begin), end(end), chunks(chunks) {
    of_spline = even((end - begin + kStepInputs - 1) / kStepInputs * chunks);
    all = of_spline + (has_base ? even((end - begin + kStepDepth - 1) / kStepDepth) : 0);
  }
  static KAN_DEVICE int64_t even(int64_t count) { return (count + 1) / 2 * 2; }
};
struct GroupStep {
  int64_t number, input;
  int chunk;  // -1: base branch

  KAN_DEVICE void advance(const GroupSteps& steps) {
    if (++number == steps.of_spline) input = steps.begin, chunk = -1;
    else if (chunk < 0) input += kStepDepth;
    else if (++chunk == steps.chunks) chunk = 0, input += kStepInputs;
  }
};

template <bool kSparse, int kColumns, class T>
KAN_DEVICE void stage_for_groups(const WideArguments& a, const GroupStep& step, int64_t end, int64_t o0, T* stage) {
  const Problem& p = a.p;
  constexpr int kPieces = kColumns / 8;
  KAN_UNROLL_ALL
  for (int m = 0; m < kStepDepth * kPieces / kGroupThreads; ++m) {
    const int piece = threadIdx.x + m * kGroupThreads, row = piece / kPieces, column = piece % kPieces * 8;
    const bool is_base = step.chunk < 0;
    const int64_t i = step.input + (is_base ? row : row / kStepBases);
    const int f = step.chunk * kStepBases + basis_of_place<kSparse, true>(row % kStepBases);
    const T* from = is_base ? static_cast<const T*>(p.base_weight) + i * p.out_features
                            : static_cast<const T*>(p.spline_weight) + (i * p.bases() + f) * p.out_features;
    const bool exists = i < end && (is_base || f < p.bases());
    const int at = (column / kAtomColumns * kStepDepth + row) * kAtomColumns + (column % kAtomColumns ^ row % 8 * 8);
    stage_16_bytes(stage + at, from + o0 + column, exists ? p.out_features - o0 - column : 0, a.aligned);
  }
}

template <Products P, int kSums> KAN_DEVICE void multiply_group(float (&c)[kSums], const uint32_t (&a)[4], uint64_t weights) {
  if constexpr (P == Products::bfloat16) wgmma_bfloat16(c, a, weights);
  else wgmma_float16(c, a, weights);
}
template <Products P, int kSums>
KAN_DEVICE void multiply_group_sparse(float (&c)[kSums], const uint32_t (&a)[4], uint64_t weights, const uint32_t& metadata) {
  if constexpr (P == Products::bfloat16) wgmma_sparse_bfloat16(c, a, weights, metadata);
  else wgmma_sparse_float16(c, a, weights, metadata);
}

template <Products P, bool kSparse, int kColumns>
__global__ void __launch_bounds__(kGroupThreads)
    output_warpgroup(WideArguments a, float* parts, int64_t slices, int64_t inputs_per_slice) {
#if KAN_WARPGROUPS
  using T = typename StorageOf<P>::Type;
  const Problem& p = a.p;
  T* memory = shared_memory<T>();
  T* stages = memory + (kAtomBytes - shared_address(memory) % kAtomBytes) % kAtomBytes / sizeof(T);
  constexpr int kStageNumbers = kGroupStageBytes<kColumns> / sizeof(T);
  const uint64_t first_stage = describe_weights(shared_address(stages));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane >> 2, q = lane & 3;
  T* base_values = stages + kGroupStages * kStageNumbers + warp * 16 * kBasePitch;  // (16 rows, 32 inputs) of this warp
  const int64_t b0 = int64_t(blockIdx.x) * kGroupRows + warp * 16;
  const int chunks = (p.bases() + kStepBases - 1) / kStepBases;

  for (int64_t slice = blockIdx.z; slice < slices; slice += gridDim.z)
    for (int64_t o0 = int64_t(blockIdx.y) * kColumns; o0 < p.out_features; o0 += int64_t(gridDim.y) * kColumns) {
      const int64_t begin = slice * inputs_per_slice;
      const int64_t end = begin + inputs_per_slice < p.in_features ? begin + inputs_per_slice : p.in_features;
      const GroupSteps steps(begin, end, chunks, p.base_weight != nullptr);
      float sums[kColumns / 2] = {};
      // Of two steps: one's is made while the products of the other's are under way.
      uint32_t left[2][2][4], metadata[2];
      GroupStep now{0, begin, 0}, coming = now;
      int stage = 0, next_stage = kGroupStages - 2;
      barrier();
      for (int s = 0; s < kGroupStages - 2; ++s) {
        if (s < steps.all) stage_for_groups<kSparse, kColumns>(a, coming, end, o0, stages + s * kStageNumbers);
        commit_copies();
        coming.advance(steps);
      }
      // This step's weights are there, for everybody; those of the step before last, which nobody reads any more, make room.
      auto turn_stages = [&] {
        wait_for_copies<kGroupStages - 3>();
        show_to_tensor_cores();
        barrier();
        if (coming.number < steps.all) stage_for_groups<kSparse, kColumns>(a, coming, end, o0, stages + next_stage * kStageNumbers);
        commit_copies();
        coming.advance(steps);
        now.advance(steps);
        const uint64_t weights = first_stage + uint64_t(stage * (kGroupStageBytes<kColumns> >> 4));
        stage = stage + 1 < kGroupStages ? stage + 1 : 0;
        next_stage = next_stage + 1 < kGroupStages ? next_stage + 1 : 0;
        return weights;
      };

      // Items of half h of the inputs; their x is loaded a group of inputs ahead.
      const int64_t row = b0 + g + 8 * (q & 1);
      Item items[2];
      Point points[2];
      KAN_UNROLL_ALL
      for (int h = 0; h < 2; ++h) points[h] = load_point(p, row, begin + 2 * h + (q >> 1));
      while (now.number < steps.of_spline) {
        KAN_UNROLL_ALL
        for (int turn = 0; turn < 2; ++turn) {
          if (now.chunk == 0) {
            KAN_UNROLL_ALL
            for (int h = 0; h < 2; ++h) {
              const int64_t i = now.input + 2 * h + (q >> 1);
              items[h] = item_at(a, row, i < end ? i : p.in_features, points[h]);
              points[h] = load_point(p, row, i + kStepInputs);
            }
          }
          const int first_base = now.chunk * kStepBases;
          const int shifts[2] = {items[0].first - first_base, items[1].first - first_base};
          uint32_t windows[2][2];
          KAN_UNROLL_ALL
          for (int h = 0; h < 2; ++h) {
            const float(&w)[4] = items[h].w;
            windows[h][0] = pack<P>(w[0], w[kSparse ? 2 : 1]);
            windows[h][1] = pack<P>(w[kSparse ? 1 : 2], w[3]);
          }
          if constexpr (kSparse) {
            half_sparse(windows, shifts, lane, left[turn][0], metadata[turn]);
          } else {
            KAN_UNROLL_ALL
            for (int h = 0; h < 2; ++h) half_dense<P>(windows[h], shifts[h], lane, left[turn][h]);
          }
          const uint64_t weights = turn_stages();
          order_registers();
          if constexpr (kSparse) {
            multiply_group_sparse<P>(sums, left[turn][0], weights, metadata[turn]);
          } else {
            multiply_group<P>(sums, left[turn][0], weights);
            multiply_group<P>(sums, left[turn][1], weights + kSixteenRows);
          }
          commit_products();
          wait_for_products<1>();
        }
      }
      // Products of two shapes may not be under way on the same sums.
      wait_for_products<0>();
      while (now.number < steps.all) {
        KAN_UNROLL_ALL
        for (int turn = 0; turn < 2; ++turn) {
          write_base_values<16>(a, b0, now.input, end, lane, base_values);
          KAN_UNROLL_ALL
          for (int k = 0; k < 2; ++k)
            load_matrices(left[turn][k], base_values + (lane & 15) * kBasePitch + 16 * k + (lane >> 4) * 8);
          const uint64_t weights = turn_stages();
          order_registers();
          multiply_group<P>(sums, left[turn][0], weights);
          multiply_group<P>(sums, left[turn][1], weights + kSixteenRows);
          commit_products();
          wait_for_products<1>();
        }
      }
      wait_for_products<0>();
      wait_for_copies<0>();

      KAN_UNROLL_ALL
      for (int j = 0; j < kColumns / 8; ++j)
        KAN_UNROLL_ALL
        for (int r = 0; r < 4; ++r) {
          const int64_t b = b0 + g + 8 * (r >> 1), o = o0 + 8 * j + 2 * q + (r & 1);
          if (b >= p.batch || o >= p.out_features) continue;
          if (parts != nullptr) parts[(slice * p.batch + b) * p.out_features + o] = sums[4 * j + r];
          else put(static_cast<T*>(p.y)[b * p.out_features + o], sums[4 * j + r]);
        }
    }
#else
  __trap();  // never launched: launch.cpp asks for the architecture and for the build
#endif
}

template <Products P, bool kSparse>
int launch_output_warpgroup(const WideArguments& a, int columns, float* parts, Slices slices, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_cubics(a, stream)) return error;
  const Blocks blocks{(p.batch + kGroupRows - 1) / kGroupRows, (p.out_features + columns - 1) / columns, slices.count};
  if (columns == 256)
    return launch(output_warpgroup<P, kSparse, 256>, blocks, kGroupThreads, kGroupShared<256>, stream, a, parts, slices.count, slices.rows);
  return launch(output_warpgroup<P, kSparse, 128>, blocks, kGroupThreads, kGroupShared<128>, stream, a, parts, slices.count, slices.rows);
}

}  // namespace kan::cuda
