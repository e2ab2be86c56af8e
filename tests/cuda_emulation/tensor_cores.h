// Matrix instructions, by the fragment layouts of the PTX manual. A lane's operands are what csrc/cuda/instructions.cuh says;
// sums are cut off as tensor cores cut them off, which shows wherever many of one sign are added one after the other.
#pragma once

#include <algorithm>
#include <cmath>

namespace kan::emulation {

struct Multiply {
  const uint32_t *a, *b;
  float* c;
  uint32_t metadata;
};

enum class Kind { bfloat16, float16, tf32 };

// One number of a register: 16-bit types have two to a register.
template <Kind K> float number_in(uint32_t bits, int half) {
  if constexpr (K == Kind::tf32) return std::bit_cast<float>(bits & 0xffffe000u);
  else if constexpr (K == Kind::bfloat16) return std::bit_cast<float>((half ? bits >> 16 : bits & 0xffffu) << 16);
  else return float(std::bit_cast<_Float16>(uint16_t(half ? bits >> 16 : bits)));
}

// Stored column k of row m of the left operand.
template <Kind K> float left_number(void* const* lanes, int m, int k) {
  auto lane = [&](int index) -> const Multiply& { return *static_cast<const Multiply*>(lanes[index]); };
  if constexpr (K == Kind::tf32) return number_in<K>(lane(m % 8 * 4 + k % 4).a[m / 8 + 2 * (k / 4)], 0);
  else return number_in<K>(lane(m % 8 * 4 + k % 8 / 2).a[m / 8 + 2 * (k / 8)], k % 2);
}
template <Kind K> float right_number(void* const* lanes, int k, int n) {
  auto lane = [&](int index) -> const Multiply& { return *static_cast<const Multiply*>(lanes[index]); };
  if constexpr (K == Kind::tf32) return number_in<K>(lane(n * 4 + k % 4).b[k / 4], 0);
  else return number_in<K>(lane(n * 4 + k % 8 / 2).b[k / 8], k % 2);
}

// The sum of exact terms: all are shifted to the exponent of the largest, where 2 bits beyond float32's 24 are kept, and the
// sum of what is left is cut off to 24 bits. Nothing is rounded to nearest. With terms of few bits the result is exact.
inline float truncated_sum(const double* terms, int count) {
  double largest = 0, plain = 0;
  for (int k = 0; k < count; ++k) largest = std::max(largest, std::fabs(terms[k])), plain += terms[k];
  if (!std::isfinite(plain) || largest == 0) return float(plain);
  constexpr uint64_t kExponent = uint64_t(2047) << 52, kKept = uint64_t(25) << 52;
  const double unit = std::bit_cast<double>((std::bit_cast<uint64_t>(largest) & kExponent) - kKept), per_unit = 1 / unit;
  int64_t units = 0;
  for (int k = 0; k < count; ++k) units += int64_t(terms[k] * per_unit);
  const double sum = double(units) * unit;
  const float nearest = float(sum);
  return std::fabs(nearest) > std::fabs(sum) ? std::nextafterf(nearest, 0.0f) : nearest;
}

// c (16 x 8) += a (16 x kDepth) b; `left(m, k)` is what the left operand has there.
template <Kind K, int kDepth, class Left> void add_product(void* const* lanes, Left left) {
  for (int m = 0; m < 16; ++m)
    for (int n = 0; n < 8; ++n) {
      float& c = static_cast<Multiply*>(lanes[m % 8 * 4 + n / 2])->c[m / 8 * 2 + n % 2];
      double terms[kDepth + 1];
      for (int k = 0; k < kDepth; ++k) terms[k] = double(left(m, k)) * right_number<K>(lanes, k, n);
      terms[kDepth] = c;
      c = truncated_sum(terms, kDepth + 1);
    }
}

template <Kind K, int kDepth> void multiply(const char* name, float* c, const uint32_t* a, const uint32_t* b) {
  Multiply mine{a, b, c, 0};
  with_warp(name, &mine, [](void* const* lanes) {
    add_product<K, kDepth>(lanes, [&](int m, int k) { return left_number<K>(lanes, m, k); });
  });
}

// Four bits of metadata for each group of columns; lane 0 of a quad has those of the first half, lane 1 of the second.
inline uint32_t four_bits(void* const* lanes, int m, int group) {
  const auto& lane = *static_cast<const Multiply*>(lanes[m % 8 * 4 + group / 4]);
  return lane.metadata >> (16 * (m / 8) + 4 * (group % 4)) & 15u;
}

template <Kind K, int kDepth>
void multiply_sparse(const char* name, float* c, const uint32_t* a, const uint32_t* b, uint32_t metadata) {
  Multiply mine{a, b, c, metadata};
  with_warp(name, &mine, [](void* const* lanes) {
    add_product<K, kDepth>(lanes, [&](int m, int k) {
      if constexpr (K == Kind::tf32) {  // one of two columns
        const uint32_t bits = four_bits(lanes, m, k / 2);
        if (bits != 4 && bits != 14) fail("sparse tf32: the metadata of a pair must be 0b0100 or 0b1110");
        return k % 2 == int(bits == 14) ? left_number<K>(lanes, m, k / 2) : 0.0f;
      } else {  // two of four columns
        const uint32_t bits = four_bits(lanes, m, k / 4);
        const int first = int(bits & 3), second = int(bits >> 2);
        if (first >= second) fail("sparse: columns must be in ascending order");
        return k % 4 == first    ? left_number<K>(lanes, m, k / 4 * 2)
               : k % 4 == second ? left_number<K>(lanes, m, k / 4 * 2 + 1)
                                 : 0.0f;
      }
    });
  });
}

struct Load {
  const char* row;
  uint32_t r[4];
};

inline void load(uint32_t (&r)[4], const void* row, bool transposed) {
  if (reinterpret_cast<uintptr_t>(row) % 16 != 0) fail("a misaligned row of a matrix");
  Load mine{static_cast<const char*>(row), {}};
  with_warp(transposed ? "load_matrices_transposed" : "load_matrices", &mine, [transposed](void* const* lanes) {
    for (int i = 0; i < 4; ++i)
      for (int lane = 0; lane < 32; ++lane) {
        uint16_t pair[2];
        for (int half = 0; half < 2; ++half) {
          const int line = transposed ? lane % 4 * 2 + half : lane / 4, column = transposed ? lane / 4 : lane % 4 * 2 + half;
          std::memcpy(&pair[half], static_cast<Load*>(lanes[8 * i + line])->row + 2 * column, 2);
        }
        static_cast<Load*>(lanes[lane])->r[i] = pair[0] | uint32_t(pair[1]) << 16;
      }
  });
  std::memcpy(r, mine.r, sizeof r);
}

}  // namespace kan::emulation

