#pragma once

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "transfer/control.h"
#include "transfer/inbox.h"
#include "transfer/plan.h"

/// What the two ends of a staged pair tell each other (cuda/staged_backend.h has the whole procedure).
///
/// A slot of the receiver, of which the host transport fills one contiguous stretch with one message:
///
///   0      kBusyBytes              kHeaderBytes                              kSlotStride
///   | busy |        | descriptor   | data: the pieces, one behind the other  |
///
/// The descriptor ends where the data begins; how long it is stands in the message's tag.
///
/// Where the writer has the slots in its own memory (one host), its GPU puts the data there, and only the descriptor is
/// sent. The word at `busy` is 1 while that copy may be under way: when the writer is killed its socket closes before the
/// driver has stopped the copy, and the slot must not be given away in between.
namespace baton::transfer::staged {

inline constexpr uint32_t kSlots = 16;
inline constexpr uint64_t kDataBytes = 2u << 20;
inline constexpr uint64_t kHeaderBytes = 16u << 10;
inline constexpr uint64_t kBusyBytes = 64;
inline constexpr uint64_t kSlotStride = kHeaderBytes + kDataBytes;
inline constexpr size_t kFixedDescriptorBytes = 32;
inline constexpr size_t kPieceBytes = 16;
inline constexpr uint32_t kMaxPieces = (kHeaderBytes - kBusyBytes - kFixedDescriptorBytes) / kPieceBytes;
/// In a Welcome: the writer may put data into the slots by itself.
inline constexpr std::string_view kMayWriteSlots = "slots";

/// Where a message's data goes.
struct Piece {
  uint64_t offset = 0;  ///< from the start of the pool
  uint64_t bytes = 0;
  bool operator==(const Piece&) const = default;
};
struct Descriptor {
  uint32_t grant = 0;  ///< the number that the slot was granted with
  uint32_t tag = 0;    ///< of the inbox; 0: not counted
  uint32_t pool = 0;
  uint64_t bytes = 0;  ///< of all pieces
  std::vector<Piece> pieces;
  bool operator==(const Descriptor&) const = default;
};

constexpr size_t descriptor_bytes(size_t pieces) { return kFixedDescriptorBytes + pieces * kPieceBytes; }
/// Fills `out`. REQUIRES: out.size() == descriptor_bytes(segments.size()).
void write_descriptor(std::span<std::byte> out, uint32_t grant, uint32_t tag, uint32_t pool,
                      std::span<const Segment> segments);
/// Input from outside: whole, with at least one piece and no empty one, and no more data than a slot holds.
Result<Descriptor> parse_descriptor(std::string_view bytes);
/// invalid_argument: a piece lies outside of a pool of `pool_bytes`.
Status check_pieces(const Descriptor& descriptor, uint64_t pool_bytes);

/// The tag of a message into a slot. Never 0.
struct SlotTag {
  uint32_t slot = 0;
  uint32_t pieces = 0;
  bool operator==(const SlotTag&) const = default;
};
static_assert(((kSlots << 16) | 0xffff) < kFirstReservedTag && kMaxPieces <= 0xffff);
constexpr uint32_t encode_slot_tag(SlotTag tag) { return ((tag.slot + 1) << 16) | tag.pieces; }
/// Nothing: no such slot, or a number of pieces that cannot be.
constexpr std::optional<SlotTag> parse_slot_tag(uint32_t tag) {
  const uint32_t slot = tag >> 16, pieces = tag & 0xffff;
  if (slot == 0 || slot > kSlots || pieces == 0 || pieces > kMaxPieces) return std::nullopt;
  return SlotTag{slot - 1, pieces};
}

/// What goes over the control connection, as pairs of numbers (Arrived frames).
struct Note {
  enum class Kind : uint16_t {
    kWant = 1,     ///< writer: `value` more slots, please
    kGrant = 2,    ///< owner: `slot` is yours for one message, under the number `value`
    kDone = 3,     ///< owner: what you put into `slot` under `value` is where it belongs; the slot is mine again
    kRefused = 4,  ///< owner: what you put into `slot` is not valid; I cut you off
  };
  Kind kind = Kind::kWant;
  uint16_t slot = 0;
  uint32_t value = 0;
};
constexpr Arrival encode_note(Note note) {
  return {(static_cast<uint32_t>(note.kind) << 16) | note.slot, note.value};
}
constexpr std::optional<Note> parse_note(const Arrival& arrival) {
  const uint32_t kind = arrival.tag >> 16, slot = arrival.tag & 0xffff;
  if (kind < 1 || kind > 4 || slot >= kSlots) return std::nullopt;
  return Note{static_cast<Note::Kind>(kind), static_cast<uint16_t>(slot), arrival.count};
}

/// How an agent is reached this way.
struct Address {
  std::string control;  ///< of the staged backend
  std::string inner;    ///< of its host backend
  uint64_t data_bytes = 0;
  uint32_t max_pieces = 0;
};
std::string encode_address(const Address& address);
Result<Address> parse_address(std::string_view bytes);

}  // namespace baton::transfer::staged
