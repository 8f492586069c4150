// Workers with everything real but the model: threads, gRPC, the transfer agent's own transports.
#include "worker/worker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/metric_family.h>

#include <chrono>
#include <condition_variable>
#include <future>
#include <map>
#include <mutex>

#include "base/metrics.h"
#include "engine/testing/async_fake_model.h"
#include "protocol/baton.pb.h"
#include "worker/convert.h"

namespace baton {
namespace {

/// Talks to one worker as a router does.
class TestRouter {
 public:
  TestRouter(protocol::Network& network, const std::string& address) {
    protocol::ChannelHandler handler{[this](std::shared_ptr<protocol::Channel>, protocol::Frame&& frame) {
                                       std::lock_guard lock(mutex_);
                                       take(frame);
                                       changed_.notify_all();
                                     },
                                     [this](std::shared_ptr<protocol::Channel>, Status) {
                                       std::lock_guard lock(mutex_);
                                       closed_ = true;
                                       changed_.notify_all();
                                     }};
    channel_ = network.connect(address, handler);
    protocol::Frame frame;
    frame.mutable_hello()->set_protocol_version(protocol::kProtocolVersion);
    frame.mutable_hello()->set_epoch(12345);
    frame.mutable_hello()->set_name("test-router");
    frame.mutable_hello()->set_role(protocol::ROLE_ROUTER);
    EXPECT_TRUE(channel_->send(frame).ok());
  }
  ~TestRouter() {
    channel_->close();
    EXPECT_TRUE(wait([this] { return closed_; }));
  }

  void set_peers(const std::vector<std::string>& addresses) {
    protocol::Frame frame;
    for (const auto& address : addresses) frame.mutable_set_peers()->add_prefill()->set_address(address);
    EXPECT_TRUE(channel_->send(frame).ok());
  }
  void generate(uint64_t request, const std::vector<TokenId>& prompt, const SamplingParams& sampling,
                const std::vector<std::string>& prefill) {
    protocol::Frame frame;
    auto* generate = frame.mutable_generate();
    generate->set_request(request);
    generate->mutable_prompt()->Add(prompt.begin(), prompt.end());
    worker::to_proto(sampling, generate->mutable_sampling());
    for (const auto& address : prefill) generate->add_prefill()->set_address(address);
    EXPECT_TRUE(channel_->send(frame).ok());
  }
  void cancel(uint64_t request) {
    protocol::Frame frame;
    frame.mutable_cancel()->set_request(request);
    EXPECT_TRUE(channel_->send(frame).ok());
  }
  void send(const protocol::Frame& frame) { EXPECT_TRUE(channel_->send(frame).ok()); }

  bool wait_pairs_ready(int count) {
    return wait([&] {
      int ready = 0;
      for (const auto& pair : load_.pairs()) ready += pair.ready();
      return ready >= count;
    });
  }
  bool wait_finished(uint64_t request) {
    return wait([&] { return outputs_[request].finish != FinishReason::kNone; });
  }
  bool wait_tokens(uint64_t request, size_t count) {
    return wait([&] { return outputs_[request].tokens.size() >= count; });
  }
  bool wait_closed() {
    return wait([&] { return closed_; });
  }
  bool wait_load(const std::function<bool(const protocol::Load&)>& predicate) {
    return wait([&] { return predicate(load_); });
  }

  struct Output {
    std::vector<TokenId> tokens;
    FinishReason finish = FinishReason::kNone;
    StatusCode code = StatusCode::kOk;
    std::string path;
  };
  Output output(uint64_t request) {
    std::lock_guard lock(mutex_);
    return outputs_[request];
  }
  protocol::Load load() {
    std::lock_guard lock(mutex_);
    return load_;
  }

 private:
  bool wait(const std::function<bool()>& predicate) {
    std::unique_lock lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(30), predicate);
  }
  void take(const protocol::Frame& frame) {
    if (frame.has_load()) load_ = frame.load();
    for (const auto& token : frame.step_output().tokens()) {
      Output& output = outputs_[token.request()];
      if (token.has_token()) {
        EXPECT_EQ(token.index(), static_cast<int32_t>(output.tokens.size()));
        output.tokens.push_back(token.token());
      }
      if (!token.path().empty()) output.path = token.path();
      output.finish = static_cast<FinishReason>(token.finish());
      output.code = static_cast<StatusCode>(token.status().code());
    }
  }

