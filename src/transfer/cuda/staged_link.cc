#include "transfer/cuda/staged_link.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "transfer/cuda/staged_backend_impl.h"

namespace baton::transfer::staged {

using cuda::CUdeviceptr;

StagedLink::StagedLink(StagedBackend& backend, ControlPlane::Id id, std::string peer_name, std::unique_ptr<Link> inner,
                       const BackendLimits& inner_limits)
    : backend_(backend),
      id_(id),
      peer_name_(std::move(peer_name)),
      inner_limits_(inner_limits),
      inner_(std::move(inner)) {
  inner_->owner = this;
}

StagedLink::~StagedLink() {
  BATON_CHECK(gathering_.empty()) << "a link to '" << peer_name_ << "' closed with copies under way";
  pinned_slots_ = {};
  inner_.reset();  // from here on nobody reads our slots, and the receiver's are not ours to write any more
  for (const auto& [slot, message] : messages_) backend_.release_slot(slot);
  backend_.forget(*this);
}

void StagedLink::on_welcome(const Welcome& welcome) {
  for (const Welcome::Pool& pool : welcome.pools) pools_[pool.id] = pool.key;
  may_write_slots_ = std::find(welcome.rails.begin(), welcome.rails.end(), kMayWriteSlots) != welcome.rails.end();
  welcome_ = true;
}

Status StagedLink::choose_route(const StagedDevice* device) {
  const std::span<std::byte> slots = may_write_slots_ ? inner_->mapped_pool(0) : std::span<std::byte>();
  bool straight = slots.size() >= kSlots * kSlotStride;
  if (straight && device != nullptr) {
    Result<cuda::PinnedRange> pinned = cuda::PinnedRange::pin(device->device, slots);
    if (pinned.ok()) {
      pinned_slots_ = std::move(*pinned);
    } else {
      straight = false;
      log_warning("transfer: {} to '{}': its slots are mapped here, but the GPU cannot have them ({}): the CPU copies once more",
                  backend_.transport(), peer_name_, pinned.status().message());
    }
  }
  if (!straight) BATON_RETURN_IF_ERROR(backend_.open_out());
  if (straight) peer_slots_ = slots;
  route_ = straight ? Route::kStraight : Route::kOwnSlots;
  log_info("transfer: {} to '{}': {}", backend_.transport(), peer_name_,
           straight ? "straight into its slots, which are mapped here" : "by way of slots of our own");
  return Status();
}

void StagedLink::die(const Status& why) {
  if (std::exchange(dead_, true)) return;
  backend_.report_failure(*this, why);
}

Result<PostResult> StagedLink::post(const BackendMessage& message) {
  if (!ready()) return PostResult::kAgain;
  auto pool = pools_.find(message.remote_pool);
  if (pool == pools_.end()) {
    return failed_precondition("'{}' did not open pool {} for {}", peer_name_, message.remote_pool, backend_.transport());
  }
  for (const Segment& segment : message.segments) {
    if (segment.bytes > pool->second || segment.remote_offset > pool->second - segment.bytes) {
      return failed_precondition("'{}' says that its pool {} has {} bytes: less than its metadata says", peer_name_,
                                 message.remote_pool, pool->second);
    }
  }
  StagedDevice* device = static_cast<const StagedRegion*>(message.local)->device;
  if (device != nullptr) {
    if (!device->broken.ok()) return device->broken;
    BATON_ASSIGN_OR_RETURN(bool reached, backend_.event_reached(*device, message.after));
    if (!reached) return PostResult::kAgain;
  }
  if (route_ == Route::kNotChosen) BATON_RETURN_IF_ERROR(choose_route(device));
  // As the receiver does it: half of what is left for everyone, so that a peer that stands still leaves the others theirs.
  const size_t free = backend_.free_slots();
  if (free == 0 || (!messages_.empty() && messages_.size() >= free)) return PostResult::kFull;
  const uint32_t slot = backend_.take_slot();
  Message& one = messages_[slot];
  one.cookie = message.cookie;
  one.source = message.local->data;
  one.bytes = message.bytes;
  one.tag = static_cast<uint32_t>(message.tag);
  one.pool = message.remote_pool;
  one.segments.assign(message.segments.begin(), message.segments.end());
  one.device = device;
  if (route_ == Route::kStraight) {
    waiting_.push_back(slot);
  } else {
    Result<bool> started = gather(slot);
    if (!started.ok() || !*started) {
      messages_.erase(slot);
      backend_.release_slot(slot);
      if (!started.ok()) return started.status();
      return PostResult::kFull;
    }
  }
  ++wants_;
  return PostResult::kPosted;
}

Result<bool> StagedLink::gather(uint32_t slot) {
  Message& one = message(slot);
  const bool straight = route_ == Route::kStraight;
  if (one.device == nullptr) {
    std::byte* to = straight ? peer_slots_.data() + one.grant.slot * kSlotStride + kHeaderBytes : backend_.out().data(slot);
    // Not past the caches: all slots fit into one, and who reads them next finds them there (8 GB/s instead of 5).
    for (const Segment& segment : one.segments) {
      std::memcpy(to, one.source + segment.local_offset, segment.bytes);
      to += segment.bytes;
    }
    gathered_.push_back(slot);
    return true;
  }
  StagedDevice& device = *one.device;
  if (!device.broken.ok()) return device.broken;
  CUdeviceptr to = 0;
  if (straight) {
    to = pinned_slots_.address() + one.grant.slot * kSlotStride + kHeaderBytes;
    // Before the GPU can write there: whoever finds it 0 after our death knows that nothing is under way.
    slot_busy(peer_slots_.data(), one.grant.slot).store(1);
  } else {
    BATON_RETURN_IF_ERROR(backend_.out().pin(device.device));
    to = backend_.out().address(slot);
  }
  if (device.stager->idle()) device.last_end_ns = backend_.now_ns();
  BATON_ASSIGN_OR_RETURN(std::optional<uint32_t> copy,
                         device.stager->gather(reinterpret_cast<CUdeviceptr>(one.source), one.segments, to));
  if (!copy) {
    if (straight) slot_busy(peer_slots_.data(), one.grant.slot).store(0);
    return false;
  }
  one.copy = *copy;
  gathering_.push_back(slot);
  return true;
}

void StagedLink::flush() {
  if (wants_ == 0 || dead_) return;
  const Arrival want = encode_note({Note::Kind::kWant, 0, wants_});
  if (!backend_.send_note(id_, want)) return;  // the peer is stopped: asked again with the next turn
  asked_ += std::exchange(wants_, 0);
}

size_t StagedLink::advance() {
  size_t count = collect_gathered();
  flush();
  held_back_ = false;
  if (dead_) return count;
  count += gather_into_grants();
  return count + send_gathered();
}

size_t StagedLink::collect_gathered() {
  return std::erase_if(gathering_, [&](uint32_t slot) {
    Message& one = message(slot);
    StagedDevice& device = *one.device;
    const bool ended = device.stager->ended(one.copy);
    if (!ended && !device.check(backend_.now_ns())) return false;
    device.stager->release(one.copy);
    if (route_ == Route::kStraight) slot_busy(peer_slots_.data(), one.grant.slot).store(0);
    if (ended) {
      device.last_end_ns = backend_.now_ns();
      gathered_.push_back(slot);
    } else {
      die(device.broken);
    }
    return true;
  });
}

size_t StagedLink::gather_into_grants() {
  size_t started = 0;
  uint64_t host_bytes = 0;
  while (!waiting_.empty() && !grants_.empty() && host_bytes < inner_limits_.max_burst_bytes) {
    Message& one = message(waiting_.front());
    one.grant = grants_.front();
    Result<bool> begun = gather(waiting_.front());
    if (!begun.ok()) {
      die(begun.status());
      break;
    }
    if (!*begun) break;
    if (one.device == nullptr) host_bytes += one.bytes;
    waiting_.pop_front();
    grants_.pop_front();
    ++started;
  }
  return started;
}

size_t StagedLink::send_gathered() {
  if (dead_) return 0;
  const bool straight = route_ == Route::kStraight;
  size_t posted = 0;
  uint64_t burst_bytes = 0;
  while (!gathered_.empty() && (straight || !grants_.empty()) && burst_bytes < inner_limits_.max_burst_bytes) {
    const Message& one = message(gathered_.front());
    const uint64_t bytes = straight ? descriptor_bytes(one.segments.size()) : one.bytes;
    if (inner_count_ >= inner_limits_.max_inflight_messages ||
        (inner_count_ >= inner_limits_.min_inflight_messages && inner_bytes_ + bytes > inner_limits_.max_inflight_bytes)) {
      break;
    }
    Result<PostResult> result = send(gathered_.front(), straight ? one.grant : grants_.front());
    if (!result.ok()) {
      die(result.status());
      break;
    }
    if (*result != PostResult::kPosted) {
      held_back_ = *result == PostResult::kAgain;
      break;
    }
    gathered_.pop_front();
    if (!straight) grants_.pop_front();
    burst_bytes += bytes;
    ++posted;
  }
  if (posted > 0) inner_->flush();
  return posted;
}

Result<PostResult> StagedLink::send(uint32_t slot, const Note& grant) {
  Message& one = message(slot);
  const bool straight = route_ == Route::kStraight;
  const size_t size = descriptor_bytes(one.segments.size());
  const std::span<std::byte> descriptor = straight
                                              ? backend_.descriptors().of(slot, size)
                                              : std::span(backend_.out().data(slot) - size, size);
  write_descriptor(descriptor, grant.value, one.tag, one.pool, one.segments);
  const Segment whole{straight ? slot * kHeaderBytes : slot * kSlotStride + kHeaderBytes - size,
                      grant.slot * kSlotStride + kHeaderBytes - size, straight ? size : size + one.bytes};
  BackendMessage message;
  message.segments = std::span(&whole, 1);
  message.bytes = whole.bytes;
  BATON_ASSIGN_OR_RETURN(message.local, straight ? backend_.descriptor_region() : backend_.out_region());
  message.tag = static_cast<Tag>(encode_slot_tag({grant.slot, static_cast<uint32_t>(one.segments.size())}));
  message.cookie = slot;
  BATON_ASSIGN_OR_RETURN(PostResult result, inner_->post(message));
  if (result == PostResult::kPosted) {
    one.grant = grant;
    one.sent_bytes = straight ? size : one.bytes;
    ++inner_count_;
    inner_bytes_ += one.sent_bytes;
  }
  return result;
}

void StagedLink::on_sent(uint32_t slot, const Status& status) {
  auto it = messages_.find(slot);
  if (it == messages_.end()) return;
  --inner_count_;
  inner_bytes_ -= it->second.sent_bytes;
  it->second.sent = true;
  if (!status.ok()) {
    die(status);
    return;
  }
  end_if_over(slot);
}

void StagedLink::on_note(const Arrival& arrival) {
  const std::optional<Note> note = parse_note(arrival);
  if (note && note->kind == Note::Kind::kGrant && asked_ > 0) {
    --asked_;
    grants_.push_back(*note);
    return;
  }
  if (note && note->kind == Note::Kind::kRefused) {
    die(invalid_argument("'{}' refuses what it was sent ({}), and says why in its log", peer_name_,
                         status_code_name(static_cast<StatusCode>(note->value))));
    return;
  }
  for (auto& [slot, one] : messages_) {
    if (!note || note->kind != Note::Kind::kDone || one.grant.value != note->value || one.grant.slot != note->slot ||
        one.grant.kind != Note::Kind::kGrant) {
      continue;
    }
    one.done = true;
    end_if_over(slot);
    return;
  }
  die(invalid_argument("'{}' talks of slots that it did not give", peer_name_));
}

void StagedLink::end_if_over(uint32_t slot) {
  const Message& one = message(slot);
  if (!one.sent || !one.done) return;
  const uint64_t cookie = one.cookie;
  backend_.count_sent(one.bytes, route_ == Route::kStraight);
  messages_.erase(slot);
  backend_.release_slot(slot);
  backend_.report_done(*this, cookie);
}

}  // namespace baton::transfer::staged
