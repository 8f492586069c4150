#include "transfer/descriptors.h"

#include <fcntl.h>
#include <sys/resource.h>

#include <cerrno>
#include <cstring>

#include "base/unique_handle.h"

namespace baton::transfer {
namespace {

rlimit limit() {
  rlimit limit{};
  (void)::getrlimit(RLIMIT_NOFILE, &limit);
  return limit;
}

Status exhausted(std::string_view what) {
  const rlimit now = limit();
  return resource_exhausted("{}: this process has no file descriptors left of {} (hard limit {}): raise `ulimit -n`, "
                            "systemd's LimitNOFILE or the container's limit; a peer that writes and is written to takes 6 over "
                            "tcp and each rail, 2 over shm", what, now.rlim_cur, now.rlim_max);
}

}  // namespace

Status descriptor_error(std::string_view call, int error) {
  if (error == EMFILE) return exhausted(call);
  if (error == ENFILE) return resource_exhausted("{}: the host has no file descriptors left (fs.file-max)", call);
  if (error == ENOMEM) return resource_exhausted("{}: the kernel has no memory left for it", call);
  return internal_error("{}: {}", call, std::strerror(error));
}

Status watch_error(std::string_view call, int error) {
  if (error == ENOSPC) {
    return resource_exhausted("{}: this user's processes watch as many descriptors as they may: raise fs.epoll.max_user_watches", call);
  }
  return descriptor_error(call, error);
}

Status check_descriptors(int any_fd, size_t count, std::string_view purpose) {
  const rlim_t most = limit().rlim_cur;
  if (most == RLIM_INFINITY) return {};
  if (most <= count) return exhausted(purpose);
  // The kernel gives out the lowest that is free: when one this high is, nearly all below it down to those in use are, too.
  FileDescriptor probe(::fcntl(any_fd, F_DUPFD_CLOEXEC, static_cast<int>(most - count)));
  if (!probe && (errno == EMFILE || errno == EINVAL)) return exhausted(purpose);
  return {};
}

}  // namespace baton::transfer
