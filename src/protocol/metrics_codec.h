#pragma once

#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

namespace prometheus {
struct MetricFamily;
}

namespace baton::protocol {

/// A worker's metrics as they travel in Load.metrics (a serialized MetricsSnapshot). Summaries are left out: they can't
/// be merged.
std::string encode_metrics(const std::vector<prometheus::MetricFamily>& families);

/// The reverse, for bytes from outside: names, sizes and counts are checked (invalid_argument).
Result<std::vector<prometheus::MetricFamily>> decode_metrics(std::string_view bytes);

}  // namespace baton::protocol
