#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>
#include <vector>

#include "base/check.h"
#include "transfer/control.h"
#include "transfer/cuda/staged_wire.h"
#include "transfer/integrity.h"
#include "transfer/metadata.h"
#include "transfer/reads.h"
#include "transfer/wire.h"

// What other processes send us: metadata (through the worker protocol) and control frames (sockets).
extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using namespace baton::transfer;
  std::string_view input(reinterpret_cast<const char*>(data), size);
  baton::ignore_status(parse_hello(input).status());
  if (auto welcome = parse_welcome(input); welcome.ok()) {
    BATON_CHECK(encode_welcome(*welcome) == input);
  }
  if (auto note = parse_rail_note(input); note.ok()) {
    BATON_CHECK(encode_rail_note(*note) == input);
  }
  if (auto check = parse_check(input); check.ok()) {
    BATON_CHECK(encode_check(*check) == input);
  }
  if (auto result = parse_check_result(input); result.ok()) {
    BATON_CHECK(encode_check_result(*result) == input);
  }
  if (auto request = parse_read_request(input); request.ok()) {
    BATON_CHECK(encode_read_request(*request) == input);
    if (request->kind == ReadRequest::Kind::kIntroduce) baton::ignore_status(parse_metadata(request->metadata, 1u << 20).status());
  }
  if (auto answer = parse_read_answer(input); answer.ok()) {
    BATON_CHECK(encode_read_answer(*answer) == input);
  }
  // What lies in a staging slot, and the notes about slots.
  if (auto descriptor = staged::parse_descriptor(input); descriptor.ok()) {
    std::vector<Segment> segments;
    for (const staged::Piece& piece : descriptor->pieces) segments.push_back({0, piece.offset, piece.bytes});
    std::vector<std::byte> out(staged::descriptor_bytes(segments.size()));
    staged::write_descriptor(out, descriptor->grant, descriptor->tag, descriptor->pool, segments);
    BATON_CHECK(std::memcmp(out.data(), input.data(), input.size()) == 0);
    baton::ignore_status(staged::check_pieces(*descriptor, 1u << 20));
  }
  if (auto address = staged::parse_address(input); address.ok()) {
    BATON_CHECK(staged::encode_address(*address) == input);
  }
  if (size >= sizeof(Arrival)) {
    Arrival arrival;
    std::memcpy(&arrival, data, sizeof(arrival));
    if (auto note = staged::parse_note(arrival)) BATON_CHECK(staged::encode_note(*note).tag == arrival.tag);
    if (auto tag = staged::parse_slot_tag(arrival.tag)) BATON_CHECK(staged::encode_slot_tag(*tag) == arrival.tag);
  }
  // As it comes, and with a checksum that is right, so that the parser behind it is reached.
  baton::ignore_status(parse_metadata(input, 1u << 20).status());
  WireWriter checksum;
  checksum.put(wire_checksum(input));
  std::string whole = std::string(input) + checksum.bytes();
  if (auto metadata = parse_metadata(whole, 1u << 20); metadata.ok()) {
    BATON_CHECK(encode_metadata(*metadata) == whole) << "what was accepted must come back the same";
  }
  return 0;
}
