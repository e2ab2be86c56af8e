// Signals of the blocks of a launch, and copies under way. Like runtime.cpp never compiled with a sanitizer: the kernels' own accesses
// are to be watched, not these records of them.
#include "runtime.h"

#undef threadIdx
#undef blockIdx
#undef gridDim

#include <algorithm>
#include <memory>
#include <stdexcept>
#include <vector>

#ifdef KAN_EMULATE_ASAN
extern "C" void* __asan_region_is_poisoned(void*, size_t);
#endif

namespace kan::emulation {

namespace {

struct Record {
  const cuda::Signal* signal;
  int preparer;
  int arrivals;
  int left = 0;       // arrivals that the phase waits for
  int64_t bytes = 0;  // announced and not there yet; below 0: there and not announced yet
  bool shown = false;
  Meeting meeting{};  // its turn is the number of the phase
};
struct Copy {
  Box box;
  Record* record;
  int block;
};

// Room that no thread frees: the thread sanitizer would see it move from one to the other.
constexpr size_t kSignals = 64, kCopies = 256;
std::vector<std::unique_ptr<std::vector<Record>>> signals;  // by the blocks of a launch that have begun
std::vector<Copy> copies;

Record& record_of(const cuda::Signal* signal, int block) {
  for (Record& record : *signals[neighbour(block).number])
    if (record.signal == signal) return record;
  fail("a signal is used that was not prepared");
}
// Another thread's signal, or one that another than a thread reaches.
Record& shown_record_of(const cuda::Signal* signal, int block, bool by_thread) {
  Record& record = record_of(signal, block);
  const bool own = by_thread && self->block == neighbour(block).number && int(self->thread.x) == record.preparer;
  if (!own && !record.shown) fail("a signal is used that was prepared and not shown");
  return record;
}

void end_phase_if_due(Record& record) {
  if (record.left > 0) return;
  if (record.bytes < 0) fail("more bytes came to a signal than it was told of");
  if (record.bytes > 0) return;
  ++record.meeting.turn;
  record.left = record.arrivals;
  wake_all_at(&record);
}

// The box, in lines of 128 bytes whose pieces of 16 stand at their number xor that of the line, by the address.
void copy(const Box& box, uint32_t address) {
  const Map& map = box.map;
  for (int line = 0; line < box.bytes / 128; ++line) {
    const int64_t y = int64_t(box.y) + line % map.box[1], z = int64_t(box.z) + line / map.box[1];
    uint16_t numbers[64] = {};
    if (y >= 0 && y < map.sizes[1] && z >= 0 && z < map.sizes[2]) {
      const char* row = static_cast<const char*>(map.numbers) + y * map.strides[0] + z * map.strides[1];
      for (int i = 0; i < 64; ++i) {
        const int64_t x = int64_t(box.x) + i;
        if (x < 0 || x >= map.sizes[0]) continue;
#ifdef KAN_EMULATE_ASAN
        if (__asan_region_is_poisoned(const_cast<char*>(row + 2 * x), 2) != nullptr) fail("the copy engine reads what is no tensor's");
#endif
        std::memcpy(&numbers[i], row + 2 * x, 2);
      }
    }
    const uint32_t turn = (address + uint32_t(128 * line)) / 128 % 8;
    for (uint32_t piece = 0; piece < 8; ++piece) std::memcpy(box.shared + 128 * line + 16 * (piece ^ turn), numbers + 8 * piece, 16);
  }
}

}  // namespace

void begin_signals() {
  signals.push_back(std::make_unique<std::vector<Record>>());
  signals.back()->reserve(kSignals);
  copies.reserve(kCopies);
}
void end_signals() {
  for (const Copy& copy : copies)
    if (neighbour(copy.block).number == self->block) fail("a block ends while the copy engine writes its shared memory");
  for (const Record& record : *signals[self->block])
    if (record.bytes != 0) fail("a block ends with bytes outstanding at a signal");
}
void forget_signals() {
  copies.clear();
  signals.clear();
}

void* there(void* own, size_t bytes, int block) {
  const size_t offset = size_t(static_cast<char*>(own) - shared);
  if (static_cast<char*>(own) < shared || offset + bytes > shared_bytes) fail("a signal or copy outside shared memory");
  if (block < 0 || block >= blocks_of_cluster()) fail("a block that the cluster does not have");
  const Neighbour target = neighbour(block);
  if (target.ended) fail("the shared memory of a block that has ended is used");
  return target.memory + offset;
}

void prepare(cuda::Signal* signal, int arrivals) {
  there(signal, sizeof *signal, block_of_cluster());
  if (reinterpret_cast<uintptr_t>(signal) % 8 != 0) fail("a misaligned signal");
  if (arrivals < 1 || arrivals >= 1 << 20) fail("a signal of " + std::to_string(arrivals) + " arrivals");
  std::vector<Record>& mine = *signals[self->block];
  for (const Record& record : mine)
    if (record.signal == signal) fail("a signal is prepared twice");
  if (mine.size() == kSignals) fail("more signals than are emulated");
  mine.push_back({signal, int(self->thread.x), arrivals, arrivals});
}
void show_signals() {
  for (Record& record : *signals[self->block])
    if (record.preparer == int(self->thread.x)) record.shown = true;
}

void arrive_at(cuda::Signal* signal, int block, int bytes) {
  Record& record = shown_record_of(signal, block, true);
  if (bytes < 0 || bytes >= 1 << 20) fail("a signal is told of " + std::to_string(bytes) + " bytes");
  if (record.left == 0) fail("more threads arrive at a signal than it was prepared for");
  release(&record.meeting.objects[record.meeting.turn & 1]);
  record.bytes += bytes;
  --record.left;
  end_phase_if_due(record);
}
void wait_for(cuda::Signal* signal, uint32_t parity) {
  Record& record = shown_record_of(signal, block_of_cluster(), true);
  if (parity > 1) fail("a parity of " + std::to_string(parity));
  if ((record.meeting.turn & 1) == parity) {
    sleep_at(&record);
    if ((record.meeting.turn & 1) == parity) fail("a signal is two phases ahead of a thread that waits for it");
  }
  acquire(&record.meeting.objects[parity]);
}

Box box_of(const cuda::TensorMap& map, int x, int y, int z, void* shared) {
  Box box{{}, x, y, z, static_cast<char*>(shared), 0};
  std::memcpy(&box.map, map.opaque, sizeof box.map);
  if (box.map.magic != kMap) fail("the copy engine is given no tensor map");
  if (box.map.box[0] != 64) fail("boxes whose lines are not 128 bytes are not emulated");
  box.bytes = 128 * box.map.box[1] * box.map.box[2];
  if (cuda::shared_address(shared) % 128 != 0) fail("a box at no multiple of 128 bytes");
  return box;
}
void copy_box_later(const Box& box, cuda::Signal* signal, int block) {
  Record& record = shown_record_of(signal, block, false);
  const Neighbour target = neighbour(block);
  if (!shown(target.number, size_t(box.shared - target.memory), size_t(box.bytes)))
    fail("the copy engine writes where a thread's write was not shown");
  for (const Copy& other : copies)
    if (box.shared < other.box.shared + other.box.bytes && other.box.shared < box.shared + box.bytes)
      fail("the copy engine writes where a copy is under way");
  release(&record.meeting.objects[record.meeting.turn & 1]);
  if (copies.size() == kCopies) let_a_copy_arrive();
  copies.push_back({box, &record, block});
}

int copies_under_way() { return int(copies.size()); }
void let_a_copy_arrive() {
  Copy& chosen = copies[random_number(unsigned(copies.size()))];
  const Copy arriving = chosen;
  chosen = copies.back();
  copies.pop_back();
  copy(arriving.box, kSharedBase + uint32_t(arriving.box.shared - neighbour(arriving.block).memory));
  arriving.record->bytes -= arriving.box.bytes;
  end_phase_if_due(*arriving.record);
}

}  // namespace kan::emulation

