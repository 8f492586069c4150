#include "transfer/control_linger.h"

#include <algorithm>

namespace baton::transfer {

void LingeringSockets::add(uint64_t id, std::unique_ptr<FrameSocket> socket, int64_t now_ns) {
  sockets_.push_back({id, std::move(socket), now_ns + kLongestNs});
  while (sockets_.size() > kMost || (sockets_.size() > 1 && bytes() > kMostBytes)) sockets_.pop_front();
}

bool LingeringSockets::handle(uint64_t id) {
  auto it = std::find_if(sockets_.begin(), sockets_.end(), [&](const Socket& one) { return one.id == id; });
  if (it == sockets_.end()) return false;
  std::deque<FrameSocket::Frame> unread;
  // Unread words would turn the end of the connection into a reset.
  const bool open = it->socket->receive(unread).ok() && it->socket->flush().ok();
  if (!open || !it->socket->unsent()) sockets_.erase(it);
  return true;
}

void LingeringSockets::expire(int64_t now_ns) {
  while (!sockets_.empty() && sockets_.front().until_ns <= now_ns) sockets_.pop_front();
}

size_t LingeringSockets::bytes() const {
  size_t sum = 0;
  for (const Socket& one : sockets_) sum += one.socket->unsent_bytes();
  return sum;
}

}  // namespace baton::transfer
