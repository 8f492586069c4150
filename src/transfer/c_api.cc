#include "transfer/include/baton/transfer_c.h"

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <new>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "transfer/include/baton/transfer.h"

namespace bt = baton::transfer;
using baton::Status;
using baton::StatusCode;

struct baton_agent {
  std::unique_ptr<bt::Agent> agent;
  bool manual_progress = false;
};
struct baton_region {
  bt::MemoryRegion region;
};
struct baton_peer {
  bt::Peer peer;
};
struct baton_transfer {
  bt::Transfer transfer;
};

namespace {

#define BATON_SAME_CODE(c_code, code) static_assert(static_cast<int>(c_code) == static_cast<int>(StatusCode::code))
BATON_SAME_CODE(BATON_OK, kOk);
BATON_SAME_CODE(BATON_INVALID_ARGUMENT, kInvalidArgument);
BATON_SAME_CODE(BATON_NOT_FOUND, kNotFound);
BATON_SAME_CODE(BATON_UNAVAILABLE, kUnavailable);
BATON_SAME_CODE(BATON_DEADLINE_EXCEEDED, kDeadlineExceeded);
BATON_SAME_CODE(BATON_RESOURCE_EXHAUSTED, kResourceExhausted);
BATON_SAME_CODE(BATON_FAILED_PRECONDITION, kFailedPrecondition);
BATON_SAME_CODE(BATON_CANCELLED, kCancelled);
BATON_SAME_CODE(BATON_INTERNAL, kInternal);
BATON_SAME_CODE(BATON_DATA_LOSS, kDataLoss);
BATON_SAME_CODE(BATON_UNIMPLEMENTED, kUnimplemented);
BATON_SAME_CODE(BATON_ABORTED, kAborted);
#undef BATON_SAME_CODE

/// Cuts at `room` - 1 bytes; returns the whole length, as snprintf does.
size_t copy_text(std::string_view text, char* out, size_t room) noexcept {
  if (out != nullptr && room > 0) {
    size_t bytes = std::min(text.size(), room - 1);
    std::memcpy(out, text.data(), bytes);
    out[bytes] = '\0';
  }
  return text.size();
}

baton_code report(StatusCode code, std::string_view message, baton_error* error) noexcept {
  auto c_code = static_cast<baton_code>(code);
  if (error != nullptr) {
    error->code = c_code;
    copy_text(message, error->message, sizeof(error->message));
  }
  return c_code;
}

/// The border: whatever `body` throws or returns becomes a code and a message.
template <typename Body>
baton_code guarded(baton_error* error, Body&& body) noexcept {
  try {
    Status status = body();
    return report(status.code(), status.message(), error);
  } catch (const std::bad_alloc&) {
    return report(StatusCode::kResourceExhausted, "out of memory", error);
  } catch (const std::exception& exception) {
    return report(StatusCode::kInternal, exception.what(), error);
  } catch (...) {
    return report(StatusCode::kInternal, "unknown exception", error);
  }
}

/// For functions that have nowhere to put a failure.
template <typename Body, typename Value>
Value guarded_value(Value otherwise, Body&& body) noexcept {
  try {
    return body();
  } catch (...) {
    return otherwise;
  }
}

Status demand(bool there, const char* what) {
  return there ? Status() : baton::invalid_argument("{} is NULL", what);
}

/// The caller's structure in today's shape: what its `size` does not cover keeps the default.
template <typename Struct>
Status take(const Struct& from, const char* name, Struct* out) {
  static_assert(std::is_trivially_copyable_v<Struct> && offsetof(Struct, size) == 0);
  if (from.size < sizeof(size_t) * 2) {
    return baton::invalid_argument("{}: size is {}; set it up with {}_init()", name, from.size, name);
  }
  std::memcpy(out, &from, std::min(from.size, sizeof(Struct)));
  return Status();
}

/// The answer, as much of it as the caller's structure has room for; its `size` stays.
template <typename Struct>
Status give(Struct answer, const char* name, Struct* out) {
  if (out->size < sizeof(size_t) * 2) {
    return baton::invalid_argument("{}: size is {}; set it to sizeof({})", name, out->size, name);
  }
  answer.size = out->size;
  std::memcpy(out, &answer, std::min(out->size, sizeof(Struct)));
  return Status();
}

baton_agent_config default_config() {
  static const bt::AgentConfig defaults;
  baton_agent_config config{};
  config.size = sizeof(config);
  config.name = defaults.name.c_str();
  config.transport = defaults.transport.c_str();
  config.bind_address = defaults.bind_address.c_str();
  config.allow_tcp = defaults.allow_tcp ? 1 : 0;
  config.manual_progress = defaults.manual_progress ? 1 : 0;
  config.rails = defaults.rails;
  config.max_inflight_per_rail = defaults.max_inflight_per_rail;
  config.max_queued_transfers = defaults.max_queued_transfers;
  config.max_metadata_bytes = defaults.max_metadata_bytes;
  config.default_timeout_ms = defaults.default_timeout_ms;
  config.stall_timeout_ms = defaults.stall_timeout_ms;
  config.integrity = defaults.integrity ? 1 : 0;
  config.max_served_reads = defaults.max_served_reads;
  config.poll_us = defaults.poll_us;
  return config;
}

baton_write default_write() {
  baton_write write{};
  write.size = sizeof(write);
  return write;
}

baton_read default_read() {
  baton_read read{};
  read.size = sizeof(read);
  return read;
}

/// What a write and a read have in common.
template <typename From, typename To>
Status translate(const From& from, To* to) {
  BATON_RETURN_IF_ERROR(demand(from.blocks || from.block_count == 0, "blocks"));
  if (from.timeout_ms < 0) return baton::invalid_argument("timeout_ms is {}", from.timeout_ms);
  to->local_pool = static_cast<bt::PoolId>(from.local_pool);
  to->remote_pool = static_cast<bt::PoolId>(from.remote_pool);
  to->blocks.reserve(from.block_count);
  for (size_t i = 0; i < from.block_count; ++i) to->blocks.push_back({from.blocks[i].local_block, from.blocks[i].remote_block});
  to->offset_bytes = from.offset_bytes;
  to->length_bytes = from.length_bytes;
  if (from.timeout_ms > 0) {
    to->deadline = baton::Deadline::after_ms(baton::SteadyClock::instance(),
                                             std::min<int64_t>(from.timeout_ms, int64_t{1} << 40));
  }
  return Status();
}

std::function<void(const Status&)> callback(baton_done_function on_done, void* user) {
  if (on_done == nullptr) return {};
  return [on_done, user](const Status& status) {
    on_done(user, static_cast<baton_code>(status.code()), status.message().c_str());
  };
}

/// Of the structures with an _init function: the defaults, as far as the caller's structure goes.
template <typename Struct>
void initialise(Struct* out, size_t size, Struct defaults) {
  if (out == nullptr || size < sizeof(size_t)) return;
  std::memset(static_cast<void*>(out), 0, size);
  std::memcpy(out, &defaults, std::min(size, sizeof(Struct)));
  out->size = size;
}

}  // namespace

