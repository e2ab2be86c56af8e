#include "tensor_map.h"

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <stdexcept>
#include <string>

namespace kan::cuda {

namespace {

// The driver's own function, found at run time: libcuda is not linked, so that machines without a driver load this library too.
using Encode = decltype(&cuTensorMapEncodeTiled);

Encode find_encode() {
  void* found = nullptr;
  cudaDriverEntryPointQueryResult answer{};
#if CUDART_VERSION >= 12050
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &answer);
#else
  const cudaError_t error = cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &answer);
#endif
  if (error != cudaSuccess || answer != cudaDriverEntryPointSuccess || found == nullptr)
    throw std::runtime_error("kan_fast: CUDA: the driver has no cuTensorMapEncodeTiled");
  return reinterpret_cast<Encode>(found);
}

}  // namespace

TensorMap map_tensor(const Boxes& boxes) {
  static_assert(sizeof(TensorMap) == sizeof(CUtensorMap));
  static const Encode encode = find_encode();
  TensorMap map;
  cuuint64_t sizes[3], strides[2];
  cuuint32_t box[3], steps[3] = {1, 1, 1};
  for (int axis = 0; axis < 3; ++axis) sizes[axis] = cuuint64_t(boxes.sizes[axis]), box[axis] = cuuint32_t(boxes.box[axis]);
  for (int axis = 0; axis < 2; ++axis) strides[axis] = cuuint64_t(boxes.strides[axis]);
  // Bits are copied, whatever they mean: one 16-bit type serves all.
  const CUresult result =
      encode(reinterpret_cast<CUtensorMap*>(&map), CU_TENSOR_MAP_DATA_TYPE_UINT16, 3, const_cast<void*>(boxes.numbers), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) throw std::runtime_error("kan_fast: CUDA: cuTensorMapEncodeTiled failed with " + std::to_string(int(result)));
  return map;
}

}  // namespace kan::cuda
