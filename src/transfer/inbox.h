#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <unordered_map>
#include <vector>

#include "base/status.h"
#include "transfer/include/baton/transfer.h"

namespace baton::transfer {

/// Tags from here on are never given out: backends use them for messages of their own.
inline constexpr uint32_t kFirstReservedTag = 0xfff00000;

/// Counts messages per tag and says when as many are there as were announced. Safe from any thread.
class InboxTable {
 public:
  /// `first_tag` differs between lives of a process, so that a message meant for an earlier life is
  /// stray and not counted.
  explicit InboxTable(uint32_t first_tag) : next_tag_(first_tag) {}

  Result<Tag> open();
  Status expect(Tag tag, uint64_t messages, std::function<void()> on_complete);
  uint64_t arrived(Tag tag) const;
  /// Waits for the tag's callback if another thread is inside it.
  void close(Tag tag);
  bool is_open(uint32_t tag) const;
  /// True when so many are there, or the tag is not open (any more).
  bool settled(Tag tag, uint64_t messages) const;
  /// The same, after at most `longest`.
  bool wait(Tag tag, uint64_t messages, std::chrono::nanoseconds longest);

  /// Counts; a callback that is due now is kept until run_due().
  void add(uint32_t tag, uint64_t count);
  /// Runs the callbacks that became due, with no lock held.
  void run_due();
  bool has_due() const;

  uint64_t stray_messages() const;
  uint64_t messages() const;
  size_t size() const;

 private:
  struct Inbox {
    uint64_t arrived = 0;
    uint64_t expected = 0;
    std::function<void()> on_complete;  // empty: nothing is expected, or it has been called
    bool closed = false;
    std::thread::id running;
  };
  static bool due(const Inbox& inbox) { return inbox.on_complete && inbox.arrived >= inbox.expected; }
  void run(const std::shared_ptr<Inbox>& inbox);
  bool settled_now(Tag tag, uint64_t messages) const;

  mutable std::mutex mutex_;
  std::condition_variable idle_;
  std::condition_variable arrived_;  // for waiters_
  size_t waiters_ = 0;
  std::unordered_map<uint32_t, std::shared_ptr<Inbox>> inboxes_;
  std::vector<std::shared_ptr<Inbox>> due_;
  uint32_t next_tag_;
  uint64_t stray_ = 0;
  uint64_t messages_ = 0;
};

}  // namespace baton::transfer
