// Products of warpgroups (wgmma), written from the PTX ISA, sections 9.7.15.x, and from the layouts that CUTLASS gives for the
// same instructions (cute/atom/mma_traits_sm90_gmma.hpp), which are quoted below as shape : stride.
//
// Each warp multiplies its own 16 rows: the instruction is no barrier between the four. A product's work is done when it is
// waited for. Until then its sums read as NaN, and it is an error if meanwhile its left operand changes, its sums are written,
// the shared memory that it reads is, or one of another shape takes the same sums; so are registers written after the fence or
// without one, copies that no proxy fence followed, and warps of a group that do not issue the same instructions.
#define KAN_CUDA_WARPGROUP
#pragma once

#include <array>
#include <vector>

#define KAN_WARPGROUPS 1

namespace kan::emulation {

// What a lane hands in. `name` is that of the shape.
struct Product {
  const char* name;
  float* sums;
  int count;
  const uint32_t* left;  // 4, or null: then by a descriptor
  const uint32_t* metadata;
  uint64_t left_descriptor, descriptor;
  bool kept = true;  // what the sums were
};
using Lefts = std::array<std::array<uint32_t, 5>, 32>;  // the left operand's registers, and its metadata
using Finish = std::function<void(const Lefts& left, float* const* sums)>;

// In warpgroup.cpp. All but the last two are called once for a warp, in the lane that comes last.
void start_product(const std::array<Product, 32>& lanes, Finish finish);
void order_registers();
void commit_products();
void wait_for_products(int groups_left);
void show_to_tensor_cores();
void expect_shown(const char* piece);

// The window of shared memory begins at no multiple of 1024.
constexpr uint32_t kSharedBase = 0x480;

// Where a number of an operand lies: its address in shared memory.
struct Descriptor {
  uint32_t start, leading, stride, swizzle;

