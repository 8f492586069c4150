#pragma once

#include <utility>  // Boost 1.74 forgets it

#include <boost/asio/awaitable.hpp>
#include <boost/asio/ip/tcp.hpp>
#include <boost/beast/core.hpp>
#include <cstdint>
#include <functional>
#include <optional>
#include <string>
#include <string_view>

#include "base/status.h"

namespace baton::ops {

struct Url {
  std::string host, port;
  static Result<Url> parse(const std::string& url);
};

/// One HTTP/1.1 connection of the load generator, kept alive over requests. Heavy header: only in src/ops .cc files.
class HttpClient {
 public:
  HttpClient(boost::asio::any_io_executor executor, Url url) : stream_(std::move(executor)), url_(std::move(url)) {}

  struct Reply {
    Status status;       ///< transport failures; an HTTP error is an ok reply with its code
    int code = 0;
    std::string body;    ///< what `on_data` did not take
  };
  /// Sends and reads the reply. `on_data` sees each piece of the body of a 200 as it comes; false from it closes the connection
  /// at once (a client that leaves) and gives kCancelled.
  static boost::asio::awaitable<Reply> request(HttpClient& client, std::string method, std::string path, std::string body,
                                               int64_t timeout_ms, std::function<bool(std::string_view)> on_data);

 private:
  void close();

  boost::beast::tcp_stream stream_;
  Url url_;
  bool connected_ = false;
};

}  // namespace baton::ops
