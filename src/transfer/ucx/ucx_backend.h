#pragma once

#include <memory>
#include <string>
#include <string_view>

#include "transfer/backend.h"

namespace baton::transfer {

/// UCX: RDMA where there is a device, else tcp ("ucx"), or what is named behind a colon ("ucx:tcp", "ucx:rc,ud", as in
/// UCX_TLS).
///
/// With RDMA a write is ucp_put for every piece and a flush of the endpoint; when that has ended an active message
/// tells the peer how much there is. One worker serves all peers: a link closes when its operations have ended (they
/// are aborted when somebody wants it closed), a fence waits for the writer's word.
///
/// With tcp a write is an active message for every piece, which the owner of the memory puts where it belongs and
/// confirms. Every peer and direction has a worker of its own: the writer's is destroyed to end a write for certain,
/// the owner's to shut a writer out for certain.
///
/// kUnimplemented when this build has no UCX, kUnavailable when this machine has none.
Result<std::unique_ptr<Backend>> create_ucx_backend(std::shared_ptr<BackendContext> context,
                                                    const std::string& transport);

/// Is `transport` "ucx" or "ucx:<list of transports>"?
inline bool is_ucx_transport(std::string_view transport) {
  if (transport == "ucx") return true;
  return transport.starts_with("ucx:") && transport.size() > 4 && transport.size() <= 128 &&
         transport.find_first_not_of("abcdefghijklmnopqrstuvwxyz0123456789_,:^", 4) == std::string_view::npos;
}

}  // namespace baton::transfer
