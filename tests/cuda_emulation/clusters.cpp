// Kernels that try clusters, signals and the copy engine of the emulation, as they should be and with one thing wrong.
#include "emulation.h"

#include <cstdio>
#include <cstdlib>
#include <exception>
#include <string>

#include "cuda/cluster.cuh"

using namespace kan::cuda;

namespace {

struct Arguments {
  int blocks, lines, rounds, stages, x, y;  // blocks of a cluster, lines of a box, which begins there
  char* out;                        // (block, round, lines, 128) bytes as they lie in shared memory
  uint32_t* address;                // of the box of the first stage
  const char* fault;

  bool has(const char* name) const { return std::strcmp(fault, name) == 0; }
};

// Round r takes lines y .. y + lines of matrix r. Each block of a cluster copies a part of them to all, and keeps what comes.
void take_rounds(KAN_ARGUMENT TensorMap map, Arguments a) {
  char* const boxes = shared_memory<char>();
  const int bytes = 128 * a.lines, part = a.lines / a.blocks, me = block_of_cluster(), everyone = (1 << a.blocks) - 1;
  Signal* const full = reinterpret_cast<Signal*>(boxes + a.stages * bytes);
  Signal* const empty = full + a.stages;
  Signal* const extra = empty + a.stages;
  const bool first = threadIdx.x == 0, second = threadIdx.x == 32;
  const int block = int(blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z));

  if (a.has("half a warp") && threadIdx.x % 32 >= 16) return;
  if (first) {
    for (int stage = 0; stage < a.stages; ++stage) {
      prepare(&full[stage], 1);
      if (!a.has("not prepared")) prepare(&empty[stage], a.blocks);
    }
    if (!a.has("prepared by two")) prepare(extra, 1);
    if (!a.has("not shown")) show_signals();
  }
  if (second && (a.has("write shown") || a.has("write not shown"))) {
    const uint32_t words[4] = {};
    store_16_bytes(boxes + 16, words);
    if (a.has("write shown")) show_to_tensor_cores();
  }
  if (a.has("not met by all") && threadIdx.x >= 32 && me == 0) meet(1, 64);
  if (a.has("preparation not met")) barrier();
  else meet_cluster();
  if (a.has("prepared by two") && (first || second)) prepare(extra, 1);
  if (a.has("no arrivals") && first) prepare(extra + 1, 0);
  if (a.has("written over") && second) full->state = 0;
  barrier();

  for (int r = 0; r < a.rounds; ++r) {
    const int stage = r % a.stages, turn = r / a.stages;
    char* const box = boxes + stage * bytes;
    if (first) {
      if (!a.has("overtaking")) wait_for(&empty[stage], (turn & 1) ^ 1);
      if (a.has("too many arrivals")) announce_bytes(&full[stage], bytes);
      announce_bytes(&full[stage], bytes + (a.has("too many announced") ? 128 : a.has("too few announced") ? -128 : 0));
      char* to = box + 128 * part * me + (a.has("misaligned box") ? 64 : a.has("box outside") ? a.stages * bytes : 0);
      Signal* at = &full[stage];
      if (a.has("misaligned signal")) at = reinterpret_cast<Signal*>(reinterpret_cast<char*>(at) + 4);
      if (a.has("signal outside")) at += 1024;
      const TensorMap nothing{};
      const int mask = a.has("no block") ? 0 : a.has("block beyond") ? 2 * everyone : everyone;
      if (a.blocks == 1) copy_box(to, map, a.x, a.y, r, at);
      else copy_box(to, a.has("no map") ? nothing : map, a.x, a.y + part * me, r, at, mask);
    }
    if (!a.has("too early")) wait_for(&full[stage], turn & 1);
    if (first && block == 0 && r == 0) *a.address = shared_address(boxes);
    char* const out = a.out + (int64_t(block) * a.rounds + r) * bytes;
    for (int i = int(threadIdx.x); i < bytes; i += 64) out[i] = box[i];
    if (!a.has("no barrier")) barrier();
    if (a.has("too early")) wait_for(&full[stage], turn & 1);
    if (first)
      for (int to = 0; to < a.blocks; ++to) arrive_at(&empty[stage], a.has("arrival beyond") ? to + a.blocks : to);
  }

  if (first && a.has("negative bytes")) announce_bytes(extra, -16);
  if (first && a.has("many bytes")) announce_bytes(extra, 1 << 20);
  if (first && a.has("parity")) wait_for(extra, 2);
  if (first && a.has("bytes outstanding")) announce_bytes(extra, 128);
  if (a.has("two phases")) {
    if (second) wait_for(extra, 0);
    if (first) announce_bytes(extra, 0), announce_bytes(extra, 0);
  }
  if (!a.has("ends early")) meet_cluster();
  if (first && a.has("copy outstanding")) copy_box(boxes, map, 0, 0, 0, extra);
  if (first && me == 0 && a.has("copy to an ended block")) {
    for (int chance = 0; chance < 64; ++chance) kan::emulation::step_aside();
    copy_box(boxes, map, 0, 0, 0, extra, everyone);
  }
}

