#include <algorithm>
#include <limits>
#include <tuple>
#include <utility>

#include "base/check.h"
#include "base/log.h"
#include "transfer/agent_impl.h"

/// Reads, above all backends. reads.h has the conversation.
namespace baton::transfer {

// --- the reader ---

Result<TransferPointer> AgentCore::read(const PeerPaths& paths, BlockRead read, std::function<void(const Status&)> on_done) {
  BATON_ASSIGN_OR_RETURN(Ends ends, check_ends(paths.main().metadata, read.local_pool, read.remote_pool, read.blocks,
                                               read.offset_bytes, read.length_bytes, "<-"));
  std::shared_ptr<PeerCore> peer = paths.of(ends.local.region.impl()->kind(), ends.remote.kind);
  // What is checked must be what the owner has, so the owner has a part in it.
  const bool direct = peer != nullptr && peer->backend->reads_directly() && !config_.integrity;
  // The request can go any way; how the blocks come is the owner's choice.
  for (size_t i = 0; i < PeerPaths::kPaths && peer == nullptr; ++i) peer = paths.cores[i];

  auto transfer = std::make_shared<Transfer::Impl>();
  transfer->agent = weak_from_this();
  transfer->peer = peer;
  transfer->is_read = true;
  transfer->byte_count = read.blocks.size() * read.length_bytes;
  transfer->local_region = ends.local.region;
  transfer->remote_pool = ends.remote.id;
  transfer->deadline_ns = deadline_ns(read.deadline);
  transfer->on_done = std::move(on_done);
  if (direct) {
    BlockWrite same;
    same.blocks = std::move(read.blocks);
    same.offset_bytes = read.offset_bytes;
    same.length_bytes = read.length_bytes;
    transfer->plan = plan_write(std::move(same), ends.local.stride_bytes, ends.remote.stride_bytes, peer->limits.plan);
    transfer->message_count = transfer->plan.messages.size();
  } else {
    transfer->read = std::make_unique<OutgoingRead>();
    transfer->read->what = std::move(read);
  }
  BATON_RETURN_IF_ERROR(enqueue(transfer, direct));
  return transfer;
}

size_t AgentCore::send_reads(PeerCore& peer) {
  const auto over = [](const TransferPointer& transfer) { return transfer->stopped || transfer->read->asked_for_all(); };
  while (!peer.unsent_reads.empty() && over(peer.unsent_reads.front())) peer.unsent_reads.pop_front();
  if (peer.unsent_reads.empty() || peer.state != PeerCore::State::kOpen || !peer.failure.ok() || !peer.link->ready()) return 0;
  size_t sent = 0;
  while (!peer.unsent_reads.empty() && peer.open_reads < ReadRequest::kMaxOpen) {
    const TransferPointer transfer = peer.unsent_reads.front();
    if (!over(transfer)) {
      if (!send_next_read(peer, transfer)) break;
      ++sent;
    }
    if (over(transfer)) peer.unsent_reads.pop_front();
  }
  return sent;
}

/// False when nothing more can be sent now.
bool AgentCore::send_next_read(PeerCore& peer, const TransferPointer& transfer) {
  ReadChannel& channel = peer.backend->reads();
  const ReadChannel::Connection connection = peer.link->connection();
  std::pair<uint64_t, size_t> known{serial_, 0};
  {
    std::lock_guard lock(handover_mutex_);
    known.second = pools_.size();
  }
  if (peer.introduced != known) {
    ReadRequest introduction;
    introduction.kind = ReadRequest::Kind::kIntroduce;
    introduction.metadata = metadata_now();
    if (!channel.send_read_request(connection, introduction)) return false;
    peer.introduced = known;
  }
  Result<Tag> tag = inboxes_.open();
  if (!tag.ok()) {
    fail_transfer(transfer, tag.status().with_context(transfer->path()));
    return true;
  }
  OutgoingRead& read = *transfer->read;
  const size_t count = std::min(read.what.blocks.size() - read.next_block, ReadRequest::kMaxBlocks);
  ReadRequest request;
  request.kind = ReadRequest::Kind::kRead;
  request.tag = static_cast<uint32_t>(*tag);
  request.integrity = config_.integrity;
  request.owner_pool = transfer->remote_pool;
  request.reader_pool = static_cast<uint32_t>(read.what.local_pool);
  request.offset_bytes = read.what.offset_bytes;
  request.length_bytes = read.what.length_bytes;
  const int64_t left_ms = (transfer->deadline_ns - clock_.now_ns()) / 1'000'000 + 1;
  request.timeout_ms = static_cast<uint32_t>(std::clamp<int64_t>(left_ms, 0, std::numeric_limits<uint32_t>::max()));
  request.blocks.reserve(count);
  for (size_t i = 0; i < count; ++i) {
    const BlockPair& pair = read.what.blocks[read.next_block + i];
    request.blocks.push_back({pair.remote_block, pair.local_block});
  }
  if (!channel.send_read_request(connection, request)) {
    inboxes_.close(*tag);
    return false;
  }
  read.next_block += count;
  read.tags.push_back(request.tag);
  OpenRead open;
  open.peer = transfer->peer;
  open.transfer = transfer;
  open.slot = free_slot(peer);
  open.bytes = count * request.length_bytes;
  take_slot(peer, open.slot, {transfer, 0, PeerCore::InFlight::Kind::kRead}, clock_.now_ns());
  open_reads_.emplace(request.tag, std::move(open));
  ++peer.open_reads;
  return true;
}

void AgentCore::on_read_arrived(uint32_t tag, uint64_t count) {
  auto it = open_reads_.find(tag);
  if (it == open_reads_.end() || it->second.transfer == nullptr) return;
  OpenRead& open = it->second;
  open.arrived += count;
  open.peer->last_progress_ns = clock_.now_ns();
  if (open.messages > 0 && open.arrived >= open.messages) complete_read(it);
}

void AgentCore::complete_read(OpenReads::iterator it) {
  const TransferPointer transfer = it->second.transfer;
  transfer->peer->read_bytes.fetch_add(it->second.bytes, std::memory_order_relaxed);
  let_go_of_read(it);
  end_if_ended(transfer);
}

/// The transfer waits no more for it. It stays open until its Ended has come.
void AgentCore::let_go_of_read(OpenReads::iterator it) {
  const auto [tag, open] = std::tie(it->first, it->second);
  const TransferPointer transfer = std::move(open.transfer);
  open.transfer = nullptr;
  inboxes_.close(static_cast<Tag>(tag));
  release_slot(*transfer->peer, open.slot);
  --transfer->inflight;
  std::erase(transfer->read->tags, tag);
  if (open.ended) open_reads_.erase(it);
}

/// The transfer has failed or was cancelled meanwhile. What the peer is at is taken back, and its word waited for: so nothing
/// comes any more when the transfer is done.
void AgentCore::give_up_read(const TransferPointer& transfer) {
  PeerCore& peer = *transfer->peer;
  for (uint32_t tag : std::vector<uint32_t>(transfer->read->tags)) {
    auto it = open_reads_.find(tag);
    if (it->second.ended) {
      let_go_of_read(it);
    } else if (peer.state == PeerCore::State::kOpen && peer.failure.ok()) {
      ReadRequest cancel;
      cancel.kind = ReadRequest::Kind::kCancel;
      cancel.tag = tag;
      // Not sent: then its Ended takes a little longer.
      (void)peer.backend->reads().send_read_request(peer.link->connection(), cancel);
    }
  }
}

void AgentCore::on_read_answer(Backend& backend, const ReadChannel::Answer& received) {
  const ReadAnswer& answer = received.answer;
  auto it = open_reads_.find(answer.tag);
  if (it == open_reads_.end()) return;
  OpenRead& open = it->second;
  PeerCore& peer = *open.peer;
  if (peer.backend != &backend || peer.link == nullptr || peer.link->connection() != received.connection) return;
  peer.last_progress_ns = clock_.now_ns();
  const TransferPointer transfer = open.transfer;
  if (answer.kind == ReadAnswer::Kind::kStarted) {
    if (transfer == nullptr) return;
    open.messages = answer.messages;
    if (open.arrived >= open.messages) complete_read(it);
    return;
  }
  if (open.ended) return;
  --peer.open_reads;
  open.ended = true;
  make_busy(open.peer);
  if (transfer == nullptr) {
    open_reads_.erase(it);
    return;
  }
  if (answer.code == StatusCode::kOk && !transfer->stopped && open.messages > 0) return;  // its last messages are on their way
  Status failure(answer.code, answer.reason);
  // Nobody here has cancelled it.
  if (answer.code == StatusCode::kCancelled) failure = aborted("{}", answer.reason);
  if (answer.code == StatusCode::kOk) failure = internal_error("it ended before it had started");
  transfer->unsettled = transfer->unsettled || !answer.settled;
  let_go_of_read(it);
  if (!transfer->stopped) {
    fail_transfer(transfer, failure.with_context(transfer->path() + ": the peer says"));
  } else {
    end_if_ended(transfer);
  }
}

/// The path ends, and with it everything that could say what becomes of its reads.
void AgentCore::close_reads(PeerCore& peer) {
  std::vector<uint32_t> tags;
  for (const auto& [tag, open] : open_reads_) {
    if (open.peer.get() == &peer) tags.push_back(tag);
  }
  for (uint32_t tag : tags) {
    auto it = open_reads_.find(tag);
    if (it == open_reads_.end()) continue;
    const TransferPointer transfer = it->second.transfer;
    const bool ended = std::exchange(it->second.ended, true);
    if (transfer == nullptr) {
      open_reads_.erase(it);
      continue;
    }
    transfer->unsettled = transfer->unsettled || !ended;
    let_go_of_read(it);
    if (transfer->inflight == 0) finish(transfer);
  }
  peer.open_reads = 0;
}

/// Before the turn asks what has arrived: so all that came before an answer has been counted when the answer is handled.
void AgentCore::take_read_answers() {
  std::vector<ReadChannel::Answer> answers;
  for (const auto& backend : backends_) {
    backend->reads().take_read_answers(answers);
    for (ReadChannel::Answer& answer : answers) read_answers_.emplace_back(backend.get(), std::move(answer));
    answers.clear();
  }
}

size_t AgentCore::progress_reads() {
  size_t count = read_answers_.size();
  for (const auto& [backend, answer] : std::exchange(read_answers_, {})) on_read_answer(*backend, answer);
  std::vector<ReadChannel::Received> requests;
  std::vector<ReadChannel::Connection> gone;
  for (const auto& backend : backends_) {
    ReadChannel& channel = backend->reads();
    channel.take_read_requests(requests);
    channel.take_gone_readers(gone);
    for (ReadChannel::Received& request : requests) accept_read(*backend, std::move(request));
    for (ReadChannel::Connection connection : gone) {
      if (auto it = readers_.find({backend.get(), connection}); it != readers_.end()) forget_reader(it);
    }
    count += requests.size() + gone.size();
    requests.clear();
    gone.clear();
  }
  for (UnsentAnswer& unsent : std::exchange(unsent_read_answers_, {})) {
    answer_read(*unsent.backend, unsent.connection, std::move(unsent.answer));
  }
  if (!unused_paths_.empty()) release_paths(std::exchange(unused_paths_, {}));
  return count;
}

// --- the owner of the memory ---

void AgentCore::accept_read(Backend& backend, ReadChannel::Received received) {
  if (!backend.reads().serves(received.connection)) return;
  const ReadRequest& request = received.request;
  if (request.kind == ReadRequest::Kind::kIntroduce) return introduce(backend, received);
  auto it = readers_.find({&backend, received.connection});
  if (request.kind == ReadRequest::Kind::kCancel) {
    if (it == readers_.end()) return;
    auto served = it->second.serving.find(request.tag);
    if (served == it->second.serving.end()) return;  // it has ended
    const TransferPointer transfer = served->second;
    take_incoming();  // it may be in there
    cancel_now(transfer, clock_.now_ns());
    return;
  }
  ReadAnswer answer;
  answer.tag = request.tag;
  Result<TransferPointer> transfer = it == readers_.end() ? failed_precondition("a read without an introduction")
                                     : it->second.serving.contains(request.tag)
                                         ? Result<TransferPointer>(invalid_argument("read {} is being served", request.tag))
                                         : serve_read(it->second, request);
  if (!transfer.ok()) {
    ++refused_reads_;
    log_debug("transfer {}: a read of '{}' is refused: {}", config_.name, received.from, transfer.status().to_string());
    answer.code = transfer.status().code();
    answer.reason = transfer.status().message();
  } else {
    ++open_served_reads_;
    (*transfer)->served = {&backend, received.connection};
    it->second.serving.emplace(request.tag, *transfer);
    answer.kind = ReadAnswer::Kind::kStarted;
    answer.messages = (*transfer)->message_count + ((*transfer)->counted_check ? 1 : 0);
  }
  answer_read(backend, received.connection, std::move(answer));
}

void AgentCore::introduce(Backend& backend, ReadChannel::Received& received) {
  Reader& reader = readers_[{&backend, received.connection}];
  reader.epoch = received.epoch;
  std::vector<std::shared_ptr<PeerCore>> before;
  for (std::shared_ptr<PeerCore>& core : reader.paths.cores) {
    if (core != nullptr) before.push_back(std::exchange(core, nullptr));
  }
  if (reader.serving.empty()) {
    release_paths(std::move(before));
  } else {
    reader.retired.insert(reader.retired.end(), before.begin(), before.end());
  }
  Result<Metadata> metadata = parse_metadata(received.request.metadata, config_.max_metadata_bytes);
  reader.refused = metadata.status();
  if (metadata.ok() && metadata->epoch != received.epoch) {
    reader.refused = invalid_argument("'{}' introduces itself with the metadata of somebody else", received.from);
  }
  if (reader.refused.ok()) {
    reader.metadata = std::move(*metadata);
  } else {
    log_warning("transfer {}: '{}' cannot read from here: {}", config_.name, received.from, reader.refused.to_string());
  }
}

Result<TransferPointer> AgentCore::serve_read(Reader& reader, const ReadRequest& request) {
  if (config_.max_served_reads == 0) return failed_precondition("'{}' serves no reads (max_served_reads is 0)", config_.name);
  if (open_served_reads_ >= config_.max_served_reads) {
    return resource_exhausted("'{}' has {} reads to serve already, the limit is {} (max_served_reads); try again later",
                              config_.name, open_served_reads_, config_.max_served_reads);
  }
  BATON_RETURN_IF_ERROR(reader.refused);
  BlockWrite write;
  write.local_pool = static_cast<PoolId>(request.owner_pool);
  write.remote_pool = static_cast<PoolId>(request.reader_pool);
  write.offset_bytes = request.offset_bytes;
  write.length_bytes = request.length_bytes;
  write.tag = static_cast<Tag>(request.tag);
  write.deadline.at_ns = clock_.now_ns() + static_cast<int64_t>(request.timeout_ms) * 1'000'000;
  write.blocks.reserve(request.blocks.size());
  for (const ReadRequest::Pair& pair : request.blocks) write.blocks.push_back({pair.owner_block, pair.reader_block});
  BATON_ASSIGN_OR_RETURN(Ends ends, check_ends(reader.metadata, write.local_pool, write.remote_pool, {}, write.offset_bytes,
                                               write.length_bytes, "->"));
  const MemoryKind from = ends.local.region.impl()->kind();
  std::shared_ptr<PeerCore>& core = reader.paths.cores[PeerPaths::index(from, ends.remote.kind)];
  if (core == nullptr || !core->alive.load()) {
    BATON_ASSIGN_OR_RETURN(std::shared_ptr<PeerCore> opened, open_path(reader.metadata, from, ends.remote.kind));
    ++opened->readers;
    if (core != nullptr) --core->readers;
    core = std::move(opened);
  }
  return this->write(reader.paths, std::move(write), {}, config_.integrity || request.integrity);
}

void AgentCore::end_served_read(const TransferPointer& transfer) {
  const ServedFor served = std::exchange(transfer->served, {});
  --open_served_reads_;
  ++served_reads_;
  auto it = readers_.find({served.backend, served.connection});
  if (it == readers_.end()) return;
  Reader& reader = it->second;
  reader.serving.erase(static_cast<uint32_t>(transfer->tag));
  if (reader.serving.empty()) {
    unused_paths_.insert(unused_paths_.end(), reader.retired.begin(), reader.retired.end());
    reader.retired.clear();
  }
  ReadAnswer answer;
  answer.tag = static_cast<uint32_t>(transfer->tag);
  answer.code = transfer->outcome.code();
  answer.reason = transfer->outcome.message();
  answer.settled = !transfer->unsettled;
  // What failed although all of it is there (a break after the last message) is no success: its count is not known there.
  answer_read(*served.backend, served.connection, std::move(answer));
}

void AgentCore::answer_read(Backend& backend, ReadChannel::Connection connection, ReadAnswer answer) {
  // In order: a small one may find room where the one before it found none.
  const bool waits = std::any_of(unsent_read_answers_.begin(), unsent_read_answers_.end(), [&](const UnsentAnswer& unsent) {
    return unsent.backend == &backend && unsent.connection == connection;
  });
  if (!waits && backend.reads().send_read_answer(connection, answer)) return;
  if (!backend.reads().serves(connection)) return;
  unsent_read_answers_.push_back({&backend, connection, std::move(answer)});
}

/// It has gone, or was fenced: nothing is written for it any more.
void AgentCore::forget_reader(std::map<ReaderKey, Reader>::iterator it) {
  Reader reader = std::move(it->second);
  readers_.erase(it);
  take_incoming();
  for (const auto& [tag, transfer] : reader.serving) cancel_now(transfer, clock_.now_ns());
  std::vector<std::shared_ptr<PeerCore>> cores = std::move(reader.retired);
  for (const std::shared_ptr<PeerCore>& core : reader.paths.cores) {
    if (core != nullptr) cores.push_back(core);
  }
  release_paths(std::move(cores));
  wake();
}

void AgentCore::release_paths(std::vector<std::shared_ptr<PeerCore>> cores) {
  for (const std::shared_ptr<PeerCore>& core : cores) {
    if (--core->readers == 0 && !core->wanted) fail_peer(*core, cancelled("it reads no more"));
  }
}

}  // namespace baton::transfer
