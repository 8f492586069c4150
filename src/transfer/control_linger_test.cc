#include "transfer/control_linger.h"

#include <gtest/gtest.h>

#include "base/log.h"

namespace baton::transfer {
namespace {

struct Owner : ControlPlane::Delegate {
  Result<Welcome> on_inbound(ControlPlane::Id, const Hello&) override { return Welcome{{"rail"}, {{1, 100, 7}}}; }
  void on_inbound_closed(ControlPlane::Id, int) override { closed = true; }
  void on_inbound_arrived(ControlPlane::Id, const Arrival& arrival) override { last = arrival; }
  void on_welcome(ControlPlane::Id, Welcome) override {}
  void on_outbound_closed(ControlPlane::Id, const Status&) override {}
  bool closed = false;
  Arrival last;
};
struct Writer : Owner {
  void on_welcome(ControlPlane::Id, Welcome) override { welcome = true; }
  bool welcome = false;
};

/// An owner that reads nothing (it is stopped), and a writer with words for it.
class LingeringTest : public ::testing::TestWithParam<const char*> {
 protected:
  void SetUp() override {
    set_log_level(LogLevel::kError);
    ASSERT_TRUE(owner_.listen(GetParam()).ok());
    ASSERT_TRUE(writer_.listen(GetParam()).ok());
    id_ = connect();
  }
  static ControlPlane::Options options(int epoch) {
    ControlPlane::Options options;
    options.epoch = static_cast<Epoch>(epoch);
    options.name = "test";
    options.max_inbound = 256;
    return options;
  }
  ControlPlane::Id connect() {
    writer_side_.welcome = false;
    Result<ControlPlane::Id> id = writer_.connect(owner_.address(), static_cast<Epoch>(1), 1);
    EXPECT_TRUE(id.ok()) << id.status().to_string();
    EXPECT_TRUE(pump([&] { return writer_side_.welcome; }));
    return id.ok() ? *id : 0;
  }
  template <typename Condition>
  bool pump(Condition condition) {
    for (int i = 0; i < 1'000'000; ++i) {
      owner_.progress();
      writer_.progress();
      if (condition()) return true;
    }
    return false;
  }
  /// The kernel's buffers and ours.
  void fill(ControlPlane::Id id) {
    const std::vector<Arrival> many(64 << 10, Arrival{5, 1});
    while (writer_.send_arrivals(id, many)) {
    }
  }
  ManualClock clock_;
  Owner owner_side_;
  Writer writer_side_;
  ControlPlane owner_{options(1), owner_side_, clock_};
  ControlPlane writer_{options(2), writer_side_, clock_};
  ControlPlane::Id id_ = 0;
};

TEST_P(LingeringTest, TheLastWordsReachAnOwnerThatWasStopped) {
  fill(id_);
  const Arrival goodbye{0, 0};
  writer_.close_outbound(id_, std::span(&goodbye, 1));
  EXPECT_EQ(writer_.lingering(), 1u);
  EXPECT_TRUE(writer_.wants_time());
  for (int i = 0; i < 100; ++i) writer_.progress();
  EXPECT_EQ(writer_.lingering(), 1u);
  ASSERT_TRUE(pump([&] { return owner_side_.closed; }));
  EXPECT_EQ(owner_side_.last.tag, 0u);
  EXPECT_EQ(owner_side_.last.count, 0u);
  EXPECT_EQ(writer_.lingering(), 0u);
  EXPECT_FALSE(writer_.wants_time());
}

TEST_P(LingeringTest, WithRoomNothingLingers) {
  const Arrival goodbye{0, 0};
  writer_.close_outbound(id_, std::span(&goodbye, 1));
  EXPECT_EQ(writer_.lingering(), 0u);
  EXPECT_TRUE(pump([&] { return owner_side_.closed; }));
}

TEST_P(LingeringTest, ItEndsWithItsTime) {
  fill(id_);
  writer_.close_outbound(id_);
  clock_.advance_ns(LingeringSockets::kLongestNs - 1);
  writer_.progress();
  EXPECT_EQ(writer_.lingering(), 1u);
  clock_.advance_ns(1);
  writer_.progress();
  EXPECT_EQ(writer_.lingering(), 0u);
  EXPECT_TRUE(pump([&] { return owner_side_.closed; }));
}

TEST_P(LingeringTest, TheirBytesAreBounded) {
  fill(id_);
  writer_.close_outbound(id_);
  for (int i = 0; i < 8; ++i) {
    const ControlPlane::Id id = connect();
    fill(id);
    writer_.close_outbound(id);
    // The owner has read some while the next one connected; at most so many of 4 MiB are kept.
    EXPECT_LE(writer_.lingering(), LingeringSockets::kMostBytes / FrameSocket::kMaxUnsentBytes + 4);
  }
}

INSTANTIATE_TEST_SUITE_P(Sockets, LingeringTest, ::testing::Values("unix:", "tcp:127.0.0.1"),
                         [](const auto& info) { return std::string(info.param).substr(0, std::string(info.param).find(':')); });

}  // namespace
}  // namespace baton::transfer
