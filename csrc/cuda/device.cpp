#include "device.h"

#include <cuda_runtime_api.h>

#include <mutex>
#include <stdexcept>
#include <string>
#include <vector>

namespace kan::cuda {

namespace {

int attribute(cudaDeviceAttr what, int index) {
  int value = 0;
  if (const cudaError_t error = cudaDeviceGetAttribute(&value, what, index); error != cudaSuccess)
    throw std::runtime_error(std::string("kan_fast: CUDA: ") + cudaGetErrorString(error));
  return value;
}

}  // namespace

const Device& device(int index) {
  static std::mutex mutex;
  static std::vector<Device*> known;  // kept for the life of the process: references stay good
  const std::lock_guard<std::mutex> lock(mutex);
  if (index >= int(known.size())) known.resize(size_t(index) + 1);
  if (known[size_t(index)] == nullptr)
    known[size_t(index)] = new Device{
        10 * attribute(cudaDevAttrComputeCapabilityMajor, index) + attribute(cudaDevAttrComputeCapabilityMinor, index),
        attribute(cudaDevAttrMultiProcessorCount, index), attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
  return *known[size_t(index)];
}

const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace kan::cuda
