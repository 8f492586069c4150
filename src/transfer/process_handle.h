#pragma once

#include "base/status.h"
#include "base/unique_handle.h"

namespace baton::transfer {

/// Another process of this host, by its pidfd: the number of a pid is given away again, this is not.
class ProcessHandle {
 public:
  static Result<ProcessHandle> open(int pid);
  /// True once the kernel has taken everything from it: its memory, its descriptors, and with those its work on a GPU.
  bool ended() const;
  /// Readable from then on.
  int fd() const { return fd_.get(); }

 private:
  explicit ProcessHandle(FileDescriptor fd) : fd_(std::move(fd)) {}
  FileDescriptor fd_;
};

}  // namespace baton::transfer
