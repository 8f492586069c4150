#include "transfer/topology/rails.h"

#include <fmt/format.h>

#include <algorithm>
#include <map>
#include <optional>
#include <set>
#include <tuple>

namespace baton::transfer {
namespace {

constexpr size_t kMaxListed = 40;

struct Candidate {
  const Nic* nic = nullptr;
  Distance distance = Distance::kUnknown;
  size_t uplink_rank = 0;  // host memory: how many before it use the same root port
  bool dealt = false;      // one of those that several GPUs share out
  bool own = true;         // dealt to this GPU, or not dealt at all
  std::string refusal;     // why it cannot be taken at all
};

std::optional<NicKind> kind_of(const std::string& transport) {
  if (transport == "efa") return NicKind::kEfa;
  if (transport == "verbs") return NicKind::kVerbs;
  if (transport == "tcp") return NicKind::kEthernet;
  return std::nullopt;
}

bool is_named(const Nic& nic, const std::string& name) {
  return nic.name == name || (!nic.interface.empty() && nic.interface == name) || nic.address() == name;
}

std::string join(const std::vector<std::string>& parts) {
  std::string out;
  for (size_t i = 0; i < parts.size() && i < kMaxListed; ++i) out += (i == 0 ? "" : ", ") + parts[i];
  if (parts.size() > kMaxListed) out += fmt::format(" and {} more", parts.size() - kMaxListed);
  return out;
}

std::string names_of_kind(const Topology& topology, NicKind kind) {
  std::vector<std::string> names;
  for (const Nic& nic : topology.nics) {
    if (nic.kind == kind) names.push_back(nic.name);
  }
  return names.empty() ? "none" : join(names);
}

/// Why a NIC cannot be used, whatever its distance.
std::string refusal(const Nic& nic) {
  if (!nic.up()) return "link is down";
  if (!nic.accessible) return "no device file in /dev/infiniband: not given to this container";
  if (!nic.bonded_in.empty()) return fmt::format("belongs to {}", nic.bonded_in);
  return "";
}

std::string distance_text(Distance distance) {
  return fmt::format("{}, {}", distance_name(distance), distance_description(distance));
}

/// Compute NICs of a machine are equal; one that is clearly slower serves storage or management, and often
/// leads into another network.
bool slower(const Nic& nic, uint64_t fastest) {
  return nic.speed_bytes_per_s != 0 && nic.speed_bytes_per_s * 4 < fastest * 3;
}

class Chooser {
 public:
  Chooser(const Topology& topology, const Place& place, const RailOptions& options, NicKind kind)
      : topology_(topology), options_(options), kind_(kind) {
    if (place.kind == Place::Kind::kGpu) gpu_ = topology.find_gpu(place.gpu_address);
    choice_.transport = options.transport;
    if (gpu_ != nullptr) {
      choice_.place = fmt::format("near GPU {} at {}", gpu_->index, place.gpu_address.to_string());
    } else if (place.kind == Place::Kind::kGpu) {
      choice_.place = fmt::format("GPU {} is not in sysfs: distances unknown", place.gpu_address.to_string());
    } else if (place.kind == Place::Kind::kNode) {
      node_ = place.numa_node;
      choice_.place = fmt::format("near NUMA node {}", node_);
    } else {
      choice_.place = "no place given";
    }
  }

  Result<RailChoice> choose() {
    BATON_RETURN_IF_ERROR(collect());
    if (!options_.names.empty()) return choose_by_name();
    rank();
    take();
    if (choice_.chosen.empty()) return nothing_left();
    return std::move(choice_);
  }

 private:
  Distance distance_to(const Nic& nic) const { return gpu_ != nullptr ? distance(*gpu_, nic) : distance(node_, nic); }

  Status collect() {
    for (const Nic& nic : topology_.nics) {
      if (nic.kind != kind_) continue;
      Candidate candidate{&nic, distance_to(nic), 0, false, true, refusal(nic)};
      for (const std::string& name : options_.excluded) {
        if (is_named(nic, name)) candidate.refusal = "excluded by the configuration";
      }
      candidates_.push_back(std::move(candidate));
    }
    choice_.candidates = static_cast<uint32_t>(candidates_.size());
    if (candidates_.empty()) {
      std::string notes;
      for (const std::string& note : topology_.notes) notes += "; " + note;
      return unavailable("sysfs shows no NIC for transport {}{}", options_.transport, notes);
    }
    return Status();
  }

