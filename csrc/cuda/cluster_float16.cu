#include "cluster_input.cuh"
#include "cluster_output.cuh"
#include "cluster_weight.cuh"

namespace kan::cuda {

extern template int launch_add_parts<Float16>(const Problem&, int, const TileCut&, const float*, void*);  // warpgroup_backward_float16.cu has it

template int launch_output_cluster<Products::float16>(const WideArguments&, void*);
template int launch_input_cluster<Products::float16>(const WideArguments&, void*);
template int launch_weight_cluster<Products::float16>(const WideArguments&, float*, TileCut, void*);

}  // namespace kan::cuda
