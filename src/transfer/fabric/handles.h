#pragma once

#include <rdma/fabric.h>
#include <rdma/fi_cm.h>
#include <rdma/fi_domain.h>
#include <rdma/fi_endpoint.h>
#include <rdma/fi_errno.h>
#include <rdma/fi_rma.h>

#include <memory>

#include "base/log.h"
#include "base/unique_handle.h"

namespace baton::transfer::fabric {

/// Owns one libfabric object. Declare members in the order fabric, domain, av, cq, endpoint: libfabric
/// refuses (EBUSY) to close what something else still hangs on.
template <typename Fid>
struct FidTraits {
  using Handle = Fid*;
  static Fid* null() { return nullptr; }
  static void close(Fid* handle) {
    int ret = fi_close(&handle->fid);
    if (ret != 0) log_error("transfer: fi_close: {}", fi_strerror(-ret));
  }
};
using FabricHandle = UniqueHandle<FidTraits<fid_fabric>>;
using DomainHandle = UniqueHandle<FidTraits<fid_domain>>;
using AddressVectorHandle = UniqueHandle<FidTraits<fid_av>>;
using CompletionQueueHandle = UniqueHandle<FidTraits<fid_cq>>;
using EndpointHandle = UniqueHandle<FidTraits<fid_ep>>;
using MemoryHandle = UniqueHandle<FidTraits<fid_mr>>;

struct InfoDeleter {
  void operator()(fi_info* info) const { fi_freeinfo(info); }
};
using InfoPointer = std::unique_ptr<fi_info, InfoDeleter>;

}  // namespace baton::transfer::fabric
