#include "plan.h"

#include "weight_tiles.h"

namespace kan::cuda {

namespace {

// Cuts a sum of `length` terms into slices: blocks enough for `per_processor` on every multiprocessor, no slice below
// `least` terms and all multiples of it, at most 64 MiB of partial sums of `bytes` each.
Slices cut(int64_t length, int64_t least, int64_t tiles, int64_t bytes, int per_processor, const Device& device, size_t offset) {
  const int64_t wanted = (int64_t(per_processor) * device.multiprocessors + tiles - 1) / (tiles > 0 ? tiles : 1);
  int64_t most = (int64_t(64) << 20) / (bytes > 0 ? bytes : 1);
  if (most > length / least) most = length / least;
  int64_t count = wanted < most ? wanted : most;
  if (count < 1) count = 1;
  int64_t each = ((length + count - 1) / count + least - 1) / least * least;
  if (each < 1) each = least;
  count = (length + each - 1) / each;
  return {count < 1 ? 1 : count, each, offset};
}

// Products of 16-bit numbers that one of the problem's takes of warpgroups.
double products_of_one(const Problem& p) { return p.weight_dtype == kFloat32 ? 3.0 : 1.0; }

// The same for kernels that have a multiprocessor to themselves, and rounds of blocks so few that a last one half empty costs: as
// many slices as make the whole fastest, at about 5 TFLOP/s a multiprocessor and 4 TB/s for the partial sums.
Slices cut_rounds(int64_t length, int64_t least, int64_t tiles, double flops_of_tile, int64_t bytes, const Device& device, size_t offset) {
  Slices best{1, length, offset};
  double fastest = 0;
  for (int64_t wanted = 1; wanted <= 16 && (wanted == 1 || (wanted * least <= length && wanted * bytes <= int64_t(256) << 20)); ++wanted) {
    const int64_t rows = wanted == 1 ? length : ((length + wanted - 1) / wanted + least - 1) / least * least;
    const int64_t count = (length + rows - 1) / rows, rounds = (tiles * count + device.multiprocessors - 1) / device.multiprocessors;
    const double share = double(rows) / double(length);
    const double time = double(rounds) * share * flops_of_tile / 5e12 + (count > 1 ? double(count * bytes) / 2e12 : 0.0);
    if (wanted == 1 || time < 0.97 * fastest) best = {count, rows, offset}, fastest = time;
  }
  return best;
}

// Of 16-bit types by warpgroups: the width of tiles and the slices that are fastest by a model, fitted within 5 % to 75 measurements on an
// H200 (64 to 4096 rows of 256 to 1024 inputs and outputs, 1 to 16 slices): a round of blocks takes 2.4 us and 0.60 a step of 64 deep
// where tiles are 128 columns wide, 5.1 us and 0.82 where they are 256; adding slices 2.8 us and 0.8 for each million bytes of theirs.
// Narrow tiles win where wide ones leave multiprocessors without work.
OutputPlan plan_output_warpgroup(const Problem& p, const Device& device, size_t offset) {
  constexpr int64_t kGroup = 8, kMostSlices = 16, kMostBytes = int64_t(256) << 20;
  const int64_t groups = (p.in_features + kGroup - 1) / kGroup, bytes = p.batch * p.out_features * 4;
  OutputPlan best{};
  double fastest = 0;
  for (int columns = 128; columns <= 256 && (columns == 128 || p.out_features > 128); columns *= 2) {
    const double of_round = columns == 128 ? 2.4 : 5.1, of_step = columns == 128 ? 0.60 : 0.82;
    const int64_t tiles = ((p.batch + 127) / 128) * ((p.out_features + columns - 1) / columns);
    for (int64_t wanted = 1; wanted <= kMostSlices && wanted <= groups && (wanted == 1 || wanted * bytes <= kMostBytes); ++wanted) {
      const int64_t each = (groups + wanted - 1) / wanted, count = (groups + each - 1) / each;
      const int64_t steps = each * ((p.bases() + 7) / 8) + (p.base_weight != nullptr ? (each + 7) / 8 : 0);
      const int64_t rounds = (tiles * count + device.multiprocessors - 1) / device.multiprocessors;
      const double time = double(rounds) * (of_round + double(steps) * of_step) + (count > 1 ? 2.8 + 0.8e-6 * double(count * bytes) : 0.0);
      if (best.columns == 0 || time < fastest) best = {columns, {count, count > 1 ? each * kGroup : p.in_features, offset}}, fastest = time;
    }
  }
  return best;
}

}  // namespace

// A tile of 16-bit products is 256 outputs wide, which halves the making of the left operand, where that costs no padding. Sparse
// ones of warpgroups, whose left operand takes registers, always have 128; the dense ones of warpgroups have a plan of their own.
int columns_of_output(Family family, const Problem& p) {
  return p.weight_dtype != kFloat32 && family != Family::wgmma_sparse && (p.out_features - 1) / 128 % 2 == 1 ? 256 : 128;
}
// The weights' left operand is never sparse.
int columns_of_weight(const Problem& p) { return columns_of_output(Family::dense, p); }

// Wide tiles for long products of many tiles, and where narrow ones would leave too many columns without a whole input.
int columns_of_input(const Problem& p, const Device& device) {
  const int64_t wide = 256 / (p.bases() + 1), narrow = 128 / (p.bases() + 1);
  const int64_t tiles = ((p.batch + 127) / 128) * ((p.in_features + wide - 1) / wide);
  return 2 * wide >= 5 * narrow || (p.out_features >= 512 && tiles >= 8 * device.multiprocessors) ? 256 : 128;
}

OutputPlan plan_output(Family family, const Problem& p, const Device& device) {
  const size_t offset = size_of_described(p) + rounded(size_of_cubics(p));
  if (family == Family::wgmma && p.weight_dtype != kFloat32) return plan_output_warpgroup(p, device, offset);
  const int columns = columns_of_output(family, p);
  if (family == Family::cluster) return {columns, {1, p.in_features, offset}};
  const int64_t bytes = p.batch * p.out_features * 4, tiles = ((p.batch + 127) / 128) * ((p.out_features + columns - 1) / columns);
  if (!is_warpgroup(family)) return {columns, cut(p.in_features, 32, tiles, bytes, 2, device, offset)};
  const double depth = double(p.in_features) * ((p.bases() + 7) / 8 * 8 + 1);
  return {columns, cut_rounds(p.in_features, 64, tiles, 2.0 * 128 * double(columns) * depth * products_of_one(p), bytes, device, offset)};
}

// Of kernels other than those of warpgroups.
Slices slices_of_weight(const Problem& p, const Device& device) {
  const size_t offset = size_of_described(p) + rounded(size_of_cubics(p));
  const int64_t columns = columns_of_weight(p), bytes = p.in_features * (p.bases() + 1) * p.out_features * 4;
  const int64_t tiles = ((p.in_features + 15) / 16) * ((p.bases() + 7) / 8) * ((p.out_features + columns - 1) / columns);
  return cut(p.batch, 128, tiles, bytes, 2, device, offset);
}

constexpr int64_t kSliceOfAny = 64;  // inputs at the least: a second kernel adds the sums, and a slice must save as much

// Of the kernels for every problem.
Slices slices_any(const Problem& p, const Device& device) {
  const int64_t bytes = p.in_features * (p.bases() + 1) * p.out_features * int64_t(compute_size(p));
  return cut(p.batch, 512, p.in_features * ((p.out_features + 31) / 32), bytes, 4, device, 0);
}
// Tiles of theirs, as low, or as few turns, as give no more blocks than multiprocessors. Of contract_output warps with rows of their own
// are left something to do; there is a kernel for less than kRowsOfWarp rows for order 3 alone, and none for slices or float64. Of contract_input tiles
// are no taller than the batch fills.
AnyTile tile_of_output_any(const Problem& p, const Device& device) {
  const int64_t columns = (p.out_features + 31) / 32;
  const int least = p.spline_order == 3 && p.in_features < 2 * kSliceOfAny && p.weight_dtype != kFloat64 ? 1 : kRowsOfWarp;
  AnyTile tile{64, kMostTurns};
  for (AnyTile lower = tile; tile.rows > least && p.in_features > tile.side(); tile = lower) {
    lower.rows = tile.rows == kRowsOfWarp ? 1 : tile.rows / 2;
    if ((p.batch + lower.rows - 1) / lower.rows * columns > device.multiprocessors && p.batch > lower.rows) break;
  }
  return tile;
}
AnyTile tile_of_input_any(const Problem& p, const Device& device) {
  AnyTile tile{64, kMostTurns};
  while (tile.rows > kRowsOfWarp && p.batch <= tile.rows / 2) tile.rows /= 2;
  const int64_t tall = (p.batch + tile.rows - 1) / tile.rows;
  for (AnyTile shorter = tile; tile.turns > 1; tile = shorter) {
    shorter.turns = tile.turns / 2;
    if (tall * ((p.in_features + shorter.inputs() - 1) / shorter.inputs()) > device.multiprocessors) break;
  }
  return tile;
}
Slices slices_of_output_any(const Problem& p, const Device& device) {
  const int rows = tile_of_output_any(p, device).rows;
  const int64_t tiles = ((p.batch + rows - 1) / rows) * ((p.out_features + 31) / 32);
  // Of 16-bit types there is a kernel for slices of order 3 alone.
  if (p.spline_order != 3 && (p.weight_dtype == kBFloat16 || p.weight_dtype == kFloat16)) return {1, p.in_features, 0};
  return cut(p.in_features, kSliceOfAny, tiles, p.batch * p.out_features * int64_t(compute_size(p)), 1, device, 0);
}

// Of tiles that all take as long, those in full rounds gain nothing from being cut.
TileCut cut_of_weight(const Problem& p, const Device& device) {
  const int64_t columns = columns_of_weight(p), tiles = feature_tiles(p) * ((p.out_features + columns - 1) / columns);
  const int64_t rest = tiles % device.multiprocessors, bytes = p.in_features * (p.bases() + 1) * p.out_features * 4 / tiles * rest;
  const size_t offset = size_of_described(p) + rounded(size_of_cubics(p));
  const double flops_of_tile = 2.0 * 128 * double(columns) * double(p.batch) * products_of_one(p);
  const Slices slices = cut_rounds(p.batch, 64, rest, flops_of_tile, bytes, device, offset);
  if (slices.count == 1) return {int(tiles), 0, 1, slices.rows, offset};
  return {int(tiles - rest), int(rest), int(slices.count), slices.rows, offset};
}

}  // namespace kan::cuda
