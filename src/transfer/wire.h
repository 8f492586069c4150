#pragma once

#include <concepts>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

/// Little-endian encoding of the few things that agents tell each other: metadata and control frames.
namespace baton::transfer {

class WireWriter {
 public:
  template <std::unsigned_integral T>
  void put(T value) {
    for (size_t i = 0; i < sizeof(T); ++i) {
      out_.push_back(static_cast<char>(static_cast<uint8_t>(value >> (8 * i))));
    }
  }
  /// Length (16 bits) and bytes. REQUIRES: value.size() < 65536.
  void put_string(std::string_view value) {
    put(static_cast<uint16_t>(value.size()));
    out_.append(value);
  }
  const std::string& bytes() const { return out_; }
  std::string take() { return std::move(out_); }

 private:
  std::string out_;
};

/// Reads input that may be hostile: never past the end. After the first failure every read fails, so
/// a caller may read a whole record and look at ok() once before it uses a value.
class WireReader {
 public:
  explicit WireReader(std::string_view in) : in_(in) {}

  template <std::unsigned_integral T>
  T get() {
    if (in_.size() < sizeof(T)) {
      ok_ = false;
      in_ = {};
      return 0;
    }
    T value = 0;
    for (size_t i = 0; i < sizeof(T); ++i) {
      value = static_cast<T>(value | (static_cast<T>(static_cast<uint8_t>(in_[i])) << (8 * i)));
    }
    in_.remove_prefix(sizeof(T));
    return value;
  }
  std::string_view get_string(size_t max_bytes) {
    size_t size = get<uint16_t>();
    if (!ok_ || size > max_bytes || size > in_.size()) {
      ok_ = false;
      in_ = {};
      return {};
    }
    std::string_view value = in_.substr(0, size);
    in_.remove_prefix(size);
    return value;
  }
  bool ok() const { return ok_; }
  bool at_end() const { return in_.empty(); }
  size_t left() const { return in_.size(); }

 private:
  std::string_view in_;
  bool ok_ = true;
};

/// FNV-1a, 64 bits: tells a damaged or cut message from a whole one. Not a protection against forgery.
inline uint64_t wire_checksum(std::string_view bytes) {
  uint64_t hash = 0xcbf29ce484222325ull;
  for (char c : bytes) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3ull;
  return hash;
}

}  // namespace baton::transfer
