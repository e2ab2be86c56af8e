// Fibers, barriers and warps of the emulation. Never compiled with a sanitizer itself; KAN_EMULATE_ASAN or KAN_EMULATE_TSAN
// tells one of them of the switches, and the thread sanitizer of what barriers and warp-wide instructions order.
#include "emulation.h"

#undef threadIdx
#undef blockIdx
#undef gridDim

#include <sys/mman.h>

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <memory>
#include <random>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__)
#error "fibers are switched in x86-64 assembly"
#endif

extern "C" {
void kan_switch_stack(void** save, void* load);
#ifdef KAN_EMULATE_TSAN
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
#endif
#ifdef KAN_EMULATE_ASAN
void __sanitizer_start_switch_fiber(void**, const void*, size_t);
void __sanitizer_finish_switch_fiber(void*, const void**, size_t*);
#endif
}

// Callee-saved registers go to the old stack and come from the new one.
asm(R"(
.text
.globl kan_switch_stack
.type kan_switch_stack,@function
kan_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp,(%rdi)
  movq %rsi,%rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

namespace kan::emulation {

Thread* self;
Index block, grid;
char* shared;
size_t shared_bytes;
Observer observer;

namespace {

#ifdef KAN_EMULATE_TSAN
void acquire(void* object) { __tsan_acquire(object); }
void release(void* object) { __tsan_release(object); }
#else
void acquire(void*) {}
void release(void*) {}
#endif

enum class State { ready, at_barrier, at_named, in_warp, done };
constexpr size_t kStack = 128 * 1024;

struct Fiber : Thread {
  void* stack_pointer = nullptr;
  char* stack = nullptr;
  void *tsan = nullptr, *asan = nullptr;
  State state = State::done;
  const void* place = nullptr;
  std::vector<std::function<void()>> open;
  std::deque<std::vector<std::function<void()>>> groups;
};

// What orders threads, as the sanitizer sees it: two objects that alternate, so that nobody meets the one before.
struct Meeting {
  char objects[2];
  unsigned turn = 0;
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

struct Machine {
  std::vector<Fiber> fibers;
  // Those of blocks that ended stay until the launch ends: no two blocks may share an address that orders them.
  std::vector<std::unique_ptr<std::vector<Warp>>> warps;
  std::vector<std::unique_ptr<Meeting>> barriers;
  std::vector<std::unique_ptr<std::array<Named, 16>>> named;
  std::vector<char*> memories;
  void *stack_pointer = nullptr, *tsan = nullptr, *asan = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  Fiber* running = nullptr;
  int living = 0, waiting = 0;
  const std::function<void()>* kernel = nullptr;
  std::exception_ptr error;
  char start = 0, end = 0;
};
Machine& machine() {
  static Machine* one = new Machine;
  return *one;
}

void leave() {
  Machine& m = machine();
  Fiber* me = m.running;
#ifdef KAN_EMULATE_TSAN
  __tsan_switch_to_fiber(m.tsan, 1);
#endif
#ifdef KAN_EMULATE_ASAN
  __sanitizer_start_switch_fiber(&me->asan, m.stack, m.stack_size);
#endif
  kan_switch_stack(&me->stack_pointer, m.stack_pointer);
#ifdef KAN_EMULATE_ASAN
  __sanitizer_finish_switch_fiber(me->asan, &m.stack, &m.stack_size);
#endif
}

void enter() {
  Machine& m = machine();
#ifdef KAN_EMULATE_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &m.stack, &m.stack_size);
#endif
  for (;;) {
    acquire(&m.start);
    try {
      (*m.kernel)();
      Fiber* me = m.running;
      if (!me->open.empty() || !me->groups.empty()) fail("a thread ends with asynchronous copies under way");
      end_thread();
    } catch (...) {
      if (!m.error) m.error = std::current_exception();
    }
    Fiber* me = m.running;
    me->open.clear();
    me->groups.clear();
    me->state = State::done;
    --m.living;
    release(&m.end);
    leave();
  }
}

void resume(Fiber& fiber) {
  Machine& m = machine();
  m.running = &fiber;
  self = &fiber;
#ifdef KAN_EMULATE_TSAN
  __tsan_switch_to_fiber(fiber.tsan, 1);
#endif
#ifdef KAN_EMULATE_ASAN
  __sanitizer_start_switch_fiber(&m.asan, fiber.stack, kStack);
#endif
  kan_switch_stack(&m.stack_pointer, fiber.stack_pointer);
#ifdef KAN_EMULATE_ASAN
  __sanitizer_finish_switch_fiber(m.asan, nullptr, nullptr);
#endif
  m.running = nullptr;
}

void prepare(Fiber& fiber) {
  if (fiber.stack == nullptr) {
    fiber.stack = static_cast<char*>(mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (fiber.stack == MAP_FAILED) throw std::bad_alloc();
    mprotect(fiber.stack, 4096, PROT_NONE);
  }
  if (fiber.stack_pointer == nullptr) {
    void** top = reinterpret_cast<void**>(fiber.stack + kStack - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&enter);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    fiber.stack_pointer = top;
  }
#ifdef KAN_EMULATE_TSAN
  // Kept from block to block: one thread's work in two blocks seems ordered, that of different threads does not.
  if (fiber.tsan == nullptr) fiber.tsan = __tsan_create_fiber(0);
#endif
}

void open_barrier() {
  Machine& m = machine();
  const void* place = nullptr;
  for (Fiber& fiber : m.fibers)
    if (fiber.state == State::at_barrier) {
      if (place == nullptr) place = fiber.place;
      if (fiber.place != place) fail("threads of a block wait at different barriers");
    }
  for (Fiber& fiber : m.fibers)
    if (fiber.state == State::at_barrier) fiber.state = State::ready;
  m.waiting = 0;
  ++m.barriers.back()->turn;
}

// Greedy: a warp runs until all its lanes wait for other warps. Taking turns would hide a missing barrier.
void run_block(const std::vector<int>& order) {
  Machine& m = machine();
  std::vector<Warp>& warps = *m.warps.back();
  while (m.living > 0) {
    bool any = false;
    for (int w : order)
      for (bool going = true; going;) {
        going = false;
        for (Fiber* fiber : warps[w].lanes)
          if (fiber->state == State::ready) {
            going = any = true;
            resume(*fiber);
            if (m.error) std::rethrow_exception(m.error);
          }
      }
    if (m.waiting > 0 && m.waiting == m.living) {
      open_barrier();
      any = true;
    }
    if (!any) {
      for (Warp& warp : warps)
        if (warp.arrived > 0) fail(std::string("part of a warp waits in ") + warp.name);
      fail("part of a block waits at a barrier");
    }
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

void wait_at_barrier(const void* place) {
  Machine& m = machine();
  Fiber& me = *m.running;
  Meeting& meeting = *m.barriers.back();
  me.state = State::at_barrier;
  me.place = place;
  ++m.waiting;
  void* object = &meeting.objects[meeting.turn & 1];
  release(object);
  leave();
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
  Machine& m = machine();
  Named& barrier = (*m.named.back())[id & 15];
  void* object = &barrier.meeting.objects[barrier.meeting.turn & 1];
  if (!count(id, threads, barrier)) {
    m.running->state = State::at_named;
    barrier.waiting.push_back(m.running);
    leave();
  }
  acquire(object);
}
void arrive(int id, int threads) { count(id, threads, (*machine().named.back())[id & 15]); }

void with_warp(const char* name, void* mine, const std::function<void(void* const*)>& instruction) {
  Machine& m = machine();
  Fiber& me = *m.running;
  Warp& warp = (*m.warps.back())[me.warp];
  for (Fiber* fiber : warp.lanes)
    if (fiber->state == State::done) fail(std::string(name) + ": lanes of this warp have ended");
  if (warp.arrived > 0 && std::strcmp(warp.name, name) != 0) fail(std::string(name) + " meets " + warp.name + " within a warp");
  warp.name = name;
  warp.handed[me.lane] = mine;
  void* object = &warp.meeting.objects[warp.meeting.turn & 1];
  release(object);
  if (++warp.arrived < 32) {
    me.state = State::in_warp;
    leave();
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

void run_blocks(Index blocks, int threads, size_t bytes, const std::function<void()>& kernel) {
  Machine& m = machine();
  if (threads < 32 || threads > 1024 || threads % 32 != 0) fail("a block of " + std::to_string(threads) + " threads");
  shared_bytes = bytes;
  if (shared_bytes > 227 * 1024) fail(std::to_string(shared_bytes) + " bytes of shared memory");
  if (blocks.x == 0 || blocks.y == 0 || blocks.z == 0) fail("a grid without blocks");
  if (int(m.fibers.size()) < threads) m.fibers.resize(threads);
  for (Fiber& fiber : m.fibers) fiber.state = State::done;
  m.kernel = &kernel;
  m.error = nullptr;
  grid = blocks;
#ifdef KAN_EMULATE_TSAN
  m.tsan = __tsan_get_current_fiber();
#endif
  std::mt19937 random(1);
  std::vector<uint64_t> order(uint64_t(blocks.x) * blocks.y * blocks.z);
  for (uint64_t i = 0; i < order.size(); ++i) order[i] = i;
  std::shuffle(order.begin(), order.end(), random);
  std::vector<int> warp_order(threads / 32);
  for (int w = 0; w < threads / 32; ++w) warp_order[w] = w;
  auto tidy = [&] {
    for (char* memory : m.memories) std::free(memory);
    m.memories.clear();
    m.warps.clear();
    m.barriers.clear();
    m.named.clear();
    end_launch();
    m.running = nullptr;
    m.waiting = 0;
  };
  try {
    for (uint64_t index : order) {
      block = {unsigned(index % blocks.x), unsigned(index / blocks.x % blocks.y), unsigned(index / blocks.x / blocks.y)};
      shared = static_cast<char*>(std::aligned_alloc(128, (shared_bytes + 127) / 128 * 128 + 128));
      for (size_t i = 0; i + 4 <= shared_bytes; i += 4) std::memcpy(shared + i, "\xad\xdb\xba\x7f", 4);  // NaN
      m.memories.push_back(shared);
      m.warps.push_back(std::make_unique<std::vector<Warp>>(threads / 32));
      m.barriers.push_back(std::make_unique<Meeting>());
      m.named.push_back(std::make_unique<std::array<Named, 16>>());
      // Not by fibers: the sanitizer would see the memory move from one to the other.
      for (Named& barrier : *m.named.back()) barrier.waiting.reserve(size_t(threads));
      for (int t = 0; t < threads; ++t) {
        Fiber& fiber = m.fibers[t];
        fiber.thread = {unsigned(t), 0, 0};
        fiber.lane = t % 32;
        fiber.warp = t / 32;
        fiber.state = State::ready;
        (*m.warps.back())[t / 32].lanes.push_back(&fiber);
        prepare(fiber);
      }
      std::shuffle(warp_order.begin(), warp_order.end(), random);
      m.living = threads;
      m.waiting = 0;
      begin_block(threads);
      release(&m.start);
      run_block(warp_order);
      for (const Named& barrier : *m.named.back())
        if (barrier.arrived != 0) fail("a block ends with threads at a barrier");
      end_block();
    }
  } catch (...) {
    // The frames of fibers that did not end are abandoned, and their stacks begin anew.
    for (Fiber& fiber : m.fibers) {
      fiber.stack_pointer = nullptr;
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
