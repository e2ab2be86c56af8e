// The left operand of a block in shared memory, made by all of its threads and read by every warp that multiplies its rows.
// contract_output: 128 rows of the batch by a step of 32 columns, which are 4 inputs x 8 bases, in the dense or the
// structured-sparse form of fragments.cuh, or 32 base activations.
#pragma once
#include "products.cuh"

namespace kan::cuda {

// A block: 8 warps, 128 rows by kColumns. A warp: kRows by 64.
constexpr int kThreads = 256;
template <Products P, int kColumns> struct WarpTile {
  static constexpr int kRows = kColumns == 256 ? 64 : 32, kHigh = kRows / 16, kTiles = 8, kDown = kWideRows / kRows;
  static_assert(kColumns == kThreads / 32 / kDown * kTiles * 8);
  static constexpr int kPitch = kPitchOf<kColumns>, kStageNumbers = kStepDepth * kPitch;
  // Stages of the right operand in flight; with fewer bytes to a number there is room for more.
  static constexpr int kStages = kIsHalf<P> ? 4 : 3;
  static constexpr size_t kBytesOfStages = kStages * kStageBytesOf<P, kColumns>;
};

// Pieces of 16 bytes to a row.
template <Products P, bool kSparse> constexpr int kPieces = (kIsHalf<P> ? 4 : 8) / (kSparse ? 2 : 1);
template <Products P> constexpr int kOperandBytes = kWideRows * kPieces<P, false> * 16;
// Sparse: 4 bytes (16-bit types) or 8 (tf32) to a row.
template <Products P, bool kSparse> constexpr int kMetadataBytes = kSparse ? kWideRows * (kIsHalf<P> ? 4 : 8) : 0;

// Where a piece is. Eight rows' pieces of one number meet no bank twice, and neither do all pieces of neighbouring rows. From one
// row to the 8th after it, and from one piece to another, all offsets change alike: by a sum the one, by exclusive or the other.
template <int kPieces> KAN_INLINE int piece_offset(int row, int piece) {
  return (row * kPieces + (piece ^ (row * kPieces / 8 & (kPieces - 1)))) * 16;
}

// Metadata words as the instructions take them: of rows g and g + 8 of a tile, low and high half; 16 columns of a 16-bit
// operand, 8 of a tf32 one.
template <Products P> KAN_INLINE int metadata_offset(int row, int word) {
  return ((row / 16 * 8 + row % 8) * (kIsHalf<P> ? 2 : 4) + word) * 4 + row / 8 % 2 * 2;
}

// tf32: bases 0 .. 3 and 4 .. 7 of a window; kFolded: `lower` alone, with the one of bases j and j + 4 that may be other than zero.
template <bool kFolded> KAN_DEVICE void spread_numbers(const uint32_t (&w)[4], int shift, Words<4>& lower, Words<4>& upper) {
  float folded[4];
  fold_pairs({as_float(w[0]), as_float(w[1]), as_float(w[2]), as_float(w[3])}, shift, folded);
  KAN_UNROLL_WINDOW
  for (int j = 0; j < 4; ++j) {
    const bool is_upper = !kFolded && upper_of_pair(j, shift);
    lower.w[j] = is_upper ? 0u : as_bits(folded[j]);
    upper.w[j] = is_upper ? as_bits(folded[j]) : 0u;
  }
}

// Bases 8 chunk .. 8 chunk + 7 of input 0 .. 3 of the step.
template <Products P, bool kSparse>
KAN_DEVICE void write_window(char* tile, char* metadata, const Kept<P>& window, int chunk, int row, int input) {
  constexpr int kHere = kPieces<P, kSparse>;
  const int shift = window.first - chunk * kStepBases;
  if constexpr (kIsHalf<P> && kSparse) {
    Words<2> words;
    sparse_words(window.w, shift, words.w[0], words.w[1]);
    *reinterpret_cast<Words<2>*>(tile + piece_offset<kHere>(row, input / 2) + input % 2 * 8) = words;
    metadata[metadata_offset<P>(row, input / 2) + input % 2] = char(pair_metadata(shift));
  } else if constexpr (kIsHalf<P>) {
    Words<4> words;
    spread_words<P>(window.w, shift, words.w);
    *reinterpret_cast<Words<4>*>(tile + piece_offset<kHere>(row, input)) = words;
  } else {
    Words<4> lower, upper;
    spread_numbers<kSparse>(window.w, shift, lower, upper);
    if constexpr (kSparse) {
      *reinterpret_cast<Words<4>*>(tile + piece_offset<kHere>(row, input)) = lower;
      *reinterpret_cast<uint16_t*>(metadata + metadata_offset<P>(row, input)) = uint16_t(fold_metadata(shift));
    } else {
      *reinterpret_cast<Words<4>*>(tile + piece_offset<kHere>(row, 2 * input)) = lower;
      *reinterpret_cast<Words<4>*>(tile + piece_offset<kHere>(row, 2 * input + 1)) = upper;
    }
  }
}

// Base activations of rows b0 .. and inputs `first` .., kHere pieces of 16 bytes to a row, to place(row, piece). Beyond `rows`
// rows or input `end` they are any finite numbers: there the other operand is zero, or nobody writes the result.
template <Products P, int kHere, class Place>
KAN_DEVICE void write_base(const WideArguments& a, int64_t b0, int rows, int first, int end, Place place) {
  const Problem& p = a.p;
  constexpr int kNumbers = kIsHalf<P> ? 8 : 4, kRows = kThreads / kHere, kPasses = 16 / kNumbers;
  const unsigned thread = thread_now();
  const int piece = int(thread % kHere), row = int(thread / kHere), i = first + piece * kNumbers, inputs = int(p.in_features);
  auto load = [&](Stored<kNumbers>& to, const void* data, int pass) {
    const int r = row + pass * kRows;
    const bool vectors = inputs % kNumbers == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    to.load(rows_from(p, data, b0), p.x_dtype, r * inputs + i, r < rows ? end - i : 0, vectors);
  };
  auto write = [&](float (&x)[kNumbers], int pass) {
    if (p.scale != nullptr) {
      Stored<kNumbers> stored;
      float scale[kNumbers];
      load(stored, p.scale, pass);
      stored.widen(p.x_dtype, scale);
      KAN_UNROLL_ALL
      for (int m = 0; m < kNumbers; ++m) x[m] *= scale[m];
    }
    Words<4> words;
    KAN_UNROLL_ALL
    for (int m = 0; m < 4; ++m) {
      if constexpr (kIsHalf<P>) words.w[m] = pack<P>(x[2 * m], x[2 * m + 1]);
      else words.w[m] = as_bits(x[m]);
    }
    *reinterpret_cast<Words<4>*>(place(row + pass * kRows, piece)) = words;
  };
  Stored<kNumbers> stored[kPasses];
  KAN_UNROLL_ALL
  for (int pass = 0; pass < kPasses; ++pass) load(stored[pass], p.x, pass);
  // The code once, and the numbers move along: registers have no index.
  KAN_NO_UNROLL
  for (int pass = 0; pass < kPasses; ++pass) {
    float x[kNumbers];
    stored[0].widen(p.x_dtype, x);
    KAN_UNROLL_ALL
    for (int r = 1; r < kPasses; ++r) stored[r - 1] = stored[r];
    activate_all(a.activation, x);
    write(x, pass);
  }
}

// A thread's windows of a group of inputs: one input, two rows kRows apart. What they are made of is loaded a group ahead.
template <Products P, bool kSparse, int kInputs> struct ThreadWindows {
  static constexpr int kRows = kThreads / kInputs;
  Kept<P> windows[2];
  Even even;
  Stored<1> x[2];

  KAN_DEVICE static void load(Stored<1> (&to)[2], const void* data, const Problem& p, int64_t b0, int rows, int group, int end) {
    const unsigned thread = thread_now();
    const int i = group + int(thread % kInputs), row = int(thread / kInputs), inputs = int(p.in_features);
    KAN_UNROLL_ALL
    for (int r = 0; r < 2; ++r) {
      const int line = row + r * kRows;
      to[r].load(rows_from(p, data, b0), p.x_dtype, line * inputs + i, line < rows && i < end, false);
    }
  }
  // Rows b0 .. of which there are `rows`, inputs group .. below `end`; what lies beyond is 0.
  KAN_DEVICE void load(const WideArguments& a, int64_t b0, int rows, int group, int end) {
    const int i = group + int(thread_now() % kInputs);
    if (i < end) even = even_knots(a.described[i]);
    load(x, a.p.x, a.p, b0, rows, group, end);
  }

  KAN_DEVICE void evaluate(const WideArguments& a, int64_t b0, int rows, int group, int end) {
    const Problem& p = a.p;
    const int i = group + int(thread_now() % kInputs);
    float at[2][1], factor[2][1] = {{1.0f}, {1.0f}};
    KAN_UNROLL_ALL
    for (int r = 0; r < 2; ++r) x[r].widen(p.x_dtype, at[r]);
    if (p.scale != nullptr) {
      Stored<1> scale[2];
      load(scale, p.scale, p, b0, rows, group, end);
      KAN_UNROLL_ALL
      for (int r = 0; r < 2; ++r) scale[r].widen(p.x_dtype, factor[r]);
    }
    if (i >= end) {
      windows[0] = windows[1] = {};
    } else if (a.continuous && even.inverse_h > 0) {
      KAN_UNROLL_ALL
      for (int r = 0; r < 2; ++r) windows[r] = keep<P, kSparse>(even_window(a, even, at[r][0], factor[r][0]));
    } else {
      KAN_NO_UNROLL
      for (int r = 0; r < 2; ++r) {
        windows[0] = windows[1];
        windows[1] = keep<P, kSparse>(any_window(a, i, at[0][0], factor[0][0]));
        at[0][0] = at[1][0], factor[0][0] = factor[1][0];
      }
    }
  }

  // body(window, row, input of the group).
  template <class Body> KAN_DEVICE void for_each(Body body) const {
    const unsigned thread = thread_now();
    KAN_UNROLL_ALL
    for (int r = 0; r < 2; ++r) body(windows[r], int(thread / kInputs) + r * kRows, int(thread % kInputs));
  }
};

}  // namespace kan::cuda
