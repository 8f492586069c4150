#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <span>
#include <vector>

#include "base/status.h"
#include "transfer/control.h"

/// Notifications through shared memory: who looks at it has them within a cache miss, and no system call is made on either side. One
/// page per writer (a ring that only the writer fills and only the owner empties), and one page that all writers of an owner share:
///
///   writer                                        owner
///   copies into the pool                          while awake: takes the bits, empties those rings
///   ring: next word = (tag, count)
///   rung: sets its bit           (1)              before it sleeps:
///   reads `sleeps`               (2)                `sleeps` becomes odd                  (3)
///   odd, and not woken yet in this sleep:           looks at the bits: none, so it sleeps (4)
///   a word by the control connection
///
/// (1) to (4) are sequentially consistent, so at least one of the two sees the other: no notification is slept over. A ring that is
/// full, or that nobody could open, costs nothing but time: the control connection carries the same words, and counts have no order.
///
/// Each side trusts its own index only. A word says in which lap it was written; what does not fit is damage, and ends that writer.
/// A writer that is killed between two of its steps leaves a whole word or none, and its socket closes.
///
/// This header is the algorithm, over memory that is given; doorbell.h has the files and the mappings.
namespace baton::transfer {

inline constexpr size_t kBellPageBytes = 4096;
inline constexpr size_t kBellPageWords = kBellPageBytes / sizeof(uint64_t);
/// Writers that have a ring, per owner: as many as may connect.
inline constexpr uint32_t kMaxBells = 4096;
static_assert(std::atomic_ref<uint64_t>::is_always_lock_free);

/// One notification: tag (32 bits), count (24), mark (8: lap of the ring, never 0).
struct BellWord {
  static constexpr uint32_t kMaxCount = (1u << 24) - 1;
  static uint64_t mark(uint64_t index) { return 0x80 | (index / kBellPageWords & 0x7f); }
  static uint64_t make(Arrival arrival, uint64_t index) {
    return uint64_t{arrival.tag} << 32 | uint64_t{arrival.count} << 8 | mark(index);
  }
  static Arrival read(uint64_t word) { return {static_cast<uint32_t>(word >> 32), static_cast<uint32_t>(word >> 8) & kMaxCount}; }
  static bool fits(uint64_t word, uint64_t index) {
    const Arrival arrival = read(word);
    return (word & 0xff) == mark(index) && arrival.tag != 0 && arrival.count != 0;
  }
};

/// The writer's end of its ring. One thread at a time.
class BellRingWriter {
 public:
  using Page = std::span<uint64_t, kBellPageWords>;
  explicit BellRingWriter(Page page) : page_(page) {}
  /// False: no room. REQUIRES: arrival.tag != 0, 0 < arrival.count <= BellWord::kMaxCount.
  bool push(Arrival arrival) {
    std::atomic_ref<uint64_t> word(page_[next_ % kBellPageWords]);
    if (word.load(std::memory_order_acquire) != 0) return false;
    // Behind the copy of the data, which is what it speaks of.
    word.store(BellWord::make(arrival, next_++), std::memory_order_release);
    return true;
  }

 private:
  Page page_;
  uint64_t next_ = 0;
};

/// The owner's end. One thread at a time.
class BellRingReader {
 public:
  using Page = std::span<uint64_t, kBellPageWords>;
  explicit BellRingReader(Page page) : page_(page) {}
  /// Appends what is there, a lap at most; `*more`: there may be more. data_loss: the ring is damaged, and nothing after it counts.
  Status take(std::vector<Arrival>& arrivals, bool* more) {
    for (size_t i = 0; i < kBellPageWords; ++i) {
      std::atomic_ref<uint64_t> slot(page_[next_ % kBellPageWords]);
      const uint64_t word = slot.load(std::memory_order_acquire);
      *more = false;
      if (word == 0) return {};
      if (!BellWord::fits(word, next_)) {
        return data_loss("its notification ring is damaged: word {} is {:016x}", next_, word);
      }
      slot.store(0, std::memory_order_release);
      ++next_;
      arrivals.push_back(BellWord::read(word));
    }
    *more = true;
    return {};
  }

 private:
  Page page_;
  uint64_t next_ = 0;
};

/// The page that an owner shares with all its writers. The owner's word stands on a cache line of its own: it changes only with its
/// sleep, so that reading it costs a writer nothing while the owner is awake.
class BellHead {
 public:
  using Page = std::span<uint64_t, kBellPageWords>;
  static constexpr size_t kBitWords = kMaxBells / 64;
  explicit BellHead(Page page) : page_(page) {}

  // The writer.
  void ring(uint32_t bell) { bits(bell / 64).fetch_or(uint64_t{1} << (bell % 64), std::memory_order_seq_cst); }
  /// Which sleep it is (odd), or how often it has woken (even). A hint from outside: wrong ones cost a word too many, or a wait.
  uint64_t sleeps() { return sleeps_word().load(std::memory_order_seq_cst); }

  // The owner.
  /// The bits of bells [64 * i, 64 * i + 64) that were rung, taken.
  uint64_t take(size_t i) {
    // Looked at all the time: only what is there is worth taking the cache line away from its writers.
    if (bits(i).load(std::memory_order_relaxed) == 0) return 0;
    return bits(i).exchange(0, std::memory_order_acquire);
  }
  /// Says that it sleeps. False: one of the bells below `used` was rung, and it is awake.
  bool sleep(uint32_t used) {
    if (!asleep()) sleeps_word().store(++own_sleeps_, std::memory_order_seq_cst);
    for (size_t i = 0; i < (used + 63) / 64; ++i) {
      if (bits(i).load(std::memory_order_seq_cst) == 0) continue;
      wake();
      return false;
    }
    return true;
  }
  void wake() {
    if (asleep()) sleeps_word().store(++own_sleeps_, std::memory_order_seq_cst);
  }
  bool asleep() const { return own_sleeps_ % 2 != 0; }

 private:
  std::atomic_ref<uint64_t> sleeps_word() { return std::atomic_ref<uint64_t>(page_[0]); }
  std::atomic_ref<uint64_t> bits(size_t i) { return std::atomic_ref<uint64_t>(page_[kBitWords + i]); }

  Page page_;
  uint64_t own_sleeps_ = 0;  // the owner's; what stands in the page can be changed by others
};
static_assert(2 * BellHead::kBitWords <= kBellPageWords);

}  // namespace baton::transfer
