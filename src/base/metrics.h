#pragma once

#include <prometheus/counter.h>
#include <prometheus/family.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/metric_family.h>
#include <prometheus/registry.h>

#include <string>
#include <vector>

namespace baton {

/// All metrics of one process. Families are made once at start; updating one is lock-free.
/// Include this header only in .cc files: it is heavy.
using MetricsRegistry = prometheus::Registry;
using MetricFamilies = std::vector<prometheus::MetricFamily>;

/// Bucket bounds in seconds for latencies from 100 us to 100 s (TTFT, queue time, end to end).
prometheus::Histogram::BucketBoundaries latency_buckets_s();
/// Bucket bounds in seconds for gaps between tokens, from 100 us to 5 s.
prometheus::Histogram::BucketBoundaries itl_buckets_s();

/// Adds the label to every metric of every family ("worker" = "decode-0").
void add_label(MetricFamilies& families, const std::string& name, const std::string& value);
/// Joins families of one name, as the text format demands; order by name.
MetricFamilies merge_families(std::vector<MetricFamilies> sources);
/// The Prometheus text exposition format, version 0.0.4.
std::string to_prometheus_text(const MetricFamilies& families);

}  // namespace baton
