#include "protocol/metrics_codec.h"

#include <prometheus/metric_family.h>

#include <algorithm>

#include "protocol/baton.pb.h"

namespace baton::protocol {

namespace {

constexpr int kMaxFamilies = 512;
constexpr int kMaxMetrics = 4096;  // of one family
constexpr int kMaxLabels = 16;
constexpr int kMaxBuckets = 128;
constexpr size_t kMaxNameBytes = 200;
constexpr size_t kMaxTextBytes = 1000;

using prometheus::MetricType;

// On the wire, whatever the library's enumeration becomes.
enum WireType : int32_t { kCounter = 0, kGauge = 1, kHistogram = 2, kUntyped = 3 };

bool name_is_valid(std::string_view name, bool colon_allowed) {
  if (name.empty() || name.size() > kMaxNameBytes || (name[0] >= '0' && name[0] <= '9')) return false;
  return std::all_of(name.begin(), name.end(), [&](char c) {
    return (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' ||
           (c == ':' && colon_allowed);
  });
}

Status decode_metric(const MetricsSnapshot::Metric& from, MetricType type, const std::string& family,
                     prometheus::ClientMetric* to) {
  if (from.labels_size() > kMaxLabels) {
    return invalid_argument("metric {}: {} labels, the limit is {}", family, from.labels_size(), kMaxLabels);
  }
  for (const auto& label : from.labels()) {
    if (!name_is_valid(label.name(), false) || label.value().size() > kMaxTextBytes) {
      return invalid_argument("metric {}: a bad label", family);
    }
    to->label.push_back({label.name(), label.value()});
  }
  switch (type) {
    case MetricType::Counter: to->counter.value = from.value(); return {};
    case MetricType::Gauge: to->gauge.value = from.value(); return {};
    case MetricType::Untyped: to->untyped.value = from.value(); return {};
    default: break;
  }
  if (from.buckets_size() > kMaxBuckets) {
    return invalid_argument("metric {}: {} buckets, the limit is {}", family, from.buckets_size(), kMaxBuckets);
  }
  to->histogram.sample_count = from.sample_count();
  to->histogram.sample_sum = from.sample_sum();
  for (const auto& bucket : from.buckets()) {
    prometheus::ClientMetric::Bucket b;
    b.cumulative_count = bucket.cumulative_count();
    b.upper_bound = bucket.upper_bound();
    to->histogram.bucket.push_back(b);
  }
  return {};
}

}  // namespace

std::string encode_metrics(const std::vector<prometheus::MetricFamily>& families) {
  MetricsSnapshot snapshot;
  for (const auto& family : families) {
    WireType type = kUntyped;
    switch (family.type) {
      case MetricType::Counter: type = kCounter; break;
      case MetricType::Gauge: type = kGauge; break;
      case MetricType::Histogram: type = kHistogram; break;
      case MetricType::Untyped: type = kUntyped; break;
      default: continue;
    }
    auto* to = snapshot.add_families();
    to->set_name(family.name);
    to->set_help(family.help);
    to->set_type(type);
    for (const auto& metric : family.metric) {
      auto* m = to->add_metrics();
      for (const auto& label : metric.label) {
        auto* l = m->add_labels();
        l->set_name(label.name);
        l->set_value(label.value);
      }
      if (type == kCounter) m->set_value(metric.counter.value);
      if (type == kGauge) m->set_value(metric.gauge.value);
      if (type == kUntyped) m->set_value(metric.untyped.value);
      if (type != kHistogram) continue;
      m->set_sample_count(metric.histogram.sample_count);
      m->set_sample_sum(metric.histogram.sample_sum);
      for (const auto& bucket : metric.histogram.bucket) {
        auto* b = m->add_buckets();
        b->set_cumulative_count(bucket.cumulative_count);
        b->set_upper_bound(bucket.upper_bound);
      }
    }
  }
  return snapshot.SerializeAsString();
}

Result<std::vector<prometheus::MetricFamily>> decode_metrics(std::string_view bytes) {
  MetricsSnapshot snapshot;
  if (!snapshot.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return invalid_argument("{} bytes of metrics can't be parsed", bytes.size());
  }
  if (snapshot.families_size() > kMaxFamilies) {
    return invalid_argument("{} metric families, the limit is {}", snapshot.families_size(), kMaxFamilies);
  }
  std::vector<prometheus::MetricFamily> families;
  for (const auto& from : snapshot.families()) {
    if (!name_is_valid(from.name(), true) || from.help().size() > kMaxTextBytes) {
      return invalid_argument("a metric family with a bad name or help text");
    }
    if (from.metrics_size() > kMaxMetrics) {
      return invalid_argument("metric {}: {} series, the limit is {}", from.name(), from.metrics_size(), kMaxMetrics);
    }
    prometheus::MetricFamily family;
    family.name = from.name();
    family.help = from.help();
    switch (from.type()) {
      case kCounter: family.type = MetricType::Counter; break;
      case kGauge: family.type = MetricType::Gauge; break;
      case kHistogram: family.type = MetricType::Histogram; break;
      case kUntyped: family.type = MetricType::Untyped; break;
      default: return invalid_argument("metric {}: unknown type {}", from.name(), from.type());
    }
    family.metric.resize(static_cast<size_t>(from.metrics_size()));
    for (int i = 0; i < from.metrics_size(); ++i) {
      BATON_RETURN_IF_ERROR(decode_metric(from.metrics(i), family.type, from.name(), &family.metric[i]));
    }
    families.push_back(std::move(family));
  }
  return families;
}

}  // namespace baton::protocol
