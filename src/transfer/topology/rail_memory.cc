#include "transfer/topology/rail_memory.h"

#include <fmt/format.h>
#include <sys/resource.h>

#include <algorithm>
#include <charconv>
#include <limits>
#include <vector>

#include "transfer/topology/sysfs.h"

namespace baton::transfer {
namespace {

constexpr uint64_t kMiB = 1u << 20;
constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();

uint64_t add(uint64_t a, uint64_t b) { return a > kMax - b ? kMax : a + b; }
uint64_t multiply(uint64_t a, uint64_t b) { return b != 0 && a > kMax / b ? kMax : a * b; }

std::string format_bytes(uint64_t bytes) {
  double value = static_cast<double>(bytes);
  if (bytes >= uint64_t{1024} * kMiB) return fmt::format("{:.1f} GiB", value / static_cast<double>(1024 * kMiB));
  if (bytes >= 10 * kMiB) return fmt::format("{:.0f} MiB", value / static_cast<double>(kMiB));
  if (bytes >= kMiB) return fmt::format("{:.1f} MiB", value / static_cast<double>(kMiB));
  return fmt::format("{} KiB", bytes / 1024);
}

/// "VmPin:	   12 kB"; the whole word before the colon must be `key`.
std::optional<std::string_view> status_field(std::string_view status, std::string_view key) {
  for (size_t at = status.find(key); at != std::string_view::npos; at = status.find(key, at + 1)) {
    if ((at == 0 || status[at - 1] == '\n') && status.substr(at + key.size()).starts_with(':')) {
      std::string_view rest = status.substr(at + key.size() + 1);
      return trim(rest.substr(0, rest.find('\n')));
    }
  }
  return std::nullopt;
}

uint64_t status_kib(std::string_view status, std::string_view key) {
  std::optional<std::string_view> field = status_field(status, key);
  if (!field) return 0;
  std::optional<int64_t> value = parse_number(field->substr(0, field->find(' ')));
  return value && *value > 0 ? multiply(static_cast<uint64_t>(*value), 1024) : 0;
}

bool may_lock_anything(std::string_view status) {
  constexpr int kCapIpcLock = 14;
  std::optional<std::string_view> field = status_field(status, "CapEff");
  if (!field) return false;
  uint64_t capabilities = 0;
  auto [end, error] = std::from_chars(field->data(), field->data() + field->size(), capabilities, 16);
  return error == std::errc() && end == field->data() + field->size() && ((capabilities >> kCapIpcLock) & 1) != 0;
}

struct CgroupFiles {
  std::string mount;  // "sys/fs/cgroup/memory"
  std::string path;   // "/kubepods/pod1"; inside a container often "/"
  const char* limit;
  const char* used;
};

/// The memory controller's group, v1 ("4:memory:/path") before v2 ("0::/path"): on hybrid systems the
/// controller is on v1, and 0:: is systemd's own.
std::vector<CgroupFiles> cgroup_files(const SysfsReader& files) {
  std::vector<CgroupFiles> found;
  std::string groups = files.text("proc/self/cgroup", 64 << 10).value_or("");
  std::string_view rest = groups;
  while (!rest.empty()) {
    size_t end = rest.find('\n');
    std::string_view line = rest.substr(0, end);
    rest = end == std::string_view::npos ? std::string_view() : rest.substr(end + 1);
    size_t first = line.find(':');
    size_t second = first == std::string_view::npos ? first : line.find(':', first + 1);
    if (second == std::string_view::npos) continue;
    std::string_view controllers = line.substr(first + 1, second - first - 1);
    std::string path(line.substr(second + 1));
    if (path.find("..") != std::string::npos || path.size() > 4096) path = "/";
    if (controllers == "memory") {
      found.insert(found.begin(), {"sys/fs/cgroup/memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes"});
    } else if (controllers.empty()) {
      found.push_back({"sys/fs/cgroup", path, "memory.max", "memory.current"});
    }
  }
  return found;
}

/// A group's limit holds for all below it: the tightest on the way up counts.
void read_cgroup(const SysfsReader& files, const CgroupFiles& cgroup, MemoryLimits* limits) {
  std::string path = cgroup.path;
  constexpr int kMaxDepth = 64;
  uint64_t least_left = kMax;
  for (int depth = 0; depth < kMaxDepth; ++depth) {
    while (path.ends_with('/')) path.pop_back();
    std::string base = cgroup.mount + path + "/";
    // v2 says "max" for no limit, v1 a number near 2^63.
    constexpr int64_t kNoLimit = int64_t{1} << 60;
    std::optional<int64_t> limit = files.number(base + cgroup.limit);
    if (limit && *limit >= 0 && *limit < kNoLimit) {
      uint64_t bytes = static_cast<uint64_t>(*limit);
      int64_t used_raw = std::max<int64_t>(0, files.number(base + cgroup.used).value_or(0));
      uint64_t used = static_cast<uint64_t>(used_raw);
      uint64_t left = bytes - std::min(bytes, used);
      if (left < least_left) {
        least_left = left;
        limits->cgroup_bytes = bytes;
        limits->cgroup_used_bytes = used;
      }
    }
    size_t slash = path.rfind('/');
    if (path.empty() || slash == std::string::npos) break;
    path.resize(slash);
  }
}

}  // namespace

EndpointCost endpoint_cost(std::string_view provider) {
  if (provider == "efa") return {143 * kMiB, 109 * kMiB};
  if (provider == "tcp" || provider == "net" || provider == "shm") return {6 * kMiB, 0};
  if (provider == "cma" || provider == "sim") return {kMiB / 2, 0};
  bool over_rdma = !provider.starts_with("tcp");
  return {139 * kMiB, over_rdma ? 139 * kMiB : 0};
}

RailMemory predict_rail_memory(std::string_view provider, const RailChoice& choice, const RailWindows& windows) {
  EndpointCost cost = endpoint_cost(provider);
  uint64_t per_rail = add(multiply(cost.bytes, windows.endpoints_per_rail), windows.staging_bytes);
  uint64_t pinned = add(multiply(cost.pinned, windows.endpoints_per_rail), windows.staging_bytes);
  // tcp registers nothing with a device.
  uint64_t registered = cost.pinned > 0 ? windows.registered_host_bytes : 0;
  RailMemory memory;
  memory.rails = static_cast<uint32_t>(choice.chosen.size());
  memory.candidates = choice.candidates;
  memory.place = choice.place;
  memory.bytes = multiply(per_rail, memory.rails);
  memory.pinned_bytes = multiply(pinned, memory.rails);
  memory.locked_bytes = multiply(add(pinned, registered), memory.rails);
  memory.all_bytes = multiply(per_rail, memory.candidates);
  return memory;
}

std::string RailMemory::describe() const {
  std::string out = fmt::format("opens {} of {} NIC{} ({}): predicted {}", rails, candidates,
                                candidates == 1 ? "" : "s", place, format_bytes(bytes));
  if (pinned_bytes > 0) out += fmt::format(", {} of it pinned", format_bytes(pinned_bytes));
  if (candidates > rails) out += fmt::format("; all {} would take {}", candidates, format_bytes(all_bytes));
  return out;
}

MemoryLimits MemoryLimits::read(const std::string& root) {
  SysfsReader files(root);
  MemoryLimits limits;
  std::string status = files.text("proc/self/status", 64 << 10).value_or("");
  struct rlimit memlock {};
  if (!may_lock_anything(status) && ::getrlimit(RLIMIT_MEMLOCK, &memlock) == 0 &&
      memlock.rlim_cur != RLIM_INFINITY) {
    limits.memlock_bytes = memlock.rlim_cur;
    limits.memlock_used_bytes = status_kib(status, "VmPin");
  }
  for (const CgroupFiles& cgroup : cgroup_files(files)) {
    read_cgroup(files, cgroup, &limits);
    if (limits.cgroup_bytes) break;
  }
  return limits;
}

MemoryVerdict check_rail_memory(const RailMemory& memory, const MemoryLimits& limits) {
  MemoryVerdict verdict;
  if (limits.memlock_bytes && memory.locked_bytes > 0) {
    uint64_t used = std::min(*limits.memlock_bytes, limits.memlock_used_bytes.value_or(0));
    uint64_t left = *limits.memlock_bytes - used;
    if (memory.locked_bytes > left) {
      verdict.status = resource_exhausted(
          "{} rails lock {} of memory, but this process may lock {} more (ulimit -l: {}, {} in use): raise "
          "the limit, give the container the IPC_LOCK capability, or open fewer NICs (--rails)",
          memory.rails, format_bytes(memory.locked_bytes), format_bytes(left), format_bytes(*limits.memlock_bytes),
          format_bytes(used));
      return verdict;
    }
  }
  if (limits.cgroup_bytes) {
    uint64_t used = std::min(*limits.cgroup_bytes, limits.cgroup_used_bytes.value_or(0));
    uint64_t left = *limits.cgroup_bytes - used;
    if (memory.bytes > left) {
      verdict.status = resource_exhausted(
          "{} rails take {} of memory, but this container has {} left of {}: raise its memory limit or open "
          "fewer NICs (--rails)",
          memory.rails, format_bytes(memory.bytes), format_bytes(left), format_bytes(*limits.cgroup_bytes));
    } else if (memory.bytes > left / 2) {
      verdict.warning = fmt::format("{} rails take {} of the {} that this container has left (limit {})",
                                    memory.rails, format_bytes(memory.bytes), format_bytes(left),
                                    format_bytes(*limits.cgroup_bytes));
    }
  }
  return verdict;
}

}  // namespace baton::transfer
