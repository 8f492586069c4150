// Headers and index files of checkpoints: whatever the bytes, a Status; what is accepted must be readable.
#include <cstdint>
#include <map>
#include <string>
#include <string_view>

#include "base/check.h"
#include "model/checkpoint.h"
#include "model/safetensors.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::span<const uint8_t> input(data, size);
  baton::SafetensorMap tensors;
  uint64_t offset = 0;
  baton::Status status = baton::parse_safetensors("f", std::as_bytes(input), &tensors, &offset);
  if (status.ok()) {
    uint64_t total = 0;
    for (const auto& [name, info] : tensors) {
      BATON_CHECK(info.begin <= info.end && info.end <= size - offset) << name;
      total += info.end - info.begin;
      for (uint64_t at = offset + info.begin; at < offset + info.end; at++) total += input[at] - input[at];
    }
    BATON_CHECK(total == size - offset);
  } else {
    BATON_CHECK(status.message().starts_with("f: "));
  }

  std::map<std::string, std::string> files;
  std::string_view text(reinterpret_cast<const char*>(data), size);
  if (baton::parse_safetensors_index("f", text, &files).ok()) {
    for (const auto& [tensor, file] : files) BATON_CHECK(file.find('/') == std::string::npos && file[0] != '.');
  }
  return 0;
}
