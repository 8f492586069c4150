#include "ops/raw_socket.h"

#include <sys/socket.h>
#include <sys/time.h>
#include <sys/uio.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <vector>

#include "base/clock.h"
#include "ops/bench_transfer_wire.h"

namespace baton::ops {

namespace {

constexpr size_t kPieces = 256;
constexpr size_t kReadBytes = 1u << 20;

Status failed(const char* what) { return unavailable("{} on the raw socket: {}", what, std::strerror(errno)); }

void bound_waits(int fd, int64_t timeout_ms) {
  timeval timeout{timeout_ms / 1000, (timeout_ms % 1000) * 1000};
  (void)::setsockopt(fd, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout));
  (void)::setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout));
}

Status send_all(int fd, std::span<iovec> pieces) {
  while (!pieces.empty()) {
    msghdr message{};
    message.msg_iov = pieces.data();
    message.msg_iovlen = std::min(pieces.size(), kPieces);
    ssize_t n = ::sendmsg(fd, &message, MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return failed("sending");
    auto left = static_cast<size_t>(n);
    while (!pieces.empty() && left >= pieces.front().iov_len) {
      left -= pieces.front().iov_len;
      pieces = pieces.subspan(1);
    }
    if (left > 0) {
      iovec& first = pieces.front();
      first = {static_cast<std::byte*>(first.iov_base) + left, first.iov_len - left};
    }
  }
  return {};
}

Status receive_all(int fd, std::byte* data, size_t bytes) {
  while (bytes > 0) {
    ssize_t n = ::recv(fd, data, bytes, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n == 0) return unavailable("the raw socket was closed by the other side");
    if (n < 0) return failed("receiving");
    data += n;
    bytes -= static_cast<size_t>(n);
  }
  return {};
}

}  // namespace

Result<RawSocketInitiator> RawSocketInitiator::connect(const std::string& ip, uint32_t port, int64_t timeout_ms) {
  BATON_ASSIGN_OR_RETURN(FileDescriptor socket, connect_tcp({ip, std::to_string(port)}, timeout_ms));
  bound_waits(socket.get(), timeout_ms);
  return RawSocketInitiator(std::move(socket));
}

Result<double> RawSocketInitiator::stream(const std::byte* local, std::span<const transfer::BlockPair> blocks, uint64_t block_bytes) const {
  std::vector<iovec> pieces;
  for (const transfer::BlockPair& pair : blocks) {
    pieces.push_back({const_cast<std::byte*>(local) + pair.local_block * block_bytes, block_bytes});
  }
  int64_t begin_ns = SteadyClock::instance().now_ns();
  BATON_RETURN_IF_ERROR(send_all(socket_.get(), pieces));
  std::byte answer;
  BATON_RETURN_IF_ERROR(receive_all(socket_.get(), &answer, 1));
  return static_cast<double>(SteadyClock::instance().now_ns() - begin_ns) * 1e-9;
}

Result<double> RawSocketInitiator::round_trip(std::byte* buffer, uint64_t bytes) const {
  int64_t begin_ns = SteadyClock::instance().now_ns();
  iovec piece{buffer, bytes};
  BATON_RETURN_IF_ERROR(send_all(socket_.get(), {&piece, 1}));
  BATON_RETURN_IF_ERROR(receive_all(socket_.get(), buffer, bytes));
  return static_cast<double>(SteadyClock::instance().now_ns() - begin_ns) * 1e-9;
}

Result<RawSocketTarget> RawSocketTarget::listen(const std::string& ip, int64_t timeout_ms) {
  uint16_t port = 0;
  BATON_ASSIGN_OR_RETURN(FileDescriptor listener, listen_tcp({ip, "0"}, &port));
  return RawSocketTarget(std::move(listener), port, timeout_ms);
}

Status RawSocketTarget::accept() {
  if (socket_) return {};
  BATON_ASSIGN_OR_RETURN(socket_, accept_tcp(listener_.get(), timeout_ms_));
  bound_waits(socket_.get(), timeout_ms_);
  return {};
}

Status RawSocketTarget::read_stream(std::span<std::byte> pool, uint64_t bytes) {
  BATON_RETURN_IF_ERROR(accept());
  size_t at = 0;
  while (bytes > 0) {
    size_t piece = std::min({static_cast<size_t>(bytes), kReadBytes, pool.size() - at});
    ssize_t n = ::recv(socket_.get(), pool.data() + at, piece, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n == 0) return unavailable("the raw socket was closed by the other side");
    if (n < 0) return failed("receiving");
    bytes -= static_cast<uint64_t>(n);
    at = (at + static_cast<size_t>(n)) % pool.size();
  }
  std::byte answer{1};
  iovec piece{&answer, 1};
  return send_all(socket_.get(), {&piece, 1});
}

Status RawSocketTarget::echo(std::span<std::byte> pool, uint64_t bytes, uint64_t count) {
  BATON_RETURN_IF_ERROR(accept());
  if (bytes > pool.size()) return invalid_argument("echoing {} bytes with a pool of {}", bytes, pool.size());
  for (uint64_t i = 0; i < count; ++i) {
    BATON_RETURN_IF_ERROR(receive_all(socket_.get(), pool.data(), bytes));
    iovec piece{pool.data(), bytes};
    BATON_RETURN_IF_ERROR(send_all(socket_.get(), {&piece, 1}));
  }
  return {};
}

}  // namespace baton::ops