  std::shared_ptr<protocol::Channel> channel_;
  std::mutex mutex_;
  std::condition_variable changed_;
  std::map<uint64_t, Output> outputs_;
  protocol::Load load_;
  bool closed_ = false;
};

WorkerConfig test_config(const std::string& name, const std::string& transport) {
  WorkerConfig config;
  config.name = name;
  config.engine.kv_blocks = 256;
  config.engine.block_tokens = 16;
  config.engine.max_model_len = 2048;
  config.transfer.transport = transport;
  config.transfer.bind_address = "127.0.0.1";
  config.local_prefill_tokens = 32;
  return config;
}

std::vector<TokenId> expected_tokens(const std::vector<TokenId>& prompt, const SamplingParams& sampling) {
  testing::FakeModel model;
  EngineConfig config;
  config.kv_blocks = 256;
  auto engine = Engine::create(config, model).value();
  Request request;
  request.id = RequestId{1};
  request.prompt = prompt;
  request.sampling = sampling;
  EXPECT_TRUE(engine->submit(request).ok());
  std::vector<TokenId> tokens;
  for (bool done = false; !done;) {
    for (const TokenOutput& output : engine->step().tokens) {
      if (output.token) tokens.push_back(*output.token);
      done = output.finish != FinishReason::kNone;
    }
  }
  return tokens;
}

std::vector<TokenId> make_prompt(int length, int seed) {
  std::vector<TokenId> prompt;
  for (int i = 0; i < length; ++i) prompt.push_back(2 + static_cast<TokenId>(mix_bits(seed, i) % 120));
  return prompt;
}

class WorkerPairTest : public ::testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    network = protocol::make_grpc_network();
    prefill = start("prefill-0", prefill_model);
    decode = start("decode-0", decode_model);
  }
  std::unique_ptr<Worker> start(const std::string& name, Model& model) {
    auto worker = Worker::start(test_config(name, GetParam()), model, *network);
    EXPECT_TRUE(worker.ok()) << worker.status().to_string();
    return worker.ok() ? *std::move(worker) : nullptr;
  }
  std::unique_ptr<protocol::Network> network;
  testing::FakeModel prefill_model, decode_model;
  std::unique_ptr<Worker> prefill, decode;
};

TEST_P(WorkerPairTest, PrefillThereDecodeHere) {
  TestRouter router(*network, decode->address());
  router.set_peers({prefill->address()});
  ASSERT_TRUE(router.wait_pairs_ready(1)) << router.load().pairs(0).why_not();
  EXPECT_EQ(router.load().pairs(0).transport(), GetParam());
  std::map<uint64_t, std::vector<TokenId>> expected;
  for (uint64_t request = 1; request <= 24; ++request) {
    int length = request % 6 == 0 ? 10 : 33 + static_cast<int>(request) * 20;
    SamplingParams sampling;
    sampling.temperature = request % 2 ? 0.0f : 1.0f;
    sampling.seed = request;
    sampling.max_tokens = 24;
    auto prompt = make_prompt(length, static_cast<int>(request));
    expected[request] = expected_tokens(prompt, sampling);
    router.generate(request, prompt, sampling, {prefill->address()});
  }
  for (const auto& [request, tokens] : expected) {
    ASSERT_TRUE(router.wait_finished(request)) << request;
    EXPECT_EQ(router.output(request).tokens, tokens) << request;
    EXPECT_EQ(router.output(request).path, request % 6 == 0 ? "local" : "remote:prefill-0") << request;
  }
  EXPECT_TRUE(router.wait_load([](const auto& load) { return load.blocks_used() == 0; }));
  std::string text = to_prometheus_text(decode->metrics());
  EXPECT_THAT(text, ::testing::HasSubstr("outcome=\"committed\""));
  EXPECT_THAT(to_prometheus_text(prefill->metrics()), ::testing::HasSubstr("baton_worker_transfer_bytes_total"));
}

