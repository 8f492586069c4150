#include "router/policy.h"

#include <algorithm>

namespace baton {

std::optional<PolicyKind> parse_policy(std::string_view name) {
  if (name == "round-robin") return PolicyKind::kRoundRobin;
  if (name == "least-loaded") return PolicyKind::kLeastLoaded;
  return std::nullopt;
}

std::string_view policy_name(PolicyKind kind) {
  return kind == PolicyKind::kRoundRobin ? "round-robin" : "least-loaded";
}

namespace {

// A decode worker's step time grows with its sequences; its memory with their tokens. Both count, tokens
// scaled so that a full block pool weighs about as much as 100 sequences.
double decode_load(const WorkerEntry& worker, int64_t prompt_tokens) {
  double sequences = static_cast<double>(worker.outstanding_requests);
  double capacity_tokens =
      std::max<double>(1.0, static_cast<double>(worker.load.blocks_total()) * worker.hello.block_tokens());
  double tokens = static_cast<double>(worker.outstanding_tokens + prompt_tokens);
  return sequences + 100.0 * tokens / capacity_tokens;
}

// A prefill worker's waiting time is the tokens in front of a new request: those we sent since its last
// report and those it reported.
double prefill_load(const WorkerEntry& worker) {
  return static_cast<double>(
      std::max<int64_t>(worker.load.queued_tokens(), worker.outstanding_prefill_tokens));
}

}  // namespace

WorkerEntry* Policy::pick_decode(const std::vector<WorkerEntry*>& candidates, int64_t prompt_tokens) {
  if (candidates.empty()) return nullptr;
  size_t turn = decode_turn_++ % candidates.size();
  if (kind_ == PolicyKind::kRoundRobin) return candidates[turn];
  WorkerEntry* best = nullptr;
  double best_load = 0;
  for (size_t i = 0; i < candidates.size(); ++i) {
    WorkerEntry* worker = candidates[(turn + i) % candidates.size()];
    double load = decode_load(*worker, prompt_tokens);
    if (best == nullptr || load < best_load) {
      best = worker;
      best_load = load;
    }
  }
  return best;
}

std::vector<WorkerEntry*> Policy::rank_prefill(const std::vector<WorkerEntry*>& candidates,
                                               size_t limit) {
  if (candidates.empty()) return {};
  std::vector<WorkerEntry*> ranked;
  size_t turn = prefill_turn_++ % candidates.size();
  for (size_t i = 0; i < candidates.size(); ++i) {
    ranked.push_back(candidates[(turn + i) % candidates.size()]);
  }
  if (kind_ == PolicyKind::kLeastLoaded) {
    std::stable_sort(ranked.begin(), ranked.end(), [](const WorkerEntry* a, const WorkerEntry* b) {
      return prefill_load(*a) < prefill_load(*b);
    });
  }
  if (ranked.size() > limit) ranked.resize(limit);
  return ranked;
}

}  // namespace baton
