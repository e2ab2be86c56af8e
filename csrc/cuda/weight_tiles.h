// How contract_weight by warpgroups is shared out: the tiles of d_spline and d_base, and which blocks have which of them.
//
// Tiles in whole rounds of blocks, one to a multiprocessor, write the result. A last round that would stay half empty is cut along the
// batch, which is the depth: its tiles' partial sums, "parts", are added in a fixed order afterwards (launch.h, TileCut).
#pragma once
#include "launch.h"

namespace kan::cuda {

// A tile is 128 features by 128 or 256 outputs. Its features: 16 inputs by 8 bases, or 128 inputs of the base branch.
constexpr int kTileFeatures = 128, kTileBases = 8, kTileInputs = kTileFeatures / kTileBases;

KAN_INLINE int base_tiles(const Problem& p) { return p.d_base != nullptr ? int((p.in_features + kTileFeatures - 1) / kTileFeatures) : 0; }
KAN_INLINE int chunks_of_bases(const Problem& p) { return (p.bases() + kTileBases - 1) / kTileBases; }
// Tiles of 128 features.
KAN_INLINE int feature_tiles(const Problem& p) {
  return int((p.in_features + kTileInputs - 1) / kTileInputs) * chunks_of_bases(p) + base_tiles(p);
}

struct FeatureTile {
  bool is_base;
  int chunk;  // of bases
  int input;  // first of 16, or of 128

  // Where feature `feature` of the tile lies among the rows of d_spline or d_base; -1 where it does not exist.
  KAN_INLINE int64_t row(const Problem& p, int feature) const {
    const int64_t i = input + (is_base ? feature : feature / kTileBases);
    const int f = chunk * kTileBases + feature % kTileBases;
    if (i >= p.in_features || (!is_base && f >= p.bases())) return -1;
    return is_base ? i : i * p.bases() + f;
  }
};
// The base branch first: its features take longer, and a round of blocks should not end with it.
KAN_INLINE FeatureTile feature_tile(const Problem& p, int number) {
  const int of_base = base_tiles(p), chunks = chunks_of_bases(p);
  if (number < of_base) return {true, 0, number * kTileFeatures};
  number -= of_base;
  return {false, number % chunks, number / chunks * kTileInputs};
}

// Tile `number` of all: features of the first outputs, then of the next ones.
struct WeightTile {
  FeatureTile features;
  int64_t o0;

  KAN_INLINE WeightTile(const Problem& p, int columns, int number)
      : features(feature_tile(p, number % feature_tiles(p))), o0(int64_t(number / feature_tiles(p)) * columns) {}
};

// What a block does: a tile, and of which rows of the batch. `part`: the number of its partial sums; below 0 it writes the result.
struct WeightBlock {
  WeightTile tile;
  int64_t begin, end;
  int part;

  KAN_INLINE WeightBlock(const Problem& p, int columns, const TileCut& cut, int number)
      : tile(p, columns, number < cut.whole ? number : cut.whole + (number - cut.whole) % cut.rest), begin(0), end(p.batch),
        part(number - cut.whole) {
    if (part < 0) return;
    begin = part / cut.rest * cut.rows;
    if (begin + cut.rows < p.batch) end = begin + cut.rows;
  }
};

// Whether blocks 2 k and 2 k + 1 have neighbouring features, and the same outputs and rows.
inline bool pairs_features(const Problem& p, const TileCut& cut) { return feature_tiles(p) % 2 == 0 && cut.whole % 2 == 0 && cut.rest % 2 == 0; }

// A part: (128 features, part_pitch outputs) float32; parts: (slices, tiles that are cut). Rows of outputs that do not exist are left out.
KAN_INLINE int part_pitch(const Problem& p, int columns) {
  return p.out_features < columns ? int(p.out_features + 1) / 2 * 2 : columns;  // even: two sums are written at once
}
inline size_t size_of_parts(const Problem& p, int columns, const TileCut& cut) {
  return size_t(cut.parts()) * kTileFeatures * size_t(part_pitch(p, columns)) * sizeof(float);
}

}  // namespace kan::cuda
