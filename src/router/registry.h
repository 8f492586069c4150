#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <unordered_set>
#include <vector>

#include "protocol/baton.pb.h"
#include "protocol/channel.h"

namespace baton {

enum class WorkerState {
  kConnecting,  ///< channel opened, no Hello yet
  kReady,       ///< Hello accepted
  kRefused,     ///< Hello not acceptable (model, protocol version); tried again slowly
  kDown,        ///< channel closed; waiting to connect again
};
std::string_view worker_state_name(WorkerState state);

/// What the router knows of one worker address. A restarted process is the same entry with a new epoch.
struct WorkerEntry {
  std::string address;
  WorkerState state = WorkerState::kDown;
  std::string why_not = "not connected yet";
  std::shared_ptr<protocol::Channel> channel;
  protocol::Hello hello;          ///< of the current or last life
  protocol::Load load;            ///< the last report of the current life
  std::string metrics;            ///< its last protocol::encode_metrics()
  std::unordered_set<uint64_t> requests;   ///< being decoded there
  int64_t outstanding_requests = 0;
  int64_t outstanding_tokens = 0;          ///< prompt + generated tokens of those requests
  int64_t outstanding_prefill_tokens = 0;  ///< of requests whose first candidate this is and that wait for a token
  int64_t last_heard_ns = 0;
  int64_t reconnect_at_ns = 0;
  int64_t backoff_ms = 0;
  bool was_down_logged = false;

  bool can_decode() const {
    return state == WorkerState::kReady && !load.draining() &&
           (hello.role() == protocol::ROLE_DECODE || hello.role() == protocol::ROLE_BOTH);
  }
  bool can_prefill() const {
    return state == WorkerState::kReady && !load.draining() &&
           (hello.role() == protocol::ROLE_PREFILL || hello.role() == protocol::ROLE_BOTH);
  }
};

/// All workers by address, and who is behind a channel. Owned by the router's thread.
class WorkerRegistry {
 public:
  explicit WorkerRegistry(const std::vector<std::string>& addresses);

  std::vector<std::unique_ptr<WorkerEntry>>& entries() { return entries_; }
  const std::vector<std::unique_ptr<WorkerEntry>>& entries() const { return entries_; }
  /// The entry whose current channel this is, or null (an old channel's late event).
  WorkerEntry* by_channel(const protocol::Channel* channel) const;
  WorkerEntry* by_address(const std::string& address) const;

  /// Workers that can take a request to decode. When no decode worker lives, prefill workers stand in:
  /// every worker can do both.
  std::vector<WorkerEntry*> decode_candidates() const;
  /// Workers that can prefill for `decode`; never `decode` itself, nor pairs it reported as not ready.
  std::vector<WorkerEntry*> prefill_candidates(const WorkerEntry& decode) const;

 private:
  std::vector<std::unique_ptr<WorkerEntry>> entries_;
};

}  // namespace baton
