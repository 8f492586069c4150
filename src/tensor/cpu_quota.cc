#include "tensor/cpu_quota.h"

#include <sched.h>

#include <algorithm>
#include <cstdint>
#include <fstream>
#include <iterator>
#include <sstream>
#include <vector>

#include "tensor/thread_pool.h"

namespace baton {
namespace {

std::string read_file(const std::string& path) {
  std::ifstream file(path);
  return std::string(std::istreambuf_iterator<char>(file), {});
}

int cpus_of(int64_t quota, int64_t period) {
  if (quota <= 0 || period <= 0) return 0;
  return static_cast<int>(std::min<int64_t>((quota + period - 1) / period, 1 << 20));
}

/// cgroup v2: "max 100000" or "150000 100000".
int quota_v2(const std::string& directory) {
  std::istringstream text(read_file(directory + "/cpu.max"));
  int64_t quota = 0, period = 0;
  return text >> quota >> period ? cpus_of(quota, period) : 0;
}

/// cgroup v1: -1 when unlimited.
int quota_v1(const std::string& directory) {
  std::istringstream quota_text(read_file(directory + "/cpu.cfs_quota_us"));
  std::istringstream period_text(read_file(directory + "/cpu.cfs_period_us"));
  int64_t quota = 0, period = 0;
  return quota_text >> quota && period_text >> period ? cpus_of(quota, period) : 0;
}

int tighter(int a, int b) {
  if (a == 0 || b == 0) return std::max(a, b);
  return std::min(a, b);
}

/// The tightest quota at `root` + `path` and its parents. A container without its own cgroup namespace is told
/// a path that it cannot see: then only the mounted root counts.
template <typename Quota>
int quota_upwards(const std::string& root, std::string path, Quota quota) {
  int cpus = 0;
  while (true) {
    while (!path.empty() && path.back() == '/') path.pop_back();
    cpus = tighter(cpus, quota(root + path));
    if (path.empty()) return cpus;
    path.resize(path.find_last_of('/') == std::string::npos ? 0 : path.find_last_of('/'));
  }
}

bool has_controller(const std::string& list, const std::string& wanted) {
  std::istringstream items(list);
  for (std::string item; std::getline(items, item, ',');) {
    if (item == wanted) return true;
  }
  return false;
}

}  // namespace

int cgroup_quota_cpus(const std::string& proc_cgroup, const std::string& root) {
  int cpus = 0;
  std::istringstream lines(proc_cgroup);
  for (std::string line; std::getline(lines, line);) {  // "4:cpu,cpuacct:/docker/1234" or "0::/user.slice"
    const size_t first = line.find(':');
    const size_t second = first == std::string::npos ? first : line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = line.substr(first + 1, second - first - 1);
    const std::string path = line.substr(second + 1);
    if (controllers.empty()) {
      cpus = tighter(cpus, quota_upwards(root, path, quota_v2));
      cpus = tighter(cpus, quota_upwards(root + "/unified", path, quota_v2));
    } else if (has_controller(controllers, "cpu")) {
      cpus = tighter(cpus, quota_upwards(root + "/" + controllers, path, quota_v1));
      if (controllers != "cpu") cpus = tighter(cpus, quota_upwards(root + "/cpu", path, quota_v1));
    }
  }
  return cpus;
}

int usable_cpus() {
  // The mask is sized for the largest kernel configuration, else sched_getaffinity fails on big hosts.
  constexpr int kMaxCpus = 8192;
  std::vector<std::byte> mask(CPU_ALLOC_SIZE(kMaxCpus));
  auto* const set = reinterpret_cast<cpu_set_t*>(mask.data());
  int cpus = 1;
  if (sched_getaffinity(0, mask.size(), set) == 0) cpus = std::max(1, CPU_COUNT_S(mask.size(), set));
  const int quota = cgroup_quota_cpus(read_file("/proc/self/cgroup"), "/sys/fs/cgroup");
  return std::max(1, tighter(cpus, quota));
}

}  // namespace baton
