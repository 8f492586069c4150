#include "ops/bench_transfer_wire.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <charconv>
#include <cstring>
#include <limits>
#include <memory>

#include "base/clock.h"
#include "transfer/wire.h"

namespace baton::ops {

namespace {

using transfer::WireReader;
using transfer::WireWriter;

constexpr size_t kMaxTextBytes = 65535;

/// One function lists the fields of a record for both directions, so they cannot drift apart.
template <typename Visitor, typename Request>
void visit_request(Visitor& visit, Request& request) {
  visit(request.version);
  visit(request.shared_memory);
  visit(request.gpu_memory);
  visit(request.device);
  visit(request.tag);
  visit(request.pool_bytes);
  visit(request.block_bytes);
  visit(request.bytes);
  visit(request.count);
  visit(request.transport);
  visit(request.metadata);
  visit(request.block_sizes, kMaxBenchSizes);
  visit(request.blocks, kMaxBenchBlocks);
  visit(request.hashes, kMaxBenchBlocks);
}

template <typename Visitor, typename Reply>
void visit_reply(Visitor& visit, Reply& reply) {
  visit(reply.message);
  visit(reply.host_id);
  visit(reply.text);
  visit(reply.device);
  visit(reply.tag);
  visit(reply.port);
  visit(reply.pid);
  visit(reply.fd);
  visit(reply.address);
  visit(reply.bytes);
  visit(reply.key);
  visit(reply.elapsed_ns);
  visit(reply.cpu_ns);
  visit(reply.resident_bytes);
  visit(reply.retries);
  visit(reply.bad_blocks);
}

struct Encoder {
  WireWriter out;
  void operator()(bool value) { out.put(static_cast<uint8_t>(value)); }
  template <std::unsigned_integral T>
  void operator()(const T& value) { out.put(value); }
  void operator()(const std::string& value) { out.put_string(std::string_view(value).substr(0, kMaxTextBytes)); }
  template <typename T>
  void operator()(const std::vector<T>& values, size_t most) {
    size_t count = std::min(values.size(), most);
    out.put(static_cast<uint32_t>(count));
    for (size_t i = 0; i < count; ++i) out.put(values[i]);
  }
};

struct Decoder {
  WireReader in;
  bool too_long = false;
  void operator()(bool& value) { value = in.get<uint8_t>() != 0; }
  template <std::unsigned_integral T>
  void operator()(T& value) { value = in.get<T>(); }
  void operator()(std::string& value) { value = std::string(in.get_string(kMaxTextBytes)); }
  template <typename T>
  void operator()(std::vector<T>& values, size_t most) {
    size_t count = in.get<uint32_t>();
    if (count > most || count * sizeof(T) > in.left()) {
      too_long = true;
      return;
    }
    values.reserve(count);
    for (size_t i = 0; i < count; ++i) values.push_back(in.get<T>());
  }
  bool whole() const { return !too_long && in.ok() && in.at_end(); }
};

int64_t now_ns() { return SteadyClock::instance().now_ns(); }

int64_t deadline_after(int64_t timeout_ms) {
  return timeout_ms < 0 ? std::numeric_limits<int64_t>::max() : now_ns() + timeout_ms * 1'000'000;
}

/// False when `deadline_ns` passes first.
bool wait_for(int fd, int16_t events, int64_t deadline_ns) {
  while (true) {
    int64_t left_ms = deadline_ns == std::numeric_limits<int64_t>::max() ? -1 : (deadline_ns - now_ns()) / 1'000'000;
    if (deadline_ns != std::numeric_limits<int64_t>::max() && left_ms < 0) return false;
    pollfd one{fd, events, 0};
    int ready = ::poll(&one, 1, static_cast<int>(std::min<int64_t>(left_ms, 1'000'000)));
    if (ready > 0) return true;
    if (ready < 0 && errno != EINTR) return true;  // the next call on it tells
  }
}

struct AddressList {
  addrinfo* first = nullptr;
  AddressList() = default;
  AddressList(const AddressList&) = delete;
  AddressList& operator=(const AddressList&) = delete;
  ~AddressList() {
    if (first != nullptr) ::freeaddrinfo(first);
  }
};

Status resolve(const HostPort& address, int flags, AddressList& list) {
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  hints.ai_flags = flags;
  int error = ::getaddrinfo(address.host.c_str(), address.port.c_str(), &hints, &list.first);
  if (error != 0) return invalid_argument("'{}': {}", address.host, ::gai_strerror(error));
  return {};
}

std::string ip_of(const sockaddr_storage& address) {
  char text[INET6_ADDRSTRLEN] = "";
  if (address.ss_family == AF_INET) {
    ::inet_ntop(AF_INET, &reinterpret_cast<const sockaddr_in*>(&address)->sin_addr, text, sizeof(text));
  } else if (address.ss_family == AF_INET6) {
    ::inet_ntop(AF_INET6, &reinterpret_cast<const sockaddr_in6*>(&address)->sin6_addr, text, sizeof(text));
  }
  std::string_view ip = text;
  if (ip.starts_with("::ffff:") && ip.find('.') != std::string_view::npos) ip.remove_prefix(7);
  return std::string(ip);
}

}  // namespace

std::string encode(const BenchRequest& request) {
  Encoder encoder;
  encoder.out.put(static_cast<uint8_t>(request.command));
  visit_request(encoder, request);
  return encoder.out.take();
}

std::string encode(const BenchReply& reply) {
  Encoder encoder;
  encoder.out.put(static_cast<uint8_t>(reply.code));
  visit_reply(encoder, reply);
  return encoder.out.take();
}

Result<BenchRequest> parse_bench_request(std::string_view bytes) {
  Decoder decoder{WireReader(bytes)};
  BenchRequest request;
  auto command = decoder.in.get<uint8_t>();
  visit_request(decoder, request);
  if (!decoder.whole()) return invalid_argument("a damaged request of {} bytes", bytes.size());
  if (request.version != kBenchWireVersion) {
    return failed_precondition("the other side speaks version {} of this benchmark, this one {}", request.version, kBenchWireVersion);
  }
  if (command < 1 || command > static_cast<uint8_t>(kLastBenchCommand)) return invalid_argument("there is no command {}", command);
  request.command = static_cast<BenchCommand>(command);
  return request;
}

Result<BenchReply> parse_bench_reply(std::string_view bytes) {
  Decoder decoder{WireReader(bytes)};
  BenchReply reply;
  auto code = decoder.in.get<uint8_t>();
  visit_reply(decoder, reply);
  if (!decoder.whole()) return invalid_argument("a damaged reply of {} bytes", bytes.size());
  if (code > static_cast<uint8_t>(StatusCode::kAborted)) return invalid_argument("there is no status code {}", code);
  reply.code = static_cast<StatusCode>(code);
  return reply;
}

Result<HostPort> parse_host_port(const std::string& text, bool allow_any_port) {
  size_t colon = text.rfind(':');
  if (colon == std::string::npos || colon == 0) return invalid_argument("'{}' is not HOST:PORT", text);
  HostPort result{text.substr(0, colon), text.substr(colon + 1)};
  if (result.host.starts_with('[') && result.host.ends_with(']')) {
    result.host = result.host.substr(1, result.host.size() - 2);
  } else if (result.host.find(':') != std::string::npos) {
    return invalid_argument("'{}': write an IPv6 address as [ADDRESS]:PORT", text);
  }
  uint32_t port = 0;
  const char* end = result.port.data() + result.port.size();
  auto [stop, error] = std::from_chars(result.port.data(), end, port);
  if (result.host.empty() || error != std::errc() || stop != end || port > 65535 || (port == 0 && !allow_any_port)) {
    return invalid_argument("'{}' is not HOST:PORT with a port of 1 to 65535", text);
  }
  return result;
}

Status BenchChannel::send(std::string_view payload) const {
  if (payload.size() > kMaxBenchFrameBytes) {
    return invalid_argument("a frame of {} bytes; {} are possible", payload.size(), kMaxBenchFrameBytes);
  }
  WireWriter header;
  header.put(static_cast<uint32_t>(payload.size()));
  std::string frame = header.take();
  frame.append(payload);
  std::string_view left = frame;
  while (!left.empty()) {
    ssize_t n = ::send(socket_.get(), left.data(), left.size(), MSG_NOSIGNAL);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return unavailable("sending to the other side: {}", std::strerror(errno));
    left.remove_prefix(static_cast<size_t>(n));
  }
  return {};
}

Status BenchChannel::read_exactly(void* data, size_t bytes, int64_t deadline_ns) const {
  auto* at = static_cast<char*>(data);
  while (bytes > 0) {
    if (!wait_for(socket_.get(), POLLIN, deadline_ns)) return deadline_exceeded("the other side does not answer");
    ssize_t n = ::recv(socket_.get(), at, bytes, 0);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0) return unavailable("reading from the other side: {}", std::strerror(errno));
    if (n == 0) return unavailable("the other side is gone");
    at += n;
    bytes -= static_cast<size_t>(n);
  }
  return {};
}

