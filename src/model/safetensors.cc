#include "model/safetensors.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>

namespace baton {
namespace {

using nlohmann::json;

constexpr size_t kMaxShownName = 200;

/// Bytes per element; 0: a dtype that the format (or its byte-sized part) does not have.
uint64_t element_bytes(std::string_view dtype) {
  struct Entry {
    std::string_view name;
    uint64_t bytes;
  };
  static constexpr Entry kEntries[] = {
      {"BF16", 2}, {"F16", 2},     {"F32", 4},     {"F64", 8},     {"BOOL", 1}, {"U8", 1},  {"I8", 1},
      {"U16", 2},  {"I16", 2},     {"U32", 4},     {"I32", 4},     {"U64", 8},  {"I64", 8}, {"C64", 8},
      {"F8_E4M3", 1}, {"F8_E5M2", 1}, {"F8_E8M0", 1},
  };
  for (const Entry& entry : kEntries) {
    if (entry.name == dtype) return entry.bytes;
  }
  return 0;
}

/// Receives the header's JSON as events: no tree is built, and a name that comes twice is seen.
/// Grammar: { "name": {"dtype": s, "shape": [n...], "data_offsets": [n, n]}, "__metadata__": {s: s} }
class HeaderHandler final : public nlohmann::json_sax<json> {
 public:
  explicit HeaderHandler(SafetensorMap* tensors) : tensors_(tensors) {}

  const std::string& problem() const { return problem_; }

  bool start_object(std::size_t) override {
    if (depth_ == 0) return ++depth_, true;
    if (depth_ == 1) {
      info_ = {};
      seen_ = 0;
      return ++depth_, true;
    }
    return fail("an object where a value belongs");
  }
  bool key(string_t& name) override {
    if (depth_ == 1) {
      name_ = name;
      metadata_ = name == "__metadata__";
      if (!metadata_ && tensors_->contains(name)) return fail("the name comes twice");
      if (tensors_->size() >= SafetensorsFile::kMaxTensors) {
        return fail(fmt::format("there are more than {} tensors", SafetensorsFile::kMaxTensors));
      }
      return true;
    }
    if (metadata_) return true;
    if (name == "dtype") field_ = kDtype;
    else if (name == "shape") field_ = kShape;
    else if (name == "data_offsets") field_ = kOffsets;
    else return fail(fmt::format("unknown field \"{}\"", name.substr(0, kMaxShownName)));
    if ((seen_ & field_) != 0) return fail(fmt::format("\"{}\" comes twice", name));
    seen_ |= field_;
    return true;
  }
  bool end_object() override {
    depth_--;
    if (depth_ != 1 || metadata_) return true;
    if (seen_ != (kDtype | kShape | kOffsets)) return fail("dtype, shape or data_offsets is missing");
    tensors_->emplace(std::move(name_), std::move(info_));
    return true;
  }
  bool start_array(std::size_t) override {
    if (depth_ != 2 || metadata_ || in_array_ || (field_ != kShape && field_ != kOffsets)) {
      return fail("a list where a value belongs");
    }
    in_array_ = true;
    list_.clear();
    return true;
  }
  bool end_array() override {
    in_array_ = false;
    if (field_ == kOffsets) {
      if (list_.size() != 2) return fail("data_offsets must be two numbers");
      info_.begin = list_[0];
      info_.end = list_[1];
      return true;
    }
    for (uint64_t size : list_) {
      if (size > INT64_MAX) return fail(fmt::format("shape holds {}", size));
      info_.shape.push_back(static_cast<int64_t>(size));
    }
    return true;
  }
  bool number_unsigned(number_unsigned_t value) override {
    if (!in_array_) return fail("a number where it does not belong");
    if (list_.size() >= SafetensorsFile::kMaxRank) {
      return fail(fmt::format("a list of more than {} numbers", SafetensorsFile::kMaxRank));
    }
    list_.push_back(value);
    return true;
  }
  bool string(string_t& value) override {
    if (depth_ == 2 && metadata_) return true;
    if (depth_ != 2 || in_array_ || field_ != kDtype) return fail("a string where it does not belong");
    info_.dtype = value.substr(0, kMaxShownName);
    return true;
  }
  bool number_integer(number_integer_t value) override { return fail(fmt::format("{} where a size belongs", value)); }
  bool number_float(number_float_t value, const string_t&) override {
    return fail(fmt::format("{} where a size belongs", value));
  }
  bool boolean(bool) override { return fail("true or false where it does not belong"); }
  bool null() override { return fail("null where it does not belong"); }
  bool binary(binary_t&) override { return fail("binary data"); }
  bool parse_error(std::size_t, const std::string&, const nlohmann::detail::exception& error) override {
    problem_ = fmt::format("the header is no valid JSON: {}", error.what());
    return false;
  }

 private:
  enum Field : unsigned { kNone = 0, kDtype = 1, kShape = 2, kOffsets = 4 };

  bool fail(std::string_view what) {
    problem_ = name_.empty() ? fmt::format("header: {}", what)
                             : fmt::format("tensor \"{}\": {}", name_.substr(0, kMaxShownName), what);
    return false;
  }

