#pragma once

#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "transfer/backend.h"
#include "transfer/control.h"
#include "transfer/fabric/rail.h"
#include "transfer/fabric/rail_schedule.h"

namespace baton::transfer::fabric {

class FabricBackend;

/// The outgoing half of a pair: one endpoint per rail, and what is under way on each.
///
/// **Greeting.** libfabric 1.17's tcp keeps a half-open connection (accepted, its request not read yet) without holding on to the
/// endpoint that it came in at; when the endpoint is closed at that moment the process crashes on the request. So the
/// first thing on a new endpoint is one small write that only says which endpoint it came in at, and no message follows before it has
/// been delivered. An endpoint that was not greeted has no data under way, so its owner can shut the writer out without closing it,
/// and closes it when the greeting comes (FabricBackend::close_inbound_rail).
///
/// **When one of several rails fails** (an error, or silence while another one works), what was under way on it has arrived
/// or not, and the receiver counts messages: one that is sent again although it had arrived would be counted twice, and the
/// transfer would seem complete while another message is still missing. So:
///
///   writer                                         owner of the memory
///   closes its endpoint of the rail
///   Rail{down}                              --->   closes its own, empties its queue: nothing comes after this
///                                           <---   Rail{count}: so many counted messages came in over it
///   the first `count` that it posted are
///   done; it posts the others on other rails
///   some time later: Rail{open}             --->   opens a new endpoint
///                                           <---   Rail{ready, address}: one message at a time until one has arrived
///
/// This needs a rail that delivers in the order of posting, and an endpoint per peer: tcp. EFA and verbs have neither; there a
/// rail's error ends the pair.
/// **Confirming later.** A write that asks for its delivery makes the owner send a word back before it looks at anything else: on one
/// host that is a fifth of the time of a small message there and back. Where the end can wait (BackendMessage::end_can_wait) it is not
/// asked for, and one small write behind a few such messages does it for all: an endpoint of tcp delivers in order.
class FabricLink final : public Link {
 public:
  FabricLink(FabricBackend& backend, ControlPlane::Id id, std::string peer_name);
  ~FabricLink() override;

  Result<PostResult> post(const BackendMessage& message) override;
  bool ready() const override { return greeted_ && !dead_; }
  bool late_writes_possible() const override { return true; }
  bool closable() const override;
  CheckChannel::Connection connection() const override { return id_; }

  /// The owner has let us in: opens the endpoints.
  Status open(const Welcome& welcome);
  void on_note(const RailNote& note);
  /// False: the operation is still wanted.
  bool on_completed(Operation& operation, const Status& status);
  /// Asks for the end of messages whose end could wait, when the first of them has waited for `age_ns`. False: there are none left.
  bool confirm(int64_t age_ns);
  /// Posts the greetings that are still to be posted; false when there are none left.
  bool greet();
  /// What time brings: rails that stand still, rails to try again, messages to post again. Returns how much happened.
  size_t tick(int64_t now_ns);
  /// False: tick() need not be called for a while.
  bool wants_tick() const;
  void die() { dead_ = true; }

  const std::string& peer_name() const { return peer_name_; }
  ControlPlane::Id id() const { return id_; }
  /// "10.0.0.1 118 MB/s, 10.0.1.1 down"
  std::string describe() const;

 private:
  enum class Phase : uint8_t { kUp, kAsking, kDown, kReopening };
  struct RemotePool {
    uint64_t base = 0;
    uint64_t key = 0;
  };
  struct Path {
    std::shared_ptr<AddressVector> addresses;  // that `address` is in
    Endpoint own_endpoint;
    fid_ep* endpoint = nullptr;
    fi_addr_t address = FI_ADDR_UNSPEC;
    std::unordered_map<uint32_t, RemotePool> pools;
    Phase phase = Phase::kUp;
    uint32_t generation = 0;
    RemotePool greeting_target;
    uint32_t greeting_tag = 0;
    bool greeting_posted = false;
    bool greeted = false;
    int64_t opened_ns = 0;
    uint64_t next_sequence = 0;            // of counted messages
    std::deque<Operation*> outstanding;    // in the order of posting
    std::vector<HeldMessage> held;         // until the owner has said how many arrived
    int64_t retry_at_ns = 0;
    int64_t backoff_ns = 0;
  };

  bool can_fail_over() const;
  Rail& rail(uint32_t index) const;
  Status open_path(uint32_t index, const std::string& address);
  static void close_path(Path& path);
  Result<PostResult> post_on(uint32_t index, const HeldMessage& message);
  /// On the rail that is best now. kFull: none has room.
  Result<PostResult> post_somewhere(const HeldMessage& message);
  Status post_greeting(uint32_t index);
  /// Eight bytes into the owner's greeting memory: with a number for it to count, or to know that all before them is there.
  Status post_small_write(uint32_t index, bool greeting, bool* posted);
  void on_confirmed(const Operation& operation);
  void on_greeted(Operation& operation, const Status& status);
  void fail_rail(uint32_t index, const Status& why, const Operation* completed);
  void release_outstanding(Path& path, const Operation* completed);

  FabricBackend& backend_;
  const ControlPlane::Id id_;
  const std::string peer_name_;
  bool dead_ = false;
  bool greeted_ = false;  // on one rail at least
  std::vector<Path> paths_;          // by rail
  std::vector<RailState> states_;    // the same, as the schedule sees them
  std::deque<HeldMessage> again_;    // to be posted again
  size_t outstanding_ = 0;
  size_t unconfirmed_ = 0;          // of them, those that were posted without asking for their delivery
  int64_t unconfirmed_since_ns_ = 0;
  bool confirming_ = false;
};

}  // namespace baton::transfer::fabric
