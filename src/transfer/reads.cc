#include "transfer/reads.h"

#include "base/check.h"
#include "transfer/inbox.h"
#include "transfer/wire.h"

namespace baton::transfer {
namespace {

constexpr size_t kBytesPerPair = 8;
constexpr size_t kMaxReasonBytes = 1000;

bool possible_tag(uint32_t tag) { return tag != 0 && tag < kFirstReservedTag; }

}  // namespace

std::string encode_read_request(const ReadRequest& request) {
  WireWriter out;
  out.put(static_cast<uint8_t>(request.kind));
  if (request.kind == ReadRequest::Kind::kIntroduce) return out.take() + request.metadata;
  out.put(request.tag);
  if (request.kind == ReadRequest::Kind::kCancel) return out.take();
  BATON_CHECK(request.blocks.size() <= ReadRequest::kMaxBlocks);
  out.put(static_cast<uint8_t>(request.integrity));
  out.put(request.owner_pool);
  out.put(request.reader_pool);
  out.put(request.offset_bytes);
  out.put(request.length_bytes);
  out.put(request.timeout_ms);
  out.put(static_cast<uint32_t>(request.blocks.size()));
  for (const ReadRequest::Pair& pair : request.blocks) {
    out.put(pair.owner_block);
    out.put(pair.reader_block);
  }
  return out.take();
}

Result<ReadRequest> parse_read_request(std::string_view payload) {
  WireReader in(payload);
  ReadRequest request;
  const uint8_t kind = in.get<uint8_t>();
  request.kind = static_cast<ReadRequest::Kind>(kind);
  if (!in.ok() || kind < 1 || kind > 3) return invalid_argument("a damaged request to read");
  if (request.kind == ReadRequest::Kind::kIntroduce) {
    request.metadata = payload.substr(1);
    return request;
  }
  request.tag = in.get<uint32_t>();
  if (!in.ok() || !possible_tag(request.tag)) return invalid_argument("a request to read with tag {}", request.tag);
  if (request.kind == ReadRequest::Kind::kCancel) {
    if (!in.at_end()) return invalid_argument("a damaged request to read");
    return request;
  }
  const uint8_t integrity = in.get<uint8_t>();
  request.integrity = integrity == 1;
  request.owner_pool = in.get<uint32_t>();
  request.reader_pool = in.get<uint32_t>();
  request.offset_bytes = in.get<uint64_t>();
  request.length_bytes = in.get<uint64_t>();
  request.timeout_ms = in.get<uint32_t>();
  const size_t count = in.get<uint32_t>();
  if (!in.ok() || integrity > 1 || request.length_bytes == 0 || count == 0 || count > ReadRequest::kMaxBlocks ||
      in.left() != count * kBytesPerPair) {
    return invalid_argument("a damaged request to read");
  }
  request.blocks.resize(count);
  for (ReadRequest::Pair& pair : request.blocks) {
    pair.owner_block = in.get<uint32_t>();
    pair.reader_block = in.get<uint32_t>();
  }
  return request;
}

std::string encode_read_answer(const ReadAnswer& answer) {
  WireWriter out;
  out.put(static_cast<uint8_t>(answer.kind));
  out.put(answer.tag);
  if (answer.kind == ReadAnswer::Kind::kStarted) {
    out.put(answer.messages);
    return out.take();
  }
  out.put(static_cast<uint8_t>(answer.code));
  out.put(static_cast<uint8_t>(answer.settled));
  out.put_string(std::string_view(answer.reason).substr(0, kMaxReasonBytes));
  return out.take();
}

Result<ReadAnswer> parse_read_answer(std::string_view payload) {
  WireReader in(payload);
  ReadAnswer answer;
  const uint8_t kind = in.get<uint8_t>();
  answer.kind = static_cast<ReadAnswer::Kind>(kind);
  answer.tag = in.get<uint32_t>();
  if (!in.ok() || kind < 1 || kind > 2 || !possible_tag(answer.tag)) return invalid_argument("a damaged answer to a read");
  if (answer.kind == ReadAnswer::Kind::kStarted) {
    answer.messages = in.get<uint64_t>();
    if (!in.ok() || !in.at_end() || answer.messages == 0) return invalid_argument("a damaged answer to a read");
    return answer;
  }
  const uint8_t code = in.get<uint8_t>();
  const uint8_t settled = in.get<uint8_t>();
  answer.code = static_cast<StatusCode>(code);
  answer.settled = settled == 1;
  answer.reason = in.get_string(kMaxReasonBytes);
  // What ended well is there.
  const bool sound = answer.code != StatusCode::kOk || (answer.settled && answer.reason.empty());
  if (!in.ok() || !in.at_end() || code > static_cast<uint8_t>(StatusCode::kAborted) || settled > 1 || !sound) {
    return invalid_argument("a damaged answer to a read");
  }
  return answer;
}

}  // namespace baton::transfer
