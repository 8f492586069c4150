#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

#include "base/check.h"
#include "transfer/control.h"
#include "transfer/integrity.h"
#include "transfer/metadata.h"
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
