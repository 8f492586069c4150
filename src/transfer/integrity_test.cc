#include "transfer/integrity.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <vector>

#include "base/random.h"
#include "transfer/wire.h"

namespace baton::transfer {
namespace {

Check some_check() {
  Check check;
  check.id = 0x0102030405060708;
  check.tag = 7;
  check.counts = true;
  check.pool = 3;
  check.block_bytes = 4096;
  check.blocks = {{0, 1}, {4096, ~0ull}, {1ull << 40, 0}};
  return check;
}

CheckResult some_result() {
  CheckResult result;
  result.id = 9;
  result.outcome = CheckResult::Outcome::kWrong;
  result.bad_blocks = 2;
  result.offset = 8192;
  result.hash = 0xdeadbeef;
  result.reason = "why";
  return result;
}

TEST(IntegrityFrames, ComeBackAsTheyWere) {
  EXPECT_EQ(*parse_check(encode_check(some_check())), some_check());
  EXPECT_EQ(*parse_check_result(encode_check_result(some_result())), some_result());
  Check back;
  back.id = 5;
  EXPECT_EQ(*parse_check(encode_check(back)), back);
  Check large = some_check();
  large.blocks.resize(Check::kMaxBlocks);
  EXPECT_EQ(*parse_check(encode_check(large)), large);
  Check huge = some_check();  // a single block may have any size
  huge.block_bytes = ~0ull;
  huge.blocks.resize(1);
  EXPECT_EQ(*parse_check(encode_check(huge)), huge);
}

TEST(IntegrityFrames, CutOrLongOnesAreRefused) {
  const std::string check = encode_check(some_check()), result = encode_check_result(some_result());
  for (size_t i = 0; i < check.size(); ++i) EXPECT_FALSE(parse_check(check.substr(0, i)).ok()) << i;
  for (size_t i = 0; i < result.size(); ++i) EXPECT_FALSE(parse_check_result(result.substr(0, i)).ok()) << i;
  EXPECT_FALSE(parse_check(check + '\0').ok());
  EXPECT_FALSE(parse_check_result(result + '\0').ok());
}

TEST(IntegrityFrames, BoundsAreKept) {
  const auto refused = [](auto change) {
    Check check = some_check();
    change(check);
    return !parse_check(encode_check(check)).ok();
  };
  EXPECT_TRUE(refused([](Check& check) { check.block_bytes = 0; }));
  EXPECT_TRUE(refused([](Check& check) { check.block_bytes = Check::kMaxBytes / 3 + 1; }));
  EXPECT_TRUE(refused([](Check& check) { check.block_bytes = ~0ull; }));
  EXPECT_TRUE(refused([](Check& check) { check.tag = 0; }));  // and yet it counts
  // More blocks than may be, although they are all there.
  WireWriter out;
  out.put(uint64_t{1});
  out.put(uint32_t{0});
  out.put(uint8_t{0});
  out.put(uint32_t{0});
  out.put(uint64_t{16});
  out.put(static_cast<uint32_t>(Check::kMaxBlocks + 1));
  for (size_t i = 0; i <= Check::kMaxBlocks; ++i) {
    out.put(uint64_t{i});
    out.put(uint64_t{i});
  }
  EXPECT_FALSE(parse_check(out.bytes()).ok());
  CheckResult result = some_result();
  result.bad_blocks = 0;
  EXPECT_FALSE(parse_check_result(encode_check_result(result)).ok());
  result = some_result();
  result.outcome = static_cast<CheckResult::Outcome>(5);
  EXPECT_FALSE(parse_check_result(encode_check_result(result)).ok());
  result = some_result();
  result.reason = std::string(5000, 'x');  // cut, not refused: it tells a person why
  EXPECT_EQ(parse_check_result(encode_check_result(result))->reason.size(), 500u);
}

TEST(IntegrityFrames, AsManyBlocksAsBytesAllow) {
  EXPECT_EQ(Check::blocks_per_check(1), Check::kMaxBlocks);
  EXPECT_EQ(Check::blocks_per_check(32 << 10), Check::kMaxBlocks);
  EXPECT_EQ(Check::blocks_per_check(2 << 20), 32u);
  EXPECT_EQ(Check::blocks_per_check(Check::kMaxBytes + 1), 1u);
  EXPECT_EQ(Check::blocks_per_check(~0ull), 1u);
}

TEST(BlockHasher, PiecesDoNotMatter) {
  std::vector<std::byte> bytes(3 * 5000);
  Random random(1);
  for (std::byte& byte : bytes) byte = static_cast<std::byte>(random());
  const std::span<const std::byte> all(bytes);
  BlockHasher whole(5000);
  std::vector<uint64_t> expected;
  for (size_t block = 0; block < 3; ++block) {
    EXPECT_TRUE(whole.at_start());
    whole.add(all.subspan(block * 5000, 5000));
    expected.push_back(whole.take());
  }
  EXPECT_NE(expected[0], expected[1]);
  BlockHasher pieces(5000);
  std::vector<uint64_t> hashes;
  for (size_t at = 0; at < all.size();) {
    const size_t bytes_now = std::min<uint64_t>({1 + random.below(777), pieces.left(), all.size() - at});
    pieces.add(all.subspan(at, bytes_now));
    at += bytes_now;
    if (pieces.left() == 0) hashes.push_back(pieces.take());
  }
  EXPECT_EQ(hashes, expected);
  // One bit makes a difference.
  bytes[4321] ^= std::byte{0x10};
  whole.add(all.subspan(0, 5000));
  EXPECT_NE(whole.take(), expected[0]);
}

}  // namespace
}  // namespace baton::transfer
