#pragma once

#include <cstdint>
#include <span>
#include <string>

#include "base/status.h"
#include "base/unique_handle.h"
#include "transfer/include/baton/transfer.h"

/// A plain TCP stream, as iperf does it: what the kernel's sockets give between the two processes.
namespace baton::ops {

class RawSocketInitiator {
 public:
  static Result<RawSocketInitiator> connect(const std::string& ip, uint32_t port, int64_t timeout_ms);
  /// Seconds from the first byte to the target's word that it has read the last.
  Result<double> stream(const std::byte* local, std::span<const transfer::BlockPair> blocks, uint64_t block_bytes) const;
  /// Seconds there and back for `bytes`.
  Result<double> round_trip(std::byte* buffer, uint64_t bytes) const;

 private:
  explicit RawSocketInitiator(FileDescriptor socket) : socket_(std::move(socket)) {}
  FileDescriptor socket_;
};

class RawSocketTarget {
 public:
  static Result<RawSocketTarget> listen(const std::string& ip, int64_t timeout_ms);
  uint16_t port() const { return port_; }
  /// Reads `bytes` into `pool`, from its start again when it is full, and answers with one byte.
  Status read_stream(std::span<std::byte> pool, uint64_t bytes);
  Status echo(std::span<std::byte> pool, uint64_t bytes, uint64_t count);

 private:
  RawSocketTarget(FileDescriptor listener, uint16_t port, int64_t timeout_ms)
      : listener_(std::move(listener)), port_(port), timeout_ms_(timeout_ms) {}
  Status accept();

  FileDescriptor listener_;
  FileDescriptor socket_;
  uint16_t port_;
  int64_t timeout_ms_;
};

}  // namespace baton::ops
