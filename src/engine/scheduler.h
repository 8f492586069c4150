#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace baton {

/// One sequence that holds its blocks and takes part in steps. In order of arrival.
struct RunningView {
  int32_t tokens = 0;             ///< prompt and output so far, with what a step under way adds
  /// Of them, whose KV is in the pool or will be by a step under way. tokens - computed == 1: it decodes; 0: it takes no part,
  /// since it ends with that step.
  int32_t computed = 0;
  int32_t blocks = 0;             ///< in its table
  bool preemptible = true;        ///< false: prefill_only (a peer is being sent its KV)
  /// Blocks that preempting it would give back. Read only when blocks are short.
  int32_t releasable_blocks = 0;
};

/// One sequence that waits for blocks; the head of the queue comes first.
struct WaitingView {
  int32_t tokens = 0;
  int32_t cached_tokens = 0;      ///< whole blocks found in the prefix cache
  int32_t cached_idle_blocks = 0; ///< of them, blocks that count as available until taken
};

struct SchedulerLimits {
  int32_t block_tokens = 16;
  int32_t max_batched_tokens = 512;
  int32_t max_sequences = 256;    ///< running and reserved
};

struct SchedulerInput {
  std::span<const RunningView> running;
  /// The head of the queue; as much of it as could start now. Whether more waits does not matter.
  std::span<const WaitingView> waiting;
  int64_t available_blocks = 0;   ///< free and cached
  int64_t total_blocks = 0;
  int32_t reserved = 0;           ///< sequences whose KV is being written by a peer: they will run
  SchedulerLimits limits;
};

/// What one step does. Indices are into SchedulerInput's spans.
struct Plan {
  struct Slice {
    int32_t index = 0;
    int32_t rows = 0;             ///< tokens to compute, from `computed` (or the cached prefix) on
  };
  std::vector<Slice> running;     ///< decodes first, then prefill chunks
  std::vector<Slice> admitted;    ///< waiting ones that start, in order
  std::vector<int32_t> grown;     ///< running ones that need one more block
  std::vector<int32_t> preempted; ///< running ones that give up their blocks, latest arrival first
  /// The head of the queue has no blocks or no place: it stays until something is released.
  bool blocked = false;

  void clear();
};

/// The largest number of sequences that may run, so that decodes never take a step's whole budget from a prefill.
int32_t max_sequences(int32_t max_running, int32_t max_batched_tokens, int32_t block_tokens);

/// Blocks that stay free for the growth of running and reserved sequences when something new is let in.
int64_t growth_headroom(int64_t sequences, int64_t total_blocks);

/// Decides one step. A pure function: no clock, no model, no memory of earlier calls.
///  1. Decodes, in order of arrival; who needs a block that is not there takes those of the latest
///     arrival that may be preempted, at last its own.
///  2. Prefill chunks of running sequences in order of arrival, as far as the token budget goes. A chunk ends
///     on a block boundary or at the prompt's end, because the handoff sends whole blocks.
///  3. Waiting sequences, first come first served, when blocks for all their tokens are there; nobody overtakes
///     the head of the queue. None in a step that preempts.
/// `plan` is overwritten; its vectors keep their memory.
void schedule(const SchedulerInput& input, Plan* plan);

}  // namespace baton
