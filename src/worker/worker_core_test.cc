// The worker's logic against peers that do what a test says. What many honest workers do to each other under faults
// is in tests/sim.
#include "worker/worker_core.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <prometheus/metric_family.h>

#include "base/log.h"
#include "base/metrics.h"
#include "worker/convert.h"
#include "worker/testing/core_world.h"

namespace baton::worker {
namespace {

using protocol::Frame;
using ::testing::HasSubstr;
using testing::CoreWorld;
using testing::Puppet;

struct Quiet : ::testing::Test {
  Quiet() { set_log_sink([](LogLevel, std::string_view) {}); }
  ~Quiet() override { set_log_sink(nullptr); }
};

struct CoreTest : Quiet {
  explicit CoreTest(const CoreWorld::Options& options = {}) : world(options) { world.introduce(); }

  Frame generate(uint64_t request, int tokens, int max_tokens = 4, bool remote = true) {
    Frame frame;
    auto* generate = frame.mutable_generate();
    generate->set_request(request);
    for (int i = 0; i < tokens; ++i) {
      generate->add_prompt(2 + static_cast<int32_t>((request * 31 + static_cast<uint64_t>(i)) % 100));
    }
    SamplingParams sampling;
    sampling.max_tokens = max_tokens;
    sampling.ignore_eos = true;
    to_proto(sampling, generate->mutable_sampling());
    if (remote) generate->add_prefill()->set_address("o:1");
    return frame;
  }
  Frame prefill(uint64_t handoff, int tokens) {
    Frame frame;
    auto* prefill = frame.mutable_prefill();
    prefill->set_handoff(handoff);
    for (int i = 0; i < tokens; ++i) prefill->add_tokens(2 + static_cast<int32_t>(handoff) + i % 50);
    prefill->set_prompt_tokens(tokens);
    SamplingParams sampling;
    to_proto(sampling, prefill->mutable_sampling());
    for (int b = 0; b < (tokens + 3) / 4; ++b) prefill->add_blocks(static_cast<uint32_t>(b));
    prefill->set_tag(7);
    prefill->set_lease_ms(200);
    return frame;
  }
  Frame commit(const protocol::Prefill& granted, uint64_t messages) {
    Frame frame;
    auto* commit = frame.mutable_commit();
    commit->set_handoff(granted.handoff());
    commit->mutable_first()->set_has_token(true);
    commit->mutable_first()->set_token(5);
    commit->set_messages(messages);
    commit->set_bytes(static_cast<uint64_t>(granted.blocks_size()) *
                      static_cast<uint64_t>(world.engine->layout().block_bytes()));
    return frame;
  }
  Frame abort(uint64_t handoff) {
    Frame frame;
    frame.mutable_abort()->set_handoff(handoff);
    to_proto(aborted("the test says so"), frame.mutable_abort()->mutable_status());
    return frame;
  }
  std::vector<protocol::TokenOutput> outputs(uint64_t request) {
    std::vector<protocol::TokenOutput> found;
    for (const auto& frame : world.router.heard(Frame::kStepOutput)) {
      for (const auto& token : frame.step_output().tokens()) {
        if (token.request() == request) found.push_back(token);
      }
    }
    return found;
  }
  protocol::Prefill last_grant() {
    auto grants = world.prefill.heard(Frame::kPrefill);
    EXPECT_FALSE(grants.empty());
    return grants.empty() ? protocol::Prefill() : grants.back().prefill();
  }
  int64_t quarantined() const { return world.engine->stats().blocks.quarantined; }
  StatusCode end_code(uint64_t request) {
    auto all = outputs(request);
    return all.empty() ? StatusCode::kInternal : static_cast<StatusCode>(all.back().status().code());
  }

