#include "router/router.h"

#include <gtest/gtest.h>

#include <map>

#include "base/log.h"
#include "protocol/in_memory_network.h"

namespace baton {
namespace {

using protocol::Channel;
using protocol::Frame;

/// A worker that does what the test says. Token i of a request is prompt[0] + i.
class FakeWorker {
 public:
  FakeWorker(protocol::InMemoryNetwork& network, std::string name, protocol::Role role, std::string model = "m")
      : name_(std::move(name)) {
    protocol::Hello* hello = hello_.mutable_hello();
    hello->set_protocol_version(protocol::kProtocolVersion);
    hello->set_epoch(random_id());
    hello->set_name(name_);
    hello->set_role(role);
    hello->set_model(std::move(model));
    hello->set_vocab_size(1000);
    hello->set_max_model_len(512);
    hello->set_block_tokens(16);
    protocol::ChannelHandler handler;
    handler.on_frame = [this](std::shared_ptr<Channel> channel, Frame&& frame) { on_frame(std::move(channel), frame); };
    handler.on_closed = [this](std::shared_ptr<Channel>, Status) { router_.reset(); };
    listener_ = network.process(name_).listen(name_, handler).value();
  }

  void holds(const std::string& model) { hello_.mutable_hello()->set_fingerprint("kv version=1 model=" + model); }
  void send_token(uint64_t request, bool finish = false) {
    const protocol::Generate& generate = requests.at(request);
    int index = generate.generated_size() + sent[request]++;
    Frame frame;
    auto* output = frame.mutable_step_output()->add_tokens();
    output->set_request(request);
    output->set_has_token(true);
    output->set_token(generate.prompt(0) + index);
    output->set_index(index);
    if (finish) output->set_finish(1);
    ASSERT_TRUE(router_->send(frame).ok());
  }
  /// Tokens `count` in number in one frame, the last of them the end.
  void send_rest_at_once(uint64_t request, int count) {
    const protocol::Generate& generate = requests.at(request);
    Frame frame;
    for (int i = 0; i < count; ++i) {
      int index = generate.generated_size() + sent[request]++;
      auto* output = frame.mutable_step_output()->add_tokens();
      output->set_request(request);
      output->set_has_token(true);
      output->set_token(generate.prompt(0) + index);
      output->set_index(index);
      if (i + 1 == count) output->set_finish(1);
    }
    ASSERT_TRUE(router_->send(frame).ok());
  }
  void send_error(uint64_t request, StatusCode code) {
    Frame frame;
    auto* output = frame.mutable_step_output()->add_tokens();
    output->set_request(request);
    output->set_finish(4);
    output->mutable_status()->set_code(static_cast<int>(code));
    output->mutable_status()->set_message("said the worker");
    ASSERT_TRUE(router_->send(frame).ok());
  }
  void send_pair(const std::string& address, bool ready, int32_t local_prefill_tokens = 0) {
    Frame frame;
    frame.mutable_load()->set_local_prefill_tokens(local_prefill_tokens);
    frame.mutable_load()->set_blocks_total(100);
    auto* pair = frame.mutable_load()->add_pairs();
    pair->set_address(address);
    pair->set_peer(address);
    pair->set_ready(ready);
    if (!ready) pair->set_why_not("no path");
    ASSERT_TRUE(router_->send(frame).ok());
  }

  std::map<uint64_t, protocol::Generate> requests;
  std::map<uint64_t, int> sent;
  std::vector<uint64_t> cancelled;
  int heads_ups = 0;
  protocol::SetPeers peers;

 private:
  void on_frame(std::shared_ptr<Channel> channel, const Frame& frame) {
    if (frame.has_hello()) {
      router_ = std::move(channel);
      ASSERT_TRUE(router_->send(hello_).ok());
    } else if (frame.has_generate()) {
      requests[frame.generate().request()] = frame.generate();
    } else if (frame.has_cancel()) {
      cancelled.push_back(frame.cancel().request());
    } else if (frame.has_set_peers()) {
      peers = frame.set_peers();
    } else if (frame.has_heads_up()) {
      ++heads_ups;
    }
  }

  std::string name_;
  Frame hello_;
  std::unique_ptr<protocol::Listener> listener_;
  std::shared_ptr<Channel> router_;
};

class RouterTest : public ::testing::Test {
 protected:
  RouterTest() : network_(clock_, 1) { set_log_sink([](LogLevel, std::string_view) {}); }
  ~RouterTest() override {
    if (core_) core_->shutdown();
    pump();
    core_.reset();
    set_log_sink(nullptr);
  }

