#pragma once

#include <memory>
#include <vector>

#include "transfer/fabric/handles.h"

namespace baton::transfer::fabric {

/// libfabric 1.17's tcp ("net") forgets an fi_info for every endpoint that is opened and one for every connection that it
/// accepts (0.5 KiB each; fixed in 1.18). Both pass through the function tables of the fabric and the domain, where they are
/// noted, and freed once the provider should have done it.
///
/// Should a provider under that name free them after all, each carries a witness: fi_freeinfo() closes the `nic` of an
/// fi_info, and ours tells that it was closed. So nothing is ever freed twice.
///
/// Not thread-safe: under the agent's lock, as the endpoints are. Outlives the fabric and the domain that it watches.
class ForgottenInfos {
 public:
  ForgottenInfos();
  ~ForgottenInfos();
  ForgottenInfos(const ForgottenInfos&) = delete;
  ForgottenInfos& operator=(const ForgottenInfos&) = delete;

  static bool needed(const fi_info& info);
  /// Both have to be opened with `this` as their context.
  void watch(fid_fabric* fabric);
  void watch(fid_domain* domain);
  /// When no call into the provider is under way. Returns how many were freed.
  size_t free_all();

 private:
  struct Noted;

  void note(fi_info* info);
  static int passive_endpoint(fid_fabric* fabric, fi_info* info, fid_pep** endpoint, void* context);
  static int endpoint(fid_domain* domain, fi_info* info, fid_ep** endpoint, void* context);
  static int close_witness(fid* witness);

  fi_ops_fabric* real_fabric_ = nullptr;
  fi_ops_domain* real_domain_ = nullptr;
  fi_ops_fabric fabric_ops_{};
  fi_ops_domain domain_ops_{};
  std::vector<std::unique_ptr<Noted>> noted_;
};

}  // namespace baton::transfer::fabric
