#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <fcntl.h>
#include <poll.h>
#include <sys/prctl.h>
#include <sys/wait.h>
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "base/clock.h"
#include "base/log.h"
#include "base/random.h"
#include "transfer/cuda/staged_inbound.h"

/// The receiving half of staged transfers, with the writers and their transport played by the test.
namespace baton::transfer::staged {
namespace {

using ::testing::HasSubstr;

TEST(StagedWire, DescriptorsComeBackAndDamagedOnesDoNot) {
  const std::vector<Segment> segments = {{0, 4096, 100}, {0, 0, 1}, {0, 1u << 20, 2000}};
  std::vector<std::byte> out(descriptor_bytes(segments.size()));
  write_descriptor(out, 7, 99, 3, segments);
  std::string bytes(reinterpret_cast<const char*>(out.data()), out.size());
  Result<Descriptor> descriptor = parse_descriptor(bytes);
  ASSERT_TRUE(descriptor.ok()) << descriptor.status().to_string();
  EXPECT_EQ(*descriptor, (Descriptor{7, 99, 3, 2101, {{4096, 100}, {0, 1}, {1u << 20, 2000}}}));
  EXPECT_EQ(check_pieces(*descriptor, (1u << 20) + 2000), Status());
  EXPECT_EQ(check_pieces(*descriptor, (1u << 20) + 1999).code(), StatusCode::kInvalidArgument);
  for (size_t size = 0; size < bytes.size(); ++size) EXPECT_FALSE(parse_descriptor(bytes.substr(0, size)).ok());
  auto with = [&](size_t at, uint64_t value, size_t count) {
    std::string damaged = bytes;
    std::memcpy(damaged.data() + at, &value, count);
    return parse_descriptor(damaged);
  };
  EXPECT_FALSE(with(0, 1, 4).ok());                           // magic
  EXPECT_FALSE(with(16, 2102, 8).ok());                       // bytes in all
  EXPECT_FALSE(with(24, 2, 4).ok());                          // pieces
  EXPECT_FALSE(with(40, 0, 8).ok());                          // an empty piece
  EXPECT_FALSE(with(40, ~uint64_t{0}, 8).ok());               // one that does not fit
  Result<Descriptor> far = with(32, ~uint64_t{0} - 10, 8);    // one that wraps around
  ASSERT_TRUE(far.ok());
  EXPECT_FALSE(check_pieces(*far, ~uint64_t{0} - 20).ok());
}

TEST(StagedWire, TagsAndNotesComeBack) {
  for (SlotTag tag : {SlotTag{0, 1}, SlotTag{kSlots - 1, kMaxPieces}, SlotTag{3, 512}}) {
    EXPECT_EQ(parse_slot_tag(encode_slot_tag(tag)), tag);
  }
  for (uint32_t tag : {0u, 1u, 1u << 16, (kSlots + 1) << 16 | 1, (1u << 16) | (kMaxPieces + 1)}) {
    EXPECT_FALSE(parse_slot_tag(tag).has_value()) << tag;
  }
  EXPECT_FALSE(parse_note({0, 1}).has_value());
  EXPECT_FALSE(parse_note({5u << 16, 1}).has_value());
  EXPECT_FALSE(parse_note({(2u << 16) | kSlots, 1}).has_value());
  const Note grant{Note::Kind::kGrant, 5, 77};
  const std::optional<Note> back = parse_note(encode_note(grant));
  ASSERT_TRUE(back.has_value());
  EXPECT_EQ(back->slot, 5);
  EXPECT_EQ(back->value, 77u);
  EXPECT_FALSE(parse_address("").ok());
  EXPECT_EQ(parse_address(encode_address({"unix:x", "y", kDataBytes, kMaxPieces}))->inner, "y");
}

/// The host transport, of which only the fence matters; and the staged backend itself, which registers memory.
class FakeBackend final : public Backend {
 public:
  const std::string& transport() const override { return name; }
  const std::string& provider() const override { return name; }
  const BackendLimits& limits() const override { return limits_; }
  std::string describe() const override { return name; }
  Result<std::unique_ptr<BackendRegion>> register_memory(std::span<std::byte> memory, MemoryKind) override {
    auto region = std::make_unique<StagedRegion>();
    region->data = memory.data();
    return std::unique_ptr<BackendRegion>(std::move(region));
  }
  std::string address() const override { return {}; }
  Result<std::unique_ptr<Link>> open_link(const Metadata&, const Metadata::Offer&) override { return unimplemented("none"); }
  Status fence(Epoch peer, uint64_t) override {
    ++fences[peer];
    return fence_status;
  }
  Status shut_out() override { return Status(); }
  size_t progress(BackendEvents&) override { return 0; }
  int64_t prepare_wait(std::vector<pollfd>&) override { return 0; }
  uint64_t inbound_peers() const override { return 0; }
  ReadChannel& reads() override {
    BATON_CHECK(false) << "nobody reads here";
    __builtin_unreachable();
  }
  CheckChannel& checks() override {
    BATON_CHECK(false) << "nobody checks here";
    std::abort();
  }

