#include "transfer/fabric/provider.h"

#include <arpa/inet.h>
#include <ifaddrs.h>
#include <net/if.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <vector>

#include "base/log.h"
#include "transfer/topology/rails.h"

namespace baton::transfer::fabric {
namespace {

/// Names that mean native RDM endpoints. libfabric 1.17 calls native TCP "net" (its "tcp" is MSG only and
/// gets 100 MiB of ofi_rxm on top); from 1.18 on it is "tcp".
std::vector<std::string> provider_names(const std::string& transport) {
  if (transport == "tcp") return {"tcp", "net"};
  if (transport == "verbs") return {"verbs;ofi_rxm", "verbs"};
  return {transport};
}

InfoPointer make_hints(const std::string& transport, const std::string& provider,
                       const std::string& address) {
  InfoPointer hints(fi_allocinfo());
  if (!hints) return nullptr;
  hints->caps = FI_RMA | FI_WRITE | FI_REMOTE_WRITE;
  hints->mode = FI_CONTEXT | FI_CONTEXT2;  // our operations carry the room that these ask for
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->threading = FI_THREAD_SAFE;  // regions are closed from any thread
  hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
  hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
  hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
  // All that we can do; what comes back is what has to be done.
  hints->domain_attr->mr_mode =
      FI_MR_LOCAL | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_VIRT_ADDR | FI_MR_ENDPOINT;
  hints->tx_attr->op_flags = FI_DELIVERY_COMPLETE;
  if (transport == "tcp") {
    hints->addr_format = address.find(':') == std::string::npos ? FI_SOCKADDR_IN : FI_SOCKADDR_IN6;
  }
  if (transport != "tcp" && !address.empty()) hints->domain_attr->name = ::strdup(address.c_str());
  hints->fabric_attr->prov_name = ::strdup(provider.c_str());
  return hints;
}

}  // namespace

void set_library_defaults() {
  // From 1.19 on tcp keeps 16 KiB for a received message that nobody waits for in each of its 1024 slots for operations, 17 MiB a
  // rail. Nothing is received here but writes into registered memory, which need none of it.
  constexpr uint32_t kFirstWithReceiveBuffers = FI_VERSION(1, 19);
  if (FI_VERSION_GE(fi_version(), kFirstWithReceiveBuffers)) (void)::setenv("FI_TCP_MAX_RX_SIZE", "128", /*overwrite=*/0);
}

Result<Provider> find_provider(const std::string& transport, const std::string& address) {
  int error = -FI_ENODATA;
  for (const std::string& name : provider_names(transport)) {
    for (bool delivery_complete : {true, false}) {
      InfoPointer hints = make_hints(transport, name, address);
      if (!hints) return internal_error("fi_allocinfo failed");
      if (!delivery_complete) hints->tx_attr->op_flags = 0;
      const char* node = transport == "tcp" ? address.c_str() : nullptr;
      fi_info* list = nullptr;
      int ret = fi_getinfo(FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION), node, nullptr,
                           node != nullptr ? FI_SOURCE | FI_NUMERICHOST : 0, hints.get(), &list);
      if (ret != 0) {
        if (ret != -FI_ENODATA) error = ret;
        continue;
      }
      InfoPointer all(list);
      for (fi_info* info = list; info != nullptr; info = info->next) {
        // "tcp" is asked for, "tcp;ofi_rxm" is an answer that nobody wants.
        if (name != info->fabric_attr->prov_name) continue;
        // The tag needs 4 bytes beside the data, and a key has to fit our messages.
        if (info->domain_attr->cq_data_size < 4 || info->domain_attr->mr_key_size > 8) continue;
        Provider provider;
        provider.info.reset(fi_dupinfo(info));
        provider.name = name;
        provider.delivery_complete = delivery_complete;
        provider.endpoint_per_peer = transport == "tcp" &&
                                     (info->domain_attr->mr_mode & FI_MR_ENDPOINT) == 0;
        // EFA takes one piece on each side when there is CQ data, whatever its limits say.
        if (transport == "tcp") {
          provider.max_segments = static_cast<uint32_t>(
              std::clamp<size_t>(std::min(info->tx_attr->iov_limit, info->tx_attr->rma_iov_limit), 1, 4));
        }
        return provider;
      }
    }
  }
  return unavailable("libfabric {}.{} has no provider for transport '{}'{}: {} (`fi_info -l` lists what it "
                     "has)", FI_MAJOR(fi_version()), FI_MINOR(fi_version()), transport,
                     address.empty() ? "" : " at " + address, fi_strerror(-error));
}

