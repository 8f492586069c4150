#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/random.h"
#include "transfer/fabric/provider.h"
#include "transfer/inbox.h"

namespace baton::transfer {

/// Makes libfabric's tcp behave as EFA may: "not now", writes that overtake each other, completions in any order, one
/// piece per write, four bytes of CQ data. Works by swapping function tables of the provider's objects at run time, so
/// that everything below is the real thing.
///
/// One at a time, alive for longer than every agent.
class FabricInjector final : public fabric::OpenObserver {
 public:
  struct Options {
    uint64_t seed = 1;
    double again = 0;    ///< share of posts that are refused with FI_EAGAIN
    double overtake = 0; ///< share of posts that go out after later ones (the provider says "posted" at once)
    double reorder = 0;  ///< share of completions, of either side, that are told after later ones
    bool efa_limits = true;
    bool shared_endpoint = false;  ///< one endpoint for all peers, as EFA has it
    int lost_greetings = 0;  ///< so many of the first messages on new endpoints end with an error: the peer died meanwhile
  };
  struct Counts {
    uint64_t posts = 0, again = 0, overtaken = 0, reordered = 0, lost_greetings = 0;
    uint64_t violations = 0;  ///< posts that EFA would not have taken
  };

  explicit FabricInjector(Options options) : options_(options), random_(options.seed) {
    fabric::open_observer = this;
    current_ = this;
  }
  ~FabricInjector() override {
    fabric::open_observer = nullptr;
    current_ = nullptr;
  }

  Counts counts() const {
    std::lock_guard lock(mutex_);
    return counts_;
  }

  void on_provider(fabric::Provider& provider) override {
    if (options_.efa_limits) provider.max_segments = 1;
    if (options_.shared_endpoint) provider.endpoint_per_peer = false;
  }
  void on_fabric(fid_fabric* fabric) override {
    std::lock_guard lock(mutex_);
    real_trywait_ = fabric->ops->trywait;
    fabric_ops_ = *fabric->ops;
    fabric_ops_.trywait = [](fid_fabric* f, fid** fids, int count) { return current_->trywait(f, fids, count); };
    fabric->ops = &fabric_ops_;
  }
  void on_queue(fid_cq* queue) override {
    std::lock_guard lock(mutex_);
    auto state = std::make_unique<Queue>();
    state->real = queue->ops;
    state->ops = *queue->ops;
    state->ops.read = [](fid_cq* q, void* out, size_t count) { return current_->read(q, out, count); };
    state->ops.readerr = [](fid_cq* q, fi_cq_err_entry* out, uint64_t flags) {
      return current_->read_error(q, out, flags);
    };
    queue->ops = &state->ops;
    queues_[&queue->fid] = std::move(state);
  }
  void on_endpoint(fid_ep* endpoint) override {
    std::lock_guard lock(mutex_);
    auto state = std::make_unique<Endpoint>();
    state->real = endpoint->rma;
    state->rma = *endpoint->rma;
    state->rma.writemsg = [](fid_ep* ep, const fi_msg_rma* message, uint64_t flags) {
      return current_->write(ep, message, flags);
    };
    endpoint->rma = &state->rma;
    state->real_fid = endpoint->fid.ops;
    state->fid_ops = *endpoint->fid.ops;
    state->fid_ops.bind = [](fid* ep, fid* other, uint64_t flags) { return current_->bind(ep, other, flags); };
    state->fid_ops.close = [](fid* ep) { return current_->close(ep); };
    endpoint->fid.ops = &state->fid_ops;
    endpoints_[&endpoint->fid] = std::move(state);
  }

 private:
  static constexpr size_t kMaxPieces = 4;
  /// A write that the caller believes to be posted.
  struct Late {
    fid_ep* endpoint;
    fi_msg_rma message;
    uint64_t flags;
    std::array<iovec, kMaxPieces> local;
    std::array<void*, kMaxPieces> descriptors;
    std::array<fi_rma_iov, kMaxPieces> remote;
    uint64_t turns;
  };
  struct Queue {
    fi_ops_cq* real;
    fi_ops_cq ops;
    std::deque<Late> late;
    std::vector<std::pair<fi_cq_data_entry, uint64_t>> held;  // and for how many turns
    std::deque<std::pair<void*, int>> errors;                 // late posts that failed
    bool release_all = false;  // an endpoint was closed: what it completed must be told before "empty"
  };
  struct Endpoint {
    fi_ops_rma* real;
    fi_ops_rma rma;
    fi_ops* real_fid;
    fi_ops fid_ops;
    Queue* queue = nullptr;
  };

  uint64_t some_turns() { return 1 + random_.below(12); }

