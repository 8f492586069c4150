#pragma once

#include <utility>

namespace baton {

/// Owns one C handle. Traits: `using Handle = ...; static Handle null(); static void close(Handle);`
/// Declare members in the order in which the C library wants them opened; destruction is the reverse.
template <typename Traits>
class UniqueHandle {
 public:
  using Handle = typename Traits::Handle;

  UniqueHandle() = default;
  explicit UniqueHandle(Handle handle) : handle_(handle) {}
  UniqueHandle(UniqueHandle&& other) noexcept : handle_(other.release()) {}
  UniqueHandle& operator=(UniqueHandle&& other) noexcept {
    if (this != &other) reset(other.release());
    return *this;
  }
  ~UniqueHandle() { reset(); }

  Handle get() const { return handle_; }
  explicit operator bool() const { return handle_ != Traits::null(); }
  Handle operator->() const { return handle_; }
  Handle release() { return std::exchange(handle_, Traits::null()); }
  void reset(Handle handle = Traits::null()) {
    Handle old = std::exchange(handle_, handle);
    if (old != Traits::null()) Traits::close(old);
  }

 private:
  Handle handle_ = Traits::null();
};

struct FileDescriptorTraits {
  using Handle = int;
  static int null() { return -1; }
  static void close(int fd);
};
using FileDescriptor = UniqueHandle<FileDescriptorTraits>;

}  // namespace baton
