#pragma once

#include <cstddef>
#include <filesystem>
#include <span>

#include "base/status.h"

namespace baton {

/// A file mapped read-only. Its size is that at open: a file that is cut short afterwards ends the process
/// with SIGBUS, as with every reader that maps, so checkpoints must be replaced, not rewritten in place.
class MappedFile {
 public:
  static Result<MappedFile> open(const std::filesystem::path& path);
  MappedFile(MappedFile&& other) noexcept;
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile();

  std::span<const std::byte> bytes() const { return {data_, bytes_}; }
  /// Lets the kernel take back the pages wholly inside [offset, offset + bytes); they stay readable.
  void drop(size_t offset, size_t bytes) const;
  /// Says that [offset, offset + bytes) will be read soon.
  void prefetch(size_t offset, size_t bytes) const;

 private:
  MappedFile(const std::byte* data, size_t bytes) : data_(data), bytes_(bytes) {}
  const std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace baton
