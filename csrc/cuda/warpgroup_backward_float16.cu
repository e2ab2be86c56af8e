#include "warpgroup_input.cuh"
#include "warpgroup_weight.cuh"

namespace kan::cuda {

template int launch_input_warpgroup<Products::float16>(const WideArguments&, int, void*);
template int launch_weight_warpgroup<Products::float16>(const WideArguments&, int, float*, TileCut, void*);
template int launch_add_parts<Float16>(const Problem&, int, const TileCut&, const float*, void*);

}  // namespace kan::cuda
