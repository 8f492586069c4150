#pragma once

#include <memory>

#include "transfer/backend.h"

namespace baton::transfer {

/// "cuda_ipc": between GPU memories of one host. The owner exports its allocations (CUDA IPC), the writer maps them and
/// pushes with one copy kernel per message, over NVLink, PCIe, or inside one GPU, and tells the owner over a unix socket
/// when the kernel has reported that everything is visible. Agents of one process use each other's addresses.
///
/// A writer that dies: its socket closes when the kernel tears the process down, but a copy that it had started may run
/// until the driver has destroyed its channels, which is part of the same tear-down. So an owner whose writer went
/// without a word is not fenced from it before the process is gone for good (its pidfd says so).
///
/// Needs: memory of cuMemAlloc / cudaMalloc (not of cuMemMap or a memory pool), the same user, a shared pid namespace.
///
/// Fails when there is no CUDA driver or no kernels in this build.
Result<std::unique_ptr<Backend>> create_cuda_backend(std::shared_ptr<BackendContext> context);

}  // namespace baton::transfer
