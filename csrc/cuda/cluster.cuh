// The instructions of clusters: blocks that run at once and write each other's shared memory, signals between them, and the copy engine,
// which takes one read of global memory to all of them ("TMA", "multicast"). sm_90a only.
// As with instructions.cuh, the emulation in tests/ has a twin of this file with the same guard.
//
// Written by the PTX ISA: 9.7.13.15 "mbarrier", 9.7.9.27 "Tensor copy", 9.7.13.4 "barrier.cluster".
#ifndef KAN_CUDA_CLUSTER
#define KAN_CUDA_CLUSTER

#include "tensor_map.h"
#include "warpgroup.cuh"

#if KAN_WARPGROUPS
#define KAN_ASM(...) asm volatile(__VA_ARGS__)
#else
#define KAN_ASM(...)
#endif

namespace kan::cuda {

// The number of this block within its cluster: x first.
KAN_DEVICE int block_of_cluster() {
  uint32_t r = 0;
  KAN_ASM("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
  return int(r);
}
// All threads of the cluster. What they wrote before is seen behind it, in all its shared memories.
KAN_DEVICE void meet_cluster() {
  KAN_ASM("barrier.cluster.arrive.release.aligned;" ::: "memory");
  KAN_ASM("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// In shared memory: ends a phase, and begins the next, once as many threads have arrived as it was prepared for, and all bytes that
// were announced have been copied.
struct alignas(8) Signal {
  uint64_t state;
};
// By one thread; then show_signals() by the same, then meet_cluster() by all.
KAN_DEVICE void prepare(Signal* signal, int arrivals) {
  KAN_ASM("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(signal)), "r"(arrivals) : "memory");
}
KAN_DEVICE void show_signals() { KAN_ASM("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// One arrival at this block's own, and so many bytes more before the phase may end; some of them may have come already.
KAN_DEVICE void announce_bytes(Signal* signal, int bytes) {
  KAN_ASM("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(signal)), "r"(bytes) : "memory");
}
// One arrival at that of block `block` of the cluster, which lies where this block's does. It says that products have read what the copy
// engine may now write; what this thread wrote others see within its block alone (".cta", the default: ".cluster" is a fence of the whole GPU).
KAN_DEVICE void arrive_at(Signal* signal, int block) {
  KAN_ASM("{ .reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; mbarrier.arrive.shared::cluster.b64 _, [there]; }" ::"r"(
              shared_address(signal)),
          "r"(block)
          : "memory");
}
// A try may last a while; so many mean that nobody will come, and end the launch with an error in place of a GPU that hangs.
constexpr uint32_t kMostTries = 1u << 24;
// Until the phase of that parity has ended: phases are counted from 0, and that before the first has. Nobody may be two phases behind. What
// the copy engine wrote is seen then, and what threads of this block wrote before they arrived.
KAN_DEVICE void wait_for(Signal* signal, uint32_t parity) {
  KAN_ASM(
      "{ .reg .pred ended; .reg .b32 tries; mov.b32 tries, %2;\n"
      "AGAIN: mbarrier.try_wait.parity.shared::cta.b64 ended, [%0], %1;\n"
      "@ended bra DONE; sub.u32 tries, tries, 1; setp.eq.u32 ended, tries, 0; @!ended bra AGAIN; trap;\n"
      "DONE: }" ::"r"(shared_address(signal)),
      "r"(parity), "n"(kMostTries)
      : "memory");
}

// The box of `map` that begins at number x of row y of matrix z, to shared memory, a multiple of 128 bytes: by the copy engine, on its own.
// Its bytes are counted at `signal` when they are there. Whoever waits for that may read them, tensor cores too.
KAN_DEVICE void copy_box(void* shared, const TensorMap& map, int x, int y, int z, Signal* signal) {
  KAN_ASM("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];" ::"r"(
              shared_address(shared)),
          "l"(&map), "r"(shared_address(signal)), "r"(x), "r"(y), "r"(z)
          : "memory");
}
// The same to all blocks of the cluster whose bit is set in `blocks`: to where it would lie in this one's, and counted at the signal there.
KAN_DEVICE void copy_box(void* shared, const TensorMap& map, int x, int y, int z, Signal* signal, int blocks) {
  KAN_ASM(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1, {%4, %5, %6}], [%2], "
      "%3;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(shared_address(signal)), "h"(uint16_t(blocks)), "r"(x), "r"(y), "r"(z)
      : "memory");
}

// Queues a kernel whose blocks come in clusters, so many along each axis; the grid's sides are multiples. The result is a cudaError_t.
template <class... Parameters, class... Arguments>
inline int launch_clusters(void (*kernel)(Parameters...), Blocks blocks, Blocks cluster, int threads, size_t shared, void* stream,
                           const Arguments&... arguments) {
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)); error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {unsigned(cluster.x), unsigned(cluster.y), unsigned(cluster.z)};
  auto side = [](int64_t length, int64_t of_cluster) { return unsigned(length < 65535 ? length : 65535 / of_cluster * of_cluster); };
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(unsigned(blocks.x), side(blocks.y, cluster.y), side(blocks.z, cluster.z));
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, Parameters(arguments)...);
}

#undef KAN_ASM

}  // namespace kan::cuda

#endif
