#include "transfer/metadata.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "base/random.h"
#include "transfer/wire.h"

namespace baton::transfer {
namespace {

using ::testing::HasSubstr;

constexpr size_t kLimit = 1u << 20;

Metadata example() {
  Metadata metadata;
  metadata.name = "prefill-0";
  metadata.epoch = static_cast<Epoch>(0x1234567890abcdef);
  metadata.serial = 3;
  metadata.host_id = "0f0e0d0c";
  metadata.pools = {{0, MemoryKind::kHost, 2u << 20, 1000}, {7, MemoryKind::kCuda, 4096, 1}};
  metadata.offers = {{"shm", "cma", std::string("a\0b", 3)}, {"tcp", "net", "tcp:10.0.0.1:4000"}};
  return metadata;
}

TEST(Metadata, ComesBackAsItWas) {
  Metadata metadata = example();
  Result<Metadata> parsed = parse_metadata(encode_metadata(metadata), kLimit);
  ASSERT_TRUE(parsed.ok()) << parsed.status().to_string();
  EXPECT_EQ(*parsed, metadata);
}

TEST(Metadata, EveryDamagedByteIsFound) {
  std::string good = encode_metadata(example());
  for (size_t i = 0; i < good.size(); ++i) {
    for (int bit = 0; bit < 8; ++bit) {
      std::string bad = good;
      bad[i] = static_cast<char>(bad[i] ^ (1 << bit));
      EXPECT_FALSE(parse_metadata(bad, kLimit).ok()) << i;
    }
    EXPECT_FALSE(parse_metadata(good.substr(0, i), kLimit).ok()) << i;
  }
  EXPECT_FALSE(parse_metadata(good + "x", kLimit).ok());
}

TEST(Metadata, LimitsAndVersionsAreNamed) {
  std::string good = encode_metadata(example());
  EXPECT_THAT(parse_metadata(good, 10).status().message(), HasSubstr("max_metadata_bytes"));
  EXPECT_THAT(parse_metadata("hello, is this metadata?", kLimit).status().message(), HasSubstr("not Baton"));
  std::string newer = good;
  newer[4] = 2;
  EXPECT_THAT(parse_metadata(newer, kLimit).status().message(), HasSubstr("version 2"));
}

TEST(Metadata, ImpossiblePoolsAreRefusedEvenWithARightChecksum) {
  Metadata metadata = example();
  metadata.pools[0].count = uint64_t{1} << 62;
  EXPECT_FALSE(parse_metadata(encode_metadata(metadata), kLimit).ok());
  metadata = example();
  metadata.pools[0].stride_bytes = 0;
  EXPECT_FALSE(parse_metadata(encode_metadata(metadata), kLimit).ok());
  metadata = example();
  metadata.pools[1].id = 0;  // twice
  EXPECT_FALSE(parse_metadata(encode_metadata(metadata), kLimit).ok());
  metadata = example();
  metadata.epoch = Epoch::kNone;
  EXPECT_FALSE(parse_metadata(encode_metadata(metadata), kLimit).ok());
}

TEST(Wire, AReaderNeverReadsPastTheEnd) {
  WireWriter out;
  out.put(static_cast<uint16_t>(500));
  WireReader in(out.bytes());
  EXPECT_EQ(in.get_string(1000), "");
  EXPECT_FALSE(in.ok());
  EXPECT_EQ(in.get<uint64_t>(), 0u);
  WireReader bounded(std::string_view("\x03\x00" "abc", 5));
  EXPECT_EQ(bounded.get_string(2), "");
  EXPECT_FALSE(bounded.ok());
}

}  // namespace
}  // namespace baton::transfer
