#include "http/server.h"

#include <poll.h>
#include <sys/socket.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <boost/asio/awaitable.hpp>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/asio/post.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/strand.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/asio/write.hpp>
#include <boost/beast/core.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <optional>
#include <thread>
#include <unordered_set>
#include <utility>

#include "base/log.h"

namespace baton::http {

namespace asio = boost::asio;
namespace beast = boost::beast;
using tcp = asio::ip::tcp;
using boost::system::error_code;

std::string_view HttpRequest::header(std::string_view lower_case_name) const {
  for (const auto& [name, value] : headers) {
    if (name == lower_case_name) return value;
  }
  return {};
}

Status ServerConfig::validate() const {
  if (threads < 1 || threads > 256) return invalid_argument("http threads are {}; give 1 to 256", threads);
  if (max_connections < 1) return invalid_argument("max_connections is {}; it must be positive", max_connections);
  if (max_header_bytes < 1024) return invalid_argument("max_header_bytes is {}; give at least 1024", max_header_bytes);
  if (max_body_bytes < 1024) return invalid_argument("max_body_bytes is {}; give at least 1024", max_body_bytes);
  if (header_timeout_ms < 1 || body_timeout_ms < 1 || idle_timeout_ms < 1 || write_timeout_ms < 1) {
    return invalid_argument("http timeouts must be positive");
  }
  return {};
}

namespace {

class Connection;

/// What all connections of one server share. Connections hold it, so that the I/O context outlives their sockets.
struct Shared {
  explicit Shared(int threads) : io(threads) {}

  ServerConfig config;
  RequestHandler handler;
  std::atomic<uint64_t> open{0}, accepted{0}, refused{0}, requests{0}, slow_clients{0};
  std::atomic<uint64_t> body_bytes{0};    // see BodyShare
  std::atomic<bool> stopping{false};      // no new request
  std::atomic<bool> last_responses{false};
  std::mutex mutex;
  std::unordered_set<Connection*> connections;  // guarded by mutex
  uint64_t active = 0;                          // guarded by mutex
  std::condition_variable idle;                 // active fell to 0
  std::mutex post_mutex;
  bool stopped = false;  // guarded by post_mutex: nothing runs `io` any more
  asio::io_context io;

  /// From any thread. Dropped once the server has stopped: a task that stays in the queue of `io` would keep its
  /// connection, and that keeps `io`.
  template <typename Executor, typename Task>
  void post(const Executor& executor, Task task) {
    std::lock_guard lock(post_mutex);
    if (!stopped) asio::post(executor, std::move(task));
  }
};

/// What one body that comes in takes of the memory for all of them.
class BodyShare {
 public:
  explicit BodyShare(Shared& shared) : shared_(shared) {}
  ~BodyShare() { release(); }
  BodyShare(const BodyShare&) = delete;
  BodyShare& operator=(const BodyShare&) = delete;

  /// False: the others leave no room for so much.
  bool grow_to(uint64_t bytes) {
    uint64_t more = bytes - std::min(bytes, bytes_);
    bytes_ += more;
    return shared_.body_bytes.fetch_add(more) + more <= shared_.config.max_bodies_bytes;
  }
  void release() { shared_.body_bytes.fetch_sub(std::exchange(bytes_, 0)); }

 private:
  Shared& shared_;
  uint64_t bytes_ = 0;
};

/// A request from its arrival until its response is sent or its connection gone.
class ActiveRequest {
 public:
  explicit ActiveRequest(Shared& shared) : shared_(shared) {
    std::lock_guard lock(shared_.mutex);
    ++shared_.active;
  }
  ~ActiveRequest() {
    std::lock_guard lock(shared_.mutex);
    if (--shared_.active == 0) shared_.idle.notify_all();
  }
  ActiveRequest(const ActiveRequest&) = delete;
  ActiveRequest& operator=(const ActiveRequest&) = delete;

