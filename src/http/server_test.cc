#include "http/server.h"

#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <future>
#include <mutex>
#include <string>

#include "base/status.h"
#include "base/unique_handle.h"

namespace baton::http {
namespace {

/// A raw client socket: the tests decide about every byte.
class Client {
 public:
  explicit Client(uint16_t port) : fd_(::socket(AF_INET, SOCK_STREAM, 0)) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    EXPECT_EQ(::connect(fd_.get(), reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  }
  void send(std::string_view bytes) {
    EXPECT_EQ(::send(fd_.get(), bytes.data(), bytes.size(), MSG_NOSIGNAL), static_cast<ssize_t>(bytes.size()));
  }
  /// Reads until `end` was seen or the server closed.
  std::string read_until(std::string_view end) {
    while (seen_.find(end) == std::string::npos) {
      char buffer[4096];
      ssize_t got = ::recv(fd_.get(), buffer, sizeof(buffer), 0);
      if (got <= 0) break;
      seen_.append(buffer, got);
    }
    return seen_;
  }
  std::string read_to_close() { return read_until("\x01never\x01"); }
  void close() { fd_.reset(); }
  void forget() { seen_.clear(); }

 private:
  FileDescriptor fd_;
  std::string seen_;
};

std::unique_ptr<Server> start(RequestHandler handler, ServerConfig config = {}) {
  config.port = 0;
  auto server = Server::start(config, std::move(handler));
  EXPECT_TRUE(server.ok()) << server.status().to_string();
  return std::move(server).value();
}

void echo(std::shared_ptr<Exchange> exchange) {
  exchange->respond({200, "text/plain", exchange->request().method + " " + exchange->request().path + " " +
                                            exchange->request().query + " " + exchange->request().body, {}});
}

TEST(HttpServer, KeepsAConnectionAliveAndAnswersPipelinedRequestsInOrder) {
  auto server = start(echo);
  Client client(server->port());
  client.send("GET /a?x=1 HTTP/1.1\r\nHost: h\r\n\r\nPOST /b HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\n\r\nhi");
  std::string seen = client.read_until("POST /b  hi");
  EXPECT_NE(seen.find("GET /a x=1 "), std::string::npos) << seen;
  EXPECT_LT(seen.find("GET /a"), seen.find("POST /b  hi"));
}

TEST(HttpServer, StreamsChunks) {
  auto server = start([](std::shared_ptr<Exchange> exchange) {
    exchange->start_stream("text/event-stream");
    exchange->write("data: 1\n\n");
    exchange->write("data: 2\n\n");
    exchange->finish();
  });
  Client client(server->port());
  client.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  std::string seen = client.read_until("0\r\n\r\n");
  EXPECT_NE(seen.find("Transfer-Encoding: chunked"), std::string::npos);
  EXPECT_NE(seen.find("9\r\ndata: 1\n\n\r\n9\r\ndata: 2\n\n\r\n0\r\n\r\n"), std::string::npos) << seen;
}

TEST(HttpServer, TellsTheHandlerWhenTheClientGoes) {
  std::promise<void> gone;
  std::promise<void> started;
  std::shared_ptr<Exchange> kept;
  auto server = start([&](std::shared_ptr<Exchange> exchange) {
    exchange->on_disconnect([&] { gone.set_value(); });
    exchange->start_stream("text/event-stream");
    kept = std::move(exchange);
    started.set_value();
  });
  Client client(server->port());
  client.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  started.get_future().wait();
  client.read_until("\r\n\r\n");
  client.close();
  EXPECT_EQ(gone.get_future().wait_for(std::chrono::seconds(20)), std::future_status::ready);
  kept->write("late");  // ignored
  kept.reset();
  server->stop();
}

TEST(HttpServer, DisconnectsAClientThatDoesNotRead) {
  std::promise<void> gone;
  std::shared_ptr<Exchange> kept;
  std::promise<void> started;
  ServerConfig config;
  config.max_unsent_bytes = 64 << 10;
  auto server = start([&](std::shared_ptr<Exchange> exchange) {
    exchange->on_disconnect([&] { gone.set_value(); });
    exchange->start_stream("text/event-stream");
    kept = exchange;
    started.set_value();
  }, config);
  Client client(server->port());
  client.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  started.get_future().wait();
  auto future = gone.get_future();
  for (int i = 0; i < 100000 && future.wait_for(std::chrono::seconds(0)) != std::future_status::ready; ++i) {
    kept->write(std::string(4096, 'x'));
  }
  EXPECT_EQ(future.wait_for(std::chrono::seconds(20)), std::future_status::ready);
  EXPECT_EQ(server->stats().slow_clients, 1u);
  kept.reset();
}

TEST(HttpServer, RefusesWhatIsTooLargeOrBroken) {
  ServerConfig config;
  config.max_body_bytes = 2048;
  config.max_header_bytes = 2048;
  auto server = start(echo, config);
  {
    Client client(server->port());
    client.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 4096\r\n\r\n");
    std::string seen = client.read_to_close();
    EXPECT_NE(seen.find("HTTP/1.1 413"), std::string::npos) << seen;
    EXPECT_NE(seen.find("larger than 2048 bytes"), std::string::npos) << seen;
  }
  {
    Client client(server->port());
    client.send("GET / HTTP/1.1\r\nHost: h\r\nX: " + std::string(4000, 'a') + "\r\n\r\n");
    EXPECT_NE(client.read_to_close().find("HTTP/1.1 431"), std::string::npos);
  }
  {
    Client client(server->port());
    client.send("this is not http\r\n\r\n");
    EXPECT_NE(client.read_to_close().find("HTTP/1.1 400"), std::string::npos);
  }
  {
    Client client(server->port());
    client.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n");
    client.read_until("100 Continue");
    client.send("ok");
    EXPECT_NE(client.read_until("POST /  ok").find("POST /  ok"), std::string::npos);
  }
}

TEST(HttpServer, RefusesConnectionsBeyondTheLimit) {
  ServerConfig config;
  config.max_connections = 1;
  auto server = start(echo, config);
  Client first(server->port());
  first.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  first.read_until("GET /");
  Client second(server->port());
  EXPECT_NE(second.read_to_close().find("HTTP/1.1 503"), std::string::npos);
}

TEST(HttpServer, AHandlerThatForgetsToAnswerClosesTheConnection) {
  auto server = start([](std::shared_ptr<Exchange>) {});
  Client client(server->port());
  client.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  EXPECT_EQ(client.read_to_close(), "");
}

TEST(HttpServer, TellsASlowClientThatItsTimeIsOver) {
  ServerConfig config;
  config.header_timeout_ms = 50;
  config.body_timeout_ms = 50;
  auto server = start(echo, config);
  Client header(server->port());
  header.send("GET / HTTP/1.1\r\nHost");
  std::string seen = header.read_to_close();
  EXPECT_NE(seen.find("HTTP/1.1 408"), std::string::npos) << seen;
  Client body(server->port());
  body.send("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: 5\r\n\r\nab");
  seen = body.read_to_close();
  EXPECT_NE(seen.find("HTTP/1.1 408"), std::string::npos) << seen;
  EXPECT_NE(seen.find("body took longer"), std::string::npos) << seen;
}

TEST(HttpServer, BodiesTogetherAreBounded) {
  ServerConfig config;
  config.max_body_bytes = 100'000;
  config.max_bodies_bytes = 50'000;
  auto server = start(echo, config);
  auto head = [](size_t bytes) { return fmt::format("POST / HTTP/1.1\r\nHost: h\r\nContent-Length: {}\r\n\r\n", bytes); };
  Client large(server->port());
  large.send(head(80'000) + std::string(80'000, 'a'));
  EXPECT_NE(large.read_to_close().find("HTTP/1.1 503"), std::string::npos);
  // What was taken is given back: after the refusal, and after each request of a connection.
  Client client(server->port());
  for (int i = 0; i < 3; ++i) {
    client.forget();
    client.send(head(40'000) + std::string(40'000, 'c'));
    EXPECT_NE(client.read_until(std::string(40'000, 'c')).find("HTTP/1.1 200"), std::string::npos);
  }
}

TEST(HttpServer, TargetsMayBeEncodedOrWholeUrls) {
  auto server = start(echo);
  Client client(server->port());
  client.send("\r\nGET HTTP://h:80/a%2Fb%20c%zz?q=%41 HTTP/1.1\r\nHost: h\r\n\r\n");
  std::string seen = client.read_until("q=%41 ");
  EXPECT_NE(seen.find("GET /a/b c%zz q=%41 "), std::string::npos) << seen;
  client.forget();
  client.send("GET http://h HTTP/1.1\r\nHost: h\r\n\r\n");
  EXPECT_NE(client.read_until("GET /  ").find("GET /  "), std::string::npos);
}

TEST(HttpServer, NoticesThatAClientWithBytesUnreadIsGone) {
  std::promise<void> gone, started;
  std::shared_ptr<Exchange> kept;
  auto server = start([&](std::shared_ptr<Exchange> exchange) {
    exchange->on_disconnect([&] { gone.set_value(); });
    kept = std::move(exchange);
    started.set_value();
  });
  Client client(server->port());
  client.send("GET / HTTP/1.1\r\nHost: h\r\n\r\nGET /next HTTP/1.1\r\nHost: h\r\n\r\n");
  started.get_future().wait();
  client.close();
  EXPECT_EQ(gone.get_future().wait_for(std::chrono::seconds(20)), std::future_status::ready);
  server->stop();
  kept.reset();
}

TEST(HttpServer, WaitsUntilTheLastByteIsSent) {
  std::promise<std::shared_ptr<Exchange>> arrived;
  auto server = start([&](std::shared_ptr<Exchange> exchange) { arrived.set_value(std::move(exchange)); });
  Client client(server->port());
  client.send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  std::shared_ptr<Exchange> exchange = arrived.get_future().get();
  EXPECT_EQ(server->stats().active, 1u);
  EXPECT_FALSE(server->wait_sent(1));
  exchange->respond({200, "text/plain", std::string(256 << 10, 'x') + "end", {}});
  EXPECT_TRUE(client.read_until("xend").ends_with("xend"));
  EXPECT_TRUE(server->wait_sent(20'000));
  server->stop();
}

TEST(HttpServer, AnExchangeMayOutliveItsServer) {
  std::promise<std::shared_ptr<Exchange>> arrived;
  auto server = start([&](std::shared_ptr<Exchange> exchange) { arrived.set_value(std::move(exchange)); });
  auto client = std::make_unique<Client>(server->port());
  client->send("GET / HTTP/1.1\r\nHost: h\r\n\r\n");
  std::shared_ptr<Exchange> exchange = arrived.get_future().get();
  server.reset();
  exchange->post([] { FAIL() << "there is no server any more"; });
  exchange->start_stream("text/plain");
  exchange->write("late");
  EXPECT_EQ(exchange->request().path, "/");
  exchange.reset();
}

TEST(HttpServer, ListensOnIPv6WithAndWithoutBrackets) {
  for (const char* host : {"::1", "[::1]"}) {
    ServerConfig config;
    config.port = 0;
    config.host = host;
    auto server = Server::start(config, echo);
    if (!server.ok() && server.status().message().find("assign") != std::string::npos) GTEST_SKIP() << "no IPv6 here";
    EXPECT_TRUE(server.ok()) << server.status().to_string();
  }
}

TEST(HttpServer, SaysWhichAddressIsTaken) {
  auto server = start(echo);
  ServerConfig config;
  config.port = server->port();
  auto second = Server::start(config, echo);
  ASSERT_FALSE(second.ok());
  EXPECT_NE(second.status().message().find(std::to_string(config.port)), std::string::npos);
}

}  // namespace
}  // namespace baton::http
