#pragma once

#include <cstddef>
#include <span>

#include "base/status.h"
#include "tensor/thread_pool.h"

namespace baton {

/// What decoding is measured against: GB/s (1e9 bytes) at which all threads of the pool together stream memory, each
/// its contiguous share, with nothing but loads. Best of `repeats` passes.
///
/// Of `bytes` of fresh memory in huge pages; choose several times the last-level cache. Errors: resource_exhausted.
Result<double> measure_read_gbps(ThreadPool& threads, size_t bytes, int repeats);
/// Of memory that is there, the weights of a model for example. Measure right before what is compared with it: the
/// memory of a virtual machine can halve its speed from one second to the next.
double measure_read_gbps(ThreadPool& threads, std::span<const std::span<const std::byte>> regions, int repeats);
/// The same of many small pieces that lie apart, whole pieces to each thread: what memory gives for them with nothing but
/// loads. The hardware's prefetcher needs long runs.
double measure_piecewise_read_gbps(ThreadPool& threads, std::span<const std::span<const std::byte>> pieces, int repeats);

}  // namespace baton
