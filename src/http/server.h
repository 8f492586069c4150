#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/status.h"

/// A small HTTP/1.1 server on Boost.Asio/Beast: bounded, cancellable, made for server-sent events. It knows nothing
/// of OpenAI. Boost stays inside server.cc.
namespace baton::http {

struct ServerConfig {
  std::string host = "127.0.0.1";
  uint16_t port = 8000;              ///< 0: any free one
  int32_t threads = 1;
  int32_t max_connections = 4096;    ///< more are answered 503 and closed
  uint32_t max_header_bytes = 32 << 10;
  uint64_t max_body_bytes = 32 << 20;
  /// Bodies of all connections together while they come in; a request beyond it is answered 503.
  uint64_t max_bodies_bytes = 1 << 30;
  /// Unsent response bytes of one connection; a slower client is disconnected and its request cancelled.
  uint64_t max_unsent_bytes = 4 << 20;
  int64_t header_timeout_ms = 15'000;   ///< from the first byte of a request to the end of its header
  int64_t body_timeout_ms = 120'000;
  int64_t idle_timeout_ms = 120'000;    ///< between requests of a kept-alive connection
  int64_t write_timeout_ms = 60'000;    ///< a client that takes nothing for so long is disconnected

  Status validate() const;
};

struct HttpRequest {
  std::string method;
  std::string path;    ///< without scheme, host and query; percent-decoded
  std::string query;   ///< after '?', undecoded
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;  ///< names in lower case

  std::string_view header(std::string_view lower_case_name) const;
};

struct HttpResponse {
  int status = 200;
  std::string content_type = "application/json";
  std::string body;
  std::vector<std::pair<std::string, std::string>> headers;
};

/// One request and its response. Functions may be called from any thread until the response is complete;
/// what comes later is ignored. The exchange keeps its connection alive while somebody holds it, and may
/// outlive the server: then it does nothing.
class Exchange {
 public:
  virtual ~Exchange() = default;
  virtual const HttpRequest& request() const = 0;
  /// Moves the body out: who has parsed it need not keep it as long as the response takes. Only in the handler.
  virtual std::string take_body() = 0;
  /// The whole response at once.
  virtual void respond(HttpResponse response) = 0;
  /// Starts a chunked response ("text/event-stream"); then write() and finish().
  virtual void start_stream(std::string content_type) = 0;
  virtual void write(std::string bytes) = 0;
  virtual void finish() = 0;
  /// Runs `task` on the connection's own serial executor: the place for detokenizing and rendering.
  virtual void post(std::function<void()> task) = 0;
  /// Runs once on the connection's executor when the client goes away (or is too slow) before the response is complete.
  /// At most one; set it before the first response call.
  virtual void on_disconnect(std::function<void()> callback) = 0;
};

using RequestHandler = std::function<void(std::shared_ptr<Exchange>)>;

struct ServerStats {
  uint64_t connections = 0;        ///< open now
  uint64_t active = 0;             ///< requests whose response is not wholly sent
  uint64_t accepted = 0, refused = 0, requests = 0, slow_clients = 0;
};

class Server {
 public:
  /// Binds and starts its threads. `handler` runs on I/O threads and must not block. Errors: unavailable with host
  /// and port when the address is taken.
  static Result<std::unique_ptr<Server>> start(ServerConfig config, RequestHandler handler);
  virtual ~Server() = default;
  virtual uint16_t port() const = 0;
  virtual ServerStats stats() const = 0;
  /// Answers that come from now on close their connection.
  virtual void close_after_response() = 0;
  /// Waits until every response is wholly sent, at most `timeout_ms`. False: some were not.
  virtual bool wait_sent(int64_t timeout_ms) = 0;
  /// Closes everything and joins the threads. Disconnect callbacks run. Idempotent.
  virtual void stop() = 0;
};

}  // namespace baton::http
