#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "engine/request.h"
#include "tests/sim/cluster.h"

namespace baton::sim {

/// What a request must give: computed by an engine of its own, alone, without handoffs.
class Oracle {
 public:
  explicit Oracle(const ClusterOptions& options);
  struct Answer {
    std::vector<TokenId> tokens;
    FinishReason finish = FinishReason::kNone;
  };
  Answer answer(const std::vector<TokenId>& prompt, const SamplingParams& sampling);

 private:
  testing::FakeModel model_;
  std::unique_ptr<Engine> engine_;
  uint64_t next_id_ = 1;
};

/// A router reduced to what the workers can notice: it sends requests, replays them on another worker when a channel
/// dies, and records what comes back. Every broken rule is a message in errors().
class SimClient {
 public:
  SimClient(Cluster& cluster, Oracle& oracle, std::string name, std::vector<std::string> decode_workers,
            std::vector<std::string> prefill_workers);

  struct Call {
    std::vector<TokenId> prompt;
    SamplingParams sampling;
    int64_t timeout_ms = 0;
    std::vector<TokenId> generated;
    std::string worker;        // where it runs now; empty: nowhere
    bool cancelled = false;
    bool ended = false;
    FinishReason finish = FinishReason::kNone;
    StatusCode code = StatusCode::kOk;
    std::vector<std::string> paths;
    int replays = 0;
  };

  uint64_t generate(std::vector<TokenId> prompt, SamplingParams sampling, int64_t timeout_ms = 0);
  void cancel(uint64_t id);
  /// Reconnects and replays; once per turn of the cluster.
  void turn();

  bool all_ended() const;
  /// Compares everything that ended with the oracle.
  void check_answers();
  const std::map<uint64_t, Call>& calls() const { return calls_; }
  const std::vector<std::string>& errors() const { return errors_; }
  const protocol::Load* load(const std::string& worker) const;
  int64_t count_paths(const std::string& prefix) const;

 private:
  struct Worker {
    std::string name;
    std::shared_ptr<protocol::Channel> channel;
    bool up = false;
    uint64_t epoch = 0;
    int64_t next_attempt_ns = 0;
    protocol::Load load;
  };

  void connect(Worker& worker);
  void on_frame(Worker& worker, const protocol::Frame& frame);
  void on_closed(Worker& worker);
  void on_output(Worker& worker, const protocol::TokenOutput& output);
  void send(uint64_t id, Call& call);

  Cluster& cluster_;
  Oracle& oracle_;
  const std::string name_;
  const uint64_t epoch_;
  std::map<std::string, Worker> workers_;
  std::vector<std::string> prefill_;
  std::map<uint64_t, Call> calls_;
  std::map<uint64_t, uint64_t> wire_ids_;  // request id on the wire → call; a replay has a new one
  uint64_t next_id_ = 1;
  std::vector<std::string> errors_;
};

}  // namespace baton::sim
