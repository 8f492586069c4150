#include "transfer/fabric/forgotten_infos.h"

#include <cstddef>
#include <cstring>
#include <utility>

namespace baton::transfer::fabric {

struct ForgottenInfos::Noted {
  fid_nic witness{};  // first: what is closed is found by its address
  fi_ops witness_ops{};
  fi_info* info = nullptr;  // null: the provider has freed it
};

ForgottenInfos::ForgottenInfos() = default;

ForgottenInfos::~ForgottenInfos() { free_all(); }

bool ForgottenInfos::needed(const fi_info& info) {
  return std::strcmp(info.fabric_attr->prov_name, "net") == 0 && info.ep_attr->type == FI_EP_RDM;
}

void ForgottenInfos::watch(fid_fabric* fabric) {
  real_fabric_ = fabric->ops;
  fabric_ops_ = *fabric->ops;
  fabric_ops_.passive_ep = passive_endpoint;
  fabric->ops = &fabric_ops_;
}

void ForgottenInfos::watch(fid_domain* domain) {
  real_domain_ = domain->ops;
  domain_ops_ = *domain->ops;
  domain_ops_.endpoint = endpoint;
  domain->ops = &domain_ops_;
}

void ForgottenInfos::note(fi_info* info) {
  if (info->nic != nullptr) return;  // a device's: not what tcp forgets
  auto noted = std::make_unique<Noted>();
  noted->witness_ops.size = sizeof(fi_ops);
  noted->witness_ops.close = close_witness;
  noted->witness.fid.ops = &noted->witness_ops;
  noted->info = info;
  info->nic = &noted->witness;
  noted_.push_back(std::move(noted));
}

/// An endpoint's own: the provider makes it, hands it to the listening half, which copies it, and never looks at it again.
int ForgottenInfos::passive_endpoint(fid_fabric* fabric, fi_info* info, fid_pep** endpoint, void* context) {
  auto& self = *static_cast<ForgottenInfos*>(fabric->fid.context);
  int ret = self.real_fabric_->passive_ep(fabric, info, endpoint, context);
  if (ret == 0) self.note(info);
  return ret;
}

/// A connection's: only what is accepted comes with the handle of a request.
int ForgottenInfos::endpoint(fid_domain* domain, fi_info* info, fid_ep** endpoint, void* context) {
  auto& self = *static_cast<ForgottenInfos*>(domain->fid.context);
  int ret = self.real_domain_->endpoint(domain, info, endpoint, context);
  if (ret == 0 && info->handle != nullptr && info->handle->fclass == FI_CLASS_CONNREQ) self.note(info);
  return ret;
}

int ForgottenInfos::close_witness(fid* witness) {
  static_assert(offsetof(Noted, witness) == 0 && offsetof(fid_nic, fid) == 0);
  reinterpret_cast<Noted*>(witness)->info = nullptr;
  return 0;
}

size_t ForgottenInfos::free_all() {
  size_t count = 0;
  for (const std::unique_ptr<Noted>& noted : noted_) {
    if (noted->info == nullptr) continue;
    noted->info->nic = nullptr;
    fi_freeinfo(noted->info);
    ++count;
  }
  noted_.clear();
  return count;
}

}  // namespace baton::transfer::fabric
