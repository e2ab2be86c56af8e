// Runs CUDA kernels as ordinary C++, one cluster of blocks at a time, one fiber for each thread. Included before every source
// file of csrc/cuda, whose instructions.cuh it stands in for: each instruction is spelled out on the lanes of a warp.
//
// What hardware lets pass in silence ends the launch with an error: threads that miss a barrier or a warp-wide instruction,
// asynchronous copies still under way when a thread ends, misaligned copies. Shared memory starts as NaN, and is
// again where a copy is under way until it is waited for, and a warp runs as far ahead of the others as barriers let it, as a block
// does of those of its cluster.
#define KAN_CUDA_INSTRUCTIONS
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <string>

#define __global__
#define __grid_constant__
#define __launch_bounds__(...)
#define KAN_DEVICE inline
#define KAN_UNROLL_ALL
#define KAN_NO_UNROLL
#define KAN_DEVICE_CALL
#define KAN_ARGUMENT
#define threadIdx (kan::emulation::self->thread)
#define blockIdx (kan::emulation::block)
#define gridDim (kan::emulation::grid)

namespace kan::emulation {

struct Index {
  unsigned x, y, z;
};
struct Thread {
  Index thread;
  int lane, warp;
  int block;  // its number among the blocks of the launch that have begun
};
extern Thread* self;
extern Index block, grid;  // and the shared memory: those of the thread that runs
extern char* shared;
extern size_t shared_bytes;

[[noreturn]] void fail(const std::string& what);
void run_blocks(Index blocks, Index cluster, int threads, size_t shared_bytes, const std::function<void()>& kernel);

// Who is told of every launch in place of running it: the kernel, the grid as hardware has it, the sides of a cluster, and `count`
// arguments.
using Observer = void (*)(const void* kernel, const int64_t* blocks, const int64_t* cluster, int threads, size_t shared,
                          const void* const* arguments, const size_t* sizes, int count);
extern Observer observer;
void wait_at_barrier(const void* place);
void meet(int id, int threads);
void arrive(int id, int threads);
// Hands in `mine`; the lane of a warp that comes last runs the instruction on what all 32 handed in.
void with_warp(const char* name, void* mine, const std::function<void(void* const* lanes)>& instruction);
void copy_later(std::function<void()> copy);
void commit_copies();
void wait_for_copies(int groups_left);

// warpgroup.cpp: what is under way begins and ends with a block; a copy has arrived.
void begin_block(int threads);
void end_thread();
void end_block(int number);
void end_launch();
void note_copy(const void* shared);

}  // namespace kan::emulation

namespace kan::cuda {

struct Blocks {
  int64_t x, y = 1, z = 1;
};

// Sides y and z, which hardware ends at 65535, end at 2 here, or at one cluster's, so that small problems make kernels walk.
template <class... Parameters, class... Arguments>
inline int launch_clusters(void (*kernel)(Parameters...), Blocks blocks, Blocks cluster, int threads, size_t shared, void*,
                           const Arguments&... arguments) {
  const int64_t of_cluster[3] = {cluster.x, cluster.y, cluster.z};
  auto side = [&](int axis, int64_t length, int64_t longest) {
    const int64_t step = of_cluster[axis];
    if (step < 1 || length % step != 0) emulation::fail("a side of the grid is no multiple of the cluster's");
    return length < longest ? length : longest / step * step;
  };
  if (emulation::observer != nullptr) {
    const int64_t grid[3] = {side(0, blocks.x, blocks.x), side(1, blocks.y, 65535), side(2, blocks.z, 65535)};
    [&](const Parameters&... given) {
      const void* const all[] = {&given...};
      const size_t sizes[] = {sizeof given...};
      emulation::observer(reinterpret_cast<const void*>(kernel), grid, of_cluster, threads, shared, all, sizes, int(sizeof...(given)));
    }(arguments...);
    return 0;
  }
  const emulation::Index grid{unsigned(side(0, blocks.x, blocks.x)), unsigned(side(1, blocks.y, cluster.y > 1 ? cluster.y : 2)),
                              unsigned(side(2, blocks.z, cluster.z > 1 ? cluster.z : 2))};
  const emulation::Index sides{unsigned(cluster.x), unsigned(cluster.y), unsigned(cluster.z)};
  emulation::run_blocks(grid, sides, threads, shared, [&] { kernel(arguments...); });
  return 0;
}
template <class... Parameters, class... Arguments>
inline int launch(void (*kernel)(Parameters...), Blocks blocks, int threads, size_t shared, void* stream, const Arguments&... arguments) {
  return launch_clusters(kernel, blocks, Blocks{1}, threads, shared, stream, arguments...);
}

template <class T> T* shared_memory() { return reinterpret_cast<T*>(emulation::shared); }

inline unsigned thread_now() { return threadIdx.x; }
template <class T> T* pointer_now(T* pointer) { return pointer; }
__attribute__((noinline)) inline void barrier() { emulation::wait_at_barrier(__builtin_return_address(0)); }
inline void warp_barrier() {
  int nothing = 0;
  emulation::with_warp("warp_barrier", &nothing, [](void* const*) {});
}

template <class T> T exchange(const char* name, T value, int source) {
  struct Lane {
    T value, result;
    int source;
  } mine{value, value, source};
  emulation::with_warp(name, &mine, [](void* const* lanes) {
    for (int lane = 0; lane < 32; ++lane) {
      Lane& to = *static_cast<Lane*>(lanes[lane]);
      to.result = static_cast<Lane*>(lanes[to.source])->value;
    }
  });
  return mine.result;
}
template <class T> T shuffle_xor(T value, int mask) { return exchange("shuffle_xor", value, emulation::self->lane ^ mask); }
template <class T> T shuffle(T value, int lane) { return exchange("shuffle", value, lane & 31); }

inline float reciprocal(float x) { return 1 / x; }
inline double reciprocal(double x) { return 1 / x; }
inline float reciprocal_of_normal(float x) { return 1 / x; }
inline double reciprocal_of_normal(double x) { return 1 / x; }
inline float power_of_two(float x) { return std::exp2(x); }
inline double power_of_two(double x) { return std::exp2(x); }
template <class C> C held(C x, C low, C high) { return x < low ? low : x > high ? high : x; }
template <class C> C larger(C a, C b) { return a > b || a != a ? a : b; }

inline uint32_t high_half_of_product(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t(bits) << 16); }
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if (value != value) return uint16_t(0x7fff);
  return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline float from_float16(uint16_t bits) { return float(std::bit_cast<_Float16>(bits)); }
