// Which kernel serves which problem: the one place that decides.
//
//   any     every dtype, order, derivative and shape, by multiply-add; small problems, for which it is one launch
//   narrow  few inputs and outputs: float32, bfloat16, float16, orders up to 3, by tables in shared memory (narrow.cuh)
//   dense   tensor cores: float32, bfloat16, float16, orders up to 3, derivatives up to the order
//   sparse  the same with contract_output's operand in its structured-sparse form; the others are dense
//   wgmma, wgmma_sparse  the two for bfloat16 and float16 by warpgroups: compute capability 9.0 alone. wgmma: float32 too, where
//                        split.h serves it
//   cluster  wgmma for bfloat16 and float16 where blocks share what they copy: never chosen yet, for no GPU has run it
//
// KAN_FAST_CUDA_KERNEL names one for tests; what it cannot serve then is an error. Warpgroups are chosen by measurement (H200,
// 16384 x 1024 x 1024, G = 5: bfloat16 output 0.51 ms, dense 1.89; input 0.71, 1.39; weight 0.67, 2.64; their sparse form 2.28; float32
// in halves output 2.4, dense 6.3; input 2.3, 6.3; weight 2.8, 6.8), the rest by counting instructions and bytes.
#include "launch.h"
#include "narrow.h"
#include "plan.h"
#include "split.h"
#include "weight_tiles.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace kan::cuda {

