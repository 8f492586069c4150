#pragma once

#include <array>
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

#include "transfer/backend.h"
#include "transfer/control.h"
#include "transfer/cuda/staged_memory.h"
#include "transfer/cuda/staged_wire.h"
#include "transfer/process_handle.h"

namespace baton::transfer::staged {

/// The receiving half: owns the slots, grants them to writers, and takes apart what lands in them.
///
///   free -> granted -> arrived -> copying -> free         the writer is told with the last step
///              |          |
///              +----------+--> quarantined -> free        the writer has gone, or was cut off, before the copy was
///                                                         started: until the host transport says that nothing of
///                                                         it can land here any more, and no GPU of a killed writer
///                                                         can be at work in it
///
/// A writer gets a slot when it holds none, or fewer than are free: alone it gets half of them, each further one half of the
/// rest. One that sits on a slot while others wait is cut off after some seconds.
///
/// Under the agent's lock, except memory().
class StagedInbound {
 public:
  using Id = ControlPlane::Id;

  StagedInbound(BackendContext& context, Backend& self, ControlPlane& control)
      : context_(context), self_(self), control_(control) {}
  void set_host_transport(Backend& inner) { inner_ = &inner; }

  /// The slots; made when they are asked for first. From any thread.
  Result<SlotMemory*> memory();

  Result<Welcome> add_writer(Id id, const Hello& hello);
  void remove_writer(Id id);
  void on_note(Id id, const Arrival& arrival);
  /// The host transport says that a message with this tag has arrived.
  void on_message(uint32_t tag, uint64_t count);

  size_t progress(BackendEvents& events);
  /// ok: nothing of `writer`, whose host transport is fenced, is in a slot or on its way out of one.
  Status settle(Epoch writer);
  /// The same for everybody.
  Status settle_all();
  /// How long the agent may sleep for what goes on here, in ns.
  int64_t longest_wait_ns() const;

  size_t writers() const { return writers_.size(); }
  uint64_t bytes() const { return bytes_; }
  uint64_t waits() const { return waits_; }

 private:
  enum class State : uint8_t { kFree, kGranted, kArrived, kCopying, kQuarantined };
  struct Slot {
    State state = State::kFree;
    Id writer = 0;  // 0: it has gone
    Epoch epoch = Epoch::kNone;
    uint32_t grant = 0;
    uint32_t pieces = 0;
    int64_t granted_ns = 0;
    StagedDevice* device = nullptr;
    uint32_t copy = 0;
    uint32_t tag = 0;
    uint64_t bytes = 0;
  };
  struct Writer {
    Epoch epoch = Epoch::kNone;
    std::string name;
    uint32_t wants = 0;
    uint32_t held = 0;
    bool waits = false;  // in wanting_
    std::vector<Arrival> notes;  // to be sent
  };

  /// Starts (GPU) or does (host memory) the copy out of a slot. False: not now.
  Result<bool> start_copy(uint32_t index);
  const LocalPool* find_pool(uint32_t id);
  void finish(uint32_t index, BackendEvents& events);
  void release(uint32_t index);
  void refuse(uint32_t index, const Status& why);
  size_t copy_arrived(BackendEvents& events);
  size_t collect_copied(BackendEvents& events);
  size_t grant();
  void cut_off_the_slow();
  void cut_off();
  void send_notes();
  size_t clear_quarantine();
  void free_quarantined(Epoch writer);
  /// Whether `writer` may put data into the slots by itself. Remembers its process.
  bool may_write_slots(Id id, Epoch writer);
  /// A copy of a GPU of `writer`, which holds no connection any more, may still write into the slot.
  bool may_be_written(uint32_t index, Epoch writer) const;
  void forget_process(Epoch writer);
  void note(Id writer, Note note);

  BackendContext& context_;
  Backend& self_;
  ControlPlane& control_;
  Backend* inner_ = nullptr;
  std::mutex memory_mutex_;
  std::unique_ptr<SlotMemory> memory_;
  std::array<Slot, kSlots> slots_;
  std::vector<uint32_t> free_;
  std::deque<uint32_t> arrived_;
  std::unordered_map<Id, Writer> writers_;
  std::map<Epoch, ProcessHandle> processes_;  // of writers that put data into the slots, until none is left in quarantine
  std::deque<Id> wanting_;  // in turn
  std::set<Epoch> to_cut_off_;
  std::vector<LocalPool> pools_;
  std::vector<Segment> segments_;
  std::string descriptor_;
  uint32_t next_grant_ = 1;
  uint32_t copying_ = 0, quarantined_ = 0;
  uint64_t bytes_ = 0, waits_ = 0;
};

}  // namespace baton::transfer::staged
