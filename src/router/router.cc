#include "router/router.h"

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <variant>

#include "base/bounded_queue.h"
#include "base/log.h"
#include "base/random.h"

namespace baton {

namespace {

struct Submit {
  uint64_t id;
  RouterRequest body;
  RouterEventSink sink;
};
struct CancelRequest {
  uint64_t id;
};
struct FrameArrived {
  std::shared_ptr<protocol::Channel> channel;
  protocol::Frame frame;
};
struct ChannelClosed {
  std::shared_ptr<protocol::Channel> channel;
  Status status;
};
using Mail = std::variant<Submit, CancelRequest, FrameArrived, ChannelClosed>;

// Frames are the bulk: one per worker and step. The bound is far above what a live router leaves unread.
constexpr size_t kMailboxCapacity = 1 << 18;

}  // namespace

struct Router::Impl {
  Impl(RouterConfig config, protocol::Network& network)
      : max_requests(config.max_requests),
        core(std::move(config), SteadyClock::instance(), network,
             protocol::ChannelHandler{
                 [this](std::shared_ptr<protocol::Channel> channel, protocol::Frame&& frame) {
                   std::shared_ptr<protocol::Channel> sender = channel;
                   if (!mailbox.try_push(FrameArrived{std::move(channel), std::move(frame)})) {
                     sender->close();
                   }
                 },
                 [this](std::shared_ptr<protocol::Channel> channel, Status status) {
                   (void)mailbox.try_push(ChannelClosed{std::move(channel), std::move(status)});
                 }}) {
    thread = std::jthread([this](std::stop_token stop) { run(stop); });
  }

  ~Impl() { stop(); }

  void stop() {
    if (!thread.joinable()) return;
    thread.request_stop();
    mailbox.wake();
    thread.join();
  }

  void run(std::stop_token stop) {
    core.start();
    publish();
    while (!stop.stop_requested()) {
      int64_t wait_ns = core.next_tick_ns() - SteadyClock::instance().now_ns();
      std::vector<Mail> mails = mailbox.pop_all(std::max<int64_t>(1, wait_ns / 1'000'000));
      for (Mail& mail : mails) std::visit([this](auto& item) { handle(item); }, mail);
      int64_t now = SteadyClock::instance().now_ns();
      if (now >= next_tick_ns) {
        core.tick();
        publish(false);
        next_tick_ns = core.next_tick_ns();
      }
    }
    mailbox.close();
    for (Mail& mail : mailbox.pop_all()) {
      if (auto* submit = std::get_if<Submit>(&mail)) {
        refuse(*submit, unavailable("the router is shutting down"));
      }
    }
    core.shutdown();
    {
      std::lock_guard lock(mutex);
      stopped = true;
    }
    publish();
  }

  void handle(Submit& submit) {
    uint64_t id = submit.id;
    // Counts the request out when its last event is delivered.
    RouterEventSink counted = [this, sink = submit.sink](RouterEvent&& event) {
      if (event.finished) inside.fetch_sub(1, std::memory_order_relaxed);
      sink(std::move(event));
    };
    live.insert(id);
    Status status = core.submit(id, std::move(submit.body),
                                [this, id, counted = std::move(counted)](RouterEvent&& event) {
                                  if (event.finished) live.erase(id);
                                  counted(std::move(event));
                                });
    if (!status.ok()) {
      live.erase(id);
      refuse(submit, status);
    }
  }
  void refuse(Submit& submit, const Status& status) {
    inside.fetch_sub(1, std::memory_order_relaxed);
    RouterEvent event;
    event.request = submit.id;
    event.finished = true;
    event.status = status;
    submit.sink(std::move(event));
  }
  void handle(CancelRequest& cancel) {
    if (live.erase(cancel.id) == 0) return;
    inside.fetch_sub(1, std::memory_order_relaxed);
    core.cancel(cancel.id);
  }
  void handle(FrameArrived& mail) {
    bool changes_health = mail.frame.has_hello() || mail.frame.has_load();
    bool changes_metrics = mail.frame.has_hello() || !mail.frame.load().metrics().empty();
    core.on_frame(mail.channel, std::move(mail.frame));
    if (changes_health) publish(changes_metrics);
  }
  void handle(ChannelClosed& mail) {
    core.on_closed(mail.channel, mail.status);
    publish();
  }

