#include "warpgroup_input.cuh"
#include "warpgroup_weight.cuh"

namespace kan::cuda {

template int launch_input_warpgroup<Products::float16>(const WideArguments&, int, void*);
template int launch_weight_warpgroup<Products::float16>(const WideArguments&, int, float*, TileCut, void*);

}  // namespace kan::cuda
