#include "tensor/thread_pool.h"

#include <sched.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <thread>
#include <vector>

#include "base/check.h"

namespace baton {
namespace {

using Clock = std::chrono::steady_clock;

void cpu_relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

/// How long to spin before sleeping. It grows when spinning was worth it (the next job came) and shrinks when
/// it was not, so a process that is idle or whose CPUs are wanted by others soon stops burning time.
class SpinBudget {
 public:
  explicit SpinBudget(bool enabled) : budget_(enabled ? kMax : Clock::duration::zero()), enabled_(enabled) {}

  /// True when done() became true while spinning.
  template <typename Done>
  bool wait(const Done& done) {
    if (done()) return true;
    if (!enabled_) return false;
    const Clock::time_point end = Clock::now() + budget_;
    do {
      for (int i = 0; i < 64; ++i) {
        cpu_relax();
        if (done()) {
          budget_ = std::min(kMax, budget_ * 2);
          return true;
        }
      }
      // Somebody else may need this CPU to make done() true; a no-op when nobody else is runnable.
      sched_yield();
    } while (Clock::now() < end);
    budget_ = std::max(kMin, budget_ / 2);
    return done();
  }

 private:
  static constexpr Clock::duration kMax = std::chrono::microseconds(80);
  static constexpr Clock::duration kMin = std::chrono::microseconds(5);
  Clock::duration budget_;
  bool enabled_;
};

/// What is left of one thread's part, in a cache line of its own: while nobody steals, nobody else touches it.
class alignas(64) Part {
 public:
  void set(uint64_t begin, uint64_t end) { value_.store(begin << 32 | end, std::memory_order_relaxed); }
  uint64_t size() const { return size_of(value_.load(std::memory_order_relaxed)); }

  /// The owner's next piece: a quarter of what is left, so that there is something to steal until the end.
  bool take_front(int64_t* begin, int64_t* end) {
    uint64_t now = value_.load(std::memory_order_relaxed);
    while (size_of(now) > 0) {
      const uint64_t piece = std::max<uint64_t>(1, size_of(now) / 4);
      if (!value_.compare_exchange_weak(now, now + (piece << 32), std::memory_order_relaxed)) continue;
      *begin = static_cast<int64_t>(now >> 32);
      *end = *begin + static_cast<int64_t>(piece);
      return true;
    }
    return false;
  }

  /// The back half, moved to `thief`, which is empty. (A part that looks as it did has lost nothing: work is handed out once.)
  bool give_back_half(Part& thief) {
    uint64_t now = value_.load(std::memory_order_relaxed);
    while (size_of(now) > 0) {
      const uint64_t half = (size_of(now) + 1) / 2;
      if (!value_.compare_exchange_weak(now, now - half, std::memory_order_relaxed)) continue;
      const uint64_t end = now & 0xffffffff;
      thief.set(end - half, end);
      return true;
    }
    return false;
  }

 private:
  static uint64_t size_of(uint64_t value) { return (value & 0xffffffff) - (value >> 32); }
  std::atomic<uint64_t> value_{0};
};

}  // namespace

/// One job at a time. The caller writes body_ and pending_, then raises generation_ (release); a worker that sees
/// the new generation (acquire) may read them. Each worker lowers pending_ (release) when done; the caller
/// returns when it reads 0 (acquire), so the effects of all bodies are visible to it.
struct ThreadPool::Impl {
  explicit Impl(int threads)
      : threads(threads), spin(threads <= usable_cpus()), caller_spin(spin), parts(static_cast<size_t>(threads)) {
    workers.reserve(static_cast<size_t>(threads - 1));
    for (int i = 1; i < threads; ++i) {
      workers.emplace_back([this, i] { work(i); });
    }
  }

  ~Impl() {
    body = nullptr;  // says stop
    generation.fetch_add(1, std::memory_order_release);
    generation.notify_all();
    for (std::thread& worker : workers) worker.join();
  }

  void work(int index) {
    SpinBudget budget(spin);
    uint32_t seen = 0;
    while (true) {
      const auto changed = [&] { return generation.load(std::memory_order_acquire) != seen; };
      if (!budget.wait(changed)) generation.wait(seen, std::memory_order_acquire);
      if (!changed()) continue;  // woken for nothing
      ++seen;
      if (body == nullptr) return;
      (*body)(index, threads);
      if (pending.fetch_sub(1, std::memory_order_acq_rel) == 1) pending.notify_one();
    }
  }

  void run(const std::function<void(int, int)>& job) {
    if (threads == 1) {
      job(0, 1);
      return;
    }
    BATON_CHECK(!running) << "ThreadPool::run is neither reentrant nor for two threads";
    running = true;
    body = &job;
    pending.store(threads - 1, std::memory_order_relaxed);
    generation.fetch_add(1, std::memory_order_release);
    generation.notify_all();
    job(0, threads);
    const auto done = [&] { return pending.load(std::memory_order_acquire) == 0; };
    while (!caller_spin.wait(done)) {
      const int left = pending.load(std::memory_order_acquire);
      if (left != 0) pending.wait(left, std::memory_order_acquire);
    }
    running = false;
  }

  const int threads;
  const bool spin;
  SpinBudget caller_spin;  // of the calling thread
  bool running = false;    // of the calling thread
  const std::function<void(int, int)>* body = nullptr;
  alignas(64) std::atomic<uint32_t> generation{0};
  alignas(64) std::atomic<int> pending{0};
  std::vector<Part> parts;
  std::vector<std::thread> workers;
};

ThreadPool::ThreadPool(int threads) : impl_(std::make_unique<Impl>(threads > 0 ? threads : usable_cpus())) {}

ThreadPool::~ThreadPool() = default;

int ThreadPool::threads() const { return impl_->threads; }

void ThreadPool::run(const std::function<void(int, int)>& body) { impl_->run(body); }

void ThreadPool::parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t, int)>& body) {
  if (count <= 0) return;
  grain = std::max<int64_t>(1, grain);
  if (impl_->threads == 1 || count <= grain) {
    for (int64_t begin = 0; begin < count; begin += grain) body(begin, std::min(begin + grain, count), 0);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto share = [&](int thread, int) {
    while (true) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= count) return;
      body(begin, std::min(begin + grain, count), thread);
    }
  };
  impl_->run(std::cref(share));  // a reference fits into std::function without an allocation
}

void ThreadPool::stream_for(int64_t count, const std::function<void(int64_t, int64_t, int)>& body) {
  BATON_CHECK(count >= 0 && count <= UINT32_MAX) << count;
  if (count == 0) return;
  std::vector<Part>& parts = impl_->parts;
  const auto threads = static_cast<uint64_t>(impl_->threads), all = static_cast<uint64_t>(count);
  for (uint64_t i = 0; i < threads; ++i) parts[i].set(all * i / threads, all * (i + 1) / threads);
  const auto share = [&](int thread, int) {
    Part& own = parts[static_cast<size_t>(thread)];
    while (true) {
      int64_t begin = 0, end = 0;
      while (own.take_front(&begin, &end)) body(begin, end, thread);
      auto richest = std::max_element(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.size() < b.size(); });
      if (!richest->give_back_half(own) && richest->size() == 0) return;
    }
  };
  impl_->run(std::cref(share));
}

}  // namespace baton
