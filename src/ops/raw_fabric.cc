#include "ops/raw_fabric.h"

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "base/clock.h"
#include "base/unique_handle.h"

namespace baton::ops {

namespace {

template <typename Fid>
struct FidTraits {
  using Handle = Fid*;
  static Fid* null() { return nullptr; }
  static void close(Fid* handle) { (void)fi_close(&handle->fid); }
};
struct InfoTraits {
  using Handle = fi_info*;
  static fi_info* null() { return nullptr; }
  static void close(fi_info* info) { fi_freeinfo(info); }
};
using Info = UniqueHandle<InfoTraits>;

constexpr size_t kMaxWindow = 4096;
constexpr uint64_t kMaxInflightBytes = 32u << 20;  // as the agent's

Status failed(const char* what, ssize_t error) { return unavailable("raw libfabric: {}: {}", what, fi_strerror(static_cast<int>(-error))); }

/// The attributes that the agent asks for, too (src/transfer/fabric/provider.cc).
Result<fi_info*> find(const std::string& provider, const std::string& ip, bool delivery_complete) {
  Info hints(fi_allocinfo());
  if (!hints) return resource_exhausted("fi_allocinfo failed");
  hints->caps = FI_RMA | FI_WRITE | FI_REMOTE_WRITE | FI_READ | FI_REMOTE_READ;
  hints->mode = FI_CONTEXT | FI_CONTEXT2;
  hints->ep_attr->type = FI_EP_RDM;
  hints->domain_attr->threading = FI_THREAD_SAFE;
  hints->domain_attr->control_progress = FI_PROGRESS_MANUAL;
  hints->domain_attr->data_progress = FI_PROGRESS_MANUAL;
  hints->domain_attr->resource_mgmt = FI_RM_ENABLED;
  hints->domain_attr->mr_mode = FI_MR_LOCAL | FI_MR_ALLOCATED | FI_MR_PROV_KEY | FI_MR_VIRT_ADDR | FI_MR_ENDPOINT;
  hints->tx_attr->op_flags = delivery_complete ? FI_DELIVERY_COMPLETE : 0;
  bool sockets = provider == "tcp" || provider == "net";
  if (sockets) hints->addr_format = ip.find(':') == std::string::npos ? FI_SOCKADDR_IN : FI_SOCKADDR_IN6;
  hints->fabric_attr->prov_name = ::strdup(provider.c_str());
  fi_info* list = nullptr;
  int error = fi_getinfo(FI_VERSION(FI_MAJOR_VERSION, FI_MINOR_VERSION), sockets ? ip.c_str() : nullptr, nullptr,
                         sockets ? FI_SOURCE | FI_NUMERICHOST : 0, hints.get(), &list);
  if (error != 0) return failed("fi_getinfo", error);
  Info all(list);
  for (fi_info* info = list; info != nullptr; info = info->next) {
    if (provider == info->fabric_attr->prov_name) return fi_dupinfo(info);
  }
  return failed("fi_getinfo", -FI_ENODATA);
}

class RawFabricEndpoint final : public RawFabric {
 public:
  explicit RawFabricEndpoint(std::span<std::byte> memory) : memory_(memory) {}

