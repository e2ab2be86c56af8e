// Blocks, barriers and warps of the emulation. Never compiled with a sanitizer itself; the thread sanitizer is told of what barriers
// and warp-wide instructions order.
#include "runtime.h"

#undef threadIdx
#undef blockIdx
#undef gridDim

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

namespace kan::emulation {

Thread* self;
Index block, grid;
char* shared;
size_t shared_bytes;
Observer observer;

namespace {

enum class State { ready, at_barrier, at_named, in_warp, at_cluster, at_place, aside, done };

struct Block;
struct Fiber : Thread, Stack {
  Block* home = nullptr;
  State state = State::done;
  const void* place = nullptr;
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;
};

// A named barrier: threads that wait, and such as only arrive.
struct Named {
  Meeting meeting;
  std::vector<Fiber*> waiting;
  int arrived = 0, expected = 0;
};

struct Warp {
  std::vector<Fiber*> lanes;
  void* handed[32];
  int arrived = 0;
  const char* name = nullptr;
  Meeting meeting;
};

// A block and what its threads meet at.
struct Block {
  Index index;
  int rank;  // in its cluster
  char* memory;
  std::vector<Warp> warps;
  Meeting barrier{};
  std::array<Named, 16> named{};
  std::vector<Warp*> order;  // in which they run
  int living, waiting = 0;

  Block(Index index, int rank, int threads) : index(index), rank(rank), warps(threads / 32), living(threads) {
    memory = static_cast<char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128 + 128));
    for (size_t i = 0; i + 4 <= shared_bytes; i += 4) std::memcpy(memory + i, "\xad\xdb\xba\x7f", 4);  // NaN
    // Not by fibers: the sanitizer would see the memory move from one to the other.
    for (Named& barrier : named) barrier.waiting.reserve(size_t(threads));
  }
  ~Block() { std::free(memory); }
  Block(const Block&) = delete;
  Block& operator=(const Block&) = delete;
};

struct Machine {
  std::vector<Fiber> fibers;
  // Those that ended stay until the launch ends: no two blocks may share an address that orders them.
  std::vector<std::unique_ptr<Block>> blocks;
  int of_cluster = 1, used = 0;  // the cluster that runs: so many blocks, the last, and fibers, the first
  std::deque<Meeting> clusters;
  Fiber* running = nullptr;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr error;
  std::mt19937 random;
  char start = 0, end = 0;

  Block& of_rank(int rank) { return *blocks[blocks.size() - size_t(of_cluster - rank)]; }
  // How many threads of the cluster are in that state.
  int count(State state) const {
    return int(std::count_if(fibers.begin(), fibers.begin() + used, [&](const Fiber& fiber) { return fiber.state == state; }));
  }
  Fiber* first(State state) {
    for (int f = 0; f < used; ++f)
      if (fibers[f].state == state) return &fibers[f];
    return nullptr;
  }
};
Machine& machine() {
  static Machine* one = new Machine;
  return *one;
}

void leave(State state) {
  Fiber& me = *machine().running;
  me.state = state;
  pause(me);
}

void run_thread() {
  Machine& m = machine();
  for (;;) {
    acquire(&m.start);
    Fiber* me = m.running;
    try {
      (*m.kernel)();
      if (!me->open.empty() || !me->groups.empty()) fail("a thread ends with asynchronous copies under way");
      end_thread();
      if (me->home->living == 1) end_signals();
    } catch (...) {
      if (!m.error) m.error = std::current_exception();
    }
    me->open.clear();
    me->groups.clear();
    --me->home->living;
    release(&m.end);
    leave(State::done);
  }
}

void become(Fiber& fiber) {
  self = machine().running = &fiber;
  block = fiber.home->index;
  shared = fiber.home->memory;
}
void resume(Fiber& fiber) {
  Machine& m = machine();
  become(fiber);
  go_on(fiber);
  m.running = nullptr;
  if (m.error) std::rethrow_exception(m.error);
}

void open_barrier(Block& block) {
  const void* place = nullptr;
  auto each = [&](auto visit) {
    for (Warp& warp : block.warps)
      for (Fiber* fiber : warp.lanes)
        if (fiber->state == State::at_barrier) visit(*fiber);
  };
  each([&](Fiber& fiber) {
    if (place == nullptr) place = fiber.place;
    if (fiber.place != place) fail("threads of a block wait at different barriers");
  });
  each([](Fiber& fiber) { fiber.state = State::ready; });
  block.waiting = 0;
  ++block.barrier.turn;
}
void open_cluster() {
  Machine& m = machine();
  ++m.clusters.back().turn;
  for (int f = 0; f < m.used; ++f)
    if (m.fibers[f].state == State::at_cluster) m.fibers[f].state = State::ready;
}

