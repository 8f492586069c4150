#include "transfer/topology/pci_address.h"

#include <fmt/format.h>

#include <charconv>

namespace baton::transfer {
namespace {

/// One hexadecimal field of between `min_digits` and `max_digits` digits and at most `limit`.
bool parse_field(std::string_view text, size_t min_digits, size_t max_digits, uint32_t limit, uint32_t* value) {
  if (text.size() < min_digits || text.size() > max_digits) return false;
  auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), *value, 16);
  return error == std::errc() && end == text.data() + text.size() && *value <= limit;
}

}  // namespace

std::string PciAddress::to_string() const {
  return fmt::format("{:04x}:{:02x}:{:02x}.{:x}", domain, bus, device, function);
}

std::optional<PciAddress> PciAddress::parse(std::string_view text) {
  size_t dot = text.rfind('.');
  if (dot == std::string_view::npos) return std::nullopt;
  size_t colon = text.rfind(':', dot);
  if (colon == std::string_view::npos) return std::nullopt;
  size_t first = colon == 0 ? std::string_view::npos : text.rfind(':', colon - 1);
  uint32_t domain = 0, bus = 0, device = 0, function = 0;
  if (first != std::string_view::npos &&
      !parse_field(text.substr(0, first), 1, 8, 0xffffffffu, &domain)) {
    return std::nullopt;
  }
  size_t bus_at = first == std::string_view::npos ? 0 : first + 1;
  if (!parse_field(text.substr(bus_at, colon - bus_at), 1, 2, 0xff, &bus) ||
      !parse_field(text.substr(colon + 1, dot - colon - 1), 1, 2, 0x1f, &device) ||
      !parse_field(text.substr(dot + 1), 1, 1, 7, &function)) {
    return std::nullopt;
  }
  return PciAddress{domain, static_cast<uint8_t>(bus), static_cast<uint8_t>(device), static_cast<uint8_t>(function)};
}

}  // namespace baton::transfer
