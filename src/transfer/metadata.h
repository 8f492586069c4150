#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "transfer/include/baton/transfer.h"

namespace baton::transfer {

/// What an agent tells others of itself. Small: keys and endpoint addresses are exchanged when a pair
/// really connects (see control.h), so that nothing has to be opened for a path that is never used.
struct Metadata {
  struct Pool {
    uint32_t id = 0;
    MemoryKind kind = MemoryKind::kHost;
    uint64_t stride_bytes = 0;
    uint64_t count = 0;
    bool operator==(const Pool&) const = default;
  };
  /// One way to reach the agent.
  struct Offer {
    std::string transport;  ///< "shm", "tcp", ...
    std::string provider;   ///< for logs
    std::string address;    ///< the backend's own; opaque here
    bool operator==(const Offer&) const = default;
  };

  std::string name;
  Epoch epoch = Epoch::kNone;
  /// Rises with every fence() of the agent: a peer that was fenced needs metadata made after that.
  uint64_t serial = 0;
  /// Which running kernel this is (its boot id): equal means same host.
  std::string host_id;
  std::vector<Pool> pools;
  std::vector<Offer> offers;
  bool operator==(const Metadata&) const = default;
};

inline constexpr uint16_t kMetadataVersion = 1;
inline constexpr size_t kMaxNameBytes = 255;
inline constexpr size_t kMaxOffers = 16;
inline constexpr size_t kMaxOfferAddressBytes = 4096;
inline constexpr size_t kMaxPools = 4096;

std::string encode_metadata(const Metadata& metadata);
/// Input from outside: bounds, version and checksum are checked; the message says what is wrong.
Result<Metadata> parse_metadata(std::string_view bytes, size_t max_bytes);

}  // namespace baton::transfer
