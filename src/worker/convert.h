#pragma once

#include "engine/request.h"
#include "protocol/baton.pb.h"

/// Between the engine's types and the ones on the wire, field by field. Frames have passed validate_frame().
namespace baton::worker {

void to_proto(const SamplingParams& from, protocol::Sampling* to);
SamplingParams from_proto(const protocol::Sampling& from);

void to_proto(const TokenOutput& from, uint64_t request, protocol::TokenOutput* to);
TokenOutput from_proto(const protocol::TokenOutput& from);

void to_proto(const Status& from, protocol::StatusMessage* to);
Status from_proto(const protocol::StatusMessage& from);

}  // namespace baton::worker