namespace kan::cuda {

TensorMap map_tensor(const Boxes& boxes) {
  auto refuse = [](const std::string& why) { throw std::runtime_error("a tensor map's " + why); };
  if (boxes.numbers == nullptr || reinterpret_cast<uintptr_t>(boxes.numbers) % 16 != 0) refuse("tensor is at no multiple of 16 bytes");
  for (int64_t size : boxes.sizes)
    if (size < 1 || size > int64_t(1) << 32) refuse("size is " + std::to_string(size));
  for (int64_t stride : boxes.strides)
    if (stride < 16 || stride % 16 != 0 || stride >= int64_t(1) << 40) refuse("stride is no multiple of 16 bytes");
  for (int side : boxes.box)
    if (side < 1 || side > 256) refuse("box has a side below 1 or above 256");
  if (boxes.box[0] > 64 || boxes.box[0] % 8 != 0) refuse("box has lines that are no multiple of 16 bytes up to 128");
  emulation::Map map{boxes.numbers, {}, {}, {}, emulation::kMap};
  std::copy(boxes.sizes, boxes.sizes + 3, map.sizes);
  std::copy(boxes.strides, boxes.strides + 2, map.strides);
  std::copy(boxes.box, boxes.box + 3, map.box);
  TensorMap r{};
  static_assert(sizeof map <= sizeof r.opaque);
  std::memcpy(r.opaque, &map, sizeof map);
  return r;
}

}  // namespace kan::cuda
