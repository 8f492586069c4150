#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "base/status.h"
#include "transfer/include/baton/transfer.h"

/// libfabric with nothing around it: one endpoint, one queue that is polled, fi_write() or fi_read() for every block.
namespace baton::ops {

class RawFabric {
 public:
  /// `provider` as libfabric calls it ("net", "tcp", "efa"); `ip` binds it where the provider has IP addresses.
  /// Registers `memory`, which must outlive this object.
  static Result<std::unique_ptr<RawFabric>> open(const std::string& provider, const std::string& ip, std::span<std::byte> memory);
  virtual ~RawFabric() = default;

  virtual std::string name() const = 0;     ///< for the other side's connect()
  virtual uint64_t remote_base() const = 0; ///< what the other side adds offsets to
  virtual uint64_t remote_key() const = 0;

  /// Target: moves things along until `stop` says so (asked every few thousand turns).
  virtual Status progress_until(const std::function<bool()>& stop) = 0;

  /// Initiator. The other side must be in progress_until().
  virtual Status connect(const std::string& name, uint64_t remote_base, uint64_t remote_key, int64_t timeout_ms) = 0;
  /// Seconds until all blocks are delivered; `window` writes and 32 MiB are under way at most.
  virtual Result<double> write(std::span<const transfer::BlockPair> blocks, uint64_t block_bytes, size_t window, int64_t timeout_ms) = 0;
  /// The same from the other side's memory.
  virtual Result<double> read(std::span<const transfer::BlockPair> blocks, uint64_t block_bytes, size_t window, int64_t timeout_ms) = 0;

  /// Both sides are connected to each other: one write of `bytes` with CQ data there, and when its data is counted one back, `count` times.
  /// Each in microseconds; delivery complete, like ours.
  virtual Result<std::vector<double>> ping(uint64_t bytes, uint64_t count, int64_t timeout_ms) = 0;
  /// The other side of it.
  virtual Status pong(uint64_t bytes, uint64_t count, int64_t timeout_ms) = 0;
};

}  // namespace baton::ops