  FakeWorker& add_worker(const std::string& name, protocol::Role role, std::string model = "m") {
    workers_[name] = std::make_unique<FakeWorker>(network_, name, role, std::move(model));
    return *workers_[name];
  }

  void start(std::vector<std::string> addresses, std::function<void(RouterConfig&)> change = {}) {
    RouterConfig config;
    config.workers = std::move(addresses);
    config.served_model_name = "m";
    config.queue_timeout_ms = 1000;
    if (change) change(config);
    protocol::ChannelHandler handler;
    handler.on_frame = [this](std::shared_ptr<Channel> c, Frame&& f) { core_->on_frame(c, std::move(f)); };
    handler.on_closed = [this](std::shared_ptr<Channel> c, Status s) { core_->on_closed(c, s); };
    core_ = std::make_unique<RouterCore>(config, clock_, network_.process("router"), handler);
    core_->start();
    pump();
  }

  void pump() {
    while (network_.pump() > 0) {
    }
  }
  void pass(int64_t ms) {
    for (int64_t t = 0; t < ms; t += 10) {
      clock_.advance_ms(10);
      pump();
      core_->tick();
      pump();
    }
  }

  struct Outcome {
    std::vector<int32_t> tokens;
    int finished = 0;
    Status status;
  };
  void submit(uint64_t id, int32_t first_token = 100) {
    RouterRequest request;
    request.prompt = {first_token, 1, 2};
    request.sampling.set_max_tokens(50);
    ASSERT_TRUE(core_->submit(id, request, [this, id](RouterEvent&& event) {
      Outcome& outcome = outcomes_[id];
      for (const auto& token : event.tokens) {
        if (token.has_token()) outcome.tokens.push_back(token.token());
      }
      if (event.finished) {
        ++outcome.finished;
        outcome.status = event.status;
      }
    }).ok());
    pump();
  }

