// What only nvcc understands, one function for each instruction, and how a kernel is launched. The emulation in tests/ has a
// twin of this file with the same guard, so that all other files compile unchanged as ordinary C++.
#ifndef KAN_CUDA_INSTRUCTIONS
#define KAN_CUDA_INSTRUCTIONS

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <math.h>

#include <cstdint>

namespace kan::cuda {

#define KAN_DEVICE __device__ __forceinline__
#define KAN_UNROLL_ALL _Pragma("unroll")
#define KAN_NO_UNROLL _Pragma("unroll 1")
// A function of its own, for what runs once in a block; and a kernel's argument whose address may be given to one.
#define KAN_DEVICE_CALL __device__ __noinline__
#define KAN_ARGUMENT const __grid_constant__

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

// threadIdx.x, read here and now: what is computed from it does not stay in registers from one step to the next.
KAN_DEVICE unsigned thread_now() {
  unsigned r;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(r));
  return r;
}
// A pointer, computed here and now: it is kept in a register, not computed anew wherever it is used.
template <class T> KAN_DEVICE T* pointer_now(T* pointer) {
  asm volatile("" : "+l"(pointer));
  return pointer;
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
// Where neither x nor 1 / x is denormal: one instruction.
KAN_DEVICE float reciprocal_of_normal(float x) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
KAN_DEVICE double reciprocal_of_normal(double x) { return 1 / x; }
// 2^x to two ulp, denormals as zero.
KAN_DEVICE float power_of_two(float x) {
  float r;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(x));
  return r;
}
KAN_DEVICE double power_of_two(double x) { return exp2(x); }

// x within [low, high]; NaN stays NaN.
KAN_DEVICE float held(float x, float low, float high) {
  float above, r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(above) : "f"(x), "f"(low));
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(above), "f"(high));
  return r;
}
KAN_DEVICE double held(double x, double low, double high) { return x < low ? low : x > high ? high : x; }
// The larger of two, NaN if one is.
KAN_DEVICE float larger(float a, float b) {
  float r;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
  return r;
}
KAN_DEVICE double larger(double a, double b) { return a > b || a != a ? a : b; }

KAN_DEVICE uint32_t high_half_of_product(uint32_t a, uint32_t b) { return __umulhi(a, b); }
KAN_DEVICE uint16_t to_bfloat16(float value) { return __bfloat16_as_ushort(__float2bfloat16_rn(value)); }
KAN_DEVICE uint16_t to_float16(float value) { return __half_as_ushort(__float2half_rn(value)); }
KAN_DEVICE float from_float16(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
KAN_DEVICE float from_bfloat16(uint16_t bits) { return __uint_as_float(uint32_t(bits) << 16); }

// Two numbers in one register, the first in the low half.
KAN_DEVICE uint32_t pack_bfloat16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
KAN_DEVICE uint32_t pack_float16(float low, float high) {
  uint32_t r;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// The same, cut off towards 0.
KAN_DEVICE uint32_t pack_float16_cut(float low, float high) {
  uint32_t r;
  asm("cvt.rz.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
  return r;
}
// Rounded to the 11 bits that tensor cores read of a float32 number.
KAN_DEVICE uint32_t to_tf32(float value) {
  uint32_t r;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(r) : "f"(value));
  return r;
}
// By any number of bits: 64 and more leave nothing.
KAN_DEVICE uint64_t shift_left(uint64_t value, uint32_t bits) {
  uint64_t r;
  asm("shl.b64 %0, %1, %2;" : "=l"(r) : "l"(value), "r"(bits));
  return r;
}
KAN_DEVICE uint64_t shift_right(uint64_t value, uint32_t bits) {
  uint64_t r;
  asm("shr.b64 %0, %1, %2;" : "=l"(r) : "l"(value), "r"(bits));
  return r;
}
// Four bytes chosen of eight, by the four digits of `selector`; a digit with 8 added fills its byte with the sign of the chosen one.
KAN_DEVICE uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t r;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(r) : "r"(low), "r"(high), "r"(selector));
  return r;
}
// 0 where `by` is not within 0 .. 31.
KAN_DEVICE uint32_t shift_word_left(uint32_t value, int by) { return __funnelshift_lc(0u, value, uint32_t(by)); }
KAN_DEVICE uint32_t shift_word_right(uint32_t value, int by) { return __funnelshift_rc(value, 0u, uint32_t(by)); }
// The upper word of both after a shift to the left by 0 .. 32 bits.
KAN_DEVICE uint32_t shift_words_left(uint32_t low, uint32_t high, uint32_t by) { return __funnelshift_lc(low, high, by); }
KAN_DEVICE float as_float(uint32_t bits) { return __uint_as_float(bits); }
KAN_DEVICE uint32_t as_bits(float value) { return __float_as_uint(value); }

