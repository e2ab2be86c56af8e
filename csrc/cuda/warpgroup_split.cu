#include "warpgroup_input.cuh"
#include "warpgroup_split_output.cuh"
#include "warpgroup_split_weight.cuh"

namespace kan::cuda {

int launch_output_split(const WideArguments& a, const Halves& h, float* parts, Slices slices, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_halves(p, Operation::output, h, stream)) return error;
  if (int error = launch_cubics(a, stream)) return error;
  const Blocks blocks{(p.batch + kGroupRows - 1) / kGroupRows, (p.out_features + kSplitColumns - 1) / kSplitColumns, slices.count};
  return launch(output_split, blocks, kGroupThreads, kSplitShared, stream, a, h, parts, slices.count, slices.rows);
}

// By the kernel of float16, whose depth is the halves' pitch.
int launch_input_split(WideArguments a, const Halves& h, void* stream) {
  if (int error = launch_halves(a.p, Operation::input, h, stream)) return error;
  a.p.spline_weight = h.spline, a.p.base_weight = h.base, a.p.g = h.g;
  a.p.out_features = split_pitch(a.p.out_features);
  a.aligned = true;
  return launch_input_warpgroup<Products::float16x3>(a, h.rows, stream);
}

int launch_weight_split(const WideArguments& a, const Halves& h, float* parts, Slices slices, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_halves(p, Operation::weight, h, stream)) return error;
  if (int error = launch_cubics(a, stream)) return error;
  const Blocks blocks{weight_tiles(p), (p.out_features + kSplitColumns - 1) / kSplitColumns, slices.count};
  float* spline = parts == nullptr ? static_cast<float*>(p.d_spline) : parts;
  float* base = parts == nullptr ? static_cast<float*>(p.d_base) : parts + slices.count * p.in_features * p.bases() * p.out_features;
  return launch(weight_split, blocks, kGroupThreads, kSplitShared, stream, a, h, spline, base, slices.count, slices.rows);
}

}  // namespace kan::cuda
