// Whole networks of narrow layers as one kernel: what it is given, and how a block's shared memory is laid out.
#pragma once
#include "narrow.h"

namespace kan::cuda {

// A thread takes a row through all layers. Columns (one number of every row of a tile) lie one bank further from each other
// than they are long, so that threads meet different banks along rows and along columns.
constexpr int kNetworkThreads = 128, kNetworkPitch = kNetworkThreads + 1;
constexpr int kNetworkDepth = 6;  // arguments of a kernel end at 4 KB

struct NetworkLayerPlan {
  Problem p;
  NarrowPlan tables;  // its places, starts, inverses, firsts, cubics, base and edges alone
  const float* bias;
  float* d_bias;
  int inputs;  // the column where its inputs begin
  int sums;    // the first of its sums: (in, bases + 1, out), then (out) for the bias
};

struct NetworkArguments {
  NetworkLayerPlan layers[kNetworkDepth];
  Activation<float> value, slope;
  Cubic uniform[kMaxCubicOrder + 1];
  int depth, widest;
  int columns;    // bytes: where columns of every layer's inputs, and of the last one's outputs, begin
  int gradients;  // bytes: columns of the gradients of a layer's outputs and of its inputs
  int windows;    // bytes: columns of the weights of one input's window, of its base activation, and of where the window begins
  int sums;       // bytes
  int all_sums;   // how many
  bool need_weights;
  int64_t shared, tiles, blocks;
};
static_assert(sizeof(NetworkArguments) <= 4096);

int launch_output(const NetworkArguments&, void* stream);
// parts (all_sums, blocks): sums that blocks leave.
int launch_backward(const NetworkArguments&, float* parts, void* stream);

}  // namespace kan::cuda