namespace {

// Set by the build where it compiles for 9.0a, which alone has the instructions.
#ifdef KAN_BUILT_SM90A
constexpr bool kBuiltSm90a = true;
#else
constexpr bool kBuiltSm90a = false;
#endif

Products products(const Problem& p) {
  if (p.weight_dtype == kBFloat16) return Products::bfloat16;
  if (p.weight_dtype == kFloat16) return Products::float16;
  return p.precision == kHighest ? Products::tf32x3 : Products::tf32;
}

const char* why_not_wide(const Problem& p) {
  if (p.weight_dtype == kFloat64) return "float64";
  if (p.spline_order > kMaxCubicOrder) return "spline orders above 3";
  if (p.n > p.spline_order) return "derivatives above the order";
  // They grow as 1 / h^n, beyond float16.
  if (p.weight_dtype == kFloat16 && p.n >= 2) return "second derivatives in float16";
  if (p.batch == 0 || p.in_features == 0 || p.out_features == 0) return "empty tensors";
  if (size_of_cubics(p) > (size_t(256) << 20)) return "so many knots";
  return nullptr;
}

const char* why_not_warpgroup(const Problem& p, const Device& device, Operation operation) {
  if (device.architecture != 90) return "GPUs of another compute capability than 9.0";
  if (!kBuiltSm90a) return "builds without code for 9.0a";
  if (p.weight_dtype == kFloat32) {
    if (const char* no = why_not_split(p, operation)) return no;
  }
  // A tile's columns are an input's bases and its base branch.
  if (operation == Operation::input && p.bases() >= 256) return "contract_input of 256 bases or more";
  if (operation == Operation::input && p.weight_dtype == kFloat32 && p.bases() >= 128) return "contract_input of 128 bases or more in float32";
  return nullptr;
}

// The copy engine counts in 32 bits, and copies from multiples of 16 bytes. There are kernels for what pays: large layers of even knots.
const char* why_not_cluster(const Problem& p, const Device& device, Operation operation) {
  constexpr int64_t kMost = int64_t(1) << 30;
  const WideArguments a = make_wide(p, nullptr, 0);
  if (p.weight_dtype == kFloat32) return "float32";
  if (!a.aligned) return "rows at other than multiples of 16 bytes";
  if (p.batch > kMost || p.out_features > kMost || p.in_features * p.bases() > kMost) return "sizes beyond 2^30";
  if (operation == Operation::input) return p.bases() >= 64 ? "contract_input of 64 bases or more" : nullptr;
  if (!a.quick.serves) return "what is not made quickly";
  if (columns_of_weight(p) != 256) return "outputs that would leave half of a tile's 256 columns empty";
  if (operation == Operation::weight && !pairs_features(p, cut_of_weight(p, device))) return "contract_weight of tiles that are no pairs";
  return nullptr;
}

// Multiply-adds from which on making halves of float32 operands pays: on an H200 contract_output, when that took six kernels (three
// now), takes 0.087 ms in place of 0.130 at 4096 x 256 x 256 (2.4e9), 0.078 in place of 0.051 at 1024 x 256 x 256.
constexpr double kSplitPays = 2e9;

// Whether one launch of plain multiply-adds is faster than the wide kernels' tables, steps and sums; from 32 rows on. On an H200 it took
// contract_output of float32 6 us (64 rows of 64 inputs and outputs) to 23 (64 of 256), where the wide kernel takes 28 at the least;
// contract_input 5.5 and 3.2 for each million triples of row, input and output, the wide one 10 and 0.08 for every output. Of 16-bit types,
// by warpgroups 8 to 9 us at the least, contract_input won up to half a million triples. contract_weight of 2^16 took 8 us either way, and
// lost beyond.
bool any_pays(const Problem& p, Operation operation, bool by_warpgroups) {
  const double triples = double(p.batch) * double(p.in_features) * double(p.out_features) * 1e-6;
  if (operation == Operation::weight) return triples <= 0.1;
  if (p.weight_dtype != kFloat32) return triples <= (by_warpgroups ? 0.5 : 1.0);
  return operation == Operation::output ? triples < 6 : 5.5 + 3.2 * triples < 10 + 0.08 * double(p.out_features);
}

// A tensor instruction is 8 outputs wide: with fewer than 16 most of it is padding. A block is 128 rows tall. Tables beyond
// kNarrowTables leave room for too few warps on a multiprocessor.
Family choose_freely(const Problem& p, const Device& device, Operation operation) {
  if (why_not_wide(p) == nullptr && p.out_features >= 16 && p.in_features >= 8 && p.batch >= 32) {
    const bool warpgroups = why_not_warpgroup(p, device, operation) == nullptr;
    if (any_pays(p, operation, warpgroups)) return Family::any;
    const bool pays = p.weight_dtype != kFloat32 || double(p.batch) * double(p.in_features) * double(p.out_features) * (p.bases() + 1) >= kSplitPays;
    return pays && warpgroups ? Family::wgmma : Family::dense;
  }
  constexpr int64_t kNarrowTables = 72 * 1024;
  const bool narrow = why_not_narrow(p, device, operation) == nullptr && plan_narrow(p, device, operation).shared <= kNarrowTables;
  return narrow ? Family::narrow : Family::any;
}

Family choose(const Problem& p, const Device& device, Operation operation) {
  const char* wanted = std::getenv("KAN_FAST_CUDA_KERNEL");
  if (wanted == nullptr || *wanted == '\0') return choose_freely(p, device, operation);
  constexpr const char* kNames[] = {"any", "narrow", "dense", "sparse", "wgmma", "wgmma_sparse", "cluster"};
  constexpr int kNumber = sizeof(kNames) / sizeof(*kNames);
  const std::string name = wanted;
  int found = 0;
  while (found < kNumber && name != kNames[found]) ++found;
  if (found == kNumber)
    throw std::runtime_error("KAN_FAST_CUDA_KERNEL=" + name + ": expected any, narrow, dense, sparse, wgmma, wgmma_sparse or cluster");
  const Family family = Family(found);
  const char* no = family == Family::narrow ? why_not_narrow(p, device, operation) : why_not_wide(p);
  if (no == nullptr && is_warpgroup(family)) no = why_not_warpgroup(p, device, operation);
  if (no == nullptr && family == Family::wgmma_sparse && p.weight_dtype == kFloat32) no = "float32";
  if (no == nullptr && family == Family::cluster) no = why_not_cluster(p, device, operation);
  if (family != Family::any && no != nullptr) throw std::runtime_error("KAN_FAST_CUDA_KERNEL=" + name + ": it does not serve " + no);
  return family;
}

size_t size_of_parts(const Slices& slices, int64_t one, size_t number) {
  return slices.count > 1 ? rounded(size_t(slices.count) * size_t(one) * number) : 0;
}

#define KAN_BY_TYPE(launcher, ...)                                  \
  switch (p.weight_dtype) {                                         \
    case kFloat64: return launcher<double>(__VA_ARGS__);            \
    case kBFloat16: return launcher<BFloat16>(__VA_ARGS__);         \
    case kFloat16: return launcher<Float16>(__VA_ARGS__);           \
    default: return launcher<float>(__VA_ARGS__);                   \
  }

#define KAN_BY_PRODUCTS(call)                                       \
  switch (products(p)) {                                            \
    case Products::bfloat16: return call(Products::bfloat16);       \
    case Products::float16: return call(Products::float16);         \
    case Products::tf32: return call(Products::tf32);               \
    default: return call(Products::tf32x3);                         \
  }

template <bool kSparse>
int output_wide(const Problem& p, const WideArguments& a, int columns, float* parts, const Slices& slices, void* stream) {
#define KAN_CALL(products) launch_output_wide<products, kSparse>(a, columns, parts, slices, stream)
  KAN_BY_PRODUCTS(KAN_CALL)
#undef KAN_CALL
}

int output_cluster(const Problem& p, const WideArguments& a, int, float*, const Slices&, void* stream) {
  if (products(p) == Products::bfloat16) return launch_output_cluster<Products::bfloat16>(a, stream);
  return launch_output_cluster<Products::float16>(a, stream);
}

template <bool kSparse>
int output_warpgroup(const Problem& p, const WideArguments& a, int columns, float* parts, const Slices& slices, void* stream) {
  if (products(p) == Products::bfloat16) return launch_output_warpgroup<Products::bfloat16, kSparse>(a, columns, parts, slices, stream);
  return launch_output_warpgroup<Products::float16, kSparse>(a, columns, parts, slices, stream);
}

int input_cluster(const Problem& p, const WideArguments& a, void* stream) {
  if (products(p) == Products::bfloat16) return launch_input_cluster<Products::bfloat16>(a, stream);
  return launch_input_cluster<Products::float16>(a, stream);
}
int input_warpgroup(Family family, const Problem& p, const Device& device, const WideArguments& a, void* stream) {
  if (family == Family::cluster) return input_cluster(p, a, stream);
  const int columns = columns_of_input(p, device);
  if (products(p) == Products::bfloat16) return launch_input_warpgroup<Products::bfloat16>(a, columns, stream);
  return launch_input_warpgroup<Products::float16>(a, columns, stream);
}

int weight_warpgroup(Family family, const Problem& p, const WideArguments& a, float* parts, const TileCut& cut, void* stream) {
  if (family == Family::cluster)
    return products(p) == Products::bfloat16 ? launch_weight_cluster<Products::bfloat16>(a, parts, cut, stream)
                                             : launch_weight_cluster<Products::float16>(a, parts, cut, stream);
  const int columns = columns_of_weight(p);
  if (products(p) == Products::bfloat16) return launch_weight_warpgroup<Products::bfloat16>(a, columns, parts, cut, stream);
  return launch_weight_warpgroup<Products::float16>(a, columns, parts, cut, stream);
}

int output_split(const WideArguments& a, void* memory, float* parts, const Slices& slices, void* stream) {
  const Halves halves = place_halves(a.p, Operation::output, memory);
  return launch_output_split(a, halves, parts, slices, stream);
}

int weight_split(const WideArguments& a, void* memory, float* parts, const TileCut& cut, void* stream) {
  const Halves halves = place_halves(a.p, Operation::weight, memory);
  return launch_weight_split(a, halves, parts, cut, stream);
}

int input_wide(const Problem& p, const WideArguments& a, void* stream) {
#define KAN_CALL(products) launch_input_wide<products>(a, stream)
  KAN_BY_PRODUCTS(KAN_CALL)
#undef KAN_CALL
}

int weight_wide(const Problem& p, const WideArguments& a, float* parts, const Slices& slices, void* stream) {
#define KAN_CALL(products) launch_weight_wide<products>(a, columns_of_weight(p), parts, slices, stream)
  KAN_BY_PRODUCTS(KAN_CALL)
#undef KAN_CALL
}

// Warpgroups multiply float32 in halves, which lie behind all else in the workspace.
bool is_split(Family family, const Problem& p) { return family == Family::wgmma && p.weight_dtype == kFloat32; }

// Bytes of the workspace of a family of warpgroups or wide kernels, without halves.
size_t size_of_output(const Slices& slices, const Problem& p) { return slices.offset + size_of_parts(slices, p.batch * p.out_features, 4); }
size_t size_of_input(const Problem& p) { return size_of_described(p) + rounded(size_of_cubics(p)); }
size_t size_of_weight(const Slices& slices, const Problem& p) {
  return slices.offset + size_of_parts(slices, p.in_features * (p.bases() + 1) * p.out_features, compute_size(p));
}
size_t size_of_weight(const TileCut& cut, const Problem& p) { return cut.offset + rounded(size_of_parts(p, columns_of_weight(p), cut)); }

}  // namespace

