#pragma once

#include <cstdint>
#include <vector>

#include "engine/request.h"
#include "engine/sampler.h"
#include "kv/block_pool.h"

namespace baton {

/// A request inside the engine.
///
///   submit -> kWaiting -> kRunning -> (finished: gone) | kHeld (prefill_only, until release)
///                ^            |
///                +-preempted--+
///   reserve -> kReserved -> (admit) kRunning | (abandon: gone)
///
/// One that ends while a launched step computes it is kGone until that step has ended: its blocks are written until then.
struct Sequence {
  enum class State : uint8_t { kWaiting, kRunning, kReserved, kHeld, kGone };

  RequestId id{};
  uint64_t arrival = 0;            ///< order of submit() and reserve()
  State state = State::kWaiting;
  bool prefill_only = false;
  bool preempted = false;          ///< waits to be computed again
  bool reported = false;           ///< an output was made, with cached_prompt_tokens
  bool admitted_before = false;    ///< counted in the prefix statistics
  Deadline deadline;
  SamplingParams sampling;
  std::vector<TokenId> tokens;     ///< prompt, then output (generated elsewhere or here)
  int32_t prompt_tokens = 0;
  int32_t computed = 0;            ///< leading tokens whose KV is in the pool
  int32_t launched = 0;            ///< leading tokens whose KV will be there when all launched steps have ended
  int32_t steps = 0;               ///< launched steps that it has rows in
  int32_t awaited = 0;             ///< tokens of output that launched steps choose: they come behind `tokens`
  int32_t awaited_row = -1;        ///< of the newest of them: among its step's rows with logits
  int32_t cached_prompt_tokens = 0;
  int32_t reserved_cached_blocks = 0;  ///< kReserved: leading blocks that were in the prefix cache
  std::vector<BlockId> table;      ///< blocks held, for at least `launched` tokens
  PublishCursor published;
  TokenCounts counts;

  int32_t length() const { return static_cast<int32_t>(tokens.size()); }
  int32_t outputs() const { return length() - prompt_tokens; }
};

}  // namespace baton