 private:
  Shared& shared_;
};

std::string reason_phrase(int status) {
  return std::string(beast::http::obsolete_reason(static_cast<beast::http::status>(status)));
}

std::string error_body(std::string_view message, std::string_view type) {
  std::string escaped;
  for (char c : message) {
    if (c == '"' || c == '\\') escaped += '\\';
    escaped += c;
  }
  return fmt::format(R"({{"error":{{"message":"{}","type":"{}","param":null,"code":null}}}})", escaped, type);
}

/// "%41" becomes "A"; what is not a valid escape stays as it is.
std::string percent_decoded(std::string_view text) {
  auto digit = [](char c) {
    return c >= '0' && c <= '9' ? c - '0' : c >= 'a' && c <= 'f' ? c - 'a' + 10 : c >= 'A' && c <= 'F' ? c - 'A' + 10 : -1;
  };
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '%' && i + 2 < text.size() && digit(text[i + 1]) >= 0 && digit(text[i + 2]) >= 0) {
      out += static_cast<char>(digit(text[i + 1]) * 16 + digit(text[i + 2]));
      i += 2;
    } else {
      out += text[i];
    }
  }
  return out;
}

/// Path and query of a request target, which may be a whole URL (RFC 9112, 3.2.2).
void split_target(std::string_view target, HttpRequest* request) {
  for (std::string_view scheme : {"http://", "https://"}) {
    if (target.size() < scheme.size() || !beast::iequals({target.data(), scheme.size()}, {scheme.data(), scheme.size()})) continue;
    size_t slash = target.find_first_of("/?", scheme.size());
    target = slash == std::string_view::npos ? "/" : target.substr(slash);
  }
  size_t question = target.find('?');
  request->path = percent_decoded(target.substr(0, question));
  if (question != std::string_view::npos) request->query = std::string(target.substr(question + 1));
}

/// One client connection. Everything but the Exchange entry points runs on its strand.
class Connection final : public std::enable_shared_from_this<Connection> {
 public:
  Connection(tcp::socket socket, std::shared_ptr<Shared> shared)
      : shared_(std::move(shared)), stream_(std::move(socket)), wake_(stream_.get_executor()),
        deadline_(stream_.get_executor()) {
    ++shared_->open;
    std::lock_guard lock(shared_->mutex);
    shared_->connections.insert(this);
  }
  ~Connection() {
    --shared_->open;
    std::lock_guard lock(shared_->mutex);
    shared_->connections.erase(this);
  }

  static asio::awaitable<void> run(std::shared_ptr<Connection> self) {
    beast::flat_buffer buffer(self->shared_->config.max_header_bytes + (64 << 10));
    while (!self->broken_ && !self->shared_->stopping) {
      bool keep = co_await serve_one(self, buffer);
      if (!keep) break;
    }
    self->close();
  }

  void close() {
    broken_ = true;
    error_code ignored;
    stream_.socket().shutdown(tcp::socket::shutdown_both, ignored);
    stream_.socket().close(ignored);
    notify_disconnect();
    wake_.cancel();
    deadline_.cancel();
    if (watch_pause_) watch_pause_->cancel();
  }

  template <typename Task>
  void post(Task task) {
    shared_->post(stream_.get_executor(), std::move(task));
  }

 private:
  class ExchangeImpl;

  /// Ends what is being read after `timeout_ms`; expired() then says so. The socket stays open, so that the client can be
  /// told (a timeout of beast's own closes it).
  void read_deadline(int64_t timeout_ms) {
    expired_ = false;
    deadline_.expires_after(std::chrono::milliseconds(timeout_ms));
    deadline_.async_wait([weak = weak_from_this()](error_code error) {
      auto self = weak.lock();
      if (error || !self || self->deadline_.expiry() > std::chrono::steady_clock::now()) return;
      self->expired_ = true;
      error_code ignored;
      self->stream_.socket().cancel(ignored);
    });
  }
  void no_read_deadline() { deadline_.cancel(); }

