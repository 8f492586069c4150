#pragma once

#include <cstdint>
#include <functional>
#include <memory>

namespace baton {

/// Fork-join workers of one CPU device: what streams are to a GPU. run() is called by one thread at a
/// time (the engine thread), which takes part as thread 0. Workers spin for a short while after a job, since
/// the next kernel usually follows within microseconds, then sleep: an idle process uses no CPU.
class ThreadPool {
 public:
  /// `threads` includes the caller; 0: as many as the process may run on (affinity mask, cgroup quota).
  explicit ThreadPool(int threads = 0);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int threads() const;
  /// Calls body(thread_index, threads) on every thread and returns when all are done.
  void run(const std::function<void(int thread, int threads)>& body);
  /// Calls body(begin, end, thread) over [0, count) in chunks of at most `grain`, handed out dynamically.
  void parallel_for(int64_t count, int64_t grain,
                    const std::function<void(int64_t begin, int64_t end, int thread)>& body);
  /// Calls body(begin, end, thread) over [0, count), count < 2^32. Each thread walks one contiguous part front to back, in
  /// several calls that follow each other, and only then takes from the back of what the others have left: for work
  /// that streams from memory, where every jump costs.
  void stream_for(int64_t count, const std::function<void(int64_t begin, int64_t end, int thread)>& body);

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

/// CPUs this process may use: affinity mask and cgroup quota considered; at least 1.
int usable_cpus();

}  // namespace baton