  SafetensorMap* tensors_;
  std::string problem_;
  int depth_ = 0;
  bool metadata_ = false;
  bool in_array_ = false;
  unsigned field_ = kNone;
  unsigned seen_ = kNone;
  std::string name_;
  SafetensorInfo info_;
  std::vector<uint64_t> list_;  // the list being read
};

/// Shape times element size is the number of bytes, without overflow.
Status check_size(std::string_view file_name, std::string_view name, const SafetensorInfo& info,
                  uint64_t data_bytes) {
  auto describe = [&](std::string_view what) {
    return data_loss("{}: tensor \"{}\": {}", file_name, name.substr(0, kMaxShownName), what);
  };
  const uint64_t element = element_bytes(info.dtype);
  if (element == 0) return describe(fmt::format("dtype \"{}\" is not known", info.dtype));
  uint64_t bytes = element;
  for (int64_t size : info.shape) {
    if (__builtin_mul_overflow(bytes, static_cast<uint64_t>(size), &bytes)) {
      return describe(fmt::format("shape {} overflows 64 bits", shape_text(info.shape)));
    }
  }
  if (info.begin > info.end || info.end > data_bytes) {
    return describe(fmt::format("data_offsets [{}, {}] are not inside the {} bytes of data; is the file cut short?",
                                info.begin, info.end, data_bytes));
  }
  if (info.end - info.begin != bytes) {
    return describe(fmt::format("data_offsets [{}, {}] span {} bytes, but {} of shape {} takes {}", info.begin,
                                info.end, info.end - info.begin, info.dtype, shape_text(info.shape), bytes));
  }
  return {};
}

/// Every byte of the data belongs to exactly one tensor, as the reference implementation demands.
Status check_cover(std::string_view file_name, const SafetensorMap& tensors, uint64_t data_bytes) {
  std::vector<const SafetensorMap::value_type*> order;
  order.reserve(tensors.size());
  for (const auto& entry : tensors) order.push_back(&entry);
  std::sort(order.begin(), order.end(), [](const auto* a, const auto* b) {
    return std::pair(a->second.begin, a->second.end) < std::pair(b->second.begin, b->second.end);
  });
  uint64_t position = 0;
  const std::string* previous = nullptr;
  for (const auto* entry : order) {
    const auto& [name, info] = *entry;
    if (info.begin < position) {
      return data_loss("{}: tensor \"{}\" at {} overlaps \"{}\", which ends at {}", file_name,
                       name.substr(0, kMaxShownName), info.begin, previous->substr(0, kMaxShownName), position);
    }
    if (info.begin > position) {
      return data_loss("{}: tensor \"{}\" begins at {}, which leaves a hole after {}", file_name,
                       name.substr(0, kMaxShownName), info.begin, position);
    }
    position = info.end;
    previous = &name;
  }
  if (position != data_bytes) {
    return data_loss("{}: {} bytes of data, but the tensors end at {}", file_name, data_bytes, position);
  }
  return {};
}

}  // namespace

std::string shape_text(std::span<const int64_t> shape) {
  std::string text = "[";
  for (size_t i = 0; i < shape.size(); i++) text += fmt::format("{}{}", i == 0 ? "" : ", ", shape[i]);
  return text + "]";
}

Status parse_safetensors(std::string_view file_name, std::span<const std::byte> file, SafetensorMap* tensors,
                         uint64_t* data_offset) {
  constexpr uint64_t kPrefixBytes = 8;
  if (file.size() < kPrefixBytes) {
    return data_loss("{}: {} bytes are too few for a safetensors file", file_name, file.size());
  }
  uint64_t header_bytes = 0;
  for (size_t i = 0; i < kPrefixBytes; i++) {
    header_bytes |= static_cast<uint64_t>(std::to_integer<uint8_t>(file[i])) << (8 * i);
  }
  if (header_bytes > SafetensorsFile::kMaxHeaderBytes) {
    return data_loss("{}: the header claims {} bytes; at most {} are allowed (is this a safetensors file?)",
                     file_name, header_bytes, SafetensorsFile::kMaxHeaderBytes);
  }
  if (header_bytes > file.size() - kPrefixBytes) {
    return data_loss("{}: the header claims {} bytes, the file has {}; it is cut short", file_name, header_bytes,
                     file.size() - kPrefixBytes);
  }
  const char* begin = reinterpret_cast<const char*>(file.data()) + kPrefixBytes;
  HeaderHandler handler(tensors);
  if (!json::sax_parse(begin, begin + header_bytes, &handler)) {
    return data_loss("{}: {}", file_name, handler.problem());
  }
  *data_offset = kPrefixBytes + header_bytes;
  const uint64_t data_bytes = file.size() - *data_offset;
  for (const auto& [name, info] : *tensors) {
    BATON_RETURN_IF_ERROR(check_size(file_name, name, info, data_bytes));
  }
  return check_cover(file_name, *tensors, data_bytes);
}

Result<SafetensorsFile> SafetensorsFile::open(const std::filesystem::path& path) {
  BATON_ASSIGN_OR_RETURN(MappedFile mapping, MappedFile::open(path));
  SafetensorsFile file(std::move(mapping), path.string());
  BATON_RETURN_IF_ERROR(parse_safetensors(file.name_, file.file_.bytes(), &file.tensors_, &file.data_offset_));
  return file;
}

void SafetensorsFile::prefetch(const SafetensorInfo& info) const {
  file_.prefetch(data_offset_ + info.begin, info.end - info.begin);
}

void SafetensorsFile::drop(const SafetensorInfo& info) const {
  file_.drop(data_offset_ + info.begin, info.end - info.begin);
}

}  // namespace baton
