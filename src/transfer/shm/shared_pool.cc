#include "transfer/shm/shared_pool.h"

#include <dirent.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cinttypes>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <memory>
#include <utility>

#include "transfer/wire.h"

namespace baton::transfer {
namespace {

bool cannot_shrink(int fd) {
  int seals = ::fcntl(fd, F_GET_SEALS);
  return seals >= 0 && (seals & F_SEAL_SHRINK) != 0;
}

/// Device, inode and offset of `memory` from /proc/self/maps. A mapping may stand there in several lines (parts of it were
/// advised differently); they have to follow each other without a gap, in memory and in the file.
Result<SharedTicket> find_mapping(std::span<const std::byte> memory) {
  auto begin = reinterpret_cast<uint64_t>(memory.data());
  uint64_t end = begin + memory.size();
  SharedTicket ticket;
  ticket.bytes = memory.size();
  uint64_t covered = begin;
  std::ifstream maps("/proc/self/maps");
  std::string line;
  while (covered < end && std::getline(maps, line)) {
    uint64_t from = 0, to = 0, offset = 0, inode = 0;
    unsigned major_number = 0, minor_number = 0;
    char mode[5] = "";
    if (std::sscanf(line.c_str(), "%" SCNx64 "-%" SCNx64 " %4s %" SCNx64 " %x:%x %" SCNu64, &from, &to, mode, &offset,
                    &major_number, &minor_number, &inode) != 7) {
      continue;
    }
    if (to <= covered) continue;
    if (from > covered || mode[1] != 'w' || mode[3] != 's' || inode == 0) return not_found("it is not shared memory");
    uint64_t device = makedev(major_number, minor_number);
    uint64_t at = offset + (covered - from);
    if (covered == begin) {
      ticket.device = device;
      ticket.inode = inode;
      ticket.offset = at;
    } else if (device != ticket.device || inode != ticket.inode || at != ticket.offset + (covered - begin)) {
      return not_found("it lies in more than one file");
    }
    covered = to;
  }
  if (covered < end) return not_found("it is not mapped");
  return ticket;
}

}  // namespace

std::string encode_ticket(const SharedTicket& ticket) {
  WireWriter out;
  out.put(ticket.fd);
  out.put(ticket.device);
  out.put(ticket.inode);
  out.put(ticket.offset);
  out.put(ticket.bytes);
  return out.take();
}

Result<SharedTicket> parse_ticket(std::string_view bytes) {
  WireReader in(bytes);
  SharedTicket ticket;
  ticket.fd = in.get<uint64_t>();
  ticket.device = in.get<uint64_t>();
  ticket.inode = in.get<uint64_t>();
  ticket.offset = in.get<uint64_t>();
  ticket.bytes = in.get<uint64_t>();
  constexpr uint64_t kMost = uint64_t{1} << 62;
  if (!in.ok() || !in.at_end() || ticket.bytes == 0 || ticket.bytes > kMost || ticket.offset > kMost || ticket.fd > INT32_MAX) {
    return invalid_argument("a damaged ticket for shared memory ({} bytes)", bytes.size());
  }
  return ticket;
}

Result<SharedSource> find_shared_source(std::span<const std::byte> memory) {
  BATON_ASSIGN_OR_RETURN(SharedTicket ticket, find_mapping(memory));
  std::unique_ptr<DIR, int (*)(DIR*)> folder(::opendir("/proc/self/fd"), ::closedir);
  if (!folder) return not_found("/proc/self/fd: {}", std::strerror(errno));
  while (dirent* entry = ::readdir(folder.get())) {
    char* rest = nullptr;
    long fd = std::strtol(entry->d_name, &rest, 10);
    struct stat status {};
    // By name: other threads open and close descriptors meanwhile, and fstat() of their numbers is a race to the thread sanitizer.
    if (rest == entry->d_name || ::fstatat(::dirfd(folder.get()), entry->d_name, &status, 0) != 0) continue;
    if (status.st_dev != ticket.device || status.st_ino != ticket.inode) continue;
    SharedSource source;
    source.file.reset(::fcntl(static_cast<int>(fd), F_DUPFD_CLOEXEC, 0));
    // Its number may have been closed and given away in between.
    if (!source.file || ::fstat(source.file.get(), &status) != 0 || status.st_dev != ticket.device || status.st_ino != ticket.inode) continue;
    if (!cannot_shrink(source.file.get())) return not_found("it is shared, but its file is not sealed against shrinking");
    source.ticket = ticket;
    source.ticket.fd = static_cast<uint64_t>(source.file.get());
    return source;
  }
  return not_found("it is shared, but no open descriptor names its file");
}

Result<FileDescriptor> open_shared(int pid, const SharedTicket& ticket) {
  std::string path = fmt::format("/proc/{}/fd/{}", pid, ticket.fd);
  FileDescriptor file(::open(path.c_str(), O_RDWR | O_CLOEXEC | O_NONBLOCK | O_NOCTTY));
  if (!file) return unavailable("{}: {}", path, std::strerror(errno));
  struct stat status {};
  if (::fstat(file.get(), &status) != 0 || !S_ISREG(status.st_mode) || status.st_dev != ticket.device || status.st_ino != ticket.inode) {
    return unavailable("{} is not the file that was announced", path);
  }
  // Else the owner could end this process with a bus error in the middle of a copy.
  if (!cannot_shrink(file.get())) return unavailable("{} is not sealed against shrinking", path);
  if (static_cast<uint64_t>(status.st_size) < ticket.offset + ticket.bytes) {
    return unavailable("{} has {} bytes, {} from offset {} were announced", path, status.st_size, ticket.bytes, ticket.offset);
  }
  return file;
}

Result<MappedPool> MappedPool::open(int pid, const SharedTicket& ticket) {
  BATON_ASSIGN_OR_RETURN(FileDescriptor file, open_shared(pid, ticket));
  uint64_t page = static_cast<uint64_t>(::sysconf(_SC_PAGESIZE));
  uint64_t before = ticket.offset % page;
  BATON_ASSIGN_OR_RETURN(MappedMemory memory, MappedMemory::map_shared(std::move(file), ticket.offset - before, before + ticket.bytes));
  // A child process has no business in a peer's memory.
  (void)::madvise(memory.data(), memory.bytes(), MADV_DONTFORK);
  return MappedPool(std::move(memory), before, ticket.bytes);
}

void MappedPool::prepare(uint64_t offset, uint64_t bytes) {
  uint64_t first = (before_ + offset) / kExtentBytes, last = (before_ + offset + bytes - 1) / kExtentBytes;
  for (uint64_t extent = first; extent <= last; ++extent) {
    if (prepared_[extent]) continue;
    uint64_t end = extent;
    while (end < last && !prepared_[end + 1]) ++end;
    prepare_extents(extent, end);
    extent = end;
  }
}

void MappedPool::prepare_extents(uint64_t first, uint64_t last) {
  for (uint64_t extent = first; extent <= last; ++extent) prepared_[extent] = true;
#ifdef MADV_POPULATE_READ
  // For reading, since the kernel then maps what lies around a page, too; in a shared mapping that is enough to write.
  uint64_t from = first * kExtentBytes, to = std::min<uint64_t>((last + 1) * kExtentBytes, memory_.bytes());
  (void)::madvise(memory_.data() + from, to - from, MADV_POPULATE_READ);
#endif
}

}  // namespace baton::transfer
