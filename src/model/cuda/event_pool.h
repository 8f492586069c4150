#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "base/cuda/gpu.h"

namespace baton {

/// CUDA events that are lent out and come back when the last holder lets go, on whatever thread: a transfer waits for an
/// event long after the step that recorded it. Make it with std::make_shared; it lives until the last event is back.
class EventPool : public std::enable_shared_from_this<EventPool> {
 public:
  explicit EventPool(std::shared_ptr<const cuda::Gpu> gpu) : gpu_(std::move(gpu)) {}
  ~EventPool() {
    cuda::CurrentDevice current(*gpu_);
    for (cuda::CUevent event : free_) (void)gpu_->driver().event_destroy(event);
  }
  EventPool(const EventPool&) = delete;
  EventPool& operator=(const EventPool&) = delete;

  /// An event recorded on `stream` now; get() is the CUevent.
  Result<std::shared_ptr<void>> record(cuda::CUstream stream) {
    const cuda::Driver& cu = gpu_->driver();
    cuda::CUevent event = nullptr;
    {
      std::lock_guard lock(mutex_);
      if (!free_.empty()) {
        event = free_.back();
        free_.pop_back();
      }
    }
    if (event == nullptr) {
      BATON_RETURN_IF_ERROR(cu.check(cu.event_create(&event, cuda::kEventDisableTiming), "cuEventCreate"));
    }
    std::shared_ptr<void> lent(event, [pool = shared_from_this()](void* back) {
      std::lock_guard lock(pool->mutex_);
      pool->free_.push_back(static_cast<cuda::CUevent>(back));
    });
    BATON_RETURN_IF_ERROR(cu.check(cu.event_record(event, stream), "cuEventRecord"));
    return lent;
  }

 private:
  const std::shared_ptr<const cuda::Gpu> gpu_;
  std::mutex mutex_;
  std::vector<cuda::CUevent> free_;
};

}  // namespace baton