  Status fence_status;
  std::map<Epoch, int> fences;
  std::string name = "staged:fake";

 private:
  BackendLimits limits_;
};

/// The owner of 16 blocks of 4 KiB of host memory, and its control connections.
class StagedOwner : public ::testing::Test, public BackendEvents, public BackendContext, public ControlPlane::Delegate {
 protected:
  static constexpr uint64_t kPoolBytes = 64u << 10;

  void SetUp() override {
    set_log_level(LogLevel::kError);
    agent_name = "owner";
    epoch = new_epoch();
    BackendContext::clock = &clock_;
    pool_.resize(kPoolBytes);
    region_ = MemoryRegion(std::make_shared<MemoryRegion::Impl>(std::span(pool_), MemoryKind::kHost));
    control_ = std::make_unique<ControlPlane>(ControlPlane::Options{.epoch = epoch, .name = "owner"}, *this, clock_);
    ASSERT_EQ(control_->listen("unix:"), Status());
    inbound_ = std::make_unique<StagedInbound>(*this, self_, *control_);
    inbound_->set_host_transport(inner_);
  }

  // BackendContext
  std::vector<LocalPool> pools() const override { return {{0, region_, 4096, 16}}; }
  Result<const BackendRegion*> backend_region(const LocalPool& pool, Backend& backend) override {
    return pool.region.impl()->with(backend);
  }
  uint64_t serial() const override { return 1; }
  void wake() override {}

  // BackendEvents
  void on_posted_done(Link&, uint64_t, const Status&) override {}
  void on_link_failed(Link&, const Status&) override {}
  void on_arrived(uint32_t tag, uint64_t count) override { arrived_[tag] += count; }

  // ControlPlane::Delegate
  Result<Welcome> on_inbound(ControlPlane::Id id, const Hello& hello) override { return inbound_->add_writer(id, hello); }
  void on_inbound_closed(ControlPlane::Id id, int) override { inbound_->remove_writer(id); }
  void on_inbound_arrived(ControlPlane::Id id, const Arrival& arrival) override { inbound_->on_note(id, arrival); }
  void on_welcome(ControlPlane::Id, Welcome) override {}
  void on_outbound_closed(ControlPlane::Id, const Status&) override {}

  /// One writer: a control connection and what came over it.
  struct Writer : ControlPlane::Delegate {
    Writer(StagedOwner& owner, const std::string& name)
        : own_epoch(new_epoch()), control({.epoch = own_epoch, .name = name}, *this, owner.clock_) {
      EXPECT_EQ(control.listen("unix:"), Status());
      id = *control.connect(owner.control_->address(), owner.epoch, 1);
    }
    Result<Welcome> on_inbound(ControlPlane::Id, const Hello&) override { return unimplemented("none"); }
    void on_inbound_closed(ControlPlane::Id, int) override {}
    void on_inbound_arrived(ControlPlane::Id, const Arrival&) override {}
    void on_welcome(ControlPlane::Id, Welcome granted) override {
      welcome = true;
      may_write_slots = granted.rails == std::vector<std::string>{std::string(kMayWriteSlots)};
    }
    void on_outbound_arrived(ControlPlane::Id, const Arrival& arrival) override {
      const std::optional<Note> note = parse_note(arrival);
      ASSERT_TRUE(note.has_value());
      if (note->kind == Note::Kind::kGrant) grants.push_back(*note);
      if (note->kind == Note::Kind::kDone) ++done;
      if (note->kind == Note::Kind::kRefused) ++refused;
    }
    void on_outbound_closed(ControlPlane::Id, const Status& why) override { closed = why; }
    void send(Arrival arrival) { EXPECT_TRUE(control.send_arrivals(id, std::span(&arrival, 1))); }
    void want(uint32_t count) { send(encode_note({Note::Kind::kWant, 0, count})); }