  CoreWorld world;
};

TEST_F(CoreTest, GrantCommitArrivalAdmission) {
  world.router.send(generate(1, 10));
  world.run(10);
  protocol::Prefill grant = last_grant();
  EXPECT_EQ(grant.tokens_size(), 10);
  EXPECT_EQ(grant.blocks_size(), 3);
  EXPECT_EQ(grant.lease_ms(), 200);
  world.prefill.send(commit(grant, 1));
  world.run(50);
  EXPECT_TRUE(outputs(1).empty()) << "the Commit is here, the write is not";
  auto peer = world.other_agent->connect(world.prefill.frames.front().hello().transfer_metadata()).value();
  transfer::BlockWrite write;
  write.local_pool = world.other_pool;
  write.remote_pool = transfer::PoolId{world.prefill.frames.front().hello().kv_pool()};
  write.blocks = {{0, grant.blocks(0)}};
  write.length_bytes = 8;
  write.tag = transfer::Tag{grant.tag()};
  ASSERT_EQ(peer.write(write).value().messages(), 1u);
  world.run(50);
  ASSERT_EQ(outputs(1).size(), 4u);
  EXPECT_EQ(outputs(1)[0].token(), 5);
  EXPECT_EQ(outputs(1)[0].path(), "remote:other");
  EXPECT_EQ(outputs(1)[0].index(), 0);
  EXPECT_EQ(world.engine->stats().blocks.used, 0);
  EXPECT_THAT(to_prometheus_text(world.metrics.collect()),
              HasSubstr("baton_worker_handoffs_total{outcome=\"committed\",reason=\"ok\",side=\"decode\"} 1"));
}

struct BadMemoryTest : CoreTest {
  BadMemoryTest() : CoreTest(options()) {}
  static CoreWorld::Options options() {
    CoreWorld::Options options;
    options.others_check = true;
    options.fabric.corrupt = 1;  // of every message one bit
    return options;
  }
};

TEST_F(BadMemoryTest, CorruptBlocksAreCounted) {
  EXPECT_THAT(to_prometheus_text(world.metrics.collect()), HasSubstr("baton_worker_transfer_corrupt_blocks_total 0"));
  auto peer = world.other_agent->connect(world.prefill.frames.front().hello().transfer_metadata()).value();
  transfer::BlockWrite write;
  write.local_pool = world.other_pool;
  write.remote_pool = transfer::PoolId{world.prefill.frames.front().hello().kv_pool()};
  write.blocks = {{0, 0}, {2, 4}, {4, 8}};
  write.length_bytes = 8;
  transfer::Transfer transfer = peer.write(write).value();
  world.run(300);
  ASSERT_TRUE(transfer.done());
  EXPECT_EQ(transfer.status().code(), StatusCode::kDataLoss);
  const std::string text = to_prometheus_text(world.metrics.collect());
  EXPECT_THAT(text, HasSubstr("baton_worker_transfer_checked_blocks_total 3"));
  EXPECT_THAT(text, HasSubstr("baton_worker_transfer_corrupt_blocks_total 3"));
}

TEST_F(CoreTest, AbortedHandoffFallsBackToThisWorker) {
  world.router.send(generate(1, 10));
  world.run(10);
  world.prefill.send(abort(last_grant().handoff()));
  world.run(30);
  ASSERT_EQ(outputs(1).size(), 4u);
  EXPECT_EQ(outputs(1)[0].path(), "local");
  EXPECT_EQ(quarantined(), 0) << "an Abort says that nothing is under way";
}

TEST_F(CoreTest, CommitThatWroteTooLittleIsNotTrusted) {
  world.router.send(generate(1, 10));
  world.run(10);
  Frame lie = commit(last_grant(), 0);
  lie.mutable_commit()->set_bytes(8);
  world.prefill.send(lie);
  world.run(30);
  ASSERT_EQ(outputs(1).size(), 4u);
  EXPECT_EQ(outputs(1)[0].path(), "local");
}

TEST_F(CoreTest, ExpiredLeaseQuarantinesUntilTheAnswer) {
  world.router.send(generate(1, 10));
  world.run(10);
  uint64_t handoff = last_grant().handoff();
  world.run_with_prefill_alive(150);
  EXPECT_TRUE(outputs(1).empty());
  world.run_with_prefill_alive(150);
  EXPECT_EQ(outputs(1).size(), 4u) << "prefilled here";
  EXPECT_EQ(quarantined(), 3);
  auto cancels = world.prefill.heard(Frame::kCancelPrefill);
  ASSERT_EQ(cancels.size(), 1u);
  EXPECT_EQ(cancels[0].cancel_prefill().handoff(), handoff);
  world.prefill.send(abort(handoff));
  world.run(10);
  EXPECT_EQ(quarantined(), 0);
}

TEST_F(CoreTest, ProgressKeepsTheLease) {
  world.router.send(generate(1, 10));
  world.run(10);
  Frame progress;
  progress.mutable_progress()->set_handoff(last_grant().handoff());
  for (int i = 0; i < 20; ++i) {
    world.prefill.send(progress);
    world.run(100);
  }
  EXPECT_EQ(world.engine->stats().reserved, 1);
  EXPECT_TRUE(world.prefill.heard(Frame::kCancelPrefill).empty());
}

TEST_F(CoreTest, PeerThatNeverAnswersIsShutOut) {
  world.router.send(generate(1, 10));
  world.run(10);
  Frame cancel;
  cancel.mutable_cancel()->set_request(1);
  world.router.send(cancel);
  world.run_with_prefill_alive(900);
  EXPECT_EQ(quarantined(), 3) << "it lives and may still write";
  EXPECT_FALSE(world.prefill.closed);
  world.run_with_prefill_alive(300);
  EXPECT_TRUE(world.prefill.closed);
  EXPECT_EQ(quarantined(), 0) << "fenced";
  EXPECT_EQ(world.agent->stats().fences, 1u);
}

TEST_F(CoreTest, CancelledHandoffIsFreeOnceCommittedAndArrived) {
  world.router.send(generate(1, 10));
  world.run(10);
  Frame cancel;
  cancel.mutable_cancel()->set_request(1);
  world.router.send(cancel);
  world.run(10);
  ASSERT_EQ(outputs(1).size(), 1u);
  EXPECT_EQ(outputs(1)[0].finish(), static_cast<int>(FinishReason::kCancelled));
  world.prefill.send(commit(last_grant(), 0));  // it was on its way
  world.run(10);
  EXPECT_EQ(quarantined(), 0);
  EXPECT_EQ(outputs(1).size(), 1u);
}

TEST_F(CoreTest, CandidateOfAnotherLifeIsNotUsed) {
  Frame frame = generate(1, 10);
  frame.mutable_generate()->mutable_prefill(0)->set_epoch(4711);
  world.router.send(frame);
  world.run(20);
  EXPECT_TRUE(world.prefill.heard(Frame::kPrefill).empty());
  EXPECT_EQ(outputs(1).at(0).path(), "local");
}

TEST_F(CoreTest, SilentPeerIsNotUsed) {
  world.run(300);
  world.router.send(generate(1, 10));
  world.run(20);
  EXPECT_TRUE(world.prefill.heard(Frame::kPrefill).empty());
  EXPECT_THAT(world.router.heard(Frame::kLoad).back().load().pairs(0).why_not(), HasSubstr("silent for"));
}

TEST_F(CoreTest, ShortPromptsStayHere) {
  world.router.send(generate(1, 3));
  world.run(50);
  EXPECT_TRUE(world.prefill.heard(Frame::kPrefill).empty());
  EXPECT_EQ(outputs(1).size(), 4u);
}

TEST_F(CoreTest, CachedPrefixIsNotGranted) {
  world.router.send(generate(1, 9, 1, /*remote=*/false));
  world.run(20);
  Frame longer = generate(1, 9);
  longer.mutable_generate()->set_request(2);
  for (int i = 0; i < 11; ++i) longer.mutable_generate()->add_prompt(3);
  world.prefill.send(CoreWorld::ready_load());
  world.router.send(longer);
  world.run(10);
  EXPECT_EQ(last_grant().first_block(), 2);
  EXPECT_EQ(last_grant().blocks_size(), 3);
  EXPECT_EQ(last_grant().tokens_size(), 20);
}

TEST_F(CoreTest, NobodyOvertakesARequestThatWaitsForBlocks) {
  world.router.send(generate(1, 60, 4));   // 15 of 32 blocks
  world.router.send(generate(2, 60, 4));
  world.run(10);
  EXPECT_EQ(world.prefill.heard(Frame::kPrefill).size(), 2u);
  world.router.send(generate(3, 40, 4));   // does not fit
  world.router.send(generate(4, 3, 1, false));
  world.run(100);
  EXPECT_TRUE(outputs(4).empty()) << "came after 3";
  Frame cancel;
  cancel.mutable_cancel()->set_request(1);
  world.router.send(cancel);
  world.prefill.send(abort(world.prefill.heard(Frame::kPrefill)[0].prefill().handoff()));
  world.run(50);
  EXPECT_EQ(world.prefill.heard(Frame::kPrefill).size(), 3u);
  EXPECT_FALSE(outputs(4).empty());
}

TEST_F(CoreTest, QueueTimeoutIsAnswered) {
  world.router.send(generate(1, 60));
  world.router.send(generate(2, 60));
  Frame third = generate(3, 60);
  third.mutable_generate()->set_queue_timeout_ms(100);
  world.router.send(third);
  world.run_with_prefill_alive(150);
  EXPECT_EQ(end_code(3), StatusCode::kResourceExhausted);
}

TEST_F(CoreTest, DeadlineWhilePrefilling) {
  Frame frame = generate(1, 10);
  frame.mutable_generate()->set_timeout_ms(100);
  world.router.send(frame);
  world.run(10);
  EXPECT_LE(last_grant().timeout_ms(), 100);
  world.run_with_prefill_alive(150);
  EXPECT_EQ(end_code(1), StatusCode::kDeadlineExceeded);
  EXPECT_EQ(quarantined(), 3);
}

TEST_F(CoreTest, RequestsThatCannotBeAreRefused) {
  world.router.send(generate(1, 64));
  Frame frame = generate(2, 5);
  frame.mutable_generate()->set_prompt(0, 128);  // the vocabulary ends at 127
  world.router.send(frame);
  frame = generate(3, 5);
  frame.mutable_generate()->mutable_sampling()->set_top_p(0.0f);
  world.router.send(frame);
  world.run(20);
  for (uint64_t request : {1, 2, 3}) {
    ASSERT_EQ(outputs(request).size(), 1u) << request;
    EXPECT_EQ(end_code(request), StatusCode::kInvalidArgument) << request;
  }
  EXPECT_FALSE(world.router.closed);
}

TEST_F(CoreTest, DrainingRefusesNewWorkAndFinishesOld) {
  world.router.send(generate(1, 3, 20, false));
  world.run(5);
  world.core->begin_drain();
  EXPECT_FALSE(world.core->drained());
  world.router.send(generate(2, 3));
  world.decode.send(prefill(1, 8));
  world.run(200);
  EXPECT_EQ(outputs(1).size(), 20u);
  EXPECT_EQ(end_code(2), StatusCode::kUnavailable);
  ASSERT_EQ(world.decode.heard(Frame::kAbort).size(), 1u);
  EXPECT_TRUE(world.core->drained());
  EXPECT_TRUE(world.router.heard(Frame::kLoad).back().load().draining());
}

TEST_F(CoreTest, BrokenProtocolEndsTheChannel) {
  auto expect_closed = [&](Puppet& puppet) {
    world.run(20);
    EXPECT_TRUE(puppet.closed);
  };
  world.router.send(generate(1, 40));
  world.router.send(generate(1, 40));  // the same id
  expect_closed(world.router);
  world.decode.send(generate(1, 5));   // not a router
  expect_closed(world.decode);
  Frame commit;
  commit.mutable_commit()->set_handoff(99);
  commit.mutable_commit()->mutable_first()->set_has_token(true);
  world.prefill.send(commit);          // never granted
  expect_closed(world.prefill);
  Frame wrong_version = world.router_hello();
  wrong_version.mutable_hello()->set_protocol_version(99);
  world.stranger.send(wrong_version);
  expect_closed(world.stranger);
  EXPECT_EQ(world.stranger.heard(Frame::kHello).size(), 1u) << "it is told which version we have";
  world.run(1500);
  EXPECT_TRUE(world.core->drained());
  EXPECT_EQ(world.engine->stats().blocks.used + quarantined(), 0);
}

TEST_F(CoreTest, PrefillSideWritesCommitsAndReleases) {
  auto tag = world.other_agent->open_inbox().value();
  Frame frame = prefill(5, 10);
  frame.mutable_prefill()->set_tag(static_cast<uint32_t>(tag));
  world.decode.send(frame);
  world.run(50);
  auto commits = world.decode.heard(Frame::kCommit);
  ASSERT_EQ(commits.size(), 1u);
  EXPECT_EQ(commits[0].commit().handoff(), 5u);
  EXPECT_EQ(commits[0].commit().messages(), world.other_agent->arrived(tag));
  EXPECT_EQ(commits[0].commit().bytes(), static_cast<uint64_t>(3 * world.engine->layout().block_bytes()));
  EXPECT_EQ(world.engine->stats().held, 0);
  Frame cancel;
  cancel.mutable_cancel_prefill()->set_handoff(5);
  world.decode.send(cancel);
  world.run(10);
  EXPECT_EQ(world.decode.heard(Frame::kAbort).size(), 1u) << "nothing is under way: that is an answer, too";
}

struct AnnouncingTest : CoreTest {
  AnnouncingTest() : CoreTest(options()) {}
  static CoreWorld::Options options() {
    CoreWorld::Options options;
    options.core.heads_up = true;
    return options;
  }
};

TEST_F(AnnouncingTest, LastLayerDeliveredBeforeTheTokenIsAnnouncedOnce) {
  auto tag = world.other_agent->open_inbox().value();
  Frame frame = prefill(5, 10);
  frame.mutable_prefill()->set_tag(static_cast<uint32_t>(tag));
  world.model.before_logits = [this] {
    for (int i = 0; i < 20; ++i) {
      world.agent->progress();
      world.other_agent->progress();
    }
  };
  world.decode.send(frame);
  world.run(50);
  EXPECT_EQ(world.decode.heard(Frame::kHeadsUp).size(), 1u);
  ASSERT_EQ(world.decode.heard(Frame::kCommit).size(), 1u);
  EXPECT_TRUE(world.decode.frames.end() - 1 > std::ranges::find_if(world.decode.frames, &Frame::has_heads_up));

  world.model.before_logits = {};  // the Commit is ready before the writes are: nothing to announce
  frame.mutable_prefill()->set_handoff(6);
  world.decode.send(frame);
  world.run(50);
  EXPECT_EQ(world.decode.heard(Frame::kCommit).size(), 2u);
  EXPECT_EQ(world.decode.heard(Frame::kHeadsUp).size(), 1u);
}

struct BurstTest : CoreTest {
  BurstTest() : CoreTest(options()) {}
  static CoreWorld::Options options() {
    CoreWorld::Options options;
    options.core.burst_transport = "sim";
    options.layers = 10;
    return options;
  }
};

TEST_F(BurstTest, LayersAreSentInFewWritesAndAllOfThem) {
  auto tag = world.other_agent->open_inbox().value();
  Frame frame = prefill(5, 10);
  frame.mutable_prefill()->set_tag(static_cast<uint32_t>(tag));
  world.decode.send(frame);
  world.run(50);
  auto commits = world.decode.heard(Frame::kCommit);
  ASSERT_EQ(commits.size(), 1u);
  const protocol::Commit& commit = commits[0].commit();
  const int64_t blocks = world.engine->layout().tokens_to_blocks(10);
  EXPECT_EQ(commit.bytes(), static_cast<uint64_t>(blocks * world.engine->layout().block_bytes()));
  EXPECT_EQ(commit.messages(), world.other_agent->arrived(tag));
  EXPECT_EQ(commit.messages(), static_cast<uint64_t>(2 * blocks)) << "of every block nine layers, then the last one";
  // The same bytes in both pools, block for block.
  const size_t bytes = static_cast<size_t>(world.engine->layout().block_bytes());
  const auto mine = world.engine->kv_pool();
  for (int64_t b = 0; b < blocks; ++b) {
    const std::byte* theirs = world.other_memory.data() + frame.prefill().blocks(static_cast<int>(b)) * bytes;
    bool found = false;
    for (size_t at = 0; at < mine.size(); at += bytes) found = found || std::equal(theirs, theirs + bytes, mine.data() + at);
    EXPECT_TRUE(found) << "block " << b;
  }
}

TEST_F(CoreTest, PrefillsThatCannotBeAreAborted) {
  Frame wrong_blocks = prefill(1, 10);
  wrong_blocks.mutable_prefill()->add_blocks(9);
  world.decode.send(wrong_blocks);
  Frame outside = prefill(2, 10);
  outside.mutable_prefill()->set_blocks(0, 1000);
  world.decode.send(outside);
  Frame bad_token = prefill(3, 10);
  bad_token.mutable_prefill()->set_tokens(0, 500);
  world.decode.send(bad_token);
  world.run(100);
  auto aborts = world.decode.heard(Frame::kAbort);
  ASSERT_EQ(aborts.size(), 3u);
  for (const auto& frame : aborts) {
    EXPECT_EQ(static_cast<StatusCode>(frame.abort().status().code()), StatusCode::kInvalidArgument);
  }
  EXPECT_FALSE(world.decode.closed);
  EXPECT_TRUE(world.core->drained());
  EXPECT_EQ(world.engine->stats().blocks.used, 0);
}

TEST_F(CoreTest, PrefillThatFindsNoRoomGoesBack) {
  world.router.send(generate(1, 60));
  world.router.send(generate(2, 60));
  world.router.send(generate(3, 60));  // waits, and so does everything after it
  world.run(10);
  world.decode.send(prefill(1, 8));
  world.run_with_prefill_alive(250);
  EXPECT_FALSE(world.decode.heard(Frame::kProgress).empty()) << "it waits, but lives";
  EXPECT_TRUE(world.decode.heard(Frame::kAbort).empty());
  world.run_with_prefill_alive(100);
  // By then the leases of 1 and 2 are over as well; whichever came first, an answer is there.
  EXPECT_EQ(world.decode.heard(Frame::kAbort).size() + world.decode.heard(Frame::kCommit).size(), 1u);
}

struct SmallChannels : CoreTest {
  static CoreWorld::Options options() {
    CoreWorld::Options options;
    options.limits.max_queued_bytes = 4000;
    return options;
  }
  SmallChannels() : CoreTest(options()) {}
};

TEST_F(SmallChannels, RouterThatDoesNotReadIsDead) {
  world.network.freeze("o");
  world.router.send(generate(1, 3, 60, false));
  for (int i = 0; i < 30; ++i) world.run(100);  // loads and outputs pile up
  EXPECT_EQ(world.core->health().routers, 0);
  EXPECT_TRUE(world.core->drained());
}

}  // namespace
}  // namespace baton::worker
