#pragma once

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "transfer/control.h"

/// The active messages between two agents: what they are called and what they look like (little-endian).
namespace baton::transfer::ucx {

/// Pairs of tag and count: the puts that are in the peer's memory.
inline constexpr unsigned kNoticeMessage = 1;
inline constexpr size_t kNoticePairBytes = 8;
inline constexpr size_t kMaxNoticeBytes = 128 * kNoticePairBytes;  // fits one packet of every transport

/// Nothing but "I am here". It waits in UCX until both sides are connected.
inline constexpr unsigned kHelloMessage = 3;
/// The id under which the owner confirms it.
inline constexpr uint32_t kHelloId = UINT32_MAX;

/// A WriteHeader and the bytes that it names.
inline constexpr unsigned kWriteMessage = 2;
/// What a message may carry: with UCX's headers it fits one fragment of kFragmentBytes, which it hands to us as it
/// came from the socket; longer ones it puts together in memory of its own first.
inline constexpr uint64_t kMaxWriteBytes = 256u << 10;
inline constexpr uint64_t kFragmentBytes = kMaxWriteBytes + 4096;

struct WriteHeader {
  uint32_t pool = 0;
  uint32_t tag = 0;
  uint32_t id = 0;  ///< the writer's, which gets it back when the bytes are placed
  uint64_t offset = 0;
  uint64_t bytes = 0;
  bool operator==(const WriteHeader&) const = default;
};

std::string encode_write(const WriteHeader& header);
std::optional<WriteHeader> parse_write(std::string_view bytes);

std::string encode_notice(std::span<const Arrival> arrivals);
/// False when it is damaged; nothing is added then.
bool parse_notice(std::string_view bytes, std::vector<Arrival>& arrivals);

}  // namespace baton::transfer::ucx
