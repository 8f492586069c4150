#include <poll.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include <cerrno>
#include <limits>

#include "base/check.h"
#include "base/log.h"
#include "transfer/agent_impl.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

/// Who moves things along. The agent's thread does, asleep whenever there is nothing to do. A thread that waits does it in its place for
/// as long as it looks (AgentConfig::poll_us), since waking one thread to wake another takes longer than what is waited for; the agent's
/// thread keeps away meanwhile, but goes on running all callbacks. And whoever writes something small does the copy at once.
///
///   the agent's thread     turns ──nothing──▶ sleeps on all descriptors
///                            ▲ woken              │ woken, and somebody polls
///                            │                    ▼
///                            └──nobody polls── parked: sleeps on its eventfd, 0.2 to 1 ms at a time
///
/// A waiting thread that is done wakes the agent's thread, which goes to sleep by what is known then. When it is back within 100 µs it is
/// at a conversation: then the agent's thread is left parked, and takes over when that is over.
namespace baton::transfer {
namespace {

/// What a write() may copy itself: at most about as long as waking a thread takes.
constexpr uint64_t kAtOnceBytes = 64u << 10;
constexpr int64_t kParkNs = 200'000, kLongestParkNs = 1'000'000;
constexpr int64_t kConversationNs = 100'000;
constexpr uint32_t kTurnsPerYield = 8;

/// How long threads look does not depend on the agent's clock, which a test may hold.
int64_t real_now_ns() { return SteadyClock::instance().now_ns(); }

void pause_briefly() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ __volatile__("yield");
#endif
}

}  // namespace

// --- the agent's thread ---

void AgentCore::run() {
  int64_t park_ns = kParkNs;
  while (!stopping_.load()) {
    if (attended()) {
      run_callbacks();
      park(park_ns);
      park_ns = std::min(2 * park_ns, kLongestParkNs);
      continue;
    }
    park_ns = kParkNs;
    work_.store(false);
    size_t count = turn();
    run_callbacks();
    if (count == 0) sleep();
  }
}

/// Somebody else moves things along, or has just now and will again. What was handed over to this thread is looked at all the same.
bool AgentCore::attended() {
  return !work_.load() && (polling_.load() > 0 || real_now_ns() < attended_until_ns_.load());
}

void AgentCore::wake() {
  work_.store(true);
  ring();
}

void AgentCore::ring() {
  if (!sleeping_.load()) return;
  uint64_t one = 1;
  (void)!::write(doorbell_.get(), &one, sizeof(one));
}

void AgentCore::park(int64_t ns) {
  pollfd poll_fd{doorbell_.get(), POLLIN, 0};
  timespec timeout{0, ns};
  // Dekker with poll_turn(): either it sees that we sleep, or we see what it has left.
  sleeping_.store(true);
  parked_.store(true);
  if (!callbacks_due_.exchange(false) && !stopping_.load()) (void)::ppoll(&poll_fd, 1, &timeout, nullptr);
  parked_.store(false);
  end_sleep();
}

void AgentCore::sleep() {
  int64_t longest_ns = 0;
  {
    std::lock_guard lock(mutex_);
    poll_fds_.clear();
    poll_fds_.push_back({doorbell_.get(), POLLIN, 0});
    longest_ns = next_time_ns();
    for (const auto& backend : backends_) {
      longest_ns = std::min(longest_ns, backend->prepare_wait(poll_fds_));
    }
    for (const auto& peer : busy_) {
      if (peer->again) longest_ns = std::min(longest_ns, peer->again_sleep_ns);
    }
    if (longest_ns > 0 && !rest()) longest_ns = 0;
    const int64_t never = std::numeric_limits<int64_t>::max();
    sleeps_until_ns_.store(longest_ns == never ? never : clock_.now_ns() + longest_ns);
  }
  if (longest_ns <= 0) {
    std::this_thread::yield();
    return;
  }
  // Dekker with wake(): either it sees that we sleep, or we see its work.
  sleeping_.store(true);
  if (!work_.load() && !stopping_.load()) {
    timespec timeout{longest_ns / 1'000'000'000, longest_ns % 1'000'000'000};
    bool forever = longest_ns == std::numeric_limits<int64_t>::max();
    (void)::ppoll(poll_fds_.data(), poll_fds_.size(), forever ? nullptr : &timeout, nullptr);
  }
  end_sleep();
}

void AgentCore::end_sleep() {
  sleeps_until_ns_.store(0);
  sleeping_.store(false);
  uint64_t rings = 0;
  (void)!::read(doorbell_.get(), &rings, sizeof(rings));
}

int64_t AgentCore::next_time_ns() const {
  if (deadlines_.empty()) return std::numeric_limits<int64_t>::max();
  return std::max<int64_t>(deadlines_.begin()->first - clock_.now_ns(), 0);
}

/// REQUIRES: mutex_ is held. False: something has come in.
bool AgentCore::rest() {
  for (const auto& backend : backends_) {
    if (!backend->rest()) return false;
  }
  return true;
}

// --- whoever waits ---