// Greedy: a warp runs until all its lanes wait for other warps, a block until all its warps wait for other blocks. Taking turns would
// hide a missing barrier. False if nothing could run.
bool run_block(Block& block) {
  for (bool ever = false;; ever = true) {
    bool any = false;
    for (Warp* warp : block.order)
      for (bool going = true; going;) {
        going = false;
        for (Fiber* fiber : warp->lanes)
          if (fiber->state == State::ready) {
            going = any = true;
            resume(*fiber);
          }
      }
    if (block.waiting > 0 && block.waiting == block.living) {
      open_barrier(block);
      any = true;
    }
    if (!any) return ever;
  }
}

// The barrier of all, one thread that stepped aside, or one copy of the copy engine. False if there is none.
bool go_further() {
  Machine& m = machine();
  const int at_cluster = m.count(State::at_cluster), aside = m.count(State::aside), slow = aside + copies_under_way();
  if (at_cluster > 0 && at_cluster == m.used - m.count(State::done)) open_cluster();
  else if (slow == 0) return false;
  else if (int(random_number(unsigned(slow))) < aside) m.first(State::aside)->state = State::ready;
  else let_a_copy_arrive();
  return true;
}

[[noreturn]] void fail_to_go_on(const std::vector<Block*>& order) {
  Machine& m = machine();
  if (Fiber* fiber = m.first(State::at_place)) {
    become(*fiber);  // to say which
    fail("part of a cluster waits for a signal");
  }
  for (Block* block : order)
    for (Warp* warp : block->order)
      if (warp->arrived > 0) fail(std::string("part of a warp waits in ") + warp->name);
  if (m.count(State::at_cluster) > 0) fail("part of a cluster waits for the rest of it");
  fail("part of a block waits at a barrier");
}

void run_cluster(const std::vector<Block*>& order) {
  Machine& m = machine();
  for (;;) {
    bool any = false;
    for (Block* block : order) any |= run_block(*block);
    if (m.count(State::done) == m.used) return;
    if (!any && !go_further()) fail_to_go_on(order);
  }
}

}  // namespace

void fail(const std::string& what) {
  Machine& m = machine();
  std::string where;
  if (m.running != nullptr)
    where = ", block (" + std::to_string(block.x) + ", " + std::to_string(block.y) + ", " + std::to_string(block.z) + ") thread " +
            std::to_string(m.running->thread.x);
  throw std::runtime_error(what + where);
}

unsigned random_number(unsigned count) { return unsigned(machine().random()) % count; }

int blocks_of_cluster() { return machine().of_cluster; }
int block_of_cluster() { return machine().running->home->rank; }
Neighbour neighbour(int rank) {
  Machine& m = machine();
  const Block& block = m.of_rank(rank);
  return {int(m.blocks.size()) - m.of_cluster + rank, block.memory, block.living == 0};
}

void sleep_at(const void* place) {
  machine().running->place = place;
  leave(State::at_place);
}
void wake_all_at(const void* place) {
  Machine& m = machine();
  for (int f = 0; f < m.used; ++f)
    if (m.fibers[f].state == State::at_place && m.fibers[f].place == place) m.fibers[f].state = State::ready;
}
void step_aside() {
  if (random_number(2) == 0) leave(State::aside);
}

void wait_at_barrier(const void* place) {
  Fiber& me = *machine().running;
  Block& block = *me.home;
  me.place = place;
  ++block.waiting;
  void* object = &block.barrier.objects[block.barrier.turn & 1];
  release(object);
  leave(State::at_barrier);
  acquire(object);
}
void meet_cluster() {
  Meeting& meeting = machine().clusters.back();
  void* object = &meeting.objects[meeting.turn & 1];
  release(object);
  leave(State::at_cluster);
  acquire(object);
}

// One more thread at a named barrier; true if it was the last one.
bool count(int id, int threads, Named& barrier) {
  if (id < 1 || id > 15) fail("a barrier of number " + std::to_string(id));
  if (barrier.arrived == 0) barrier.expected = threads;
  if (barrier.expected != threads) fail("a barrier is told different numbers of threads");
  release(&barrier.meeting.objects[barrier.meeting.turn & 1]);
  if (++barrier.arrived < threads) return false;
  for (Fiber* fiber : barrier.waiting) fiber->state = State::ready;
  barrier.waiting.clear();
  barrier.arrived = 0;
  ++barrier.meeting.turn;
  return true;
}
void meet(int id, int threads) {
  Fiber* me = machine().running;
  Named& barrier = me->home->named[id & 15];
  void* object = &barrier.meeting.objects[barrier.meeting.turn & 1];
  if (!count(id, threads, barrier)) {
    barrier.waiting.push_back(me);
    leave(State::at_named);
  }
  acquire(object);
}
void arrive(int id, int threads) { count(id, threads, machine().running->home->named[id & 15]); }