namespace kan::cuda {

inline void load_matrices(uint32_t (&r)[4], const void* row) { emulation::load(r, row, false); }
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) { emulation::load(r, row, true); }

inline uint32_t transpose_matrix(uint32_t a) {
  struct Lane {
    uint32_t a, result;
  } mine{a, 0};
  emulation::with_warp("transpose_matrix", &mine, [](void* const* lanes) {
    auto at = [&](int row, int column) { return static_cast<Lane*>(lanes[4 * row + column / 2])->a >> (16 * (column % 2)) & 0xffffu; };
    for (int lane = 0; lane < 32; ++lane)
      static_cast<Lane*>(lanes[lane])->result = at(lane % 4 * 2, lane / 4) | at(lane % 4 * 2 + 1, lane / 4) << 16;
  });
  return mine.result;
}

#define KAN_MMA(name, kind, depth)                                                              \
  inline void name(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {           \
    const uint32_t b[2] = {b0, b1};                                                             \
    emulation::multiply<emulation::Kind::kind, depth>(#name, c, a, b);                          \
  }
KAN_MMA(mma_bfloat16, bfloat16, 16)
KAN_MMA(mma_float16, float16, 16)
KAN_MMA(mma_tf32, tf32, 8)
#undef KAN_MMA

#define KAN_MMA_SPARSE(name, kind, depth)                                                       \
  inline void name(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t e) { \
    emulation::multiply_sparse<emulation::Kind::kind, depth>(#name, c, a, b, e);                \
  }
KAN_MMA_SPARSE(mma_sparse_bfloat16, bfloat16, 32)
KAN_MMA_SPARSE(mma_sparse_float16, float16, 32)
KAN_MMA_SPARSE(mma_sparse_tf32, tf32, 16)
#undef KAN_MMA_SPARSE

}  // namespace kan::cuda
