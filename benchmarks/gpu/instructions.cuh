// Tensor-core instructions that the kernels use or may come to use, one device function each. D += A B, float32 sums.
#pragma once

#include <cstdint>

// The instructions of the kernels are probed as the kernels have them.
#include "../../csrc/cuda/instructions.cuh"
#include "../../csrc/cuda/warpgroup_tile.cuh"

namespace probe {

// a, b: packed fragments of one lane, c: four sums of one lane, e: metadata of a sparse A (selector 0).
struct MmaTf32 {
  static constexpr const char* name = "mma m16n8k8 tf32";
  static constexpr int k = 8, a_registers = 4, b_registers = 2;
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t) {
    kan::cuda::mma_tf32(c, a, b[0], b[1]);
  }
};

struct MmaBf16 {
  static constexpr const char* name = "mma m16n8k16 bf16";
  static constexpr int k = 16, a_registers = 4, b_registers = 2;
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t) {
    kan::cuda::mma_bfloat16(c, a, b[0], b[1]);
  }
};

struct MmaFp16 {
  static constexpr const char* name = "mma m16n8k16 fp16";
  static constexpr int k = 16, a_registers = 4, b_registers = 2;
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t) {
    kan::cuda::mma_float16(c, a, b[0], b[1]);
  }
};

struct MmaSparseBf16 {
  static constexpr const char* name = "mma.sp m16n8k32 bf16";
  static constexpr int k = 32, a_registers = 4, b_registers = 4;
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {
    kan::cuda::mma_sparse_bfloat16(c, a, b, e);
  }
};

struct MmaSparseFp16 {
  static constexpr const char* name = "mma.sp m16n8k32 fp16";
  static constexpr int k = 32, a_registers = 4, b_registers = 4;
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {
    kan::cuda::mma_sparse_float16(c, a, b, e);
  }
};

struct MmaSparseTf32 {
  static constexpr const char* name = "mma.sp m16n8k16 tf32";
  static constexpr int k = 16, a_registers = 4, b_registers = 4;
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {
    kan::cuda::mma_sparse_tf32(c, a, b, e);
  }
};

// Hopper's warpgroup instructions (sm_90a only), A in registers, B (N x K, K fastest) in shared memory.
// On other architectures the functions exist and do nothing: the host code that never launches them still compiles.
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
#define PROBE_WGMMA(...) asm volatile(__VA_ARGS__)
#else
#define PROBE_WGMMA(...)
#endif

// Descriptor of B without swizzle: core matrices of 8 columns x 16 bytes, contiguous; `along_k` and `along_n` are the
// distances in bytes between neighbours in K and in N.
__device__ inline uint64_t descriptor(const void* shared, uint32_t along_k, uint32_t along_n) {
  const uint64_t address = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  return (address & 0x3ffff) >> 4 | static_cast<uint64_t>(along_k >> 4) << 16 | static_cast<uint64_t>(along_n >> 4) << 32;
}

__device__ inline void warpgroup_fence() { PROBE_WGMMA("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_commit() { PROBE_WGMMA("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ inline void warpgroup_wait() { PROBE_WGMMA("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

struct WgmmaBf16 {
  static constexpr const char* name = "wgmma m64n8k16 bf16";
  static constexpr int k = 16;
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], uint64_t b, uint32_t) {
    PROBE_WGMMA(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

struct WgmmaFp16 {
  static constexpr const char* name = "wgmma m64n8k16 fp16";
  static constexpr int k = 16;
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], uint64_t b, uint32_t) {
    PROBE_WGMMA(
        "wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1, 0;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

struct WgmmaTf32 {
  static constexpr const char* name = "wgmma m64n8k8 tf32";
  static constexpr int k = 8;
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], uint64_t b, uint32_t) {
    PROBE_WGMMA(
        "wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, 1, 1, 1;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

struct WgmmaSparseBf16 {
  static constexpr const char* name = "wgmma.sp m64n8k32 bf16";
  static constexpr int k = 32;
  static __device__ void run(float (&c)[4], const uint32_t (&a)[4], uint64_t b, uint32_t e) {
    PROBE_WGMMA(
        "wgmma.mma_async.sp.sync.aligned.m64n8k32.f32.bf16.bf16 {%0,%1,%2,%3}, {%4,%5,%6,%7}, %8, %9, 0, 1, 1, 1, 0;"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(e));
  }
};

// Those of the kernels themselves, whose left operand is in registers, on 128 columns of tiles as csrc/cuda/warpgroup_tile.cuh
// describes them: whether these lie by lines at one depth.
#define PROBE_KERNEL(Name, title, depth, lines, ...)                                                                        \
  struct Name {                                                                                                             \
    static constexpr const char* name = title;                                                                              \
    static constexpr int k = depth;                                                                                         \
    static constexpr bool by_lines = lines;                                                                                 \
    static __device__ void run(float (&c)[64], const uint32_t (&a)[4], uint64_t right, [[maybe_unused]] const uint32_t& e) { \
      kan::cuda::__VA_ARGS__;                                                                                                  \
    }                                                                                                                       \
  };
PROBE_KERNEL(KernelBf16, "output's and weight's wgmma bf16", 16, true, wgmma_bfloat16<true>(c, a, right))
PROBE_KERNEL(KernelFp16, "output's and weight's wgmma fp16", 16, true, wgmma_float16<true>(c, a, right))
PROBE_KERNEL(InputBf16, "input's wgmma bf16", 16, false, wgmma_bfloat16<false>(c, a, right))
PROBE_KERNEL(InputFp16, "input's wgmma fp16", 16, false, wgmma_float16<false>(c, a, right))
PROBE_KERNEL(KernelSparseBf16, "output's wgmma.sp bf16", 32, true, wgmma_sparse_bfloat16(c, a, right, e))
PROBE_KERNEL(KernelSparseFp16, "output's wgmma.sp fp16", 32, true, wgmma_sparse_float16(c, a, right, e))
#undef PROBE_KERNEL

}  // namespace probe
