#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "base/status.h"

namespace baton::ops {

/// What `baton bench serve` sends and to whom. Works with any server that speaks /v1/completions with streaming.
struct BenchServeOptions {
  std::string url = "http://127.0.0.1:8000";
  std::string model;                 ///< empty: the first of /v1/models
  int32_t isl = 512;                 ///< prompt tokens, mean
  int32_t osl = 64;                  ///< answer tokens, mean
  double length_spread = 0.0;        ///< lengths are uniform in mean * [1 - s, 1 + s]
  int32_t concurrency = 8;           ///< closed loop: so many at once
  double rate = 0;                   ///< open loop: requests per second (Poisson); then concurrency is only the limit
  int64_t requests = 100;
  double duration_s = 0;             ///< instead of a number of requests
  int64_t warmup = 2;                ///< requests before the clock starts
  int32_t shared_prefix = 0;         ///< tokens that all prompts of a group begin with
  int32_t prefix_groups = 1;
  bool text = false;                 ///< prompts as text instead of token ids (isl in words)
  int32_t vocab_size = 1000;         ///< token ids are drawn from [3, vocab_size)
  double disconnect = 0;             ///< share of clients that leave somewhere in the middle
  double slo_ttft_ms = 0, slo_itl_ms = 0;  ///< goodput counts requests within both; 0: no bound
  double temperature = 0;
  uint64_t seed = 1;
  int64_t timeout_ms = 600'000;      ///< of one request
  bool progress = true;              ///< a line on stderr every second

  Status validate() const;
};

/// One request as its client saw it. Times in seconds from the start of the run.
struct RequestRecord {
  double start_s = 0, first_s = 0, end_s = 0;
  std::vector<float> gaps_s;         ///< between events with tokens
  int64_t prompt_tokens = 0, output_tokens = 0;
  bool ok = false, disconnected = false;
  std::string error;                 ///< of a failed one, for counting
};

struct Distribution {
  double mean = 0, p50 = 0, p90 = 0, p95 = 0, p99 = 0, max = 0;
  size_t count = 0;
};
/// Linear interpolation between closest ranks.
Distribution describe(std::vector<double> values);

struct BenchServeResult {
  BenchServeOptions options;
  std::string model;
  std::vector<RequestRecord> records;  ///< in order of start
  double wall_s = 0;
  Distribution ttft_ms, itl_ms, tpot_ms, e2e_ms;
  double requests_per_s = 0, output_tokens_per_s = 0, total_tokens_per_s = 0, goodput_per_s = 0;
  int64_t succeeded = 0, failed = 0, disconnected = 0;
  std::map<std::string, int64_t> errors;
};

/// Runs the load; fails only when the server can't be reached at all or the options are wrong.
Result<BenchServeResult> run_bench_serve(const BenchServeOptions& options);

std::string bench_serve_table(const BenchServeResult& result);
std::string bench_serve_json(const BenchServeResult& result);
/// A page of its own, with pictures (SVG) and no outside reference.
std::string bench_serve_html(const BenchServeResult& result);

}  // namespace baton::ops
