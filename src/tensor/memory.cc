#include "tensor/memory.h"

#include "base/mapped_memory.h"

namespace baton {
namespace {

class HostMemory final : public Memory {
 public:
  explicit HostMemory(MappedMemory memory) : memory_(std::move(memory)) {}
  std::span<std::byte> span() const override { return memory_.span(); }
  MemoryPlace place() const override { return MemoryPlace::kHost; }

 private:
  MappedMemory memory_;
};

}  // namespace

Result<std::unique_ptr<Memory>> allocate_host_memory(const std::string& name, size_t bytes) {
  BATON_ASSIGN_OR_RETURN(MappedMemory memory, MappedMemory::create_for_peers(name, bytes));
  return std::unique_ptr<Memory>(std::make_unique<HostMemory>(std::move(memory)));
}

}  // namespace baton
