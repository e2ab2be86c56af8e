// Where the operands in halves lie in a launch's workspace.
#include "split.h"

namespace kan::cuda {

namespace {

// The next 256-byte aligned piece of `memory` for so many T; without memory it only counts.
struct Pieces {
  char* memory;
  size_t used = 0;
  template <class T> T* next(int64_t count) {
    T* piece = memory == nullptr ? nullptr : reinterpret_cast<T*>(memory + used);
    used += (size_t(count) * sizeof(T) + 255) / 256 * 256;
    return piece;
  }
};

Halves place(const Problem& p, Operation operation, Pieces& pieces) {
  const int64_t pitch = split_pitch(p.out_features);
  const bool weight = operation == Operation::weight;
  Halves h{};
  if (operation != Operation::output) h.g = pieces.next<Float16>(p.batch * pitch);
  if (weight) {
    const int64_t inputs = p.d_base != nullptr ? p.in_features : 0;
    h.inputs = pieces.next<float>(inputs);
    h.maxima_of_inputs = pieces.next<float>(kMaximaSlices * inputs);
  } else {
    h.spline = pieces.next<Float16>(p.in_features * p.bases() * pitch);
    if (p.base_weight != nullptr) h.base = pieces.next<Float16>(p.in_features * pitch);
    h.rows = pieces.next<float>(p.batch);
  }
  h.columns = pieces.next<float>(p.out_features);
  h.maxima = pieces.next<float>(kMaximaSlices * p.out_features);
  return h;
}

}  // namespace

size_t size_of_halves(const Problem& p, Operation operation) {
  Pieces pieces{nullptr};
  place(p, operation, pieces);
  return pieces.used;
}

Halves place_halves(const Problem& p, Operation operation, void* memory) {
  Pieces pieces{static_cast<char*>(memory)};
  return place(p, operation, pieces);
}

const char* why_not_split(const Problem& p, Operation operation) {
  if (operation == Operation::input) return nullptr;
  if (p.n > 0) return "derivatives of bases in float32";
  if (p.scale != nullptr) return "scaled inputs in float32";
  if (p.outside == kLinear) return "linear extensions in float32";
  return nullptr;
}

}  // namespace kan::cuda
