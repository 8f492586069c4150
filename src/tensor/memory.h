#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "base/status.h"

namespace baton {

enum class MemoryPlace : uint8_t { kHost, kCuda };

/// A piece of memory of a device, freed by the destructor. The CPU can read and write it only where place() is kHost.
class Memory {
 public:
  virtual ~Memory() = default;
  virtual std::span<std::byte> span() const = 0;
  virtual MemoryPlace place() const = 0;
};

/// Zeroed host memory that other processes of this host may map, where the kernel gives it huge pages (base/mapped_memory.h).
/// `name` shows in /proc/self/maps.
Result<std::unique_ptr<Memory>> allocate_host_memory(const std::string& name, size_t bytes);

}  // namespace baton