  explicit Descriptor(uint64_t bits)
      : start(uint32_t(bits & 0x3fff) * 16), leading(uint32_t(bits >> 16 & 0x3fff) * 16), stride(uint32_t(bits >> 32 & 0x3fff) * 16),
        swizzle(uint32_t(bits >> 62)) {
    if (bits & 0x3ff1c000c000c000ull) fail("a descriptor with bits where none belong");
    if (bits >> 49 & 7) fail("descriptors with a base offset are not emulated");
  }
  // Mode 1: 128 bytes, 2: 64, 3: 32, 0: none.
  int pieces() const { return swizzle == 0 ? 1 : 16 >> swizzle; }
  // Swizzle<b, 4, 3> of an address: bits 4 .. 4 + b xor bits 7 .. 7 + b.
  uint32_t swizzled(uint32_t address) const { return address ^ (address >> 7 & uint32_t(pieces() - 1)) << 4; }
  // Columns contiguous, T = 8 of 16 bits to a piece. None: ((T,1,m),(8,k)) : ((1,T,SBO),(T,LBO)); else, with W pieces:
  // ((T,W,m),(8,k)) : ((1,T,LBO),(WT,SBO)).
  // Number (n, k) of a right operand, or a left one's, by lines of columns (rows) at one depth.
  uint32_t place(int n, int k) const {
    const int w = pieces();
    const uint32_t far_n = swizzle ? leading : stride, far_k = swizzle ? stride : leading;
    return swizzled(start + uint32_t(n % 8 * 2 + n / 8 % w * 16 + k % 8 * w * 16) + uint32_t(n / 8 / w) * far_n + uint32_t(k / 8) * far_k);
  }
  // The same with the depth contiguous: ((8,m),(T,2)) : ((WT,SBO),(1,T)). A start within a line of an atom goes on in
  // that line.
  uint32_t place_in_line(int m, int k) const {
    if (swizzle == 0) fail("lines without a swizzle are not emulated");
    return swizzled(start + uint32_t(m % 8 * pieces() * 16 + k * 2) + uint32_t(m / 8) * stride);
  }
};

template <Kind K> float number_at(uint32_t address, const char*& shown) {
  if (address < kSharedBase || address + 2 > kSharedBase + shared_bytes) fail("a descriptor points outside shared memory");
  const char* piece = shared + (address - kSharedBase) / 16 * 16;
  if (piece != shown) expect_shown(shown = piece);
  return number_in<K>(*reinterpret_cast<const uint16_t*>(shared + (address - kSharedBase)), 0);
}

// (count, depth): columns of a right operand, or rows from `first` on of a left one.
template <Kind K, bool kByLines> std::vector<float> read_operand(uint64_t bits, int first, int count, int depth) {
  const Descriptor descriptor(bits);
  std::vector<float> numbers(size_t(count * depth));
  const char* shown = nullptr;
  for (int n = 0; n < count; ++n)
    for (int k = 0; k < depth; ++k)
      numbers[size_t(n * depth + k)] =
          number_at<K>(kByLines ? descriptor.place(first + n, k) : descriptor.place_in_line(first + n, k), shown);
  return numbers;
}

// Row m (0 .. 15 of the warp's), column k of the left operand as it is stored. ALayout_64x16: thread (4,8,4) : (2 columns, row,
// 16 rows), value (2,2,2) : (column, 8 rows, 8 columns).
template <Kind K> float stored_left(const Lefts& lanes, int m, int k) {
  return number_in<K>(lanes[m % 8 * 4 + k / 2 % 4][m / 8 + k / 8 * 2], k % 2);
}

// The same of a sparse operand. Its metadata, ELayout_64x32: thread (2,2,8,4) : (16 columns, 0, row, 16 rows), value (16,2) :
// (column, 8 rows), four bits to a group of four columns; of the threads that agree, selector 0 takes those with the 0.
template <Kind K> float sparse_left(const Lefts& lanes, int m, int k) {
  const int group = k / 4, place = k % 4;
  const uint32_t bits = lanes[m % 8 * 4 + group / 4][4] >> (16 * (m / 8) + 4 * (group % 4)) & 15;
  const int first = bits & 3, second = bits >> 2;
  if (first == second) fail("sparse wgmma: metadata that names one column twice");
  if (first > second) fail("sparse wgmma: columns must be in ascending order");
  return place == first ? stored_left<K>(lanes, m, 2 * group) : place == second ? stored_left<K>(lanes, m, 2 * group + 1) : 0.0f;
}

// The sums of a warp, or zeros where they are not kept, plus left(m, k) times the right operand.
template <Kind K, int kDepth, class Left>
void add_later(float* const* sums, bool kept, const std::vector<float>& right, int columns, Left left) {
  for (int m = 0; m < 16; ++m) {
    double row[kDepth], terms[kDepth + 1];
    for (int k = 0; k < kDepth; ++k) row[k] = left(m, k);
    for (int n = 0; n < columns; ++n) {
      // CLayout_64xN: thread (4,8,4) : (2 columns, row, 16 rows), value (2,2,N/8) : (column, 8 rows, 8 columns).
      float& c = sums[m % 8 * 4 + n / 2 % 4][n % 2 + 2 * (m / 8) + 4 * (n / 8)];
      terms[kDepth] = kept ? c : 0;
      for (int k = 0; k < kDepth; ++k) terms[k] = row[k] * right[size_t(n * kDepth + k)];
      c = truncated_sum(terms, kDepth + 1);
    }
  }
}
inline void expect_same(const std::vector<float>& now, const std::vector<float>& early) {
  if (std::memcmp(now.data(), early.data(), now.size() * sizeof(float)) != 0) fail("shared memory is written while a product reads it");
}

// Both operands from shared memory. A warp takes its 16 rows of the left one.
template <Kind K, int kDepth, bool kLeftByLines, bool kRightByLines>
void multiply_shared_later(const char* name, float* sums, int count, uint64_t left, uint64_t right, bool kept) {
  Product mine{name, sums, count, nullptr, nullptr, left, right, kept};
  with_warp(name, &mine, [](void* const* lanes) {
    std::array<Product, 32> products;
    for (int lane = 0; lane < 32; ++lane) products[lane] = *static_cast<const Product*>(lanes[lane]);
    const uint64_t left = products[0].left_descriptor, right = products[0].descriptor;
    const int columns = 2 * products[0].count, first = self->warp % 4 * 16;
    const bool kept = products[0].kept;
    auto rows = [=] { return read_operand<K, kLeftByLines>(left, first, 16, kDepth); };
    auto weights = [=] { return read_operand<K, kRightByLines>(right, 0, columns, kDepth); };
    start_product(products, [=, early_rows = rows(), early = weights()](const Lefts&, float* const* sums) {
      expect_same(rows(), early_rows);
      expect_same(weights(), early);
      add_later<K, kDepth>(sums, kept, early, columns, [&](int m, int k) { return early_rows[size_t(m * kDepth + k)]; });
    });
  });
}

// The left operand in registers; sparse where there are metadata.
template <Kind K, int kDepth, bool kRightByLines, bool kSparse>
void multiply_registers_later(const char* name, float* sums, int count, const uint32_t* left, uint64_t right, const uint32_t* metadata,
                              bool kept) {
  Product mine{name, sums, count, left, metadata, 0, right, kept};
  with_warp(name, &mine, [](void* const* lanes) {
    std::array<Product, 32> products;
    for (int lane = 0; lane < 32; ++lane) products[lane] = *static_cast<const Product*>(lanes[lane]);
    const uint64_t right = products[0].descriptor;
    const int columns = 2 * products[0].count;
    const bool kept = products[0].kept;
    auto weights = [=] { return read_operand<K, kRightByLines>(right, 0, columns, kDepth); };
    start_product(products, [=, early = weights()](const Lefts& left, float* const* sums) {
      expect_same(weights(), early);
      add_later<K, kDepth>(sums, kept, early, columns,
                           [&](int m, int k) { return kSparse ? sparse_left<K>(left, m, k) : stored_left<K>(left, m, k); });
    });
  });
}

}  // namespace kan::emulation

