// The kernels' launchers, as launch.cpp calls them.
#pragma once
#include "arguments.h"

namespace kan::cuda {

// How contract_weight cuts the batch: `count` slices of `rows`, whose sums lie `offset` bytes into the workspace.
struct Slices {
  int64_t count, rows;
  size_t offset;
};

template <class T> int launch_output_any(const Problem&, void* workspace, void* stream);
template <class T> int launch_input_any(const Problem&, void* workspace, void* stream);
template <class T> int launch_weight_any(const Problem&, const Slices&, void* workspace, void* stream);

// d_spline and d_base from the slices' sums: (count, in, bases, out) and behind them (count, in, out).
template <class T> int launch_add_slices(const Problem&, const void* parts, int64_t slices, void* stream);

#define KAN_FOR_EVERY_TYPE(launcher)                                  \
  template int launcher<float>(const Problem&, void*, void*);         \
  template int launcher<double>(const Problem&, void*, void*);        \
  template int launcher<BFloat16>(const Problem&, void*, void*);      \
  template int launcher<Float16>(const Problem&, void*, void*);

}  // namespace kan::cuda