// A product of the box, and the copy of another to there, before or after it is waited for.
void overwrite_product(KAN_ARGUMENT TensorMap map, Arguments a) {
  char* const box = shared_memory<char>();
  Signal* const full = reinterpret_cast<Signal*>(box + 128 * a.lines);
  auto copy = [&](int z) {
    if (threadIdx.x != 0) return;
    announce_bytes(full, 128 * a.lines);
    copy_box(box, map, 0, 0, z, full);
  };
  if (threadIdx.x == 0) {
    prepare(full, 1);
    show_signals();
  }
  barrier();
  copy(0);
  wait_for(full, 0);
  float sums[4] = {};
  // Eight numbers of a right operand; 64 rows of a left one, eight to an atom of 1024 bytes.
  const uint64_t matrix = uint64_t(shared_address(box) / 16) | uint64_t(1024 / 16) << 32 | uint64_t(1) << 62;
  order_registers();
  wgmma_bfloat16<false, false>(sums, matrix, matrix);
  commit_products();
  if (!a.has("product under way")) wait_for_products<0>();
  barrier();
  copy(1);
  wait_for(full, 1);
  wait_for_products<0>();
}

// Whether the other block went on while this one arrived there: nothing orders the two.
void arrive_late(char* reached, char* overtaken) {
  Signal* const signal = shared_memory<Signal>();
  if (threadIdx.x == 0) {
    prepare(signal, 1);
    show_signals();
  }
  meet_cluster();
  const int other = block_of_cluster() ^ 1;
  if (threadIdx.x == 0) {
    reached[blockIdx.x] = 1;
    const char before = reached[blockIdx.x ^ 1];
    arrive_at(signal, other);
    overtaken[blockIdx.x] = before != reached[blockIdx.x ^ 1];
  }
  meet_cluster();
}

std::string error;

}  // namespace

extern "C" void kan_observe(kan::emulation::Observer observer) { kan::emulation::observer = observer; }
// These return null, or what went wrong.
extern "C" const char* kan_map(const Boxes* boxes, TensorMap* map) {
  try {
    *map = map_tensor(*boxes);
    return nullptr;
  } catch (const std::exception& problem) {
    error = problem.what();
    return error.c_str();
  }
}
extern "C" const char* kan_take_rounds(const TensorMap* map, const int64_t* grid, const int64_t* cluster, int lines, int rounds, int stages,
                                       int x, int y, char* out, uint32_t* address, const char* fault) {
  const int64_t blocks = cluster[0] * cluster[1] * cluster[2];
  const Arguments a{int(blocks), lines, rounds, stages, x, y, out, address, fault};
  try {
    if (a.has("product under way") || a.has("product waited for")) {
      launch(overwrite_product, Blocks{1}, 128, size_t(128 * lines + 8), nullptr, *map, a);
    } else {
      launch_clusters(take_rounds, Blocks{grid[0], grid[1], grid[2]}, Blocks{cluster[0], cluster[1], cluster[2]}, 64,
                      size_t(stages) * (128 * lines + 16) + 16, nullptr, *map, a);
    }
    return nullptr;
  } catch (const std::exception& problem) {
    error = problem.what();
    return error.c_str();
  }
}

extern "C" void kan_arrive_late(int clusters, char* reached, char* overtaken) {
  launch_clusters(arrive_late, Blocks{2 * clusters}, Blocks{2}, 32, sizeof(Signal), nullptr, reached, overtaken);
}

// For a build with a sanitizer: clusters of two blocks, with the fault that is named.
int main(int, char** arguments) {
  constexpr int kLines = 16, kRounds = 5, kBlocks = 4;
  auto* numbers = static_cast<uint16_t*>(std::aligned_alloc(16, kRounds * kLines * 128));
  std::memset(numbers, 0, kRounds * kLines * 128);
  const int64_t wrong = std::strcmp(arguments[1], "sizes") == 0;
  const Boxes boxes{numbers, {64, kLines, kRounds + wrong}, {128, 128 * kLines}, {64, kLines / 2, 1}};
  const int64_t grid[3] = {kBlocks, 1, 1}, cluster[3] = {2, 1, 1};
  auto* out = static_cast<char*>(std::malloc(kBlocks * (kRounds + 1) * kLines * 128));
  uint32_t address;
  TensorMap map;
  const char* problem = kan_map(&boxes, &map);
  if (problem == nullptr)
    problem = kan_take_rounds(&map, grid, cluster, kLines, kRounds + int(wrong), 1, 0, 0, out, &address, arguments[1]);
  std::free(out);
  std::free(numbers);
  std::puts(problem ? problem : "it ran");
  return problem != nullptr;
}
