#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/status.h"
#include "engine/request.h"
#include "kv/block_layout.h"
#include "kv/block_pool.h"
#include "model/model.h"

namespace baton {

struct EngineConfig {
  int32_t block_tokens = 16;
  /// KV pool size; either in blocks or bytes (blocks win when both are set). Both 0: what max_running
  /// sequences of full length need, at most what the model has to spare (a GPU's memory), or 1 GiB. The memory of a
  /// host is touched only as blocks are used.
  int64_t kv_blocks = 0;
  int64_t kv_bytes = 0;
  /// Tokens computed per step over all sequences; longer prompts are cut into chunks. At least block_tokens. 0: what suits
  /// the model's device.
  int32_t max_batched_tokens = 512;
  /// Running and reserved sequences; at most max_batched_tokens - block_tokens of them are let in, so that
  /// decodes leave every step room for a block of prefill.
  int32_t max_running = 256;
  int32_t max_waiting = 4096;
  /// Prompt and output of one sequence. 0: the model's, or what the KV pool holds if that is less. A length that
  /// is set and does not fit the pool is an error.
  int32_t max_model_len = 0;
  bool prefix_cache = true;

  Status validate() const;
};

struct EngineStats {
  int64_t waiting = 0, running = 0, reserved = 0, held = 0;  ///< held: prefill done, KV not yet released
  int64_t waiting_tokens = 0;                                ///< prompt tokens not yet computed, all requests
  BlockCounts blocks;
  int64_t prefix_query_tokens = 0, prefix_hit_tokens = 0;
  int64_t steps = 0;
  int64_t steps_ahead = 0;  ///< of them, launched before the step before had ended
  int64_t prefill_tokens = 0, decode_tokens = 0, preemptions = 0;
};

/// KV of a prefill_only request that is now complete in the pool, or will be when `ready` is reached
/// (ForwardBatch::layer_done): layer `layer` of the blocks
/// table[first_block .. last_block) (indices into the block table).
struct LayerReady {
  RequestId request{};
  int32_t layer = 0;
  int32_t first_block = 0;
  int32_t last_block = 0;
  std::span<const BlockId> table;
  std::shared_ptr<void> ready = {};
};

/// Token ids in, token ids out: continuous batching over one model on one device. No text, no sockets.
/// Every function is called by the one thread that owns the engine; step() runs one iteration. The destructor waits for what is
/// under way on the device.
///
/// A request that fits max_model_len always fits the pool once others are gone, so it ends: when a decode needs a
/// block, the latest arrival gives up its blocks and is computed again later, its output going on where it
/// was (never prefill_only requests, whose KV is being sent). Outputs do not depend on any of that.
class Engine {
 public:
  /// `model` and `clock` must outlive the engine.
  static Result<std::unique_ptr<Engine>> create(EngineConfig config, Model& model,
                                                const Clock& clock = SteadyClock::instance());
  virtual ~Engine() = default;

  /// Queues a request. Errors: invalid_argument (length, token ids, sampling), resource_exhausted (queue full).
  virtual Status submit(Request request) = 0;
  /// Ends a request wherever it is; unknown ids are ignored. No output follows. Its blocks are free at once, or when the step that is
  /// computing it has ended: has_work() is true until then.
  /// Except for a reservation, into whose blocks a peer may still write: that is abandon(id, true).
  virtual void cancel(RequestId id) = 0;
  /// True when step() would do something: false also while requests wait for blocks that only release(), abandon()
  /// or end_quarantine() can give.
  virtual bool has_work() const = 0;
  /// The earliest deadline of a waiting or running request: when it passes, has_work() is true.
  virtual Deadline next_deadline() const = 0;
  /// Schedules, computes and samples once. Where the model runs ahead it returns with the next step under way, and what is done until
  /// the next call costs the device nothing; when nothing was under way it launches a step and returns without tokens. Never fails as
  /// a whole: failures are outputs of their requests, and only a lost device (StepOutput::device) ends the engine's life. First
  /// tokens of admit() are returned alone, at once: they don't wait for a computation.
  virtual StepOutput step() = 0;
  /// How long step() may be left alone although has_work(): the device is busy, and what is submitted meanwhile joins the next step,
  /// as it would if that were planned when the one under way ends. 0: call it now.
  virtual int64_t spare_ns() const = 0;

  // -- Handoff, receiving side: the KV of the prompt comes from a peer. ------------------------------------
  struct Reservation {
    int32_t cached_tokens = 0;            ///< already here, whole blocks; must not be written again
    std::vector<BlockId> blocks;          ///< for the whole prompt (+ generated), cached ones first
  };
  /// Blocks for all tokens of the request's prompt and generated. resource_exhausted: try again later (blocks or
  /// places are taken, or kept for a waiting request that came before). failed_precondition: `id` still has
  /// blocks in quarantine from an earlier attempt; use another id for the next one.
  virtual Result<Reservation> reserve(const Request& request) = 0;
  /// The KV of every prompt token is in the reserved blocks; `first` is the token the peer sampled. It is
  /// reported by the next step() (with its finish reason, if it is the last), then decoding goes on.
  /// Errors: not_found (no such reservation), invalid_argument (no token, or out of range).
  virtual Status admit(RequestId id, TokenOutput first) = 0;
  /// Gives a reservation up. With `quarantine` the blocks that are not cached stay untouched until
  /// end_quarantine(id).
  virtual void abandon(RequestId id, bool quarantine) = 0;
  virtual void end_quarantine(RequestId id) = 0;

  // -- Handoff, sending side. --------------------------------------------------------------------------------
  /// Called inside step() on the engine thread for prefill_only requests: once per layer and chunk, and once
  /// per layer for a cached prefix, before anything is computed. Must not call the engine.
  virtual void set_layer_ready(std::function<void(const LayerReady&)> callback) = 0;
  /// Frees the KV of a prefill_only request that is done.
  virtual void release(RequestId id) = 0;

  virtual EngineStats stats() const = 0;
  virtual const BlockLayout& layout() const = 0;
  /// The memory of all blocks; block b starts at b * layout().block_bytes().
  virtual std::span<std::byte> kv_pool() const = 0;
  /// Where that memory is.
  virtual MemoryPlace kv_place() const = 0;
  virtual const EngineConfig& config() const = 0;
  virtual const Model& model() const = 0;
};

}  // namespace baton
