#pragma once

#include <cstddef>
#include <string_view>

#include "base/status.h"

/// File descriptors are the first thing that a process with a thousand peers runs out of, and it has to say so.
namespace baton::transfer {

/// What became of a system call that makes a descriptor: resource_exhausted, with the limit and what to do, when there are no
/// more, otherwise internal_error.
Status descriptor_error(std::string_view call, int error);

/// What became of epoll_ctl(EPOLL_CTL_ADD): resource_exhausted where memory or the user's number of watches is at its limit, otherwise
/// internal_error.
Status watch_error(std::string_view call, int error);

/// resource_exhausted unless `count` more can be opened. For libraries that open them without a word when there are none.
/// `any_fd`: one that is open. Two system calls.
Status check_descriptors(int any_fd, size_t count, std::string_view purpose);

}  // namespace baton::transfer
