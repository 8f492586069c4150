#include "transfer/control.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "base/log.h"
#include "transfer/descriptors.h"
#include "transfer/wire.h"

namespace baton::transfer {
namespace {

using ::testing::HasSubstr;

struct Recorder : ControlPlane::Delegate {
  Result<Welcome> on_inbound(ControlPlane::Id id, const Hello& hello) override {
    inbound.push_back(id);
    names.push_back(hello.name);
    if (!refuse.ok()) return refuse;
    return Welcome{{"rail"}, {{1, 100, 7}}};
  }
  void on_inbound_closed(ControlPlane::Id, int) override { ++inbound_closed; }
  void on_inbound_arrived(ControlPlane::Id, const Arrival& arrival) override { arrivals.push_back(arrival); }
  void on_welcome(ControlPlane::Id, Welcome welcome) override { welcomes.push_back(std::move(welcome)); }
  void on_outbound_closed(ControlPlane::Id id, const Status& why) override {
    closed.push_back(why);
    if (plane != nullptr) plane->close_outbound(id);
  }
  Status refuse;
  ControlPlane* plane = nullptr;  // set: links end at once
  std::vector<ControlPlane::Id> inbound;
  std::vector<std::string> names;
  std::vector<Arrival> arrivals;
  std::vector<Welcome> welcomes;
  std::vector<Status> closed;
  int inbound_closed = 0;
};

constexpr Epoch kOwner = static_cast<Epoch>(100);
constexpr Epoch kWriter = static_cast<Epoch>(200);

class ControlTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    set_log_level(LogLevel::kError);
    ASSERT_TRUE(owner_.listen(GetParam()).ok());
    ASSERT_TRUE(writer_.listen(GetParam()).ok());
  }
  template <typename Condition>
  bool pump(Condition condition) {
    for (int i = 0; i < 200000; ++i) {
      owner_.progress();
      writer_.progress();
      if (condition()) return true;
    }
    return false;
  }
  static ControlPlane::Options options(Epoch epoch, const char* name) {
    ControlPlane::Options options;
    options.epoch = epoch;
    options.name = name;
    options.writer_must_confirm = true;
    options.max_inbound = 8;
    return options;
  }
  ManualClock clock_;
  Recorder owner_side_, writer_side_;
  ControlPlane owner_{options(kOwner, "owner"), owner_side_, clock_};
  ControlPlane writer_{options(kWriter, "writer"), writer_side_, clock_};
};

TEST_P(ControlTest, HelloWelcomeArrivalsAndTheEnd) {
  Result<ControlPlane::Id> id = writer_.connect(owner_.address(), kOwner, 1);
  ASSERT_TRUE(id.ok()) << id.status().to_string();
  ASSERT_TRUE(pump([&] { return !writer_side_.welcomes.empty(); }));
  EXPECT_EQ(owner_side_.names, std::vector<std::string>{"writer"});
  EXPECT_EQ(writer_side_.welcomes[0].rails, std::vector<std::string>{"rail"});
  EXPECT_EQ(writer_side_.welcomes[0].pools[0].key, 7u);
  EXPECT_TRUE(writer_.still_connected(*id));
  std::array<Arrival, 2> arrivals{Arrival{5, 3}, Arrival{6, 1}};
  EXPECT_TRUE(writer_.send_arrivals(*id, arrivals));
  writer_.close_outbound(*id);  // what was sent before the end counts
  ASSERT_TRUE(pump([&] { return owner_side_.inbound_closed == 1; }));
  ASSERT_EQ(owner_side_.arrivals.size(), 2u);
  EXPECT_EQ(owner_side_.arrivals[0].count, 3u);
  EXPECT_EQ(owner_.inbound(), 0u);
}

TEST_P(ControlTest, AnotherLifeIsRefused) {
  ASSERT_TRUE(writer_.connect(owner_.address(), static_cast<Epoch>(99), 1).ok());
  ASSERT_TRUE(pump([&] { return !writer_side_.closed.empty(); }));
  EXPECT_THAT(writer_side_.closed[0].message(), HasSubstr("earlier life"));
  EXPECT_TRUE(owner_side_.inbound.empty());
}

