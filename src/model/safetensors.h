#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "model/mapped_file.h"

namespace baton {

/// One tensor of a safetensors header. Offsets count from the end of the header and are checked: inside the
/// file, without overlap or hole, and as long as shape and dtype say.
struct SafetensorInfo {
  std::string dtype;           ///< as in the file: "BF16", "F32", "I64", ...
  std::vector<int64_t> shape;  ///< empty: a scalar
  uint64_t begin = 0;
  uint64_t end = 0;
};
using SafetensorMap = std::map<std::string, SafetensorInfo, std::less<>>;

/// Checks the header of a whole file's bytes. Format: u64 header size (little endian), JSON header, data.
/// Errors begin with `file_name` and name the tensor. `data_offset` gets the position of the data.
Status parse_safetensors(std::string_view file_name, std::span<const std::byte> file, SafetensorMap* tensors,
                         uint64_t* data_offset);

/// "[64, 128]"
std::string shape_text(std::span<const int64_t> shape);

/// A mapped safetensors file. Reading a tensor reads the mapping; the caller drops what it no longer needs.
class SafetensorsFile {
 public:
  static constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // as in the reference implementation
  static constexpr size_t kMaxTensors = 1 << 20;
  static constexpr size_t kMaxRank = 8;

  static Result<SafetensorsFile> open(const std::filesystem::path& path);

  const std::string& name() const { return name_; }
  const SafetensorMap& tensors() const { return tensors_; }
  /// `info` must be of this file. The pointer has no alignment beyond a byte.
  std::span<const std::byte> data(const SafetensorInfo& info) const {
    return file_.bytes().subspan(data_offset_ + info.begin, info.end - info.begin);
  }
  void prefetch(const SafetensorInfo& info) const;
  void drop(const SafetensorInfo& info) const;

 private:
  SafetensorsFile(MappedFile file, std::string name) : file_(std::move(file)), name_(std::move(name)) {}

  MappedFile file_;
  std::string name_;  // the path, for messages
  SafetensorMap tensors_;
  uint64_t data_offset_ = 0;
};

}  // namespace baton
