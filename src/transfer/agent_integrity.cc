#include <algorithm>

#include "base/check.h"
#include "base/log.h"
#include "transfer/agent_impl.h"

/// Integrity mode, above all backends. integrity.h has the conversation.
namespace baton::transfer {
namespace {

/// What one turn of progress hashes for others; the rest waits for the next turns.
constexpr uint64_t kHashedBytesPerTurn = 4u << 20;

}  // namespace

// --- the writer ---

Status AgentCore::hash_memory(Backend& backend, const MemoryRegion& region, const BackendRegion* registered,
                              uint64_t offset, uint64_t bytes, BlockHasher& hasher) {
  if (region.impl()->kind() == MemoryKind::kHost) {
    const auto held = backend.hold_writes();
    hasher.add(region.impl()->memory().subspan(offset, bytes));
    return Status();
  }
  while (bytes > 0) {
    BATON_ASSIGN_OR_RETURN(std::span<const std::byte> piece, backend.read_back(*registered, offset, bytes));
    BATON_CHECK(!piece.empty() && piece.size() <= bytes);
    hasher.add(piece);
    offset += piece.size();
    bytes -= piece.size();
  }
  return Status();
}

/// The segments of a plan, one after the other, are the blocks in their order: joined, cut, but not mixed.
Status AgentCore::hash_next_message(Transfer::Impl& transfer) {
  OutgoingCheck& check = *transfer.check;
  if (check.blocks.empty()) check.blocks.reserve(check.block_count);
  const PlannedMessage& message = transfer.plan.messages[check.hashed_messages++];
  for (uint32_t i = 0; i < message.segment_count; ++i) {
    Segment left = transfer.plan.segments[message.first_segment + i];
    while (left.bytes > 0) {
      if (check.hasher.at_start()) check.blocks.push_back({left.remote_offset, 0});
      const uint64_t bytes = std::min(left.bytes, check.hasher.left());
      BATON_RETURN_IF_ERROR(hash_memory(*transfer.peer->backend, transfer.local_region, transfer.local, left.local_offset,
                                        bytes, check.hasher));
      left.local_offset += bytes;
      left.remote_offset += bytes;
      left.bytes -= bytes;
      if (check.hasher.left() == 0) check.blocks.back().hash = check.hasher.take();
    }
  }
  return Status();
}

void AgentCore::start_check(const TransferPointer& transfer) {
  PeerCore& peer = *transfer->peer;
  OutgoingCheck& check = *transfer->check;
  BATON_CHECK(!check.unsent && check.id == 0);
  check.slot = free_slot(peer);
  take_slot(peer, check.slot, {transfer, 0, PeerCore::InFlight::Kind::kCheck}, clock_.now_ns());
  check.unsent = true;
  peer.unsent_checks.push_back(transfer);
  make_busy(transfer->peer);
}

size_t AgentCore::send_checks(PeerCore& peer) {
  if (peer.unsent_checks.empty() || peer.state != PeerCore::State::kOpen || !peer.failure.ok()) return 0;
  size_t sent = 0;
  while (!peer.unsent_checks.empty() && peer.open_checks < Check::kMaxOpen) {
    TransferPointer transfer = peer.unsent_checks.front();
    OutgoingCheck& outgoing = *transfer->check;
    const size_t left = outgoing.blocks.size() - outgoing.next_block;
    const size_t count = std::min(left, Check::blocks_per_check(outgoing.block_bytes));
    Check check;
    check.id = next_check_id_;
    check.tag = static_cast<uint32_t>(transfer->tag);
    check.counts = check.tag != 0 && count == left && outgoing.bad_blocks == 0;
    check.pool = transfer->remote_pool;
    check.block_bytes = outgoing.block_bytes;
    auto first = outgoing.blocks.begin() + static_cast<ptrdiff_t>(outgoing.next_block);
    check.blocks.assign(first, first + static_cast<ptrdiff_t>(count));
    if (!peer.backend->checks().send_check(peer.link->connection(), check)) break;
    ++next_check_id_;
    outgoing.id = check.id;
    outgoing.unsent = false;
    outgoing.next_block += count;
    ++peer.open_checks;
    open_checks_.emplace(check.id, transfer);
    peer.unsent_checks.pop_front();
    ++sent;
  }
  return sent;
}

/// The transfer has failed or was cancelled meanwhile. What has been sent is taken back, and its answer waited for: so the
/// peer reads its memory no more when the transfer is done.
void AgentCore::give_up_check(const TransferPointer& transfer) {
  OutgoingCheck& check = *transfer->check;
  PeerCore& peer = *transfer->peer;
  if (check.unsent) {
    check.unsent = false;
    std::erase(peer.unsent_checks, transfer);
    release_slot(peer, check.slot);
    --transfer->inflight;
  } else if (check.id != 0 && peer.state == PeerCore::State::kOpen && peer.failure.ok()) {
    Check back;
    back.id = check.id;
    // Not sent: then the answer takes a little longer.
    (void)peer.backend->checks().send_check(peer.link->connection(), back);
  }
}

size_t AgentCore::take_check_results() {
  size_t count = 0;
  std::vector<CheckChannel::Answer> answers;
  for (const auto& backend : backends_) {
    backend->checks().take_check_results(answers);
    for (const CheckChannel::Answer& answer : answers) on_check_result(*backend, answer);
    count += answers.size();
    answers.clear();
  }
  return count;
}

void AgentCore::on_check_result(Backend& backend, const CheckChannel::Answer& answer) {
  auto it = open_checks_.find(answer.result.id);
  if (it == open_checks_.end()) return;
  TransferPointer transfer = it->second;
  PeerCore& peer = *transfer->peer;
  if (peer.backend != &backend || peer.link == nullptr || peer.link->connection() != answer.connection) return;
  open_checks_.erase(it);
  --peer.open_checks;
  peer.last_progress_ns = clock_.now_ns();
  OutgoingCheck& check = *transfer->check;
  check.id = 0;
  const CheckResult& result = answer.result;
  switch (result.outcome) {
    case CheckResult::Outcome::kRight:
      break;
    case CheckResult::Outcome::kWrong:
      if (check.bad_blocks == 0) check.first_bad = result;
      check.bad_blocks += result.bad_blocks;
      break;
    case CheckResult::Outcome::kSkipped:
      check.next_block = check.blocks.size();  // nobody waits for the rest, either
      break;
    case CheckResult::Outcome::kRefused:
      if (!transfer->stopped) {
        transfer->stopped = true;
        transfer->outcome = failed_precondition("{}: it cannot be checked: {}", transfer->path(), result.reason);
      }
      break;
  }
  if (!transfer->stopped && check.next_block == check.blocks.size() && check.bad_blocks > 0) {
    auto sent = std::find_if(check.blocks.begin(), check.blocks.end(), [&](const CheckedBlock& block) {
      return block.offset == check.first_bad.offset;
    });
    transfer->stopped = true;
    transfer->outcome =
        data_loss("{}: {} of {} blocks are not there as they were sent; the first is block {} of its pool {} (xxh3 {:016x}, sent "
                  "{:016x})", transfer->path(), std::min(check.bad_blocks, check.block_count), check.block_count,
                  check.first_bad.offset / check.remote_stride_bytes, transfer->remote_pool, check.first_bad.hash,
                  sent == check.blocks.end() ? 0 : sent->hash);
  }
  release_slot(peer, check.slot);
  --transfer->inflight;
  end_if_ended(transfer);
}

// --- the owner of the memory ---

void AgentCore::close_inbox(Tag tag) {
  inboxes_.close(tag);
  // A check of that tag may be reading right now: it sees that the inbox is closed before its next piece.
  if (incoming_check_count_.load() > 0) {
    std::lock_guard lock(mutex_);
  }
}

size_t AgentCore::serve_checks() {
  size_t count = 0;
  std::vector<CheckChannel::Received> received;
  for (const auto& backend : backends_) {
    backend->checks().take_checks(received);
    for (CheckChannel::Received& one : received) accept_check(*backend, std::move(one));
    count += received.size();
    received.clear();
  }
  for (size_t i = unsent_answers_.size(); i > 0; --i) {
    CheckAnswer answer = std::move(unsent_answers_.front());
    unsent_answers_.pop_front();
    answer_check(*answer.backend, answer.connection, std::move(answer.result));
  }
  uint64_t budget_bytes = kHashedBytesPerTurn;
  while (!incoming_checks_.empty() && budget_bytes > 0) {
    ++count;
    if (!hash_incoming(incoming_checks_.front(), &budget_bytes)) break;
    incoming_checks_.pop_front();
    incoming_check_count_.store(incoming_checks_.size());
  }
  return count;
}

void AgentCore::accept_check(Backend& backend, CheckChannel::Received received) {
  const Check& check = received.check;
  if (check.blocks.empty()) {
    auto it = std::find_if(incoming_checks_.begin(), incoming_checks_.end(), [&](const IncomingCheck& one) {
      return one.backend == &backend && one.received.connection == received.connection && one.received.check.id == check.id;
    });
    if (it == incoming_checks_.end()) return;  // it is answered already
    incoming_checks_.erase(it);
    incoming_check_count_.store(incoming_checks_.size());
    CheckResult result;
    result.id = check.id;
    result.outcome = CheckResult::Outcome::kSkipped;
    answer_check(backend, received.connection, std::move(result));
    return;
  }
  LocalPool pool;
  {
    std::lock_guard lock(handover_mutex_);
    if (check.pool < pools_.size()) pool = pools_[check.pool];
  }
  CheckResult result;
  result.id = check.id;
  const auto refuse = [&](std::string reason) {
    log_error("transfer {}: '{}' wants a check that cannot be: {}", config_.name, received.from, reason);
    result.outcome = CheckResult::Outcome::kRefused;
    result.reason = std::move(reason);
    answer_check(backend, received.connection, std::move(result));
  };
  if (!pool.region) return refuse(fmt::format("there is no pool {}", check.pool));
  const uint64_t pool_bytes = pool.stride_bytes * pool.count;
  for (const CheckedBlock& block : check.blocks) {
    if (block.offset > pool_bytes || check.block_bytes > pool_bytes - block.offset) {
      return refuse(fmt::format("{} bytes from offset {} are outside of pool {} of {} bytes", check.block_bytes, block.offset,
                                check.pool, pool_bytes));
    }
  }
  Result<const BackendRegion*> region = pool.region.impl()->with(backend);
  if (!region.ok()) return refuse(region.status().message());
  BlockHasher hasher(check.block_bytes);
  incoming_checks_.push_back({&backend, std::move(received), std::move(hasher), std::move(pool), *region, 0, result});
  incoming_check_count_.store(incoming_checks_.size());
}

/// True when nothing of it is left to do.
bool AgentCore::hash_incoming(IncomingCheck& incoming, uint64_t* budget_bytes) {
  const Check& check = incoming.received.check;
  CheckResult& result = incoming.result;
  // Whoever was fenced, or whose inbox was closed, has no business with this memory: it may have another owner already.
  if (!incoming.backend->checks().serves(incoming.received.connection)) return true;
  if (check.tag != 0 && !inboxes_.is_open(check.tag)) {
    result.outcome = CheckResult::Outcome::kSkipped;
    conclude(incoming);
    return true;
  }
  while (incoming.next_block < check.blocks.size()) {
    if (*budget_bytes == 0) return false;
    const CheckedBlock& block = check.blocks[incoming.next_block];
    const uint64_t bytes = std::min(incoming.hasher.left(), *budget_bytes);
    const uint64_t offset = block.offset + (check.block_bytes - incoming.hasher.left());
    Status read = hash_memory(*incoming.backend, incoming.pool.region, incoming.region, offset, bytes, incoming.hasher);
    if (!read.ok()) {
      result.outcome = CheckResult::Outcome::kRefused;
      result.reason = read.message();
      break;
    }
    *budget_bytes -= bytes;
    if (incoming.hasher.left() > 0) continue;
    ++incoming.next_block;
    if (const uint64_t hash = incoming.hasher.take(); hash != block.hash && result.bad_blocks++ == 0) {
      result.outcome = CheckResult::Outcome::kWrong;
      result.offset = block.offset;
      result.hash = hash;
    }
  }
  conclude(incoming);
  return true;
}

void AgentCore::conclude(IncomingCheck& incoming) {
  const Check& check = incoming.received.check;
  const CheckResult& result = incoming.result;
  using Outcome = CheckResult::Outcome;
  if (result.outcome == Outcome::kWrong) {
    // Its writer has gone meanwhile, and with it the promise that nobody else writes these blocks.
    if (!incoming.backend->checks().serves(incoming.received.connection)) return;
    auto sent = std::find_if(check.blocks.begin(), check.blocks.end(),
                             [&](const CheckedBlock& block) { return block.offset == result.offset; });
    corrupt_blocks_ += result.bad_blocks;
    log_error("transfer {}: {} of {} blocks that '{}' wrote are corrupt; the first is block {} of pool {}: xxh3 {:016x}, sent {:016x}",
              config_.name, result.bad_blocks, check.blocks.size(), incoming.received.from,
              result.offset / incoming.pool.stride_bytes, check.pool, result.hash, sent->hash);
  }
  if (result.outcome == Outcome::kRight || result.outcome == Outcome::kWrong) checked_blocks_ += check.blocks.size();
  // A closed inbox counts it as stray, as it does with the data.
  if (check.counts && (result.outcome == Outcome::kRight || result.outcome == Outcome::kSkipped)) on_arrived(check.tag, 1);
  answer_check(*incoming.backend, incoming.received.connection, result);
}

void AgentCore::answer_check(Backend& backend, CheckChannel::Connection connection, CheckResult result) {
  if (backend.checks().send_check_result(connection, result) || !backend.checks().serves(connection)) return;
  unsent_answers_.push_back({&backend, connection, std::move(result)});
}

}  // namespace baton::transfer
