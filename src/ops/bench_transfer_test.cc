#include "ops/bench_transfer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/socket.h>

#include "ops/bench_transfer_wire.h"
#include "transfer/wire.h"

namespace baton::ops {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

BenchRequest full_request() {
  BenchRequest request{.command = BenchCommand::kCheck};
  request.shared_memory = true;
  request.gpu_memory = true;
  request.device = ~0u;
  request.tag = 7;
  request.pool_bytes = 1ull << 40;
  request.block_bytes = 4096;
  request.bytes = 5;
  request.count = 6;
  request.transport = "tcp";
  request.metadata = std::string("\0binary\xff", 8);
  request.block_sizes = {4096, 1ull << 33};
  request.blocks = {1, 0, 0xffffffff};
  request.hashes = {1, 2, ~0ull};
  return request;
}

TEST(BenchTransferWire, RecordsComeBackAsTheyWere) {
  BenchRequest request = full_request();
  Result<BenchRequest> parsed = parse_bench_request(encode(request));
  ASSERT_TRUE(parsed.ok()) << parsed.status().to_string();
  EXPECT_EQ(*parsed, request);

  BenchReply reply;
  reply.code = StatusCode::kDataLoss;
  reply.message = "gone";
  reply.host_id = "host";
  reply.text = std::string(70, '\1');
  reply.device = "GPU 0";
  reply.pid = 1;
  reply.address = ~0ull;
  reply.bad_blocks = 3;
  Result<BenchReply> parsed_reply = parse_bench_reply(encode(reply));
  ASSERT_TRUE(parsed_reply.ok());
  EXPECT_EQ(*parsed_reply, reply);
  EXPECT_EQ(parsed_reply->status().code(), StatusCode::kDataLoss);
}

TEST(BenchTransferWire, DamagedRecordsAreRefused) {
  std::string good = encode(full_request());
  for (size_t size = 0; size < good.size(); ++size) EXPECT_FALSE(parse_bench_request(std::string_view(good).substr(0, size)).ok()) << size;
  EXPECT_FALSE(parse_bench_request(good + "x").ok());
  std::string unknown = good;
  unknown[0] = 0;
  EXPECT_FALSE(parse_bench_request(unknown).ok());
  unknown[0] = 100;
  EXPECT_FALSE(parse_bench_request(unknown).ok());
  std::string other = good;
  other[1] = 99;
  EXPECT_THAT(parse_bench_request(other).status().message(), HasSubstr("version 99"));

  std::string reply = encode(BenchReply{});
  for (size_t size = 0; size < reply.size(); ++size) EXPECT_FALSE(parse_bench_reply(std::string_view(reply).substr(0, size)).ok());
  reply[0] = 77;
  EXPECT_FALSE(parse_bench_reply(reply).ok());
}

TEST(BenchTransferWire, AListThatClaimsToBeHugeCostsNothing) {
  BenchRequest request = full_request();
  request.blocks.assign(kMaxBenchBlocks, 1);
  request.hashes.clear();
  EXPECT_TRUE(parse_bench_request(encode(request)).ok());
  // The last four bytes are the length of the (empty) list of hashes.
  std::string huge = encode(request);
  huge.replace(huge.size() - 4, 4, "\xff\xff\xff\xff", 4);
  EXPECT_FALSE(parse_bench_request(huge).ok());
}

TEST(BenchTransferWire, AddressesAreChecked) {
  EXPECT_EQ(parse_host_port("10.0.0.1:7000", false)->port, "7000");
  EXPECT_EQ(parse_host_port("[::1]:7000", false)->host, "::1");
  EXPECT_TRUE(parse_host_port("host:0", true).ok());
  for (const char* bad : {"", ":", "host", "host:", ":7000", "host:0", "host:x", "host:70000", "::1:7000", "host:1 ", "[]:1"}) {
    EXPECT_FALSE(parse_host_port(bad, false).ok()) << bad;
  }
}

class Pair {
 public:
  Pair() {
    int ends[2];
    EXPECT_EQ(::socketpair(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0, ends), 0);
    near.reset(ends[0]);
    far.reset(ends[1]);
  }
  FileDescriptor near, far;
};

TEST(BenchChannel, CarriesFramesAndSeesTheEnd) {
  Pair pair;
  BenchChannel near(std::move(pair.near));
  {
    BenchChannel far(std::move(pair.far));
    EXPECT_FALSE(near.readable());
    ASSERT_TRUE(far.send("").ok());
    ASSERT_TRUE(far.send("two").ok());
    EXPECT_TRUE(near.readable());
    EXPECT_EQ(*near.receive(1000), "");
    EXPECT_EQ(*near.receive(1000), "two");
    EXPECT_EQ(near.receive(1).status().code(), StatusCode::kDeadlineExceeded);
    EXPECT_EQ(near.local_ip(), "");
    EXPECT_FALSE(far.send(std::string(kMaxBenchFrameBytes + 1, 'x')).ok());
  }
  EXPECT_EQ(near.receive(1000).status().code(), StatusCode::kUnavailable);
}

TEST(BenchChannel, RefusesAFrameThatIsTooLong) {
  Pair pair;
  BenchChannel near(std::move(pair.near));
  uint32_t length = kMaxBenchFrameBytes + 1;
  ASSERT_EQ(::send(pair.far.get(), &length, sizeof(length), 0), 4);
  EXPECT_EQ(near.receive(1000).status().code(), StatusCode::kInvalidArgument);
}

TEST(BenchTransferOptions, RefusesWhatMakesNoSense) {
  BenchTransferOptions options;
  EXPECT_TRUE(options.validate().ok()) << options.validate().to_string();
  auto refused = [](auto change) {
    BenchTransferOptions bad;
    change(bad);
    return !bad.validate().ok();
  };
  EXPECT_TRUE(refused([](auto& o) { o.transports.clear(); }));
  EXPECT_TRUE(refused([](auto& o) { o.block_bytes.clear(); }));
  EXPECT_TRUE(refused([](auto& o) { o.block_bytes = {12}; }));
  EXPECT_TRUE(refused([](auto& o) { o.block_bytes = {0}; }));
  EXPECT_TRUE(refused([](auto& o) { o.block_bytes.assign(65, 4096); }));
  EXPECT_TRUE(refused([](auto& o) { o.block_bytes = {1ull << 62}; o.blocks = {4}; }));
  EXPECT_TRUE(refused([](auto& o) { o.blocks = {0}; }));
  EXPECT_TRUE(refused([](auto& o) { o.blocks = {1u << 30}; }));
  EXPECT_TRUE(refused([](auto& o) { o.pool_bytes = 1 << 20; }));
  EXPECT_TRUE(refused([](auto& o) { o.order = "sorted"; }));
  EXPECT_TRUE(refused([](auto& o) { o.memory = "gpu"; }));
  EXPECT_TRUE(refused([](auto& o) { o.device = -1; }));
  EXPECT_TRUE(refused([](auto& o) { o.peer_device = 5000; }));
  EXPECT_TRUE(refused([](auto& o) { o.runs = 0; }));
  EXPECT_TRUE(refused([](auto& o) { o.pings = -1; }));
}

TEST(BenchTransferOptions, ADefaultTransferIsLargerThanACache) {
  BenchTransferOptions options;
  EXPECT_THAT(block_counts(options, 16 << 10), ElementsAre(2048));
  EXPECT_THAT(block_counts(options, 16 << 20), ElementsAre(2));
  EXPECT_THAT(block_counts(options, 64 << 20), ElementsAre(1));
  options.blocks = {1, 64};
  EXPECT_THAT(block_counts(options, 4096), ElementsAre(1, 64));
  options.blocks.clear();
  options.memory = "cuda";
  EXPECT_THAT(block_counts(options, 64 << 10), ElementsAre(4096));
  options.pool_bytes = 1 << 20;
  EXPECT_THAT(block_counts(options, 64 << 10), ElementsAre(16));
}

TEST(BenchTransferSpread, IsMedianAndExtremes) {
  Spread spread = spread_of({5, 1, 3});
  EXPECT_EQ(spread.median, 3);
  EXPECT_EQ(spread.min, 1);
  EXPECT_EQ(spread.max, 5);
  EXPECT_EQ(spread_of({}).median, 0);
}

TEST(BenchTransferReport, ShowsEveryRowBesideItsBaselines) {
  EXPECT_EQ(format_bytes(16 << 10), "16 KiB");
  EXPECT_EQ(format_bytes(1000), "1000 B");
  EXPECT_EQ(format_bytes(1536 << 10), "1536 KiB");
  BenchTransferResult result;
  result.target = "<a process>";
  result.options.verify = true;
  result.verified_blocks = 99;
  BenchPath path;
  path.transport = "shm";
  path.provider = "cma";
  path.notifications.push_back({4096, 10, 20, 5, 0});
  result.paths.push_back(path);
  BenchTransferRow row;
  row.transport = "shm";
  row.order = "scattered";
  row.block_bytes = 16 << 10;
  row.blocks = 2048;
  row.bytes_per_s = {8e9, 7e9, 9e9};
  row.baselines.push_back({"memcpy", {1e10, 9e9, 1.1e10}, 0.8, 0.1});
  result.rows.push_back(row);
  std::string table = bench_transfer_table(result);
  EXPECT_THAT(table, HasSubstr("memcpy 10.00 (0.80, 0.10)"));
  EXPECT_THAT(table, HasSubstr("99 blocks compared"));
  std::string json = bench_transfer_json(result);
  for (const char* key : {"\"paths\"", "\"notifications\"", "\"rows\"", "\"baselines\"", "\"ratio\"", "\"retries\"", "\"cpu_s_per_gb\""}) {
    EXPECT_THAT(json, HasSubstr(key));
  }
  std::string html = bench_transfer_html(result);
  EXPECT_THAT(html, HasSubstr("&lt;a process&gt;"));
  EXPECT_THAT(html, HasSubstr("<svg"));
  EXPECT_EQ(html.find("nan"), std::string::npos);
}

}  // namespace
}  // namespace baton::ops