  static asio::awaitable<bool> serve_one(std::shared_ptr<Connection> self, beast::flat_buffer& buffer);
  static asio::awaitable<bool> send_responses(std::shared_ptr<Connection> self);
  static asio::awaitable<void> watch_for_disconnect(std::shared_ptr<Connection> self, uint64_t turn);
  static asio::awaitable<bool> write_all(std::shared_ptr<Connection> self, std::string bytes);
  static asio::awaitable<void> refuse(std::shared_ptr<Connection> self, int status, std::string message);

  void enqueue(uint64_t turn, std::string bytes, bool last) {
    if (turn != turn_ || complete_ || broken_) return;
    unsent_bytes_ += bytes.size();
    if (unsent_bytes_ > shared_->config.max_unsent_bytes + bytes.size()) {
      ++shared_->slow_clients;
      log_warning("http: a client reads too slowly ({} bytes unsent, the limit is {}); it is disconnected",
                  unsent_bytes_, shared_->config.max_unsent_bytes);
      close();
      return;
    }
    if (!bytes.empty()) outgoing_.push_back(std::move(bytes));
    if (last) {
      complete_ = true;
      on_disconnect_ = nullptr;
    }
    wake_.cancel();
  }

  void notify_disconnect() {
    if (auto callback = std::exchange(on_disconnect_, nullptr)) callback();
  }

  std::string response_head(int status, std::string_view content_type,
                            const std::vector<std::pair<std::string, std::string>>& headers,
                            std::optional<size_t> content_length) const {
    std::string head = fmt::format("HTTP/1.1 {} {}\r\nServer: baton\r\nContent-Type: {}\r\n", status,
                                   reason_phrase(status), content_type);
    for (const auto& [name, value] : headers) head += fmt::format("{}: {}\r\n", name, value);
    if (content_length) {
      head += fmt::format("Content-Length: {}\r\n", *content_length);
    } else if (chunked_) {
      head += "Transfer-Encoding: chunked\r\nCache-Control: no-cache\r\n";
    } else {
      head += "Cache-Control: no-cache\r\n";
    }
    head += keep_alive_ ? "Connection: keep-alive\r\n\r\n" : "Connection: close\r\n\r\n";
    return head;
  }

  std::shared_ptr<Shared> shared_;  // first: holds the I/O context that the next ones use
  beast::tcp_stream stream_;
  asio::steady_timer wake_;  // cancelled to say: something to send, or the end
  asio::steady_timer deadline_;
  std::shared_ptr<asio::steady_timer> watch_pause_;
  bool expired_ = false;
  std::deque<std::string> outgoing_;
  uint64_t unsent_bytes_ = 0;
  uint64_t turn_ = 0;        // which request of the connection is being answered
  bool complete_ = false;    // the whole response is in outgoing_
  bool broken_ = false;
  bool keep_alive_ = true;
  bool chunked_ = true;      // HTTP/1.0 clients get an unframed stream
  std::function<void()> on_disconnect_;
};

class Connection::ExchangeImpl final : public Exchange {
 public:
  ExchangeImpl(std::shared_ptr<Connection> connection, HttpRequest request, uint64_t turn, bool head_only)
      : connection_(std::move(connection)), request_(std::move(request)), turn_(turn), head_only_(head_only) {}

  // A handler that drops its exchange without an answer must not leave the client waiting.
  ~ExchangeImpl() override {
    if (answered_) return;
    connection_->post([connection = connection_, turn = turn_] {
      if (connection->turn_ == turn && !connection->complete_) connection->close();
    });
  }

  const HttpRequest& request() const override { return request_; }
  std::string take_body() override { return std::exchange(request_.body, {}); }

  void respond(HttpResponse response) override {
    answered_ = true;
    on_strand([this_turn = turn_, head_only = head_only_,
               response = std::move(response)](Connection& connection) mutable {
      std::string bytes = connection.response_head(response.status, response.content_type, response.headers,
                                                   response.body.size());
      if (!head_only) bytes += response.body;
      connection.enqueue(this_turn, std::move(bytes), true);
    });
  }

