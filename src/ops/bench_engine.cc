#include "ops/bench_engine.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "base/clock.h"
#include "base/random.h"
#include "engine/engine.h"
#include "model/model.h"
#include "ops/bench_serve.h"

namespace baton::ops {

namespace {

double median(std::vector<double> values) { return describe(std::move(values)).p50; }

double seconds_since(int64_t begin_ns) { return static_cast<double>(SteadyClock::instance().now_ns() - begin_ns) * 1e-9; }

class EngineBench {
 public:
  EngineBench(const BenchEngineOptions& options, Model& model) : options_(options), model_(model) {}

  Status create_engine() {
    EngineConfig config;
    config.block_tokens = options_.block_tokens;
    config.max_batched_tokens = options_.max_batched_tokens;
    config.prefix_cache = false;
    const BlockLayout layout = model_.layout(config.block_tokens);
    int64_t longest = 1, sequences = 1;
    for (int32_t batch : options_.decode_batches) sequences = std::max<int64_t>(sequences, batch);
    for (int32_t context : options_.decode_contexts) longest = std::max<int64_t>(longest, context + options_.decode_tokens + 1);
    config.kv_blocks = sequences * (layout.tokens_to_blocks(longest) + 1);
    for (int32_t tokens : options_.prefill_tokens) {
      longest = std::max<int64_t>(longest, tokens + 1);
      config.kv_blocks = std::max(config.kv_blocks, layout.tokens_to_blocks(tokens + 1) + 1);
    }
    if (longest > model_.config().max_position_embeddings) {
      return invalid_argument("{} tokens were asked for; the model's limit is {}", longest, model_.config().max_position_embeddings);
    }
    BATON_ASSIGN_OR_RETURN(engine_, Engine::create(config, model_));
    return {};
  }

  Status submit(int32_t prompt_tokens, int32_t output_tokens) {
    Request request;
    request.id = RequestId{next_id_++};
    for (int32_t i = 0; i < prompt_tokens; ++i) {
      request.prompt.push_back(static_cast<TokenId>(random_.below(static_cast<uint64_t>(model_.config().vocab_size))));
    }
    request.sampling.temperature = 0;
    request.sampling.max_tokens = output_tokens;
    request.sampling.ignore_eos = true;
    return engine_->submit(std::move(request));
  }

  /// Seconds from submission to the first token.
  Result<double> prefill(int32_t tokens) {
    BATON_RETURN_IF_ERROR(submit(tokens, 1));
    int64_t begin_ns = SteadyClock::instance().now_ns();
    while (engine_->has_work()) {
      for (const TokenOutput& output : engine_->step().tokens) {
        if (output.finish == FinishReason::kError) return output.status;
      }
    }
    return seconds_since(begin_ns);
  }

  /// Seconds per step with `batch` sequences of `context` tokens, all decoding.
  Result<double> decode(int32_t batch, int32_t context) {
    for (int32_t i = 0; i < batch; ++i) BATON_RETURN_IF_ERROR(submit(context, options_.decode_tokens));
    // Prefill ends when every sequence has its first token; what comes after is decode alone.
    int32_t with_token = 0;
    int64_t begin_ns = 0, steps = 0;
    while (engine_->has_work()) {
      StepOutput output = engine_->step();
      bool counted = with_token == batch;
      for (const TokenOutput& token : output.tokens) {
        if (token.finish == FinishReason::kError) return token.status;
        if (token.index == 0) ++with_token;
      }
      if (!counted) {
        begin_ns = SteadyClock::instance().now_ns();
        continue;
      }
      if (static_cast<int32_t>(output.tokens.size()) == batch) {
        ++steps;
        last_full_ns_ = SteadyClock::instance().now_ns();
      }
    }
    if (steps == 0) return failed_precondition("no full decode step; give more --decode-tokens");
    return static_cast<double>(last_full_ns_ - begin_ns) * 1e-9 / static_cast<double>(steps);
  }

