#pragma once

#include <memory>

#include "transfer/backend.h"

namespace baton::transfer {

/// libfabric: tcp ("net" in 1.17, "tcp" from 1.18), efa, verbs, by one code path that does what the
/// provider says it wants (mr_mode bits, CQ data, iov limits, wait objects).
///
/// Where endpoints are cheap (tcp) every peer and direction has its own: the writer's is closed to end a
/// write for certain, and the owner's is closed to shut a writer out for certain, without touching any
/// other peer. Where they are not (efa: 143 MiB each), one endpoint serves all, a link closes when its
/// operations have ended, and a fence waits for the writer's word.
///
/// With `open_now` false nothing is opened beside the control socket until the first peer comes.
Result<std::unique_ptr<Backend>> create_fabric_backend(std::shared_ptr<BackendContext> context,
                                                       const std::string& transport, bool open_now);

}  // namespace baton::transfer
