// Float32 products on the tensor cores' 16-bit instructions: a number times a power of two is the sum of two float16 ones, 22
// bits together, and of their four products three count: upper by upper, upper by lower, lower by upper (Ootomo and Yokota,
// "Recovering single precision accuracy from Tensor Cores", 2022, section 3). Hopper multiplies float16 twice as fast as tf32,
// which has no more bits, and takes it by lines, as weights lie in memory.
//
// float16 has 30 binades. With the largest number of a row or column (whatever a sum does not run over) brought to the top,
// those down to 2^-18 of it keep their 22 bits, all smaller ones an error of 2^-40 of the largest.
#pragma once
#include "launch.h"

namespace kan::cuda {

// A matrix (rows, columns) in halves: of every 32 columns of a row the upper halves and behind them the lower ones, 128 bytes;
// columns that do not exist are zeros.
constexpr int kSplitDepth = 32;
KAN_INLINE int64_t split_pitch(int64_t columns) { return (columns + kSplitDepth - 1) / kSplitDepth * (2 * kSplitDepth); }
// Where column `column` begins in its row; its lower half is kSplitDepth further.
KAN_INLINE int64_t split_place(int64_t column) { return column / kSplitDepth * (2 * kSplitDepth) + column % kSplitDepth; }

constexpr int64_t kMaximaSlices = 64;  // of the rows, in each of which a column's largest magnitude is found
constexpr float kSplitTop = 32768.0f;  // 2^15: what values of bases, which are at most 1, are multiplied with

// Operations in halves, and the powers of two that they were multiplied with. Of each contraction only those that it needs.
struct Halves {
  Float16 *spline, *base, *g;         // rows of split_pitch(out_features) numbers
  float* columns;                     // (out) of W's columns, by which g's columns were divided; for contract_weight of g's columns
  float* rows;                        // (batch) of the features' or g's rows
  float* inputs;                      // (in) of the base features
  float *maxima, *maxima_of_inputs;  // scratch: (kMaximaSlices, out) and (kMaximaSlices, in)
};

// Bytes of an operation's halves, and where they lie.
size_t size_of_halves(const Problem&, Operation);
Halves place_halves(const Problem&, Operation, void* memory);
// Queues the kernels that make them, and the tables of knots that launch_cubics makes.
int launch_operands(const WideArguments&, Operation, const Halves&, void* stream);

// The contractions themselves, those included: see the like of launch.h.
int launch_output_split(const WideArguments&, const Halves&, float* parts, Slices, void* stream);
int launch_input_split(const WideArguments&, const Halves&, void* stream);
int launch_weight_split(const WideArguments&, const Halves&, float* parts, TileCut, void* stream);

// What they serve: values of bases, at most 1; contract_input, which has no bases among its factors, serves all.
const char* why_not_split(const Problem&, Operation);

}  // namespace kan::cuda
