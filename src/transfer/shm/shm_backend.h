#pragma once

#include <memory>

#include "transfer/backend.h"

namespace baton::transfer {

/// Between processes of one host. Memory of the peer that lies in a sealed memfd (base/mapped_memory.h makes such) is
/// mapped into this process, and a write is a plain copy past the caches. Any other memory is written by the kernel
/// with one process_vm_writev() per message ("cross-memory attach"), at about half the rate for small blocks: it pins
/// every page. Either way the peer is told over a unix socket.
///
/// Why not libfabric's shm provider: it takes a spin lock that lives in the peer's memory, so a peer that
/// is killed inside it leaves us spinning for ever, and its segments stay in /dev/shm. Here a copy
/// ends whatever the peer does: nothing is ever in flight, nothing is left behind, nothing
/// has to be polled, and a stopped peer still receives.
///
/// Needs: the same user, a shared pid and network namespace, and the kernel's permission (Yama's
/// ptrace_scope 0, or 1 with the exception that this backend asks for, or CAP_SYS_PTRACE). open_link()
/// finds out and says what is missing.
Result<std::unique_ptr<Backend>> create_shm_backend(std::shared_ptr<BackendContext> context);

}  // namespace baton::transfer
