#include "engine/scheduler.h"

#include <algorithm>

#include "base/check.h"

namespace baton {
namespace {

/// Rows of the next prefill chunk from `start`, which is on a block boundary: as many as fit, up to a block
/// boundary or the end.
int32_t chunk_rows(int32_t start, int32_t tokens, int32_t budget, int32_t block_tokens) {
  const int32_t left = tokens - start;
  if (left <= budget) return left;
  return budget / block_tokens * block_tokens;
}

}  // namespace

void Plan::clear() {
  running.clear();
  admitted.clear();
  grown.clear();
  preempted.clear();
  blocked = false;
}

int32_t max_sequences(int32_t max_running, int32_t max_batched_tokens, int32_t block_tokens) {
  return std::max(1, std::min(max_running, max_batched_tokens - block_tokens));
}

int64_t growth_headroom(int64_t sequences, int64_t total_blocks) {
  return std::min(sequences, total_blocks / 16);
}

void schedule(const SchedulerInput& input, Plan* plan) {
  plan->clear();
  const int32_t block_tokens = input.limits.block_tokens;
  int64_t available = input.available_blocks;
  int32_t budget = input.limits.max_batched_tokens;

  // `last` is the end of those not preempted, except for unpreemptible ones behind it: victims are taken from the
  // latest arrival on, and decodes are planned from the earliest on, so nobody planned is ever preempted.
  int32_t last = static_cast<int32_t>(input.running.size());
  const auto decodes = [&](const RunningView& view) { return view.tokens - view.computed == 1; };

  for (int32_t i = 0; i < static_cast<int32_t>(input.running.size()) && budget > 0; ++i) {
    const RunningView& view = input.running[static_cast<size_t>(i)];
    if (!decodes(view)) continue;
    if (view.preemptible && i >= last) continue;  // preempted for an earlier one
    const bool needs_block = int64_t{view.computed} + 1 > int64_t{view.blocks} * block_tokens;
    if (needs_block) {
      while (available < 1 && last > i) {
        const RunningView& victim = input.running[static_cast<size_t>(--last)];
        if (!victim.preemptible) continue;
        available += victim.releasable_blocks;
        plan->preempted.push_back(last);
      }
      if (i >= last) continue;  // it was its own last victim
      --available;
      plan->grown.push_back(i);
    }
    plan->running.push_back({.index = i, .rows = 1});
    --budget;
  }

  for (int32_t i = 0; i < static_cast<int32_t>(input.running.size()) && budget > 0; ++i) {
    const RunningView& view = input.running[static_cast<size_t>(i)];
    if (decodes(view) || view.tokens == view.computed || (view.preemptible && i >= last)) continue;
    const int32_t rows = chunk_rows(view.computed, view.tokens, budget, block_tokens);
    if (rows == 0) break;  // the budget ends inside a block: nobody behind overtakes
    plan->running.push_back({.index = i, .rows = rows});
    budget -= rows;
  }

  if (!plan->preempted.empty()) {
    plan->blocked = true;
    return;
  }
  int64_t sequences = static_cast<int64_t>(input.running.size()) + input.reserved;
  for (int32_t i = 0; i < static_cast<int32_t>(input.waiting.size()); ++i) {
    const WaitingView& view = input.waiting[static_cast<size_t>(i)];
    const int64_t needed = (int64_t{view.tokens} + block_tokens - 1) / block_tokens -
                           view.cached_tokens / block_tokens + view.cached_idle_blocks;
    if (sequences >= input.limits.max_sequences ||
        needed + growth_headroom(sequences, input.total_blocks) > available) {
      plan->blocked = true;
      return;
    }
    const int32_t rows = chunk_rows(view.cached_tokens, view.tokens, budget, block_tokens);
    if (rows == 0) return;  // only the step's tokens are used up; the next step takes it
    plan->admitted.push_back({.index = i, .rows = rows});
    available -= needed;
    budget -= rows;
    ++sequences;
  }
}

}  // namespace baton