// 16 bytes from global to shared memory, or as many zeros, when `global` is not read and may be anywhere; they are there once their
// group has been waited for.
KAN_DEVICE void copy_16_bytes(void* shared, const void* global, bool zeros) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(uint32_t(__cvta_generic_to_shared(shared))),
               "l"(global), "r"(zeros ? 0 : 16)
               : "memory");
}
KAN_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsLeft> KAN_DEVICE void wait_for_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsLeft) : "memory"); }

// Four 8 x 8 matrices of 16-bit numbers: lane 8 m + r names row r of matrix m. In matrix m the lane then holds row lane / 4,
// columns 2 (lane % 4) and the next; transposed: column lane / 4, those rows.
KAN_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}
KAN_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}
// An 8 x 8 matrix of 16-bit numbers that a warp holds in that layout, transposed.
KAN_DEVICE uint32_t transpose_matrix(uint32_t a) {
  uint32_t r;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(r) : "r"(a));
  return r;
}

// c (16 x 8) += a b, float32 sums. With g = lane / 4, q = lane % 4 a lane holds of c: (g, 2q), (g, 2q + 1), (g + 8, 2q),
// (g + 8, 2q + 1). 16-bit a (16 x 16): (g, 2q ..), (g + 8, 2q ..), (g, 2q + 8 ..), (g + 8, 2q + 8 ..), two columns each;
// b (16 x 8): rows 2q .., 2q + 8 .. of column g. tf32 a (16 x 8): (g, q), (g + 8, q), (g, q + 4), (g + 8, q + 4); b (8 x 8):
// rows q, q + 4 of column g. Sparse a is stored with half its columns in the same layout, and b has twice the rows.
#define KAN_MMA(name, shape, type)                                                                                   \
  KAN_DEVICE void name(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {                            \
    asm volatile("mma.sync.aligned." shape ".row.col.f32." type "." type                                             \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"                              \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                                    \
  }
KAN_MMA(mma_bfloat16, "m16n8k16", "bf16")
KAN_MMA(mma_float16, "m16n8k16", "f16")
KAN_MMA(mma_tf32, "m16n8k8", "tf32")
#undef KAN_MMA

// e: which columns of the sparse a are stored, four bits for each group of four (16-bit) or two (tf32), in ascending order
// of columns; rows g in the low half, rows g + 8 in the high half; lane 0 of each quad for the first half of the columns,
// lane 1 for the second.
#define KAN_MMA_SPARSE(name, shape, type)                                                                            \
  KAN_DEVICE void name(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) {                  \
    asm volatile("mma.sp::ordered_metadata.sync.aligned." shape ".row.col.f32." type "." type                        \
                 ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, 0x0;"          \
                 : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(e));  \
  }
KAN_MMA_SPARSE(mma_sparse_bfloat16, "m16n8k32", "bf16")
KAN_MMA_SPARSE(mma_sparse_float16, "m16n8k32", "f16")
KAN_MMA_SPARSE(mma_sparse_tf32, "m16n8k16", "tf32")
#undef KAN_MMA_SPARSE

}  // namespace kan::cuda

#endif
