#include <gtest/gtest.h>
#include <unistd.h>

#include <memory>
#include <thread>

#include "base/bounded_queue.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/metrics.h"
#include "base/random.h"
#include "base/status.h"
#include "base/unique_handle.h"

namespace baton {
namespace {

Result<int> half(int value) {
  if (value % 2 != 0) return invalid_argument("{} is odd; give an even number", value);
  return value / 2;
}

Result<int> quarter(int value) {
  BATON_ASSIGN_OR_RETURN(int once, half(value));
  BATON_ASSIGN_OR_RETURN(int twice, half(once));
  return twice;
}

TEST(Status, CarriesCodeMessageAndContext) {
  Status status = quarter(6).status();
  EXPECT_EQ(status.code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(status.with_context("quarter").to_string(),
            "INVALID_ARGUMENT: quarter: 3 is odd; give an even number");
  EXPECT_EQ(quarter(8).value(), 2);
  EXPECT_TRUE(Status().with_context("x").ok());
}

TEST(Status, ResultHoldsMoveOnlyValues) {
  Result<std::unique_ptr<int>> result = std::make_unique<int>(7);
  ASSERT_TRUE(result.ok());
  std::unique_ptr<int> value = std::move(result).value();
  EXPECT_EQ(*value, 7);
}

TEST(StatusDeathTest, ReadingTheValueOfAFailureIsABug) {
  EXPECT_DEATH({ auto value = half(3).value(); (void)value; }, "3 is odd");
}

TEST(BoundedQueue, RefusesWhatDoesNotFit) {
  BoundedQueue<int> queue(2);
  EXPECT_TRUE(queue.try_push(1));
  EXPECT_TRUE(queue.try_push(2));
  EXPECT_FALSE(queue.try_push(3));
  EXPECT_EQ(queue.pop_all(), (std::vector<int>{1, 2}));
  queue.close();
  EXPECT_FALSE(queue.try_push(4));
  EXPECT_EQ(queue.pop(), std::nullopt);
}

TEST(BoundedQueue, WakeEndsOneWait) {
  BoundedQueue<int> queue(2);
  std::jthread waker([&] { queue.wake(); });
  EXPECT_EQ(queue.pop(), std::nullopt);
}

TEST(Random, IsAFunctionOfItsSeed) {
  Random a(1), b(1), c(2);
  EXPECT_EQ(a(), b());
  EXPECT_NE(a(), c());
  for (int i = 0; i < 1000; ++i) EXPECT_LT(a.below(10), 10u);
  EXPECT_NE(random_id(), random_id());
}

TEST(Deadline, ExpiresOnItsClock) {
  ManualClock clock;
  Deadline deadline = Deadline::after_ms(clock, 5);
  EXPECT_FALSE(deadline.expired(clock));
  clock.advance_ms(5);
  EXPECT_TRUE(deadline.expired(clock));
  EXPECT_FALSE(Deadline::never().expired(clock));
}

TEST(Metrics, MergesFamiliesOfSeveralProcesses) {
  MetricsRegistry first, second;
  prometheus::BuildCounter().Name("baton_x_total").Help("x").Register(first).Add({}).Increment(1);
  prometheus::BuildCounter().Name("baton_x_total").Help("x").Register(second).Add({}).Increment(2);
  MetricFamilies a = first.Collect(), b = second.Collect();
  add_label(a, "worker", "p");
  add_label(b, "worker", "d");
  std::string text = to_prometheus_text(merge_families({a, b}));
  EXPECT_NE(text.find("baton_x_total{worker=\"p\"} 1"), std::string::npos) << text;
  EXPECT_NE(text.find("baton_x_total{worker=\"d\"} 2"), std::string::npos) << text;
  EXPECT_EQ(text.find("# TYPE"), text.rfind("# TYPE"));
}

TEST(Log, LevelsFilterAndSinkReplacesStderr) {
  std::vector<std::string> lines;
  set_log_sink([&](LogLevel, std::string_view line) { lines.emplace_back(line); });
  log_debug("hidden {}", 1);
  log_error("shown {}", 2);
  set_log_sink(nullptr);
  EXPECT_EQ(lines, std::vector<std::string>{"shown 2"});
}

TEST(Log, NeverBlocksOnAPipeThatNobodyReads) {
  int pipe_fds[2];
  ASSERT_EQ(::pipe(pipe_fds), 0);
  FileDescriptor reader(pipe_fds[0]), writer(pipe_fds[1]);
  FileDescriptor saved(::dup(STDERR_FILENO));
  ::dup2(writer.get(), STDERR_FILENO);
  for (int i = 0; i < 2000; ++i) log_error("{}", std::string(200, 'x'));
  std::vector<char> buffer(1 << 20);
  ssize_t got = ::read(reader.get(), buffer.data(), buffer.size());
  log_error("after");
  ssize_t more = ::read(reader.get(), buffer.data(), buffer.size());
  ::dup2(saved.get(), STDERR_FILENO);
  EXPECT_GT(got, 0);
  ASSERT_GT(more, 0);
  EXPECT_NE(std::string(buffer.data(), more).find("lines of log were dropped"), std::string::npos);
}

}  // namespace
}  // namespace baton