inline uint16_t to_float16(float value) { return std::bit_cast<uint16_t>(_Float16(value)); }
inline uint32_t pack_bfloat16(float low, float high) { return to_bfloat16(low) | uint32_t(to_bfloat16(high)) << 16; }
inline uint32_t pack_float16(float low, float high) { return to_float16(low) | uint32_t(to_float16(high)) << 16; }
inline uint16_t to_float16_cut(float value) {
  const uint16_t nearest = to_float16(value);
  const float back = from_float16(nearest);
  return std::abs(back) > std::abs(value) ? uint16_t(nearest - 1) : nearest;  // towards 0 in both signs, from infinity too
}
inline uint32_t pack_float16_cut(float low, float high) { return to_float16_cut(low) | uint32_t(to_float16_cut(high)) << 16; }
inline uint32_t to_tf32(float value) { return (std::bit_cast<uint32_t>(value) + 0x1000u) & 0xffffe000u; }
inline uint64_t shift_left(uint64_t value, uint32_t bits) { return bits < 64 ? value << bits : 0; }
inline uint64_t shift_right(uint64_t value, uint32_t bits) { return bits < 64 ? value >> bits : 0; }
inline uint32_t permute_bytes(uint32_t low, uint32_t high, uint32_t selector) {
  uint32_t r = 0;
  for (int k = 0; k < 4; ++k) {
    const uint32_t digit = selector >> (4 * k) & 15u, byte = (digit & 4u ? high : low) >> (8 * (digit & 3u)) & 255u;
    r |= (digit & 8u ? (byte >> 7) * 255u : byte) << (8 * k);
  }
  return r;
}
inline uint32_t shift_word_left(uint32_t value, int by) { return by >= 0 && by < 32 ? value << by : 0u; }
inline uint32_t shift_word_right(uint32_t value, int by) { return by >= 0 && by < 32 ? value >> by : 0u; }
inline uint32_t shift_words_left(uint32_t low, uint32_t high, uint32_t by) {
  return uint32_t((uint64_t(high) << 32 | low) << (by < 32 ? by : 32) >> 32);
}
inline float as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline uint32_t as_bits(float value) { return std::bit_cast<uint32_t>(value); }

// The copy itself is instrumented code. Bytes may arrive from the start, and need not before they are waited for: so long NaN.
inline void copy_16_bytes(void* shared, const void* global, bool zeros) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0 || (!zeros && reinterpret_cast<uintptr_t>(global) % 16 != 0))
    emulation::fail("a misaligned asynchronous copy");
  for (int i = 0; i < 4; ++i) static_cast<uint32_t*>(shared)[i] = 0x7fbadbadu;
  emulation::copy_later([=] {
    for (int i = 0; i < 4; ++i)
      static_cast<uint32_t*>(shared)[i] = zeros ? 0u : static_cast<const uint32_t*>(global)[i];
    emulation::note_copy(shared);
  });
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kGroupsLeft> void wait_for_copies() { emulation::wait_for_copies(kGroupsLeft); }

}  // namespace kan::cuda

#include "tensor_cores.h"
#include "warpgroup.h"
#include "cluster.h"
