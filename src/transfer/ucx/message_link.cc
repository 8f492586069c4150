#include "base/check.h"
#include "transfer/ucx/link.h"
#include "transfer/ucx/messages.h"

namespace baton::transfer::ucx {

Status MessageLink::on_opened(const Welcome&) {
  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  // With REPLY it is not sent before the owner's side has answered UCX's own handshake.
  parameters.flags = UCP_AM_SEND_FLAG_EAGER | UCP_AM_SEND_FLAG_REPLY;
  ucs_status_ptr_t request =
      library().ucp_am_send_nbx(endpoint_, kHelloMessage, nullptr, 0, nullptr, 0, &parameters);
  if (UCS_PTR_IS_PTR(request)) {
    library().ucp_request_free(request);
  } else if (UCS_PTR_RAW_STATUS(request) != UCS_OK) {
    return unavailable("ucp_am_send to '{}': {}", peer_name_, text(UCS_PTR_RAW_STATUS(request)));
  }
  return Status();
}

Result<PostResult> MessageLink::post(const BackendMessage& post) {
  if (!ready()) return PostResult::kAgain;
  BATON_CHECK(post.segments.size() == 1);
  const Segment& segment = post.segments.front();
  if (free_.empty()) {
    messages_.emplace_back();
    messages_.back().link = this;
    messages_.back().id = static_cast<uint32_t>(messages_.size() - 1);
    free_.push_back(&messages_.back());
  }
  Message& message = *free_.back();
  free_.pop_back();
  message.cookie = post.cookie;
  message.in_use = true;
  message.sent = message.placed = false;
  message.status = UCS_OK;
  message.header = encode_write(
      {post.remote_pool, static_cast<uint32_t>(post.tag), message.id, segment.remote_offset, segment.bytes});
  ++outstanding_;

  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FIELD_CALLBACK | UCP_OP_ATTR_FIELD_USER_DATA | UCP_OP_ATTR_FIELD_MEMH |
                            UCP_OP_ATTR_FIELD_MEMORY_TYPE | UCP_OP_ATTR_FIELD_FLAGS;
  parameters.flags = UCP_AM_SEND_FLAG_EAGER;
  parameters.cb.send = &MessageLink::on_request_done;
  parameters.user_data = &message;
  parameters.memh = static_cast<ucp_mem_h>(post.local->local_descriptor);
  parameters.memory_type = UCS_MEMORY_TYPE_HOST;
  ucs_status_ptr_t request =
      library().ucp_am_send_nbx(endpoint_, kWriteMessage, message.header.data(), message.header.size(),
                                post.local->data + segment.local_offset, segment.bytes, &parameters);
  host_.wake(*worker_);
  if (!UCS_PTR_IS_PTR(request)) {
    message.sent = true;
    message.status = UCS_PTR_RAW_STATUS(request);
    settle(message);
  }
  return PostResult::kPosted;
}

void MessageLink::on_request_done(void* request, ucs_status_t status, void* argument) {
  auto& message = *static_cast<Message*>(argument);
  MessageLink& link = *message.link;
  link.library().ucp_request_free(request);
  message.sent = true;
  message.status = status;
  link.settle(message);
}

void MessageLink::on_placed(uint32_t first, uint32_t count) {
  if (first == kHelloId) {
    connected_ = true;
    return;
  }
  for (uint64_t id = first; id < uint64_t{first} + count; ++id) {
    if (id >= messages_.size() || !messages_[id].in_use || messages_[id].placed) {
      fail(invalid_argument("'{}' confirms message {}, which is not under way", peer_name_, id));
      return;
    }
    messages_[id].placed = true;
    settle(messages_[id]);
  }
}

void MessageLink::settle(Message& message) {
  if (message.sent && (message.placed || message.status != UCS_OK)) ended_.push_back(&message);
}

size_t MessageLink::advance() {
  for (Message* message : ended_) {
    Status status;
    if (message->status != UCS_OK) status = unavailable("ucp_am_send: {}", text(message->status));
    host_.on_message_done(*this, message->cookie, status);
    message->in_use = false;
    free_.push_back(message);
    --outstanding_;
  }
  return std::exchange(ended_, {}).size();
}

}  // namespace baton::transfer::ucx