TEST_P(WorkerPairTest, StopLetsRunningRequestsFinish) {
  TestRouter router(*network, decode->address());
  router.set_peers({prefill->address()});
  ASSERT_TRUE(router.wait_pairs_ready(1));
  SamplingParams sampling;
  sampling.max_tokens = 200;
  sampling.ignore_eos = true;
  auto prompt = make_prompt(300, 7);
  router.generate(1, prompt, sampling, {prefill->address()});
  ASSERT_TRUE(router.wait_tokens(1, 1));
  decode->stop(20'000);
  ASSERT_TRUE(router.wait_finished(1));
  EXPECT_EQ(router.output(1).tokens, expected_tokens(prompt, sampling));
  EXPECT_TRUE(router.wait_closed());
}

TEST_P(WorkerPairTest, LostPrefillWorkerIsReplacedByTheDecodeWorker) {
  TestRouter router(*network, decode->address());
  router.set_peers({prefill->address()});
  ASSERT_TRUE(router.wait_pairs_ready(1));
  SamplingParams sampling;
  sampling.max_tokens = 8;
  for (uint64_t request = 1; request <= 16; ++request) {
    router.generate(request, make_prompt(600, static_cast<int>(request)), sampling, {prefill->address()});
  }
  std::string address = prefill->address();
  prefill.reset();
  for (uint64_t request = 1; request <= 16; ++request) {
    ASSERT_TRUE(router.wait_finished(request)) << request;
    EXPECT_EQ(router.output(request).tokens, expected_tokens(make_prompt(600, static_cast<int>(request)), sampling));
  }
  EXPECT_TRUE(router.wait_load([](const auto& load) {
    return load.blocks_used() == 0 && load.blocks_quarantined() == 0 && !load.pairs(0).ready();
  }));
  WorkerConfig again = test_config("prefill-0", GetParam());
  again.listen_address = address;
  auto restarted = Worker::start(again, prefill_model, *network);
  ASSERT_TRUE(restarted.ok()) << restarted.status().to_string();
  EXPECT_TRUE(router.wait_pairs_ready(1)) << "a worker that was started again is used again";
  router.generate(100, make_prompt(600, 100), sampling, {address});
  ASSERT_TRUE(router.wait_finished(100));
  EXPECT_EQ(router.output(100).path, "remote:prefill-0");
}

TEST_P(WorkerPairTest, AWorkerWhoseDeviceIsLostLeavesAndCostsNoRequest) {
  prefill.reset();
  prefill_model.fail_next = unavailable("a step on the GPU: CUDA_ERROR_ILLEGAL_ADDRESS");
  std::promise<Status> lost;
  WorkerConfig config = test_config("prefill-0", GetParam());
  config.on_device_lost = [&](const Status& status) { lost.set_value(status); };
  prefill = Worker::start(config, prefill_model, *network).value();
  TestRouter router(*network, decode->address());
  router.set_peers({prefill->address()});
  ASSERT_TRUE(router.wait_pairs_ready(1));
  SamplingParams sampling;
  sampling.max_tokens = 8;
  router.generate(1, make_prompt(600, 1), sampling, {prefill->address()});
  ASSERT_TRUE(router.wait_finished(1));
  EXPECT_EQ(router.output(1).tokens, expected_tokens(make_prompt(600, 1), sampling));
  auto told = lost.get_future();
  ASSERT_EQ(told.wait_for(std::chrono::seconds(20)), std::future_status::ready);
  EXPECT_EQ(told.get().code(), StatusCode::kUnavailable);
  prefill->stop(0);
  EXPECT_TRUE(router.wait_load([](const auto& load) { return load.blocks_used() == 0 && load.blocks_quarantined() == 0; }));
}

INSTANTIATE_TEST_SUITE_P(Transports, WorkerPairTest, ::testing::Values("shm", "tcp"),
                         [](const auto& info) { return info.param; });

struct WorkerTest : ::testing::Test {
  std::unique_ptr<protocol::Network> network = protocol::make_grpc_network();
  testing::FakeModel model;
  std::unique_ptr<Worker> worker = Worker::start(test_config("w", "shm"), model, *network).value();
};

TEST_F(WorkerTest, LocalRequestsAndCancel) {
  TestRouter router(*network, worker->address());
  SamplingParams sampling;
  sampling.max_tokens = 1900;
  sampling.ignore_eos = true;
  router.generate(1, make_prompt(100, 1), sampling, {});
  ASSERT_TRUE(router.wait_tokens(1, 1));
  router.cancel(1);
  ASSERT_TRUE(router.wait_finished(1));
  EXPECT_EQ(router.output(1).finish, FinishReason::kCancelled);
  EXPECT_TRUE(router.wait_load([](const auto& load) { return load.blocks_total() == 256 && load.blocks_used() == 0; }));
}

TEST(WorkerOfADeviceThatRunsAhead, AnswersCancelsAndStopsWithAStepUnderWay) {
  testing::AsyncFakeModel model;
  model.on_finish = [] { std::this_thread::sleep_for(std::chrono::microseconds(500)); };
  const std::unique_ptr<protocol::Network> network = protocol::make_grpc_network();
  std::unique_ptr<Worker> worker = Worker::start(test_config("w", "shm"), model, *network).value();
  TestRouter router(*network, worker->address());
  SamplingParams sampling;
  sampling.max_tokens = 24;
  for (uint64_t request = 1; request <= 12; ++request) {
    sampling.temperature = request % 2 ? 0.0f : 1.0f;
    sampling.seed = request;
    router.generate(request, make_prompt(20 + static_cast<int>(request) * 9, static_cast<int>(request)), sampling, {});
  }
  for (uint64_t request = 1; request <= 12; ++request) {
    ASSERT_TRUE(router.wait_finished(request));
    sampling.temperature = request % 2 ? 0.0f : 1.0f;
    sampling.seed = request;
    EXPECT_EQ(router.output(request).tokens,
              expected_tokens(make_prompt(20 + static_cast<int>(request) * 9, static_cast<int>(request)), sampling));
  }
  sampling.max_tokens = 1900;
  sampling.ignore_eos = true;
  router.generate(13, make_prompt(100, 1), sampling, {});
  ASSERT_TRUE(router.wait_tokens(13, 3));
  router.cancel(13);
  ASSERT_TRUE(router.wait_finished(13));
  EXPECT_EQ(router.output(13).finish, FinishReason::kCancelled);
  EXPECT_TRUE(router.wait_load([](const auto& load) { return load.blocks_total() == 256 && load.blocks_used() == 0; }));
  router.generate(14, make_prompt(100, 1), sampling, {});
  ASSERT_TRUE(router.wait_tokens(14, 3));
  worker->stop(0);
  worker.reset();
  EXPECT_EQ(model.under_way(), 0u);
}

TEST_F(WorkerTest, BadRequestsAreAnsweredAndBadFramesEndTheChannel) {
  TestRouter router(*network, worker->address());
  SamplingParams sampling;
  router.generate(1, {5, 127, 128}, sampling, {});  // 128 is not in the vocabulary
  ASSERT_TRUE(router.wait_finished(1));
  EXPECT_EQ(router.output(1).code, StatusCode::kInvalidArgument);
  router.generate(2, make_prompt(3000, 1), sampling, {});
  ASSERT_TRUE(router.wait_finished(2));
  EXPECT_EQ(router.output(2).code, StatusCode::kInvalidArgument);
  protocol::Frame commit;
  commit.mutable_commit()->set_handoff(1);
  router.send(commit);
  EXPECT_TRUE(router.wait_closed());
}

TEST_F(WorkerTest, TwoWorkersCannotListenOnOneAddress) {
  WorkerConfig config = test_config("w2", "shm");
  config.listen_address = worker->address();
  auto second = Worker::start(config, model, *network);
  ASSERT_FALSE(second.ok());
  EXPECT_THAT(second.status().message(), ::testing::HasSubstr(worker->address()));
}

TEST(WorkerConfig, SaysWhatIsWrong) {
  WorkerConfig config;
  EXPECT_TRUE(config.validate().ok()) << config.validate().to_string();
  config.role = "manager";
  EXPECT_THAT(config.validate().message(), ::testing::HasSubstr("manager"));
  config = {};
  config.lease_ms = 1;
  EXPECT_THAT(config.validate().message(), ::testing::HasSubstr("lease_ms is 1"));
  config = {};
  config.name = "two words";
  EXPECT_FALSE(config.validate().ok());
}

}  // namespace
}  // namespace baton
