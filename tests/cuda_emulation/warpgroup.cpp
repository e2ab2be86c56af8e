// What is under way in a block: products of warpgroups, and copies that the tensor cores may not yet see. Like runtime.cpp never
// compiled with a sanitizer: the kernels' own accesses are to be watched, not these records of them.
#include "emulation.h"

#undef threadIdx
#undef blockIdx
#undef gridDim

#include <deque>
#include <map>
#include <memory>
#include <utility>

namespace kan::emulation {

namespace {

// Sums that products under way add to: meanwhile they lie here, and NaN in their place.
struct Sums {
  std::vector<float> values;
  int under_way = 0;
  const char* shape = nullptr;
};
using Registers = std::vector<uint32_t>;
struct Lane {
  std::map<float*, Sums> sums;
  std::map<const void*, Registers> fenced;  // registers that products have taken, as the last fence saw them
};
using Group = std::vector<std::function<void()>>;
struct Warp {
  Lane lanes[32];
  Group open;
  std::deque<Group> groups;
  bool fenced = false;
  std::vector<std::pair<const char*, uint64_t>> issued;
};
struct State {
  std::vector<Warp> warps;
  std::vector<int> hidden;  // by pieces of 16 bytes: 1 + the thread whose copy no proxy fence followed, or 0
};
// Of all blocks of a launch that have begun: memory that one block's threads free would order the next one's.
std::vector<std::unique_ptr<State>> states;

constexpr float kUnderWay = __builtin_nanf("0x2badba");

Registers registers(const void* from, int count) {
  Registers found(count);
  std::memcpy(found.data(), from, found.size() * 4);
  return found;
}

State& own() { return *states[self->block]; }
Warp& own_warp() { return own().warps[self->warp]; }

void hold(Lane& lane, const Product& product) {
  Sums& sums = lane.sums[product.sums];
  if (sums.under_way++ == 0) {
    auto before = lane.fenced.find(product.sums);
    if (before != lane.fenced.end() && before->second != registers(product.sums, product.count))
      fail(std::string(product.name) + ": sums were written after the fence");
    lane.fenced[product.sums] = registers(product.sums, product.count);
    sums.values.assign(product.sums, product.sums + product.count);
    sums.shape = product.name;
    for (int i = 0; i < product.count; ++i) product.sums[i] = kUnderWay;
  } else if (std::strcmp(sums.shape, product.name) != 0) {
    fail(std::string(product.name) + " on the sums of a " + sums.shape + " under way");
  }
}

void release(Lane& lane, const Product& product) {
  Sums& sums = lane.sums[product.sums];
  if (--sums.under_way > 0) return;
  for (int i = 0; i < product.count; ++i)
    if (std::memcmp(&product.sums[i], &kUnderWay, 4) != 0) fail(std::string(product.name) + ": sums are written while it is under way");
  std::memcpy(product.sums, sums.values.data(), sums.values.size() * sizeof(float));
}

}  // namespace

void begin_block(int threads) {
  states.push_back(std::make_unique<State>());
  states.back()->warps.resize(threads / 32);
  states.back()->hidden.assign(shared_bytes / 16 + 1, 0);
}
void end_thread() {
  if (!own_warp().open.empty() || !own_warp().groups.empty()) fail("a thread ends with products under way");
}
// The four warps of a group issue the same instructions, but each in its own time.
void end_block(int number) {
  const std::vector<Warp>& warps = states[number]->warps;
  for (size_t w = 0; w < warps.size(); ++w)
    if (warps[w].issued != warps[w / 4 * 4].issued) fail("the warps of a group did not issue the same products, fences and waits");
}
void end_launch() { states.clear(); }

void start_product(const std::array<Product, 32>& lanes, Finish finish) {
  Warp& warp = own_warp();
  const Product& one = lanes[0];
  if (own().warps.size() % 4 != 0) fail(std::string(one.name) + ": a block without whole groups of four warps");
  for (const Product& product : lanes)
    if (product.descriptor != one.descriptor || product.left_descriptor != one.left_descriptor) fail(std::string(one.name) + ": lanes with different descriptors");
  warp.issued.push_back({one.name, one.descriptor});
  if (!warp.fenced) fail(std::string(one.name) + ": registers were written, and no fence followed");
  Lefts early;
  for (int i = 0; i < 32; ++i) {
    const Product& product = lanes[i];
    Lane& lane = warp.lanes[i];
    hold(lane, product);
    if (product.left == nullptr) continue;
    const Registers left = registers(product.left, 4);
    auto before = lane.fenced.find(product.left);
    if (before != lane.fenced.end() && before->second != left) fail(std::string(one.name) + ": the left operand was written after the fence");
    lane.fenced[product.left] = left;
    for (int r = 0; r < 4; ++r) early[i][r] = left[r];
    early[i][4] = product.metadata ? *product.metadata : 0;
  }
  warp.open.push_back([&warp, lanes, early, finish = std::move(finish)] {
    float* sums[32];
    for (int i = 0; i < 32; ++i) {
      const Product& product = lanes[i];
      if (product.left && (std::memcmp(product.left, early[i].data(), 16) != 0 || (product.metadata && *product.metadata != early[i][4])))
        fail(std::string(product.name) + ": the left operand is written while it is under way");
      sums[i] = warp.lanes[i].sums[product.sums].values.data();
    }
    finish(early, sums);
    for (int i = 0; i < 32; ++i) release(warp.lanes[i], lanes[i]);
  });
}

void order_registers() {
  Warp& warp = own_warp();
  warp.issued.push_back({"order_registers", 0});
  warp.fenced = true;
  for (Lane& lane : warp.lanes)
    for (auto& [place, seen] : lane.fenced) seen = registers(place, int(seen.size()));
}

void commit_products() {
  Warp& warp = own_warp();
  warp.issued.push_back({"commit_products", 0});
  warp.groups.push_back(std::move(warp.open));
  warp.open.clear();
  warp.fenced = false;
}

void wait_for_products(int groups_left) {
  Warp& warp = own_warp();
  warp.issued.push_back({"wait_for_products", uint64_t(groups_left)});
  for (; int(warp.groups.size()) > groups_left; warp.groups.pop_front())
    for (auto& product : warp.groups.front()) product();
}

void note_copy(const void* to) { own().hidden[(static_cast<const char*>(to) - shared) / 16] = 1 + int(self->thread.x); }
void show_to_tensor_cores() {
  for (int& writer : own().hidden)
    if (writer == 1 + int(self->thread.x)) writer = 0;
}
void expect_shown(const char* piece) {
  if (own().hidden[(piece - shared) / 16] != 0) fail("a product reads a copy that no proxy fence followed");
}
bool shown(int number, size_t offset, size_t bytes) {
  for (size_t piece = offset / 16; piece < (offset + bytes + 15) / 16; ++piece)
    if (states[number]->hidden[piece] != 0) return false;
  return true;
}

}  // namespace kan::emulation
