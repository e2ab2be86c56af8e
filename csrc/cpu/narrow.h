// Layers with few outputs, vectorised over the batch: see narrow.cpp.
#pragma once
#include "arena.h"
#include "../kernels.h"

namespace kan::cpu::KAN_ISA::narrow {

template <class T> bool serves_output(const Problem<T>&) { return false; }
template <class T> bool serves_backward(const Problem<T>&) { return false; }
template <class T> void contract_output(const Problem<T>&, const Runtime&) {}
template <class T> void contract_backward(const Problem<T>&, const Runtime&) {}

}  // namespace kan::cpu::KAN_ISA::narrow
