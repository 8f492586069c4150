#include "transfer/cuda/staged_inbound.h"

#include <unistd.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <utility>

#include "base/check.h"
#include "base/log.h"

namespace baton::transfer::staged {
namespace {

/// A writer asks for a slot per message that it has gathered, so for no more than its own slots.
constexpr uint32_t kMaxWants = 64 * kSlots;
/// How long a writer may keep a slot that others wait for, in stall timeouts.
constexpr int64_t kSlowStalls = 5;
/// Copies into host memory keep the progress thread busy: others have their turn after this much.
constexpr uint64_t kHostBurstBytes = 4u << 20;
constexpr int64_t kQuarantinePollNs = 2'000'000;
constexpr int64_t kSlowPollNs = 100'000'000;

}  // namespace

Result<SlotMemory*> StagedInbound::memory() {
  // Made under the agent's lock by the first writer; a simulated network asks from other threads, and only later.
  std::lock_guard lock(memory_mutex_);
  if (memory_ == nullptr) {
    std::shared_ptr<const cuda::Device> device;
    for (const LocalPool& pool : context_.pools()) {
      Result<const BackendRegion*> region = context_.backend_region(pool, self_);
      if (!region.ok()) continue;  // said when a writer comes
      if (const StagedDevice* found = static_cast<const StagedRegion*>(*region)->device) device = found->device;
    }
    BATON_ASSIGN_OR_RETURN(memory_, SlotMemory::create("baton-staging-in", device));
    for (uint32_t index = kSlots; index > 0; --index) free_.push_back(index - 1);
    log_info("transfer {}: {} slots of {} KiB for what comes in over {}", context_.agent_name, kSlots, kSlotStride >> 10,
             self_.transport());
  }
  return memory_.get();
}

Result<Welcome> StagedInbound::add_writer(Id id, const Hello& hello) {
  for (const Slot& slot : slots_) {
    if (slot.state == State::kQuarantined && slot.epoch == hello.from) {
      return unavailable("an earlier connection of '{}' broke off and is not cleared away yet: connect again", hello.name);
    }
  }
  BATON_RETURN_IF_ERROR(memory().status());
  pools_ = context_.pools();
  Welcome welcome;
  for (const LocalPool& pool : pools_) {
    Result<const BackendRegion*> region = context_.backend_region(pool, self_);
    if (region.ok()) {
      welcome.pools.push_back({.id = pool.id, .base = 0, .key = pool.stride_bytes * pool.count});
    } else {
      log_warning("transfer {}: pool {} is not reachable over {}: {}", context_.agent_name, pool.id, self_.transport(),
                  region.status().to_string());
    }
  }
  if (may_write_slots(id, hello.from)) welcome.rails.emplace_back(kMayWriteSlots);
  Writer writer;
  writer.epoch = hello.from;
  writer.name = hello.name;
  writers_.emplace(id, std::move(writer));
  log_info("transfer {}: '{}' can write into this process over {} ({} pools)", context_.agent_name, hello.name,
           self_.transport(), welcome.pools.size());
  return welcome;
}

bool StagedInbound::may_write_slots(Id id, Epoch writer) {
  if (self_.transport() != "staged:shm") return false;
  const int pid = control_.remote_pid(id);
  if (pid <= 0) return false;
  if (pid == ::getpid() || processes_.contains(writer)) return true;
  Result<ProcessHandle> process = ProcessHandle::open(pid);
  // Still connected: so it was that process, and not one that was given its pid afterwards.
  if (process.ok() && !control_.still_connected(id)) process = unavailable("it is gone");
  if (!process.ok()) {
    log_info("transfer {}: pid {} may not write into the slots of {}: {}", context_.agent_name, pid, self_.transport(),
             process.status().message());
    return false;
  }
  processes_.emplace(writer, std::move(*process));
  return true;
}

bool StagedInbound::may_be_written(uint32_t index, Epoch writer) const {
  if (memory_->busy(index).load() == 0) return false;
  // A process that lives closes its connections after its copies have ended.
  auto process = processes_.find(writer);
  return process != processes_.end() && !process->second.ended();
}

void StagedInbound::forget_process(Epoch writer) {
  for (const Slot& slot : slots_) {
    if (slot.state != State::kFree && slot.epoch == writer) return;
  }
  for (const auto& [id, one] : writers_) {
    if (one.epoch == writer) return;
  }
  processes_.erase(writer);
}

void StagedInbound::remove_writer(Id id) {
  auto node = writers_.extract(id);
  if (node.empty()) return;
  std::erase(wanting_, id);
  bool holds = false;
  for (Slot& slot : slots_) {
    if (slot.state == State::kFree || slot.writer != id) continue;
    slot.writer = 0;
    if (slot.state == State::kCopying) continue;
    slot.state = State::kQuarantined;
    ++quarantined_;
    holds = true;
  }
  std::erase_if(arrived_, [this](uint32_t index) { return slots_[index].state != State::kArrived; });
  // Something of it may still be on its way here, over a link that it shares with its other connections.
  if (holds) to_cut_off_.insert(node.mapped().epoch);
  forget_process(node.mapped().epoch);
  context_.wake();
}

void StagedInbound::on_note(Id id, const Arrival& arrival) {
  auto it = writers_.find(id);
  if (it == writers_.end()) return;
  Writer& writer = it->second;
  const std::optional<Note> note = parse_note(arrival);
  if (!note || note->kind != Note::Kind::kWant || note->value > kMaxWants || writer.wants + note->value > kMaxWants) {
    log_warning("transfer {}: '{}' is cut off: it asks for slots in a way that cannot be", context_.agent_name, writer.name);
    to_cut_off_.insert(writer.epoch);
    return;
  }
  writer.wants += note->value;
  if (writer.wants == 0 || std::exchange(writer.waits, true)) return;
  if (free_.empty()) ++waits_;
  wanting_.push_back(id);
}

void StagedInbound::on_message(uint32_t tag, uint64_t count) {
  const std::optional<SlotTag> slot_tag = parse_slot_tag(tag);
  if (!slot_tag || count != 1 || slots_[slot_tag->slot].state != State::kGranted) {
    // The last words of a writer that was cut off; its slot is not given away before they have come.
    log_debug("transfer {}: a message for no granted slot (tag {:#x}) over {}", context_.agent_name, tag, self_.transport());
    return;
  }
  Slot& slot = slots_[slot_tag->slot];
  slot.state = State::kArrived;
  slot.pieces = slot_tag->pieces;
  arrived_.push_back(slot_tag->slot);
}

const LocalPool* StagedInbound::find_pool(uint32_t id) {
  if (id >= pools_.size()) pools_ = context_.pools();
  return id < pools_.size() ? &pools_[id] : nullptr;
}

Result<bool> StagedInbound::start_copy(uint32_t index) {
  Slot& slot = slots_[index];
  // Parsed from a copy: what lies in the slot could change under our eyes.
  const size_t size = descriptor_bytes(slot.pieces);
  descriptor_.assign(reinterpret_cast<const char*>(memory_->data(index)) - size, size);
  BATON_ASSIGN_OR_RETURN(Descriptor descriptor, parse_descriptor(descriptor_));
  if (descriptor.grant != slot.grant) {
    return invalid_argument("it names grant {}, the slot has {}", descriptor.grant, slot.grant);
  }
  const LocalPool* pool = find_pool(descriptor.pool);
  if (pool == nullptr) return invalid_argument("there is no pool {}", descriptor.pool);
  BATON_RETURN_IF_ERROR(check_pieces(descriptor, pool->stride_bytes * pool->count));
  BATON_ASSIGN_OR_RETURN(const BackendRegion* region, context_.backend_region(*pool, self_));
  slot.tag = descriptor.tag;
  slot.bytes = descriptor.bytes;
  slot.device = static_cast<const StagedRegion*>(region)->device;
  if (slot.device == nullptr) {
    const std::byte* from = memory_->data(index);
    for (const Piece& piece : descriptor.pieces) {
      std::memcpy(region->data + piece.offset, from, piece.bytes);
      from += piece.bytes;
    }
    return true;
  }
  StagedDevice& device = *slot.device;
  if (!device.broken.ok()) return device.broken;
  BATON_RETURN_IF_ERROR(memory_->pin(device.device));
  segments_.clear();
  for (const Piece& piece : descriptor.pieces) segments_.push_back({0, piece.offset, piece.bytes});
  if (device.stager->idle()) device.last_end_ns = context_.clock->now_ns();
  BATON_ASSIGN_OR_RETURN(std::optional<uint32_t> copy,
                         device.stager->scatter(memory_->address(index),
                                                reinterpret_cast<cuda::CUdeviceptr>(region->data), segments_));
  if (!copy) return false;
  slot.copy = *copy;
  return true;
}

void StagedInbound::note(Id writer, Note note) {
  if (auto it = writers_.find(writer); it != writers_.end()) it->second.notes.push_back(encode_note(note));
}

void StagedInbound::release(uint32_t index) {
  Slot& slot = slots_[index];
  if (auto it = writers_.find(slot.writer); it != writers_.end()) --it->second.held;
  const Slot was = std::exchange(slot, {});
  free_.push_back(index);
  if (was.writer == 0) forget_process(was.epoch);
}

void StagedInbound::finish(uint32_t index, BackendEvents& events) {
  Slot& slot = slots_[index];
  bytes_ += slot.bytes;
  if (slot.tag != 0) events.on_arrived(slot.tag, 1);
  note(slot.writer, {Note::Kind::kDone, static_cast<uint16_t>(index), slot.grant});
  release(index);
}

void StagedInbound::refuse(uint32_t index, const Status& why) {
  Slot& slot = slots_[index];
  auto writer = writers_.find(slot.writer);
  log_warning("transfer {}: a message of '{}' over {} is refused, and the writer cut off: {}", context_.agent_name,
              writer != writers_.end() ? writer->second.name : "?", self_.transport(), why.to_string());
  note(slot.writer, {Note::Kind::kRefused, static_cast<uint16_t>(index), static_cast<uint32_t>(why.code())});
  to_cut_off_.insert(slot.epoch);
}

size_t StagedInbound::copy_arrived(BackendEvents& events) {
  size_t count = 0;
  const uint64_t before = bytes_;
  while (!arrived_.empty() && bytes_ - before < kHostBurstBytes) {
    const uint32_t index = arrived_.front();
    Result<bool> started = start_copy(index);
    if (started.ok() && !*started) break;
    arrived_.pop_front();
    ++count;
    if (!started.ok()) {
      refuse(index, started.status());
    } else if (slots_[index].device == nullptr) {
      finish(index, events);
    } else {
      slots_[index].state = State::kCopying;
      ++copying_;
    }
  }
  return count;
}

size_t StagedInbound::collect_copied(BackendEvents& events) {
  if (copying_ == 0) return 0;
  size_t count = 0;
  const int64_t now_ns = context_.clock->now_ns();
  for (uint32_t index = 0; index < kSlots; ++index) {
    Slot& slot = slots_[index];
    if (slot.state != State::kCopying) continue;
    StagedDevice& device = *slot.device;
    if (device.stager->ended(slot.copy)) {
      device.last_end_ns = now_ns;
      device.stager->release(slot.copy);
      --copying_;
      ++count;
      finish(index, events);
    } else if (device.check(now_ns)) {
      // Nothing of it can be said to have arrived.
      refuse(index, device.broken);
      device.stager->release(slot.copy);
      --copying_;
      ++count;
      release(index);
    }
  }
  return count;
}

size_t StagedInbound::grant() {
  size_t granted = 0;
  size_t passed_over = 0;
  while (!free_.empty() && passed_over < wanting_.size()) {
    const Id id = wanting_.front();
    Writer& writer = writers_.at(id);
    wanting_.pop_front();
    if (writer.held > 0 && writer.held >= free_.size()) {
      wanting_.push_back(id);
      ++passed_over;
      continue;
    }
    const uint32_t index = free_.back();
    free_.pop_back();
    Slot& slot = slots_[index];
    slot = {};
    slot.state = State::kGranted;
    slot.writer = id;
    slot.epoch = writer.epoch;
    slot.grant = next_grant_++;
    slot.granted_ns = context_.clock->now_ns();
    memory_->busy(index).store(0);
    ++writer.held;
    --writer.wants;
    writer.notes.push_back(encode_note({Note::Kind::kGrant, static_cast<uint16_t>(index), slot.grant}));
    ++granted;
    passed_over = 0;
    writer.waits = writer.wants > 0;
    if (writer.waits) wanting_.push_back(id);
  }
  return granted;
}

void StagedInbound::cut_off_the_slow() {
  if (wanting_.empty() || !free_.empty()) return;
  const int64_t oldest_ns = context_.clock->now_ns() - kSlowStalls * context_.config.stall_timeout_ms * 1'000'000;
  for (const Slot& slot : slots_) {
    if (slot.state != State::kGranted || slot.granted_ns > oldest_ns || to_cut_off_.contains(slot.epoch)) continue;
    auto writer = writers_.find(slot.writer);
    log_warning("transfer {}: '{}' is cut off: it has kept a slot for {} ms, and others wait", context_.agent_name,
                writer != writers_.end() ? writer->second.name : "?",
                kSlowStalls * context_.config.stall_timeout_ms);
    to_cut_off_.insert(slot.epoch);
  }
}

void StagedInbound::cut_off() {
  // Closing its connections calls remove_writer(), which may find more to cut off: the same epoch again.
  for (Epoch epoch : std::exchange(to_cut_off_, {})) {
    (void)control_.fence(epoch, 0);  // it may come back with the metadata that it has
    to_cut_off_.erase(epoch);
  }
}

void StagedInbound::send_notes() {
  for (auto& [id, writer] : writers_) {
    // Not taken: it does not read its socket (it is stopped). It can be told at most once per slot and refusal.
    if (!writer.notes.empty() && control_.send_arrivals(id, writer.notes)) writer.notes.clear();
  }
}

size_t StagedInbound::clear_quarantine() {
  if (quarantined_ == 0) return 0;
  std::set<Epoch> epochs;
  for (const Slot& slot : slots_) {
    if (slot.state == State::kQuarantined) epochs.insert(slot.epoch);
  }
  const uint32_t before = quarantined_;
  for (Epoch epoch : epochs) {
    if (inner_->fence(epoch, 0).ok()) free_quarantined(epoch);
  }
  return before - quarantined_;
}

void StagedInbound::free_quarantined(Epoch writer) {
  for (uint32_t index = 0; index < kSlots; ++index) {
    if (slots_[index].state != State::kQuarantined || slots_[index].epoch != writer) continue;
    if (may_be_written(index, writer)) continue;
    --quarantined_;
    release(index);
  }
}

size_t StagedInbound::progress(BackendEvents& events) {
  size_t count = collect_copied(events);
  count += copy_arrived(events);
  count += grant();
  cut_off_the_slow();
  send_notes();
  if (!to_cut_off_.empty()) {
    cut_off();
    ++count;
  }
  return count + clear_quarantine();
}

Status StagedInbound::settle(Epoch writer) {
  free_quarantined(writer);
  size_t copying = 0;
  for (const Slot& slot : slots_) copying += slot.state == State::kCopying && slot.epoch == writer ? 1 : 0;
  if (copying == 0) return Status();
  return unavailable("{} copies of what it sent are under way on the GPU", copying);
}

Status StagedInbound::settle_all() {
  if (copying_ == 0) return Status();
  return unavailable("{} copies into GPU memory are under way", copying_);
}

int64_t StagedInbound::longest_wait_ns() const {
  if (copying_ > 0 || !arrived_.empty() || !to_cut_off_.empty()) return 0;
  if (quarantined_ > 0) return kQuarantinePollNs;
  return wanting_.empty() ? std::numeric_limits<int64_t>::max() : kSlowPollNs;
}

}  // namespace baton::transfer::staged
