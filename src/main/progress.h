#pragma once

#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <string>

#include "base/clock.h"
#include "base/log.h"

namespace baton::cli {

/// Says how far the loading of a model is: a line every two seconds, nothing for what loads in less.
class LoadProgress {
 public:
  explicit LoadProgress(std::string name) : name_(std::move(name)), last_ns_(SteadyClock::instance().now_ns()) {}

  void update(int64_t done_bytes, int64_t total_bytes) {
    int64_t now = SteadyClock::instance().now_ns();
    if (now - last_ns_ < 2'000'000'000 || total_bytes <= 0) return;
    last_ns_ = now;
    fmt::print(stderr, "{}: loading weights, {:.1f} of {:.1f} GB ({} %)\n", name_, static_cast<double>(done_bytes) * 1e-9,
               static_cast<double>(total_bytes) * 1e-9, 100 * done_bytes / total_bytes);
  }

 private:
  std::string name_;
  int64_t last_ns_;
};

}  // namespace baton::cli
