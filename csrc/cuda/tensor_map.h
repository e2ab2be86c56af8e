// What the copy engine of compute capability 9.0 has to know of a tensor before it copies boxes out of it.
#pragma once
#include <cstdint>

namespace kan::cuda {

// CUtensorMap; a kernel takes it as KAN_ARGUMENT.
struct alignas(64) TensorMap {
  uint64_t opaque[16];
};

// A tensor of 16-bit numbers (sizes[2], sizes[1], sizes[0]), the last contiguous; the others' strides in bytes, multiples of 16, as
// `numbers` is. Boxes: at most 256 along each axis, 64 along the last, whose lines of 128 bytes lie in shared memory as warpgroup_tile.cuh
// says ("128-byte swizzle", by the address). What of a box lies outside the tensor becomes zeros.
struct Boxes {
  const void* numbers;
  int64_t sizes[3], strides[2];
  int box[3];
};

// tensor_map.cpp, by the driver; the emulation of the tests has one of its own. Throws std::runtime_error where the driver refuses.
TensorMap map_tensor(const Boxes&);

}  // namespace kan::cuda
