#pragma once

#include <cstddef>
#include <string_view>

#include "base/status.h"

namespace baton::protocol {

class Frame;

// Bounds on what a frame may hold, whatever the model. Workers check against their model on top of it.
constexpr int kMaxTokens = 1 << 20;           // of a prompt, and of what was generated
constexpr int kMaxBlocks = kMaxTokens;        // of a grant
constexpr int kMaxLogitBias = 4096;
constexpr int kMaxStopTokens = 4096;
constexpr int kMaxLogprobs = 1024;
constexpr int kMaxCandidates = 256;
constexpr int kMaxPairs = 1024;
constexpr int kMaxOutputsPerStep = 1 << 16;
constexpr size_t kMaxAddressBytes = 512;
constexpr size_t kMaxTextBytes = 4096;        // names, messages, fingerprints
constexpr size_t kMaxMetadataBytes = 1 << 20;
constexpr size_t kMaxMetricsBytes = 8 << 20;
constexpr int64_t kMaxTimeoutMs = 7 * 24 * 3600 * 1000LL;

/// What is at the other end of a channel, hence what may come from there.
enum class Sender {
  kStranger,      ///< has not said Hello: may say nothing else
  kRouter,        ///< Generate, Cancel, SetPeers
  kWorker,        ///< seen from a router: StepOutput, Load
  kDecodeSide,    ///< seen from the prefill side: Prefill, CancelPrefill
  kPrefillSide,   ///< seen from the decode side: Progress, Commit, Abort, Load
};

/// Whether the frame may come from `sender` and all its counts, ranges and enumerations are in bounds. Everything that
/// arrives goes through here before it is looked at; a failure is the sender's fault and the channel should be
/// closed. failed_precondition for the wrong kind, invalid_argument for a wrong value, both with the field's name.
Status validate_frame(const Frame& frame, Sender sender);

/// "generate", "step_output", ... for logs.
std::string_view frame_kind_name(const Frame& frame);

}  // namespace baton::protocol
