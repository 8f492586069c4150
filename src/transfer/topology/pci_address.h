#pragma once

#include <compare>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

namespace baton::transfer {

/// Where a device sits on PCI. Ordered as lspci, CUDA (CUDA_DEVICE_ORDER=PCI_BUS_ID) and NVML order.
struct PciAddress {
  uint32_t domain = 0;
  uint8_t bus = 0;
  uint8_t device = 0;    ///< 0..31
  uint8_t function = 0;  ///< 0..7

  auto operator<=>(const PciAddress&) const = default;

  /// "0000:4f:00.0", as sysfs writes it.
  std::string to_string() const;
  /// Reads what sysfs, lspci, CUDA and NVML write: "0000:4f:00.0", "4f:00.0", "00000000:4F:00.0",
  /// "10000:e1:00.0". Nothing when it is no address.
  static std::optional<PciAddress> parse(std::string_view text);
};

}  // namespace baton::transfer