bool has_rdma_device() {
  std::error_code error;
  std::filesystem::directory_iterator devices("/sys/class/infiniband", error);
  return !error && devices != std::filesystem::directory_iterator();
}

Result<std::vector<std::string>> choose_devices(const std::string& transport, uint32_t rails) {
  const Topology topology = Topology::read();
  return choose_devices(transport, rails, topology, Place::of_this_thread(topology), MemoryLimits::read());
}

Result<std::vector<std::string>> choose_devices(const std::string& transport, uint32_t rails, const Topology& topology,
                                                const Place& place, const MemoryLimits& limits) {
  RailOptions options;
  options.transport = transport;
  options.max_rails = rails;
  Result<RailChoice> choice = choose_rails(topology, place, options);
  if (!choice.ok()) {
    // A container may hide the tree that the choice is made by; libfabric may still find a device.
    log_info("transfer: no choice of {} devices by topology: {}", transport, choice.status().message());
    return std::vector<std::string>{std::string()};
  }
  const RailMemory memory = predict_rail_memory(transport == "verbs" ? "verbs;ofi_rxm" : transport, *choice);
  log_info("transfer: {}; it {}", choice->describe(), memory.describe());
  const MemoryVerdict verdict = check_rail_memory(memory, limits);
  BATON_RETURN_IF_ERROR(verdict.status);
  if (!verdict.warning.empty()) log_warning("transfer: {}", verdict.warning);
  std::vector<std::string> names;
  for (const std::string& device : choice->names()) {
    // libfabric calls EFA's domains "rdmap79s0-rdm", verbs' by the device.
    names.push_back(transport == "efa" ? device + "-rdm" : device);
  }
  return names;
}

Result<std::vector<std::string>> local_addresses(const std::string& wanted) {
  constexpr size_t kMaxRails = 64;
  std::vector<std::string> addresses;
  std::string_view rest = wanted;
  do {
    const size_t comma = rest.find(',');
    BATON_ASSIGN_OR_RETURN(std::string address, local_address(std::string(rest.substr(0, comma))));
    if (std::find(addresses.begin(), addresses.end(), address) != addresses.end()) {
      return invalid_argument("bind address {} is named twice", address);
    }
    addresses.push_back(std::move(address));
    rest = comma == std::string_view::npos ? std::string_view() : rest.substr(comma + 1);
  } while (!rest.empty() && addresses.size() < kMaxRails);
  if (!rest.empty()) return invalid_argument("more than {} bind addresses", kMaxRails);
  return addresses;
}

Result<std::string> local_address(const std::string& wanted) {
  if (!wanted.empty()) {
    unsigned char buffer[sizeof(in6_addr)];
    if (::inet_pton(AF_INET, wanted.c_str(), buffer) == 1 ||
        ::inet_pton(AF_INET6, wanted.c_str(), buffer) == 1) {
      return wanted;
    }
    return invalid_argument("bind address '{}' is no IP address", wanted);
  }
  ifaddrs* list = nullptr;
  if (::getifaddrs(&list) != 0) return internal_error("getifaddrs: {}", std::strerror(errno));
  std::unique_ptr<ifaddrs, void (*)(ifaddrs*)> owner(list, ::freeifaddrs);
  std::string best;
  int best_rank = 0;
  for (ifaddrs* entry = list; entry != nullptr; entry = entry->ifa_next) {
    if (entry->ifa_addr == nullptr || (entry->ifa_flags & IFF_UP) == 0) continue;
    bool loopback = (entry->ifa_flags & IFF_LOOPBACK) != 0;
    char text[INET6_ADDRSTRLEN];
    int rank = 0;
    if (entry->ifa_addr->sa_family == AF_INET) {
      auto* v4 = reinterpret_cast<sockaddr_in*>(entry->ifa_addr);
      ::inet_ntop(AF_INET, &v4->sin_addr, text, sizeof(text));
      rank = loopback ? 2 : 4;
    } else if (entry->ifa_addr->sa_family == AF_INET6) {
      auto* v6 = reinterpret_cast<sockaddr_in6*>(entry->ifa_addr);
      if (IN6_IS_ADDR_LINKLOCAL(&v6->sin6_addr)) continue;  // useless without an interface
      ::inet_ntop(AF_INET6, &v6->sin6_addr, text, sizeof(text));
      rank = loopback ? 1 : 3;
    }
    if (rank > best_rank) {
      best_rank = rank;
      best = text;
    }
  }
  if (best.empty()) return unavailable("no network interface is up");
  return best;
}

}  // namespace baton::transfer::fabric