    Epoch own_epoch;
    ControlPlane control;
    ControlPlane::Id id = 0;
    bool welcome = false, may_write_slots = false;
    std::vector<Note> grants;
    int done = 0, refused = 0;
    Status closed;
  };
  std::unique_ptr<Writer> writer(const std::string& name) {
    auto made = std::make_unique<Writer>(*this, name);
    writers_.push_back(made.get());
    settle();
    return made;
  }
  /// Until nothing moves any more.
  void settle() {
    for (int quiet = 0; quiet < 3;) {
      size_t count = control_->progress() + inbound_->progress(*this);
      for (Writer* one : writers_) count += one->control.progress();
      quiet = count == 0 ? quiet + 1 : 0;
    }
  }
  /// What the host transport does: fills the slot and reports the message.
  void deliver(const Note& grant, const std::vector<Segment>& segments, uint32_t tag = 5, uint32_t pool = 0) {
    SlotMemory& memory = **inbound_->memory();
    const size_t size = descriptor_bytes(segments.size());
    write_descriptor({memory.data(grant.slot) - size, size}, grant.value, tag, pool, segments);
    uint64_t at = 0;
    for (const Segment& segment : segments) {
      std::memset(memory.data(grant.slot) + at, static_cast<int>(tag), segment.bytes);
      at += segment.bytes;
    }
    inbound_->on_message(encode_slot_tag({grant.slot, static_cast<uint32_t>(segments.size())}), 1);
    settle();
  }

