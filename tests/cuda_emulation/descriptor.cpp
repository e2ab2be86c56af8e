// Where the emulation finds the numbers of an operand that a matrix descriptor points to.
#include "emulation.h"

extern "C" uint32_t kan_place(uint64_t descriptor, int column, int depth) {
  return kan::emulation::Descriptor(descriptor).place(column, depth);
}
