#include "wide_input.cuh"
#include "wide_weight.cuh"

namespace kan::cuda {

template int launch_input_wide<Products::bfloat16>(const WideArguments&, void*);
template int launch_weight_wide<Products::bfloat16>(const WideArguments&, int, float*, Slices, void*);

}  // namespace kan::cuda
