#pragma once

#include <condition_variable>
#include <cstddef>
#include <deque>
#include <mutex>
#include <optional>
#include <utility>
#include <vector>

#include "base/clock.h"

namespace baton {

/// Hands values from many threads to one (or many). Never grows past `capacity`: the producer is told.
template <typename T>
class BoundedQueue {
 public:
  explicit BoundedQueue(size_t capacity) : capacity_(capacity) {}

  /// False when full or closed; the value is then untouched.
  [[nodiscard]] bool try_push(T&& value) {
    {
      std::lock_guard lock(mutex_);
      if (closed_ || items_.size() >= capacity_) return false;
      items_.push_back(std::move(value));
    }
    not_empty_.notify_one();
    return true;
  }

  std::optional<T> try_pop() {
    std::lock_guard lock(mutex_);
    if (items_.empty()) return std::nullopt;
    std::optional<T> value(std::move(items_.front()));
    items_.pop_front();
    return value;
  }

  /// Waits up to `timeout_ms` (negative: for ever) for a value; nothing on timeout, wake() or when
  /// closed and empty.
  std::optional<T> pop(int64_t timeout_ms = -1) {
    std::unique_lock lock(mutex_);
    wait_not_empty(lock, timeout_ms);
    if (items_.empty()) return std::nullopt;
    std::optional<T> value(std::move(items_.front()));
    items_.pop_front();
    return value;
  }

  /// Takes everything there is, in order; waits like pop when there is nothing.
  std::vector<T> pop_all(int64_t timeout_ms = 0) {
    std::unique_lock lock(mutex_);
    if (items_.empty() && timeout_ms != 0) wait_not_empty(lock, timeout_ms);
    std::vector<T> values(std::make_move_iterator(items_.begin()),
                          std::make_move_iterator(items_.end()));
    items_.clear();
    return values;
  }

  /// Ends one wait without a value.
  void wake() {
    {
      std::lock_guard lock(mutex_);
      woken_ = true;
    }
    not_empty_.notify_all();
  }

  void close() {
    {
      std::lock_guard lock(mutex_);
      closed_ = true;
    }
    not_empty_.notify_all();
  }

  bool closed() const {
    std::lock_guard lock(mutex_);
    return closed_;
  }
  size_t size() const {
    std::lock_guard lock(mutex_);
    return items_.size();
  }

 private:
  void wait_not_empty(std::unique_lock<std::mutex>& lock, int64_t timeout_ms) {
    auto ready = [this] { return !items_.empty() || closed_ || woken_; };
    if (timeout_ms < 0) {
      not_empty_.wait(lock, ready);
    } else {
      not_empty_.wait_for(lock, std::chrono::milliseconds(timeout_ms), ready);
    }
    woken_ = false;
  }

  const size_t capacity_;
  mutable std::mutex mutex_;
  std::condition_variable not_empty_;
  std::deque<T> items_;
  bool closed_ = false;
  bool woken_ = false;
};

}  // namespace baton