/// Moves things along once, unless somebody is at it. work_ is left to the thread, which has to learn of new deadlines before it sleeps.
void AgentCore::poll_turn() {
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock) return;
  size_t count = locked_turn();
  const bool callbacks = !done_.empty() || inboxes_.has_due();
  lock.unlock();
  if (count > 0) turned_.notify_all();
  if (!callbacks) return;
  callbacks_due_.store(true);
  wake();
}

template <typename Over>
bool AgentCore::poll_until(int64_t longest_ns, const Over& over) {
  if (over()) return true;
  if (config_.poll_us == 0 || stopping_.load()) return false;
  int64_t now_ns = real_now_ns();
  const int64_t end_ns = now_ns + std::min(longest_ns, config_.poll_us * 1000);
  polling_.fetch_add(1);
  const bool conversation = now_ns - polled_until_ns_.load() < kConversationNs;
  if (conversation && !parked_.load()) ring();
  bool found = false;
  uint32_t turns = 0;
  do {
    attended_until_ns_.store(now_ns + kParkNs);
    poll_turn();
    found = over();
    if (found) break;
    // What is waited for may need this very core.
    if (++turns % kTurnsPerYield == 0) {
      std::this_thread::yield();
    } else {
      pause_briefly();
    }
    now_ns = real_now_ns();
  } while (now_ns < end_ns && !stopping_.load());
  polled_until_ns_.store(now_ns);
  if (!found || !conversation) attended_until_ns_.store(0);
  polling_.fetch_sub(1);
  // If the agent's thread sleeps it does so by what it knew before: the backends are awake now, and may want it sooner.
  if (!found || sleeps_until_ns_.load() != 0) {
    wake();
  } else if (!conversation && parked_.load()) {
    ring();
  }
  return found;
}

void AgentCore::hurry(const Transfer::Impl& transfer) {
  if (!transfer.end_can_wait) return;
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (lock && transfer.peer->state == PeerCore::State::kOpen) transfer.peer->backend->hurry();
}

Status AgentCore::wait(const Transfer::Impl& transfer) {
  const auto done = [&] { return transfer.state.load(std::memory_order_acquire) == Transfer::Impl::State::kDone; };
  if (config_.manual_progress) {
    while (!done()) progress();
  } else if (hurry(transfer); !poll_until(std::numeric_limits<int64_t>::max(), done)) {
    transfer.state.wait(Transfer::Impl::State::kPending, std::memory_order_acquire);
  }
  return transfer.status;
}

Status AgentCore::wait(Tag tag, uint64_t messages, Deadline deadline) {
  const int64_t until_ns = deadline_ns(deadline);
  if (!config_.manual_progress) {
    const auto left_ns = [&] { return std::max<int64_t>(until_ns - clock_.now_ns(), 0); };
    if (!poll_until(left_ns(), [&] { return inboxes_.settled(tag, messages); })) {
      (void)inboxes_.wait(tag, messages, std::chrono::nanoseconds(left_ns()));
    }
  } else {
    while (!inboxes_.settled(tag, messages) && clock_.now_ns() < until_ns) progress();
  }
  answered_ns_.store(real_now_ns());
  if (!inboxes_.is_open(static_cast<uint32_t>(tag))) return not_found("inbox {} is not open", static_cast<uint32_t>(tag));
  const uint64_t arrived = inboxes_.arrived(tag);
  if (arrived >= messages) return {};
  return deadline_exceeded("{} of {} messages arrived for inbox {}", arrived, messages, static_cast<uint32_t>(tag));
}

// --- whoever writes ---

/// A small message is posted by the thread that writes it, when nobody else is at work. False: it goes the usual way.
bool AgentCore::post_at_once(const TransferPointer& transfer) {
  PeerCore& peer = *transfer->peer;
  if (!peer.posts_at_once || config_.manual_progress || transfer->message_count != 1 || transfer->byte_count > kAtOnceBytes ||
      transfer->after != nullptr || transfer->check != nullptr || transfer->read != nullptr) {
    return false;
  }
  std::unique_lock lock(mutex_, std::try_to_lock);
  if (!lock || stopping_.load() || peer.state != PeerCore::State::kOpen || !peer.failure.ok() || !peer.to_post.empty() || !peer.link->ready()) {
    return false;
  }
  const int64_t now_ns = clock_.now_ns();
  Result<const BackendRegion*> local = transfer->local_region.impl()->with(*peer.backend);
  if (!local.ok() || transfer->deadline_ns <= now_ns) return false;
  transfer->local = *local;
  // Not while the thread sleeps: nobody would ask for the end when the conversation is over.
  transfer->end_can_wait = !transfer->on_done && real_now_ns() - answered_ns_.load() < kConversationNs && sleeps_until_ns_.load() == 0;
  peer.to_post.push_back(transfer);
  post(peer, now_ns);
  peer.backend->finish_posted(*this);
  bool needs_thread = !done_.empty() || !failed_.empty();
  if (!done_.empty()) callbacks_due_.store(true);
  if (transfer->state.load() != Transfer::Impl::State::kDone) {
    deadlines_.emplace(transfer->deadline_ns, transfer);
    make_busy(transfer->peer);
    needs_thread = needs_thread || !peer.to_post.empty() || transfer->deadline_ns < sleeps_until_ns_.load();
  }
  lock.unlock();
  if (needs_thread) wake();
  return true;
}

}  // namespace baton::transfer
