// Layers of few inputs and outputs: what their kernels are given, and how a block's shared memory is laid out.
#pragma once
#include "polynomials.h"

namespace kan::cuda {

// Threads of a block at the most; rows that a lane takes at once; its outputs at the most.
constexpr int kNarrowThreads = 256, kNarrowWarps = kNarrowThreads / 32, kNarrowRows = 2, kNarrowColumns = 8;

// Numbers of `base` of a group of `lane_columns` outputs: four are read at once where there are as many.
constexpr KAN_INLINE int base_of_group(int lane_columns) { return lane_columns < 4 ? lane_columns : (lane_columns + 3) / 4 * 4; }

// A window's cubics, and one more for the pitch: lanes in different pieces meet different banks.
constexpr int kWindowPitch = kMaxCubicOrder + 2;

// Blocks of a multiprocessor at once that a kernel has registers for.
constexpr int narrow_residents(Operation operation, int lane_columns) {
  if (operation == Operation::output) return lane_columns == 1 ? 4 : lane_columns <= 6 ? 3 : 2;
  return lane_columns <= (operation == Operation::input ? 3 : 2) ? 4 : lane_columns <= 5 ? 3 : 2;
}

// A matrix of `batch` rows, a tile of whose rows is copied to shared memory, into `offset` of a stage. Lengths in bytes.
struct Staged {
  const char* data;  // or null
  int row, pitch, offset;
  uint32_t per_row;  // 2^32 / row, rounded up: byte n of a tile lies in row (n * per_row) >> 32
  bool aligned;  // tiles begin at multiples of 16 bytes

  KAN_INLINE const char* of_tile(int tile, int rows) const { return data + int64_t(tile) * (rows * row); }
};

// Offsets in bytes into shared memory. A piece of an input: below all of its intervals, one of them, or above.
struct NarrowPlan {
  int warps, pieces;
  int tile_rows, last_rows;    // of the last tile
  int lane_columns, groups;    // outputs of a lane; lanes that share a row, each with its own outputs
  int group_bits, side;        // log2 of groups, and of the rows that a warp's lanes take at once, 32 / groups
  int edge_pitch;              // edges from piece to piece
  int share, shares;           // contract_weight: jobs of a block, and into how many shares they are cut
  int team, teams;             // warps that share the jobs of a row; such teams
  int places, starts, inverses, firsts, cubics, base, edges;
  int inverses_behind;         // numbers from starts to inverses
  int base_pitch;              // numbers of `base` from input to input
  float above, reach;          // the last piece; u is held within -reach and reach
  int knots, described;        // needed to make the others only
  int buffers, stage, result;  // where tiles begin; bytes of one of a warp's two stages, and of its results
  bool fetches_early;          // the first tiles come while tables are made
  int result_pitch;            // numbers
  uint32_t per_result;         // 2^32 / numbers of a row of results, rounded up
  int bins;                    // contract_weight's sums
  int64_t shared, tiles, blocks;
  Staged x, scale, g;
  bool has_scale, has_base, is_silu;  // is_silu: the base activation's derivative is the usual one of the operation
  bool is_plain;               // no scale, and no other base activation
  bool aligned;                // the result begins at a multiple of 16 bytes
};

template <class C> struct NarrowArguments {
  Problem p;
  Activation<C> activation;
  CubicOf<C> uniform[kMaxCubicOrder + 1];
  NarrowPlan plan;
};

// Numbers of pieces, and what else locate() needs.
void plan_pieces(const Problem& p, NarrowPlan& plan);

// Null, or what of a problem the kernels do not serve.
const char* why_not_narrow(const Problem& p, const Device& device, Operation operation);
NarrowPlan plan_narrow(const Problem& p, const Device& device, Operation operation);
template <class C> NarrowArguments<C> make_narrow(const Problem& p, const NarrowPlan& plan);

template <class C> int launch_output_narrow(const NarrowArguments<C>&, void* stream);
template <class C> int launch_input_narrow(const NarrowArguments<C>&, void* stream);
// parts (in, bases + 1, out, plan.blocks): sums that blocks leave.
template <class C> int launch_weight_narrow(const NarrowArguments<C>&, void* parts, void* stream);

// call(n) with the number of outputs of a lane as a constant.
#define KAN_BY_COLUMNS(columns, call)  \
  switch (columns) {                   \
    case 1: return call(1);            \
    case 2: return call(2);            \
    case 3: return call(3);            \
    case 4: return call(4);            \
    case 5: return call(5);            \
    case 6: return call(6);            \
    default: return call(8);           \
  }

}  // namespace kan::cuda
