#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

#include "base/status.h"
#include "base/unique_handle.h"

namespace baton {

/// Page-aligned, zeroed memory straight from the kernel; huge pages are asked for. Nothing is resident until it is
/// touched. Move-only; unmapped by the destructor.
class MappedMemory {
 public:
  /// Memory of this process alone.
  static Result<MappedMemory> create_private(size_t bytes);
  /// Memory that another process can map, too, from fd() (a memfd; `name` shows in /proc/self/maps). Its size is
  /// sealed: a process that has mapped it can never be killed by the owner making it smaller.
  static Result<MappedMemory> create_shared(const std::string& name, size_t bytes);

  /// Shared where that costs nothing, else private: many kernels give shared memory no huge pages (shmem_enabled is
  /// "never"), and for memory that is read all day those matter more than how fast others can write into it.
  static Result<MappedMemory> create_for_peers(const std::string& name, size_t bytes);
  /// `bytes` from `offset` (a multiple of the page size) of an open file, shared with all who have mapped it.
  static Result<MappedMemory> map_shared(FileDescriptor fd, uint64_t offset, size_t bytes);

  MappedMemory() = default;
  MappedMemory(MappedMemory&& other) noexcept;
  MappedMemory& operator=(MappedMemory&& other) noexcept;
  ~MappedMemory() { reset(); }

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  std::span<std::byte> span() const { return {data_, bytes_}; }
  /// -1: private. Belongs to this object.
  int fd() const { return fd_.get(); }
  explicit operator bool() const { return data_ != nullptr; }

 private:
  static Result<MappedMemory> map(FileDescriptor fd, uint64_t offset, size_t bytes);
  void reset();

  FileDescriptor fd_;
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace baton
