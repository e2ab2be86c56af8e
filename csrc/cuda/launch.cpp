// Which kernel serves which problem: the one place that decides.
#include "launch.h"

namespace kan::cuda {

namespace {

size_t compute_size(const Problem& p) { return p.weight_dtype == kFloat64 ? 8 : 4; }

size_t rounded(size_t bytes) { return (bytes + 255) / 256 * 256; }

size_t size_of_described(const Problem& p) {
  const size_t one = p.weight_dtype == kFloat64 ? sizeof(Described<double>) : sizeof(Described<float>);
  return rounded(size_t(p.in_features) * one);
}

// Slices of the batch for contract_weight, from shapes and device alone: blocks enough for four per multiprocessor, no
// slice below `least` rows, and at most 64 MiB of partial sums.
Slices cut_batch(const Problem& p, const Device& device, int64_t tiles, int64_t least) {
  const int64_t wanted = (4 * device.multiprocessors + tiles - 1) / (tiles > 0 ? tiles : 1);
  const int64_t bytes = p.in_features * (p.bases() + 1) * p.out_features * int64_t(compute_size(p));
  int64_t most = (int64_t(64) << 20) / (bytes > 0 ? bytes : 1);
  if (most > p.batch / least) most = p.batch / least;
  int64_t count = wanted < most ? wanted : most;
  if (count < 1) count = 1;
  int64_t rows = (p.batch + count - 1) / count;
  rows = (rows + least - 1) / least * least;
  if (rows < 1) rows = least;
  count = (p.batch + rows - 1) / rows;
  return {count < 1 ? 1 : count, rows, size_of_described(p)};
}

Slices slices_any(const Problem& p, const Device& device) {
  const int64_t columns = p.out_features < 32 ? 32 : p.out_features;
  return cut_batch(p, device, p.in_features * ((columns + 31) / 32), 512);
}

}  // namespace

size_t workspace_of_output(const Problem& p, const Device&) { return size_of_described(p); }
size_t workspace_of_input(const Problem& p, const Device&) { return size_of_described(p); }
size_t workspace_of_weight(const Problem& p, const Device& device) {
  const Slices slices = slices_any(p, device);
  const size_t one = size_t(p.in_features) * size_t(p.bases() + 1) * size_t(p.out_features) * compute_size(p);
  return slices.offset + (slices.count > 1 ? rounded(size_t(slices.count) * one) : 0);
}

#define KAN_BY_TYPE(launcher, ...)                                  \
  switch (p.weight_dtype) {                                         \
    case kFloat64: return launcher<double>(__VA_ARGS__);            \
    case kBFloat16: return launcher<BFloat16>(__VA_ARGS__);         \
    case kFloat16: return launcher<Float16>(__VA_ARGS__);           \
    default: return launcher<float>(__VA_ARGS__);                   \
  }

int launch_contract_output(const Problem& p, const Device&, void* workspace, void* stream) {
  KAN_BY_TYPE(launch_output_any, p, workspace, stream)
}

int launch_contract_input(const Problem& p, const Device&, void* workspace, void* stream) {
  KAN_BY_TYPE(launch_input_any, p, workspace, stream)
}

int launch_contract_weight(const Problem& p, const Device& device, void* workspace, void* stream) {
  KAN_BY_TYPE(launch_weight_any, p, slices_any(p, device), workspace, stream)
}

}  // namespace kan::cuda