size_t workspace_of_output(const Problem& p, const Device& device) {
  const Family family = choose(p, device, Operation::output);
  if (family == Family::narrow) return 0;
  if (family == Family::any)
    return size_of_parts(slices_of_output_any(p, device), p.batch * p.out_features, compute_size(p));
  return size_of_output(plan_output(family, p, device).slices, p) + (is_split(family, p) ? size_of_halves(p, Operation::output) : 0);
}

size_t workspace_of_input(const Problem& p, const Device& device) {
  const Family family = choose(p, device, Operation::input);
  if (family == Family::narrow || family == Family::any) return 0;
  return size_of_input(p) + (is_split(family, p) ? size_of_halves(p, Operation::input) : 0);
}

size_t workspace_of_weight(const Problem& p, const Device& device) {
  const Family family = choose(p, device, Operation::weight);
  const int64_t numbers = p.in_features * (p.bases() + 1) * p.out_features;
  if (family == Family::narrow) return rounded(size_t(plan_narrow(p, device, Operation::weight).blocks * numbers) * 4);
  if (is_warpgroup(family))
    return size_of_weight(cut_of_weight(p, device), p) + (is_split(family, p) ? size_of_halves(p, Operation::weight) : 0);
  return size_of_weight(family == Family::any ? slices_any(p, device) : slices_of_weight(p, device), p);
}