namespace kan::cuda {

inline uint32_t shared_address(const void* pointer) {
  return emulation::kSharedBase + uint32_t(static_cast<const char*>(pointer) - emulation::shared);
}
inline void show_to_tensor_cores() { emulation::show_to_tensor_cores(); }
inline void order_registers() {
  int nothing = 0;
  emulation::with_warp("order_registers", &nothing, [](void* const*) { emulation::order_registers(); });
}
inline void commit_products() {
  int nothing = 0;
  emulation::with_warp("commit_products", &nothing, [](void* const*) { emulation::commit_products(); });
}
template <int kGroupsLeft> void wait_for_products() {
  int nothing = 0;
  emulation::with_warp("wait_for_products", &nothing, [](void* const*) { emulation::wait_for_products(kGroupsLeft); });
}

template <int> void set_registers() {}
inline void meet(int id, int threads) { emulation::meet(id, threads); }
inline void arrive(int id, int threads) { emulation::arrive(id, threads); }
inline void load_16_bytes(uint32_t (&words)[4], const void* shared) {
  if (reinterpret_cast<uintptr_t>(shared) % 16 != 0) emulation::fail("a misaligned load of 16 bytes");
  std::memcpy(words, shared, 16);
}
inline void store_16_bytes(void* shared, const uint32_t (&words)[4], uint32_t turned = 0) {
  const uint32_t address = shared_address(shared) ^ turned;
  if (address % 16 != 0) emulation::fail("a misaligned store of 16 bytes");
  char* to = emulation::shared + (address - emulation::kSharedBase);
  for (int i = 0; i < 4; ++i) reinterpret_cast<uint32_t*>(to)[i] = words[i];
  emulation::note_copy(to);
}
inline void store_8_bytes(void* shared, const uint32_t (&words)[2]) {
  if (reinterpret_cast<uintptr_t>(shared) % 8 != 0) emulation::fail("a misaligned store of 8 bytes");
  for (int i = 0; i < 2; ++i) static_cast<uint32_t*>(shared)[i] = words[i];
  emulation::note_copy(shared);
}

#define KAN_WGMMA(kind, depth)                                                                                          \
  template <bool kLeftByLines, bool kRightByLines, int kSums>                                                           \
  void wgmma_##kind(float (&c)[kSums], uint64_t a, uint64_t b, bool kept = true) {                                      \
    emulation::multiply_shared_later<emulation::Kind::kind, depth, kLeftByLines, kRightByLines>("wgmma_" #kind, c, kSums, a, b, kept); \
  }                                                                                                                     \
  template <bool kRightByLines, int kSums>                                                                              \
  void wgmma_##kind(float (&c)[kSums], const uint32_t (&a)[4], uint64_t b, bool kept = true) {                          \
    emulation::multiply_registers_later<emulation::Kind::kind, depth, kRightByLines, false>("wgmma_" #kind, c, kSums, a, b, nullptr, kept); \
  }                                                                                                                     \
  template <int kSums>                                                                                                  \
  void wgmma_sparse_##kind(float (&c)[kSums], const uint32_t (&a)[4], uint64_t b, const uint32_t& metadata) {           \
    emulation::multiply_registers_later<emulation::Kind::kind, 2 * depth, true, true>("wgmma_sparse_" #kind, c, kSums, a, b, &metadata, true); \
  }
KAN_WGMMA(bfloat16, 16)
KAN_WGMMA(float16, 16)
#undef KAN_WGMMA

}  // namespace kan::cuda
