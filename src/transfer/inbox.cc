#include "transfer/inbox.h"

#include <utility>

namespace baton::transfer {
namespace {
/// Far more than requests can be under way; a bound, so that a leak is an error and not a slow death.
constexpr size_t kMaxInboxes = 1u << 20;
}  // namespace

Result<Tag> InboxTable::open() {
  std::lock_guard lock(mutex_);
  if (inboxes_.size() >= kMaxInboxes) {
    return resource_exhausted("{} inboxes are open, the limit is {}: close_inbox() is not called",
                              inboxes_.size(), kMaxInboxes);
  }
  // Counting up means that a closed tag is met again only after 2^32 - 1 others.
  if (next_tag_ >= kFirstReservedTag) next_tag_ = 0;
  while (next_tag_ == static_cast<uint32_t>(Tag::kNone) || inboxes_.contains(next_tag_)) ++next_tag_;
  uint32_t tag = next_tag_++;
  inboxes_.emplace(tag, std::make_shared<Inbox>());
  return static_cast<Tag>(tag);
}

Status InboxTable::expect(Tag tag, uint64_t messages, std::function<void()> on_complete) {
  std::shared_ptr<Inbox> inbox;
  {
    std::lock_guard lock(mutex_);
    auto it = inboxes_.find(static_cast<uint32_t>(tag));
    if (it == inboxes_.end()) {
      return not_found("inbox {} is not open", static_cast<uint32_t>(tag));
    }
    inbox = it->second;
    inbox->expected = messages;
    inbox->on_complete.swap(on_complete);  // the old one is destroyed without the lock
    if (!due(*inbox)) return Status();
  }
  run(inbox);
  return Status();
}

uint64_t InboxTable::arrived(Tag tag) const {
  std::lock_guard lock(mutex_);
  auto it = inboxes_.find(static_cast<uint32_t>(tag));
  return it == inboxes_.end() ? 0 : it->second->arrived;
}

void InboxTable::close(Tag tag) {
  std::function<void()> unused;  // destroyed without the lock
  std::unique_lock lock(mutex_);
  auto it = inboxes_.find(static_cast<uint32_t>(tag));
  if (it == inboxes_.end()) return;
  std::shared_ptr<Inbox> inbox = std::move(it->second);
  inboxes_.erase(it);
  inbox->closed = true;
  if (waiters_ > 0) arrived_.notify_all();
  inbox->on_complete.swap(unused);
  idle_.wait(lock, [&] {
    return inbox->running == std::thread::id() || inbox->running == std::this_thread::get_id();
  });
}

bool InboxTable::is_open(uint32_t tag) const {
  std::lock_guard lock(mutex_);
  return inboxes_.contains(tag);
}

bool InboxTable::settled_now(Tag tag, uint64_t messages) const {
  auto it = inboxes_.find(static_cast<uint32_t>(tag));
  return it == inboxes_.end() || it->second->arrived >= messages;
}

bool InboxTable::settled(Tag tag, uint64_t messages) const {
  std::lock_guard lock(mutex_);
  return settled_now(tag, messages);
}

bool InboxTable::wait(Tag tag, uint64_t messages, std::chrono::nanoseconds longest) {
  std::unique_lock lock(mutex_);
  ++waiters_;
  const bool settled = arrived_.wait_for(lock, longest, [&] { return settled_now(tag, messages); });
  --waiters_;
  return settled;
}

bool InboxTable::has_due() const {
  std::lock_guard lock(mutex_);
  return !due_.empty();
}

void InboxTable::add(uint32_t tag, uint64_t count) {
  std::lock_guard lock(mutex_);
  auto it = inboxes_.find(tag);
  messages_ += count;
  if (it == inboxes_.end()) {
    stray_ += count;
    return;
  }
  it->second->arrived += count;
  if (waiters_ > 0) arrived_.notify_all();
  if (due(*it->second)) due_.push_back(it->second);
}

void InboxTable::run_due() {
  std::vector<std::shared_ptr<Inbox>> due;
  {
    std::lock_guard lock(mutex_);
    due.swap(due_);
  }
  for (const std::shared_ptr<Inbox>& inbox : due) run(inbox);
}

void InboxTable::run(const std::shared_ptr<Inbox>& inbox) {
  std::function<void()> callback;
  std::thread::id before;
  {
    std::unique_lock lock(mutex_);
    idle_.wait(lock, [&] {
      return inbox->running == std::thread::id() || inbox->running == std::this_thread::get_id();
    });
    // Another thread may have closed it, or called it already.
    if (inbox->closed || !due(*inbox)) return;
    callback = std::exchange(inbox->on_complete, nullptr);
    before = std::exchange(inbox->running, std::this_thread::get_id());
  }
  callback();
  {
    std::lock_guard lock(mutex_);
    inbox->running = before;
  }
  idle_.notify_all();
}

uint64_t InboxTable::stray_messages() const {
  std::lock_guard lock(mutex_);
  return stray_;
}
uint64_t InboxTable::messages() const {
  std::lock_guard lock(mutex_);
  return messages_;
}
size_t InboxTable::size() const {
  std::lock_guard lock(mutex_);
  return inboxes_.size();
}

}  // namespace baton::transfer
