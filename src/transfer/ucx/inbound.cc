#include "transfer/ucx/inbound.h"

#include <algorithm>
#include <cstring>
#include <span>
#include <utility>

#include "base/log.h"

namespace baton::transfer::ucx {
namespace {

/// Runs in one control frame; well under its limit.
constexpr size_t kMaxRunsPerFrame = 4096;

}  // namespace

Result<std::unique_ptr<Inbound>> Inbound::create(std::unique_ptr<Worker> worker, std::string name,
                                                 std::unordered_map<uint32_t, Pool> pools,
                                                 std::vector<Arrival>& arrivals) {
  std::unique_ptr<Inbound> inbound(new Inbound(std::move(name), std::move(pools), arrivals));
  inbound->worker_ = std::move(worker);
  BATON_RETURN_IF_ERROR(inbound->worker_->on_message(kHelloMessage, &Inbound::on_hello, inbound.get()));
  BATON_RETURN_IF_ERROR(inbound->worker_->on_message(kWriteMessage, &Inbound::on_write, inbound.get()));
  return inbound;
}

Inbound::~Inbound() {
  if (connected_ || worker_ == nullptr || worker_->context().library().ends_handshakes) return;
  log_warning("transfer: '{}' left before it was connected; what UCX holds for it (about 1 MiB) stays", name_);
  Worker::keep_for_good(std::move(worker_));
}

ucs_status_t Inbound::on_hello(void* argument, const void*, size_t, void*, size_t, const ucp_am_recv_param_t*) {
  auto& self = *static_cast<Inbound*>(argument);
  if (!std::exchange(self.connected_, true)) self.placed_.push_back({kHelloId, 1});
  return UCS_OK;
}

ucs_status_t Inbound::on_write(void* argument, const void* header_data, size_t header_bytes, void* data, size_t bytes,
                               const ucp_am_recv_param_t* parameters) {
  auto& self = *static_cast<Inbound*>(argument);
  std::optional<WriteHeader> header = parse_write({static_cast<const char*>(header_data), header_bytes});
  if ((parameters->recv_attr & UCP_AM_RECV_ATTR_FLAG_RNDV) != 0) return UCS_ERR_UNSUPPORTED;  // not from our links
  // What is refused is never confirmed: it meets its writer's deadline.
  if (!header || header->bytes != bytes) {
    log_warning("transfer: '{}' sent a damaged UCX message of {} bytes", self.name_, bytes);
    return UCS_OK;
  }
  auto pool = self.pools_.find(header->pool);
  if (pool == self.pools_.end() || bytes > pool->second.bytes || header->offset > pool->second.bytes - bytes) {
    log_warning("transfer: '{}' wants to write {} bytes at {} of pool {}, which {}", self.name_, bytes,
                header->offset, header->pool, pool == self.pools_.end() ? "it has not opened" : "is smaller");
    return UCS_OK;
  }
  std::memcpy(pool->second.data + header->offset, data, bytes);
  self.on_placed(*header);
  return UCS_OK;
}

void Inbound::on_placed(const WriteHeader& header) {
  if (header.tag != static_cast<uint32_t>(Tag::kNone)) arrivals_.push_back({header.tag, 1});
  if (!placed_.empty() && uint64_t{placed_.back().tag} + placed_.back().count == header.id) {
    ++placed_.back().count;
  } else {
    placed_.push_back({header.id, 1});
  }
}

bool Inbound::confirm(ControlPlane& control, ControlPlane::Id id) {
  size_t sent = 0;
  while (sent < placed_.size()) {
    size_t runs = std::min(kMaxRunsPerFrame, placed_.size() - sent);
    if (!control.send_arrivals(id, std::span<const Arrival>(placed_).subspan(sent, runs))) break;
    sent += runs;
  }
  placed_.erase(placed_.begin(), placed_.begin() + static_cast<std::ptrdiff_t>(sent));
  return placed_.empty();
}

}  // namespace baton::transfer::ucx
