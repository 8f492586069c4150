#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "base/mapped_memory.h"
#include "base/status.h"
#include "base/unique_handle.h"

/// Memory that lies in a memfd can be mapped by another process: a copy into it is then no system call and pins no
/// pages. Nobody has to say that memory is such: the owner finds it out from its own /proc.
namespace baton::transfer {

/// What the owner of shared memory tells a writer. Comes over the control connection.
struct SharedTicket {
  uint64_t fd = 0;      ///< in the owner's process
  uint64_t device = 0;  ///< of the file that `fd` must name, or something else took its number
  uint64_t inode = 0;
  uint64_t offset = 0;  ///< of the memory in the file
  uint64_t bytes = 0;
  bool operator==(const SharedTicket&) const = default;
};
std::string encode_ticket(const SharedTicket& ticket);
Result<SharedTicket> parse_ticket(std::string_view bytes);
/// The file of a ticket: the one that was announced, all there, and sealed against shrinking. `pid` must be the process that made it.
Result<FileDescriptor> open_shared(int pid, const SharedTicket& ticket);

/// The owner's side: keeps the file open, under one number.
struct SharedSource {
  FileDescriptor file;
  SharedTicket ticket;
};
/// not_found with the reason when `memory` is not shared, not all in one file, or its file could be made smaller
/// under a writer's feet (F_SEAL_SHRINK is not set).
Result<SharedSource> find_shared_source(std::span<const std::byte> memory);

/// The writer's side: the peer's memory in this process.
class MappedPool {
 public:
  /// `pid` must be the process that made the ticket.
  static Result<MappedPool> open(int pid, const SharedTicket& ticket);
  std::byte* data() const { return memory_.data() + before_; }
  uint64_t bytes() const { return bytes_; }
  /// Maps the pages of a range that is about to be written for the first time, many with one system call instead of
  /// one fault each. REQUIRES: the range lies in the pool and is not empty.
  void prepare(uint64_t offset, uint64_t bytes);

 private:
  /// What the kernel maps around one read fault (fault_around_bytes).
  static constexpr uint64_t kExtentBytes = 64u << 10;
  MappedPool(MappedMemory memory, uint64_t before, uint64_t bytes)
      : memory_(std::move(memory)), before_(before), bytes_(bytes), prepared_(memory_.bytes() / kExtentBytes + 1) {}
  void prepare_extents(uint64_t first, uint64_t last);

  MappedMemory memory_;
  uint64_t before_;  // of the page in front of the pool's start
  uint64_t bytes_;
  std::vector<bool> prepared_;  // [extent]
};

}  // namespace baton::transfer
