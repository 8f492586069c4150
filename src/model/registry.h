#pragma once

#include <span>
#include <string_view>

#include "base/status.h"
#include "model/architecture.h"

namespace baton {

/// Every architecture there is, by name.
std::span<const Architecture* const> architectures();
/// unimplemented, with the list of those that exist, when `name` is none of them.
Result<const Architecture*> find_architecture(std::string_view name);

}  // namespace baton