  void start_stream(std::string content_type) override {
    on_strand([this_turn = turn_, content_type = std::move(content_type)](Connection& connection) {
      connection.enqueue(this_turn, connection.response_head(200, content_type, {}, std::nullopt), false);
    });
  }

  void write(std::string bytes) override {
    if (bytes.empty()) return;
    on_strand([this_turn = turn_, bytes = std::move(bytes)](Connection& connection) mutable {
      connection.enqueue(
          this_turn,
          connection.chunked_ ? fmt::format("{:x}\r\n{}\r\n", bytes.size(), bytes) : std::move(bytes), false);
    });
  }

  void finish() override {
    answered_ = true;
    on_strand([this_turn = turn_](Connection& connection) {
      connection.enqueue(this_turn, connection.chunked_ ? "0\r\n\r\n" : "", true);
    });
  }

  void post(std::function<void()> task) override {
    connection_->post(std::move(task));
  }

  void on_disconnect(std::function<void()> callback) override {
    on_strand([this_turn = turn_, callback = std::move(callback)](Connection& connection) mutable {
      if (this_turn != connection.turn_ || connection.complete_) return;
      if (connection.broken_) {
        callback();
      } else {
        connection.on_disconnect_ = std::move(callback);
      }
    });
  }

 private:
  template <typename Task>
  void on_strand(Task task) {
    connection_->post([connection = connection_, task = std::move(task)]() mutable { task(*connection); });
  }

  std::shared_ptr<Connection> connection_;
  HttpRequest request_;
  const uint64_t turn_;
  const bool head_only_;
  std::atomic<bool> answered_{false};
};

asio::awaitable<bool> Connection::write_all(std::shared_ptr<Connection> self, std::string bytes) {
  error_code error;
  self->stream_.expires_after(std::chrono::milliseconds(self->shared_->config.write_timeout_ms));
  co_await asio::async_write(self->stream_, asio::buffer(bytes),
                             asio::redirect_error(asio::use_awaitable, error));
  self->stream_.expires_never();
  co_return !error;
}

asio::awaitable<void> Connection::refuse(std::shared_ptr<Connection> self, int status, std::string message) {
  self->keep_alive_ = false;
  self->no_read_deadline();
  std::string body = error_body(message, "invalid_request_error");
  std::string head = self->response_head(status, "application/json", {}, body.size());
  if (!co_await write_all(self, head + body)) co_return;
  // What the client is still sending is read and dropped for a moment: closing at once would reset the
  // connection and take the answer with it.
  error_code error;
  self->stream_.socket().shutdown(tcp::socket::shutdown_send, error);
  std::array<char, 16384> scratch;
  size_t dropped = 0;
  while (!error && dropped < (64u << 20)) {
    self->stream_.expires_after(std::chrono::seconds(2));
    dropped += co_await self->stream_.async_read_some(asio::buffer(scratch),
                                                      asio::redirect_error(asio::use_awaitable, error));
  }
}

