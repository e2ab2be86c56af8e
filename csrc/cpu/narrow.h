// Layers with few outputs, vectorised over the batch: see narrow_tile.h.
#pragma once
#include "arena.h"

namespace kan::cpu::KAN_ISA::narrow {

template <class T> bool serves_output(const Problem<T>& p) { return p.out_features <= 8; }
template <class T> bool serves_backward(const Problem<T>& p) { return p.out_features <= 8; }
template <class T> void contract_output(const Problem<T>&, const Runtime&);
template <class T> void contract_backward(const Problem<T>&, const Runtime&);

}  // namespace kan::cpu::KAN_ISA::narrow
