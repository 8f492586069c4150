#include "transfer/ucx/worker.h"

#include <arpa/inet.h>
#include <ifaddrs.h>

#include <algorithm>
#include <array>
#include <mutex>
#include <string_view>
#include <utility>
#include <vector>

#include "base/log.h"
#include "transfer/ucx/messages.h"

namespace baton::transfer::ucx {
namespace {

std::vector<std::string_view> split(std::string_view list) {
  std::vector<std::string_view> words;
  while (!list.empty()) {
    size_t comma = std::min(list.find(','), list.size());
    if (comma > 0) words.push_back(list.substr(0, comma));
    list.remove_prefix(std::min(comma + 1, list.size()));
  }
  return words;
}

bool is_rdma(std::string_view tls) {
  return tls == "ib" || tls == "rc" || tls == "dc" || tls == "ud" || tls.starts_with("rc_") ||
         tls.starts_with("dc_") || tls.starts_with("ud_");
}

bool all_of(const std::vector<std::string_view>& words, bool (*matches)(std::string_view)) {
  return !words.empty() && std::all_of(words.begin(), words.end(), matches);
}

/// The interface that has `ip`; empty if none has.
std::string interface_of(const std::string& ip) {
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return {};
  std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(list, ::freeifaddrs);
  for (ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    char text[INET6_ADDRSTRLEN] = "";
    if (entry->ifa_addr == nullptr) continue;
    if (entry->ifa_addr->sa_family == AF_INET) {
      ::inet_ntop(AF_INET, &reinterpret_cast<sockaddr_in*>(entry->ifa_addr)->sin_addr, text, sizeof(text));
    } else if (entry->ifa_addr->sa_family == AF_INET6) {
      ::inet_ntop(AF_INET6, &reinterpret_cast<sockaddr_in6*>(entry->ifa_addr)->sin6_addr, text, sizeof(text));
    }
    if (ip == text) return entry->ifa_name;
  }
  return {};
}

}  // namespace

Result<TransportChoice> choose_transports(const std::string& selection, const std::string& environment,
                                          const std::string& ip, bool has_rdma_device) {
  TransportChoice choice;
  choice.tls = selection;
  // With RDMA at hand nobody wants to find out from a slow run that it was TCP.
  if (selection.empty() && environment.empty()) choice.tls = has_rdma_device ? "ib" : "tcp";
  const std::string& effective = choice.tls.empty() ? environment : choice.tls;
  std::vector<std::string_view> words = split(effective);
  choice.one_sided = all_of(words, is_rdma);
  if (!choice.one_sided && !all_of(words, [](std::string_view word) { return word == "tcp"; })) {
    return invalid_argument("UCX transports '{}': name tcp, or RDMA ones (ib, rc, dc, ud, rc_mlx5, ...), and nothing "
                            "beside; on one host take --transport shm", effective);
  }
  if (choice.one_sided && !has_rdma_device) {
    return unavailable("UCX's {} needs an RDMA device, and /sys/class/infiniband has none", effective);
  }
  if (!choice.one_sided && !ip.empty()) {
    choice.devices = interface_of(ip);
    if (choice.devices.empty()) return invalid_argument("no network interface has the address {}", ip);
  }
  return choice;
}

Result<std::shared_ptr<Context>> Context::create(const TransportChoice& choice, const std::string& name) {
  BATON_ASSIGN_OR_RETURN(const Library* library, Library::load());
  std::shared_ptr<Context> context(new Context(library));
  ucp_config_t* config = nullptr;
  ucs_status_t status = library->ucp_config_read(nullptr, nullptr, &config);
  if (status != UCS_OK) return unavailable("ucp_config_read: {} (a UCX_* variable?)", context->text(status));
  std::unique_ptr<ucp_config_t, decltype(library->ucp_config_release)> owner(config, library->ucp_config_release);
  std::string fragment = choice.one_sided ? "" : std::to_string(kFragmentBytes);
  const std::string tcp = library->tcp_prefix;
  const std::array<std::pair<std::string, std::string>, 6> settings = {{
      {"TLS", choice.tls},
      {"NET_DEVICES", choice.devices},
      // One message, one fragment.
      {tcp + "TX_SEG_SIZE", fragment},
      {tcp + "RX_SEG_SIZE", fragment},
      // Without a copy tcp 1.13 completes a message twice, and aborts, when its connection is reset in the middle.
      {"ZCOPY_THRESH", choice.one_sided ? "" : "inf"},
      // The control connection sees a death at once; a timer in every worker would see it in 20 s.
      {"KEEPALIVE_INTERVAL", "inf"},
  }};
  for (const auto& [key, value] : settings) {
    if (value.empty()) continue;
    status = library->ucp_config_modify(config, key.c_str(), value.c_str());
    if (status != UCS_OK) return invalid_argument("UCX_{}={}: {}", key, value, context->text(status));
  }
  ucp_params_t parameters{};
  parameters.field_mask = UCP_PARAM_FIELD_FEATURES | UCP_PARAM_FIELD_MT_WORKERS_SHARED | UCP_PARAM_FIELD_NAME;
  parameters.features = UCP_FEATURE_RMA | UCP_FEATURE_AM | UCP_FEATURE_WAKEUP;
  parameters.mt_workers_shared = 1;  // regions end in any thread
  parameters.name = name.c_str();
  status = library->ucp_init_version(UCP_API_MAJOR, UCP_API_MINOR, &parameters, config, &context->handle_);
  if (status != UCS_OK) {
    return unavailable("UCX {} has no device for UCX_TLS={} (ucp_init: {}; `ucx_info -d` lists what it has)",
                       context->version(), choice.tls.empty() ? "(default)" : choice.tls, context->text(status));
  }
  return context;
}

Context::~Context() {
  if (handle_ != nullptr) library_->ucp_cleanup(handle_);
}

Result<std::unique_ptr<BackendRegion>> Region::create(std::shared_ptr<Context> context, std::span<std::byte> memory) {
  auto region = std::make_unique<Region>();
  region->context_ = std::move(context);
  const Library& library = region->context_->library();
  ucp_mem_map_params_t parameters{};
  parameters.field_mask = UCP_MEM_MAP_PARAM_FIELD_ADDRESS | UCP_MEM_MAP_PARAM_FIELD_LENGTH;
  parameters.address = memory.data();
  parameters.length = memory.size();
  ucs_status_t status = library.ucp_mem_map(region->context_->get(), &parameters, &region->memory_);
  if (status != UCS_OK) {
    return resource_exhausted("ucp_mem_map of {} bytes: {} (is the memlock limit high enough?)", memory.size(),
                              region->context_->text(status));
  }
  void* key = nullptr;
  size_t key_bytes = 0;
  status = library.ucp_rkey_pack(region->context_->get(), region->memory_, &key, &key_bytes);
  if (status != UCS_OK) return unavailable("ucp_rkey_pack: {}", region->context_->text(status));
  region->packed_key_.assign(static_cast<const char*>(key), key_bytes);
  library.ucp_rkey_buffer_release(key);
  region->data = memory.data();
  region->remote_base = reinterpret_cast<uint64_t>(memory.data());
  region->local_descriptor = region->memory_;
  return std::unique_ptr<BackendRegion>(std::move(region));
}

Region::~Region() {
  if (memory_ != nullptr) (void)context_->library().ucp_mem_unmap(context_->get(), memory_);
}

Result<std::unique_ptr<Worker>> Worker::create(std::shared_ptr<Context> context) {
  std::unique_ptr<Worker> worker(new Worker(std::move(context)));
  const Library& library = worker->context_->library();
  ucp_worker_params_t parameters{};
  parameters.field_mask = UCP_WORKER_PARAM_FIELD_THREAD_MODE | UCP_WORKER_PARAM_FIELD_FLAGS;
  parameters.thread_mode = UCS_THREAD_MODE_SERIALIZED;
  // What a dead peer has not answered ends with the worker, and that is meant.
  parameters.flags = UCP_WORKER_FLAG_IGNORE_REQUEST_LEAK;
  ucs_status_t status = library.ucp_worker_create(worker->context_->get(), &parameters, &worker->handle_);
  if (status != UCS_OK) return unavailable("ucp_worker_create: {}", worker->context_->text(status));
  if (library.ucp_worker_get_efd(worker->handle_, &worker->wait_fd_) != UCS_OK) worker->wait_fd_ = -1;
  return worker;
}

Worker::~Worker() {
  if (handle_ != nullptr) context_->library().ucp_worker_destroy(handle_);
}

void Worker::keep_for_good(std::unique_ptr<Worker> worker) {
  static std::mutex mutex;
  static auto& kept = *new std::vector<std::unique_ptr<Worker>>;  // reachable, so that nobody takes it for a leak
  std::lock_guard lock(mutex);
  kept.push_back(std::move(worker));
}

Result<std::string> Worker::address() const {
  ucp_address_t* address = nullptr;
  size_t bytes = 0;
  ucs_status_t status = context_->library().ucp_worker_get_address(handle_, &address, &bytes);
  if (status != UCS_OK) return unavailable("ucp_worker_get_address: {}", context_->text(status));
  std::string copy(reinterpret_cast<const char*>(address), bytes);
  context_->library().ucp_worker_release_address(handle_, address);
  return copy;
}

size_t Worker::progress(int rounds) {
  size_t count = 0;
  while (rounds-- > 0) {
    unsigned happened = context_->library().ucp_worker_progress(handle_);
    if (happened == 0) break;
    count += happened;
  }
  return count;
}

bool Worker::prepare_sleep() {
  return wait_fd_ >= 0 && context_->library().ucp_worker_arm(handle_) == UCS_OK;
}

Status Worker::on_message(unsigned id, ucp_am_recv_callback_t handler, void* argument) {
  ucp_am_handler_param_t parameters{};
  parameters.field_mask = UCP_AM_HANDLER_PARAM_FIELD_ID | UCP_AM_HANDLER_PARAM_FIELD_FLAGS |
                          UCP_AM_HANDLER_PARAM_FIELD_CB | UCP_AM_HANDLER_PARAM_FIELD_ARG;
  parameters.id = id;
  parameters.flags = UCP_AM_FLAG_WHOLE_MSG;
  parameters.cb = handler;
  parameters.arg = argument;
  ucs_status_t status = context_->library().ucp_worker_set_am_recv_handler(handle_, &parameters);
  if (status != UCS_OK) return unavailable("ucp_worker_set_am_recv_handler: {}", context_->text(status));
  return Status();
}

}  // namespace baton::transfer::ucx
