// How large the tiles of a launch are, and how its sums are cut: for each family of kernels, from the problem and the GPU.
#pragma once
#include "launch.h"

namespace kan::cuda {

// launch.cpp says what they are.
enum class Family { any, narrow, dense, sparse, wgmma, wgmma_sparse, cluster };
inline bool is_warpgroup(Family family) { return family >= Family::wgmma; }

inline size_t compute_size(const Problem& p) { return p.weight_dtype == kFloat64 ? 8 : 4; }
inline size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }
// Of the wide kernels, which compute in float32.
inline size_t size_of_described(const Problem& p) { return rounded(size_t(p.in_features) * sizeof(Described<float>)); }

// Columns of a tile, 128 or 256, of wide kernels and those of warpgroups.
int columns_of_output(Family, const Problem&);
int columns_of_weight(const Problem&);
int columns_of_input(const Problem&, const Device&);

struct OutputPlan {
  int columns;
  Slices slices;
};
OutputPlan plan_output(Family, const Problem&, const Device&);
// contract_weight of wide kernels; cut_of_weight (launch.h) is for those of warpgroups.
Slices slices_of_weight(const Problem&, const Device&);

// The kernels for every problem.
AnyTile tile_of_output_any(const Problem&, const Device&);
AnyTile tile_of_input_any(const Problem&, const Device&);
Slices slices_of_output_any(const Problem&, const Device&);
Slices slices_any(const Problem&, const Device&);  // contract_weight

}  // namespace kan::cuda
