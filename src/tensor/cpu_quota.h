#pragma once

#include <string>

namespace baton {

/// CPUs that the cgroup quota of a process grants, rounded up; 0 when there is no quota. Both versions of
/// cgroups; the tightest limit on the way from the process's group to the root counts.
/// `proc_cgroup`: the contents of /proc/self/cgroup. `root`: where cgroups are mounted ("/sys/fs/cgroup").
int cgroup_quota_cpus(const std::string& proc_cgroup, const std::string& root);

}  // namespace baton
