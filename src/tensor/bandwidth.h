#pragma once

#include <cstddef>

#include "base/status.h"
#include "tensor/thread_pool.h"

namespace baton {

/// What decoding is measured against: GB/s (1e9 bytes) at which all threads of the pool together stream `bytes` of
/// memory (huge pages, each thread one contiguous share, nothing but loads and an or). Best of `repeats` passes.
/// Choose `bytes` several times the last-level cache. Errors: resource_exhausted.
Result<double> measure_read_gbps(ThreadPool& threads, size_t bytes, int repeats);

}  // namespace baton
