#include "router/registry.h"

namespace baton {

std::string_view worker_state_name(WorkerState state) {
  switch (state) {
    case WorkerState::kConnecting: return "connecting";
    case WorkerState::kReady: return "ready";
    case WorkerState::kRefused: return "refused";
    case WorkerState::kDown: return "down";
  }
  return "unknown";
}

WorkerRegistry::WorkerRegistry(const std::vector<std::string>& addresses) {
  for (const std::string& address : addresses) {
    auto entry = std::make_unique<WorkerEntry>();
    entry->address = address;
    entries_.push_back(std::move(entry));
  }
}

WorkerEntry* WorkerRegistry::by_channel(const protocol::Channel* channel) const {
  for (const auto& entry : entries_) {
    if (entry->channel.get() == channel) return entry.get();
  }
  return nullptr;
}

WorkerEntry* WorkerRegistry::by_address(const std::string& address) const {
  for (const auto& entry : entries_) {
    if (entry->address == address) return entry.get();
  }
  return nullptr;
}

std::vector<WorkerEntry*> WorkerRegistry::decode_candidates() const {
  std::vector<WorkerEntry*> decode, stand_in;
  for (const auto& entry : entries_) {
    if (entry->can_decode()) {
      decode.push_back(entry.get());
    } else if (entry->can_prefill()) {
      stand_in.push_back(entry.get());
    }
  }
  return decode.empty() ? stand_in : decode;
}

std::vector<WorkerEntry*> WorkerRegistry::prefill_candidates(const WorkerEntry& decode) const {
  std::vector<WorkerEntry*> result;
  for (const auto& entry : entries_) {
    if (entry.get() == &decode || !entry->can_prefill()) continue;
    bool refused = false;
    for (const auto& pair : decode.load.pairs()) {
      if (pair.address() == entry->address && !pair.ready()) refused = true;
    }
    if (!refused) result.push_back(entry.get());
  }
  return result;
}

}  // namespace baton