TEST_P(ControlTest, TheOwnersReasonReachesTheWriter) {
  owner_side_.refuse = resource_exhausted("no endpoint left");
  ASSERT_TRUE(writer_.connect(owner_.address(), kOwner, 1).ok());
  ASSERT_TRUE(pump([&] { return !writer_side_.closed.empty(); }));
  EXPECT_THAT(writer_side_.closed[0].message(), HasSubstr("no endpoint left"));
  EXPECT_EQ(owner_side_.inbound_closed, 0);
}

TEST_P(ControlTest, AFenceIsCertainOnlyWhenTheWriterHasConfirmed) {
  Result<ControlPlane::Id> id = writer_.connect(owner_.address(), kOwner, 1);
  ASSERT_TRUE(pump([&] { return !writer_side_.welcomes.empty(); }));
  EXPECT_EQ(owner_.fence(kWriter, 1).code(), StatusCode::kUnavailable);
  // The writer hears of it, but has something under way still.
  ASSERT_TRUE(pump([&] { return !writer_side_.closed.empty(); }));
  EXPECT_THAT(writer_side_.closed[0].message(), HasSubstr("fenced"));
  EXPECT_EQ(owner_.fence(kWriter, 1).code(), StatusCode::kUnavailable);
  writer_.close_outbound(*id);
  ASSERT_TRUE(pump([&] { return owner_side_.inbound_closed == 1; }));
  EXPECT_TRUE(owner_.fence(kWriter, 1).ok());
  // Old metadata stays outside, new metadata gets in.
  ASSERT_TRUE(writer_.connect(owner_.address(), kOwner, 1).ok());
  ASSERT_TRUE(pump([&] { return writer_side_.closed.size() == 2; }));
  ASSERT_TRUE(writer_.connect(owner_.address(), kOwner, 2).ok());
  ASSERT_TRUE(pump([&] { return writer_side_.welcomes.size() == 2; }));
}

TEST_P(ControlTest, GarbageAndSilenceCloseTheConnection) {
  ASSERT_TRUE(writer_.connect(owner_.address(), kOwner, 1).ok());
  ASSERT_TRUE(pump([&] { return owner_.inbound() == 1 && !writer_side_.welcomes.empty(); }));
  if (GetParam() != "unix:") return;
  std::string name = owner_.address().substr(5);
  auto dial = [&] {
    int fd = ::socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_un address{};
    address.sun_family = AF_UNIX;
    std::memcpy(address.sun_path + 1, name.data(), name.size());
    EXPECT_EQ(::connect(fd, reinterpret_cast<sockaddr*>(&address),
                        static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + 1 + name.size())), 0);
    return FileDescriptor(fd);
  };
  std::vector<std::string> inputs = {
      std::string(64, '\xff'),               // a frame of 4 GiB
      std::string("\0\0\0\0\x01", 5),        // an empty Hello
      std::string("\0\0\0\0\x04", 5),        // arrivals before the Hello
      std::string("\0\0\0\0\x63", 5),        // no such type
      std::string("\0\0\0\0\x07", 5),        // a check before the Hello
      std::string("\0\0\0\0\x09", 5),        // a read before the Hello
      std::string("\x04\0\0\0\x01" "junk", 9),
  };
  for (const std::string& input : inputs) {
    FileDescriptor fd = dial();
    ASSERT_EQ(::send(fd.get(), input.data(), input.size(), MSG_NOSIGNAL), static_cast<ssize_t>(input.size()));
    char answer[512];
    ASSERT_TRUE(pump([&] {
      ssize_t n = ::recv(fd.get(), answer, sizeof(answer), MSG_DONTWAIT);
      return n == 0 || (n < 0 && errno == ECONNRESET);
    }));
  }
  FileDescriptor silent = dial();
  ASSERT_TRUE(pump([&] { return owner_.inbound() == 2; }));
  EXPECT_TRUE(owner_.wants_time());
  clock_.advance_ms(6000);
  ASSERT_TRUE(pump([&] { return owner_.inbound() == 1; }));
  // More than the limit are turned away at the door.
  std::vector<FileDescriptor> many;
  for (int i = 0; i < 20; ++i) many.push_back(dial());
  ASSERT_TRUE(pump([&] { return owner_.inbound() == 8; }));
  for (int i = 0; i < 100; ++i) owner_.progress();
  EXPECT_EQ(owner_.inbound(), 8u);
}

