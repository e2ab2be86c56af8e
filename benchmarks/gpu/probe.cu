// Each tensor-core instruction once, on random fragments, against its host twin, bit for bit. Ends with 1 if any differs.
#include <cstdio>
#include <cuda_runtime.h>

#include "instructions.cuh"
#include "twins.h"

namespace {

template <class Instruction>
__global__ void run_mma(const uint32_t* a, const uint32_t* b, const uint32_t* e, float* c) {
  const int lane = threadIdx.x;
  uint32_t left[4], right[4];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = a[lane * 4 + i];
    right[i] = b[lane * 4 + i];
    sums[i] = c[lane * 4 + i];
  }
  Instruction::run(sums, left, right, e[lane]);
  for (int i = 0; i < 4; ++i) c[lane * 4 + i] = sums[i];
}

// found (lane, 9): four registers of ldmatrix, four of its transposing form, and movmatrix of the first. matrices: four of
// 8 x 8 16-bit numbers.
__global__ void run_matrix_moves(const uint32_t* matrices, uint32_t* found) {
  __shared__ __align__(16) uint32_t tile[4 * 8 * 4];
  const int lane = threadIdx.x;
  for (int i = lane; i < 4 * 8 * 4; i += 32) tile[i] = matrices[i];
  __syncwarp();
  uint32_t plain[4], transposed[4];
  kan::cuda::load_matrices(plain, tile + lane * 4);  // lane 8 m + r names row r of matrix m: the rows follow each other
  kan::cuda::load_matrices_transposed(transposed, tile + lane * 4);
  for (int i = 0; i < 4; ++i) {
    found[lane * 9 + i] = plain[i];
    found[lane * 9 + 4 + i] = transposed[i];
  }
  found[lane * 9 + 8] = kan::cuda::transpose_matrix(plain[0]);
}

// a, e, c: four warps one after the other. b: the words of the shared tile, core matrices along K.
template <class Instruction>
__global__ void run_wgmma(const uint32_t* a, const uint32_t* b, const uint32_t* e, float* c, int b_words) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ __align__(128) uint32_t tile[8 * 32];
  const int thread = threadIdx.x;
  for (int i = thread; i < b_words; i += 128) tile[i] = b[i];
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncthreads();
  uint32_t left[4];
  float sums[4];
  for (int i = 0; i < 4; ++i) {
    left[i] = a[thread * 4 + i];
    sums[i] = c[thread * 4 + i];
  }
  probe::warpgroup_fence();
  Instruction::run(sums, left, probe::descriptor(tile, 128, 128), e[thread]);
  probe::warpgroup_commit();
  probe::warpgroup_wait();
  for (int i = 0; i < 4; ++i) c[thread * 4 + i] = sums[i];
#endif
}

// As run_wgmma, c (128, 64): right two panels of 64 lines, swizzled.
constexpr int panel_words = kan::cuda::kPanelBytes / 4;
template <class Instruction>
__global__ void run_kernels_wgmma(const uint32_t* a, const uint32_t* right, const uint32_t* e, float* c) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL
  __shared__ __align__(1024) uint32_t tiles[2 * panel_words];
  const int thread = threadIdx.x;
  for (int i = thread; i < 2 * panel_words; i += 128) tiles[i] = right[i];
  kan::cuda::show_to_tensor_cores();
  __syncthreads();
  uint32_t registers[4];
  float sums[64];
  for (int i = 0; i < 4; ++i) registers[i] = a[thread * 4 + i];
  for (int i = 0; i < 64; ++i) sums[i] = c[thread * 64 + i];
  kan::cuda::order_registers();
  Instruction::run(sums, registers, kan::cuda::describe_tile(reinterpret_cast<const char*>(tiles)), e[thread]);
  kan::cuda::commit_products();
  kan::cuda::wait_for_products<0>();
  for (int i = 0; i < 64; ++i) c[thread * 64 + i] = sums[i];
#endif
}

template <class T>
struct OnDevice {
  T* data = nullptr;
  size_t bytes;
  OnDevice(const T* host, size_t count) : bytes(count * sizeof(T)) {
    cudaMalloc(&data, bytes);
    cudaMemcpy(data, host, bytes, cudaMemcpyHostToDevice);
  }
  ~OnDevice() { cudaFree(data); }
  void read(T* host) const { cudaMemcpy(host, data, bytes, cudaMemcpyDeviceToHost); }
};

constexpr int repeats = 50;

