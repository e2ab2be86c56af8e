// Scratch memory of one task: sizes are reserved first, then one block serves them all.
#pragma once
#include "../kernels.h"

namespace kan::cpu::KAN_ISA {

// Below this many (row, input, output) triples a second thread costs more than it saves (about 10 us of work).
constexpr int64_t kMinimumWork = 1 << 17;

class Arena {
 public:
  explicit Arena(const Runtime& runtime) : runtime_(runtime) {}
  template <class T> void reserve(size_t count) { total_ += count * sizeof(T) + 64 * 16; }
  void commit() { next_ = runtime_.workspace(total_); }
  template <class T> T* take(size_t count) {
    T* here = reinterpret_cast<T*>(next_);
    next_ += (count * sizeof(T) + 63) / 64 * 64;
    return here;
  }

 private:
  const Runtime& runtime_;
  size_t total_ = 0;
  char* next_ = nullptr;
};

}  // namespace kan::cpu::KAN_ISA
