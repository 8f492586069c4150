#include "base/mapped_memory.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <fstream>
#include <utility>

namespace baton {

namespace {

constexpr size_t kHugePage = size_t{2} << 20;

/// Where a mapping can have huge pages: they have to lie at multiples of their size both in memory and in the file,
/// and not every kernel sees to that by itself. nullptr: anywhere.
void* huge_page_address(uint64_t offset, size_t bytes) {
  if (bytes < kHugePage) return nullptr;
  size_t reserved = bytes + kHugePage;
  void* base = ::mmap(nullptr, reserved, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (base == MAP_FAILED) return nullptr;
  ::munmap(base, reserved);
  auto address = reinterpret_cast<uintptr_t>(base);
  size_t wanted = offset % kHugePage;
  size_t forward = (wanted + kHugePage - address % kHugePage) % kHugePage;
  return reinterpret_cast<void*>(address + forward);
}

/// Does shared memory get huge pages as private memory does? Also true where neither does.
bool shared_memory_has_huge_pages() {
  std::ifstream file("/sys/kernel/mm/transparent_hugepage/shmem_enabled");
  std::string modes;
  if (!std::getline(file, modes)) return true;
  return modes.find("[never]") == std::string::npos && modes.find("[deny]") == std::string::npos;
}

}  // namespace

Result<MappedMemory> MappedMemory::map(FileDescriptor fd, uint64_t offset, size_t bytes) {
  if (bytes == 0) return invalid_argument("mapping no memory");
  int flags = fd ? MAP_SHARED : MAP_PRIVATE | MAP_ANONYMOUS;
  // A hint only: another thread may have taken the place meanwhile, then it is some other one.
  void* data = ::mmap(huge_page_address(offset, bytes), bytes, PROT_READ | PROT_WRITE, flags, fd.get(), static_cast<off_t>(offset));
  if (data == MAP_FAILED) return resource_exhausted("mmap of {} bytes: {}", bytes, std::strerror(errno));
  (void)::madvise(data, bytes, MADV_HUGEPAGE);  // a wish; the kernel may be built without
  MappedMemory memory;
  memory.fd_ = std::move(fd);
  memory.data_ = static_cast<std::byte*>(data);
  memory.bytes_ = bytes;
  return memory;
}

Result<MappedMemory> MappedMemory::map_shared(FileDescriptor fd, uint64_t offset, size_t bytes) {
  if (!fd) return invalid_argument("mapping no file");
  return map(std::move(fd), offset, bytes);
}

Result<MappedMemory> MappedMemory::create_private(size_t bytes) { return map(FileDescriptor(), 0, bytes); }

Result<MappedMemory> MappedMemory::create_shared(const std::string& name, size_t bytes) {
  FileDescriptor fd(::memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING));
  if (!fd) return unavailable("memfd_create: {}", std::strerror(errno));
  if (::ftruncate(fd.get(), static_cast<off_t>(bytes)) != 0) {
    return resource_exhausted("a memfd of {} bytes: {}", bytes, std::strerror(errno));
  }
  if (::fcntl(fd.get(), F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) {
    return unavailable("sealing a memfd: {}", std::strerror(errno));
  }
  return map(std::move(fd), 0, bytes);
}

Result<MappedMemory> MappedMemory::create_for_peers(const std::string& name, size_t bytes) {
  if (shared_memory_has_huge_pages()) {
    Result<MappedMemory> shared = create_shared(name, bytes);
    // A sandbox may forbid memfds; private memory is as good, only slower to write into from outside.
    if (shared.ok() || shared.status().code() != StatusCode::kUnavailable) return shared;
  }
  return create_private(bytes);
}

MappedMemory::MappedMemory(MappedMemory&& other) noexcept
    : fd_(std::move(other.fd_)),
      data_(std::exchange(other.data_, nullptr)),
      bytes_(std::exchange(other.bytes_, 0)) {}

MappedMemory& MappedMemory::operator=(MappedMemory&& other) noexcept {
  if (this != &other) {
    reset();
    fd_ = std::move(other.fd_);
    data_ = std::exchange(other.data_, nullptr);
    bytes_ = std::exchange(other.bytes_, 0);
  }
  return *this;
}

void MappedMemory::reset() {
  if (data_ != nullptr) ::munmap(data_, bytes_);
  data_ = nullptr;
  bytes_ = 0;
  fd_.reset();
}

}  // namespace baton