Result<std::string> BenchChannel::receive(int64_t timeout_ms) const {
  int64_t deadline_ns = deadline_after(timeout_ms);
  char header[4];
  BATON_RETURN_IF_ERROR(read_exactly(header, sizeof(header), deadline_ns));
  size_t bytes = WireReader(std::string_view(header, sizeof(header))).get<uint32_t>();
  if (bytes > kMaxBenchFrameBytes) {
    return invalid_argument("the other side announces a frame of {} bytes; {} are possible", bytes, kMaxBenchFrameBytes);
  }
  std::string payload(bytes, '\0');
  BATON_RETURN_IF_ERROR(read_exactly(payload.data(), bytes, deadline_ns));
  return payload;
}

bool BenchChannel::readable() const {
  pollfd one{socket_.get(), POLLIN, 0};
  return ::poll(&one, 1, 0) != 0;
}

std::string BenchChannel::local_ip() const {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  return ::getsockname(socket_.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0 ? ip_of(address) : "";
}

std::string BenchChannel::remote_ip() const {
  sockaddr_storage address{};
  socklen_t size = sizeof(address);
  return ::getpeername(socket_.get(), reinterpret_cast<sockaddr*>(&address), &size) == 0 ? ip_of(address) : "";
}

Result<FileDescriptor> connect_tcp(const HostPort& address, int64_t timeout_ms) {
  AddressList list;
  BATON_RETURN_IF_ERROR(resolve(address, 0, list));
  int error = ECONNREFUSED;
  for (addrinfo* entry = list.first; entry != nullptr; entry = entry->ai_next) {
    FileDescriptor fd(::socket(entry->ai_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
    if (!fd) continue;
    if (::connect(fd.get(), entry->ai_addr, entry->ai_addrlen) != 0) {
      error = errno;
      if (error != EINPROGRESS) continue;
      error = ETIMEDOUT;
      if (!wait_for(fd.get(), POLLOUT, deadline_after(timeout_ms))) continue;
      socklen_t size = sizeof(error);
      if (::getsockopt(fd.get(), SOL_SOCKET, SO_ERROR, &error, &size) != 0 || error != 0) continue;
    }
    int flags = ::fcntl(fd.get(), F_GETFL);
    (void)::fcntl(fd.get(), F_SETFL, flags & ~O_NONBLOCK);
    int one = 1;
    (void)::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    (void)::setsockopt(fd.get(), SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
    return fd;
  }
  return unavailable("connecting to {}:{}: {}", address.host, address.port, std::strerror(error));
}

Result<FileDescriptor> listen_tcp(const HostPort& address, uint16_t* port) {
  AddressList list;
  BATON_RETURN_IF_ERROR(resolve(address, AI_PASSIVE, list));
  FileDescriptor fd(::socket(list.first->ai_family, SOCK_STREAM | SOCK_CLOEXEC, 0));
  int one = 1;
  (void)::setsockopt(fd.get(), SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
  if (!fd || ::bind(fd.get(), list.first->ai_addr, list.first->ai_addrlen) != 0 || ::listen(fd.get(), 4) != 0) {
    return unavailable("listening on {}:{}: {}", address.host, address.port, std::strerror(errno));
  }
  sockaddr_storage bound{};
  socklen_t size = sizeof(bound);
  if (::getsockname(fd.get(), reinterpret_cast<sockaddr*>(&bound), &size) != 0) {
    return internal_error("getsockname: {}", std::strerror(errno));
  }
  *port = ntohs(bound.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&bound)->sin6_port
                                            : reinterpret_cast<sockaddr_in*>(&bound)->sin_port);
  return fd;
}

Result<FileDescriptor> accept_tcp(int listener, int64_t timeout_ms) {
  if (!wait_for(listener, POLLIN, deadline_after(timeout_ms))) return deadline_exceeded("nobody connects");
  FileDescriptor fd(::accept4(listener, nullptr, nullptr, SOCK_CLOEXEC));
  if (!fd) return unavailable("accept: {}", std::strerror(errno));
  int one = 1;
  (void)::setsockopt(fd.get(), IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
  (void)::setsockopt(fd.get(), SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
  return fd;
}

}  // namespace baton::ops
