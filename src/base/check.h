#pragma once

#include <sstream>

namespace baton::internal {

/// Collects the message of a failed check and ends the process when it goes out of scope.
class CheckFailure {
 public:
  CheckFailure(const char* file, int line, const char* condition);
  [[noreturn]] ~CheckFailure();
  std::ostream& stream() { return stream_; }

 private:
  std::ostringstream stream_;
};

/// Lets the macro be one expression of type void on both sides of `?:`.
struct Voidify {
  void operator&(std::ostream&) const {}
};

}  // namespace baton::internal

/// A broken invariant is a bug: say where and stop, before wrong bytes are served. Always on.
#define BATON_CHECK(condition)                                                        \
  (condition) ? (void)0                                                               \
              : ::baton::internal::Voidify() &                                        \
                    ::baton::internal::CheckFailure(__FILE__, __LINE__, #condition).stream()