asio::awaitable<bool> Connection::serve_one(std::shared_ptr<Connection> self, beast::flat_buffer& buffer) {
  const ServerConfig& config = self->shared_->config;
  beast::http::request_parser<beast::http::string_body> parser;
  parser.header_limit(config.max_header_bytes);
  parser.body_limit(config.max_body_bytes);
  tcp::socket& socket = self->stream_.socket();
  error_code error;

  // The idle wait ends with the first byte; then the header has to come in time. Empty lines in front of a request
  // are skipped (RFC 9112, 2.2).
  self->read_deadline(config.idle_timeout_ms);
  for (size_t empty_lines = 0;;) {
    while (buffer.size() > 0) {
      char first = *static_cast<const char*>(buffer.data().data());
      if (first != '\r' && first != '\n') break;
      if (++empty_lines > 64) co_return false;
      buffer.consume(1);
    }
    if (buffer.size() > 0) break;
    buffer.shrink_to_fit();  // a waiting connection holds no memory of its last request
    auto space = buffer.prepare(4096);
    size_t got = co_await socket.async_read_some(space, asio::redirect_error(asio::use_awaitable, error));
    if (error) co_return false;
    buffer.commit(got);
  }
  self->read_deadline(config.header_timeout_ms);
  co_await beast::http::async_read_header(socket, buffer, parser, asio::redirect_error(asio::use_awaitable, error));
  if (error) {
    if (error == beast::http::error::header_limit || error == beast::http::error::buffer_overflow) {
      co_await refuse(self, 431, fmt::format("the request header is larger than {} bytes", config.max_header_bytes));
    } else if (self->expired_) {
      co_await refuse(self, 408, fmt::format("the request header took longer than {} ms", config.header_timeout_ms));
    } else if (error == beast::http::error::body_limit) {
      co_await refuse(self, 413, fmt::format("the request body is larger than {} bytes", config.max_body_bytes));
    } else if (error.category() == beast::http::make_error_code(beast::http::error::bad_method).category() &&
               error != beast::http::error::end_of_stream && error != beast::http::error::partial_message) {
      co_await refuse(self, 400, "not an HTTP request: " + error.message());
    }
    co_return false;
  }
  if (!parser.is_done() && beast::iequals(parser.get()[beast::http::field::expect], "100-continue")) {
    if (!co_await write_all(self, "HTTP/1.1 100 Continue\r\n\r\n")) co_return false;
  }
  self->read_deadline(config.body_timeout_ms);
  BodyShare share(*self->shared_);
  parser.eager(true);
  while (!parser.is_done() && !error) {
    co_await beast::http::async_read_some(socket, buffer, parser, asio::redirect_error(asio::use_awaitable, error));
    if (!error && !share.grow_to(parser.get().body().size())) {
      std::string().swap(parser.get().body());
      share.release();
      co_await refuse(self, 503, "the bodies of other requests take all memory for them; try again later");
      co_return false;
    }
  }
  self->no_read_deadline();
  if (error) {
    if (error == beast::http::error::body_limit) {
      co_await refuse(self, 413, fmt::format("the request body is larger than {} bytes", config.max_body_bytes));
    } else if (self->expired_) {
      co_await refuse(self, 408, fmt::format("the request body took longer than {} ms", config.body_timeout_ms));
    } else if (error.category() == beast::http::make_error_code(beast::http::error::bad_method).category() &&
               error != beast::http::error::partial_message) {
      co_await refuse(self, 400, "not an HTTP request: " + error.message());
    }
    co_return false;
  }

  auto message = parser.release();
  HttpRequest request;
  request.method = std::string(message.method_string());
  split_target({message.target().data(), message.target().size()}, &request);
  for (const auto& field : message.base()) {
    std::string name(field.name_string());
    std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
    request.headers.emplace_back(std::move(name), std::string(field.value()));
  }
  request.body = std::move(message.body());
  ++self->shared_->requests;
  ActiveRequest active(*self->shared_);

  self->keep_alive_ = message.keep_alive();
  self->chunked_ = message.version() >= 11;
  if (!self->chunked_ || self->shared_->last_responses) self->keep_alive_ = false;
  self->complete_ = false;
  uint64_t turn = ++self->turn_;
  bool head_only = request.method == "HEAD";
  {
    auto exchange = std::make_shared<ExchangeImpl>(self, std::move(request), turn, head_only);
    self->shared_->handler(std::move(exchange));
  }
  share.release();
  asio::co_spawn(self->stream_.get_executor(), watch_for_disconnect(self, turn), asio::detached);
  bool sent = co_await send_responses(self);
  self->on_disconnect_ = nullptr;
  if (self->watch_pause_) self->watch_pause_->cancel();
  co_return sent && self->keep_alive_;
}

