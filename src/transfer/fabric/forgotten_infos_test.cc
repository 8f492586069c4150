#include "transfer/fabric/forgotten_infos.h"

#include <gtest/gtest.h>

#include <string>

namespace baton::transfer::fabric {
namespace {

/// A provider that hands out endpoints which do nothing, and frees what it was given or not.
class FakeProvider {
 public:
  explicit FakeProvider(ForgottenInfos& infos) {
    fabric_ops_.size = sizeof(fabric_ops_);
    fabric_ops_.passive_ep = [](fid_fabric*, fi_info*, fid_pep**, void*) { return refuse_ ? -FI_ENOMEM : 0; };
    domain_ops_.size = sizeof(domain_ops_);
    domain_ops_.endpoint = [](fid_domain*, fi_info*, fid_ep**, void*) { return 0; };
    fabric_.ops = &fabric_ops_;
    fabric_.fid.context = &infos;
    domain_.ops = &domain_ops_;
    domain_.fid.context = &infos;
    infos.watch(&fabric_);
    infos.watch(&domain_);
    refuse_ = false;
  }
  fi_info* listen() {
    fi_info* info = fi_allocinfo();
    fid_pep* endpoint = nullptr;
    (void)fabric_.ops->passive_ep(&fabric_, info, &endpoint, nullptr);
    return info;
  }
  fi_info* connect(fid* request) {
    fi_info* info = fi_allocinfo();
    info->handle = request;
    fid_ep* endpoint = nullptr;
    (void)domain_.ops->endpoint(&domain_, info, &endpoint, nullptr);
    return info;
  }
  static inline bool refuse_ = false;

 private:
  fi_ops_fabric fabric_ops_{};
  fi_ops_domain domain_ops_{};
  fid_fabric fabric_{};
  fid_domain domain_{};
};

// The address sanitizer says when one of these is freed twice or not at all.
TEST(ForgottenInfos, FreesWhatTheProviderForgets) {
  ForgottenInfos infos;
  FakeProvider provider(infos);
  fid request{};
  request.fclass = FI_CLASS_CONNREQ;
  provider.listen();
  provider.connect(&request);
  EXPECT_EQ(infos.free_all(), 2u);
  EXPECT_EQ(infos.free_all(), 0u);
}

TEST(ForgottenInfos, LeavesAloneWhatTheProviderHasFreed) {
  ForgottenInfos infos;
  FakeProvider provider(infos);
  fid request{};
  request.fclass = FI_CLASS_CONNREQ;
  fi_freeinfo(provider.listen());
  fi_freeinfo(provider.connect(&request));
  EXPECT_EQ(infos.free_all(), 0u);
}

TEST(ForgottenInfos, LeavesAloneWhatTheProviderKeeps) {
  ForgottenInfos infos;
  FakeProvider provider(infos);
  FakeProvider::refuse_ = true;
  fi_freeinfo(provider.listen());          // refused: the provider's own way out frees it
  fi_info* own = provider.connect(nullptr);  // a connection of ours: made of the endpoint's own fi_info
  EXPECT_EQ(infos.free_all(), 0u);
  fi_freeinfo(own);
}

TEST(ForgottenInfos, IsForOneProviderOnly) {
  fi_info* info = fi_allocinfo();
  info->ep_attr->type = FI_EP_RDM;
  for (const char* name : {"net", "tcp", "efa"}) {
    std::string copy = name;
    info->fabric_attr->prov_name = copy.data();
    EXPECT_EQ(ForgottenInfos::needed(*info), copy == "net");
  }
  info->fabric_attr->prov_name = nullptr;
  fi_freeinfo(info);
}

}  // namespace
}  // namespace baton::transfer::fabric