extern "C" {

const char* baton_transfer_version(void) { return BATON_VERSION; }
const char* baton_code_name(int code) {
  return baton::status_code_name(static_cast<StatusCode>(code)).data();  // literals: they end with NUL
}

void baton_set_log_level(baton_log_level level) { baton::set_log_level(static_cast<baton::LogLevel>(level)); }
void baton_set_log_function(void (*log)(void* user, baton_log_level level, const char* message), void* user) {
  (void)guarded(nullptr, [&] {
    if (log == nullptr) {
      baton::set_log_sink(nullptr);
    } else {
      baton::set_log_sink([log, user](baton::LogLevel level, std::string_view message) {
        log(user, static_cast<baton_log_level>(level), std::string(message).c_str());
      });
    }
    return Status();
  });
}

// --- agent ---

void baton_agent_config_init(baton_agent_config* config, size_t size) {
  initialise(config, size, default_config());
}

baton_code baton_agent_create(const baton_agent_config* config, baton_agent** agent, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(agent != nullptr, "agent"));
    baton_agent_config c = default_config();
    if (config != nullptr) BATON_RETURN_IF_ERROR(take(*config, "baton_agent_config", &c));
    BATON_RETURN_IF_ERROR(demand(c.name && c.transport && c.bind_address, "name, transport or bind_address"));
    bt::AgentConfig cpp;
    cpp.name = c.name;
    cpp.transport = c.transport;
    cpp.bind_address = c.bind_address;
    cpp.allow_tcp = c.allow_tcp != 0;
    cpp.manual_progress = c.manual_progress != 0;
    cpp.rails = c.rails;
    cpp.max_inflight_per_rail = c.max_inflight_per_rail;
    cpp.max_queued_transfers = c.max_queued_transfers;
    cpp.max_metadata_bytes = c.max_metadata_bytes;
    cpp.default_timeout_ms = c.default_timeout_ms;
    cpp.stall_timeout_ms = c.stall_timeout_ms;
    cpp.integrity = c.integrity != 0;
    cpp.max_served_reads = c.max_served_reads;
    cpp.poll_us = c.poll_us;
    auto handle = std::make_unique<baton_agent>();
    handle->manual_progress = cpp.manual_progress;
    BATON_ASSIGN_OR_RETURN(handle->agent, bt::Agent::create(std::move(cpp)));
    *agent = handle.release();
    return Status();
  });
}

