#include "transfer/control.h"

#include <arpa/inet.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <span>

#include "base/check.h"
#include "base/log.h"
#include "transfer/control_linger.h"
#include "transfer/descriptors.h"
#include "transfer/metadata.h"
#include "transfer/wire.h"

namespace baton::transfer {
namespace {

constexpr uint32_t kHelloMagic = 0x48544142;  // "BATH"
constexpr uint16_t kControlVersion = 4;
constexpr size_t kMaxRails = 256;
constexpr size_t kMaxEndpointAddressBytes = 8192;  // a UCX worker's grows with the devices
constexpr size_t kMaxPackedKeyBytes = 4096;
constexpr size_t kFrameHeaderBytes = 5;
constexpr size_t kMaxFencedPeers = 65536;
constexpr uint64_t kListenerId = 0;
constexpr std::string_view kClosing = "closing";  // of a Fence: not you alone, the agent ends; of a Reject, too

std::string errno_text(int error) { return std::strerror(error); }

struct ParsedAddress {
  sockaddr_storage storage{};
  socklen_t size = 0;
  bool is_unix() const { return storage.ss_family == AF_UNIX; }
  const sockaddr* get() const { return reinterpret_cast<const sockaddr*>(&storage); }
};

Result<ParsedAddress> parse_address(const SocketAddress& address) {
  ParsedAddress parsed;
  if (address.starts_with("unix:")) {
    // Abstract: no file that could stay behind, and it is gone with the process.
    std::string_view name = std::string_view(address).substr(5);
    auto* un = reinterpret_cast<sockaddr_un*>(&parsed.storage);
    if (name.empty() || name.size() + 1 > sizeof(un->sun_path)) {
      return invalid_argument("bad control address '{}'", address);
    }
    un->sun_family = AF_UNIX;
    std::memcpy(un->sun_path + 1, name.data(), name.size());
    parsed.size = static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size());
    return parsed;
  }
  size_t colon = address.rfind(':');
  if (!address.starts_with("tcp:") || colon < 4) {
    return invalid_argument("bad control address '{}'", address);
  }
  std::string host = address.substr(4, colon - 4);
  std::string port_text = address.substr(colon + 1);
  if (host.size() >= 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);
  }
  unsigned port = 0;
  for (char c : port_text) {
    if (c < '0' || c > '9' || port > 65535) return invalid_argument("bad control address '{}'", address);
    port = port * 10 + static_cast<unsigned>(c - '0');
  }
  auto* v4 = reinterpret_cast<sockaddr_in*>(&parsed.storage);
  auto* v6 = reinterpret_cast<sockaddr_in6*>(&parsed.storage);
  if (port_text.empty() || port > 65535) return invalid_argument("bad control address '{}'", address);
  if (inet_pton(AF_INET, host.c_str(), &v4->sin_addr) == 1) {
    v4->sin_family = AF_INET;
    v4->sin_port = htons(static_cast<uint16_t>(port));
    parsed.size = sizeof(sockaddr_in);
  } else if (inet_pton(AF_INET6, host.c_str(), &v6->sin6_addr) == 1) {
    v6->sin6_family = AF_INET6;
    v6->sin6_port = htons(static_cast<uint16_t>(port));
    parsed.size = sizeof(sockaddr_in6);
  } else {
    return invalid_argument("control address '{}' is no IP address", address);
  }
  return parsed;
}

