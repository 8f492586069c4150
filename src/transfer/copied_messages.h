#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "transfer/backend.h"
#include "transfer/control.h"
#include "transfer/shm/doorbell.h"

namespace baton::transfer {

/// What a link has copied into its peer's memory by itself (shm, cuda_ipc). The owner of the memory counts, so it is told through its
/// doorbell or over the control connection, and only then is a message done.
class CopiedMessages {
 public:
  void add(uint64_t cookie, Tag tag) { untold_.push_back({cookie, tag}); }
  bool empty() const { return untold_.empty() && told_.empty(); }
  bool untold() const { return !untold_.empty(); }
  bool told() const { return !told_.empty(); }

  /// Neighbours of one tag go as one count, into `doorbell` (may be null) while it has room. When the peer does not read its socket
  /// either (it is stopped) they stay untold until it does.
  void tell(ControlPlane& control, ControlPlane::Id id, Doorbell* doorbell = nullptr);
  /// The cookies of those that the owner was told of; each once.
  std::vector<uint64_t> take_told() { return std::exchange(told_, {}); }

 private:
  struct Copied {
    uint64_t cookie;
    Tag tag;
  };
  std::vector<Copied> untold_;
  std::vector<uint64_t> told_;
};

}  // namespace baton::transfer
