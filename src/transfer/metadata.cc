#include "transfer/metadata.h"

#include <limits>

#include "transfer/wire.h"

namespace baton::transfer {
namespace {
constexpr uint32_t kMagic = 0x584e5442;  // "BTNX"
}

std::string encode_metadata(const Metadata& metadata) {
  WireWriter out;
  out.put(kMagic);
  out.put(kMetadataVersion);
  out.put(static_cast<uint64_t>(metadata.epoch));
  out.put(metadata.serial);
  out.put_string(metadata.name);
  out.put_string(metadata.host_id);
  out.put(static_cast<uint16_t>(metadata.pools.size()));
  for (const Metadata::Pool& pool : metadata.pools) {
    out.put(pool.id);
    out.put(static_cast<uint8_t>(pool.kind));
    out.put(pool.stride_bytes);
    out.put(pool.count);
  }
  out.put(static_cast<uint8_t>(metadata.offers.size()));
  for (const Metadata::Offer& offer : metadata.offers) {
    out.put_string(offer.transport);
    out.put_string(offer.provider);
    out.put_string(offer.address);
  }
  out.put(wire_checksum(out.bytes()));
  return out.take();
}

Result<Metadata> parse_metadata(std::string_view bytes, size_t max_bytes) {
  if (bytes.size() > max_bytes) {
    return invalid_argument("transfer metadata of {} bytes; at most {} are accepted "
                            "(max_metadata_bytes)", bytes.size(), max_bytes);
  }
  WireReader in(bytes);
  uint32_t magic = in.get<uint32_t>();
  if (!in.ok() || magic != kMagic) {
    return invalid_argument("{} bytes that are not Baton transfer metadata", bytes.size());
  }
  uint16_t version = in.get<uint16_t>();
  if (in.ok() && version != kMetadataVersion) {
    return failed_precondition("the peer's transfer metadata has version {}, this build speaks {}: run "
                               "the same Baton on both sides", version, kMetadataVersion);
  }
  if (bytes.size() < sizeof(uint64_t)) return invalid_argument("transfer metadata is cut short");
  std::string_view body = bytes.substr(0, bytes.size() - sizeof(uint64_t));
  WireReader tail(bytes.substr(body.size()));
  if (tail.get<uint64_t>() != wire_checksum(body)) {
    return invalid_argument("transfer metadata is damaged or cut short ({} bytes)", bytes.size());
  }

  Metadata metadata;
  metadata.epoch = static_cast<Epoch>(in.get<uint64_t>());
  metadata.serial = in.get<uint64_t>();
  metadata.name = in.get_string(kMaxNameBytes);
  metadata.host_id = in.get_string(kMaxNameBytes);
  size_t pools = in.get<uint16_t>();
  if (!in.ok() || metadata.epoch == Epoch::kNone || pools > kMaxPools) {
    return invalid_argument("transfer metadata: bad epoch, name or number of pools ({})", pools);
  }
  for (size_t i = 0; i < pools && in.ok(); ++i) {
    Metadata::Pool pool;
    pool.id = in.get<uint32_t>();
    uint8_t kind = in.get<uint8_t>();
    pool.kind = static_cast<MemoryKind>(kind);
    pool.stride_bytes = in.get<uint64_t>();
    pool.count = in.get<uint64_t>();
    // Products of the two are formed everywhere; here is where they are known to fit.
    bool bad = kind > static_cast<uint8_t>(MemoryKind::kCuda) || pool.stride_bytes == 0 ||
               pool.count > std::numeric_limits<uint64_t>::max() / pool.stride_bytes;
    for (const Metadata::Pool& other : metadata.pools) bad = bad || other.id == pool.id;
    if (in.ok() && bad) {
      return invalid_argument("transfer metadata of '{}': pool {} has kind {}, {} blocks of {} bytes",
                              metadata.name, pool.id, kind, pool.count, pool.stride_bytes);
    }
    metadata.pools.push_back(pool);
  }
  size_t offers = in.get<uint8_t>();
  if (in.ok() && offers > kMaxOffers) {
    return invalid_argument("transfer metadata of '{}': {} transports", metadata.name, offers);
  }
  for (size_t i = 0; i < offers && in.ok(); ++i) {
    Metadata::Offer offer;
    offer.transport = in.get_string(kMaxNameBytes);
    offer.provider = in.get_string(kMaxNameBytes);
    offer.address = in.get_string(kMaxOfferAddressBytes);
    metadata.offers.push_back(std::move(offer));
  }
  if (!in.ok() || in.left() != sizeof(uint64_t)) {
    return invalid_argument("transfer metadata of '{}' does not end where it should", metadata.name);
  }
  return metadata;
}

}  // namespace baton::transfer