void baton_agent_destroy(baton_agent* agent) { delete agent; }

uint64_t baton_agent_epoch(const baton_agent* agent) {
  return agent == nullptr ? 0 : static_cast<uint64_t>(agent->agent->epoch());
}

baton_code baton_agent_register_memory(baton_agent* agent, void* data, size_t bytes, int memory_kind,
                                       baton_region** region, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(agent && data && region, "agent, data or region"));
    if (memory_kind != BATON_MEMORY_HOST && memory_kind != BATON_MEMORY_CUDA) {
      return baton::invalid_argument("memory kind {} does not exist", memory_kind);
    }
    auto handle = std::make_unique<baton_region>();
    BATON_ASSIGN_OR_RETURN(handle->region, agent->agent->register_memory({static_cast<std::byte*>(data), bytes},
                                                                         static_cast<bt::MemoryKind>(memory_kind)));
    *region = handle.release();
    return Status();
  });
}

void baton_region_release(baton_region* region) { delete region; }

baton_code baton_agent_add_pool(baton_agent* agent, const baton_region* region, uint64_t stride_bytes, uint64_t count,
                                uint32_t* pool, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(agent && region && pool, "agent, region or pool"));
    BATON_ASSIGN_OR_RETURN(bt::PoolId id, agent->agent->add_pool({region->region, stride_bytes, count}));
    *pool = static_cast<uint32_t>(id);
    return Status();
  });
}

baton_code baton_agent_metadata(const baton_agent* agent, void* buffer, size_t* bytes, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(agent && bytes, "agent or bytes"));
    std::string metadata = agent->agent->metadata();
    size_t room = buffer == nullptr ? 0 : *bytes;
    *bytes = metadata.size();
    if (room < metadata.size()) {
      return baton::resource_exhausted("the metadata has {} bytes, there is room for {}", metadata.size(), room);
    }
    std::memcpy(buffer, metadata.data(), metadata.size());
    return Status();
  });
}

baton_code baton_agent_connect(baton_agent* agent, const void* metadata, size_t bytes, baton_peer** peer,
                               baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(agent && metadata && peer, "agent, metadata or peer"));
    auto handle = std::make_unique<baton_peer>();
    BATON_ASSIGN_OR_RETURN(handle->peer, agent->agent->connect({static_cast<const char*>(metadata), bytes}));
    *peer = handle.release();
    return Status();
  });
}

baton_code baton_agent_fence(baton_agent* agent, uint64_t epoch, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(agent, "agent"));
    return agent->agent->fence(static_cast<baton::Epoch>(epoch));
  });
}

