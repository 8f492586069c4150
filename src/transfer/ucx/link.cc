#include "transfer/ucx/link.h"

#include <cstdio>
#include <cstdlib>
#include <regex>
#include <set>

#include "base/log.h"

namespace baton::transfer::ucx {
namespace {

/// Turns of progress in which an endpoint that is closed by force lets go of its lanes. What it then still holds
/// goes with its worker.
constexpr int kCloseRounds = 64;

}  // namespace

UcxLink::~UcxLink() {
  host_.on_link_gone(*this);
  // Last: the peer may reuse its memory as soon as this is closed.
  host_.control().close_outbound(id_);
}

Status UcxLink::open(const Welcome& welcome, std::unique_ptr<Worker> own, Worker* shared) {
  own_worker_ = std::move(own);
  worker_ = own_worker_ ? own_worker_.get() : shared;
  if (welcome.rails.size() != 1) {
    return invalid_argument("'{}' has {} rails, UCX has its own and wants one address", peer_name_,
                            welcome.rails.size());
  }
  ucp_ep_params_t parameters{};
  parameters.field_mask = UCP_EP_PARAM_FIELD_REMOTE_ADDRESS | UCP_EP_PARAM_FIELD_ERR_HANDLING_MODE |
                          UCP_EP_PARAM_FIELD_ERR_HANDLER;
  parameters.address = reinterpret_cast<const ucp_address_t*>(welcome.rails.front().data());
  parameters.err_mode = UCP_ERR_HANDLING_MODE_PEER;
  parameters.err_handler = {&UcxLink::on_endpoint_failed, this};
  ucs_status_t status = library().ucp_ep_create(worker_->get(), &parameters, &endpoint_);
  if (status != UCS_OK) {
    endpoint_ = nullptr;
    return unavailable("ucp_ep_create to '{}': {} (do both have the same devices and UCX_TLS?)", peer_name_,
                       text(status));
  }
  host_.wake(*worker_);
  BATON_RETURN_IF_ERROR(on_opened(welcome));
  log_info("transfer: UCX {} to '{}': {}", worker_->context().version(), peer_name_, describe_lanes());
  return Status();
}

void UcxLink::shut() {
  if (worker_ == nullptr) return;
  if (own_worker_ && endpoint_ != nullptr && !connected() && !own_worker_->context().library().ends_handshakes) {
    host_.forget(*own_worker_);
    Worker::keep_for_good(std::move(own_worker_));
    return;
  }
  abort();
  if (!own_worker_) return;
  (void)own_worker_->progress(kCloseRounds);
  host_.forget(*own_worker_);
  own_worker_.reset();
}

bool UcxLink::closable() const {
  if (own_worker_ || idle()) return true;
  // Somebody wants it closed, so what is under way is not waited for but broken off; the device still has to say
  // that it is. This question is the first that the link hears of it.
  const_cast<UcxLink*>(this)->abort();
  return false;
}

void UcxLink::abort() {
  dead_ = true;
  if (endpoint_ == nullptr) return;
  ucp_ep_h endpoint = std::exchange(endpoint_, nullptr);
  host_.wake(*worker_);
  ucp_request_param_t parameters{};
  parameters.op_attr_mask = UCP_OP_ATTR_FIELD_FLAGS;
  parameters.flags = UCP_EP_CLOSE_FLAG_FORCE;
  ucs_status_ptr_t request = library().ucp_ep_close_nbx(endpoint, &parameters);
  if (UCS_PTR_IS_PTR(request)) library().ucp_request_free(request);
}

void UcxLink::on_endpoint_failed(void* argument, ucp_ep_h, ucs_status_t status) {
  auto& link = *static_cast<UcxLink*>(argument);
  link.fail(unavailable("UCX lost the endpoint: {}", link.text(status)));
}

void UcxLink::fail(const Status& status) {
  if (!std::exchange(dead_, true)) host_.on_link_dead(*this, status);
}

/// "rc_mlx5/mlx5_0:1, tcp/eth0": what UCX chose, which it says in a text for people only.
std::string UcxLink::describe_lanes() const {
  char* text = nullptr;
  size_t bytes = 0;
  std::FILE* stream = ::open_memstream(&text, &bytes);
  if (stream == nullptr) return "unknown lanes";
  library().ucp_ep_print_info(endpoint_, stream);
  std::fclose(stream);
  std::string info(text, bytes);
  std::free(text);
  static const std::regex kLane(R"(lane\[\d+\]:\s+\d+:(\S+?)\.\d+\s)");
  std::set<std::string> lanes;
  for (std::sregex_iterator it(info.begin(), info.end(), kLane), end; it != end; ++it) lanes.insert((*it)[1]);
  return lanes.empty() ? "unknown lanes" : fmt::format("{}", fmt::join(lanes, ", "));
}

}  // namespace baton::transfer::ucx