  Result<RailChoice> choose_by_name() {
    choice_.place = "by name";
    std::set<const Nic*> seen;
    for (const std::string& name : options_.names) {
      auto found = std::find_if(candidates_.begin(), candidates_.end(),
                                [&](const Candidate& candidate) { return is_named(*candidate.nic, name); });
      if (found == candidates_.end()) {
        const Nic* other = topology_.find_nic(name);
        if (other != nullptr) {
          return invalid_argument("NIC '{}' is {}, not for transport {}; those are: {}", name,
                                  nic_kind_name(other->kind), options_.transport, names_of_kind(topology_, kind_));
        }
        return invalid_argument("NIC '{}' does not exist; this machine has for transport {}: {}", name,
                                options_.transport, names_of_kind(topology_, kind_));
      }
      if (found->refusal == "excluded by the configuration") {
        return invalid_argument("NIC '{}' is both named and excluded", name);
      }
      if (!seen.insert(found->nic).second || !found->refusal.empty()) continue;
      if (options_.max_rails != 0 && choice_.chosen.size() == options_.max_rails) {
        found->refusal = fmt::format("named, but beyond the limit of {} rails", options_.max_rails);
        continue;
      }
      choice_.chosen.push_back({*found->nic, found->distance, "named in the configuration"});
    }
    for (const Candidate& candidate : candidates_) {
      if (seen.contains(candidate.nic) && candidate.refusal.empty()) continue;
      refuse(candidate, candidate.refusal.empty() ? "not named in the configuration" : candidate.refusal);
    }
    if (choice_.chosen.empty()) return nothing_left();
    return std::move(choice_);
  }

  bool usable_nearest(const Gpu& gpu, std::vector<const Nic*>* nearest) const {
    Distance best = Distance::kUnknown;
    for (const Candidate& candidate : candidates_) {
      if (!candidate.refusal.empty()) continue;
      Distance far = distance(gpu, *candidate.nic);
      if (far > best) continue;
      if (far < best) nearest->clear();
      best = far;
      nearest->push_back(candidate.nic);
    }
    return !nearest->empty();
  }

  /// Deals the nearest NICs out among the GPUs that have the same ones.
  void share() {
    std::vector<const Nic*> nearest;
    if (!usable_nearest(*gpu_, &nearest)) return;
    // Where a container was given some NICs only, they are its own GPUs' alone.
    bool given_some = std::any_of(candidates_.begin(), candidates_.end(),
                                  [](const Candidate& candidate) { return !candidate.nic->accessible; });
    std::vector<const Gpu*> sharers;
    for (const Gpu& gpu : topology_.gpus) {
      std::vector<const Nic*> theirs;
      if (&gpu != gpu_ && given_some && !gpu.visible) continue;
      if (&gpu == gpu_ || (usable_nearest(gpu, &theirs) && theirs == nearest)) sharers.push_back(&gpu);
    }
    size_t place = static_cast<size_t>(std::find(sharers.begin(), sharers.end(), gpu_) - sharers.begin());
    size_t first = place * nearest.size() / sharers.size();
    size_t last = std::max(first + 1, (place + 1) * nearest.size() / sharers.size());
    sharers_ = sharers.size();
    for (Candidate& candidate : candidates_) {
      auto at = std::find(nearest.begin(), nearest.end(), candidate.nic);
      if (at == nearest.end()) continue;
      size_t index = static_cast<size_t>(at - nearest.begin());
      candidate.dealt = sharers_ > 1;
      candidate.own = index >= first && index < last;
    }
  }

  void rank() {
    if (gpu_ != nullptr && kind_ != NicKind::kEthernet) share();
    if (gpu_ == nullptr) {
      std::map<std::string, size_t> used;
      for (Candidate& candidate : candidates_) {
        if (candidate.refusal.empty()) candidate.uplink_rank = used[candidate.nic->path.uplink()]++;
      }
    }
    std::stable_sort(candidates_.begin(), candidates_.end(), [this](const Candidate& a, const Candidate& b) {
      return key(a) < key(b);
    });
  }

  /// Candidates come in PCI order; the sort is stable.
  std::tuple<bool, bool, Distance, bool, int64_t, size_t> key(const Candidate& candidate) const {
    bool no_route = kind_ == NicKind::kEthernet && !candidate.nic->default_route;
    return {!candidate.refusal.empty(), no_route, candidate.distance, !candidate.own,
            -static_cast<int64_t>(candidate.nic->speed_bytes_per_s), candidate.uplink_rank};
  }

