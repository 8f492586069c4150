#include "transfer/shm/doorbell.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <bit>
#include <cerrno>
#include <cstring>

#include "base/check.h"

namespace baton::transfer {
namespace {

constexpr uint64_t kGrowBytes = 64 * kBellPageBytes;

}  // namespace

Result<SharedPage> SharedPage::map(int fd, uint64_t offset) {
  void* data = ::mmap(nullptr, kBellPageBytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, static_cast<off_t>(offset));
  if (data == MAP_FAILED) return resource_exhausted("mmap of a doorbell: {}", std::strerror(errno));
  (void)::madvise(data, kBellPageBytes, MADV_DONTFORK);
  (void)::madvise(data, kBellPageBytes, MADV_NOHUGEPAGE);  // two megabytes for a page would be too many
  return SharedPage(static_cast<uint64_t*>(data));
}

SharedPage::~SharedPage() {
  if (words_ != nullptr) ::munmap(words_, kBellPageBytes);
}

Result<std::unique_ptr<Doorbells>> Doorbells::create() {
  if (static_cast<uint64_t>(::sysconf(_SC_PAGESIZE)) != kBellPageBytes) return unimplemented("pages are not of {} bytes here", kBellPageBytes);
  FileDescriptor file(::memfd_create("baton-doorbells", MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!file) return unavailable("memfd_create: {}", std::strerror(errno));
  struct stat status {};
  // It grows with its writers, and never shrinks under them.
  if (::ftruncate(file.get(), kBellPageBytes) != 0 || ::fcntl(file.get(), F_ADD_SEALS, F_SEAL_SHRINK) != 0 ||
      ::fstat(file.get(), &status) != 0) {
    return unavailable("making a memfd: {}", std::strerror(errno));
  }
  BATON_ASSIGN_OR_RETURN(SharedPage page, SharedPage::map(file.get(), 0));
  return std::unique_ptr<Doorbells>(new Doorbells(std::move(file), status.st_dev, status.st_ino, std::move(page)));
}

Result<uint32_t> Doorbells::add(std::string* ticket) {
  auto free = std::find_if(rings_.begin(), rings_.end(), [](const auto& ring) { return !ring.has_value(); });
  if (free == rings_.end() && rings_.size() >= kMaxBells) return resource_exhausted("{} writers have a doorbell", kMaxBells);
  if (next_offset_ == file_bytes_) {
    if (::ftruncate(file_.get(), static_cast<off_t>(file_bytes_ + kGrowBytes)) != 0) {
      return resource_exhausted("growing the doorbells: {}", std::strerror(errno));
    }
    file_bytes_ += kGrowBytes;
  }
  BATON_ASSIGN_OR_RETURN(SharedPage page, SharedPage::map(file_.get(), next_offset_));
  SharedTicket where;
  where.fd = static_cast<uint64_t>(file_.get());
  where.device = device_;
  where.inode = inode_;
  where.offset = next_offset_;
  where.bytes = kBellPageBytes;
  *ticket = encode_ticket(where);
  const BellRingReader reader(page.words());
  if (free == rings_.end()) {
    rings_.emplace_back();
    free = rings_.end() - 1;
  }
  free->emplace(Ring{std::move(page), reader, next_offset_});
  next_offset_ += kBellPageBytes;
  return static_cast<uint32_t>(free - rings_.begin());
}

Status Doorbells::remove(uint32_t bell, std::vector<Arrival>& arrivals) {
  BATON_CHECK(bell < rings_.size() && rings_[bell]);
  Ring& ring = *rings_[bell];
  bool more = false;
  Status status = ring.damaged ? Status() : ring.reader.take(arrivals, &more);
  const auto offset = static_cast<off_t>(ring.offset);
  rings_[bell].reset();
  (void)::fallocate(file_.get(), FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE, offset, kBellPageBytes);
  while (!rings_.empty() && !rings_.back()) rings_.pop_back();
  return status;
}

void Doorbells::take(std::vector<Arrival>& arrivals, std::vector<Damaged>& damaged) {
  for (size_t i = 0; i * 64 < rings_.size(); ++i) {
    uint64_t bits = head_.take(i);
    while (bits != 0) {
      const auto bell = static_cast<uint32_t>(64 * i) + static_cast<uint32_t>(std::countr_zero(bits));
      bits &= bits - 1;
      // Whoever has gone may have rung late, and a writer can set any bit.
      if (bell >= rings_.size() || !rings_[bell] || rings_[bell]->damaged) continue;
      Ring& ring = *rings_[bell];
      bool more = false;
      if (Status status = ring.reader.take(arrivals, &more); !status.ok()) {
        ring.damaged = true;
        damaged.push_back({bell, status});
      }
      if (more) head_.ring(bell);  // others have their turn first
    }
  }
}

Result<Doorbell> Doorbell::open(int pid, uint64_t bell, std::string_view ticket) {
  BATON_ASSIGN_OR_RETURN(SharedTicket where, parse_ticket(ticket));
  if (bell >= kMaxBells || where.bytes != kBellPageBytes || where.offset % kBellPageBytes != 0 || where.offset == 0) {
    return invalid_argument("a damaged doorbell: number {}, {} bytes from {}", bell, where.bytes, where.offset);
  }
  BATON_ASSIGN_OR_RETURN(FileDescriptor file, open_shared(pid, where));
  BATON_ASSIGN_OR_RETURN(SharedPage head, SharedPage::map(file.get(), 0));
  BATON_ASSIGN_OR_RETURN(SharedPage ring, SharedPage::map(file.get(), where.offset));
  return Doorbell(std::move(head), std::move(ring), static_cast<uint32_t>(bell));
}

}  // namespace baton::transfer