TEST_P(ControlTest, WithoutDescriptorsAPeerIsTurnedAwayAtOnce) {
  ASSERT_TRUE(pump([] { return true; }));  // the undefined-behaviour sanitizer wants a pipe to look at an object for the first time
  ASSERT_TRUE(writer_.connect(owner_.address(), kOwner, 1).ok());
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit few{std::min<rlim_t>(before.rlim_max, 256), before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &few), 0);
  std::vector<FileDescriptor> all;
  for (int fd = ::dup(owner_.poll_fd()); fd >= 0; fd = ::dup(owner_.poll_fd())) all.emplace_back(fd);
  Status enough = check_descriptors(owner_.poll_fd(), 1, "a test");
  Status no_socket = writer_.connect(owner_.address(), kOwner, 2).status();
  const bool told = pump([&] { return !writer_side_.closed.empty(); });
  all.clear();
  Status room = check_descriptors(owner_.poll_fd(), 4, "a test");
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_TRUE(told);
  EXPECT_TRUE(owner_side_.inbound.empty());
  EXPECT_EQ(enough.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(enough.message(), HasSubstr("ulimit -n"));
  EXPECT_EQ(no_socket.code(), StatusCode::kResourceExhausted);
  EXPECT_TRUE(room.ok()) << room.to_string();
  // And when there are some again, the next one is let in.
  ASSERT_TRUE(writer_.connect(owner_.address(), kOwner, 3).ok());
  EXPECT_TRUE(pump([&] { return !writer_side_.welcomes.empty(); }));
}

TEST_P(ControlTest, ChecksAndTheirAnswers) {
  Result<ControlPlane::Id> id = writer_.connect(owner_.address(), kOwner, 1);
  ASSERT_TRUE(pump([&] { return !writer_side_.welcomes.empty(); }));
  Check check;
  check.block_bytes = 64;
  check.blocks = {{128, 5}};
  std::vector<CheckChannel::Received> received;
  for (check.id = 1; check.id <= Check::kMaxOpen; ++check.id) ASSERT_TRUE(writer_.send_check(*id, check));
  ASSERT_TRUE(pump([&] {
    owner_.take_checks(received);
    return received.size() == Check::kMaxOpen;
  }));
  EXPECT_EQ(received[0].from, "writer");
  EXPECT_EQ(received[0].check.blocks, check.blocks);
  const ControlPlane::Id inbound = received[0].connection;
  EXPECT_TRUE(owner_.serves(inbound));
  EXPECT_FALSE(writer_.serves(*id)) << "that is the other direction";
  CheckResult result;
  result.id = 1;
  ASSERT_TRUE(owner_.send_check_result(inbound, result));
  std::vector<CheckChannel::Answer> answers;
  ASSERT_TRUE(pump([&] {
    writer_.take_check_results(answers);
    return !answers.empty();
  }));
  EXPECT_EQ(answers[0].connection, *id);
  EXPECT_EQ(answers[0].result, result);
  // One more has room, and a Check that is taken back needs none. Another one is too much.
  ASSERT_TRUE(writer_.send_check(*id, check));
  Check back;
  back.id = check.id;
  ASSERT_TRUE(writer_.send_check(*id, back));
  received.clear();
  ASSERT_TRUE(pump([&] {
    owner_.take_checks(received);
    return received.size() == 2;
  }));
  EXPECT_TRUE(owner_.serves(inbound));
  ASSERT_TRUE(writer_.send_check(*id, check));
  ASSERT_TRUE(pump([&] { return owner_side_.inbound_closed == 1; }));
  EXPECT_FALSE(owner_.serves(inbound));
}

