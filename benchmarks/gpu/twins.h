// The same instructions spelled out on the host: fragment layouts and sparsity metadata as the PTX ISA describes them
// (sections "Matrix Fragments for mma", "Sparse matrix storage", "Register Fragments for wgmma").
//
// A warp's operands are arrays over its 32 lanes. Inputs are small integers, so that every sum is exact in float32
// whatever the order and width of the hardware's accumulator: hardware and twin must agree bit for bit.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace twin {

enum class Type { tf32, bf16, fp16 };

// One warp tile: D (16 x 8) += A (16 x k) B (k x 8). A sparse A is stored with half its columns.
struct Form {
  Type type;
  int k;
  bool sparse;
};

inline float from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

// Small integers are exact in all three types.
inline uint32_t encode(Type type, float value) {
  if (type == Type::tf32) return to_bits(value);
  const uint32_t bits = to_bits(value);
  if (type == Type::bf16) return bits >> 16;
  if (value == 0.f) return 0;
  const int exponent = static_cast<int>(bits >> 23 & 255) - 127 + 15;
  return (bits >> 16 & 0x8000) | static_cast<uint32_t>(exponent) << 10 | (bits >> 13 & 1023);
}

inline float decode(Type type, uint32_t bits) {
  if (type == Type::tf32) return from_bits(bits & 0xffffe000u);
  if (type == Type::bf16) return from_bits(bits << 16);
  if ((bits & 0x7fff) == 0) return 0.f;
  return from_bits((bits & 0x8000) << 16 | ((bits >> 10 & 31) - 15 + 127) << 23 | (bits & 1023) << 13);
}

struct Place {
  int lane, index, half;
};

// Where element (row, column) of the stored A lies. tf32: one element a register, four columns a register pair.
inline Place place_a(Type type, int row, int column) {
  if (type == Type::tf32) return {(row & 7) * 4 + (column & 3), (row >> 3) + 2 * (column >> 2), 0};
  return {(row & 7) * 4 + (column & 7) / 2, (row >> 3) + 2 * (column >> 3), column & 1};
}

inline Place place_b(Type type, int row, int column) {
  if (type == Type::tf32) return {column * 4 + (row & 3), row >> 2, 0};
  return {column * 4 + (row & 7) / 2, row >> 3, row & 1};
}

inline Place place_d(int row, int column) { return {(row & 7) * 4 + column / 2, (row >> 3) * 2 + (column & 1), 0}; }

struct Warp {
  uint32_t a[32][4] = {}, b[32][4] = {}, e[32] = {};
  float c[32][4] = {};
};

inline void store(uint32_t (&lanes)[32][4], Type type, Place at, float value) {
  const uint32_t bits = encode(type, value);
  uint32_t& word = lanes[at.lane][at.index];
  word = type == Type::tf32 ? bits : (word & ~(0xffffu << 16 * at.half)) | bits << 16 * at.half;
}

inline float load(const uint32_t (&lanes)[32][4], Type type, Place at) {
  const uint32_t word = lanes[at.lane][at.index];
  return decode(type, type == Type::tf32 ? word : word >> 16 * at.half & 0xffffu);
}

// Metadata nibble of a chunk (4 columns; 2 for tf32, where a nibble names two halves of one column), in the first two
// lanes of each quad.
inline uint32_t nibble(const Warp& warp, int row, int chunk) {
  return warp.e[(row & 7) * 4 + (chunk >> 2)] >> (16 * (row >> 3) + 4 * (chunk & 3)) & 15u;
}

inline void set_nibble(Warp& warp, int row, int chunk, uint32_t value) {
  warp.e[(row & 7) * 4 + (chunk >> 2)] |= value << (16 * (row >> 3) + 4 * (chunk & 3));
}

// Element (row, column) of the full A, out of the stored one.
inline float element_a(const Warp& warp, Form form, int row, int column) {
  if (!form.sparse) return load(warp.a, form.type, place_a(form.type, row, column));
  if (form.type == Type::tf32) {
    const bool odd = nibble(warp, row, column >> 1) == 0b1110u;
    return (column & 1) == odd ? load(warp.a, form.type, place_a(form.type, row, column >> 1)) : 0.f;
  }
  const uint32_t chosen = nibble(warp, row, column >> 2);
  const int within = column & 3, first = 2 * (column >> 2);
  if (within == static_cast<int>(chosen & 3)) return load(warp.a, form.type, place_a(form.type, row, first));
  if (within == static_cast<int>(chosen >> 2)) return load(warp.a, form.type, place_a(form.type, row, first + 1));
  return 0.f;
}

// c += A B.
inline void multiply(Warp& warp, Form form) {
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      const Place d = place_d(row, column);
      double sum = warp.c[d.lane][d.index];
      for (int k = 0; k < form.k; ++k)
        sum += static_cast<double>(element_a(warp, form, row, k)) * load(warp.b, form.type, place_b(form.type, k, column));
      warp.c[d.lane][d.index] = static_cast<float>(sum);
    }
}

struct Random {
  uint64_t state;
  uint32_t next() {
    state = state * 6364136223846793005ull + 1442695040888963407ull;
    return static_cast<uint32_t>(state >> 33);
  }
  float integer() { return static_cast<float>(static_cast<int>(next() % 9) - 4); }
};

// Random operands of a form, and beside them the full matrices that they stand for.
struct Sample {
  Warp warp;
  std::vector<float> a, b, c;  // (16, k), (k, 8), (16, 8)
};

inline Sample sample(Form form, Random& random) {
  Sample made{Warp{}, std::vector<float>(16 * form.k), std::vector<float>(form.k * 8), std::vector<float>(16 * 8)};
  for (int row = 0; row < 16; ++row) {
    if (!form.sparse) {
      for (int k = 0; k < form.k; ++k) {
        made.a[row * form.k + k] = random.integer();
        store(made.warp.a, form.type, place_a(form.type, row, k), made.a[row * form.k + k]);
      }
      continue;
    }
    for (int chunk = 0; chunk < 8; ++chunk) {
      if (form.type == Type::tf32) {
        const int odd = random.next() & 1;
        const float value = random.integer();
        made.a[row * form.k + 2 * chunk + odd] = value;
        store(made.warp.a, form.type, place_a(form.type, row, chunk), value);
        set_nibble(made.warp, row, chunk, odd ? 0b1110u : 0b0100u);
        continue;
      }
      const int pairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}};
      const auto& pair = pairs[random.next() % 6];
      for (int which = 0; which < 2; ++which) {
        const float value = random.integer();
        made.a[row * form.k + 4 * chunk + pair[which]] = value;
        store(made.warp.a, form.type, place_a(form.type, row, 2 * chunk + which), value);
      }
      set_nibble(made.warp, row, chunk, static_cast<uint32_t>(pair[0] | pair[1] << 2));
    }
  }
  for (int k = 0; k < form.k; ++k)
    for (int column = 0; column < 8; ++column) {
      made.b[k * 8 + column] = random.integer();
      store(made.warp.b, form.type, place_b(form.type, k, column), made.b[k * 8 + column]);
    }
  for (int row = 0; row < 16; ++row)
    for (int column = 0; column < 8; ++column) {
      made.c[row * 8 + column] = random.integer();
      const Place d = place_d(row, column);
      made.warp.c[d.lane][d.index] = made.c[row * 8 + column];
    }
  return made;
}

}  // namespace twin
