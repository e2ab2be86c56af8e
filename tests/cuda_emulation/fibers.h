// Stacks that run in turn, and what sanitizers have to know of that.
#pragma once

#include <cstddef>

namespace kan::emulation {

struct Stack {
  void* top = nullptr;
  char* memory = nullptr;
  void *tsan = nullptr, *asan = nullptr;
};

// From here on this thread's own stack is the one that `go_on` is called on.
void begin_fibers();
// Where nothing runs on it yet, or what did was abandoned, `entry` begins when it goes on; that must never return.
void prepare(Stack&, void (*entry)());
inline void abandon(Stack& stack) { stack.top = nullptr; }
void go_on(Stack&);
// Back to who called go_on.
void pause(Stack&);

// To the thread sanitizer: what came before release() of an object comes before what follows acquire() of it.
void acquire(void* object);
void release(void* object);

// What orders threads, as the sanitizer sees it: two objects that alternate, so that nobody meets the one before.
struct Meeting {
  char objects[2];
  unsigned turn = 0;
};

}  // namespace kan::emulation