baton_code baton_agent_progress(baton_agent* agent, size_t* count, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(agent, "agent"));
    if (!agent->manual_progress) {
      return baton::failed_precondition("the agent has a thread of its own (manual_progress is not set)");
    }
    size_t done = agent->agent->progress();
    if (count != nullptr) *count = done;
    return Status();
  });
}

baton_code baton_agent_get_stats(const baton_agent* agent, baton_agent_stats* stats, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(agent && stats, "agent or stats"));
    bt::AgentStats now = agent->agent->stats();
    baton_agent_stats c{};
    c.peers = now.peers;
    c.regions = now.regions;
    c.registered_bytes = now.registered_bytes;
    c.messages_sent = now.messages_sent;
    c.bytes_sent = now.bytes_sent;
    c.messages_received = now.messages_received;
    c.stray_messages = now.stray_messages;
    c.retries = now.retries;
    c.failed_transfers = now.failed_transfers;
    c.inbound_peers = now.inbound_peers;
    c.fences = now.fences;
    c.checked_blocks = now.checked_blocks;
    c.corrupt_blocks = now.corrupt_blocks;
    c.served_reads = now.served_reads;
    c.refused_reads = now.refused_reads;
    return give(c, "baton_agent_stats", stats);
  });
}

size_t baton_agent_describe(const baton_agent* agent, char* buffer, size_t bytes) {
  return guarded_value(size_t{0}, [&] {
    return copy_text(agent == nullptr ? "" : agent->agent->describe(), buffer, bytes);
  });
}

// --- receiving ---

baton_code baton_inbox_open(baton_agent* agent, baton_tag* tag, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(agent && tag, "agent or tag"));
    BATON_ASSIGN_OR_RETURN(bt::Tag opened, agent->agent->open_inbox());
    *tag = static_cast<baton_tag>(opened);
    return Status();
  });
}

baton_code baton_inbox_expect(baton_agent* agent, baton_tag tag, uint64_t messages, void (*on_complete)(void* user),
                              void* user, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(agent && on_complete, "agent or on_complete"));
    return agent->agent->expect(static_cast<bt::Tag>(tag), messages, [=] { on_complete(user); });
  });
}

baton_code baton_inbox_wait(baton_agent* agent, baton_tag tag, uint64_t messages, int64_t timeout_ms,
                            baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(agent, "agent"));
    if (agent->manual_progress) {
      return baton::failed_precondition("with manual_progress nobody but the caller makes progress");
    }
    const int64_t bounded_ms = std::clamp<int64_t>(timeout_ms, 0, int64_t{1} << 40);
    const auto deadline = baton::Deadline::after_ms(baton::SteadyClock::instance(), bounded_ms);
    return agent->agent->wait(static_cast<bt::Tag>(tag), messages, deadline);
  });
}

uint64_t baton_inbox_arrived(const baton_agent* agent, baton_tag tag) {
  return agent == nullptr ? 0 : agent->agent->arrived(static_cast<bt::Tag>(tag));
}

void baton_inbox_close(baton_agent* agent, baton_tag tag) {
  if (agent != nullptr) agent->agent->close_inbox(static_cast<bt::Tag>(tag));
}

// --- peers ---

uint64_t baton_peer_epoch(const baton_peer* peer) {
  return peer == nullptr ? 0 : static_cast<uint64_t>(peer->peer.epoch());
}
const char* baton_peer_name(const baton_peer* peer) { return peer == nullptr ? "" : peer->peer.name().c_str(); }
int baton_peer_alive(const baton_peer* peer) { return peer != nullptr && peer->peer.alive() ? 1 : 0; }

baton_code baton_peer_get_path(const baton_peer* peer, baton_path_info* path, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(peer && path, "peer or path"));
    bt::PathInfo now = peer->peer.path();
    baton_path_info c{};
    c.rails = now.rails;
    c.bandwidth_bytes_per_s = now.bandwidth_bytes_per_s;
    copy_text(now.transport, c.transport, sizeof(c.transport));
    copy_text(now.provider, c.provider, sizeof(c.provider));
    copy_text(now.reason, c.reason, sizeof(c.reason));
    return give(c, "baton_path_info", path);
  });
}

