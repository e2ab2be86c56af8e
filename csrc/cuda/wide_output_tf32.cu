#include "wide_output.cuh"

namespace kan::cuda {

template int launch_output_wide<Products::tf32, false>(const WideArguments&, int, float*, Slices, void*);
template int launch_output_wide<Products::tf32, true>(const WideArguments&, int, float*, Slices, void*);

}  // namespace kan::cuda
