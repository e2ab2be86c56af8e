#include "warpgroup_split_input.cuh"
#include "warpgroup_split_output.cuh"
#include "warpgroup_split_weight.cuh"

namespace kan::cuda {

int launch_output_split(const WideArguments& a, const Halves& h, float* parts, Slices slices, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_operands(a, Operation::output, h, stream)) return error;
  const Blocks blocks{(p.batch + kGroupRows - 1) / kGroupRows, (p.out_features + kSplitColumns - 1) / kSplitColumns, slices.count};
  return launch(a.quick.serves ? output_split<true> : output_split<false>, blocks, kGroupThreads, kSplitShared, stream, a, h, parts,
                slices.count, slices.rows);
}

int launch_input_split(const WideArguments& a, const Halves& h, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_operands(a, Operation::input, h, stream)) return error;
  const int64_t inputs = inputs_of_split_tile(p);
  const Blocks blocks{(p.batch + kGroupRows - 1) / kGroupRows, (p.in_features + inputs - 1) / inputs};
  return launch(input_split, blocks, kGroupThreads, kSplitInputShared, stream, a, h);
}

int launch_weight_split(const WideArguments& a, const Halves& h, float* parts, TileCut cut, void* stream) {
  const Problem& p = a.p;
  if (int error = launch_operands(a, Operation::weight, h, stream)) return error;
  if (int error = launch(a.quick.serves ? weight_split<true> : weight_split<false>, Blocks{cut.blocks()}, kGroupThreads, kSplitShared,
                         stream, a, h, parts, cut))
    return error;
  return launch_add_parts<float>(p, kSplitColumns, cut, parts, stream);
}

}  // namespace kan::cuda
