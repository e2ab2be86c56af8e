// What runtime.cpp is to the other files of the runtime: the cluster that runs, and its threads.
#pragma once

#include <cstddef>

#include "emulation.h"
#include "fibers.h"

namespace kan::emulation {

// A block of the cluster that runs.
struct Neighbour {
  int number;  // among the blocks of the launch that have begun
  char* memory;
  bool ended;
};
int blocks_of_cluster();
Neighbour neighbour(int rank);

// The thread that runs stops here, until all that wait for this place are woken.
void sleep_at(const void* place);
void wake_all_at(const void* place);
// Below `count`, alike in every launch.
unsigned random_number(unsigned count);

// warpgroup.cpp: whether a proxy fence followed all that a block's threads wrote there.
bool shown(int block, size_t offset, size_t bytes);

// cluster.cpp: copies that have not arrived yet, and one of them does.
int copies_under_way();
void let_a_copy_arrive();

}  // namespace kan::emulation
