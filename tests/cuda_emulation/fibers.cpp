// Never compiled with a sanitizer itself; KAN_EMULATE_ASAN or KAN_EMULATE_TSAN tells one of them of the switches.
#include "fibers.h"

#include <sys/mman.h>

#include <new>

#if !defined(__x86_64__)
#error "fibers are switched in x86-64 assembly"
#endif

extern "C" {
void kan_switch_stack(void** save, void* load);
#ifdef KAN_EMULATE_TSAN
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
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

namespace {

constexpr size_t kStack = 128 * 1024;

struct Home {
  void *top = nullptr, *tsan = nullptr, *asan = nullptr;
  const void* stack = nullptr;
  size_t stack_size = 0;
  void (*entry)() = nullptr;
} home;

void enter() {
#ifdef KAN_EMULATE_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &home.stack, &home.stack_size);
#endif
  home.entry();
}

}  // namespace

void begin_fibers() {
#ifdef KAN_EMULATE_TSAN
  home.tsan = __tsan_get_current_fiber();
#endif
}

void prepare(Stack& stack, void (*entry)()) {
  home.entry = entry;
  if (stack.memory == nullptr) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, 4096, PROT_NONE);
    stack.memory = static_cast<char*>(memory);
  }
  if (stack.top == nullptr) {
    void** top = reinterpret_cast<void**>(stack.memory + kStack - 64);
    *--top = nullptr;
    *--top = reinterpret_cast<void*>(&enter);
    for (int saved = 0; saved < 6; ++saved) *--top = nullptr;
    stack.top = top;
  }
#ifdef KAN_EMULATE_TSAN
  // Kept from block to block: one thread's work in two blocks seems ordered, that of different threads does not.
  if (stack.tsan == nullptr) stack.tsan = __tsan_create_fiber(0);
#endif
}

void go_on(Stack& stack) {
#ifdef KAN_EMULATE_TSAN
  __tsan_switch_to_fiber(stack.tsan, 1);
#endif
#ifdef KAN_EMULATE_ASAN
  __sanitizer_start_switch_fiber(&home.asan, stack.memory, kStack);
#endif
  kan_switch_stack(&home.top, stack.top);
#ifdef KAN_EMULATE_ASAN
  __sanitizer_finish_switch_fiber(home.asan, nullptr, nullptr);
#endif
}

void pause(Stack& stack) {
#ifdef KAN_EMULATE_TSAN
  __tsan_switch_to_fiber(home.tsan, 1);
#endif
#ifdef KAN_EMULATE_ASAN
  __sanitizer_start_switch_fiber(&stack.asan, home.stack, home.stack_size);
#endif
  kan_switch_stack(&stack.top, home.top);
#ifdef KAN_EMULATE_ASAN
  __sanitizer_finish_switch_fiber(stack.asan, &home.stack, &home.stack_size);
#endif
}

#ifdef KAN_EMULATE_TSAN
void acquire(void* object) { __tsan_acquire(object); }
void release(void* object) { __tsan_release(object); }
#else
void acquire(void*) {}
void release(void*) {}
#endif

}  // namespace kan::emulation
