// The kernels' launchers, as launch.cpp calls them.
#pragma once
#include "polynomials.h"

namespace kan::cuda {

// How a wide kernel multiplies. tf32x3: float32 numbers as sums of two tf32 ones, three products for true float32.
enum class Products { bfloat16, float16, tf32, tf32x3 };

// How a long sum is cut: `count` slices of `rows` (of the batch, or inputs), whose sums lie `offset` bytes into the workspace.
struct Slices {
  int64_t count, rows;
  size_t offset;
};

// How tiles are shared out among blocks: the first `whole` have a block each, the `rest` is cut into `slices` of `rows` terms, whose
// sums lie `offset` bytes into the workspace. Blocks of whole tiles come first, those of the slices
// behind them, slice by slice.
struct TileCut {
  int whole, rest, slices;
  int64_t rows;
  size_t offset;

  KAN_INLINE int parts() const { return rest * slices; }
  KAN_INLINE int blocks() const { return whole + parts(); }
};

// What contract_weight by warpgroups does on a GPU of so many multiprocessors.
TileCut cut_of_weight(const Problem&, const Device&);

// The tiles of contract_output and contract_input for every problem. A warp takes some rows, 4 or 1, through a part of the inputs, one
// after another, for 32 outputs, one a lane: all lanes read the same windows and consecutive weights. Each of these turns waits for memory,
// and so does making windows, which is why blocks are as large as registers allow.
constexpr int kAnyThreads = 512, kAnyWarps = kAnyThreads / 32, kRowsOfWarp = 4, kMostTurns = 8;

// Rows of a tile: 1 to 64. Tall ones read weights less often, low ones make more blocks and more warps for the inputs of a row. turns: of
// a warp, 1 to kMostTurns: a thread has one window, or none.
struct AnyTile {
  int rows, turns;

  KAN_INLINE int rows_of_warp() const { return rows < kRowsOfWarp ? 1 : kRowsOfWarp; }
  KAN_INLINE int groups() const { return rows / rows_of_warp(); }
  KAN_INLINE int side() const { return kAnyWarps / groups(); }  // warps that share rows
  KAN_INLINE int inputs() const { return turns * side(); }
  KAN_INLINE int windows() const { return rows * inputs(); }
};

template <class T> int launch_output_any(const Problem&, AnyTile, const Slices&, void* workspace, void* stream);
template <class T> int launch_input_any(const Problem&, AnyTile, void* stream);
template <class T> int launch_weight_any(const Problem&, const Slices&, void* workspace, void* stream);

// y on tensor cores, dense or sparse, in tiles of 128 or (16-bit types) 256 columns; parts (slices, batch, out) where inputs are
// cut into slices, else null.
template <Products P, bool kSparse> int launch_output_wide(const WideArguments&, int columns, float* parts, Slices, void* stream);

// The same by warpgroups, 16-bit types only.
template <Products P, bool kSparse> int launch_output_warpgroup(const WideArguments&, int columns, float* parts, Slices, void* stream);

// Of columns 128 or 256.
template <Products P> int launch_input_warpgroup(const WideArguments&, int columns, void* stream);
// d_spline and d_base, with the sums of their parts, if any: weight_tiles.h says how these lie.
template <Products P> int launch_weight_warpgroup(const WideArguments&, int columns, float* parts, TileCut, void* stream);

// The three by clusters, whose blocks share what they copy: 16-bit types, rows of weights and g at multiples of 16 bytes. contract_output and
// contract_weight: tiles of 256 columns, where WideArguments.quick serves; the former all inputs in one slice, the latter pairs_features.
template <Products P> int launch_output_cluster(const WideArguments&, void* stream);
template <Products P> int launch_input_cluster(const WideArguments&, void* stream);
template <Products P> int launch_weight_cluster(const WideArguments&, float* parts, TileCut, void* stream);

template <Products P> int launch_input_wide(const WideArguments&, void* stream);
// d_spline and d_base; parts (slices, in, bases, out) and behind them (slices, in, out), or null for one slice.
template <Products P> int launch_weight_wide(const WideArguments&, int columns, float* parts, Slices, void* stream);

// to (size,) of type T = sums over `slices` of parts (slices, size).
template <class T> int launch_add(const void* parts, void* to, int64_t size, int64_t slices, void* stream);
// d_spline and d_base from the slices' sums: (count, in, bases, out) and behind them (count, in, out).
template <class T> int launch_add_slices(const Problem&, const void* parts, int64_t slices, void* stream);

}  // namespace kan::cuda