baton_code baton_peer_get_stats(const baton_peer* peer, baton_peer_stats* stats, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(peer && stats, "peer or stats"));
    bt::PeerStats now = peer->peer.stats();
    baton_peer_stats c{};
    c.writes = now.writes;
    c.messages = now.messages;
    c.bytes = now.bytes;
    c.failures = now.failures;
    c.cancelled = now.cancelled;
    c.busy_s = now.busy_s;
    c.reads = now.reads;
    c.read_bytes = now.read_bytes;
    return give(c, "baton_peer_stats", stats);
  });
}

baton_code baton_peer_close(baton_peer* peer, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(peer, "peer"));
    return peer->peer.close();
  });
}

void baton_peer_release(baton_peer* peer) { delete peer; }

// --- writing ---

void baton_write_init(baton_write* write, size_t size) { initialise(write, size, default_write()); }

baton_code baton_peer_write(baton_peer* peer, const baton_write* write, baton_done_function on_done, void* user,
                            baton_transfer** transfer_out, uint64_t* messages, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(peer && write, "peer or write"));
    baton_write c = default_write();
    BATON_RETURN_IF_ERROR(take(*write, "baton_write", &c));
    bt::BlockWrite cpp;
    BATON_RETURN_IF_ERROR(translate(c, &cpp));
    cpp.tag = static_cast<bt::Tag>(c.tag);
    // Before the write: nothing may fail after it.
    auto handle = transfer_out == nullptr ? nullptr : std::make_unique<baton_transfer>();
    BATON_ASSIGN_OR_RETURN(bt::Transfer started, peer->peer.write(std::move(cpp), callback(on_done, user)));
    if (messages != nullptr) *messages = started.messages();
    if (handle != nullptr) {
      handle->transfer = std::move(started);
      *transfer_out = handle.release();
    }
    return Status();
  });
}

// --- reading ---

void baton_read_init(baton_read* read, size_t size) { initialise(read, size, default_read()); }

baton_code baton_peer_read(baton_peer* peer, const baton_read* read, baton_done_function on_done, void* user,
                           baton_transfer** transfer_out, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(peer && read, "peer or read"));
    baton_read c = default_read();
    BATON_RETURN_IF_ERROR(take(*read, "baton_read", &c));
    bt::BlockRead cpp;
    BATON_RETURN_IF_ERROR(translate(c, &cpp));
    auto handle = transfer_out == nullptr ? nullptr : std::make_unique<baton_transfer>();
    BATON_ASSIGN_OR_RETURN(bt::Transfer started, peer->peer.read(std::move(cpp), callback(on_done, user)));
    if (handle != nullptr) {
      handle->transfer = std::move(started);
      *transfer_out = handle.release();
    }
    return Status();
  });
}

int baton_transfer_done(const baton_transfer* transfer) {
  return transfer != nullptr && transfer->transfer.done() ? 1 : 0;
}

baton_code baton_transfer_status(const baton_transfer* transfer, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(transfer, "transfer"));
    if (!transfer->transfer.done()) return baton::failed_precondition("the transfer is under way");
    return transfer->transfer.status();
  });
}

baton_code baton_transfer_wait(const baton_transfer* transfer, baton_error* error) {
  return guarded(error, [&]() -> Status {
    BATON_RETURN_IF_ERROR(demand(transfer, "transfer"));
    return transfer->transfer.wait();
  });
}

uint64_t baton_transfer_messages(const baton_transfer* transfer) {
  return transfer == nullptr ? 0 : transfer->transfer.messages();
}
uint64_t baton_transfer_bytes(const baton_transfer* transfer) {
  return transfer == nullptr ? 0 : transfer->transfer.bytes();
}
void baton_transfer_cancel(const baton_transfer* transfer) {
  (void)guarded(nullptr, [&] {
    if (transfer != nullptr) transfer->transfer.cancel();
    return Status();
  });
}
int baton_transfer_settled(const baton_transfer* transfer) {
  return transfer != nullptr && transfer->transfer.done() && transfer->transfer.settled() ? 1 : 0;
}
void baton_transfer_release(baton_transfer* transfer) { delete transfer; }

}  // extern "C"
