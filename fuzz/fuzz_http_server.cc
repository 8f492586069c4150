// Bytes from a client into the HTTP server, through a real socket: it must answer or close, never crash or hang.
#include <arpa/inet.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <memory>

#include "base/check.h"
#include "base/log.h"
#include "base/unique_handle.h"
#include "http/server.h"

namespace {

std::unique_ptr<baton::http::Server> start() {
  baton::set_log_level(baton::LogLevel::kError);
  baton::http::ServerConfig config;
  config.port = 0;
  config.max_body_bytes = 4096;
  config.max_header_bytes = 2048;
  auto server = baton::http::Server::start(config, [](std::shared_ptr<baton::http::Exchange> exchange) {
    std::string seen = exchange->request().method + exchange->request().path + exchange->request().query;
    if (exchange->request().body.size() % 2 == 0) return exchange->respond({200, "text/plain", std::move(seen), {}});
    exchange->start_stream("text/event-stream");
    exchange->write(std::move(seen));
    exchange->finish();
  });
  BATON_CHECK(server.ok()) << server.status().to_string();
  return std::move(server).value();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  // Never destroyed: its threads live as long as the fuzzer.
  static baton::http::Server* server = start().release();
  baton::FileDescriptor fd(::socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0));
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(server->port());
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  // RST at close: thousands of connections must not pile up in TIME_WAIT.
  linger reset{1, 0};
  ::setsockopt(fd.get(), SOL_SOCKET, SO_LINGER, &reset, sizeof(reset));
  ::connect(fd.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address));
  pollfd waiting{fd.get(), POLLOUT, 0};
  ::poll(&waiting, 1, 1000);
  size_t sent = 0;
  while (sent < size) {
    ssize_t wrote = ::send(fd.get(), data + sent, size - sent, MSG_NOSIGNAL);
    if (wrote <= 0) break;
    sent += static_cast<size_t>(wrote);
  }
  ::shutdown(fd.get(), SHUT_WR);
  // The server sees the end of input, so it has to close in the end.
  char buffer[4096];
  for (;;) {
    waiting = {fd.get(), POLLIN, 0};
    int ready = ::poll(&waiting, 1, 20'000);
    BATON_CHECK(ready > 0) << "the server neither answers nor closes";
    if (::recv(fd.get(), buffer, sizeof(buffer), 0) <= 0) break;
  }
  return 0;
}