  /// Lets other threads see what has changed. The workers' metrics are much text and come once a second; health changes
  /// many times a second.
  void publish(bool with_metrics = true) {
    RouterHealth fresh = core.health();
    std::vector<std::pair<std::string, std::string>> fresh_metrics;
    for (const auto& worker : core.registry().entries()) {
      if (!with_metrics || worker->metrics.empty()) continue;
      fresh_metrics.emplace_back(worker->hello.name().empty() ? worker->address : worker->hello.name(), worker->metrics);
    }
    {
      std::lock_guard lock(mutex);
      max_model_len.store(fresh.max_model_len, std::memory_order_relaxed);
      health = std::move(fresh);
      if (with_metrics) metrics = std::move(fresh_metrics);
      stats = core.stats();
    }
    changed.notify_all();
  }

  const int64_t max_requests;
  BoundedQueue<Mail> mailbox{kMailboxCapacity};
  std::atomic<int64_t> inside{0};
  std::atomic<int32_t> max_model_len{0};
  RouterCore core;
  std::unordered_set<uint64_t> live;  // router thread only
  int64_t next_tick_ns = 0;

  mutable std::mutex mutex;  // guards what other threads read
  mutable std::condition_variable changed;
  bool stopped = false;
  RouterHealth health;
  std::vector<std::pair<std::string, std::string>> metrics;
  RouterStats stats;

  std::jthread thread;  // last: joined before anything it uses goes away
};

Router::Router(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
Router::~Router() = default;

Result<std::unique_ptr<Router>> Router::start(RouterConfig config, protocol::Network& network) {
  BATON_RETURN_IF_ERROR(config.validate());
  return std::unique_ptr<Router>(new Router(std::make_unique<Impl>(std::move(config), network)));
}

Result<uint64_t> Router::submit(RouterRequest request, RouterEventSink sink) {
  if (impl_->inside.fetch_add(1, std::memory_order_relaxed) >= impl_->max_requests) {
    impl_->inside.fetch_sub(1, std::memory_order_relaxed);
    return resource_exhausted("{} requests are in the router, the limit (--max-requests); try again later",
                              impl_->max_requests);
  }
  uint64_t id = random_id();
  if (!impl_->mailbox.try_push(Submit{id, std::move(request), std::move(sink)})) {
    impl_->inside.fetch_sub(1, std::memory_order_relaxed);
    return unavailable("the router is shutting down or overloaded; try again later");
  }
  return id;
}

void Router::cancel(uint64_t request) { (void)impl_->mailbox.try_push(CancelRequest{request}); }

RouterHealth Router::health() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->health;
}

int32_t Router::max_model_len() const { return impl_->max_model_len.load(std::memory_order_relaxed); }

RouterStats Router::stats() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->stats;
}

std::vector<std::pair<std::string, std::string>> Router::worker_metrics() const {
  std::lock_guard lock(impl_->mutex);
  return impl_->metrics;
}

bool Router::wait_ready(int64_t timeout_ms) const {
  std::unique_lock lock(impl_->mutex);
  impl_->changed.wait_for(lock, std::chrono::milliseconds(timeout_ms),
                          [this] { return impl_->stopped || impl_->health.ready; });
  return impl_->health.ready && !impl_->stopped;
}

void Router::wait_idle(int64_t timeout_ms) const {
  std::unique_lock lock(impl_->mutex);
  impl_->changed.wait_for(lock, std::chrono::milliseconds(timeout_ms), [this] {
    return impl_->stopped || impl_->inside.load(std::memory_order_relaxed) == 0;
  });
}

void Router::stop() { impl_->stop(); }

}  // namespace baton
