#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <numeric>
#include <string>
#include <thread>

#include "base/log.h"
#include "base/random.h"
#include "transfer/cuda/copy_engine.h"
#include "transfer/cuda/staging.h"
#include "transfer/cuda/testing/pool_memory.h"
#include "transfer/include/baton/transfer.h"

/// What the conformance suite does not show of GPU memory, over the stand-in for CUDA.
namespace baton::transfer {
namespace {

using namespace cuda;
using ::testing::HasSubstr;
using transfer::testing::cuda_library;
using transfer::testing::PoolMemory;

class Cuda : public ::testing::Test {
 protected:
  void SetUp() override {
    set_log_level(LogLevel::kError);
    driver_ = *Driver::load(cuda_library());
    device_ = *Device::open(driver_, 0);
  }
  static AgentConfig config(const std::string& name, const std::string& transport = "auto") {
    AgentConfig config;
    config.name = name;
    config.transport = transport;
    config.bind_address = "127.0.0.1";
    config.cuda_library = cuda_library();
    return config;
  }
  static std::unique_ptr<CopyEngine> make_engine(const std::shared_ptr<const Device>& device, uint32_t max_ctas = 0) {
    auto engine = CopyEngine::create(device, {.max_ctas = max_ctas});
    EXPECT_TRUE(engine.ok()) << engine.status().to_string();
    return std::move(*engine);
  }

