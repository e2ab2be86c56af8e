// For tests/test_ptx_cluster.py: what kernels do with clusters, signals and boxes, in little. Which flaw a kernel has is for the
// test to say.
#include "cuda/cluster.cuh"

namespace kan::cuda {

constexpr int kStages = 2, kReaders = 64, kLine = 128;

// Where in a cluster of across x down blocks what comes from, and what its signals are told. `place`: of the first stage, in bytes.
struct Fetch {
  int across, down, lines, steps, x, y, arrivals, bytes, place;
};

// The blocks of a row share one operand, those of a column another: of a step's boxes each block sends its part to all that share it. Two
// warps write down what has come, as it lies there, and say to all who may send them something that it may be overwritten.
__global__ void fetch(KAN_ARGUMENT TensorMap map, const Fetch f, uint32_t* to) {
  Signal* full = shared_memory<Signal>();
  Signal* empty = full + kStages;
  const int rank = block_of_cluster(), i = rank % f.across, j = rank / f.across;
  const int box = f.lines * kLine, stage_bytes = (f.across + f.down) * box;
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < kStages; ++stage) prepare(full + stage, 1), prepare(empty + stage, f.arrivals);
    show_signals();
  }
  meet_cluster();
  if (threadIdx.x == kReaders) {
    int row = 0, column = 0;
    for (int b = 0; b < f.across; ++b) row |= 1 << (j * f.across + b);
    for (int b = 0; b < f.down; ++b) column |= 1 << (b * f.across + i);
    for (int step = 0; step < f.steps; ++step) {
      const int stage = step % kStages, x = f.x + 64 * step + 8 * (int(blockIdx.x) / f.across);
      char* first = shared_memory<char>() + f.place + stage * stage_bytes;
      char* second = first + f.across * box;
      wait_for(empty + stage, uint32_t(step / kStages + 1) % 2);
      announce_bytes(full + stage, f.bytes);
      if (f.across > 1) copy_box(first + i * box, map, x, f.y + (j * f.across + i) * f.lines, 0, full + stage, row);
      else copy_box(first, map, x, f.y + j * f.lines, 0, full + stage);
      if (f.down > 1) copy_box(second + j * box, map, x, f.y + (i * f.down + j) * f.lines, 1, full + stage, column);
      else copy_box(second, map, x, f.y + i * f.lines, 1, full + stage);
    }
  } else if (threadIdx.x < kReaders) {
    to += int64_t(blockIdx.y * gridDim.x + blockIdx.x) * f.steps * (stage_bytes / 4);
    for (int step = 0; step < f.steps; ++step) {
      const int stage = step % kStages;
      const uint32_t* words = reinterpret_cast<const uint32_t*>(shared_memory<char>() + f.place + stage * stage_bytes);
      wait_for(full + stage, uint32_t(step / kStages) % 2);
      for (int n = int(threadIdx.x); n < stage_bytes / 4; n += kReaders) *(to + step * (stage_bytes / 4) + n) = words[n];
      warp_barrier();
      if (threadIdx.x % 32 == 0) {
        for (int b = 0; b < f.across; ++b) arrive_at(empty + stage, j * f.across + b);
        for (int b = 0; b < f.down; ++b)
          if (b != j) arrive_at(empty + stage, b * f.across + i);
      }
    }
  }
  meet_cluster();
}

