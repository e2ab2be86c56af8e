// What the kernels of clusters share. They are those of warpgroups, whose operands come another way: the copy engine fills the stages, by
// itself, and what several blocks of a cluster need is read from memory once, for all of them.
//
// A cluster: kTall blocks, one below another, by kWide side by side. Blocks of the same columns have one right operand, blocks of the same
// rows one left operand. Of what so many share each copies a part, for all.
#pragma once
#include "cluster.cuh"
#include "warpgroup_tile.cuh"

namespace kan::cuda {

template <int kTall, int kWide> struct ClusterPlace {
  static constexpr int kBlocks = kTall * kWide;
  static constexpr int kReaders = kTall + kWide - 1;  // of what a block copies, itself among them
  int tall, wide;

  KAN_DEVICE ClusterPlace() {
    const int block = block_of_cluster();
    tall = block % kTall, wide = kWide == 1 ? 0 : block / kTall;
  }
  KAN_DEVICE int at(int tall, int wide) const { return wide * kTall + tall; }
  // Of blocks, as bits: those that share the right and the left operand.
  KAN_DEVICE int column() const { return ((1 << kTall) - 1) << (wide * kTall); }
  KAN_DEVICE int row() const {
    int bits = 0;
    for (int other = 0; other < kWide; ++other) bits |= 1 << at(tall, other);
    return bits;
  }
};

// A stage, and the parity of the phases of its signals that end in this time round.
template <int kStages> struct Turn {
  int stage = 0;
  uint32_t parity = 0;

  KAN_DEVICE void advance() {
    stage = next_of<kStages>(stage);
    parity ^= uint32_t(stage == 0);
  }
};

// About every stage: all that was announced has been copied to it; every warp that reads what this block copies to it has done so, in all
// blocks. Warps, for the four of a group multiply each in its own time (9.7.15: wait_group is about the products of who executes it).
//
// A block may end before the others of its cluster: by then all that they copy to it has come, for it has multiplied it, and all that they
// tell it, for nobody releases a stage that is not copied to again, which whoever does so waits for.
template <int kStages> struct StageSignals {
  Signal copied[kStages], released[kStages];

  // By one thread, before the cluster meets.
  KAN_DEVICE void prepare_all(int readers) {
    for (int stage = 0; stage < kStages; ++stage) {
      prepare(copied + stage, 1);
      prepare(released + stage, readers * (kMultipliers / 32));
    }
    show_signals();
  }
  // This warp's products have read the stage: all blocks that copy to it are told, by a lane each.
  template <int kTall, int kWide> KAN_DEVICE void release(const ClusterPlace<kTall, kWide>& place, int stage) {
    const int lane = int(thread_now()) % 32, beside = lane - kTall;
    if (lane >= kTall + kWide - 1) return;
    arrive_at(released + stage, beside < 0 ? place.at(lane, place.wide) : place.at(place.tall, beside + int(beside >= place.wide)));
  }
};

// The multipliers' stages where one of their threads has the copies made, as multiply_steps wants it. copy(step, stage, signal) begins this
// block's part of those of a step, of which all blocks' parts are `bytes` long.
template <int kTall, class Copy> struct CopiedByEngine {
  static constexpr bool kMeet = false;
  const ClusterPlace<kTall, 1>& place;
  StageSignals<kRightStages>& signals;
  int bytes;
  Copy copy;
  uint32_t parities = 0;  // of the steps at hand: bit 0 where they are copied to, bit 1 where they are read

  template <class Step> KAN_DEVICE void begin(const Step& step, int stage, bool exists) {
    if (!exists) return;
    if (thread_now() == 0) {
      wait_for(signals.released + stage, ~parities & 1u);
      announce_bytes(signals.copied + stage, bytes);
      copy(step, stage, signals.copied + stage);
    }
    parities ^= stage == kRightStages - 1 ? 1u : 0u;
  }
  template <int kLater> KAN_DEVICE void wait(int stage) {
    wait_for(signals.copied + stage, parities >> 1);
    parities ^= stage == kRightStages - 1 ? 2u : 0u;
  }
  KAN_DEVICE void release(int stage) { signals.release(place, stage); }
  KAN_DEVICE void end() {}
};
template <int kTall, class Copy>
CopiedByEngine(const ClusterPlace<kTall, 1>&, StageSignals<kRightStages>&, int, Copy) -> CopiedByEngine<kTall, Copy>;

}  // namespace kan::cuda
