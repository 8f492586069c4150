#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "base/unique_handle.h"
#include "transfer/inbox.h"
#include "transfer/shm/doorbell_ring.h"
#include "transfer/shm/shared_pool.h"

namespace baton::transfer {

/// Under this id a Welcome names no pool, but the writer's ring: base is the number of its bell, packed_key says where the pages are.
inline constexpr uint32_t kDoorbellPoolId = kFirstReservedTag;

/// One page of memory that another process has, too. Unmapped by the destructor.
class SharedPage {
 public:
  static Result<SharedPage> map(int fd, uint64_t offset);
  SharedPage(SharedPage&& other) noexcept : words_(std::exchange(other.words_, nullptr)) {}
  SharedPage& operator=(SharedPage&&) = delete;
  ~SharedPage();
  BellHead::Page words() const { return BellHead::Page(words_, kBellPageWords); }

 private:
  explicit SharedPage(uint64_t* words) : words_(words) {}
  uint64_t* words_;
};

/// The owner's side: the rings of all that may write into this process. A memfd: nothing stays behind. Under the agent's lock.
class Doorbells {
 public:
  static Result<std::unique_ptr<Doorbells>> create();

  /// A ring for a new writer; `*ticket` is what it needs to open it. resource_exhausted: the control connection must do.
  Result<uint32_t> add(std::string* ticket);
  /// What it holds is appended first. Its page is never given out again: whoever was cut off may still have it mapped.
  Status remove(uint32_t bell, std::vector<Arrival>& arrivals);

  struct Damaged {
    uint32_t bell;
    Status why;
  };
  /// Appends what has come in. A ring that is damaged is not looked at again.
  void take(std::vector<Arrival>& arrivals, std::vector<Damaged>& damaged);
  /// From now on writers send a word by the control connection, too. False: something is here, and it goes on as before.
  bool sleep() { return head_.sleep(static_cast<uint32_t>(rings_.size())); }
  void wake() { head_.wake(); }

 private:
  struct Ring {
    SharedPage page;
    BellRingReader reader;
    uint64_t offset;
    bool damaged = false;
  };
  Doorbells(FileDescriptor file, uint64_t device, uint64_t inode, SharedPage page)
      : file_(std::move(file)), device_(device), inode_(inode), page_(std::move(page)), head_(page_.words()) {}

  FileDescriptor file_;
  const uint64_t device_, inode_;
  SharedPage page_;
  BellHead head_;
  uint64_t next_offset_ = kBellPageBytes, file_bytes_ = kBellPageBytes;
  std::vector<std::optional<Ring>> rings_;  // [bell]
};

/// The writer's side: its ring in one peer. Under the agent's lock.
class Doorbell {
 public:
  /// `pid` must be the process that gave the ticket.
  static Result<Doorbell> open(int pid, uint64_t bell, std::string_view ticket);
  /// False: no room, or a count too large for a word.
  bool ring(Arrival arrival) {
    if (arrival.count > BellWord::kMaxCount || !ring_.push(arrival)) return false;
    head_.ring(bell_);
    return true;
  }
  /// Asked after ring(): true once in every sleep of the owner.
  bool must_wake() {
    const uint64_t sleeps = head_.sleeps();
    return sleeps % 2 != 0 && std::exchange(woken_, sleeps) != sleeps;
  }

 private:
  Doorbell(SharedPage head, SharedPage ring, uint32_t bell)
      : head_page_(std::move(head)), ring_page_(std::move(ring)), head_(head_page_.words()), ring_(ring_page_.words()), bell_(bell) {}

  SharedPage head_page_, ring_page_;
  BellHead head_;
  BellRingWriter ring_;
  uint32_t bell_;
  uint64_t woken_ = 0;
};

}  // namespace baton::transfer