  void take() {
    uint32_t limit = options_.max_rails;
    if (limit == 0) {
      limit = kind_ == NicKind::kEthernet ? 1 : gpu_ != nullptr ? kDefaultGpuRails : kDefaultHostRails;
    }
    Distance nearest = candidates_.front().distance;
    uint64_t fastest = 0;
    for (const Candidate& candidate : candidates_) {
      if (candidate.refusal.empty() && candidate.distance == nearest) {
        fastest = std::max(fastest, candidate.nic->speed_bytes_per_s);
      }
    }
    for (const Candidate& candidate : candidates_) {
      std::string why_not = candidate.refusal.empty() ? not_now(candidate, limit, nearest, fastest)
                                                      : candidate.refusal;
      if (why_not.empty()) {
        choice_.chosen.push_back({*candidate.nic, candidate.distance, why(candidate)});
      } else {
        refuse(candidate, why_not);
      }
    }
  }

  std::string not_now(const Candidate& candidate, uint32_t limit, Distance nearest, uint64_t fastest) const {
    const Nic& nic = *candidate.nic;
    if (!choice_.chosen.empty()) {
      LinkLayer layer = choice_.chosen.front().nic.layer;
      if (kind_ == NicKind::kVerbs && nic.layer != layer) {
        return fmt::format("{}, the others are {}: name it to use it", link_layer_name(nic.layer),
                           link_layer_name(layer));
      }
    }
    if (options_.max_rails == 0) {
      if (candidate.distance > nearest) {
        return fmt::format("farther away: {}", distance_text(candidate.distance));
      }
      if (!candidate.own) return "near, but another GPU's share";
      if (slower(nic, fastest)) {
        return fmt::format("{}, while others have {}", format_speed(nic.speed_bytes_per_s), format_speed(fastest));
      }
    }
    if (choice_.chosen.size() >= limit) {
      return fmt::format("enough with {}{}", limit, options_.max_rails == 0 ? " (--rails takes more)" : " (--rails)");
    }
    return "";
  }

  std::string why(const Candidate& candidate) const {
    std::string reason = distance_text(candidate.distance);
    if (candidate.dealt && candidate.own) reason += fmt::format(", shared out among {} GPUs", sharers_);
    if (!candidate.own) reason += ", another GPU's share";
    if (candidate.nic->default_route) reason += ", default route";
    if (candidate.nic->link == LinkState::kUnknown) reason += ", link state unknown";
    return reason;
  }

  void refuse(const Candidate& candidate, std::string reason) {
    choice_.refused.push_back({*candidate.nic, candidate.distance, std::move(reason)});
  }

  Status nothing_left() const {
    std::vector<std::string> reasons;
    for (const RailDecision& decision : choice_.refused) {
      reasons.push_back(decision.nic.name + ": " + decision.reason);
    }
    return unavailable("none of {} NICs can be used for transport {} ({})", choice_.candidates, options_.transport,
                       join(reasons));
  }

  const Topology& topology_;
  const RailOptions& options_;
  const NicKind kind_;
  const Gpu* gpu_ = nullptr;
  int node_ = kUnknownNode;
  size_t sharers_ = 1;
  std::vector<Candidate> candidates_;
  RailChoice choice_;
};

}  // namespace

std::vector<std::string> RailChoice::names() const {
  std::vector<std::string> names;
  for (const RailDecision& decision : chosen) names.push_back(decision.nic.name);
  return names;
}

uint64_t RailChoice::speed_bytes_per_s() const {
  uint64_t sum = 0;
  for (const RailDecision& decision : chosen) sum += decision.nic.speed_bytes_per_s;
  return sum;
}

std::string RailChoice::describe() const {
  std::string out = fmt::format("{} of {} {} NICs ({}): {}\n", chosen.size(), candidates, transport, place,
                                join(names()));
  auto add = [&](char mark, const RailDecision& decision) {
    out += fmt::format("  {} {:<14} {:<12}  {:<9}  {}\n", mark, decision.nic.name, decision.nic.address(),
                       format_speed(decision.nic.speed_bytes_per_s), decision.reason);
  };
  for (const RailDecision& decision : chosen) add('+', decision);
  for (const RailDecision& decision : refused) add('-', decision);
  return out;
}

Result<RailChoice> choose_rails(const Topology& topology, const Place& place, const RailOptions& options) {
  std::optional<NicKind> kind = kind_of(options.transport);
  if (!kind) {
    return invalid_argument("transport '{}' has no NICs to choose; efa, verbs and tcp have", options.transport);
  }
  return Chooser(topology, place, options, *kind).choose();
}

}  // namespace baton::transfer
