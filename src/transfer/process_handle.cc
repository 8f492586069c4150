#include "transfer/process_handle.h"

#include <poll.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cerrno>

#include "transfer/descriptors.h"

namespace baton::transfer {

Result<ProcessHandle> ProcessHandle::open(int pid) {
  FileDescriptor fd(static_cast<int>(::syscall(SYS_pidfd_open, pid, 0)));
  if (!fd) return descriptor_error(fmt::format("pidfd_open of pid {}", pid), errno);
  return ProcessHandle(std::move(fd));
}

bool ProcessHandle::ended() const {
  pollfd fd{fd_.get(), POLLIN, 0};
  return ::poll(&fd, 1, 0) == 1;
}

}  // namespace baton::transfer
