#include "transfer/integrity.h"

#include <algorithm>
#include <utility>

// All of it in this file: users of the installed library need no libxxhash.
#define XXH_INLINE_ALL
#include <xxhash.h>

#include "base/check.h"
#include "transfer/wire.h"

namespace baton::transfer {
namespace {
constexpr size_t kBytesPerBlock = 16;
constexpr size_t kMaxReasonBytes = 500;
}  // namespace

size_t Check::blocks_per_check(uint64_t block_bytes) {
  return std::clamp<uint64_t>(kMaxBytes / block_bytes, 1, kMaxBlocks);
}

std::string encode_check(const Check& check) {
  BATON_CHECK(check.blocks.size() <= Check::kMaxBlocks);
  WireWriter out;
  out.put(check.id);
  out.put(check.tag);
  out.put(static_cast<uint8_t>(check.counts));
  out.put(check.pool);
  out.put(check.block_bytes);
  out.put(static_cast<uint32_t>(check.blocks.size()));
  for (const CheckedBlock& block : check.blocks) {
    out.put(block.offset);
    out.put(block.hash);
  }
  return out.take();
}

Result<Check> parse_check(std::string_view payload) {
  WireReader in(payload);
  Check check;
  check.id = in.get<uint64_t>();
  check.tag = in.get<uint32_t>();
  const uint8_t counts = in.get<uint8_t>();
  check.counts = counts == 1;
  check.pool = in.get<uint32_t>();
  check.block_bytes = in.get<uint64_t>();
  const size_t count = in.get<uint32_t>();
  if (!in.ok() || counts > 1 || (counts == 1 && check.tag == 0) || count > Check::kMaxBlocks || in.left() != count * kBytesPerBlock) {
    return invalid_argument("a damaged check");
  }
  if (count > 0 && check.block_bytes == 0) return invalid_argument("a check of empty blocks");
  if (count > 1 && check.block_bytes > Check::kMaxBytes / count) {
    return invalid_argument("a check of {} blocks of {} bytes", count, check.block_bytes);
  }
  check.blocks.resize(count);
  for (CheckedBlock& block : check.blocks) {
    block.offset = in.get<uint64_t>();
    block.hash = in.get<uint64_t>();
  }
  return check;
}

std::string encode_check_result(const CheckResult& result) {
  WireWriter out;
  out.put(result.id);
  out.put(static_cast<uint8_t>(result.outcome));
  out.put(result.bad_blocks);
  out.put(result.offset);
  out.put(result.hash);
  out.put_string(std::string_view(result.reason).substr(0, kMaxReasonBytes));
  return out.take();
}

Result<CheckResult> parse_check_result(std::string_view payload) {
  WireReader in(payload);
  CheckResult result;
  result.id = in.get<uint64_t>();
  const uint8_t outcome = in.get<uint8_t>();
  result.outcome = static_cast<CheckResult::Outcome>(outcome);
  result.bad_blocks = in.get<uint32_t>();
  result.offset = in.get<uint64_t>();
  result.hash = in.get<uint64_t>();
  result.reason = in.get_string(kMaxReasonBytes);
  const bool wrong = result.outcome == CheckResult::Outcome::kWrong;
  if (!in.ok() || !in.at_end() || outcome < 1 || outcome > 4 || wrong != (result.bad_blocks > 0)) {
    return invalid_argument("a damaged answer to a check");
  }
  return result;
}

struct BlockHasher::State {
  XXH3_state_t xxh3;
};

BlockHasher::BlockHasher(uint64_t block_bytes)
    : state_(std::make_unique<State>()), block_bytes_(block_bytes), left_(block_bytes) {
  BATON_CHECK(block_bytes > 0);
  XXH3_INITSTATE(&state_->xxh3);
  (void)XXH3_64bits_reset(&state_->xxh3);
}
BlockHasher::~BlockHasher() = default;
BlockHasher::BlockHasher(BlockHasher&&) noexcept = default;
BlockHasher& BlockHasher::operator=(BlockHasher&&) noexcept = default;

void BlockHasher::add(std::span<const std::byte> bytes) {
  BATON_CHECK(bytes.size() <= left_);
  (void)XXH3_64bits_update(&state_->xxh3, bytes.data(), bytes.size());
  left_ -= bytes.size();
}

uint64_t BlockHasher::take() {
  BATON_CHECK(left_ == 0);
  const uint64_t hash = XXH3_64bits_digest(&state_->xxh3);
  (void)XXH3_64bits_reset(&state_->xxh3);
  left_ = block_bytes_;
  return hash;
}

}  // namespace baton::transfer
