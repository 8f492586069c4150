#include "transfer/topology/place.h"

#include <sched.h>

#include <algorithm>
#include <charconv>

namespace baton::transfer {
namespace {

constexpr uint32_t kMaxCpu = 65'535;

bool take_number(std::string_view* text, uint32_t* value) {
  auto [end, error] = std::from_chars(text->data(), text->data() + text->size(), *value);
  if (error != std::errc() || *value > kMaxCpu) return false;
  text->remove_prefix(static_cast<size_t>(end - text->data()));
  return true;
}

}  // namespace

Result<Place> Place::parse(std::string_view text) {
  if (text.empty()) return unknown();
  if (text.starts_with("gpu:")) {
    if (std::optional<PciAddress> address = PciAddress::parse(text.substr(4))) return gpu(*address);
  }
  if (text.starts_with("node:")) {
    std::string_view rest = text.substr(5);
    uint32_t id = 0;
    if (take_number(&rest, &id) && rest.empty()) return node(static_cast<int>(id));
  }
  return invalid_argument("'{}' is no place for rails; gpu:0000:53:00.0 (PCI address) or node:1 are", text);
}

std::vector<uint32_t> parse_cpu_list(std::string_view text) {
  std::vector<uint32_t> cpus;
  while (!text.empty()) {
    uint32_t first = 0;
    if (!take_number(&text, &first)) return {};
    uint32_t last = first;
    if (text.starts_with('-')) {
      text.remove_prefix(1);
      if (!take_number(&text, &last) || last < first) return {};
    }
    if (cpus.size() + (last - first) > kMaxCpu) return {};
    for (uint32_t cpu = first; cpu <= last; ++cpu) cpus.push_back(cpu);
    if (text.empty()) break;
    if (!text.starts_with(',')) return {};
    text.remove_prefix(1);
  }
  std::sort(cpus.begin(), cpus.end());
  cpus.erase(std::unique(cpus.begin(), cpus.end()), cpus.end());
  return cpus;
}

int node_of_cpus(const Topology& topology, const std::vector<uint32_t>& cpus) {
  if (cpus.empty()) return kUnknownNode;
  for (const NumaNode& node : topology.numa_nodes) {
    std::vector<uint32_t> own = parse_cpu_list(node.cpus);
    if (std::includes(own.begin(), own.end(), cpus.begin(), cpus.end())) return node.id;
  }
  return kUnknownNode;
}

Place Place::of_this_thread(const Topology& topology) {
  // Room for 16,384 CPUs; the kernel refuses a mask that is smaller than its own.
  constexpr size_t kWords = 256;
  unsigned long mask[kWords] = {};
  if (::sched_getaffinity(0, sizeof(mask), reinterpret_cast<cpu_set_t*>(mask)) != 0) return unknown();
  constexpr uint32_t kBits = 8 * sizeof(mask[0]);
  std::vector<uint32_t> cpus;
  for (uint32_t cpu = 0; cpu < kWords * kBits; ++cpu) {
    if ((mask[cpu / kBits] >> (cpu % kBits)) & 1) cpus.push_back(cpu);
  }
  return node(node_of_cpus(topology, cpus));
}

}  // namespace baton::transfer
