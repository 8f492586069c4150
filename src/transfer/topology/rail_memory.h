#pragma once

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include "base/status.h"
#include "transfer/topology/rails.h"

/// What opening rails will cost, computed before it is spent.
namespace baton::transfer {

/// What the backend will do on every rail.
struct RailWindows {
  uint32_t endpoints_per_rail = 1;
  /// Bounce buffers and the like of our own, per rail; counted as pinned.
  uint64_t staging_bytes = 0;
  /// Host memory that will be registered (KV pools). It is there already, so it is no extra memory; but the
  /// kernel counts it against RLIMIT_MEMLOCK once *per rail*. Leave out GPU memory.
  uint64_t registered_host_bytes = 0;
};

/// One endpoint of a provider, measured or read off its source (docs/transfer.md has the table).
struct EndpointCost {
  uint64_t bytes = 0;   ///< resident memory
  uint64_t pinned = 0;  ///< of it, locked
};
/// `provider` as libfabric names it ("efa", "verbs;ofi_rxm", "tcp", "net", "shm"). Upper ends where a range
/// was measured; a provider that we never measured gets the cost of rxm.
EndpointCost endpoint_cost(std::string_view provider);

struct RailMemory {
  uint32_t rails = 0;
  uint32_t candidates = 0;
  uint64_t bytes = 0;         ///< for all chosen rails
  uint64_t pinned_bytes = 0;  ///< of it, pinned
  uint64_t locked_bytes = 0;  ///< what counts against RLIMIT_MEMLOCK: pinned, and registrations per rail
  uint64_t all_bytes = 0;     ///< if every candidate were opened
  std::string place;

  /// "opens 4 of 32 NICs (near GPU 0 at 0000:53:00.0): predicted 572 MiB, 436 MiB of it pinned; all 32 would
  /// take 4.5 GiB"
  std::string describe() const;
};

/// A pure function. Saturates instead of overflowing.
RailMemory predict_rail_memory(std::string_view provider, const RailChoice& choice, const RailWindows& windows = {});

/// What this process may use. Nothing: no limit, or it cannot be read.
struct MemoryLimits {
  std::optional<uint64_t> memlock_bytes;      ///< RLIMIT_MEMLOCK; nothing with CAP_IPC_LOCK, too
  std::optional<uint64_t> memlock_used_bytes; ///< VmPin: the kernel checks registrations against this alone
  std::optional<uint64_t> cgroup_bytes;       ///< the tightest memory.max (v2) or limit_in_bytes (v1) above us
  std::optional<uint64_t> cgroup_used_bytes;  ///< of that same group

  static MemoryLimits read(const std::string& root = "/");
};

struct MemoryVerdict {
  Status status;        ///< resource_exhausted: it will not fit; the message says what to change
  std::string warning;  ///< not empty: it fits, but takes more than half of what is left
};
MemoryVerdict check_rail_memory(const RailMemory& memory, const MemoryLimits& limits);

}  // namespace baton::transfer
