#include "transfer/cuda/staged_wire.h"

#include <bit>
#include <cstring>

#include "base/check.h"
#include "transfer/metadata.h"
#include "transfer/wire.h"

namespace baton::transfer::staged {
namespace {

static_assert(std::endian::native == std::endian::little, "descriptors are copied as they lie in memory");
constexpr uint32_t kMagic = 0x47545342;  // "BSTG"

struct Fixed {
  uint32_t magic;
  uint32_t grant;
  uint32_t tag;
  uint32_t pool;
  uint64_t bytes;
  uint32_t pieces;
  uint32_t reserved;
};
static_assert(sizeof(Fixed) == kFixedDescriptorBytes && sizeof(Piece) == kPieceBytes);

}  // namespace

void write_descriptor(std::span<std::byte> out, uint32_t grant, uint32_t tag, uint32_t pool,
                      std::span<const Segment> segments) {
  BATON_CHECK(out.size() == descriptor_bytes(segments.size()));
  Fixed fixed{kMagic, grant, tag, pool, 0, static_cast<uint32_t>(segments.size()), 0};
  std::byte* at = out.data() + sizeof(fixed);
  for (const Segment& segment : segments) {
    const Piece piece{segment.remote_offset, segment.bytes};
    std::memcpy(at, &piece, sizeof(piece));
    at += sizeof(piece);
    fixed.bytes += segment.bytes;
  }
  std::memcpy(out.data(), &fixed, sizeof(fixed));
}

Result<Descriptor> parse_descriptor(std::string_view bytes) {
  Fixed fixed;
  if (bytes.size() < sizeof(fixed)) return invalid_argument("a descriptor of {} bytes", bytes.size());
  std::memcpy(&fixed, bytes.data(), sizeof(fixed));
  if (fixed.magic != kMagic || fixed.reserved != 0) return invalid_argument("not a descriptor of a staged message");
  if (fixed.pieces == 0 || fixed.pieces > kMaxPieces || bytes.size() != descriptor_bytes(fixed.pieces)) {
    return invalid_argument("a descriptor of {} bytes that names {} pieces", bytes.size(), fixed.pieces);
  }
  Descriptor descriptor{fixed.grant, fixed.tag, fixed.pool, fixed.bytes, {}};
  descriptor.pieces.resize(fixed.pieces);
  std::memcpy(descriptor.pieces.data(), bytes.data() + sizeof(fixed), fixed.pieces * sizeof(Piece));
  uint64_t sum = 0;
  for (const Piece& piece : descriptor.pieces) {
    if (piece.bytes == 0 || piece.bytes > kDataBytes - sum) {
      return invalid_argument("a descriptor with a piece of {} bytes behind {} bytes; a slot holds {}", piece.bytes, sum,
                              kDataBytes);
    }
    sum += piece.bytes;
  }
  if (sum != fixed.bytes) return invalid_argument("a descriptor of {} bytes with pieces of {} in all", fixed.bytes, sum);
  return descriptor;
}

Status check_pieces(const Descriptor& descriptor, uint64_t pool_bytes) {
  for (const Piece& piece : descriptor.pieces) {
    if (piece.offset > pool_bytes || piece.bytes > pool_bytes - piece.offset) {
      return invalid_argument("{} bytes from offset {} are outside of pool {}, which has {}", piece.bytes, piece.offset,
                              descriptor.pool, pool_bytes);
    }
  }
  return Status();
}

std::string encode_address(const Address& address) {
  WireWriter out;
  out.put_string(address.control);
  out.put_string(address.inner);
  out.put(address.data_bytes);
  out.put(address.max_pieces);
  return out.take();
}

Result<Address> parse_address(std::string_view bytes) {
  WireReader in(bytes);
  Address address;
  address.control = in.get_string(256);
  address.inner = in.get_string(kMaxOfferAddressBytes);
  address.data_bytes = in.get<uint64_t>();
  address.max_pieces = in.get<uint32_t>();
  if (!in.ok() || !in.at_end() || address.data_bytes < 4096 || address.max_pieces == 0) {
    return invalid_argument("a damaged address for staged transfers");
  }
  return address;
}

}  // namespace baton::transfer::staged