void with_warp(const char* name, void* mine, const std::function<void(void* const*)>& instruction) {
  Fiber& me = *machine().running;
  Warp& warp = me.home->warps[me.warp];
  for (Fiber* fiber : warp.lanes)
    if (fiber->state == State::done) fail(std::string(name) + ": lanes of this warp have ended");
  if (warp.arrived > 0 && std::strcmp(warp.name, name) != 0) fail(std::string(name) + " meets " + warp.name + " within a warp");
  warp.name = name;
  warp.handed[me.lane] = mine;
  void* object = &warp.meeting.objects[warp.meeting.turn & 1];
  release(object);
  if (++warp.arrived < 32) {
    leave(State::in_warp);
    acquire(object);
    return;
  }
  acquire(object);
  instruction(warp.handed);
  warp.arrived = 0;
  ++warp.meeting.turn;
  release(object);
  for (Fiber* fiber : warp.lanes)
    if (fiber->state == State::in_warp) fiber->state = State::ready;
}

void copy_later(std::function<void()> copy) { machine().running->open.push_back(std::move(copy)); }
void commit_copies() {
  Fiber& me = *machine().running;
  me.groups.push_back(std::move(me.open));
  me.open.clear();
}
void wait_for_copies(int groups_left) {
  Fiber& me = *machine().running;
  for (; int(me.groups.size()) > groups_left; me.groups.pop_front())
    for (auto& copy : me.groups.front()) copy();
}

void run_blocks(Index blocks, Index cluster, int threads, size_t bytes, const std::function<void()>& kernel) {
  Machine& m = machine();
  if (threads < 32 || threads > 1024 || threads % 32 != 0) fail("a block of " + std::to_string(threads) + " threads");
  shared_bytes = bytes;
  if (shared_bytes > 227 * 1024) fail(std::to_string(shared_bytes) + " bytes of shared memory");
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) fail("a grid without blocks");
  const uint64_t of_cluster = uint64_t(cluster.x) * cluster.y * cluster.z;
  if (of_cluster < 1 || of_cluster > 8) fail("a cluster of " + std::to_string(of_cluster) + " blocks");
  if (blocks.x % cluster.x || blocks.y % cluster.y || blocks.z % cluster.z) fail("a side of the grid is no multiple of the cluster's");
  m.of_cluster = int(of_cluster);
  m.used = int(of_cluster) * threads;
  if (int(m.fibers.size()) < m.used) m.fibers.resize(m.used);
  for (Fiber& fiber : m.fibers) fiber.state = State::done;
  m.kernel = &kernel;
  m.error = nullptr;
  grid = blocks;
  begin_fibers();
  m.random.seed(1);
  const Index clusters{blocks.x / cluster.x, blocks.y / cluster.y, blocks.z / cluster.z};
  std::vector<uint64_t> order(uint64_t(clusters.x) * clusters.y * clusters.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), m.random);
  std::vector<int> warp_order(m.used / 32);
  for (int w = 0; w < m.used / 32; ++w) warp_order[w] = w;
  auto tidy = [&] {
    m.blocks.clear();
    m.clusters.clear();
    end_launch();
    forget_signals();
    m.running = nullptr;
  };
  auto index_in = [](uint64_t i, Index sides) {
    return Index{unsigned(i % sides.x), unsigned(i / sides.x % sides.y), unsigned(i / sides.x / sides.y)};
  };
  try {
    for (uint64_t i : order) {
      const Index first = index_in(i, clusters);
      m.clusters.emplace_back();
      for (int rank = 0; rank < m.of_cluster; ++rank) {
        const Index within = index_in(uint64_t(rank), cluster);
        m.blocks.push_back(std::make_unique<Block>(
            Index{first.x * cluster.x + within.x, first.y * cluster.y + within.y, first.z * cluster.z + within.z}, rank, threads));
        Block& block = *m.blocks.back();
        begin_block(threads);
        begin_signals();
        for (int t = 0; t < threads; ++t) {
          Fiber& fiber = m.fibers[rank * threads + t];
          fiber.thread = {unsigned(t), 0, 0};
          fiber.lane = t % 32;
          fiber.warp = t / 32;
          fiber.block = int(m.blocks.size()) - 1;
          fiber.home = &block;
          fiber.state = State::ready;
          block.warps[t / 32].lanes.push_back(&fiber);
          prepare(fiber, run_thread);
        }
      }
      std::shuffle(warp_order.begin(), warp_order.end(), m.random);
      std::vector<Block*> block_order;
      for (int w : warp_order) {
        Block& block = m.of_rank(w / (threads / 32));
        if (block.order.empty()) block_order.push_back(&block);
        block.order.push_back(&block.warps[w % (threads / 32)]);
      }
      release(&m.start);
      run_cluster(block_order);
      for (int rank = 0; rank < m.of_cluster; ++rank) {
        for (const Named& barrier : m.of_rank(rank).named)
          if (barrier.arrived != 0) fail("a block ends with threads at a barrier");
        end_block(neighbour(rank).number);
      }
    }
  } catch (...) {
    // The frames of fibers that did not end are abandoned, and their stacks begin anew.
    for (Fiber& fiber : m.fibers) {
      abandon(fiber);
      fiber.open.clear();
      fiber.groups.clear();
    }
    tidy();
    throw;
  }
  acquire(&m.end);
  tidy();
}

}  // namespace kan::emulation