int report(const char* name, int differing) {
  const cudaError_t error = cudaGetLastError();
  if (error != cudaSuccess) {
    std::printf("%-24s FAILED: %s\n", name, cudaGetErrorString(error));
    return 1;
  }
  std::printf("%-24s %s\n", name, differing ? "DIFFERS from its twin" : "agrees with its twin, bit for bit");
  return differing != 0;
}

// Where the PTX ISA puts the numbers of ldmatrix and movmatrix.
int probe_matrix_moves() {
  uint16_t matrices[4][8][8];
  for (int i = 0; i < 4 * 64; ++i) matrices[i / 64][i / 8 % 8][i % 8] = static_cast<uint16_t>(1000 + i);
  uint32_t words[4 * 8 * 4], found[32][9] = {};
  std::memcpy(words, matrices, sizeof words);
  OnDevice<uint32_t> source(words, 4 * 8 * 4), target(&found[0][0], 32 * 9);
  run_matrix_moves<<<1, 32>>>(source.data, target.data);
  target.read(&found[0][0]);
  int differing[3] = {};
  for (int lane = 0; lane < 32; ++lane)
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4, column = 2 * (lane % 4) + half;
      const auto is = [&](int index, uint16_t value) { return (found[lane][index] >> 16 * half & 0xffff) == value; };
      for (int m = 0; m < 4; ++m) {
        differing[0] += !is(m, matrices[m][row][column]);
        differing[1] += !is(4 + m, matrices[m][column][row]);
      }
      differing[2] += !is(8, matrices[0][column][row]);
    }
  return report("ldmatrix x4", differing[0]) + report("ldmatrix x4 trans", differing[1]) +
         report("movmatrix trans", differing[2]);
}

template <class Instruction>
int probe_mma(twin::Form form) {
  twin::Random random{2};
  int differing = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    twin::Sample sample = twin::sample(form, random);
    OnDevice<uint32_t> a(&sample.warp.a[0][0], 128), b(&sample.warp.b[0][0], 128), e(sample.warp.e, 32);
    OnDevice<float> c(&sample.warp.c[0][0], 128);
    run_mma<Instruction><<<1, 32>>>(a.data, b.data, e.data, c.data);
    float found[32][4];
    c.read(&found[0][0]);
    twin::multiply(sample.warp, form);
    differing += std::memcmp(found, sample.warp.c, sizeof found) != 0;
  }
  return report(Instruction::name, differing);
}

template <class Instruction>
int probe_wgmma(twin::Form form) {
  twin::Random random{3};
  int differing = 0;
  const int element_bytes = form.type == twin::Type::tf32 ? 4 : 2, per_core = 16 / element_bytes;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    const twin::Sample shared = twin::sample(form, random);  // its B serves all four warps
    twin::Warp warps[4];
    uint32_t a[128][4], e[128];
    float c[128][4];
    for (int w = 0; w < 4; ++w) {
      warps[w] = twin::sample(form, random).warp;
      std::memcpy(warps[w].b, shared.warp.b, sizeof warps[w].b);
      std::memcpy(a + 32 * w, warps[w].a, sizeof warps[w].a);
      std::memcpy(e + 32 * w, warps[w].e, sizeof warps[w].e);
      std::memcpy(c + 32 * w, warps[w].c, sizeof warps[w].c);
    }
    uint32_t tile[8 * 32] = {};
    auto* bytes = reinterpret_cast<unsigned char*>(tile);
    for (int k = 0; k < form.k; ++k)
      for (int column = 0; column < 8; ++column) {
        const uint32_t bits = twin::encode(form.type, shared.b[k * 8 + column]);
        std::memcpy(bytes + k / per_core * 128 + column * 16 + k % per_core * element_bytes, &bits, element_bytes);
      }
    const int words = form.k * 8 * element_bytes / 4;
    OnDevice<uint32_t> da(&a[0][0], 512), db(tile, words), de(e, 128);
    OnDevice<float> dc(&c[0][0], 512);
    run_wgmma<Instruction><<<1, 128>>>(da.data, db.data, de.data, dc.data, words);
    dc.read(&c[0][0]);
    for (int w = 0; w < 4; ++w) {
      twin::multiply(warps[w], form);
      differing += std::memcmp(c + 32 * w, warps[w].c, sizeof warps[w].c) != 0;
    }
  }
  return report(Instruction::name, differing);
}

// Number k of row or column n of an operand, in words: PTX ISA, "Shared Memory Matrix Layout", 128-byte swizzle. By lines, a line is
// one depth; else one row or column.
void put_number(uint32_t* words, bool by_lines, int n, int k, uint16_t bits) {
  const int line = by_lines ? k : n, number = by_lines ? n % 64 : k, panel = by_lines ? n / 64 : 0;
  auto* bytes = reinterpret_cast<unsigned char*>(words);
  std::memcpy(bytes + panel * 8192 + line * 128 + (number / 8 ^ line % 8) * 16 + number % 8 * 2, &bits, 2);
}

