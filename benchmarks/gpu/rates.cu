// How fast each tensor-core instruction issues on this GPU, operands in registers (B of wgmma in shared memory; of
// the kernels' own both forms): the ceiling of any kernel made of it. Prints a row of JSON for each. Sparse forms count the full, dense work.
#include <cstdio>
#include <cuda_runtime.h>

#include "instructions.cuh"

namespace {

constexpr int blocks_per_sm = 4, chains = 8;

template <class Instruction>
__global__ void __launch_bounds__(128) repeat_mma(float* out, int iterations) {
  uint32_t a[4] = {threadIdx.x, 1, 2, 3}, b[4] = {5, 6, 7, 8};
  float c[chains][4] = {};  // independent sums, so that the latency of one hides behind the others
  for (int i = 0; i < iterations; ++i)
#pragma unroll
    for (int j = 0; j < chains; ++j) Instruction::run(c[j], a, b, 0x44444444u);
  float sum = 0;
  for (int j = 0; j < chains; ++j) sum += c[j][0] + c[j][1] + c[j][2] + c[j][3];
  out[blockIdx.x * 128 + threadIdx.x] = sum;
}

#define FOUR(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define SIXTEEN(i) FOUR(i), FOUR(i + 4), FOUR(i + 8), FOUR(i + 12)
#define SUMS                                                                                                        \
  "{%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29," \
  "%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57," \
  "%58,%59,%60,%61,%62,%63}"

struct Wgmma128Bf16 {
  static constexpr const char* name = "wgmma m64n128k16 bf16";
  static constexpr int k = 16, columns = 128;
  static constexpr bool of_kernel = false;
  [[maybe_unused]] static __device__ void run(float (&c)[64], const uint32_t (&a)[4], uint64_t b, uint64_t) {
    PROBE_WGMMA("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 " SUMS ", {%64,%65,%66,%67}, %68, 1, 1, 1, 0;"
                : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

struct Wgmma128Tf32 {
  static constexpr const char* name = "wgmma m64n128k8 tf32";
  static constexpr int k = 8, columns = 128;
  static constexpr bool of_kernel = false;
  [[maybe_unused]] static __device__ void run(float (&c)[64], const uint32_t (&a)[4], uint64_t b, uint64_t) {
    PROBE_WGMMA("wgmma.mma_async.sync.aligned.m64n128k8.f32.tf32.tf32 " SUMS ", {%64,%65,%66,%67}, %68, 1, 1, 1;"
                : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
  }
};

struct Wgmma128SparseBf16 {
  static constexpr const char* name = "wgmma.sp m64n128k32 bf16";
  static constexpr int k = 32, columns = 128;
  static constexpr bool of_kernel = false;
  [[maybe_unused]] static __device__ void run(float (&c)[64], const uint32_t (&a)[4], uint64_t b, uint64_t) {
    PROBE_WGMMA("wgmma.mma_async.sp.sync.aligned.m64n128k32.f32.bf16.bf16 " SUMS
                ", {%64,%65,%66,%67}, %68, %69, 0, 1, 1, 1, 0;"
                : SIXTEEN(0), SIXTEEN(16), SIXTEEN(32), SIXTEEN(48)
                : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(0x44444444u));
  }
};

// The kernels' own, on tiles as csrc/cuda/warpgroup_tile.cuh describes them: the left operand in registers (RS) or, as a tile of
// its own, in shared memory (SS); the right one by lines at one depth, or with the depth contiguous.
template <int kColumns, bool kRegisters, bool kByLines>
struct KernelBf16 {
  static constexpr int k = 16, columns = kColumns;
  static constexpr bool of_kernel = true;
  static constexpr const char* name =
      kColumns == 256 ? kRegisters ? kByLines ? "kernel's wgmma m64n256k16 bf16, RS, by lines" : "kernel's wgmma m64n256k16 bf16, RS, by depth"
                                   : kByLines ? "kernel's wgmma m64n256k16 bf16, SS, by lines" : "kernel's wgmma m64n256k16 bf16, SS, by depth"
                      : kRegisters ? kByLines ? "kernel's wgmma m64n128k16 bf16, RS, by lines" : "kernel's wgmma m64n128k16 bf16, RS, by depth"
                                   : kByLines ? "kernel's wgmma m64n128k16 bf16, SS, by lines" : "kernel's wgmma m64n128k16 bf16, SS, by depth";
  [[maybe_unused]] static __device__ void run(float (&c)[kColumns / 2], const uint32_t (&a)[4], uint64_t b, uint64_t left) {
    if constexpr (kRegisters) kan::cuda::wgmma_bfloat16<kByLines>(c, a, b);
    else kan::cuda::wgmma_bfloat16<false, kByLines>(c, left, b);
  }
};
struct Kernel256SparseBf16 {
  static constexpr const char* name = "kernel's wgmma.sp m64n256k32 bf16";
  static constexpr int k = 32, columns = 256;
  static constexpr bool of_kernel = true;
  [[maybe_unused]] static __device__ void run(float (&c)[128], const uint32_t (&a)[4], uint64_t b, uint64_t) {
    kan::cuda::wgmma_sparse_bfloat16(c, a, b, 0x44444444u);
  }
};

template <class Instruction>
__global__ void __launch_bounds__(128) repeat_wgmma(float* out, int iterations) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  // The kernels' tiles are 64 deep, whatever is read of them; the left one has 64 rows.
  constexpr bool of_kernel = Instruction::of_kernel;
  constexpr int deep = of_kernel ? 64 : 32, right_words = Instruction::columns * deep / 2, words = right_words + (of_kernel ? 64 * deep / 2 : 0);
  __shared__ __align__(1024) uint32_t tile[words];
  for (int i = threadIdx.x; i < words; i += 128) tile[i] = 0;
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  uint32_t a[4] = {threadIdx.x, 1, 2, 3};
  float c[Instruction::columns / 2] = {};
  // Core matrices of K neighbours 128 bytes apart, of N neighbours as far as the tile's whole K.
  const uint64_t b = of_kernel ? kan::cuda::describe_tile(reinterpret_cast<const char*>(tile)) : probe::descriptor(tile, 128, 512);
  const uint64_t left = of_kernel ? kan::cuda::describe_tile(reinterpret_cast<const char*>(tile + right_words)) : 0;
  for (int i = 0; i < iterations; ++i) {
    probe::warpgroup_fence();
#pragma unroll
    for (int j = 0; j < chains; ++j) Instruction::run(c, a, b, left);
    probe::warpgroup_commit();
    probe::warpgroup_wait();
  }
  float sum = 0;
  for (float one : c) sum += one;
  out[blockIdx.x * 128 + threadIdx.x] = sum;
#endif
}

// flop_a_block: work of one iteration of one block.
void measure(const char* name, void (*kernel)(float*, int), double flop_a_block) {
  cudaDeviceProp device;
  cudaGetDeviceProperties(&device, 0);
  const int blocks = device.multiProcessorCount * blocks_per_sm;
  float* out = nullptr;
  cudaMalloc(&out, blocks * 128 * sizeof(float));
  cudaEvent_t start, end;
  cudaEventCreate(&start);
  cudaEventCreate(&end);
  int iterations = 200;
  float milliseconds = 0;
  for (int attempt = 0; attempt < 4 && milliseconds < 20; ++attempt, iterations *= 10) {
    cudaEventRecord(start);
    kernel<<<blocks, 128>>>(out, iterations);
    cudaEventRecord(end);
    cudaEventSynchronize(end);
    cudaEventElapsedTime(&milliseconds, start, end);
    if (milliseconds >= 20 || attempt == 3) break;
  }
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess)
    std::printf("{\"what\": \"rates\", \"instruction\": \"%s\", \"failed\": \"%s\"}\n", name, cudaGetErrorString(error));
  else
    std::printf("{\"what\": \"rates\", \"instruction\": \"%s\", \"tflops\": %.1f, \"device\": \"cuda\", \"device_name\": \"%s\"}\n",
                name, flop_a_block * iterations * blocks / milliseconds / 1e9, device.name);
  cudaFree(out);
}

template <class Instruction>
void measure_mma() {
  measure(Instruction::name, repeat_mma<Instruction>, 4.0 * chains * 2 * 16 * 8 * Instruction::k);
}

template <class Instruction>
void measure_wgmma() {
  measure(Instruction::name, repeat_wgmma<Instruction>, 1.0 * chains * 2 * 64 * Instruction::columns * Instruction::k);
}

}  // namespace

int main() {
  cudaDeviceProp device{};
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    std::printf("no CUDA device: %s\n", cudaGetErrorString(cudaGetLastError()));
    return 2;
  }
  measure_mma<probe::MmaTf32>();
  measure_mma<probe::MmaBf16>();
  measure_mma<probe::MmaFp16>();
  measure_mma<probe::MmaSparseTf32>();
  measure_mma<probe::MmaSparseBf16>();
  if (device.major == 9) {
    measure_wgmma<Wgmma128Tf32>();
    measure_wgmma<Wgmma128Bf16>();
    measure_wgmma<Wgmma128SparseBf16>();
    measure_wgmma<KernelBf16<256, true, true>>();
    measure_wgmma<KernelBf16<256, true, false>>();
    measure_wgmma<KernelBf16<256, false, true>>();
    measure_wgmma<KernelBf16<256, false, false>>();
    measure_wgmma<KernelBf16<128, true, true>>();
    measure_wgmma<KernelBf16<128, false, true>>();
    measure_wgmma<KernelBf16<128, false, false>>();
    measure_wgmma<Kernel256SparseBf16>();
  }
  return 0;
}