/// Sends what the exchange hands over, until the response is complete. False: the connection is no more.
asio::awaitable<bool> Connection::send_responses(std::shared_ptr<Connection> self) {
  for (;;) {
    if (self->broken_) co_return false;
    if (!self->outgoing_.empty()) {
      // Several small events go out in one write.
      std::string batch = std::move(self->outgoing_.front());
      self->outgoing_.pop_front();
      while (!self->outgoing_.empty() && batch.size() < (64u << 10)) {
        batch += self->outgoing_.front();
        self->outgoing_.pop_front();
      }
      size_t bytes = batch.size();
      if (!co_await write_all(self, std::move(batch))) {
        self->close();
        co_return false;
      }
      self->unsent_bytes_ -= std::min<uint64_t>(bytes, self->unsent_bytes_);
      continue;
    }
    if (self->complete_) co_return true;
    error_code ignored;
    self->wake_.expires_at(asio::steady_timer::time_point::max());
    co_await self->wake_.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
  }
}

/// While a response is being made, an end of the client's stream means it has gone.
asio::awaitable<void> Connection::watch_for_disconnect(std::shared_ptr<Connection> self, uint64_t turn) {
  auto over = [&self, turn] { return self->broken_ || self->turn_ != turn || self->complete_; };
  error_code error;
  co_await self->stream_.socket().async_wait(tcp::socket::wait_read,
                                             asio::redirect_error(asio::use_awaitable, error));
  if (error || over()) co_return;
  char byte;
  ssize_t got = ::recv(self->stream_.socket().native_handle(), &byte, 1, MSG_PEEK | MSG_DONTWAIT);
  if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) co_return;
  if (got > 0) {
    // The next request, pipelined, or stray bytes: they wait their turn, and hide the end of the stream from a
    // reader. The kernel knows it.
    auto pause = std::make_shared<asio::steady_timer>(self->stream_.get_executor());
    self->watch_pause_ = pause;
    for (;;) {
      pollfd state{self->stream_.socket().native_handle(), POLLRDHUP, 0};
      if (::poll(&state, 1, 0) > 0) break;
      pause->expires_after(std::chrono::milliseconds(200));
      co_await pause->async_wait(asio::redirect_error(asio::use_awaitable, error));
      if (error || over()) co_return;
    }
  }
  self->close();
}

class ServerImpl final : public Server {
 public:
  explicit ServerImpl(ServerConfig config, RequestHandler handler)
      : shared_(std::make_shared<Shared>(config.threads)), io_(shared_->io), acceptor_(asio::make_strand(io_)) {
    shared_->config = std::move(config);
    shared_->handler = std::move(handler);
  }
  ~ServerImpl() override { stop(); }

  Status listen() {
    const ServerConfig& config = shared_->config;
    error_code error;
    tcp::resolver resolver(io_);
    std::string host = config.host;
    if (host.starts_with('[') && host.ends_with(']')) host = host.substr(1, host.size() - 2);  // IPv6 as in URLs
    auto endpoints = resolver.resolve(host, std::to_string(config.port), tcp::resolver::passive, error);
    if (error || endpoints.empty()) {
      return invalid_argument("cannot resolve the host '{}' to listen on: {}", config.host, error.message());
    }
    tcp::endpoint endpoint = endpoints.begin()->endpoint();
    acceptor_.open(endpoint.protocol(), error);
    if (!error) acceptor_.set_option(asio::socket_base::reuse_address(true), error);
    if (!error) acceptor_.bind(endpoint, error);
    if (!error) acceptor_.listen(1024, error);
    if (error) {
      return unavailable("cannot listen on {}:{}: {}; is another server there? choose another --port", config.host,
                         config.port, error.message());
    }
    port_ = acceptor_.local_endpoint().port();
    asio::co_spawn(acceptor_.get_executor(), accept_loop(this), asio::detached);
    for (int i = 0; i < config.threads; ++i) {
      threads_.emplace_back([this] { io_.run(); });
    }
    return {};
  }

