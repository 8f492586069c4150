#include "transfer/ucx/ucx_backend.h"

namespace baton::transfer {

Result<std::unique_ptr<Backend>> create_ucx_backend(std::shared_ptr<BackendContext>, const std::string& transport) {
  return unimplemented("transport '{}': this build has no UCX (install libucx-dev and configure again)", transport);
}

}  // namespace baton::transfer
