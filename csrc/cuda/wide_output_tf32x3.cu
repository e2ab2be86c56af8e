#include "wide_output.cuh"

namespace kan::cuda {

template int launch_output_wide<Products::tf32x3, false>(const WideArguments&, int, float*, Slices, void*);
template int launch_output_wide<Products::tf32x3, true>(const WideArguments&, int, float*, Slices, void*);

}  // namespace kan::cuda
