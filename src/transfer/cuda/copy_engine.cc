#include "transfer/cuda/copy_engine.h"

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstring>

#include "base/check.h"
#include "base/log.h"

namespace baton::transfer::cuda {
namespace {

constexpr size_t kFlagStride = 128;
constexpr size_t kListsOffset = 4096;
constexpr uint32_t kWarpsPerCta = kCopyThreads / 32;
constexpr uint32_t kMinUnitBytes = 2048;
constexpr uint32_t kMaxUnitBytes = 8192;

}  // namespace

Result<std::unique_ptr<CopyEngine>> CopyEngine::create(std::shared_ptr<const Device> device, Options options) {
  std::unique_ptr<CopyEngine> engine(new CopyEngine(std::move(device), options));
  BATON_RETURN_IF_ERROR(engine->init());
  return engine;
}

Status CopyEngine::init() {
  const Driver& cu = device_->driver();
  BATON_ASSIGN_OR_RETURN(host_, PinnedMemory::allocate(device_, kListsOffset + kStreams * kLists * kListEntries *
                                                                                   sizeof(Piece)));
  std::memset(host_.data(), 0, kListsOffset);
  BATON_ASSIGN_OR_RETURN(counters_, DeviceMemory::allocate(device_, kStreams * kFlagStride));
  CurrentDevice current(*device_);
  BATON_RETURN_IF_ERROR(cu.check(cu.memory_set(counters_.address(), 0, counters_.bytes()), "cuMemsetD8"));
  int least = 0, greatest = 0;
  BATON_RETURN_IF_ERROR(cu.check(cu.context_stream_priorities(&least, &greatest), "cuCtxGetStreamPriorityRange"));
  for (uint32_t i = 0; i < kStreams; ++i) {
    // High priority: its thread blocks go first when a place on the GPU becomes free.
    BATON_RETURN_IF_ERROR(cu.check(cu.stream_create(&streams_[i].handle, kStreamNonBlocking, greatest),
                                   "cuStreamCreateWithPriority"));
    BATON_RETURN_IF_ERROR(launch_empty(streams_[i], i));
  }
  BATON_RETURN_IF_ERROR(drain());
  if (!idle()) return internal_error("the copy kernel ran on {} and did not report its end", device_->name());
  return Status();
}

CopyEngine::~CopyEngine() {
  if (Status status = drain(); !status.ok()) log_error("transfer: {}: {}", device_->name(), status.to_string());
  CurrentDevice current(*device_);
  for (Stream& stream : streams_) {
    if (stream.handle != nullptr) (void)device_->driver().stream_destroy(stream.handle);
  }
}

std::atomic_ref<uint64_t> CopyEngine::flag(uint32_t stream) const {
  return std::atomic_ref<uint64_t>(*reinterpret_cast<uint64_t*>(host_.data() + stream * kFlagStride));
}

std::byte* CopyEngine::take_list(Stream& stream, uint32_t index, uint64_t* address) {
  const auto slot = static_cast<uint32_t>((stream.started + 1) % kLists);
  if (stream.list_users[slot] > finished(index)) return nullptr;
  stream.list_users[slot] = stream.started + 1;
  const size_t offset = kListsOffset + (index * kLists + slot) * kListEntries * sizeof(Piece);
  *address = host_.address() + offset;
  return host_.data() + offset;
}

uint64_t CopyEngine::finished(uint32_t stream) const { return flag(stream).load(std::memory_order_acquire); }

bool CopyEngine::idle() const {
  for (uint32_t i = 0; i < kStreams; ++i) {
    if (finished(i) != streams_[i].started) return false;
  }
  return true;
}

Status CopyEngine::health() const {
  CurrentDevice current(*device_);
  for (const Stream& stream : streams_) {
    CUresult result = device_->driver().stream_query(stream.handle);
    if (result != kNotReady) {
      BATON_RETURN_IF_ERROR(device_->driver().check(result, fmt::format("copying on {}", device_->name())));
    }
  }
  return Status();
}

Status CopyEngine::drain() const {
  CurrentDevice current(*device_);
  for (const Stream& stream : streams_) {
    if (stream.handle == nullptr) continue;
    BATON_RETURN_IF_ERROR(device_->driver().check(device_->driver().stream_synchronize(stream.handle),
                                                  fmt::format("copying on {}", device_->name())));
  }
  return Status();
}

Result<std::optional<CopyEngine::Ticket>> CopyEngine::start(CUdeviceptr source, CUdeviceptr target,
                                                            std::span<const Segment> pieces, bool within_device,
                                                            const Bulk& first, const Bulk& last) {
  CopyArguments arguments;  // 1.6 KiB: only what is used is filled
  arguments.source = source;
  arguments.target = target;
  uint64_t bytes = 0, largest = 0;
  size_t entries = 0;
  for (const Segment& piece : pieces) {
    bytes += piece.bytes;
    largest = std::max(largest, piece.bytes);
    entries += (piece.bytes + kMaxPieceBytes - 1) / kMaxPieceBytes;
  }
  BATON_CHECK(entries <= kListEntries) << entries << " entries";
  uint32_t index = next_stream_;
  Stream& stream = streams_[index];
  Piece* to = arguments.inline_pieces;
  arguments.pieces = 0;
  arguments.block_bytes = 0;
  if (entries > kInlinePieces) {
    to = reinterpret_cast<Piece*>(take_list(stream, index, &arguments.pieces));
    if (to == nullptr) return std::optional<Ticket>();
  }
  for (const Segment& piece : pieces) {
    for (uint64_t at = 0; at < piece.bytes; at += kMaxPieceBytes) {
      *to++ = {piece.local_offset + at, piece.remote_offset + at, std::min(piece.bytes - at, kMaxPieceBytes)};
    }
  }
  arguments.piece_count = static_cast<uint32_t>(entries);
  CurrentDevice current(*device_);
  if (first.bytes > 0) BATON_RETURN_IF_ERROR(copy(stream, first));
  BATON_RETURN_IF_ERROR(launch(stream, index, arguments, bytes, std::min(largest, kMaxPieceBytes), within_device));
  if (last.bytes > 0) {
    // The copy engine tells nobody that it has ended; a kernel behind it does, and is what the ticket names.
    BATON_RETURN_IF_ERROR(copy(stream, last));
    BATON_RETURN_IF_ERROR(launch_empty(stream, index));
  }
  next_stream_ = (next_stream_ + 1) % kStreams;
  return std::optional<Ticket>(Ticket{index, stream.started});
}

Result<std::optional<CopyEngine::Ticket>> CopyEngine::start_blocks(CUdeviceptr source, CUdeviceptr target,
                                                                   std::span<const BlockPair> blocks,
                                                                   const BlockRange& range, bool within_device) {
  static_assert(sizeof(BlockPair) == sizeof(BlockIds) && offsetof(BlockPair, remote_block) == offsetof(BlockIds, target));
  BATON_CHECK(blocks.size() <= kMaxListPieces) << blocks.size() << " blocks";
  CopyArguments arguments;
  arguments.source = source + range.offset_bytes;
  arguments.target = target + range.offset_bytes;
  arguments.source_stride = range.local_stride_bytes;
  arguments.target_stride = range.remote_stride_bytes;
  arguments.block_bytes = range.length_bytes;
  arguments.piece_count = static_cast<uint32_t>(blocks.size());
  arguments.pieces = 0;
  uint32_t index = next_stream_;
  Stream& stream = streams_[index];
  auto* to = reinterpret_cast<std::byte*>(arguments.inline_blocks);
  if (blocks.size() > kInlineBlocks) {
    to = take_list(stream, index, &arguments.pieces);
    if (to == nullptr) return std::optional<Ticket>();
  }
  std::memcpy(to, blocks.data(), blocks.size_bytes());
  CurrentDevice current(*device_);
  BATON_RETURN_IF_ERROR(launch(stream, index, arguments, blocks.size() * range.length_bytes, range.length_bytes,
                               within_device));
  next_stream_ = (next_stream_ + 1) % kStreams;
  return std::optional<Ticket>(Ticket{index, stream.started});
}

Result<CopyEngine::Ticket> CopyEngine::start_bulk(std::span<const Bulk> copies) {
  uint32_t index = next_stream_;
  Stream& stream = streams_[index];
  CurrentDevice current(*device_);
  for (const Bulk& bulk : copies) BATON_RETURN_IF_ERROR(copy(stream, bulk));
  BATON_RETURN_IF_ERROR(launch_empty(stream, index));
  next_stream_ = (next_stream_ + 1) % kStreams;
  return Ticket{index, stream.started};
}

Status CopyEngine::copy(const Stream& stream, const Bulk& bulk) {
  return device_->driver().check(device_->driver().copy_async(bulk.to, bulk.from, bulk.bytes, stream.handle),
                                 fmt::format("cuMemcpyAsync of {} bytes on {}", bulk.bytes, device_->name()));
}

Status CopyEngine::launch_empty(Stream& stream, uint32_t index) {
  CopyArguments nothing{};
  return launch(stream, index, nothing, 0, 0, false);
}

Status CopyEngine::launch(Stream& stream, uint32_t index, CopyArguments& arguments, uint64_t bytes, uint64_t largest,
                          bool within_device) {
  // One thread block per multiprocessor saturates NVLink and PCIe; the device's own memory takes two.
  const auto multiprocessors = static_cast<uint32_t>(device_->multiprocessors());
  uint32_t ctas = options_.max_ctas != 0 ? options_.max_ctas : multiprocessors * (within_device ? 2 : 1);
  // Small copies are spread thin, for latency; large ones take a few KiB per warp and turn.
  uint64_t share = bytes / (static_cast<uint64_t>(ctas) * kWarpsPerCta);
  arguments.unit_bytes = std::clamp(static_cast<uint32_t>(std::bit_floor(std::min<uint64_t>(share, kMaxUnitBytes))),
                                    kMinUnitBytes, kMaxUnitBytes);
  arguments.units_per_piece =
      std::max<uint32_t>(1, static_cast<uint32_t>((largest + arguments.unit_bytes - 1) / arguments.unit_bytes));
  uint32_t units = arguments.piece_count * arguments.units_per_piece;
  ctas = std::clamp<uint32_t>((units + kWarpsPerCta - 1) / kWarpsPerCta, 1, ctas);
  arguments.done_flag = host_.address() + index * kFlagStride;
  arguments.done_value = stream.started + 1;
  arguments.cta_counter = counters_.address() + index * kFlagStride;
  void* parameters[] = {&arguments};
  BATON_RETURN_IF_ERROR(device_->driver().check(
      device_->driver().launch(device_->copy_kernel(), ctas, 1, 1, kCopyThreads, 1, 1, 0, stream.handle, parameters,
                               nullptr),
      fmt::format("launching the copy kernel on {}", device_->name())));
  ++stream.started;
  return Status();
}

}  // namespace baton::transfer::cuda
