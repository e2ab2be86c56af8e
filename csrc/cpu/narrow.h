// Layers with few outputs, vectorised over the batch: see narrow_tile.h.
#pragma once
#include "bucket.h"

namespace kan::cpu::KAN_ISA::narrow {

constexpr int kMaxOutputs = Simd<float>::N;  // what the tiles on the stack hold

// Registers that hold a table of `length` entries whose lanes can be permuted; 0 where a table must be gathered from memory.
template <class T> inline int table_registers(int length) {
#if defined(KAN_ISA_AVX512)
  constexpr bool permutes = true;
#elif defined(KAN_ISA_AVX2)
  constexpr bool permutes = sizeof(T) == 4;
#else
  constexpr bool permutes = false;
#endif
  return !permutes ? 0 : length <= Simd<T>::N ? 1 : length <= 2 * Simd<T>::N ? 2 : 0;
}

// Narrow kernels pay for every edge, wide ones for every vector of outputs. Time of narrow over wide, cubic, float32, one
// thread, 4096 x 8 inputs, forward and backward:
//   AVX-512  out = 1     4          8          12         15        AVX2  1          4          8
//   G = 5    0.35, 0.40  0.41, 0.52 0.58, 0.79 0.71, 1.03 0.82, 1.20     0.47, 0.55  0.70, 0.88 1.01, 1.60
//   G = 20   0.31, 0.48  0.37, 0.69 0.57, 1.18            0.87, 1.94     0.47, 0.56  1.01, 1.31 1.83, 2.55
//   G = 50   0.42, 0.69  0.92, 1.19 1.66, 2.20  (gathers)
// Below 256 rows the tables of a layer with many inputs cost more than they save (784 x 8, 64 rows: 1.42).
template <class T> bool pays_for_tables(const Problem<T>& p) { return p.batch >= 256 || p.in_features <= 16; }

template <class T> bool serves_output(const Problem<T>& p) {
  constexpr int N = Simd<T>::N, most = N - 1, gathered = N >= 8 ? N / 4 : 1;
  const bool permuted = table_registers<T>(bucket_count(p) + 2) > 0;
  return p.out_features <= (permuted ? most : gathered) && pays_for_tables(p);
}
template <class T> bool serves_backward(const Problem<T>& p) {
  constexpr int N = Simd<T>::N, most = 5 * N / 8, edges = (kRegisters == 32 ? 9 : 5) * N;
  return p.out_features <= most && p.bases() * p.out_features <= edges && pays_for_tables(p);
}

template <class T> void contract_output(const Problem<T>&, const Runtime&);
template <class T> void contract_backward(const Problem<T>&, const Runtime&);

}  // namespace kan::cpu::KAN_ISA::narrow