  /// Bytes that a decode step must read: all weights once, and each sequence's KV.
  double decode_bytes(int32_t batch, int32_t context) const {
    return static_cast<double>(model_.weight_bytes()) + kv_bytes(batch, context);
  }
  double kv_bytes(int32_t batch, int32_t context) const {
    BlockLayout layout = model_.layout(options_.block_tokens);
    double kv_token_bytes = static_cast<double>(layout.block_bytes()) / layout.block_tokens;
    double mean_context = context + options_.decode_tokens / 2.0;
    return batch * mean_context * kv_token_bytes;
  }

  /// The KV cache of a decode step where it lies: a layer of a block is one piece. Bytes per second of nothing but loads; 0: not
  /// measured.
  double kv_read_bandwidth(int32_t batch, int32_t context) {
    const BlockLayout& layout = engine_->layout();
    const std::span<std::byte> pool = engine_->kv_pool();
    const int64_t blocks = std::min(batch * layout.tokens_to_blocks(context), engine_->config().kv_blocks);
    pieces_.clear();
    for (int64_t layer = 0; layer < layout.layers; ++layer) {
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t at = block * layout.block_bytes() + layout.layer_offset_bytes(static_cast<int32_t>(layer));
        pieces_.push_back(pool.subspan(static_cast<size_t>(at), static_cast<size_t>(layout.layer_bytes())));
      }
    }
    return model_.measure_piecewise_read_bytes_per_s(pieces_);
  }

  /// Bytes per second; far more bytes than the last-level cache holds, few passes, since it runs around each run.
  Result<double> read_bandwidth() {
    return model_.measure_read_bytes_per_s();
  }

 private:
  const BenchEngineOptions& options_;
  Model& model_;
  std::unique_ptr<Engine> engine_;
  std::vector<std::span<const std::byte>> pieces_;
  Random random_{7};
  uint64_t next_id_ = 1;
  int64_t last_full_ns_ = 0;
};

}  // namespace

Status BenchEngineOptions::validate() const {
  for (const auto* list : {&prefill_tokens, &decode_contexts, &decode_batches}) {
    for (int32_t value : *list) {
      if (value < 1) return invalid_argument("lengths and batches must be positive (one is {})", value);
    }
  }
  if (decode_tokens < 4) return invalid_argument("--decode-tokens is {}; give at least 4", decode_tokens);
  if (runs < 1) return invalid_argument("--runs is {}; it must be positive", runs);
  return {};
}

Result<BenchEngineResult> run_bench_engine(const BenchEngineOptions& options) {
  BATON_RETURN_IF_ERROR(options.validate());
  BenchEngineResult result;
  result.options = options;
  ModelOptions model_options;
  model_options.path = options.model_path;
  model_options.load_format = options.load_format;
  int64_t load_begin_ns = SteadyClock::instance().now_ns();
  BATON_ASSIGN_OR_RETURN(DeviceModel loaded, load_on_device(model_options, options.device));
  Model* const model = loaded.model.get();
  result.load_s = seconds_since(load_begin_ns);
  result.model = fmt::format("{} ({})", options.model_path.filename().string(), model->config().architecture);
  result.kernels = loaded.name;
  result.threads = loaded.kernels ? loaded.kernels->threads().threads() : 0;
  result.weight_bytes = model->weight_bytes();
  EngineBench bench(options, *model);
  BATON_RETURN_IF_ERROR(bench.create_engine());

  std::vector<double> bandwidths;
  for (int32_t tokens : options.prefill_tokens) {
    std::vector<double> speeds;
    for (int32_t run = 0; run <= options.runs; ++run) {
      BATON_ASSIGN_OR_RETURN(double seconds, bench.prefill(tokens));
      if (run > 0) speeds.push_back(tokens / seconds);  // the first run warms up
    }
    BenchEngineRow row{"prefill", tokens, 1, median(speeds), 0, 0, 0, 0, 0};
    std::tie(row.min_tokens_per_s, row.max_tokens_per_s) =
        std::pair(*std::min_element(speeds.begin(), speeds.end()), *std::max_element(speeds.begin(), speeds.end()));
    result.rows.push_back(row);
  }
  for (int32_t context : options.decode_contexts) {
    for (int32_t batch : options.decode_batches) {
      std::vector<double> speeds, shares, limits, piecewise;
      for (int32_t run = 0; run <= options.runs; ++run) {
        // The limit is measured before and after each run: neighbours change what the memory gives.
        BATON_ASSIGN_OR_RETURN(double before, bench.read_bandwidth());
        BATON_ASSIGN_OR_RETURN(double seconds, bench.decode(batch, context));
        BATON_ASSIGN_OR_RETURN(double after, bench.read_bandwidth());
        double bandwidth = (before + after) / 2;
        if (run == 0) continue;
        double limit = batch * bandwidth / bench.decode_bytes(batch, context);
        bandwidths.push_back(bandwidth);
        limits.push_back(limit);
        speeds.push_back(batch / seconds);
        shares.push_back(speeds.back() / limit);
        if (const double kv_bandwidth = bench.kv_read_bandwidth(batch, context); kv_bandwidth > 0) {
          const double weights_s = static_cast<double>(model->weight_bytes()) / bandwidth;
          piecewise.push_back(1.0 / (seconds / (weights_s + bench.kv_bytes(batch, context) / std::min(kv_bandwidth, bandwidth))));
        }
      }
      BenchEngineRow row{"decode", context, batch, median(speeds), *std::min_element(speeds.begin(), speeds.end()),
                         *std::max_element(speeds.begin(), speeds.end()), median(limits), median(shares),
                         piecewise.empty() ? 0 : median(piecewise)};
      result.rows.push_back(row);
    }
  }
  if (!bandwidths.empty()) result.read_bytes_per_s = median(bandwidths);
  return result;
}