// A box that a block brings itself, twice to the same place.
enum Flaw { kNone, kReadsEarly, kWritesEarly, kWritesBefore, kWritesAndShows, kNoBarrier, kLeaves, kWrongParity, kOverSignal, kOnePhase, kOneOfTwo };
__global__ void bring(KAN_ARGUMENT TensorMap map, const int flaw, const int bytes, uint32_t* to) {
  Signal* signal = shared_memory<Signal>();
  volatile uint32_t* words = reinterpret_cast<volatile uint32_t*>(shared_memory<char>() + 1024);
  char* box = shared_memory<char>() + (flaw == kOverSignal ? 0 : 1024);
  if (threadIdx.x == 0) prepare(signal, 1), prepare(signal + 1, 1), show_signals();
  if (flaw == kWritesBefore || flaw == kWritesAndShows) words[threadIdx.x] = 0;
  if (flaw == kWritesAndShows) show_to_tensor_cores();
  barrier();
  if (flaw == kOneOfTwo && threadIdx.x == 0) announce_bytes(signal + 1, bytes), copy_box(box + 8 * kLine, map, 0, 0, 0, signal + 1);
  for (int turn = 0; turn < 2; ++turn) {
    if (threadIdx.x == 0) announce_bytes(signal, bytes), copy_box(box, map, 0, 0, turn, signal);
    if (flaw == kReadsEarly) to[threadIdx.x] = words[threadIdx.x];
    if (flaw == kWritesEarly) words[threadIdx.x] = 0;
    if (flaw == kLeaves) return;
    if (flaw == kOnePhase && turn == 1) return;
    wait_for(signal, uint32_t(turn) ^ uint32_t(flaw == kWrongParity));
    to[turn * blockDim.x + threadIdx.x] = words[threadIdx.x];
    if (flaw != kNoBarrier) barrier();
  }
}

// left (64 x 64) right^T (64 x 128) of a warpgroup, as they come: sums as its threads hold them. again: flaws, the right operand is
// sent for once more, or one thread waits for a phase that does not end.
__global__ void multiply(KAN_ARGUMENT TensorMap left, KAN_ARGUMENT TensorMap right, const int again, float* to) {
  Signal* signal = shared_memory<Signal>();
  char* stage = shared_memory<char>() + (1024 - shared_address(shared_memory<char>()) % 1024) % 1024 + 1024;
  if (threadIdx.x == 0) prepare(signal, 1), show_signals();
  barrier();
  if (threadIdx.x == 0) {
    announce_bytes(signal, (64 + 128) * kLine);
    copy_box(stage, left, 0, 0, 0, signal);
    copy_box(stage + 64 * kLine, right, 0, 0, 0, signal);
  }
  wait_for(signal, 0);
  auto describe = [](const char* tile, int k) {
    return uint64_t(shared_address(tile) + 32 * k) >> 4 | uint64_t(8 * kLine >> 4) << 32 | uint64_t(1) << 62;
  };
  if (again == 2 && threadIdx.x == 0) wait_for(signal, 1);
  float sums[64] = {};
  order_registers();
  KAN_UNROLL_ALL
  for (int k = 0; k < 4; ++k) wgmma_bfloat16<false, false>(sums, describe(stage, k), describe(stage + 64 * kLine, k));
  commit_products();
  if (again == 1 && threadIdx.x == 0) announce_bytes(signal, 128 * kLine), copy_box(stage + 64 * kLine, right, 0, 0, 0, signal);
  wait_for_products<0>();
  KAN_UNROLL_ALL
  for (int r = 0; r < 64; ++r) to[threadIdx.x * 64 + r] = sums[r];
}

// One block of a cluster of two arrives so many times at the signal of the other, which waits for one phase. waiting < 0: one lane of a
// block at that of another lane.
__global__ void hasten(const int arrivals, const int waiting, uint32_t* to) {
  Signal* signal = shared_memory<Signal>();
  if (threadIdx.x == 0) prepare(signal, 1), show_signals();
  meet_cluster();
  if (waiting < 0 ? threadIdx.x == 0 : block_of_cluster() == waiting) wait_for(signal, 0);
  else if (threadIdx.x == (waiting < 0))
    for (int n = 0; n < arrivals; ++n) arrive_at(signal, waiting < 0 ? 0 : waiting);
  if (threadIdx.x == 0) to[blockIdx.x] = 16 + blockIdx.x;
  meet_cluster();
}

}  // namespace kan::cuda
