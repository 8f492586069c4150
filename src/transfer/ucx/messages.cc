#include "transfer/ucx/messages.h"

#include "transfer/wire.h"

namespace baton::transfer::ucx {

std::string encode_write(const WriteHeader& header) {
  WireWriter out;
  out.put(header.pool);
  out.put(header.tag);
  out.put(header.id);
  out.put(header.offset);
  out.put(header.bytes);
  return out.take();
}

std::optional<WriteHeader> parse_write(std::string_view bytes) {
  WireReader in(bytes);
  WriteHeader header;
  header.pool = in.get<uint32_t>();
  header.tag = in.get<uint32_t>();
  header.id = in.get<uint32_t>();
  header.offset = in.get<uint64_t>();
  header.bytes = in.get<uint64_t>();
  if (!in.ok() || !in.at_end()) return std::nullopt;
  return header;
}

std::string encode_notice(std::span<const Arrival> arrivals) {
  WireWriter out;
  for (const Arrival& arrival : arrivals) {
    out.put(arrival.tag);
    out.put(arrival.count);
  }
  return out.take();
}

bool parse_notice(std::string_view bytes, std::vector<Arrival>& arrivals) {
  if (bytes.size() > kMaxNoticeBytes || bytes.size() % kNoticePairBytes != 0) return false;
  WireReader in(bytes);
  while (!in.at_end()) {
    Arrival arrival;
    arrival.tag = in.get<uint32_t>();
    arrival.count = in.get<uint32_t>();
    arrivals.push_back(arrival);
  }
  return true;
}

}  // namespace baton::transfer::ucx