  uint16_t port() const override { return port_; }
  ServerStats stats() const override {
    std::lock_guard lock(shared_->mutex);
    return {shared_->open, shared_->active, shared_->accepted, shared_->refused, shared_->requests, shared_->slow_clients};
  }

  void close_after_response() override { shared_->last_responses = true; }

  bool wait_sent(int64_t timeout_ms) override {
    std::unique_lock lock(shared_->mutex);
    return shared_->idle.wait_for(lock, std::chrono::milliseconds(std::max<int64_t>(0, timeout_ms)),
                                  [this] { return shared_->active == 0; });
  }

  void stop() override {
    if (threads_.empty()) return;
    shared_->stopping = true;
    asio::post(acceptor_.get_executor(), [this] {
      error_code ignored;
      acceptor_.close(ignored);
    });
    std::vector<std::shared_ptr<Connection>> connections;
    {
      std::lock_guard lock(shared_->mutex);
      for (Connection* connection : shared_->connections) {
        if (auto self = connection->weak_from_this().lock()) connections.push_back(std::move(self));
      }
    }
    for (auto& connection : std::exchange(connections, {})) {
      connection->post([connection] { connection->close(); });
    }
    // io_.run() ends by itself once the acceptor and every connection are gone; exchanges that handlers still hold
    // do not count as work.
    threads_.clear();
    {
      std::lock_guard lock(shared_->post_mutex);
      shared_->stopped = true;
    }
    io_.restart();  // for what was posted after the threads had ended
    io_.run();
  }

 private:
  static asio::awaitable<void> accept_loop(ServerImpl* server) {
    while (server->acceptor_.is_open()) {
      error_code error;
      tcp::socket socket(asio::make_strand(server->io_));
      co_await server->acceptor_.async_accept(socket, asio::redirect_error(asio::use_awaitable, error));
      if (error == asio::error::operation_aborted || error == asio::error::bad_descriptor) co_return;
      if (error) {
        // Out of file descriptors, mostly: wait a little, connections will end.
        log_warning("http: accept failed: {}", error.message());
        asio::steady_timer pause(server->acceptor_.get_executor(), std::chrono::milliseconds(100));
        co_await pause.async_wait(asio::redirect_error(asio::use_awaitable, error));
        continue;
      }
      ++server->shared_->accepted;
      error_code ignored;
      socket.set_option(tcp::no_delay(true), ignored);
      if (static_cast<int64_t>(server->shared_->open) >= server->shared_->config.max_connections) {
        ++server->shared_->refused;
        std::string body = error_body(fmt::format("{} connections are open, the limit; try again later",
                                                  server->shared_->config.max_connections), "overloaded_error");
        std::string answer = fmt::format(
            "HTTP/1.1 503 Service Unavailable\r\nServer: baton\r\nContent-Type: application/json\r\n"
            "Retry-After: 1\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{}", body.size(), body);
        ::send(socket.native_handle(), answer.data(), answer.size(), MSG_DONTWAIT | MSG_NOSIGNAL);
        continue;
      }
      auto executor = socket.get_executor();
      auto connection = std::make_shared<Connection>(std::move(socket), server->shared_);
      asio::co_spawn(executor, Connection::run(std::move(connection)), asio::detached);
    }
  }

  std::shared_ptr<Shared> shared_;
  asio::io_context& io_;
  tcp::acceptor acceptor_;
  uint16_t port_ = 0;
  std::vector<std::jthread> threads_;
};

}  // namespace

Result<std::unique_ptr<Server>> Server::start(ServerConfig config, RequestHandler handler) {
  BATON_RETURN_IF_ERROR(config.validate());
  auto server = std::make_unique<ServerImpl>(std::move(config), std::move(handler));
  BATON_RETURN_IF_ERROR(server->listen());
  return std::unique_ptr<Server>(std::move(server));
}

}  // namespace baton::http
