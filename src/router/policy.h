#pragma once

#include <cstdint>
#include <optional>
#include <string_view>
#include <vector>

#include "router/registry.h"

namespace baton {

enum class PolicyKind { kRoundRobin, kLeastLoaded };
std::optional<PolicyKind> parse_policy(std::string_view name);
std::string_view policy_name(PolicyKind kind);

/// Chooses workers for a request. Deterministic: round-robin by turn, least-loaded by what the router has
/// outstanding at a worker and what the worker last reported, ties by turn.
class Policy {
 public:
  explicit Policy(PolicyKind kind) : kind_(kind) {}

  /// The best of `candidates`, or null when there is none. `prompt_tokens` weigh as work.
  WorkerEntry* pick_decode(const std::vector<WorkerEntry*>& candidates, int64_t prompt_tokens);
  /// At most `limit` candidates, best first.
  std::vector<WorkerEntry*> rank_prefill(const std::vector<WorkerEntry*>& candidates, size_t limit);

 private:
  PolicyKind kind_;
  uint64_t decode_turn_ = 0;
  uint64_t prefill_turn_ = 0;
};

}  // namespace baton
