// One layer on one tile, column by column: what the contractions of a layer and those of a whole network are made of. The
// kernels are compiled once, in narrow_output.cpp and narrow_backward.cpp, and reached through pointers.
#pragma once
#include "narrow_tile.h"

namespace kan::cpu::KAN_ISA::narrow {

// y[o][row] += features of one input * its edges; x, scale: columns, y: columns kColumn apart.
template <class T>
using OutputKernel = void (*)(const Pieces<T>&, int64_t input, const T* x, const T* scale, int rows, T* y);
template <class T> OutputKernel<T> pick_output(const Pieces<T>&);

// One input on one tile: what the sums over rows read.
template <class T> struct alignas(64) Features {
  T w[kMaxOrder + 1][kColumn];
  T base[kColumn];
  typename Simd<T>::Int interval[kColumn];
};

// dx[row] = sum over outputs of g * edge, by the tables of the derivative.
template <class T>
using InputKernel = void (*)(const Pieces<T>&, int64_t input, const T* x, const T* g, int rows, T* dx);
// What weight gradients read of an input.
template <class T>
using FeatureKernel = void (*)(const Pieces<T>&, int64_t input, const T* x, const T* scale, int rows, Features<T>&);
// Both at once, by the tables of the derivative and of the value.
template <class T>
using BothKernel = void (*)(const Pieces<T>&, const Pieces<T>&, int64_t input, const T* x, const T* g, int rows, T* dx,
                            Features<T>&);
// Sums over the rows of a tile for four rows of bases.
template <class T> using RowsKernel = void (*)(const Features<T>&, const T* g, int rows, int first, T* d, ptrdiff_t stride);

constexpr int kWidest = kRegisters == 32 ? 5 : 2;  // outputs of one weight kernel: 4 * 5 sums and 4 bases in registers
template <class T> struct WeightKernels {
  FeatureKernel<T> features;
  BothKernel<T> both;
  RowsKernel<T> rows[kWidest + 1];
};

// contract_input of order n_input and contract_weight of order n_weight of a layer, by parts of the batch: every part keeps
// its own sums, which are added in order, so that results depend on the number of parts alone.
template <class T> class LayerBackward {
 public:
  LayerBackward(const Problem<T>& p, int64_t parts, bool need_x, bool need_weights);
  // with_values: also the tables that OutputKernel reads, of order n_weight.
  void reserve(Arena& arena, bool with_values) const;
  void prepare(Arena& arena, bool with_values);

  // Sets the sums of a part to zero, for inputs [first, end).
  void clear(int64_t part, int64_t first, int64_t end) const;
  // One input on one tile. x, scale: its columns; g: columns of all outputs; dx: the column of its gradient.
  void add(int64_t part, int64_t input, const T* x, const T* scale, const T* g, int rows, T* dx, Features<T>&) const;
  // Writes p.d_spline and p.d_base: the parts in order, the gradient of the differences turned into that of coefficients.
  void finish() const;

  const Problem<T>& problem() const { return p_; }
  const Pieces<T>& values() const { return for_w_; }
  bool need_weights() const { return need_w_; }

 private:
  Problem<T> p_;
  int64_t parts_;
  bool need_x_, need_w_;
  Pieces<T> for_x_, for_w_;
  InputKernel<T> input_;
  WeightKernels<T> weight_;
  bool together_;          // input_ and weight_.features in one pass
  int count_, stride_;     // rows of the differenced coefficients that a window may reach; that, in whole kernels
  int offset_;             // row of the coefficients where window 0 begins
  T *d_spline_, *d_base_;  // (parts, in, out, stride) and (parts, in, out)
  T* packed_;              // (bases + n, out)

  size_t edges() const { return size_t(p_.in_features * p_.out_features); }
  size_t packed_size() const { return size_t(p_.bases() + larger(p_.n_input, p_.n_weight)) * size_t(p_.out_features); }
};

}  // namespace kan::cpu::KAN_ISA::narrow