// One twin for each warp's rows and 8 columns.
template <class Instruction>
int probe_kernels_wgmma(twin::Form form) {
  twin::Random random{4};
  int differing = 0;
  for (int repeat = 0; repeat < repeats; ++repeat) {
    twin::Sample lefts[4], rights[16];
    uint32_t a[128][4], e[128], right[2 * panel_words] = {};
    float c[128][64];
    auto bits = [&](float value) { return static_cast<uint16_t>(twin::encode(form.type, value)); };
    for (int w = 0; w < 4; ++w) {
      lefts[w] = twin::sample(form, random);
      std::memcpy(a + 32 * w, lefts[w].warp.a, sizeof lefts[w].warp.a);
      std::memcpy(e + 32 * w, lefts[w].warp.e, sizeof lefts[w].warp.e);
    }
    for (int j = 0; j < 16; ++j) {
      rights[j] = twin::sample(form, random);
      for (int k = 0; k < form.k; ++k)
        for (int column = 0; column < 8; ++column)
          put_number(right, Instruction::by_lines, 8 * j + column, k, bits(rights[j].b[k * 8 + column]));
    }
    for (auto& thread : c)
      for (float& sum : thread) sum = random.integer();
    OnDevice<uint32_t> da(&a[0][0], 512), dr(right, 2 * panel_words), de(e, 128);
    OnDevice<float> dc(&c[0][0], 128 * 64);
    run_kernels_wgmma<Instruction><<<1, 128>>>(da.data, dr.data, de.data, dc.data);
    float found[128][64];
    dc.read(&found[0][0]);
    for (int w = 0; w < 4; ++w)
      for (int j = 0; j < 16; ++j) {
        twin::Warp warp = lefts[w].warp;
        std::memcpy(warp.b, rights[j].warp.b, sizeof warp.b);
        for (int lane = 0; lane < 32; ++lane) std::memcpy(warp.c[lane], c[32 * w + lane] + 4 * j, sizeof warp.c[lane]);
        twin::multiply(warp, form);
        for (int lane = 0; lane < 32; ++lane)
          differing += std::memcmp(warp.c[lane], found[32 * w + lane] + 4 * j, sizeof warp.c[lane]) != 0;
      }
  }
  return report(Instruction::name, differing);
}

}  // namespace

int main() {
  cudaDeviceProp device{};
  if (cudaGetDeviceProperties(&device, 0) != cudaSuccess) {
    std::printf("no CUDA device: %s\n", cudaGetErrorString(cudaGetLastError()));
    return 2;
  }
  std::printf("%s, compute capability %d.%d\n", device.name, device.major, device.minor);
  using twin::Type;
  int wrong = probe_mma<probe::MmaTf32>({Type::tf32, 8, false});
  wrong += probe_mma<probe::MmaBf16>({Type::bf16, 16, false});
  wrong += probe_mma<probe::MmaFp16>({Type::fp16, 16, false});
  wrong += probe_mma<probe::MmaSparseBf16>({Type::bf16, 32, true});
  wrong += probe_mma<probe::MmaSparseFp16>({Type::fp16, 32, true});
  wrong += probe_mma<probe::MmaSparseTf32>({Type::tf32, 16, true});
  wrong += probe_matrix_moves();
  if (device.major == 9) {
    wrong += probe_wgmma<probe::WgmmaBf16>({Type::bf16, 16, false});
    wrong += probe_wgmma<probe::WgmmaFp16>({Type::fp16, 16, false});
    wrong += probe_wgmma<probe::WgmmaTf32>({Type::tf32, 8, false});
    wrong += probe_wgmma<probe::WgmmaSparseBf16>({Type::bf16, 32, true});
    wrong += probe_kernels_wgmma<probe::KernelBf16>({Type::bf16, 16, false});
    wrong += probe_kernels_wgmma<probe::KernelFp16>({Type::fp16, 16, false});
    wrong += probe_kernels_wgmma<probe::InputBf16>({Type::bf16, 16, false});
    wrong += probe_kernels_wgmma<probe::InputFp16>({Type::fp16, 16, false});
    wrong += probe_kernels_wgmma<probe::KernelSparseBf16>({Type::bf16, 32, true});
    wrong += probe_kernels_wgmma<probe::KernelSparseFp16>({Type::fp16, 32, true});
  } else {
    std::printf("wgmma: only on compute capability 9.0, not probed\n");
  }
  return wrong != 0;
}
