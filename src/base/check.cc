#include "base/check.h"

#include <execinfo.h>
#include <unistd.h>

#include <array>
#include <cstdlib>
#include <iostream>

namespace baton::internal {

CheckFailure::CheckFailure(const char* file, int line, const char* condition) {
  stream_ << "CHECK failed at " << file << ":" << line << ": " << condition << " ";
}

CheckFailure::~CheckFailure() {
  std::cerr << stream_.str() << std::endl;
  std::array<void*, 64> frames;
  int count = backtrace(frames.data(), static_cast<int>(frames.size()));
  backtrace_symbols_fd(frames.data(), count, STDERR_FILENO);
  std::abort();
}

}  // namespace baton::internal