  ssize_t write(fid_ep* ep, const fi_msg_rma* message, uint64_t flags) {
    std::lock_guard lock(mutex_);
    Endpoint& endpoint = *endpoints_.at(&ep->fid);
    ++counts_.posts;
    if (options_.efa_limits && (message->iov_count != 1 || message->rma_iov_count != 1 || message->data >> 32 != 0)) {
      ++counts_.violations;
      return -FI_EINVAL;
    }
    if (random_.chance(options_.again)) {
      ++counts_.again;
      return -FI_EAGAIN;
    }
    if (message->data >= kFirstReservedTag && counts_.lost_greetings < static_cast<uint64_t>(options_.lost_greetings)) {
      ++counts_.lost_greetings;
      endpoint.queue->errors.emplace_back(message->context, FI_ECONNRESET);
      return 0;
    }
    if (!random_.chance(options_.overtake)) return endpoint.real->writemsg(ep, message, flags);
    ++counts_.overtaken;
    Late& late = endpoint.queue->late.emplace_back();
    late.endpoint = ep;
    late.message = *message;
    late.flags = flags;
    for (size_t i = 0; i < message->iov_count; ++i) {
      late.local[i] = message->msg_iov[i];
      if (message->desc != nullptr) late.descriptors[i] = message->desc[i];
    }
    for (size_t i = 0; i < message->rma_iov_count; ++i) late.remote[i] = message->rma_iov[i];
    late.turns = some_turns();
    return 0;
  }

  void post_late(Queue& queue) {
    for (size_t i = 0, n = queue.late.size(); i < n; ++i) {
      Late late = queue.late.front();
      queue.late.pop_front();
      if (late.turns > 0) --late.turns;
      late.message.msg_iov = late.local.data();
      late.message.desc = late.descriptors.data();
      late.message.rma_iov = late.remote.data();
      ssize_t ret = late.turns > 0 ? -FI_EAGAIN
                                   : endpoints_.at(&late.endpoint->fid)->real->writemsg(late.endpoint, &late.message, late.flags);
      if (ret == -FI_EAGAIN) {
        queue.late.push_back(late);
      } else if (ret != 0) {
        queue.errors.emplace_back(late.message.context, static_cast<int>(-ret));
      }
    }
  }

  ssize_t read(fid_cq* q, void* out, size_t count) {
    std::lock_guard lock(mutex_);
    Queue& queue = *queues_.at(&q->fid);
    post_late(queue);
    if (!queue.errors.empty()) return -FI_EAVAIL;
    std::vector<fi_cq_data_entry> entries(count);
    ssize_t n = queue.real->read(q, entries.data(), count);
    if (n < 0 && n != -FI_EAGAIN) return n;
    entries.resize(static_cast<size_t>(std::max<ssize_t>(n, 0)));
    std::vector<fi_cq_data_entry> told;
    for (const fi_cq_data_entry& entry : entries) {
      if (random_.chance(options_.reorder)) {
        ++counts_.reordered;
        queue.held.emplace_back(entry, some_turns());
      } else {
        told.push_back(entry);
      }
    }
    std::erase_if(queue.held, [&](auto& held) {
      if (held.second > 0) --held.second;
      bool due = (held.second == 0 || queue.release_all) && told.size() < count;
      if (due) told.insert(told.begin() + static_cast<ptrdiff_t>(random_.below(told.size() + 1)), held.first);
      return due;
    });
    if (queue.held.empty()) queue.release_all = false;
    if (told.empty()) return -FI_EAGAIN;
    std::copy(told.begin(), told.end(), static_cast<fi_cq_data_entry*>(out));
    return static_cast<ssize_t>(told.size());
  }

  ssize_t read_error(fid_cq* q, fi_cq_err_entry* out, uint64_t flags) {
    std::lock_guard lock(mutex_);
    Queue& queue = *queues_.at(&q->fid);
    if (queue.errors.empty()) return queue.real->readerr(q, out, flags);
    *out = {};
    out->op_context = queue.errors.front().first;
    out->flags = FI_RMA | FI_WRITE;
    out->err = queue.errors.front().second;
    queue.errors.pop_front();
    return 1;
  }

  /// Nobody may sleep while something is kept back here.
  int trywait(fid_fabric* fabric, fid** fids, int count) {
    std::lock_guard lock(mutex_);
    for (const auto& [queue_fid, queue] : queues_) {
      if (!queue->late.empty() || !queue->held.empty() || !queue->errors.empty()) return -FI_EAGAIN;
    }
    return real_trywait_(fabric, fids, count);
  }

  int bind(fid* ep, fid* other, uint64_t flags) {
    std::lock_guard lock(mutex_);
    Endpoint& endpoint = *endpoints_.at(ep);
    if (auto it = queues_.find(other); it != queues_.end()) endpoint.queue = it->second.get();
    return endpoint.real_fid->bind(ep, other, flags);
  }

  int close(fid* ep) {
    std::lock_guard lock(mutex_);
    auto node = endpoints_.extract(ep);
    Endpoint& endpoint = *node.mapped();
    if (endpoint.queue != nullptr) {
      std::erase_if(endpoint.queue->late, [&](const Late& late) { return &late.endpoint->fid == ep; });
      endpoint.queue->release_all = true;
    }
    ep->ops = endpoint.real_fid;
    return endpoint.real_fid->close(ep);
  }

  static inline FabricInjector* current_ = nullptr;
  const Options options_;
  mutable std::mutex mutex_;
  Random random_;
  Counts counts_;
  int (*real_trywait_)(fid_fabric*, fid**, int) = nullptr;
  fi_ops_fabric fabric_ops_{};
  std::unordered_map<fid*, std::unique_ptr<Endpoint>> endpoints_;
  std::unordered_map<fid*, std::unique_ptr<Queue>> queues_;
};

}  // namespace baton::transfer