/// A silent host (power, cable) is noticed in about ten seconds; a dead process at once.
void tune_tcp(int fd) {
  auto set = [fd](int level, int option, int value) {
    (void)::setsockopt(fd, level, option, &value, sizeof(value));
  };
  set(IPPROTO_TCP, TCP_NODELAY, 1);
  set(SOL_SOCKET, SO_KEEPALIVE, 1);
  set(IPPROTO_TCP, TCP_KEEPIDLE, 4);
  set(IPPROTO_TCP, TCP_KEEPINTVL, 2);
  set(IPPROTO_TCP, TCP_KEEPCNT, 3);
  set(IPPROTO_TCP, TCP_USER_TIMEOUT, 10'000);
}

/// Abstract sockets have no file permissions, so both sides look at who the other is.
Status check_same_user(int fd) {
  ucred credentials{};
  socklen_t size = sizeof(credentials);
  if (::getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) {
    return unavailable("SO_PEERCRED: {}", errno_text(errno));
  }
  if (credentials.uid != ::geteuid()) {
    return failed_precondition("the peer runs as user {}, this process as {}", credentials.uid,
                               ::geteuid());
  }
  return Status();
}

std::string encode_arrivals(std::span<const Arrival> arrivals) {
  WireWriter out;
  for (const Arrival& arrival : arrivals) {
    out.put(arrival.tag);
    out.put(arrival.count);
  }
  return out.take();
}

}  // namespace

std::string encode_hello(const Hello& hello) {
  WireWriter out;
  out.put(kHelloMagic);
  out.put(kControlVersion);
  out.put(static_cast<uint64_t>(hello.from));
  out.put(static_cast<uint64_t>(hello.to));
  out.put(hello.serial);
  out.put_string(hello.name);
  return out.take();
}

Result<Hello> parse_hello(std::string_view payload) {
  WireReader in(payload);
  if (in.get<uint32_t>() != kHelloMagic) return invalid_argument("not a Baton control connection");
  uint16_t version = in.get<uint16_t>();
  if (in.ok() && version != kControlVersion) {
    return failed_precondition("control version {}, this build speaks {}: run the same Baton on both sides", version, kControlVersion);
  }
  Hello hello;
  hello.from = static_cast<Epoch>(in.get<uint64_t>());
  hello.to = static_cast<Epoch>(in.get<uint64_t>());
  hello.serial = in.get<uint64_t>();
  hello.name = in.get_string(kMaxNameBytes);
  if (!in.ok() || !in.at_end()) return invalid_argument("a damaged Hello");
  return hello;
}

std::string encode_welcome(const Welcome& welcome) {
  WireWriter out;
  out.put(static_cast<uint16_t>(welcome.rails.size()));
  for (const std::string& rail : welcome.rails) out.put_string(rail);
  out.put(static_cast<uint16_t>(welcome.pools.size()));
  for (const Welcome::Pool& pool : welcome.pools) {
    out.put(pool.id);
    out.put(pool.rail);
    out.put(pool.base);
    out.put(pool.key);
    out.put_string(pool.packed_key);
  }
  return out.take();
}

Result<Welcome> parse_welcome(std::string_view payload) {
  WireReader in(payload);
  Welcome welcome;
  size_t rails = in.get<uint16_t>();
  if (rails > kMaxRails) return invalid_argument("a Welcome with {} rails", rails);
  for (size_t i = 0; i < rails && in.ok(); ++i) {
    welcome.rails.emplace_back(in.get_string(kMaxEndpointAddressBytes));
  }
  size_t pools = in.get<uint16_t>();
  if (pools > (kMaxPools + 1) * std::max<size_t>(rails, 1)) return invalid_argument("a Welcome with {} pools", pools);
  for (size_t i = 0; i < pools && in.ok(); ++i) {
    Welcome::Pool pool;
    pool.id = in.get<uint32_t>();
    pool.rail = in.get<uint16_t>();
    pool.base = in.get<uint64_t>();
    pool.key = in.get<uint64_t>();
    pool.packed_key = in.get_string(kMaxPackedKeyBytes);
    welcome.pools.push_back(std::move(pool));
  }
  if (!in.ok() || !in.at_end()) return invalid_argument("a damaged Welcome");
  return welcome;
}

std::string encode_rail_note(const RailNote& note) {
  WireWriter out;
  out.put(static_cast<uint8_t>(note.kind));
  out.put(note.rail);
  out.put(note.generation);
  out.put(note.count);
  out.put_string(note.address);
  return out.take();
}

