#include "worker/mailbox.h"

#include <chrono>
#include <utility>

#include "base/log.h"

namespace baton::worker {

bool Mailbox::post_frame(std::shared_ptr<protocol::Channel> channel, protocol::Frame frame) {
  size_t bytes = frame.ByteSizeLong();
  {
    std::lock_guard lock(mutex_);
    if (closed_) return true;
    if (frame_bytes_ > 0 && frame_bytes_ + bytes > max_frame_bytes_) return false;
    frame_bytes_ += bytes;
    events_.push_back(FrameArrived{std::move(channel), std::move(frame)});
  }
  not_empty_.notify_one();
  return true;
}

void Mailbox::post(Event event) {
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    events_.push_back(std::move(event));
  }
  not_empty_.notify_one();
}

std::vector<Event> Mailbox::take(int64_t timeout_ms) {
  std::unique_lock lock(mutex_);
  if (timeout_ms > 0) {
    not_empty_.wait_for(lock, std::chrono::milliseconds(timeout_ms), [this] { return !events_.empty() || woken_; });
  }
  woken_ = false;
  frame_bytes_ = 0;
  return std::exchange(events_, {});
}

void Mailbox::wake() {
  {
    std::lock_guard lock(mutex_);
    woken_ = true;
  }
  not_empty_.notify_one();
}

void Mailbox::close() {
  std::vector<Event> events;  // they own channels, so they go after the lock
  {
    std::lock_guard lock(mutex_);
    closed_ = true;
    events.swap(events_);
  }
}

protocol::ChannelHandler Mailbox::handler(std::shared_ptr<Mailbox> mailbox) {
  return {[mailbox](std::shared_ptr<protocol::Channel> channel, protocol::Frame&& frame) {
            if (mailbox->post_frame(channel, std::move(frame))) return;
            log_warning("{} sends faster than frames are handled; its channel is closed", channel->address());
            channel->close();
          },
          [mailbox](std::shared_ptr<protocol::Channel> channel, Status status) {
            mailbox->post(ChannelClosed{std::move(channel), std::move(status)});
          }};
}

}  // namespace baton::worker
