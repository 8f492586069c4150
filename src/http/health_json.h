#pragma once

#include <string>

#include "router/router.h"

namespace baton::http {

/// The body of /health and /ready: the verdict, why not, each worker with its blocks and queues, and each prefill/decode
/// pair with its transport and why that one.
std::string health_json(const RouterHealth& health, const std::string& model, bool draining);

}  // namespace baton::http