Result<RailNote> parse_rail_note(std::string_view payload) {
  WireReader in(payload);
  RailNote note;
  uint8_t kind = in.get<uint8_t>();
  note.kind = static_cast<RailNote::Kind>(kind);
  note.rail = in.get<uint16_t>();
  note.generation = in.get<uint32_t>();
  note.count = in.get<uint64_t>();
  note.address = in.get_string(kMaxEndpointAddressBytes);
  if (!in.ok() || !in.at_end() || kind < 1 || kind > 4) return invalid_argument("a damaged rail note");
  return note;
}

bool FrameSocket::send(Type type, std::string_view payload, bool last) {
  BATON_CHECK(payload.size() <= kMaxFrameBytes);
  if (!last && out_.size() - sent_ + payload.size() > kMaxUnsentBytes) return false;
  WireWriter header;
  header.put(static_cast<uint32_t>(payload.size()));
  header.put(static_cast<uint8_t>(type));
  out_.append(header.bytes());
  out_.append(payload);
  return true;
}

Status FrameSocket::flush() {
  while (sent_ < out_.size()) {
    ssize_t n = ::send(fd_.get(), out_.data() + sent_, out_.size() - sent_, MSG_NOSIGNAL | MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
    if (n < 0) return unavailable("control connection: {}", errno_text(errno));
    sent_ += static_cast<size_t>(n);
  }
  if (sent_ == out_.size()) {
    out_.clear();
    sent_ = 0;
  } else if (sent_ > (1u << 16)) {
    out_.erase(0, sent_);
    sent_ = 0;
  }
  return Status();
}

Status FrameSocket::receive(std::deque<Frame>& frames) {
  char buffer[16384];
  Status end;
  while (true) {
    ssize_t n = ::recv(fd_.get(), buffer, sizeof(buffer), MSG_DONTWAIT);
    if (n < 0 && errno == EINTR) continue;
    if (n < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
    if (n < 0) {
      end = unavailable("control connection: {}", errno_text(errno));
      break;
    }
    if (n == 0) {
      end = unavailable("the peer closed its control connection (its process ended or shut us out)");
      break;
    }
    in_.append(buffer, static_cast<size_t>(n));
    if (in_.size() > kMaxFrameBytes + kFrameHeaderBytes) break;  // the rest after these are handled
  }
  size_t at = 0;
  while (in_.size() - at >= kFrameHeaderBytes) {
    WireReader header(std::string_view(in_).substr(at, kFrameHeaderBytes));
    size_t size = header.get<uint32_t>();
    auto type = static_cast<Type>(header.get<uint8_t>());
    if (size > kMaxFrameBytes) return invalid_argument("a control frame of {} bytes", size);
    if (in_.size() - at - kFrameHeaderBytes < size) break;
    frames.push_back({type, in_.substr(at + kFrameHeaderBytes, size)});
    at += kFrameHeaderBytes + size;
  }
  in_.erase(0, at);
  return end;
}

ControlPlane::ControlPlane(Options options, Delegate& delegate, const Clock& clock)
    : options_(std::move(options)), delegate_(delegate), clock_(clock), lingering_(std::make_unique<LingeringSockets>()) {}

ControlPlane::~ControlPlane() = default;

bool ControlPlane::wants_time() const { return waiting_for_hello_ + lingering_->size() > 0; }

size_t ControlPlane::lingering() const { return lingering_->size(); }

Status ControlPlane::listen(const SocketAddress& address) {
  epoll_.reset(::epoll_create1(EPOLL_CLOEXEC));
  if (!epoll_) return descriptor_error("epoll_create1", errno);
  SocketAddress wanted = address;
  if (address == "unix:") wanted = fmt::format("unix:baton-transfer-{:016x}", random_id());
  if (address.starts_with("tcp:")) wanted = address + ":0";
  BATON_ASSIGN_OR_RETURN(ParsedAddress parsed, parse_address(wanted));
  listener_.reset(::socket(parsed.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!listener_) return descriptor_error("socket", errno);
  if (::bind(listener_.get(), parsed.get(), parsed.size) != 0 || ::listen(listener_.get(), 1024) != 0) {
    return unavailable("cannot listen on '{}': {}", wanted, errno_text(errno));
  }
  spare_.reset(::fcntl(epoll_.get(), F_DUPFD_CLOEXEC, 0));
  address_ = wanted;
  if (!parsed.is_unix()) {
    ParsedAddress bound;
    bound.size = sizeof(bound.storage);
    if (::getsockname(listener_.get(), reinterpret_cast<sockaddr*>(&bound.storage), &bound.size) != 0) {
      return internal_error("getsockname: {}", errno_text(errno));
    }
    uint16_t port = bound.storage.ss_family == AF_INET
                        ? ntohs(reinterpret_cast<sockaddr_in*>(&bound.storage)->sin_port)
                        : ntohs(reinterpret_cast<sockaddr_in6*>(&bound.storage)->sin6_port);
    address_ = fmt::format("{}:{}", address, port);
  }
  epoll_event event{};
  event.events = EPOLLIN;
  event.data.u64 = kListenerId;
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, listener_.get(), &event) != 0) {
    return watch_error("epoll_ctl", errno);
  }
  return Status();
}

Status ControlPlane::add(Id id, Connection connection) {
  epoll_event event{};
  connection.watching_out = connection.connecting || connection.socket->unsent();
  event.events = EPOLLIN | EPOLLRDHUP | (connection.watching_out ? static_cast<uint32_t>(EPOLLOUT) : 0u);
  event.data.u64 = id;
  connection.opened_ns = clock_.now_ns();
  if (::epoll_ctl(epoll_.get(), EPOLL_CTL_ADD, connection.socket->fd(), &event) != 0) {
    return watch_error("epoll_ctl", errno);
  }
  connections_.emplace(id, std::move(connection));
  return Status();
}

Result<ControlPlane::Id> ControlPlane::connect(const SocketAddress& address, Epoch to, uint64_t serial) {
  BATON_ASSIGN_OR_RETURN(ParsedAddress parsed, parse_address(address));
  FileDescriptor fd(::socket(parsed.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0));
  if (!fd) return descriptor_error("socket", errno);
  Connection connection;
  connection.outbound = true;
  connection.peer = to;
  if (!parsed.is_unix()) tune_tcp(fd.get());
  if (::connect(fd.get(), parsed.get(), parsed.size) != 0) {
    if (errno != EINPROGRESS) return unavailable("cannot connect to '{}': {}", address, errno_text(errno));
    connection.connecting = true;
  }
  if (parsed.is_unix()) BATON_RETURN_IF_ERROR(check_same_user(fd.get()));
  connection.socket = std::make_unique<FrameSocket>(std::move(fd));
  Hello hello{options_.epoch, to, serial, options_.name};
  BATON_CHECK(connection.socket->send(FrameSocket::Type::kHello, encode_hello(hello)));
  if (!connection.connecting) BATON_RETURN_IF_ERROR(connection.socket->flush());
  Id id = next_id_++;
  BATON_RETURN_IF_ERROR(add(id, std::move(connection)));
  return id;
}

int ControlPlane::remote_pid(Id id) const {
  auto it = connections_.find(id);
  if (it == connections_.end()) return 0;
  ucred credentials{};
  socklen_t size = sizeof(credentials);
  if (::getsockopt(it->second.socket->fd(), SOL_SOCKET, SO_PEERCRED, &credentials, &size) != 0) return 0;
  return credentials.pid;
}

bool ControlPlane::still_connected(Id id) const {
  auto it = connections_.find(id);
  if (it == connections_.end()) return false;
  pollfd poll_fd{it->second.socket->fd(), POLLRDHUP, 0};
  return ::poll(&poll_fd, 1, 0) == 0 || (poll_fd.revents & (POLLRDHUP | POLLHUP | POLLERR)) == 0;
}

bool ControlPlane::send(Id id, FrameSocket::Type type, std::string_view payload) {
  auto it = connections_.find(id);
  if (it == connections_.end() || !it->second.socket->send(type, payload)) return false;
  Status status = it->second.socket->flush();
  if (!status.ok()) return false;  // the hang-up is seen and handled in progress()
  watch(id, it->second);
  return true;
}

bool ControlPlane::send_arrivals(Id id, std::span<const Arrival> arrivals) {
  return send(id, FrameSocket::Type::kArrived, encode_arrivals(arrivals));
}

bool ControlPlane::send_rail_note(Id id, const RailNote& note) {
  return send(id, FrameSocket::Type::kRail, encode_rail_note(note));
}

bool ControlPlane::send_check(Id id, const Check& check) {
  return send(id, FrameSocket::Type::kCheck, encode_check(check));
}

bool ControlPlane::send_check_result(Id id, const CheckResult& result) {
  auto it = connections_.find(id);
  if (it == connections_.end() || !send(id, FrameSocket::Type::kCheckResult, encode_check_result(result))) return false;
  --it->second.open_checks;
  return true;
}

bool ControlPlane::send_read_request(Id id, const ReadRequest& request) {
  auto it = connections_.find(id);
  if (it == connections_.end() || !send(id, FrameSocket::Type::kRead, encode_read_request(request))) return false;
  if (request.kind == ReadRequest::Kind::kRead) {
    ++it->second.open_reads;
    ++awaited_reads_;
  }
  return true;
}

bool ControlPlane::send_read_answer(Id id, const ReadAnswer& answer) {
  auto it = connections_.find(id);
  if (it == connections_.end() || !send(id, FrameSocket::Type::kReadAnswer, encode_read_answer(answer))) return false;
  if (answer.kind == ReadAnswer::Kind::kEnded) --it->second.open_reads;
  return true;
}

bool ControlPlane::serves(Id id) const {
  auto it = connections_.find(id);
  return it != connections_.end() && !it->second.outbound && !it->second.fenced && still_connected(id);
}

void ControlPlane::watch(Id id, Connection& connection) {
  bool out = connection.connecting || connection.socket->unsent();
  if (out == connection.watching_out) return;
  connection.watching_out = out;
  epoll_event event{};
  event.events = EPOLLIN | EPOLLRDHUP | (out ? static_cast<uint32_t>(EPOLLOUT) : 0u);
  event.data.u64 = id;
  (void)::epoll_ctl(epoll_.get(), EPOLL_CTL_MOD, connection.socket->fd(), &event);
}

void ControlPlane::close_outbound(Id id, std::span<const Arrival> last) {
  auto it = connections_.find(id);
  if (it == connections_.end()) return;
  BATON_CHECK(it->second.outbound);
  Connection& connection = it->second;
  if (!last.empty()) (void)connection.socket->send(FrameSocket::Type::kArrived, encode_arrivals(last), true);
  const Status flushed = connection.socket->flush();  // arrivals that were reported as done
  awaited_reads_ -= connection.open_reads;
  if (flushed.ok() && connection.established && connection.socket->unsent()) {
    watch(id, connection);
    lingering_->add(id, std::move(connection.socket), clock_.now_ns());
  }
  connections_.erase(it);
}

void ControlPlane::close(Id id, const Status& why) {
  auto it = connections_.find(id);
  if (it == connections_.end()) return;
  Connection connection = std::move(it->second);
  connections_.erase(it);
  if (connection.outbound) {
    awaited_reads_ -= connection.open_reads;
    delegate_.on_outbound_closed(id, why);
    return;
  }
  --inbound_count_;
  if (connection.reads) {
    gone_readers_.push_back(id);
    --readers_;
  }
  if (!connection.established) {
    --waiting_for_hello_;
  } else {
    delegate_.on_inbound_closed(id, connection.socket->fd());
  }
}

Status ControlPlane::fence(Epoch peer, uint64_t serial) {
  auto [it, inserted] = fenced_.try_emplace(peer, serial);
  it->second = std::max(it->second, serial);
  if (inserted) {
    fenced_order_.push_back(peer);
    if (fenced_order_.size() > kMaxFencedPeers) {
      fenced_.erase(fenced_order_.front());
      fenced_order_.pop_front();
    }
  }
  std::vector<Id> inbound;
  for (const auto& [id, connection] : connections_) {
    if (!connection.outbound && connection.established && connection.peer == peer) inbound.push_back(id);
  }
  const size_t open = shut(inbound);
  if (open == 0) return Status();
  return unavailable("the peer with epoch {:016x} still holds {} connection(s) through which it can write "
                     "into this process and has not confirmed that it stopped",
                     static_cast<uint64_t>(peer), open);
}

Status ControlPlane::fence_all() {
  closing_ = true;
  std::vector<Id> inbound;
  for (const auto& [id, connection] : connections_) {
    if (!connection.outbound && connection.established) inbound.push_back(id);
  }
  const size_t open = shut(inbound);
  if (open == 0) return Status();
  return unavailable("{} peers can still write into this process and have not confirmed that they stopped", open);
}

/// Returns how many of them have yet to confirm.
size_t ControlPlane::shut(const std::vector<Id>& inbound) {
  size_t open = 0;
  for (Id id : inbound) {
    Connection& connection = connections_.at(id);
    if (!options_.writer_must_confirm) {
      close(id, Status());
      continue;
    }
    ++open;
    if (!connection.fenced) {
      connection.fenced = connection.socket->send(FrameSocket::Type::kFence, closing_ ? kClosing : std::string_view());
      (void)connection.socket->flush();
      watch(id, connection);
    }
  }
  return open;
}

/// Left waiting, it would keep the listener readable and this thread busy, and its process in the dark until its deadline.
/// False: nobody was waiting (the kernel says EMFILE before it looks).
bool ControlPlane::turn_away(int error) {
  spare_.reset();
  FileDescriptor refused(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
  const bool waited = static_cast<bool>(refused);
  refused.reset();
  spare_.reset(::fcntl(epoll_.get(), F_DUPFD_CLOEXEC, 0));
  if (!waited) return false;
  const int64_t now_ns = clock_.now_ns();
  if (turned_away_++ == 0 || now_ns - turned_away_said_ns_ > 10'000'000'000) {
    turned_away_said_ns_ = now_ns;
    log_warning("transfer {}: cannot take a peer in ({} so far): {}", options_.name, turned_away_,
                descriptor_error("accept", error).message());
  }
  return true;
}

void ControlPlane::accept_all() {
  while (true) {
    FileDescriptor fd(::accept4(listener_.get(), nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK));
    if (!fd) {
      if (errno == EINTR || errno == ECONNABORTED) continue;
      if ((errno == EMFILE || errno == ENFILE) && spare_) {
        if (turn_away(errno)) continue;
        return;
      }
      if (errno != EAGAIN && errno != EWOULDBLOCK) {
        log_warning("transfer {}: accept on {}: {}", options_.name, address_, errno_text(errno));
      }
      return;
    }
    if (inbound_count_ >= options_.max_inbound) {
      log_warning("transfer {}: refused a connection: {} are open, the limit is {}", options_.name,
                  inbound_count_, options_.max_inbound);
      continue;
    }
    if (address_.starts_with("unix:")) {
      Status same = check_same_user(fd.get());
      if (!same.ok()) {
        log_warning("transfer {}: refused a connection: {}", options_.name, same.message());
        continue;
      }
    } else {
      tune_tcp(fd.get());
    }
    Connection connection;
    connection.socket = std::make_unique<FrameSocket>(std::move(fd));
    if (Status added = add(next_id_, std::move(connection)); !added.ok()) {
      log_warning("transfer {}: {}", options_.name, added.to_string());
      continue;
    }
    ++next_id_;
    ++inbound_count_;
    ++waiting_for_hello_;
  }
}

void ControlPlane::handle_hello(Id id, Connection& connection, std::string_view payload, Status* failure) {
  Result<Hello> hello = parse_hello(payload);
  Status refused = hello.status();
  if (refused.ok() && hello->to != options_.epoch) {
    refused = failed_precondition("the metadata is of an earlier life (epoch {:016x}) of this process",
                                  static_cast<uint64_t>(hello->to));
  }
  if (refused.ok() && closing_) refused = unavailable("{}", kClosing);
  if (refused.ok()) {
    auto fenced = fenced_.find(hello->from);
    if (fenced != fenced_.end() && hello->serial <= fenced->second) {
      refused = failed_precondition("'{}' was fenced: it needs metadata made after that", hello->name);
    }
  }
  if (refused.ok()) {
    connection.peer = hello->from;
    connection.name = hello->name;
    Result<Welcome> welcome = delegate_.on_inbound(id, *hello);
    refused = welcome.status();
    if (refused.ok()) {
      connection.established = true;
      --waiting_for_hello_;
      std::string bytes = encode_welcome(*welcome);
      if (bytes.size() > FrameSocket::kMaxFrameBytes ||
          !connection.socket->send(FrameSocket::Type::kWelcome, bytes)) {
        *failure = internal_error("Welcome of {} bytes does not fit", bytes.size());
        return;
      }
      *failure = connection.socket->flush();
      return;
    }
  }
  log_warning("transfer {}: refused a peer: {}", options_.name, refused.message());
  (void)connection.socket->send(FrameSocket::Type::kReject, refused.message());
  (void)connection.socket->flush();
  *failure = refused;
}

void ControlPlane::handle_frame(Id id, Connection& connection, const FrameSocket::Frame& frame,
                                Status* failure) {
  switch (frame.type) {
    case FrameSocket::Type::kHello:
      if (connection.outbound || connection.established) break;
      handle_hello(id, connection, frame.payload, failure);
      return;
    case FrameSocket::Type::kWelcome: {
      if (!connection.outbound || connection.established) break;
      Result<Welcome> welcome = parse_welcome(frame.payload);
      if (!welcome.ok()) {
        *failure = welcome.status();
        return;
      }
      connection.established = true;
      delegate_.on_welcome(id, std::move(*welcome));
      return;
    }
    case FrameSocket::Type::kReject:
      if (!connection.outbound) break;
      *failure = frame.payload == kClosing
                     ? unavailable("the peer's agent is closing")
                     : failed_precondition("refused by the peer: {}", frame.payload.substr(0, 500));
      return;
    case FrameSocket::Type::kRail: {
      if (!connection.established) break;
      Result<RailNote> note = parse_rail_note(frame.payload);
      if (!note.ok()) {
        *failure = note.status();
        return;
      }
      if (connection.outbound) {
        delegate_.on_outbound_rail(id, *note);
      } else {
        delegate_.on_inbound_rail(id, *note);
      }
      return;
    }
    case FrameSocket::Type::kCheck: {
      if (connection.outbound || !connection.established) break;
      Result<Check> check = parse_check(frame.payload);
      *failure = check.status();
      if (!failure->ok()) return;
      if (!check->blocks.empty() && ++connection.open_checks > Check::kMaxOpen) {
        *failure = invalid_argument("more than {} checks at once", Check::kMaxOpen);
        return;
      }
      checks_.push_back({id, connection.name, std::move(*check)});
      return;
    }
    case FrameSocket::Type::kCheckResult: {
      if (!connection.outbound || !connection.established) break;
      Result<CheckResult> result = parse_check_result(frame.payload);
      *failure = result.status();
      if (failure->ok()) check_results_.push_back({id, std::move(*result)});
      return;
    }
    case FrameSocket::Type::kRead: {
      if (connection.outbound || !connection.established) break;
      Result<ReadRequest> request = parse_read_request(frame.payload);
      *failure = request.status();
      if (!failure->ok()) return;
      if (request->kind == ReadRequest::Kind::kRead && ++connection.open_reads > ReadRequest::kMaxOpen) {
        *failure = invalid_argument("more than {} reads at once", ReadRequest::kMaxOpen);
        return;
      }
      if (!std::exchange(connection.reads, true)) ++readers_;
      read_requests_.push_back({id, connection.peer, connection.name, std::move(*request)});
      return;
    }
    case FrameSocket::Type::kReadAnswer: {
      if (!connection.outbound || !connection.established) break;
      Result<ReadAnswer> answer = parse_read_answer(frame.payload);
      *failure = answer.status();
      if (!failure->ok()) return;
      if (answer->kind == ReadAnswer::Kind::kEnded) {
        if (connection.open_reads == 0) break;
        --connection.open_reads;
        --awaited_reads_;
      }
      read_answers_.push_back({id, std::move(*answer)});
      return;
    }
    case FrameSocket::Type::kFence:
      if (!connection.outbound) break;
      // The connection stays until the link has ended: closing it is what confirms the fence.
      delegate_.on_outbound_closed(id, frame.payload == kClosing ? unavailable("closed by the peer")
                                                                 : failed_precondition("fenced by the peer"));
      return;
    case FrameSocket::Type::kArrived: {
      if (!connection.established) break;
      WireReader in(frame.payload);
      while (!in.at_end()) {
        Arrival arrival;
        arrival.tag = in.get<uint32_t>();
        arrival.count = in.get<uint32_t>();
        if (!in.ok()) break;
        if (connection.outbound) {
          delegate_.on_outbound_arrived(id, arrival);
        } else {
          delegate_.on_inbound_arrived(id, arrival);
        }
      }
      if (in.ok()) return;
      break;
    }
  }
  *failure = invalid_argument("an unexpected control frame of type {}", static_cast<int>(frame.type));
}

void ControlPlane::handle(Id id, uint32_t events) {
  auto it = connections_.find(id);
  if (it == connections_.end()) {
    (void)lingering_->handle(id);
    return;
  }
  Connection& connection = it->second;
  Status failure;
  if (connection.connecting && (events & (EPOLLOUT | EPOLLERR | EPOLLHUP)) != 0) {
    int error = 0;
    socklen_t size = sizeof(error);
    (void)::getsockopt(connection.socket->fd(), SOL_SOCKET, SO_ERROR, &error, &size);
    connection.connecting = false;
    if (error != 0) failure = unavailable("cannot connect: {}", errno_text(error));
  }
  if (failure.ok() && (events & EPOLLOUT) != 0) failure = connection.socket->flush();
  if (failure.ok() && (events & (EPOLLIN | EPOLLRDHUP | EPOLLHUP | EPOLLERR)) != 0) {
    std::deque<FrameSocket::Frame> frames;
    Status end = connection.socket->receive(frames);
    // What came before the end counts: a peer may finish its work and leave.
    for (const FrameSocket::Frame& frame : frames) {
      handle_frame(id, connection, frame, &failure);
      if (!failure.ok()) break;
    }
    if (failure.ok()) failure = end;
  }
  if (!failure.ok()) {
    close(id, failure);
  } else {
    watch(id, connection);
  }
}

size_t ControlPlane::progress() {
  if (!epoll_) return 0;
  epoll_event events[64];
  int n = ::epoll_wait(epoll_.get(), events, 64, 0);
  for (int i = 0; i < n; ++i) {
    if (events[i].data.u64 == kListenerId) {
      accept_all();
    } else {
      handle(events[i].data.u64, events[i].events);
    }
  }
  if (lingering_->size() > 0) lingering_->expire(clock_.now_ns());
  if (waiting_for_hello_ > 0) {
    int64_t oldest_ns = clock_.now_ns() - options_.hello_timeout_ms * 1'000'000;
    std::vector<Id> late;
    for (const auto& [id, connection] : connections_) {
      if (!connection.outbound && !connection.established && connection.opened_ns < oldest_ns) {
        late.push_back(id);
      }
    }
    for (Id id : late) {
      handle(id, EPOLLIN);  // it may lie there: when a thousand come at once it is this side that is late
      auto it = connections_.find(id);
      if (it == connections_.end() || it->second.established) continue;
      close(id, deadline_exceeded("no Hello within {} ms", options_.hello_timeout_ms));
    }
  }
  return n > 0 ? static_cast<size_t>(n) : 0;
}

}  // namespace baton::transfer
