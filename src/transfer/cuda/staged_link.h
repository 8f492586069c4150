#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "transfer/backend.h"
#include "transfer/control.h"
#include "transfer/cuda/staged_memory.h"
#include "transfer/cuda/staged_wire.h"

namespace baton::transfer::staged {

class StagedBackend;

/// The sending half of a pair. A message takes a slot of this side, and is done when the receiver has said so. In between
///   by way of own slots   it is gathered into this slot while the receiver is asked for one of its own, and travels there as
///                         one message of the host transport;
///   straight              (the receiver's slots are mapped here) it waits for a slot of the receiver, is gathered into that
///                         one, and only its descriptor travels.
class StagedLink final : public Link {
 public:
  /// `inner` is the host transport's link to the same agent, with limits of its own.
  StagedLink(StagedBackend& backend, ControlPlane::Id id, std::string peer_name, std::unique_ptr<Link> inner,
             const BackendLimits& inner_limits);
  ~StagedLink() override;

  Result<PostResult> post(const BackendMessage& message) override;
  void flush() override;
  bool ready() const override { return welcome_ && !dead_ && inner_->ready(); }
  /// What lies in a slot of the receiver may be taken out after this side has gone.
  bool late_writes_possible() const override { return true; }
  bool closable() const override { return gathering_.empty() && inner_->closable(); }

  void on_welcome(const Welcome& welcome);
  void on_note(const Arrival& arrival);
  /// The host transport has delivered the message in this slot of ours.
  void on_sent(uint32_t slot, const Status& status);
  void die(const Status& why);
  /// Moves messages along. Returns how much happened.
  size_t advance();
  bool gathers() const { return !gathering_.empty(); }
  /// True when there is something to post that the host transport would not take.
  bool held_back() const { return held_back_; }

  CheckChannel::Connection connection() const override { return id_; }
  ControlPlane::Id id() const { return id_; }
  const std::string& peer_name() const { return peer_name_; }

 private:
  enum class Route : uint8_t { kNotChosen, kOwnSlots, kStraight };
  struct Message {
    uint64_t cookie = 0;
    const std::byte* source = nullptr;
    uint64_t bytes = 0;  // of the data
    uint32_t tag = 0, pool = 0;
    StagedDevice* device = nullptr;
    uint32_t copy = 0;
    std::vector<Segment> segments;
    Note grant;
    uint64_t sent_bytes = 0;  // over the host transport
    bool sent = false, done = false;
  };
  Message& message(uint32_t slot) { return messages_[slot]; }
  Status choose_route(const StagedDevice* device);
  /// False: not now.
  Result<bool> gather(uint32_t slot);
  size_t collect_gathered();
  size_t gather_into_grants();
  size_t send_gathered();
  Result<PostResult> send(uint32_t slot, const Note& grant);
  void end_if_over(uint32_t slot);

  StagedBackend& backend_;
  const ControlPlane::Id id_;
  const std::string peer_name_;
  const BackendLimits inner_limits_;
  std::unique_ptr<Link> inner_;
  Route route_ = Route::kNotChosen;
  std::span<std::byte> peer_slots_;  // the receiver's, mapped by inner_
  cuda::PinnedRange pinned_slots_;
  bool may_write_slots_ = false;
  bool welcome_ = false;
  bool dead_ = false;
  bool held_back_ = false;
  std::unordered_map<uint32_t, uint64_t> pools_;  // bytes
  std::unordered_map<uint32_t, Message> messages_;  // by our slot
  std::deque<uint32_t> waiting_;  // straight: for a grant
  std::vector<uint32_t> gathering_;
  std::deque<uint32_t> gathered_;
  std::deque<Note> grants_;  // not used yet
  uint32_t wants_ = 0;       // not asked for yet
  uint32_t asked_ = 0;       // asked for and not granted
  uint32_t inner_count_ = 0;
  uint64_t inner_bytes_ = 0;
};

}  // namespace baton::transfer::staged
