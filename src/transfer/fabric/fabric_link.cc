#include "transfer/fabric/fabric_link.h"

#include <algorithm>

#include "base/check.h"
#include "base/log.h"
#include "transfer/fabric/fabric_backend_impl.h"

namespace baton::transfer::fabric {
namespace {

constexpr int64_t kFirstRetryNs = 1'000'000'000;
constexpr int64_t kLongestRetryNs = 8'000'000'000;
constexpr int64_t kGreetingNs = 3'000'000'000;

}  // namespace

FabricLink::FabricLink(FabricBackend& backend, ControlPlane::Id id, std::string peer_name)
    : backend_(backend), id_(id), peer_name_(std::move(peer_name)) {}

FabricLink::~FabricLink() {
  // The endpoints first: the peer may reuse its memory as soon as the control connection is closed.
  for (Path& path : paths_) {
    release_outstanding(path, nullptr);
    close_path(path);
  }
  backend_.forget(*this);
}

bool FabricLink::closable() const {
  return outstanding_ == 0 || backend_.rails_.front()->provider().endpoint_per_peer;
}

bool FabricLink::can_fail_over() const {
  return paths_.size() > 1 && backend_.rails_.front()->provider().endpoint_per_peer;
}

Rail& FabricLink::rail(uint32_t index) const { return *backend_.rails_[index]; }

Status FabricLink::open(const Welcome& welcome) {
  const size_t count = std::min(welcome.rails.size(), backend_.rails_.size());
  if (count == 0) return invalid_argument("'{}' offers no rail", peer_name_);
  paths_.resize(count);
  states_.resize(count);
  for (const Welcome::Pool& pool : welcome.pools) {
    if (pool.rail >= count) continue;
    if (pool.id >= kFirstReservedTag) {
      paths_[pool.rail].greeting_tag = pool.id;
      paths_[pool.rail].greeting_target = {pool.base, pool.key};
    } else {
      paths_[pool.rail].pools[pool.id] = {pool.base, pool.key};
    }
  }
  for (uint32_t i = 0; i < count; ++i) {
    Status status = open_path(i, welcome.rails[i]);
    if (!status.ok()) {
      paths_.clear();
      return status.with_context(fmt::format("rail {} to '{}'", i, peer_name_));
    }
  }
  return {};
}

Status FabricLink::open_path(uint32_t index, const std::string& address) {
  Path& path = paths_[index];
  if (rail(index).provider().endpoint_per_peer) {
    BATON_ASSIGN_OR_RETURN(path.own_endpoint, rail(index).open_endpoint(rail(index).queue()));
  }
  const Endpoint& endpoint = path.own_endpoint ? path.own_endpoint : rail(index).shared_endpoint();
  path.endpoint = endpoint.get();
  path.addresses = endpoint.addresses;
  BATON_ASSIGN_OR_RETURN(path.address, path.addresses->add(address));
  path.next_sequence = 0;
  path.phase = Phase::kUp;
  path.opened_ns = backend_.now_ns();
  path.greeting_posted = path.greeted = !path.own_endpoint;
  states_[index].usable = path.greeted;
  greeted_ = greeted_ || path.greeted;
  if (path.own_endpoint) {
    if (path.greeting_tag == 0) return invalid_argument("'{}' does not say how to greet it", peer_name_);
    backend_.add_greeting(*this);
  }
  return {};
}

bool FabricLink::greet() {
  bool left = false;
  for (uint32_t i = 0; i < paths_.size() && !dead_; ++i) {
    Path& path = paths_[i];
    if (path.phase != Phase::kUp || path.greeting_posted) continue;
    Status status = post_greeting(i);
    if (status.ok()) {
      left = left || !path.greeting_posted;
    } else if (can_fail_over()) {
      fail_rail(i, status, nullptr);
    } else {
      backend_.report_failure(*this, status);
    }
  }
  return left;
}

Status FabricLink::post_greeting(uint32_t index) { return post_small_write(index, true, &paths_[index].greeting_posted); }

Status FabricLink::post_small_write(uint32_t index, bool greeting, bool* posted) {
  Path& path = paths_[index];
  const FabricRegion::OnRail& region = backend_.greeting_region().rails[index];
  constexpr size_t kBytes = 8;
  iovec local = {backend_.greeting_region().data, kBytes};
  fi_rma_iov remote = {path.greeting_target.base, kBytes, path.greeting_target.key};
  void* descriptor = region.descriptor;
  Operation* operation = backend_.take_operation();
  operation->link = this;
  operation->rail = index;
  operation->greeting = greeting;
  operation->confirms = !greeting;
  operation->message = {};
  fi_msg_rma write{};
  write.msg_iov = &local;
  write.desc = &descriptor;
  write.iov_count = 1;
  write.addr = path.address;
  write.rma_iov = &remote;
  write.rma_iov_count = 1;
  write.context = &operation->context;
  write.data = path.greeting_tag;
  uint64_t flags = FI_COMPLETION | (greeting ? FI_REMOTE_CQ_DATA : 0);
  if (rail(index).provider().delivery_complete) flags |= FI_DELIVERY_COMPLETE;
  ssize_t ret = fi_writemsg(path.endpoint, &write, flags);
  if (ret != 0) {
    backend_.release(operation);
    if (ret == -FI_EAGAIN) return {};  // not connected yet, or no room
    return unavailable("fi_writemsg on rail {}: {}", index, fi_strerror(static_cast<int>(-ret)));
  }
  *posted = true;
  path.outstanding.push_back(operation);
  ++outstanding_;
  return {};
}

bool FabricLink::confirm(int64_t age_ns) {
  if (unconfirmed_ == 0 || dead_ || paths_.empty()) return false;
  if (confirming_ || backend_.now_ns() - unconfirmed_since_ns_ < age_ns) return true;
  if (Status status = post_small_write(0, false, &confirming_); !status.ok()) backend_.report_failure(*this, status);
  return true;
}

/// All that was posted before it is delivered. What waits for a word of its own gets that.
void FabricLink::on_confirmed(const Operation& operation) {
  confirming_ = false;
  std::deque<Operation*>& outstanding = paths_[operation.rail].outstanding;
  const auto end = std::find(outstanding.begin(), outstanding.end(), &operation);
  BATON_CHECK(end != outstanding.end());
  std::deque<Operation*> later(end + 1, outstanding.end());
  std::deque<Operation*> kept;
  for (auto it = outstanding.begin(); it != end; ++it) {
    Operation* one = *it;
    // Its own completion has been read before, since a queue keeps the order of an endpoint; if not, it is waited for.
    if (!one->message.end_can_wait || !one->sent) {
      kept.push_back(one);
      continue;
    }
    --outstanding_;
    --unconfirmed_;
    states_[one->rail].meter.delivered(one->message.bytes, backend_.now_ns());
    backend_.report(*this, one->message.cookie, Status());
    backend_.release(one);
  }
  --outstanding_;
  kept.insert(kept.end(), later.begin(), later.end());
  outstanding = std::move(kept);
  unconfirmed_since_ns_ = backend_.now_ns();
}

void FabricLink::on_greeted(Operation& operation, const Status& status) {
  if (!status.ok() && can_fail_over()) return fail_rail(operation.rail, status, &operation);
  Path& path = paths_[operation.rail];
  BATON_CHECK(std::erase(path.outstanding, &operation) == 1);
  --outstanding_;
  if (!status.ok()) return backend_.report_failure(*this, status);
  path.greeted = greeted_ = true;
  states_[operation.rail].usable = true;
  backend_.count_opened_rail();
}

void FabricLink::close_path(Path& path) {
  path.own_endpoint.reset();
  path.endpoint = nullptr;
  if (path.addresses != nullptr) path.addresses->remove(std::exchange(path.address, FI_ADDR_UNSPEC));
  path.addresses.reset();
}

Result<PostResult> FabricLink::post(const BackendMessage& message) {
  if (!ready()) return PostResult::kAgain;
  if (!paths_.front().pools.contains(message.remote_pool)) {
    return failed_precondition("'{}' did not open pool {} for {}", peer_name_, message.remote_pool, backend_.transport());
  }
  HeldMessage held;
  BATON_CHECK(!message.segments.empty() && message.segments.size() <= HeldMessage::kMaxSegments);
  std::copy(message.segments.begin(), message.segments.end(), held.segments);
  held.segment_count = static_cast<uint32_t>(message.segments.size());
  held.bytes = message.bytes;
  held.local = static_cast<const FabricRegion*>(message.local);
  held.remote_pool = message.remote_pool;
  held.tag = message.tag;
  held.cookie = message.cookie;
  held.end_can_wait = message.end_can_wait && backend_.confirms_later();
  if (!again_.empty()) return PostResult::kFull;  // those have waited longer
  return post_somewhere(held);
}

Result<PostResult> FabricLink::post_somewhere(const HeldMessage& message) {
  if (paths_.size() == 1) return post_on(0, message);
  while (true) {
    std::optional<uint32_t> best = choose_rail(states_, message.bytes, backend_.rail_window());
    if (!best) return PostResult::kFull;
    Result<PostResult> result = post_on(*best, message);
    if (result.ok() || !can_fail_over()) return result;
    fail_rail(*best, result.status(), nullptr);
  }
}

Result<PostResult> FabricLink::post_on(uint32_t index, const HeldMessage& message) {
  Path& path = paths_[index];
  auto pool = path.pools.find(message.remote_pool);
  if (pool == path.pools.end()) {
    return failed_precondition("'{}' did not open pool {} on rail {}", peer_name_, message.remote_pool, index);
  }
  const FabricRegion::OnRail& local_region = message.local->rails[index];
  iovec local[HeldMessage::kMaxSegments];
  fi_rma_iov remote[HeldMessage::kMaxSegments];
  void* descriptors[HeldMessage::kMaxSegments];
  for (size_t i = 0; i < message.segment_count; ++i) {
    const Segment& segment = message.segments[i];
    local[i] = {message.local->data + segment.local_offset, segment.bytes};
    remote[i] = {pool->second.base + segment.remote_offset, segment.bytes, pool->second.key};
    descriptors[i] = local_region.descriptor;
  }
  Operation* operation = backend_.take_operation();
  operation->link = this;
  operation->rail = index;
  operation->message = message;
  fi_msg_rma write{};
  write.msg_iov = local;
  write.desc = descriptors;
  write.iov_count = message.segment_count;
  write.addr = path.address;
  write.rma_iov = remote;
  write.rma_iov_count = message.segment_count;
  write.context = &operation->context;
  write.data = static_cast<uint32_t>(message.tag);
  uint64_t flags = FI_COMPLETION;
  if (rail(index).provider().delivery_complete && !message.end_can_wait) flags |= FI_DELIVERY_COMPLETE;
  if (message.tag != Tag::kNone) flags |= FI_REMOTE_CQ_DATA;
  ssize_t ret = fi_writemsg(path.endpoint, &write, flags);
  if (ret != 0) {
    backend_.release(operation);
    if (ret == -FI_EAGAIN) return PostResult::kAgain;
    return unavailable("fi_writemsg on rail {}: {}", index, fi_strerror(static_cast<int>(-ret)));
  }
  operation->message.sequence = message.tag != Tag::kNone ? path.next_sequence++ : HeldMessage::kUncounted;
  path.outstanding.push_back(operation);
  states_[index].meter.posted(message.bytes, backend_.now_ns());
  ++outstanding_;
  if (message.end_can_wait) {
    if (unconfirmed_++ == 0) unconfirmed_since_ns_ = backend_.now_ns();
    backend_.add_unconfirmed(*this);
  }
  return PostResult::kPosted;
}

bool FabricLink::on_completed(Operation& operation, const Status& status) {
  if (operation.greeting) {
    on_greeted(operation, status);
    return true;
  }
  if (operation.confirms && status.ok()) {
    on_confirmed(operation);
    return true;
  }
  if (operation.confirms) {
    std::erase(paths_[operation.rail].outstanding, &operation);
    --outstanding_;
    backend_.report_failure(*this, status);
    return true;
  }
  if (operation.message.end_can_wait && status.ok()) {
    operation.sent = true;
    return false;
  }
  const uint32_t index = operation.rail;
  if (!status.ok() && can_fail_over()) {
    fail_rail(index, status, &operation);
    return true;
  }
  Path& path = paths_[index];
  auto it = std::find(path.outstanding.begin(), path.outstanding.end(), &operation);
  BATON_CHECK(it != path.outstanding.end());
  path.outstanding.erase(it);
  --outstanding_;
  if (operation.message.end_can_wait) --unconfirmed_;
  RailState& state = states_[index];
  state.meter.delivered(status.ok() ? operation.message.bytes : 0, backend_.now_ns());
  if (status.ok() && state.probing) {
    state.probing = false;
    path.backoff_ns = 0;
    log_info("transfer {}: rail {} ({}) to '{}' works again", backend_.agent_name(), index, rail(index).config().address,
             peer_name_);
  }
  backend_.report(*this, operation.message.cookie, status);
  return true;
}

void FabricLink::release_outstanding(Path& path, const Operation* completed) {
  for (Operation* operation : path.outstanding) {
    --outstanding_;
    if (operation != completed) backend_.orphan(operation);
  }
  path.outstanding.clear();
  unconfirmed_ = 0;
  confirming_ = false;
}

void FabricLink::fail_rail(uint32_t index, const Status& why, const Operation* completed) {
  Path& path = paths_[index];
  if (path.phase != Phase::kUp) return;
  for (const Operation* operation : path.outstanding) {
    if (!operation->greeting) path.held.push_back(operation->message);
  }
  log_warning("transfer {}: rail {} ({}) to '{}' is out: {}; {} messages move to {} other rails", backend_.agent_name(), index,
              rail(index).config().address, peer_name_, why.to_string(), path.held.size(),
              std::count_if(states_.begin(), states_.end(), [](const RailState& state) { return state.usable; }) -
                  (states_[index].usable ? 1 : 0));
  release_outstanding(path, completed);
  close_path(path);
  path.phase = Phase::kAsking;
  states_[index].usable = false;
  states_[index].probing = false;
  states_[index].meter.reset();
  backend_.count_rail_failure();
  RailNote note{RailNote::Kind::kDown, static_cast<uint16_t>(index), path.generation, 0, {}};
  if (!backend_.send_note(id_, note)) backend_.report_failure(*this, unavailable("the control connection is gone"));
}

void FabricLink::on_note(const RailNote& note) {
  if (note.rail >= paths_.size()) return;
  Path& path = paths_[note.rail];
  if (note.generation != path.generation) return;  // of an earlier life of the rail
  const int64_t now_ns = backend_.now_ns();
  const auto retry_later = [&] {
    path.phase = Phase::kDown;
    path.backoff_ns = path.backoff_ns == 0 ? kFirstRetryNs : std::min(2 * path.backoff_ns, kLongestRetryNs);
    path.retry_at_ns = now_ns + path.backoff_ns;
  };
  if (note.kind == RailNote::Kind::kCount && path.phase == Phase::kAsking) {
    if (note.count > path.next_sequence) {
      backend_.report_failure(*this, invalid_argument("'{}' counted {} messages on rail {}, {} were sent", peer_name_,
                                                      note.count, note.rail, path.next_sequence));
      return;
    }
    for (const HeldMessage& message : std::exchange(path.held, {})) {
      if (message.sequence < note.count) {
        backend_.report(*this, message.cookie, Status());
      } else {
        again_.push_back(message);
      }
    }
    retry_later();
  } else if (note.kind == RailNote::Kind::kReady && path.phase == Phase::kReopening) {
    path.greeting_tag = static_cast<uint32_t>(note.count);
    Status opened = note.address.empty() ? unavailable("the peer could not open it") : open_path(note.rail, note.address);
    if (opened.ok()) {
      states_[note.rail].probing = true;
    } else {
      log_debug("transfer {}: rail {} to '{}': {}", backend_.agent_name(), note.rail, peer_name_, opened.to_string());
      retry_later();
    }
  }
}

bool FabricLink::wants_tick() const {
  if (!can_fail_over() || dead_) return false;
  return outstanding_ > 0 || !again_.empty() ||
         std::any_of(paths_.begin(), paths_.end(),
                     [](const Path& path) { return path.phase != Phase::kUp || !path.greeted; });
}

size_t FabricLink::tick(int64_t now_ns) {
  if (!can_fail_over() || dead_) return 0;
  size_t count = 0;
  if (std::optional<uint32_t> stalled = find_stalled_rail(states_, now_ns)) {
    fail_rail(*stalled, deadline_exceeded("nothing came back for {} ms while other rails work",
                                          (now_ns - states_[*stalled].meter.last_sign_ns()) / 1'000'000), nullptr);
    ++count;
  }
  while (!again_.empty()) {
    Result<PostResult> result = post_somewhere(again_.front());
    if (!result.ok()) {
      backend_.report_failure(*this, result.status());
      break;
    }
    if (*result != PostResult::kPosted) break;
    again_.pop_front();
    ++count;
  }
  for (uint32_t i = 0; i < paths_.size(); ++i) {
    Path& path = paths_[i];
    if (path.phase == Phase::kUp && !path.greeted && now_ns - path.opened_ns > kGreetingNs) {
      fail_rail(i, deadline_exceeded("no connection within {} ms", kGreetingNs / 1'000'000), nullptr);
      ++count;
    }
    if (path.phase != Phase::kDown || now_ns < path.retry_at_ns) continue;
    path.phase = Phase::kReopening;
    RailNote note{RailNote::Kind::kOpen, static_cast<uint16_t>(i), ++path.generation, 0, {}};
    if (!backend_.send_note(id_, note)) backend_.report_failure(*this, unavailable("the control connection is gone"));
    ++count;
  }
  return count;
}

std::string FabricLink::describe() const {
  std::string text;
  for (uint32_t i = 0; i < paths_.size(); ++i) {
    if (i > 0) text += ", ";
    const RailState& state = states_[i];
    text += fmt::format("{} {}", rail(i).config().address.empty() ? fmt::format("rail {}", i) : rail(i).config().address,
                        !state.usable ? std::string(paths_[i].phase == Phase::kUp ? "connecting" : "down")
                                      : fmt::format("{:.0f} MB/s, {:.1f} MB", state.meter.bytes_per_s() * 1e-6,
                                                    static_cast<double>(state.meter.delivered_bytes()) * 1e-6));
  }
  return text;
}

}  // namespace baton::transfer::fabric
