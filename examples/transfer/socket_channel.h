#pragma once

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <sys/time.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

/// The "out of band" of the example: strings over a TCP connection. A serving system has its own (gRPC, HTTP, etcd);
/// the transfer library does not care how metadata, tags and counts get to the other side. Like it, whoever waits here waits for a
/// bounded time: nothing tells TCP that a link is gone.
class SocketChannel {
 public:
  static constexpr int kTimeoutSeconds = 20;

  static SocketChannel accept_on(const std::string& ip, uint16_t port) {
    int listener = ::socket(AF_INET, SOCK_STREAM, 0);
    int yes = 1;
    ::setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
    sockaddr_in address = make_address(ip, port);
    socklen_t size = sizeof(address);
    if (::bind(listener, reinterpret_cast<sockaddr*>(&address), size) != 0 || ::listen(listener, 1) != 0 ||
        ::getsockname(listener, reinterpret_cast<sockaddr*>(&address), &size) != 0) {
      fail("listening");
    }
    std::printf("listening on %s %d\n", ip.c_str(), ntohs(address.sin_port));
    std::fflush(stdout);
    SocketChannel channel(::accept(listener, nullptr, nullptr));
    ::close(listener);
    return channel;
  }
  static SocketChannel connect_to(const std::string& ip, uint16_t port) {
    SocketChannel channel(::socket(AF_INET, SOCK_STREAM, 0));
    sockaddr_in address = make_address(ip, port);
    if (::connect(channel.fd_, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) fail("connecting");
    return channel;
  }
  SocketChannel(SocketChannel&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  ~SocketChannel() {
    if (fd_ >= 0) ::close(fd_);
  }

  /// The address of this host on the way to the other side.
  std::string local_ip() const {
    sockaddr_in address{};
    socklen_t size = sizeof(address);
    char text[INET_ADDRSTRLEN] = "";
    ::getsockname(fd_, reinterpret_cast<sockaddr*>(&address), &size);
    ::inet_ntop(AF_INET, &address.sin_addr, text, sizeof(text));
    return text;
  }

  void send(const std::string& text) {
    uint32_t size = htonl(static_cast<uint32_t>(text.size()));
    write_all(&size, sizeof(size));
    write_all(text.data(), text.size());
  }
  std::string receive() {
    uint32_t size = 0;
    read_all(&size, sizeof(size));
    size = ntohl(size);
    if (size > (1u << 20)) fail("a message that is too long");
    std::string text(size, '\0');
    read_all(text.data(), text.size());
    return text;
  }

 private:
  explicit SocketChannel(int fd) : fd_(fd) {
    if (fd_ < 0) fail("socket");
    const timeval timeout{kTimeoutSeconds, 0};
    if (::setsockopt(fd_, SOL_SOCKET, SO_RCVTIMEO, &timeout, sizeof(timeout)) != 0 ||
        ::setsockopt(fd_, SOL_SOCKET, SO_SNDTIMEO, &timeout, sizeof(timeout)) != 0) {
      fail("setsockopt");
    }
  }
  static sockaddr_in make_address(const std::string& ip, uint16_t port) {
    sockaddr_in address{};
    address.sin_family = AF_INET;
    address.sin_port = htons(port);
    if (::inet_pton(AF_INET, ip.c_str(), &address.sin_addr) != 1) fail("an IPv4 address is needed");
    return address;
  }
  void write_all(const void* data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
      ssize_t n = ::send(fd_, static_cast<const char*>(data) + done, bytes - done, MSG_NOSIGNAL);
      if (n <= 0) fail("the other side is gone or silent");
      done += static_cast<size_t>(n);
    }
  }
  void read_all(void* data, size_t bytes) {
    for (size_t done = 0; done < bytes;) {
      ssize_t n = ::recv(fd_, static_cast<char*>(data) + done, bytes - done, 0);
      if (n <= 0) fail("the other side is gone or silent");
      done += static_cast<size_t>(n);
    }
  }
  [[noreturn]] static void fail(const char* what) {
    std::perror(what);
    std::exit(1);
  }

  int fd_;
};