  std::shared_ptr<const Driver> driver_;
  std::shared_ptr<const Device> device_;
};

TEST_F(Cuda, ListsOfAnyLengthAreCopiedAndNothingElse) {
  auto engine = make_engine(device_);
  PoolMemory from(8u << 20, "cuda_ipc"), to(8u << 20, "cuda_ipc");
  Random random(1);
  for (std::byte& byte : from) byte = static_cast<std::byte>(random());
  for (size_t count : {size_t{1}, size_t{63}, size_t{64}, size_t{65}, size_t{1000}, size_t{8192}}) {
    to.fill(std::byte{0});
    std::vector<std::byte> expected(to.size());
    std::vector<Segment> pieces;
    for (size_t i = 0; i < count; ++i) {
      uint64_t slot = (i * 11) % count * 1024;
      pieces.push_back({i * 1000, slot, 1 + i % 1000});
      std::memcpy(expected.data() + slot, from.data() + i * 1000, 1 + i % 1000);
    }
    auto ticket = engine->start(reinterpret_cast<CUdeviceptr>(from.data()), reinterpret_cast<CUdeviceptr>(to.data()),
                                pieces, true);
    ASSERT_TRUE(ticket.ok() && ticket->has_value());
    while (!engine->done(**ticket)) std::this_thread::yield();
    EXPECT_TRUE(to == expected) << count;
    EXPECT_TRUE(engine->idle());
    EXPECT_EQ(engine->health(), Status());
  }
}

TEST_F(Cuda, BlocksAreCopiedByTheirNumbersAndNothingElse) {
  auto engine = make_engine(device_);
  constexpr uint64_t kFrom = 1200, kTo = 1000;
  PoolMemory from(8192 * kFrom, "cuda_ipc"), to(8192 * kTo, "cuda_ipc");
  Random random(2);
  for (std::byte& byte : from) byte = static_cast<std::byte>(random());
  for (uint32_t count : {1u, 24u, 25u, 1000u, 8192u}) {
    to.fill(std::byte{0});
    std::vector<std::byte> expected(to.size());
    std::vector<BlockPair> blocks;
    for (uint32_t i = 0; i < count; ++i) {
      blocks.push_back({i, (i * 11) % count});
      std::memcpy(expected.data() + blocks.back().remote_block * kTo + 7, from.data() + i * kFrom + 7, 900);
    }
    auto ticket = engine->start_blocks(reinterpret_cast<CUdeviceptr>(from.data()), reinterpret_cast<CUdeviceptr>(to.data()),
                                       blocks, {kFrom, kTo, 7, 900}, true);
    ASSERT_TRUE(ticket.ok() && ticket->has_value());
    ASSERT_EQ(engine->drain(), Status());
    ASSERT_TRUE(engine->done(**ticket));
    ASSERT_EQ(std::memcmp(to.data(), expected.data(), expected.size()), 0) << count;
  }
}

TEST_F(Cuda, LargePiecesAreCut) {
  auto engine = make_engine(device_, 3);
  PoolMemory from(4u << 20, "cuda_ipc"), to(4u << 20, "cuda_ipc");
  Random random(2);
  for (std::byte& byte : from) byte = static_cast<std::byte>(random());
  std::vector<Segment> pieces = {{0, 1u << 20, (1u << 20) + 17}, {3u << 20, 0, CopyEngine::kMaxPieceBytes + 1}};
  auto ticket = engine->start(reinterpret_cast<CUdeviceptr>(from.data()), reinterpret_cast<CUdeviceptr>(to.data()),
                              pieces, true);
  ASSERT_TRUE(ticket.ok() && ticket->has_value());
  ASSERT_EQ(engine->drain(), Status());
  for (const Segment& piece : pieces) {
    EXPECT_EQ(std::memcmp(from.data() + piece.local_offset, to.data() + piece.remote_offset, piece.bytes), 0);
  }
}

TEST_F(Cuda, MoreListsThanThereAreWait) {
  auto engine = make_engine(device_);
  PoolMemory from(16u << 20, "cuda_ipc"), to(16u << 20, "cuda_ipc");
  std::vector<Segment> pieces;
  for (uint64_t i = 0; i < 4096; ++i) pieces.push_back({i * 4096, (4095 - i) * 4096, 4096});
  int started = 0, refused = 0;
  while (started < 40) {
    auto ticket = engine->start(reinterpret_cast<CUdeviceptr>(from.data()), reinterpret_cast<CUdeviceptr>(to.data()),
                                pieces, true);
    ASSERT_TRUE(ticket.ok());
    (ticket->has_value() ? started : refused) += 1;
  }
  EXPECT_GT(refused, 0);
  EXPECT_EQ(engine->drain(), Status());
  EXPECT_TRUE(engine->idle());
}

TEST_F(Cuda, StagingGathersAndScattersWithinItsBounds) {
  Stager::Options options{.copies = 3, .copy_bytes = 2u << 20, .max_ctas = 2};
  PoolMemory from(4u << 20, "cuda_ipc", 0), to(4u << 20, "cuda_ipc", 1);  // outlive what reads them
  auto there = *Device::open(driver_, 1);
  auto host = std::move(*PinnedMemory::allocate(device_, options.copies * options.copy_bytes));
  auto out = std::move(*Stager::create(device_, options));
  auto in = std::move(*Stager::create(there, options));
  Random random(3);
  for (std::byte& byte : from) byte = static_cast<std::byte>(random());
  std::vector<std::byte> expected(to.size());
  auto move = [&](const std::vector<Segment>& pieces) {
    for (const Segment& piece : pieces) {
      std::memcpy(expected.data() + piece.remote_offset, from.data() + piece.local_offset, piece.bytes);
    }
    auto filled = out->gather(reinterpret_cast<CUdeviceptr>(from.data()), pieces, host.address());
    ASSERT_TRUE(filled.ok() && filled->has_value());
    while (!out->ended(**filled)) std::this_thread::yield();
    out->release(**filled);
    auto emptied = in->scatter(host.address(), reinterpret_cast<CUdeviceptr>(to.data()), pieces);
    ASSERT_TRUE(emptied.ok() && emptied->has_value());
    while (!in->ended(**emptied)) std::this_thread::yield();
    in->release(**emptied);
  };
  for (uint32_t round = 0; round < 20; ++round) {
    std::vector<Segment> pieces;
    for (uint64_t i = 0; i < 12; ++i) {
      pieces.push_back({((i * 7 + round) % 200) * 5000, (round * 12 + i) * 4096, 1 + (i * 997 + round) % 4096});
    }
    move(pieces);
  }
  move({{0, 3u << 20, 512u << 10}, {1u << 20, 2u << 20, (512u << 10) + 77}});
  move({{77, 3u << 20, Stager::kKernelBytes + 1}});  // the copy engine alone
  move({{77, 3u << 20, 100}, {1u << 20, 2u << 20, 5000}});  // the kernel alone
  EXPECT_TRUE(to == expected);
  EXPECT_TRUE(in->idle() && out->idle());

  std::vector<Segment> some = {{0, 0, 4096}, {9000, 0, 4096}};
  for (uint32_t i = 0; i < options.copies; ++i) {
    ASSERT_TRUE(out->gather(reinterpret_cast<CUdeviceptr>(from.data()), some, host.address() + i * options.copy_bytes)
                    ->has_value());
  }
  EXPECT_FALSE(out->gather(reinterpret_cast<CUdeviceptr>(from.data()), some, host.address())->has_value());
  some = {{0, 0, options.copy_bytes}, {0, 0, 1}};
  EXPECT_EQ(in->gather(reinterpret_cast<CUdeviceptr>(to.data()), some, host.address()).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_FALSE(Stager::create(device_, {.copies = 0}).ok());
  EXPECT_FALSE(Stager::create(device_, {.copy_bytes = 5000}).ok());
}

TEST_F(Cuda, WhatIsNotGpuMemoryIsRefusedWithAReason) {
  auto agent = std::move(*Agent::create(config("a")));
  std::vector<std::byte> host(4096);
  Result<MemoryRegion> region = agent->register_memory(host, MemoryKind::kCuda);
  ASSERT_FALSE(region.ok());
  EXPECT_THAT(region.status().message(), HasSubstr("not an address of GPU memory"));
  PoolMemory memory(1u << 16, "cuda_ipc");
  std::span<std::byte> too_long(memory.data() + 4096, memory.size());
  region = agent->register_memory(too_long, MemoryKind::kCuda);
  ASSERT_FALSE(region.ok());
  EXPECT_THAT(region.status().message(), HasSubstr("more than the allocation"));
  EXPECT_TRUE(agent->register_memory(std::span(memory.data() + 4096, 8192), MemoryKind::kCuda).ok());

  auto shm = std::move(*Agent::create(config("b", "shm")));
  region = shm->register_memory({memory.data(), memory.size()}, MemoryKind::kCuda);
  ASSERT_FALSE(region.ok());
  EXPECT_THAT(region.status().message(), HasSubstr("'shm' moves host memory only"));

  AgentConfig nowhere = config("c");
  nowhere.cuda_library = "libno-such-cuda.so.1";
  auto without = std::move(*Agent::create(nowhere));
  region = without->register_memory({memory.data(), memory.size()}, MemoryKind::kCuda);
  ASSERT_FALSE(region.ok());
  EXPECT_THAT(region.status().message(), HasSubstr("there is no CUDA driver"));
}

/// An agent with a pool of each kind: 64 blocks of 1 KiB.
struct Both {
  PoolMemory host{64 << 10, "shm"};
  PoolMemory gpu{64 << 10, "cuda_ipc"};
  std::unique_ptr<Agent> agent;
  PoolId host_pool{}, gpu_pool{};

  explicit Both(const AgentConfig& config) : agent(std::move(*Agent::create(config))) {
    host_pool = *agent->add_pool({*agent->register_memory(host, MemoryKind::kHost), 1024, 64});
    gpu_pool = *agent->add_pool({*agent->register_memory(gpu, MemoryKind::kCuda), 1024, 64});
  }
};

TEST_F(Cuda, EveryKindOfMemoryTakesItsOwnPath) {
  Both a(config("a")), b(config("b"));
  a.host.fill(std::byte{3});
  a.gpu.fill(std::byte{4});
  Result<Peer> peer = a.agent->connect(b.agent->metadata());
  ASSERT_TRUE(peer.ok()) << peer.status().to_string();
  EXPECT_EQ(peer->path(MemoryKind::kHost).transport, "shm");
  EXPECT_EQ(peer->path(MemoryKind::kCuda).transport, "cuda_ipc");
  EXPECT_EQ(peer->path().transport, "cuda_ipc");
  BlockWrite write{.local_pool = a.host_pool, .remote_pool = b.host_pool, .blocks = {{1, 2}}, .length_bytes = 1024};
  ASSERT_EQ(peer->write(write)->wait(), Status());
  EXPECT_EQ(b.host.data()[2048], std::byte{3});
  write.local_pool = a.gpu_pool;
  EXPECT_EQ(peer->path(MemoryKind::kCuda, MemoryKind::kHost).transport, "staged:shm");
  write.blocks = {{1, 4}};
  ASSERT_EQ(peer->write(write)->wait(), Status());
  EXPECT_EQ(b.host.data()[4096], std::byte{4});
  write.blocks = {{1, 2}};
  write.remote_pool = b.gpu_pool;
  ASSERT_EQ(peer->write(write)->wait(), Status());
  EXPECT_EQ(b.gpu.data()[2048], std::byte{4});
  EXPECT_EQ(b.gpu.data()[2047], std::byte{0});
  write.local_pool = a.host_pool;
  EXPECT_EQ(peer->path(MemoryKind::kHost, MemoryKind::kCuda).transport, "staged:shm");
  write.blocks = {{1, 5}};
  ASSERT_EQ(peer->write(write)->wait(), Status());
  EXPECT_EQ(b.gpu.data()[5120], std::byte{3});
  EXPECT_EQ(peer->stats().writes, 4u);
  EXPECT_EQ(a.agent->stats().peers, 1u);
  EXPECT_TRUE(peer->close().ok());
  EXPECT_FALSE(peer->alive());
}

TEST_F(Cuda, AWriteWaitsForItsEvent) {
  Both a(config("a")), b(config("b"));
  Peer peer = *a.agent->connect(b.agent->metadata());
  CUevent event = nullptr;
  ASSERT_EQ(driver_->event_create(&event, 0), kSuccess);
  ASSERT_EQ(driver_->event_record(event, nullptr), kSuccess);  // of the stand-in: not reached
  BlockWrite write{.local_pool = a.gpu_pool, .remote_pool = b.gpu_pool, .blocks = {{0, 0}}, .length_bytes = 1024};
  write.after = event;
  a.gpu.fill(std::byte{1});
  Transfer transfer = *peer.write(write);
  BlockWrite doomed = write;
  doomed.deadline = Deadline::after_ms(SteadyClock::instance(), 50);
  EXPECT_EQ(peer.write(doomed)->wait().code(), StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(transfer.done());
  EXPECT_EQ(b.gpu.data()[0], std::byte{0});
  a.gpu.fill(std::byte{2});  // "computed" only now
  CUstream stream = nullptr;
  {
    CurrentDevice current(*device_);
    ASSERT_EQ(driver_->stream_create(&stream, 0, 0), kSuccess);
  }
  ASSERT_EQ(driver_->event_record(event, stream), kSuccess);
  EXPECT_EQ(transfer.wait(), Status());
  EXPECT_EQ(b.gpu.data()[0], std::byte{2});
  write.local_pool = a.host_pool;
  write.remote_pool = b.host_pool;
  EXPECT_EQ(peer.write(write).status().code(), StatusCode::kInvalidArgument);
  (void)driver_->stream_destroy(stream);
  (void)driver_->event_destroy(event);
}

/// Whether every other thread of this process sleeps.
bool others_sleep() {
  for (const auto& task : std::filesystem::directory_iterator("/proc/self/task")) {
    if (task.path().filename() == std::to_string(::gettid())) continue;
    std::string line;
    std::getline(std::ifstream(task.path() / "stat"), line);
    const size_t end = line.rfind(')');  // of the name; the state follows
    if (end != std::string::npos && line.compare(end, 3, ") S") != 0) return false;
  }
  return true;
}

TEST_F(Cuda, GpuMemoryThatComesWhileAnAgentSleepsIsReachedAtOnce) {
  PoolMemory here(4096, "cuda_ipc", 0), there(4096, "cuda_ipc", 0);
  auto sender = std::move(*Agent::create(config("sender")));
  auto receiver = std::move(*Agent::create(config("receiver")));
  PoolId from = *sender->add_pool({*sender->register_memory(here, MemoryKind::kCuda), 4096, 1});
  while (!others_sleep()) std::this_thread::yield();
  PoolId to = *receiver->add_pool({*receiver->register_memory(there, MemoryKind::kCuda), 4096, 1});
  here.fill(std::byte{5});
  Peer peer = *sender->connect(receiver->metadata());
  EXPECT_EQ(peer.path().transport, "cuda_ipc");
  EXPECT_EQ(peer.write({.local_pool = from, .remote_pool = to, .blocks = {{0, 0}}, .length_bytes = 4096})->wait(), Status());
  EXPECT_TRUE(here == there);
}

TEST_F(Cuda, WithoutPeerAccessThereIsNoPathAndAReason) {
  PoolMemory here(4096, "cuda_ipc", 0), there(4096, "cuda_ipc", 1);
  auto a = std::move(*Agent::create(config("a", "cuda_ipc")));
  auto b = std::move(*Agent::create(config("b", "cuda_ipc")));
  (void)*a->add_pool({*a->register_memory(here, MemoryKind::kCuda), 4096, 1});
  (void)*b->add_pool({*b->register_memory(there, MemoryKind::kCuda), 4096, 1});
  EXPECT_TRUE(a->connect(b->metadata()).ok());
  ::setenv("BATON_FAKE_CUDA_NO_PEERS", "1", 1);
  auto c = std::move(*Agent::create(config("c", "cuda_ipc")));
  (void)*c->add_pool({*c->register_memory(there, MemoryKind::kCuda), 4096, 1});
  Result<Peer> none = a->connect(c->metadata());
  ::unsetenv("BATON_FAKE_CUDA_NO_PEERS");
  ASSERT_FALSE(none.ok());
  EXPECT_THAT(none.status().message(), HasSubstr("no peer access to GPU 1"));
}

TEST_F(Cuda, AutoStagesWhereCudaIpcCannotBeAndSaysWhy) {
  ::setenv("BATON_FAKE_CUDA_NO_PEERS", "1", 1);
  PoolMemory here(64 << 10, "cuda_ipc", 0), there(64 << 10, "cuda_ipc", 1);
  auto a = std::move(*Agent::create(config("a")));
  auto b = std::move(*Agent::create(config("b")));
  PoolId from = *a->add_pool({*a->register_memory(here, MemoryKind::kCuda), 1024, 64});
  PoolId to = *b->add_pool({*b->register_memory(there, MemoryKind::kCuda), 1024, 64});
  Result<Peer> peer = a->connect(b->metadata());
  ::unsetenv("BATON_FAKE_CUDA_NO_PEERS");
  ASSERT_TRUE(peer.ok()) << peer.status().to_string();
  EXPECT_EQ(peer->path().transport, "staged:shm");
  EXPECT_EQ(peer->path().provider, "staged over cma");
  EXPECT_THAT(peer->path().reason, HasSubstr("cuda_ipc: GPU 0"));
  EXPECT_THAT(peer->path().reason, HasSubstr("no peer access"));

  CUevent event = nullptr;
  CUstream stream = nullptr;
  ASSERT_EQ(driver_->event_create(&event, 0), kSuccess);
  ASSERT_EQ(driver_->event_record(event, nullptr), kSuccess);  // of the stand-in: not reached
  BlockWrite write{.local_pool = from, .remote_pool = to, .blocks = {{1, 2}, {7, 9}}, .length_bytes = 1024};
  write.after = event;
  BlockWrite doomed = write;
  doomed.deadline = Deadline::after_ms(SteadyClock::instance(), 30);
  Transfer transfer = *peer->write(write);
  EXPECT_EQ(peer->write(doomed)->wait().code(), StatusCode::kDeadlineExceeded);
  EXPECT_FALSE(transfer.done());
  here.fill(std::byte{6});
  {
    CurrentDevice current(*device_);
    ASSERT_EQ(driver_->stream_create(&stream, 0, 0), kSuccess);
  }
  ASSERT_EQ(driver_->event_record(event, stream), kSuccess);
  EXPECT_EQ(transfer.wait(), Status());
  EXPECT_EQ(there.data()[2 * 1024], std::byte{6});
  EXPECT_EQ(there.data()[10 * 1024 - 1], std::byte{6});
  EXPECT_EQ(there.data()[3 * 1024], std::byte{0});
  EXPECT_THAT(b->describe(), HasSubstr("1 writers"));
  EXPECT_THAT(b->describe(), HasSubstr("staged:tcp (not used)"));
  (void)driver_->stream_destroy(stream);
  (void)driver_->event_destroy(event);
}

TEST_F(Cuda, StagingWorksWithADriverThatDoesNotPinOurMemory) {
  ::setenv("BATON_FAKE_CUDA_NO_REGISTER", "1", 1);
  Both a(config("a", "staged:shm")), b(config("b", "staged:shm"));
  a.gpu.fill(std::byte{7});
  Peer peer = *a.agent->connect(b.agent->metadata());
  BlockWrite write{.local_pool = a.gpu_pool, .remote_pool = b.gpu_pool, .blocks = {{0, 63}, {5, 1}}, .length_bytes = 1024};
  EXPECT_EQ(peer.write(write)->wait(), Status());
  ::unsetenv("BATON_FAKE_CUDA_NO_REGISTER");
  EXPECT_THAT(a.agent->describe(), HasSubstr("0.0 MB gathered and sent, 0.0 of it straight"));
  EXPECT_EQ(b.gpu.data()[63 * 1024], std::byte{7});
  EXPECT_EQ(b.gpu.data()[1024], std::byte{7});
  EXPECT_EQ(b.gpu.data()[0], std::byte{0});
}

TEST_F(Cuda, OnOneHostNothingIsCopiedFromSlotToSlot) {
  constexpr uint64_t kStride = 64 << 10;
  constexpr uint32_t kBlocks = 64;
  PoolMemory memories[] = {PoolMemory(kBlocks * kStride, "cuda_ipc", 0), PoolMemory(kBlocks * kStride, "cuda_ipc", 1),
                           PoolMemory(kBlocks * kStride, "shm"), PoolMemory(kBlocks * kStride, "shm")};
  auto a = std::move(*Agent::create(config("a", "staged:shm"))), b = std::move(*Agent::create(config("b", "staged:shm")));
  PoolId from[2], to[2];
  for (int kind : {0, 1}) {
    PoolMemory &source = memories[2 * kind], &target = memories[2 * kind + 1];
    from[kind] = *a->add_pool({*a->register_memory(source, source.kind()), kStride, kBlocks});
    to[kind] = *b->add_pool({*b->register_memory(target, target.kind()), kStride, kBlocks});
    Random random(static_cast<uint64_t>(kind));
    for (std::byte& byte : source) byte = static_cast<std::byte>(random());
  }
  Peer peer = *a->connect(b->metadata());
  // More than all slots, in pieces that the kernel moves alone, with the copy engine's help, or not at all.
  for (auto [source, target] : {std::pair(0, 0), {0, 1}, {1, 0}}) {
    for (uint64_t bytes : {uint64_t{100}, uint64_t{4096}, kStride}) {
      memories[2 * target + 1].fill(std::byte{0});
      BlockWrite write;
      write.local_pool = from[source];
      write.remote_pool = to[target];
      write.length_bytes = bytes;
      for (uint32_t i = 0; i < kBlocks; ++i) write.blocks.push_back({i, (i * 5 + 3) % kBlocks});
      ASSERT_EQ(peer.write(write)->wait(), Status());
      for (const BlockPair& pair : write.blocks) {
        const std::byte* block = memories[2 * target + 1].data() + pair.remote_block * kStride;
        ASSERT_EQ(std::memcmp(block, memories[2 * source].data() + pair.local_block * kStride, bytes), 0);
        ASSERT_TRUE(bytes == kStride || block[bytes] == std::byte{0});
      }
    }
  }
  EXPECT_THAT(a->describe(), HasSubstr("13.4 MB gathered and sent, 13.4 of it straight into slots of the receivers"));
  // Slots of its own were not needed.
  EXPECT_EQ(peer.close(), Status());
}

TEST_F(Cuda, AHostWithoutCudaWritesIntoGpuMemoryAndIsWrittenInto) {
  Both gpu(config("gpu"));
  AgentConfig without = config("plain");
  without.cuda_library = "libno-such-cuda.so.1";
  PoolMemory host(64 << 10, "shm");
  auto plain = std::move(*Agent::create(without));
  PoolId pool = *plain->add_pool({*plain->register_memory(host, MemoryKind::kHost), 1024, 64});
  set_log_level(LogLevel::kError);
  Peer there = *plain->connect(gpu.agent->metadata());
  EXPECT_EQ(there.path(MemoryKind::kHost, MemoryKind::kCuda).transport, "staged:shm");
  host.fill(std::byte{8});
  BlockWrite write{.local_pool = pool, .remote_pool = gpu.gpu_pool, .blocks = {{0, 3}}, .length_bytes = 1024};
  EXPECT_EQ(there.write(write)->wait(), Status());
  EXPECT_EQ(gpu.gpu.data()[3072], std::byte{8});
  Peer back = *gpu.agent->connect(plain->metadata());
  gpu.gpu.fill(std::byte{9});
  write = {.local_pool = gpu.gpu_pool, .remote_pool = pool, .blocks = {{0, 4}}, .length_bytes = 1024};
  EXPECT_EQ(back.write(write)->wait(), Status());
  EXPECT_EQ(host.data()[4096], std::byte{9});
  EXPECT_EQ(host.data()[5120], std::byte{8});
}

TEST_F(Cuda, AnAgentWithoutGpuMemoryStillReachesTheHostPools) {
  Both b(config("b"));
  PoolMemory host(64 << 10, "shm");
  auto a = std::move(*Agent::create(config("a")));
  PoolId pool = *a->add_pool({*a->register_memory(host, MemoryKind::kHost), 1024, 64});
  set_log_level(LogLevel::kError);
  Peer peer = *a->connect(b.agent->metadata());
  EXPECT_EQ(peer.path().transport, "shm");
  EXPECT_THAT(peer.path(MemoryKind::kCuda).reason, HasSubstr("has to be registered before"));
  BlockWrite write{.local_pool = pool, .remote_pool = b.host_pool, .blocks = {{0, 0}}, .length_bytes = 1024};
  EXPECT_EQ(peer.write(write)->wait(), Status());
}

}  // namespace
}  // namespace baton::transfer
