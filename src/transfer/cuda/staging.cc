#include "transfer/cuda/staging.h"

#include <algorithm>

#include "base/check.h"

namespace baton::transfer::cuda {

Status Stager::Options::validate() const {
  if (copies == 0 || copies > 1024) return invalid_argument("{} staged copies; 1 to 1024 are possible", copies);
  if (copy_bytes < 4096 || copy_bytes % 4096 != 0 || copy_bytes > CopyEngine::kMaxListBytes) {
    return invalid_argument("staged copies of {} bytes; multiples of 4096 up to {} are possible", copy_bytes,
                            CopyEngine::kMaxListBytes);
  }
  return Status();
}

Result<std::unique_ptr<Stager>> Stager::create(std::shared_ptr<const Device> device, Options options) {
  BATON_RETURN_IF_ERROR(options.validate());
  std::unique_ptr<Stager> stager(new Stager(options));
  BATON_ASSIGN_OR_RETURN(stager->buffers_, DeviceMemory::allocate(device, options.copies * options.copy_bytes));
  BATON_ASSIGN_OR_RETURN(stager->engine_, CopyEngine::create(device, {.max_ctas = options.max_ctas}));
  for (uint32_t copy = options.copies; copy > 0; --copy) stager->free_.push_back(copy - 1);
  return stager;
}

void Stager::release(uint32_t copy) {
  BATON_CHECK(copies_[copy].taken) << "staged copy " << copy << " is not under way";
  copies_[copy] = {};
  free_.push_back(copy);
}

Result<std::optional<uint32_t>> Stager::gather(CUdeviceptr source, std::span<const Segment> pieces, CUdeviceptr host) {
  return start(source, pieces, host, true);
}

Result<std::optional<uint32_t>> Stager::scatter(CUdeviceptr host, CUdeviceptr target, std::span<const Segment> pieces) {
  return start(target, pieces, host, false);
}

Result<std::optional<uint32_t>> Stager::start(CUdeviceptr memory, std::span<const Segment> pieces, CUdeviceptr host,
                                              bool gathers) {
  if (pieces.empty() || pieces.size() > CopyEngine::kMaxListPieces) {
    return invalid_argument("{} pieces for one staged copy, 1 to {} are possible", pieces.size(),
                            CopyEngine::kMaxListPieces);
  }
  // Two halves of 1 MiB cost the copy engine 7 % of its rate.
  const bool bulk = pieces.size() == 1 && pieces.front().bytes > kKernelBytes;
  laid_out_.clear();
  bulks_.clear();
  uint64_t at = 0;
  for (const Segment& piece : pieces) {
    if (piece.bytes > options_.copy_bytes - at) {
      return invalid_argument("the pieces do not fit into a staged copy of {} bytes", options_.copy_bytes);
    }
    const uint64_t offset = gathers ? piece.local_offset : piece.remote_offset;
    if (bulk) {
      bulks_.push_back(gathers ? CopyEngine::Bulk{memory + offset, host + at, piece.bytes}
                               : CopyEngine::Bulk{host + at, memory + offset, piece.bytes});
    } else {
      laid_out_.push_back(gathers ? Segment{offset, at, piece.bytes} : Segment{at, offset, piece.bytes});
    }
    at += piece.bytes;
  }
  if (free_.empty()) return std::optional<uint32_t>();
  const uint32_t copy = free_.back();
  std::optional<CopyEngine::Ticket> ticket;
  if (bulk) {
    BATON_ASSIGN_OR_RETURN(ticket, engine_->start_bulk(bulks_));
  } else if (at <= kKernelBytes) {
    BATON_ASSIGN_OR_RETURN(ticket, engine_->start(gathers ? memory : host, gathers ? host : memory, laid_out_, false));
  } else if (gathers) {
    BATON_ASSIGN_OR_RETURN(ticket, engine_->start(memory, buffer(copy), laid_out_, true, {}, {buffer(copy), host, at}));
  } else {
    BATON_ASSIGN_OR_RETURN(ticket, engine_->start(buffer(copy), memory, laid_out_, true, {host, buffer(copy), at}));
  }
  if (!ticket) return std::optional<uint32_t>();
  free_.pop_back();
  copies_[copy] = {.taken = true, .ticket = *ticket};
  return std::optional<uint32_t>(copy);
}

}  // namespace baton::transfer::cuda