std::string bench_engine_table(const BenchEngineResult& result) {
  std::string out = fmt::format("{}  kernels {}{}  weights {:.2f} GB, loaded in {:.1f} s\n", result.model, result.kernels,
                                result.threads > 0 ? fmt::format("  {} threads", result.threads) : "", static_cast<double>(result.weight_bytes) * 1e-9, result.load_s);
  if (result.read_bytes_per_s > 0) {
    out += fmt::format("memory limit: reading at {:.1f} GB/s, measured around each decode run\n", result.read_bytes_per_s * 1e-9);
  }
  out += fmt::format("\n{:<10}{:>9}{:>7}{:>12}{:>22}{:>12}{:>10}{:>14}\n", "", "tokens", "batch", "tok/s", "min .. max", "limit", "of limit",
                     "of bare loads");
  for (const BenchEngineRow& row : result.rows) {
    out += fmt::format("{:<10}{:>9}{:>7}{:>12.1f}{:>22}", row.what, row.tokens, row.batch, row.tokens_per_s,
                       fmt::format("{:.1f} .. {:.1f}", row.min_tokens_per_s, row.max_tokens_per_s));
    if (row.limit_tokens_per_s > 0) out += fmt::format("{:>12.1f}{:>9.0f}%", row.limit_tokens_per_s, 100 * row.share);
    if (row.bare_share > 0) out += fmt::format("{:>13.0f}%", 100 * row.bare_share);
    out += '\n';
  }
  return out + fmt::format("medians of {} runs. limit: weights and KV cache as one stream; bare loads: the same bytes where they lie, read by\n"
                           "a loop with nothing around it (the KV cache is in pieces, one for each block and layer)\n", result.options.runs);
}

std::string bench_engine_json(const BenchEngineResult& result) {
  nlohmann::ordered_json rows = nlohmann::ordered_json::array();
  for (const BenchEngineRow& row : result.rows) {
    rows.push_back({{"what", row.what}, {"tokens", row.tokens}, {"batch", row.batch}, {"tokens_per_s", row.tokens_per_s},
                    {"min_tokens_per_s", row.min_tokens_per_s}, {"max_tokens_per_s", row.max_tokens_per_s},
                    {"limit_tokens_per_s", row.limit_tokens_per_s}, {"share_of_limit", row.share}, {"share_of_bare_loads", row.bare_share}});
  }
  nlohmann::ordered_json out = {{"model", result.model}, {"kernels", result.kernels}, {"threads", result.threads},
                                {"weight_bytes", result.weight_bytes}, {"load_s", result.load_s},
                                {"read_bytes_per_s", result.read_bytes_per_s}, {"runs", result.options.runs}, {"rows", rows}};
  return out.dump(2) + "\n";
}

}  // namespace baton::ops