  Status open_all(const std::string& provider, const std::string& ip) {
    Result<fi_info*> found = find(provider, ip, true);
    if (!found.ok()) found = find(provider, ip, false);
    if (!found.ok()) return found.status();
    info_.reset(*found);
    fi_info* info = info_.get();
    info->tx_attr->size = std::min<size_t>(info->tx_attr->size, 256);
    BATON_RETURN_IF_ERROR(make("fi_fabric", fabric_, [&](fid_fabric** fid) { return fi_fabric(info->fabric_attr, fid, nullptr); }));
    BATON_RETURN_IF_ERROR(make("fi_domain", domain_, [&](fid_domain** fid) { return fi_domain(fabric_.get(), info, fid, nullptr); }));
    fi_av_attr av_attr{};
    av_attr.type = info->domain_attr->av_type;
    BATON_RETURN_IF_ERROR(make("fi_av_open", addresses_, [&](fid_av** fid) { return fi_av_open(domain_.get(), &av_attr, fid, nullptr); }));
    fi_cq_attr cq_attr{};
    cq_attr.format = FI_CQ_FORMAT_DATA;
    cq_attr.size = 1024;
    cq_attr.wait_obj = FI_WAIT_NONE;
    BATON_RETURN_IF_ERROR(make("fi_cq_open", queue_, [&](fid_cq** fid) { return fi_cq_open(domain_.get(), &cq_attr, fid, nullptr); }));
    BATON_RETURN_IF_ERROR(make("fi_mr_reg", region_, [&](fid_mr** fid) {
      return fi_mr_reg(domain_.get(), memory_.data(), memory_.size(), FI_WRITE | FI_REMOTE_WRITE | FI_READ | FI_REMOTE_READ, 0, 77, 0, fid, nullptr);
    }));
    BATON_RETURN_IF_ERROR(make("fi_endpoint", endpoint_, [&](fid_ep** fid) { return fi_endpoint(domain_.get(), info, fid, nullptr); }));
    int error = fi_ep_bind(endpoint_.get(), &addresses_->fid, 0);
    if (error == 0) error = fi_ep_bind(endpoint_.get(), &queue_->fid, FI_TRANSMIT | FI_RECV);
    if (error == 0) error = fi_enable(endpoint_.get());
    if (error == 0 && wants(FI_MR_ENDPOINT)) {
      error = fi_mr_bind(region_.get(), &endpoint_->fid, 0);
      if (error == 0) error = fi_mr_enable(region_.get());
    }
    if (error != 0) return failed("fi_enable", error);
    contexts_.resize(kMaxWindow);
    return {};
  }

  std::string name() const override {
    std::string name(512, '\0');
    size_t size = name.size();
    if (fi_getname(&endpoint_->fid, name.data(), &size) != 0 || size > name.size()) return "";
    name.resize(size);
    return name;
  }
  uint64_t remote_base() const override { return wants(FI_MR_VIRT_ADDR) ? reinterpret_cast<uint64_t>(memory_.data()) : 0; }
  uint64_t remote_key() const override { return fi_mr_key(region_.get()); }

  Status progress_until(const std::function<bool()>& stop) override {
    for (uint32_t turn = 0;; ++turn) {
      fi_cq_data_entry entries[64];
      ssize_t n = fi_cq_read(queue_.get(), entries, 64);
      if (n < 0 && n != -FI_EAGAIN) return completion_error(n);
      if (turn % 4096 == 0 && stop()) return {};
    }
  }

  Status connect(const std::string& name, uint64_t remote_base, uint64_t remote_key, int64_t timeout_ms) override {
    std::string padded = name;
    padded.resize(std::max<size_t>(name.size(), 512), '\0');
    int inserted = fi_av_insert(addresses_.get(), padded.data(), 1, &peer_, 0, nullptr);
    if (inserted != 1) return failed("fi_av_insert", inserted < 0 ? inserted : -FI_EINVAL);
    base_ = remote_base;
    key_ = remote_key;
    free_.clear();
    for (fi_context2& context : contexts_) free_.push_back(&context);
    transfer::BlockPair first{0, 0};
    return write({&first, 1}, 8, 1, timeout_ms).status();
  }

  Result<double> write(std::span<const transfer::BlockPair> blocks, uint64_t block_bytes, size_t window, int64_t timeout_ms) override {
    return move(blocks, block_bytes, window, timeout_ms, [this](std::byte* local, void* descriptor, uint64_t bytes, uint64_t remote, void* context) {
      return fi_write(endpoint_.get(), local, bytes, descriptor, peer_, remote, key_, context);
    });
  }
  Result<double> read(std::span<const transfer::BlockPair> blocks, uint64_t block_bytes, size_t window, int64_t timeout_ms) override {
    return move(blocks, block_bytes, window, timeout_ms, [this](std::byte* local, void* descriptor, uint64_t bytes, uint64_t remote, void* context) {
      return fi_read(endpoint_.get(), local, bytes, descriptor, peer_, remote, key_, context);
    });
  }

