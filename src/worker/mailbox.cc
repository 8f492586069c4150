#include "worker/mailbox.h"

#include <algorithm>
#include <chrono>
#include <thread>
#include <utility>

#include "base/clock.h"
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
    ready_.store(true);
  }
  not_empty_.notify_one();
  return true;
}

void Mailbox::post(Event event) {
  {
    std::lock_guard lock(mutex_);
    if (closed_) return;
    events_.push_back(std::move(event));
    ready_.store(true);
  }
  not_empty_.notify_one();
}

std::vector<Event> Mailbox::take(int64_t timeout_ns, int64_t awake_ns) {
  const Clock& clock = SteadyClock::instance();
  const auto poll_until = [&](int64_t end_ns) {
    while (!ready_.load() && clock.now_ns() < end_ns) std::this_thread::yield();
  };
  const int64_t begin_ns = timeout_ns > 0 ? clock.now_ns() : 0, end_ns = begin_ns + timeout_ns;
  if (timeout_ns > 0) poll_until(std::min(awake_until_ns_.load(), end_ns));
  if (timeout_ns > awake_ns) {
    std::unique_lock lock(mutex_);
    const auto sleep_until = std::chrono::steady_clock::time_point(std::chrono::nanoseconds(end_ns - awake_ns));
    not_empty_.wait_until(lock, sleep_until, [this] { return ready_.load(); });
  }
  if (timeout_ns > 0 && awake_ns > 0) poll_until(end_ns);
  std::lock_guard lock(mutex_);
  ready_.store(false);
  frame_bytes_ = 0;
  return std::exchange(events_, {});
}

void Mailbox::wake() {
  {
    std::lock_guard lock(mutex_);
    ready_.store(true);
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

void Mailbox::note(const protocol::Frame& frame) {
  if (awake_ms_ == 0) return;
  const bool heads_up = frame.has_heads_up();
  awake_until_ns_.store(heads_up ? SteadyClock::instance().now_ns() + awake_ms_ * 1'000'000 : 0);
}

protocol::ChannelHandler Mailbox::handler(std::shared_ptr<Mailbox> mailbox) {
  return {[mailbox](std::shared_ptr<protocol::Channel> channel, protocol::Frame&& frame) {
            mailbox->note(frame);
            if (mailbox->post_frame(channel, std::move(frame))) return;
            log_warning("{} sends faster than frames are handled; its channel is closed", channel->address());
            channel->close();
          },
          [mailbox](std::shared_ptr<protocol::Channel> channel, Status status) {
            mailbox->post(ChannelClosed{std::move(channel), std::move(status)});
          },
          std::shared_ptr<const std::atomic<int64_t>>(mailbox, &mailbox->awake_until_ns_)};
}

}  // namespace baton::worker
