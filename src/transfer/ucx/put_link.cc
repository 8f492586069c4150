#include <algorithm>

#include "base/check.h"
#include "transfer/ucx/link.h"
#include "transfer/ucx/messages.h"

namespace baton::transfer::ucx {

PutLink::~PutLink() {
  if (worker_ != nullptr) abort();  // what is under way uses the keys
  for (auto& [id, pool] : pools_) library().ucp_rkey_destroy(pool.key);
  shut();
}

Status PutLink::on_opened(const Welcome& welcome) {
  for (const Welcome::Pool& pool : welcome.pools) {
    if (pools_.contains(pool.id)) continue;
    RemotePool remote;
    remote.base = pool.base;
    ucs_status_t status = library().ucp_ep_rkey_unpack(endpoint_, pool.packed_key.data(), &remote.key);
    if (status != UCS_OK) {
      return unavailable("ucp_ep_rkey_unpack of pool {} of '{}': {}", pool.id, peer_name_, text(status));
    }
    pools_.emplace(pool.id, remote);
  }
  return Status();
}

void PutLink::on_request_done(void* request, ucs_status_t status, void* argument) {
  auto& batch = *static_cast<Batch*>(argument);
  PutLink& link = *batch.link;
  link.library().ucp_request_free(request);
  if (status != UCS_OK) batch.status = status;
  if (--batch.pending == 0 && batch.phase != Batch::Phase::kOpen) link.ended_.push_back(&batch);
}

/// What UCX gives back for an operation: done, an error, or a request whose end on_request_done() sees.
void PutLink::track(Batch& batch, ucs_status_ptr_t request) {
  if (UCS_PTR_IS_PTR(request)) {
    ++batch.pending;
  } else if (UCS_PTR_RAW_STATUS(request) != UCS_OK) {
    batch.status = UCS_PTR_RAW_STATUS(request);
  }
}

PutLink::Batch& PutLink::open_batch() {
  if (open_ != nullptr) return *open_;
  if (free_.empty()) {
    batches_.emplace_back();
    batches_.back().link = this;
    free_.push_back(&batches_.back());
  }
  open_ = free_.back();
  free_.pop_back();
  ++outstanding_;
  return *open_;
}

Result<PostResult> PutLink::post(const BackendMessage& message) {
  if (!ready()) return PostResult::kAgain;
  auto pool = pools_.find(message.remote_pool);
  if (pool == pools_.end()) {
    return failed_precondition("'{}' did not open pool {} for {}", peer_name_, message.remote_pool,
                               host_.transport_name());
  }
  Batch& batch = open_batch();
  batch.cookies.push_back(message.cookie);
  if (message.tag != Tag::kNone) {
    auto tag = static_cast<uint32_t>(message.tag);
    if (!batch.arrivals.empty() && batch.arrivals.back().tag == tag) {
      ++batch.arrivals.back().count;
    } else {
      batch.arrivals.push_back({tag, 1});
    }
  }
  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMH |
                            UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  parameters.cb.send = &PutLink::on_request_done;
  parameters.user_data = &batch;
  parameters.memh = static_cast<ucp_mem_h>(message.local->local_descriptor);
  parameters.memory_type = UCS_MEMORY_TYPE_HOST;
  for (const Segment& segment : message.segments) {
    // An error does not stop us: the message is answered by its batch, once what was posted of it has ended.
    track(batch, library().ucp_put_nbx(endpoint_, message.local->data + segment.local_offset, segment.bytes,
                                       pool->second.base + segment.remote_offset, pool->second.key, &parameters));
  }
  return PostResult::kPosted;
}

void PutLink::flush() {
  if (open_ == nullptr) return;
  Batch& batch = *std::exchange(open_, nullptr);
  batch.phase = Batch::Phase::kFlushing;
  submit_flush(batch);
}

void PutLink::submit_flush(Batch& batch) {
  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA;
  parameters.cb.send = &PutLink::on_request_done;
  parameters.user_data = &batch;
  track(batch, library().ucp_ep_flush_nbx(endpoint_, &parameters));
  host_.wake(*worker_);
  if (batch.pending == 0) ended_.push_back(&batch);
}

/// All of it is in the peer's memory. The flush behind the notice is the batch's end: then the peer has that, too,
/// and a writer that leaves takes nothing along.
void PutLink::tell(Batch& batch) {
  batch.phase = Batch::Phase::kTelling;
  batch.notice = encode_notice(batch.arrivals);
  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_FLAGS |
                            UCP_OP_ATTR_FIELD_MEMORY_TYPE;
  parameters.flags = UCP_AM_SEND_FLAG_EAGER;
  parameters.cb.send = &PutLink::on_request_done;
  parameters.user_data = &batch;
  parameters.memory_type = UCS_MEMORY_TYPE_HOST;
  for (size_t at = 0; at < batch.notice.size(); at += kMaxNoticeBytes) {
    size_t bytes = std::min(kMaxNoticeBytes, batch.notice.size() - at);
    track(batch, library().ucp_am_send_nbx(endpoint_, kNoticeMessage, nullptr, 0, batch.notice.data() + at, bytes,
                                           &parameters));
  }
  submit_flush(batch);
}

size_t PutLink::advance() {
  for (size_t i = 0; i < ended_.size(); ++i) {  // tell() may add to it
    Batch& batch = *ended_[i];
    bool more = batch.phase == Batch::Phase::kFlushing && batch.status == UCS_OK && !batch.arrivals.empty();
    if (more && endpoint_ != nullptr) {
      tell(batch);
    } else {
      if (more) batch.status = UCS_ERR_CANCELED;
      finish(batch);
    }
  }
  return std::exchange(ended_, {}).size();
}

void PutLink::finish(Batch& batch) {
  Status status;
  if (batch.status != UCS_OK) status = unavailable("ucp_put: {}", text(batch.status));
  for (uint64_t cookie : batch.cookies) host_.on_message_done(*this, cookie, status);
  batch.phase = Batch::Phase::kOpen;
  batch.status = UCS_OK;
  batch.cookies.clear();
  batch.arrivals.clear();
  free_.push_back(&batch);
  --outstanding_;
}

}  // namespace baton::transfer::ucx