int launch_contract_output(const Problem& p, const Device& device, void* workspace, void* stream) {
  const Family family = choose(p, device, Operation::output);
  if (family == Family::any)
    KAN_BY_TYPE(launch_output_any, p, tile_of_output_any(p, device), slices_of_output_any(p, device), workspace, stream)
  if (family == Family::narrow)
    return launch_output_narrow(make_narrow<float>(p, plan_narrow(p, device, Operation::output)), stream);
  const auto [columns, slices] = plan_output(family, p, device);
  const WideArguments a = make_wide(p, workspace, size_of_described(p));
  float* parts = slices.count > 1 ? reinterpret_cast<float*>(static_cast<char*>(workspace) + slices.offset) : nullptr;
  const auto output = family == Family::wgmma          ? output_warpgroup<false>
                      : family == Family::wgmma_sparse ? output_warpgroup<true>
                      : family == Family::cluster      ? output_cluster
                      : family == Family::sparse       ? output_wide<true>
                                                       : output_wide<false>;
  const int error = is_split(family, p) ? output_split(a, static_cast<char*>(workspace) + size_of_output(slices, p), parts, slices, stream)
                                        : output(p, a, columns, parts, slices, stream);
  if (error != 0 || parts == nullptr) return error;
  KAN_BY_TYPE(launch_add, parts, p.y, p.batch * p.out_features, slices.count, stream)
}

int launch_contract_input(const Problem& p, const Device& device, void* workspace, void* stream) {
  const Family family = choose(p, device, Operation::input);
  if (family == Family::narrow)
    return launch_input_narrow(make_narrow<float>(p, plan_narrow(p, device, Operation::input)), stream);
  if (family == Family::any) KAN_BY_TYPE(launch_input_any, p, tile_of_input_any(p, device), stream)
  const WideArguments a = make_wide(p, workspace, size_of_described(p));
  if (is_split(family, p)) return launch_input_split(a, place_halves(p, Operation::input, static_cast<char*>(workspace) + size_of_input(p)), stream);
  return is_warpgroup(family) ? input_warpgroup(family, p, device, a, stream) : input_wide(p, a, stream);
}

int launch_contract_weight(const Problem& p, const Device& device, void* workspace, void* stream) {
  const Family family = choose(p, device, Operation::weight);
  if (family == Family::narrow)
    return launch_weight_narrow(make_narrow<float>(p, plan_narrow(p, device, Operation::weight)), workspace, stream);
  if (family == Family::any) KAN_BY_TYPE(launch_weight_any, p, slices_any(p, device), workspace, stream)
  const WideArguments a = make_wide(p, workspace, size_of_described(p));
  if (is_warpgroup(family)) {
    const TileCut cut = cut_of_weight(p, device);
    char* memory = static_cast<char*>(workspace);
    float* parts = cut.rest > 0 ? reinterpret_cast<float*>(memory + cut.offset) : nullptr;
    return is_split(family, p) ? weight_split(a, memory + size_of_weight(cut, p), parts, cut, stream) : weight_warpgroup(family, p, a, parts, cut, stream);
  }
  const Slices slices = slices_of_weight(p, device);
  float* parts = slices.count > 1 ? reinterpret_cast<float*>(static_cast<char*>(workspace) + slices.offset) : nullptr;
  const int error = weight_wide(p, a, parts, slices, stream);
  if (error != 0 || parts == nullptr) return error;
  KAN_BY_TYPE(launch_add_slices, p, parts, slices.count, stream)
}

}  // namespace kan::cuda
