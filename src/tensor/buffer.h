#pragma once

#include <cstddef>
#include <span>

#include "base/status.h"

namespace baton {

/// Zero-filled anonymous memory on 2 MiB boundaries with transparent huge pages asked for. RAII, movable.
/// Weights and KV pools live in it. Errors: resource_exhausted with the size that was asked for.
class Buffer {
 public:
  Buffer() = default;
  static Result<Buffer> allocate(size_t bytes);
  Buffer(Buffer&& other) noexcept;
  Buffer& operator=(Buffer&& other) noexcept;
  ~Buffer();

  std::byte* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  std::span<std::byte> span() const { return {data_, bytes_}; }
  template <typename T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

}  // namespace baton
