#include "base/metrics.h"

#include <prometheus/text_serializer.h>

#include <map>

namespace baton {

prometheus::Histogram::BucketBoundaries latency_buckets_s() {
  return {0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1,
          0.25,   0.5,     1,      2.5,   5,      10,    25,   50,    100};
}

prometheus::Histogram::BucketBoundaries itl_buckets_s() {
  return {0.0001, 0.00025, 0.0005, 0.001, 0.002, 0.003, 0.005, 0.0075, 0.01, 0.015, 0.02,
          0.03,   0.04,    0.05,   0.075, 0.1,   0.15,  0.2,   0.3,    0.5,  1,     2.5, 5};
}

void add_label(MetricFamilies& families, const std::string& name, const std::string& value) {
  for (auto& family : families) {
    for (auto& metric : family.metric) metric.label.push_back({name, value});
  }
}

MetricFamilies merge_families(std::vector<MetricFamilies> sources) {
  std::map<std::string, prometheus::MetricFamily> by_name;
  for (auto& source : sources) {
    for (auto& family : source) {
      auto [it, inserted] = by_name.try_emplace(family.name, family);
      if (inserted) continue;
      if (it->second.type != family.type) continue;  // a foreign family; the first one wins
      auto& metrics = it->second.metric;
      metrics.insert(metrics.end(), family.metric.begin(), family.metric.end());
    }
  }
  MetricFamilies merged;
  for (auto& [name, family] : by_name) merged.push_back(std::move(family));
  return merged;
}

std::string to_prometheus_text(const MetricFamilies& families) {
  return prometheus::TextSerializer().Serialize(families);
}

}  // namespace baton