  ManualClock clock_;
  FakeBackend self_, inner_;
  std::vector<std::byte> pool_;
  MemoryRegion region_;
  std::unique_ptr<ControlPlane> control_;
  std::unique_ptr<StagedInbound> inbound_;
  std::vector<Writer*> writers_;
  std::map<uint32_t, uint64_t> arrived_;
};

TEST_F(StagedOwner, AMessageIsTakenApartCountedAndAnswered) {
  auto a = writer("a");
  ASSERT_TRUE(a->welcome);
  a->want(2);
  settle();
  ASSERT_EQ(a->grants.size(), 2u);
  deliver(a->grants[0], {{0, 4096, 4096}, {0, 100, 3}}, 9);
  EXPECT_EQ(arrived_[9], 1u);
  EXPECT_EQ(a->done, 1);
  EXPECT_EQ(pool_[4096], std::byte{9});
  EXPECT_EQ(pool_[8191], std::byte{9});
  EXPECT_EQ(pool_[102], std::byte{9});
  EXPECT_EQ(pool_[103], std::byte{0});
  // The same slot again, without a grant: nobody's.
  deliver(a->grants[0], {{0, 0, 1}}, 9);
  EXPECT_EQ(arrived_[9], 1u);
  EXPECT_EQ(pool_[0], std::byte{0});
  EXPECT_EQ(a->closed, Status());
}

TEST_F(StagedOwner, EveryWriterHasItsShareWhateverTheOthersWant) {
  auto greedy = writer("greedy"), second = writer("second"), third = writer("third");
  greedy->want(1000);
  settle();
  EXPECT_EQ(greedy->grants.size(), kSlots / 2);
  second->want(1000);
  settle();
  EXPECT_EQ(second->grants.size(), kSlots / 4);
  third->want(1);
  settle();
  EXPECT_EQ(third->grants.size(), 1u);
  // What is given back goes round.
  deliver(second->grants[0], {{0, 0, 1}});
  EXPECT_EQ(second->grants.size() + greedy->grants.size(), kSlots / 2 + kSlots / 4 + 1);
}

TEST_F(StagedOwner, WhatPointsOutsideOfThePoolIsRefusedAndItsWriterCutOff) {
  auto evil = writer("evil"), good = writer("good");
  evil->want(1);
  good->want(1);
  settle();
  inner_.fence_status = unavailable("not yet");
  deliver(evil->grants.at(0), {{0, kPoolBytes - 10, 11}});
  EXPECT_EQ(evil->refused, 1);
  EXPECT_EQ(evil->closed.code(), StatusCode::kUnavailable);
  EXPECT_EQ(arrived_.size(), 0u);
  EXPECT_EQ(pool_[kPoolBytes - 1], std::byte{0});
  EXPECT_GT(inner_.fences[evil->own_epoch], 0);
  EXPECT_EQ(inner_.fences.count(good->own_epoch), 0u);
  // Its slot is kept back, and it is not let in, until the host transport says that nothing of it is on the way.
  good->want(1000);
  settle();
  const size_t before = good->grants.size();
  EXPECT_EQ(before, (kSlots - 1 + 1) / 2);
  deliver(good->grants[0], {{0, 0, 7}});
  EXPECT_EQ(good->done, 1);
  inner_.fence_status = Status();
  settle();
  EXPECT_EQ(inbound_->settle(evil->own_epoch), Status());
  EXPECT_EQ(inbound_->writers(), 1u);
}

TEST_F(StagedOwner, WrongGrantsPoolsAndWantsEndTheConnectionToo) {
  auto a = writer("a"), b = writer("b"), c = writer("c");
  a->want(1);
  b->want(1);
  settle();
  Note stale = a->grants.at(0);
  ++stale.value;
  deliver(stale, {{0, 0, 1}});
  EXPECT_EQ(a->refused, 1);
  deliver(b->grants.at(0), {{0, 0, 1}}, 5, 1);
  EXPECT_EQ(b->refused, 1);
  c->want(1u << 30);
  settle();
  EXPECT_EQ(c->closed.code(), StatusCode::kUnavailable);
  EXPECT_EQ(inbound_->writers(), 0u);
  EXPECT_EQ(pool_[0], std::byte{0});
}

TEST_F(StagedOwner, AWriterThatSitsOnSlotsThatOthersWaitForIsCutOff) {
  auto slow = writer("slow");
  slow->want(1000);
  std::vector<std::unique_ptr<Writer>> others;
  settle();
  for (int i = 0; i < 6; ++i) {
    others.push_back(writer("other"));
    others.back()->want(1000);
    settle();
  }
  EXPECT_EQ(others.back()->grants.size(), 0u);  // all are taken
  clock_.advance_ns(5'001 * 1'000'000ll);
  settle();
  EXPECT_EQ(slow->closed.code(), StatusCode::kUnavailable);
  EXPECT_EQ(inner_.fences.count(slow->own_epoch), 1u);
}

TEST_F(StagedOwner, TheSlotsOfADeadWriterComeBackWhenTheTransportIsSure) {
  auto dies = writer("dies");
  dies->want(1000);
  settle();
  ASSERT_EQ(dies->grants.size(), kSlots / 2);
  inner_.fence_status = unavailable("its process is not gone yet");
  dies->control.close_outbound(dies->id);
  settle();
  EXPECT_EQ(inbound_->writers(), 0u);
  auto next = writer("next");
  next->want(1000);
  settle();
  EXPECT_EQ(next->grants.size(), kSlots / 4);  // half of the other half
  inner_.fence_status = Status();
  settle();
  EXPECT_EQ(next->grants.size(), kSlots / 2);
  EXPECT_EQ(inbound_->settle_all(), Status());
}

/// Another process with a connection that has closed, and which says that its GPU may be at work in a slot.
TEST_F(StagedOwner, ASlotThatADyingProcessesGpuMayWriteIntoWaitsForItsEnd) {
  self_.name = "staged:shm";
  SlotMemory& slots = **inbound_->memory();
  int to_parent[2], to_child[2];
  ASSERT_TRUE(::pipe2(to_parent, O_CLOEXEC) == 0 && ::pipe2(to_child, O_CLOEXEC) == 0);
  const pid_t pid = ::fork();
  if (pid == 0) {
    ::prctl(PR_SET_PDEATHSIG, SIGKILL);
    auto dies = std::make_unique<Writer>(*this, "dies");
    char step = 0;
    while (!dies->welcome) (void)dies->control.progress();
    const bool may = dies->may_write_slots;
    dies->want(1000);
    while (dies->grants.size() < kSlots / 2) (void)dies->control.progress();
    slots.busy(dies->grants[0].slot).store(1);
    const Epoch epoch = dies->own_epoch;
    dies.reset();
    (void)!::write(to_parent[1], &epoch, sizeof(epoch));
    (void)!::write(to_parent[1], &may, sizeof(may));
    (void)!::read(to_child[0], &step, 1);
    ::_exit(0);
  }
  pollfd closed{to_parent[0], POLLIN, 0};
  while (::poll(&closed, 1, 0) == 0) settle();
  Epoch epoch{};
  bool may = false;
  ASSERT_EQ(::read(to_parent[0], &epoch, sizeof(epoch)), static_cast<ssize_t>(sizeof(epoch)));
  ASSERT_EQ(::read(to_parent[0], &may, sizeof(may)), static_cast<ssize_t>(sizeof(may)));
  EXPECT_TRUE(may);
  while (inbound_->writers() > 0) settle();
  // The host transport is sure, the process is not over: seven slots are free again, and this one is not.
  auto next = writer("next");
  next->want(1000);
  settle();
  EXPECT_EQ(next->grants.size(), kSlots / 2);
  auto all = writer("all");
  all->want(1);
  settle();
  EXPECT_EQ(inbound_->settle(epoch), Status());  // of the pools nothing is touched any more
  EXPECT_EQ(inbound_->longest_wait_ns(), 2'000'000);
  ASSERT_EQ(::write(to_child[1], "x", 1), 1);
  int status = 0;
  ASSERT_EQ(::waitpid(pid, &status, 0), pid);
  EXPECT_EQ(status, 0);
  settle();
  EXPECT_GT(inbound_->longest_wait_ns(), 2'000'000);
  for (int fd : {to_parent[0], to_parent[1], to_child[0], to_child[1]}) ::close(fd);
}

}  // namespace
}  // namespace baton::transfer::staged