  ManualClock clock_;
  protocol::InMemoryNetwork network_;
  std::map<std::string, std::unique_ptr<FakeWorker>> workers_;
  std::unique_ptr<RouterCore> core_;
  std::map<uint64_t, Outcome> outcomes_;
};

TEST_F(RouterTest, SendsARequestToTheDecodeWorkerWithItsPrefillCandidates) {
  add_worker("p", protocol::ROLE_PREFILL);
  FakeWorker& decode = add_worker("d", protocol::ROLE_DECODE);
  start({"p", "d"});
  EXPECT_EQ(decode.peers.prefill_size(), 1);
  submit(7);
  ASSERT_EQ(decode.requests.count(7), 1u);
  ASSERT_EQ(decode.requests[7].prefill_size(), 1);
  EXPECT_EQ(decode.requests[7].prefill(0).address(), "p");
  decode.send_token(7);
  decode.send_token(7, true);
  pump();
  EXPECT_EQ(outcomes_[7].tokens, (std::vector<int32_t>{100, 101}));
  EXPECT_EQ(outcomes_[7].finished, 1);
  EXPECT_TRUE(outcomes_[7].status.ok());
  EXPECT_EQ(core_->health().requests, 0);
}

TEST_F(RouterTest, AnIdlePrefillWorkerIsToldThatWorkIsOnItsWay) {
  FakeWorker& prefill = add_worker("p", protocol::ROLE_PREFILL);
  FakeWorker& decode = add_worker("d", protocol::ROLE_DECODE);
  start({"p", "d"});
  submit(7);
  EXPECT_EQ(prefill.heads_ups, 1);
  submit(8);
  EXPECT_EQ(prefill.heads_ups, 1) << "it has work";
  for (uint64_t request : {7, 8}) decode.send_token(request, true);
  decode.send_pair("p", true, 1000);
  pump();
  submit(9);
  EXPECT_EQ(prefill.heads_ups, 1) << "so short a prompt stays with the decode worker";
}

TEST_F(RouterTest, RefusesAnotherModelUnderTheSameName) {
  add_worker("a", protocol::ROLE_DECODE).holds("one");
  FakeWorker& other = add_worker("b", protocol::ROLE_DECODE);
  other.holds("two");
  start({"a", "b"});
  const WorkerEntry& refused = *core_->registry().by_address("b");
  EXPECT_EQ(refused.state, WorkerState::kRefused);
  EXPECT_NE(refused.why_not.find("holds the model two, but worker a (a) holds one"), std::string::npos) << refused.why_not;
  for (uint64_t id = 1; id <= 4; ++id) submit(id);
  EXPECT_TRUE(other.requests.empty());
}

// A worker closes the channel on a frame beyond the protocol's limits, and every request on it suffers.
TEST_F(RouterTest, NeverSendsWhatAWorkerWouldTakeForABrokenPeer) {
  FakeWorker& decode = add_worker("d", protocol::ROLE_DECODE);
  start({"d"});
  RouterRequest request;
  request.prompt = {1};
  request.sampling.set_max_tokens(5);
  request.sampling.set_top_k(INT32_MAX);
  Outcome outcome;
  ASSERT_TRUE(core_->submit(9, request, [&](RouterEvent&& event) {
    ++outcome.finished;
    outcome.status = event.status;
  }).ok());
  pump();
  EXPECT_EQ(outcome.finished, 1);
  EXPECT_EQ(outcome.status.code(), StatusCode::kInvalidArgument);
  EXPECT_NE(outcome.status.message().find("top_k"), std::string::npos) << outcome.status.message();
  EXPECT_TRUE(decode.requests.empty());
  EXPECT_EQ(core_->health().requests, 0);
  submit(1);
  EXPECT_EQ(decode.requests.count(1), 1u);
}

TEST_F(RouterTest, DeliversAllTokensOfAFrameThatAlsoEndsTheRequest) {
  FakeWorker& decode = add_worker("d", protocol::ROLE_DECODE);
  start({"d"});
  submit(1);
  decode.send_rest_at_once(1, 3);
  pump();
  EXPECT_EQ(outcomes_[1].tokens, (std::vector<int32_t>{100, 101, 102}));
  EXPECT_EQ(outcomes_[1].finished, 1);
}

TEST_F(RouterTest, ReplaysOnAnotherDecodeWorkerWithoutLosingOrRepeatingATokenWhenOneDies) {
  FakeWorker& a = add_worker("a", protocol::ROLE_DECODE);
  FakeWorker& b = add_worker("b", protocol::ROLE_DECODE);
  start({"a", "b"}, [](RouterConfig& config) { config.policy = PolicyKind::kRoundRobin; });
  submit(1);
  FakeWorker& first = a.requests.empty() ? b : a;
  FakeWorker& second = a.requests.empty() ? a : b;
  first.send_token(1);
  first.send_token(1);
  pump();
  network_.kill(&first == &a ? "a" : "b");
  pass(50);
  ASSERT_EQ(second.requests.count(1), 1u);
  EXPECT_EQ(second.requests[1].generated_size(), 2);
  second.send_token(1);
  second.send_token(1, true);
  pump();
  EXPECT_EQ(outcomes_[1].tokens, (std::vector<int32_t>{100, 101, 102, 103}));
  EXPECT_EQ(outcomes_[1].finished, 1);
  EXPECT_EQ(core_->stats().replays, 1u);
}

TEST_F(RouterTest, WaitsForAWorkerAndGivesUpAtTheQueueTimeoutWithTheReason) {
  start({"d"});
  submit(1);
  EXPECT_EQ(outcomes_[1].finished, 0);
  pass(1100);
  EXPECT_EQ(outcomes_[1].finished, 1);
  EXPECT_EQ(outcomes_[1].status.code(), StatusCode::kUnavailable);
  EXPECT_NE(outcomes_[1].status.message().find("d is"), std::string::npos) << outcomes_[1].status.message();
  submit(2);
  FakeWorker& late = add_worker("d", protocol::ROLE_DECODE);
  pass(2500 - 2000);
  ASSERT_EQ(late.requests.count(2), 1u) << "a worker that appears takes what waits";
}

TEST_F(RouterTest, PrefillWorkersStandInWhenNoDecodeWorkerLives) {
  FakeWorker& prefill = add_worker("p", protocol::ROLE_PREFILL);
  add_worker("d", protocol::ROLE_DECODE);
  start({"p", "d"});
  network_.kill("d");
  pass(50);
  submit(1);
  EXPECT_EQ(prefill.requests.count(1), 1u);
  EXPECT_EQ(prefill.requests[1].prefill_size(), 0);
}

TEST_F(RouterTest, TriesAnotherWorkerWhenOneIsFullAndReportsFullWhenAllAre) {
  FakeWorker& a = add_worker("a", protocol::ROLE_DECODE);
  FakeWorker& b = add_worker("b", protocol::ROLE_DECODE);
  start({"a", "b"});
  submit(1);
  FakeWorker& first = a.requests.empty() ? b : a;
  FakeWorker& second = a.requests.empty() ? a : b;
  first.send_error(1, StatusCode::kResourceExhausted);
  pump();
  ASSERT_EQ(second.requests.count(1), 1u);
  second.send_error(1, StatusCode::kResourceExhausted);
  pump();
  EXPECT_EQ(outcomes_[1].finished, 1);
  EXPECT_EQ(outcomes_[1].status.code(), StatusCode::kResourceExhausted);
}

TEST_F(RouterTest, ARequestThatFailsEverywhereEndsAfterMaxAttempts) {
  FakeWorker& decode = add_worker("d", protocol::ROLE_DECODE);
  start({"d"}, [](RouterConfig& config) { config.max_attempts = 3; });
  submit(1);
  for (int i = 0; i < 3; ++i) {
    decode.send_error(1, StatusCode::kInternal);
    pump();
  }
  EXPECT_EQ(outcomes_[1].finished, 1);
  EXPECT_NE(outcomes_[1].status.message().find("said the worker"), std::string::npos);
  // The client's own mistakes are not tried again.
  submit(2);
  decode.send_error(2, StatusCode::kInvalidArgument);
  pump();
  EXPECT_EQ(outcomes_[2].status.code(), StatusCode::kInvalidArgument);
}

TEST_F(RouterTest, CancelReachesTheWorkerAndNothingFollows) {
  FakeWorker& decode = add_worker("d", protocol::ROLE_DECODE);
  start({"d"});
  submit(1);
  core_->cancel(1);
  pump();
  EXPECT_EQ(decode.cancelled, std::vector<uint64_t>{1});
  decode.send_token(1);
  pump();
  EXPECT_EQ(outcomes_[1].tokens.size(), 0u);
  EXPECT_EQ(outcomes_[1].finished, 0);
}

TEST_F(RouterTest, DeadlineEndsARequestAndCancelsIt) {
  FakeWorker& decode = add_worker("d", protocol::ROLE_DECODE);
  start({"d"}, [](RouterConfig& config) { config.request_timeout_ms = 500; });
  submit(1);
  pass(600);
  EXPECT_EQ(outcomes_[1].status.code(), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(decode.cancelled, std::vector<uint64_t>{1});
}

TEST_F(RouterTest, RefusesWorkersOfAnotherModelAndSaysSo) {
  add_worker("d", protocol::ROLE_DECODE, "other");
  start({"d"});
  pass(50);
  RouterHealth health = core_->health();
  EXPECT_FALSE(health.ready);
  EXPECT_NE(health.why_not.find("serves model 'other'"), std::string::npos) << health.why_not;
}

TEST_F(RouterTest, IsReadyOnlyOncePrefillAndDecodeArePaired) {
  add_worker("p", protocol::ROLE_PREFILL);
  FakeWorker& decode = add_worker("d", protocol::ROLE_DECODE);
  start({"p", "d"});
  EXPECT_FALSE(core_->health().ready);
  decode.send_pair("p", false);
  pump();
  EXPECT_FALSE(core_->health().ready);
  EXPECT_NE(core_->health().why_not.find("no path"), std::string::npos);
  decode.send_pair("p", true);
  pump();
  EXPECT_TRUE(core_->health().ready);
  EXPECT_FALSE(core_->health().degraded);
  network_.kill("p");
  pass(50);
  decode.send_pair("p", false);
  pump();
  EXPECT_TRUE(core_->health().ready) << "decode workers can prefill";
  EXPECT_TRUE(core_->health().degraded);
}

TEST_F(RouterTest, AWorkerThatSaysNothingIsGivenUp) {
  add_worker("a", protocol::ROLE_DECODE);
  start({"a"}, [](RouterConfig& config) { config.worker_silence_ms = 300; });
  EXPECT_TRUE(core_->health().ready);
  network_.freeze("a");
  pass(400);
  EXPECT_FALSE(core_->health().ready);
  EXPECT_EQ(core_->stats().worker_losses, 1u);
}

TEST_F(RouterTest, BoundsTheRequestsInside) {
  add_worker("a", protocol::ROLE_DECODE);
  start({"a"}, [](RouterConfig& config) { config.max_requests = 2; });
  submit(1);
  submit(2);
  Status refused = core_->submit(3, {}, [](RouterEvent&&) {});
  EXPECT_EQ(refused.code(), StatusCode::kResourceExhausted);
  EXPECT_EQ(core_->stats().refused, 1u);
}

TEST(RouterConfig, IsValidated) {
  RouterConfig config;
  EXPECT_NE(config.validate().message().find("--worker"), std::string::npos);
  config.workers = {"a", "a"};
  EXPECT_NE(config.validate().message().find("twice"), std::string::npos);
}

}  // namespace
}  // namespace baton
