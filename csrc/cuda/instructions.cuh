// What only nvcc understands, one function for each instruction, and how a kernel is launched. The emulation in tests/ has a
// twin of this file with the same guard, so that all other files compile unchanged as ordinary C++.
#ifndef KAN_CUDA_INSTRUCTIONS
#define KAN_CUDA_INSTRUCTIONS

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace kan::cuda {

#define KAN_DEVICE __device__ __forceinline__

// The dynamic shared memory of the block.
template <class T> KAN_DEVICE T* shared_memory() {
  extern __shared__ __align__(128) unsigned char kan_shared_bytes[];
  return reinterpret_cast<T*>(kan_shared_bytes);
}

// A grid of blocks. Kernels walk over y and z in strides of the grid, whose sides end at 65535; x reaches 2^31 - 1.
struct Blocks {
  int64_t x, y = 1, z = 1;
};

// Queues a kernel; the result is a cudaError_t.
template <class... Parameters, class... Arguments>
inline int launch(void (*kernel)(Parameters...), Blocks blocks, int threads, size_t shared, void* stream,
                  const Arguments&... arguments) {
  if (shared > 48 * 1024) {
    cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  const dim3 grid(unsigned(blocks.x), unsigned(blocks.y < 65535 ? blocks.y : 65535), unsigned(blocks.z < 65535 ? blocks.z : 65535));
  kernel<<<grid, dim3(unsigned(threads)), shared, static_cast<cudaStream_t>(stream)>>>(arguments...);
  return cudaGetLastError();
}

KAN_DEVICE void barrier() { __syncthreads(); }
KAN_DEVICE void warp_barrier() { __syncwarp(); }
template <class T> KAN_DEVICE T shuffle_xor(T value, int mask) { return __shfl_xor_sync(0xffffffffu, value, mask); }
template <class T> KAN_DEVICE T shuffle(T value, int lane) { return __shfl_sync(0xffffffffu, value, lane); }

// 1 / x to an ulp; unlike the division it has no slow path, whose call would make the caller spill.
KAN_DEVICE float reciprocal(float x) {
  float r;
  asm("rcp.approx.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
KAN_DEVICE double reciprocal(double x) { return 1 / x; }

KAN_DEVICE uint16_t to_bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
KAN_DEVICE uint16_t to_float16(float value) { return __half_as_ushort(__float2half_rn(value)); }
KAN_DEVICE float from_float16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
KAN_DEVICE float from_bfloat16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

}  // namespace kan::cuda

#endif
