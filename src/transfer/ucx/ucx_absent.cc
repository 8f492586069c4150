#include "transfer/ucx/ucx_backend.h"

namespace baton::transfer {

Result<std::unique_ptr<Backend>> create_ucx_backend(std::shared_ptr<BackendContext>, const std::string& transport) {
  return unimplemented("transport '{}': this build has no UCX (configure with -DBATON_UCX=ON; docs/transfer.md says why it is not the default)", transport);
}

}  // namespace baton::transfer