  Result<std::vector<double>> ping(uint64_t bytes, uint64_t count, int64_t timeout_ms) override {
    std::vector<double> round_trips_us;
    for (uint64_t i = 1; i <= count; ++i) {
      const int64_t begin_ns = SteadyClock::instance().now_ns();
      BATON_RETURN_IF_ERROR(post_counted(bytes));
      BATON_RETURN_IF_ERROR(poll_until([&] { return counted_ == i; }, timeout_ms));
      round_trips_us.push_back(static_cast<double>(SteadyClock::instance().now_ns() - begin_ns) * 1e-3);
    }
    BATON_RETURN_IF_ERROR(finish_counted(timeout_ms));
    return round_trips_us;
  }
  Status pong(uint64_t bytes, uint64_t count, int64_t timeout_ms) override {
    for (uint64_t i = 1; i <= count; ++i) {
      BATON_RETURN_IF_ERROR(poll_until([&] { return counted_ == i; }, timeout_ms));
      BATON_RETURN_IF_ERROR(post_counted(bytes));
    }
    return finish_counted(timeout_ms);
  }

 private:
  Status post_counted(uint64_t bytes) {
    iovec local{memory_.data(), bytes};
    fi_rma_iov remote{base_, bytes, key_};
    void* descriptor = wants(FI_MR_LOCAL) ? fi_mr_desc(region_.get()) : nullptr;
    if (free_.empty()) return internal_error("raw libfabric: {} writes have not ended", contexts_.size());
    fi_msg_rma write{};
    write.msg_iov = &local;
    write.desc = &descriptor;
    write.iov_count = 1;
    write.addr = peer_;
    write.rma_iov = &remote;
    write.rma_iov_count = 1;
    write.data = 1;
    while (true) {
      write.context = free_.back();
      ssize_t error = fi_writemsg(endpoint_.get(), &write, FI_COMPLETION | FI_REMOTE_CQ_DATA | (info_->tx_attr->op_flags & FI_DELIVERY_COMPLETE));
      if (error == 0) break;
      if (error != -FI_EAGAIN) return failed("fi_writemsg", error);
      BATON_RETURN_IF_ERROR(poll_counted());
    }
    free_.pop_back();
    return {};
  }
  Status poll_counted() {
    fi_cq_data_entry entries[16];
    ssize_t n = fi_cq_read(queue_.get(), entries, 16);
    if (n == -FI_EAGAIN) return {};
    if (n < 0) return completion_error(n);
    for (ssize_t i = 0; i < n; ++i) {
      if ((entries[i].flags & FI_REMOTE_CQ_DATA) != 0) {
        ++counted_;
      } else {
        free_.push_back(static_cast<fi_context2*>(entries[i].op_context));
      }
    }
    return {};
  }
  template <typename Over>
  Status poll_until(Over over, int64_t timeout_ms) {
    const int64_t deadline_ns = SteadyClock::instance().now_ns() + timeout_ms * 1'000'000;
    for (uint32_t turn = 1; !over(); ++turn) {
      BATON_RETURN_IF_ERROR(poll_counted());
      if (turn % 65536 == 0 && SteadyClock::instance().now_ns() > deadline_ns) return deadline_exceeded("raw libfabric: nothing came for {} ms", timeout_ms);
    }
    return {};
  }
  Status finish_counted(int64_t timeout_ms) {
    counted_ = 0;
    return poll_until([&] { return free_.size() == contexts_.size(); }, timeout_ms);
  }

