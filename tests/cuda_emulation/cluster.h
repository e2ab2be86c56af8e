// Clusters, signals ("mbarrier") and the copy engine ("TMA"), written from the PTX ISA: 9.7.13.15, 9.7.9.27, 9.7.13.4.
//
// The copy engine is as slow as can be: a copy's place reads as NaN from the start, and its bytes come when no thread can go on without
// them, those of one copy and one block at a time. Threads that reach into another block may be slow too. It is an error if a signal
// is used that was not prepared and shown, if more arrives in a phase than it was prepared for or told of, if a copy writes where a
// thread's write was not shown to it, and if anything reaches a block that has ended or is on its way when its block ends.
#define KAN_CUDA_CLUSTER
#pragma once

#include "cuda/tensor_map.h"

namespace kan::cuda {

struct alignas(8) Signal {
  uint64_t state;
};

}  // namespace kan::cuda

namespace kan::emulation {

// What TensorMap::opaque holds here; of the rest of its 128 bytes nothing is read.
struct Map {
  const void* numbers;
  int64_t sizes[3], strides[2];
  int32_t box[3];
  uint32_t magic;
};
constexpr uint32_t kMap = 0x6b616e6d;

// What a prepared signal's bytes are; what it stands at is kept in cluster.cpp.
constexpr uint64_t kPrepared = 0x7fbadbad6e616b73;

// In runtime.cpp. Of all threads; the one that calls stops until no other can go on, or not: that is left to chance.
int block_of_cluster();
void meet_cluster();
void step_aside();

// In cluster.cpp. `block` is a number within the cluster.
void begin_signals();
void end_signals();  // of the block whose last thread ends
void forget_signals();
void* there(void* own, size_t bytes, int block);  // what lies in another block where `own` does in this one
void prepare(cuda::Signal*, int arrivals);
void show_signals();
void arrive_at(cuda::Signal*, int block, int bytes);  // which are announced first
void wait_for(cuda::Signal*, uint32_t parity);

// A box on its way to `shared`, of whichever block.
struct Box {
  Map map;
  int x, y, z;
  char* shared;
  int bytes;
};
Box box_of(const cuda::TensorMap&, int x, int y, int z, void* shared);
// Its place is NaN by then.
void copy_box_later(const Box&, cuda::Signal*, int block);

// The signal of that block. These reads are instrumented, as the write by which it is prepared is.
inline cuda::Signal* prepared(cuda::Signal* own, int block) {
  auto* signal = static_cast<cuda::Signal*>(there(own, sizeof *own, block));
  if (reinterpret_cast<uintptr_t>(signal) % 8 != 0) fail("a misaligned signal");
  if (signal->state != kPrepared) fail("a signal is used that was not prepared, or was written over");
  return signal;
}

}  // namespace kan::emulation

namespace kan::cuda {

inline int block_of_cluster() { return emulation::block_of_cluster(); }
inline void meet_cluster() {
  int nothing = 0;
  emulation::with_warp("meet_cluster", &nothing, [](void* const*) {});
  emulation::meet_cluster();
}

inline void prepare(Signal* signal, int arrivals) {
  emulation::prepare(signal, arrivals);
  signal->state = emulation::kPrepared;
}
inline void show_signals() { emulation::show_signals(); }
inline void announce_bytes(Signal* signal, int bytes) {
  const int block = block_of_cluster();
  emulation::arrive_at(emulation::prepared(signal, block), block, bytes);
}
inline void arrive_at(Signal* signal, int block) {
  if (block != block_of_cluster()) emulation::step_aside();
  emulation::arrive_at(emulation::prepared(signal, block), block, 0);
}
inline void wait_for(Signal* signal, uint32_t parity) { emulation::wait_for(emulation::prepared(signal, block_of_cluster()), parity); }

// The NaN is written by instrumented code: whoever reads or writes there must have been waited for.
inline void copy_box(void* shared, const TensorMap& map, int x, int y, int z, Signal* signal, int blocks) {
  if (blocks <= 0) emulation::fail("a copy to no block");
  if (blocks != 1 << block_of_cluster()) emulation::step_aside();
  emulation::Box box = emulation::box_of(map, x, y, z, shared);
  for (int block = 0; blocks >> block != 0; ++block) {
    if ((blocks >> block & 1) == 0) continue;
    box.shared = static_cast<char*>(emulation::there(shared, size_t(box.bytes), block));
    Signal* signal_there = emulation::prepared(signal, block);
    for (int i = 0; i < box.bytes / 4; ++i) reinterpret_cast<uint32_t*>(box.shared)[i] = 0x7fbadbadu;
    emulation::copy_box_later(box, signal_there, block);
  }
}
inline void copy_box(void* shared, const TensorMap& map, int x, int y, int z, Signal* signal) {
  copy_box(shared, map, x, y, z, signal, 1 << block_of_cluster());
}

}  // namespace kan::cuda