TEST_P(ControlTest, ReadsAndTheirAnswers) {
  Result<ControlPlane::Id> id = writer_.connect(owner_.address(), kOwner, 1);
  ASSERT_TRUE(pump([&] { return !writer_side_.welcomes.empty(); }));
  ReadRequest request;
  request.kind = ReadRequest::Kind::kRead;
  request.length_bytes = 64;
  request.blocks = {{1, 2}};
  std::vector<ReadChannel::Received> received;
  const auto receive = [&](size_t count) {
    return pump([&] {
      owner_.take_read_requests(received);
      return received.size() == count;
    });
  };
  for (request.tag = 1; request.tag <= ReadRequest::kMaxOpen; ++request.tag) ASSERT_TRUE(writer_.send_read_request(*id, request));
  ASSERT_TRUE(receive(ReadRequest::kMaxOpen));
  EXPECT_EQ(received[0].from, "writer");
  EXPECT_EQ(received[0].epoch, kWriter);
  EXPECT_EQ(received[0].request.blocks, request.blocks);
  const ControlPlane::Id inbound = received[0].connection;
  ReadAnswer started, ended;
  started.kind = ReadAnswer::Kind::kStarted;
  started.tag = ended.tag = 1;
  started.messages = 3;
  ASSERT_TRUE(owner_.send_read_answer(inbound, started));
  ASSERT_TRUE(owner_.send_read_answer(inbound, ended));
  std::vector<ReadChannel::Answer> answers;
  ASSERT_TRUE(pump([&] {
    writer_.take_read_answers(answers);
    return answers.size() == 2;
  }));
  EXPECT_EQ(answers[0].connection, *id);
  EXPECT_EQ(answers[0].answer, started);
  EXPECT_EQ(answers[1].answer, ended);
  // What has ended makes room, and a Cancel needs none. One more is too much.
  ASSERT_TRUE(writer_.send_read_request(*id, request));
  ReadRequest cancel;
  cancel.tag = request.tag;
  ASSERT_TRUE(writer_.send_read_request(*id, cancel));
  received.clear();
  ASSERT_TRUE(receive(2));
  std::vector<ControlPlane::Id> gone;
  owner_.take_gone_readers(gone);
  EXPECT_TRUE(gone.empty());
  ASSERT_TRUE(writer_.send_read_request(*id, request));
  ASSERT_TRUE(pump([&] { return owner_side_.inbound_closed == 1; }));
  owner_.take_gone_readers(gone);
  EXPECT_EQ(gone, std::vector<ControlPlane::Id>{inbound});
  EXPECT_FALSE(owner_.serves(inbound));
}

TEST_P(ControlTest, WhoIsFencedIsServedNoMore) {
  Result<ControlPlane::Id> id = writer_.connect(owner_.address(), kOwner, 1);
  ASSERT_TRUE(pump([&] { return !writer_side_.welcomes.empty(); }));
  const ControlPlane::Id inbound = owner_side_.inbound.at(0);
  EXPECT_TRUE(owner_.serves(inbound));
  EXPECT_FALSE(owner_.fence(kWriter, 1).ok());  // not confirmed yet
  EXPECT_FALSE(owner_.serves(inbound));
}

TEST(Descriptors, ALimitThatIsReachedIsNoFaultOfOurs) {
  for (int error : {EMFILE, ENFILE, ENOMEM}) {
    EXPECT_EQ(descriptor_error("epoll_create1", error).code(), StatusCode::kResourceExhausted) << error;
  }
  const Status watches = watch_error("epoll_ctl", ENOSPC);
  EXPECT_EQ(watches.code(), StatusCode::kResourceExhausted);
  EXPECT_THAT(watches.message(), HasSubstr("fs.epoll.max_user_watches"));
  EXPECT_EQ(watch_error("epoll_ctl", EBADF).code(), StatusCode::kInternal);
}

TEST_P(ControlTest, NobodyThereIsAnError) {
  std::string address = GetParam() == "unix:" ? "unix:baton-no-such-agent" : GetParam() + ":1";
  Result<ControlPlane::Id> id = writer_.connect(address, kOwner, 1);
  if (id.ok()) {
    ASSERT_TRUE(pump([&] { return !writer_side_.closed.empty(); }));
  } else {
    EXPECT_EQ(id.status().code(), StatusCode::kUnavailable);
  }
  for (const char* bad : {"", "tcp:", "tcp:1.2.3.4", "tcp:1.2.3.4:99999999999", "tcp:name:80", "unix:", "http:1:1",
                          "tcp:127.0.0.1:", "tcp:127.0.0.1:x"}) {
    EXPECT_FALSE(writer_.connect(bad, kOwner, 1).ok()) << bad;
  }
}

INSTANTIATE_TEST_SUITE_P(Sockets, ControlTest, ::testing::Values("unix:", "tcp:127.0.0.1", "tcp:[::1]"),
                         [](const auto& info) {
                           return info.param == "unix:" ? "unix" : info.param == "tcp:[::1]" ? "tcp6" : "tcp4";
                         });

}  // namespace
}  // namespace baton::transfer