  template <typename Post>
  Result<double> move(std::span<const transfer::BlockPair> blocks, uint64_t block_bytes, size_t window, int64_t timeout_ms, Post post) {
    window = std::min(window, kMaxWindow);
    size_t under_way = 0;
    void* descriptor = wants(FI_MR_LOCAL) ? fi_mr_desc(region_.get()) : nullptr;
    int64_t begin_ns = SteadyClock::instance().now_ns();
    int64_t deadline_ns = begin_ns + timeout_ms * 1'000'000;
    uint32_t idle_turns = 0;
    auto reap = [&]() -> Status {
      fi_cq_data_entry entries[64];
      ssize_t n = fi_cq_read(queue_.get(), entries, 64);
      if (n == -FI_EAGAIN) {
        // The clock is not part of what is measured: look at it rarely.
        if (++idle_turns % 65536 == 0 && SteadyClock::instance().now_ns() > deadline_ns) {
          return deadline_exceeded("raw libfabric: {} operations have not ended in {} ms", under_way, timeout_ms);
        }
        return {};
      }
      if (n < 0) return completion_error(n);
      for (ssize_t i = 0; i < n; ++i) free_.push_back(static_cast<fi_context2*>(entries[i].op_context));
      under_way -= static_cast<size_t>(n);
      return {};
    };
    for (const transfer::BlockPair& pair : blocks) {
      while (under_way >= window || (under_way > 0 && (under_way + 1) * block_bytes > kMaxInflightBytes)) BATON_RETURN_IF_ERROR(reap());
      fi_context2* context = free_.back();
      while (true) {
        ssize_t error = post(memory_.data() + pair.local_block * block_bytes, descriptor, block_bytes,
                             base_ + pair.remote_block * block_bytes, context);
        if (error == 0) break;
        if (error != -FI_EAGAIN) return failed("fi_write or fi_read", error);
        BATON_RETURN_IF_ERROR(reap());
        // What came back was put behind `context`.
        context = free_.back();
      }
      free_.pop_back();
      ++under_way;
    }
    while (under_way > 0) BATON_RETURN_IF_ERROR(reap());
    return static_cast<double>(SteadyClock::instance().now_ns() - begin_ns) * 1e-9;
  }

  template <typename Handle, typename Open>
  Status make(const char* what, Handle& handle, Open open) {
    typename Handle::Handle fid = nullptr;
    int error = open(&fid);
    if (error != 0) return failed(what, error);
    handle.reset(fid);
    return {};
  }
  bool wants(uint64_t bit) const { return (static_cast<uint64_t>(info_->domain_attr->mr_mode) & bit) != 0; }
  Status completion_error(ssize_t error) {
    if (error != -FI_EAVAIL) return failed("fi_cq_read", error);
    fi_cq_err_entry entry{};
    (void)fi_cq_readerr(queue_.get(), &entry, 0);
    return failed("an operation", -entry.err);
  }

  std::span<std::byte> memory_;
  Info info_;
  UniqueHandle<FidTraits<fid_fabric>> fabric_;
  UniqueHandle<FidTraits<fid_domain>> domain_;
  UniqueHandle<FidTraits<fid_av>> addresses_;
  UniqueHandle<FidTraits<fid_cq>> queue_;
  UniqueHandle<FidTraits<fid_mr>> region_;
  UniqueHandle<FidTraits<fid_ep>> endpoint_;
  fi_addr_t peer_ = FI_ADDR_UNSPEC;
  uint64_t base_ = 0, key_ = 0;
  std::vector<fi_context2> contexts_;  // one per write under way; the provider may use them
  std::vector<fi_context2*> free_;
  uint64_t counted_ = 0;  // of a conversation
};

}  // namespace

Result<std::unique_ptr<RawFabric>> RawFabric::open(const std::string& provider, const std::string& ip, std::span<std::byte> memory) {
  auto endpoint = std::make_unique<RawFabricEndpoint>(memory);
  BATON_RETURN_IF_ERROR(endpoint->open_all(provider, ip));
  return std::unique_ptr<RawFabric>(std::move(endpoint));
}

}  // namespace baton::ops
