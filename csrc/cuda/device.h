// What ops.cpp asks of the CUDA runtime.
#pragma once
#include "../kernels.h"

namespace kan::cuda {

const Device& device(int index);     // throws std::runtime_error where there is none
const char* error_text(int error);  // of a cudaError_t

}  // namespace kan::cuda
