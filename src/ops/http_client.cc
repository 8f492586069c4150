#include "ops/http_client.h"

#include <algorithm>
#include <array>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <boost/beast/http.hpp>
#include <chrono>
#include <limits>

namespace baton::ops {

namespace asio = boost::asio;
namespace beast = boost::beast;
using boost::system::error_code;

Result<Url> Url::parse(const std::string& url) {
  constexpr std::string_view kScheme = "http://";
  if (!url.starts_with(kScheme)) {
    return invalid_argument("'{}' is not a URL of the form http://HOST:PORT (TLS is not supported)", url);
  }
  std::string rest = url.substr(kScheme.size());
  rest = rest.substr(0, rest.find('/'));
  Url result;
  if (rest.starts_with('[')) {  // an IPv6 address
    size_t close = rest.find(']');
    if (close == std::string::npos) return invalid_argument("'{}' has a [ without its ]", url);
    result.host = rest.substr(1, close - 1);
    result.port = rest.size() == close + 1 ? "80" : rest.substr(std::min(close + 2, rest.size()));
  } else {
    size_t colon = rest.rfind(':');
    result.host = rest.substr(0, colon);
    result.port = colon == std::string::npos ? "80" : rest.substr(colon + 1);
  }
  if (result.host.empty() || result.port.empty()) return invalid_argument("'{}' names no host or port", url);
  return result;
}

void HttpClient::close() {
  error_code ignored;
  stream_.socket().close(ignored);
  connected_ = false;
}

asio::awaitable<HttpClient::Reply> HttpClient::request(HttpClient& client, std::string method, std::string path,
                                                       std::string body, int64_t timeout_ms,
                                                       std::function<bool(std::string_view)> on_data) {
  Reply reply;
  error_code error;
  auto token = [&error] { return asio::redirect_error(asio::use_awaitable, error); };
  auto failed = [&](std::string_view what) {
    reply.status = unavailable("{} {}:{}: {}", what, client.url_.host, client.url_.port, error.message());
    client.close();
  };
  client.stream_.expires_after(std::chrono::milliseconds(timeout_ms));
  if (!client.connected_) {
    asio::ip::tcp::resolver resolver(client.stream_.get_executor());
    auto endpoints = co_await resolver.async_resolve(client.url_.host, client.url_.port, token());
    if (error) {
      failed("cannot resolve");
      co_return reply;
    }
    co_await client.stream_.async_connect(endpoints, token());
    if (error) {
      failed("cannot connect to");
      co_return reply;
    }
    error_code ignored;
    client.stream_.socket().set_option(asio::ip::tcp::no_delay(true), ignored);
    client.connected_ = true;
  }
  beast::http::request<beast::http::string_body> message(beast::http::string_to_verb(method), path, 11);
  bool ipv6 = client.url_.host.find(':') != std::string::npos;
  message.set(beast::http::field::host, (ipv6 ? "[" + client.url_.host + "]" : client.url_.host) + ":" + client.url_.port);
  message.set(beast::http::field::content_type, "application/json");
  message.keep_alive(true);
  message.body() = std::move(body);
  message.prepare_payload();
  co_await beast::http::async_write(client.stream_, message, token());
  if (error) {
    failed("cannot send to");
    co_return reply;
  }
  beast::flat_buffer buffer;
  beast::http::response_parser<beast::http::buffer_body> parser;
  parser.body_limit(std::numeric_limits<std::uint64_t>::max());
  co_await beast::http::async_read_header(client.stream_, buffer, parser, token());
  if (error) {
    failed("no answer from");
    co_return reply;
  }
  reply.code = static_cast<int>(parser.get().result_int());
  std::array<char, 16384> piece;
  while (!parser.is_done()) {
    parser.get().body().data = piece.data();
    parser.get().body().size = piece.size();
    co_await beast::http::async_read_some(client.stream_, buffer, parser, token());
    if (error == beast::http::error::need_buffer) error = {};
    if (error) {
      failed("the answer breaks off from");
      co_return reply;
    }
    std::string_view data(piece.data(), piece.size() - parser.get().body().size);
    if (data.empty()) continue;
    if (reply.code != 200 || !on_data) {
      reply.body += data;
    } else if (!on_data(data)) {
      client.close();
      reply.status = cancelled("the client left");
      co_return reply;
    }
  }
  if (!parser.get().keep_alive()) client.close();
  client.stream_.expires_never();
  co_return reply;
}

}  // namespace baton::ops
