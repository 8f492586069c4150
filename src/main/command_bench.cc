#include <algorithm>
#include <cstdio>
#include <fstream>

#include "base/log.h"
#include "main/cli.h"
#include "main/options.h"
#include "ops/bench_engine.h"
#include "ops/bench_kernels.h"
#include "ops/bench_serve.h"
#include "ops/bench_transfer.h"

namespace baton::cli {

namespace {

Status write_file(const std::string& path, const std::string& text) {
  std::ofstream file(path, std::ios::binary);
  file << text;
  file.close();
  if (!file) return unavailable("cannot write {}", path);
  return {};
}

void add_bench_serve(CommandLine& line, CLI::App& bench) {
  struct Command {
    ops::BenchServeOptions options;
    std::string json_path, html_path;
    bool quiet = false;
  };
  auto command = std::make_shared<Command>();
  ops::BenchServeOptions& o = command->options;
  CLI::App* app = bench.add_subcommand("serve", "Load generator for any OpenAI-compatible server.");
  app->add_option("--url", o.url, "the server")->capture_default_str();
  app->add_option("--model", o.model, "model name [the server's first]");
  app->add_option("--isl", o.isl, "prompt tokens, mean")->capture_default_str();
  app->add_option("--osl", o.osl, "answer tokens, mean")->capture_default_str();
  app->add_option("--spread", o.length_spread, "lengths vary by this share of the mean, 0 to 1")->capture_default_str();
  CLI::Option* concurrency = app->add_option("-c,--concurrency", o.concurrency, "requests at once; with --rate the most at once [8; with --rate 4096]");
  app->add_option("--rate", o.rate, "requests per second, arriving at random, instead of a fixed concurrency");
  app->add_option("-n,--requests", o.requests, "how many in all")->capture_default_str();
  app->add_option("--duration", o.duration_s, "seconds to run, instead of --requests");
  app->add_option("--warmup", o.warmup, "requests before the clock starts")->capture_default_str();
  app->add_option("--shared-prefix", o.shared_prefix, "tokens that the prompts of a group share")->capture_default_str();
  app->add_option("--prefix-groups", o.prefix_groups, "groups of prompts with one prefix each")->capture_default_str();
  app->add_flag("--text", o.text, "prompts as text, for servers that take no token ids (ISL in words)");
  app->add_option("--vocab-size", o.vocab_size, "token ids are drawn below it")->capture_default_str();
  app->add_option("--temperature", o.temperature, "0: greedy")->capture_default_str();
  app->add_option("--disconnect", o.disconnect, "share of clients that leave in the middle, 0 to 1")->capture_default_str();
  app->add_option("--slo-ttft-ms", o.slo_ttft_ms, "goodput: time to first token at most");
  app->add_option("--slo-itl-ms", o.slo_itl_ms, "goodput: mean gap between tokens at most");
  app->add_option("--seed", o.seed, "of lengths and prompts")->capture_default_str();
  app->add_option("--timeout-ms", o.timeout_ms, "of one request")->capture_default_str();
  app->add_option("--json", command->json_path, "write the result there as JSON");
  app->add_option("--html", command->html_path, "write a report with pictures there");
  app->add_flag("-q,--quiet", command->quiet, "no progress line");
  app->callback([&line, command, concurrency] {
    if (command->options.rate > 0 && concurrency->count() == 0) command->options.concurrency = 4096;
    line.action = [command] {
      command->options.progress = !command->quiet;
      Result<ops::BenchServeResult> result = ops::run_bench_serve(command->options);
      if (!result.ok()) return fail("bench serve", result.status());
      fmt::print("{}", ops::bench_serve_table(*result));
      Status status;
      if (!command->json_path.empty()) status = write_file(command->json_path, ops::bench_serve_json(*result));
      if (status.ok() && !command->html_path.empty()) status = write_file(command->html_path, ops::bench_serve_html(*result));
      if (!status.ok()) return fail("bench serve", status);
      return result->failed > 0 ? 1 : 0;
    };
  });
}

void add_bench_engine(CommandLine& line, CLI::App& bench) {
  struct Command {
    ModelFlags model;
    EngineFlags engine;
    ops::BenchEngineOptions options;
    std::string json_path;
  };
  auto command = std::make_shared<Command>();
  command->model.load_format = "dummy";
  command->engine.max_batched_tokens = 0;
  ops::BenchEngineOptions& o = command->options;
  CLI::App* app = bench.add_subcommand("engine", "Prefill and decode speed beside this machine's limits.");
  command->model.add_to(*app);
  command->engine.add_to(*app);
  app->add_option("--prefill", o.prefill_tokens, "prompt lengths")->capture_default_str();
  app->add_option("--context", o.decode_contexts, "context lengths to decode at")->capture_default_str();
  app->add_option("--batch", o.decode_batches, "sequences decoded at once")->capture_default_str();
  app->add_option("--decode-tokens", o.decode_tokens, "tokens per decode run")->capture_default_str();
  app->add_option("--runs", o.runs, "runs of each; the median is shown")->capture_default_str();
  app->add_option("--json", command->json_path, "write the result there as JSON");
  app->callback([&line, command] {
    line.action = [command] {
      set_log_level(LogLevel::kWarning);
      ops::BenchEngineOptions options = command->options;
      Result<std::filesystem::path> folder = command->model.path();
      if (!folder.ok()) return fail("bench engine", folder.status());
      options.model_path = *folder;
      options.load_format = command->model.load_format;
      options.device = command->engine.device_options();
      options.block_tokens = command->engine.block_tokens;
      options.max_batched_tokens = command->engine.max_batched_tokens;
      Result<ops::BenchEngineResult> result = ops::run_bench_engine(options);
      if (!result.ok()) return fail("bench engine", result.status());
      fmt::print("{}", ops::bench_engine_table(*result));
      if (!command->json_path.empty()) {
        Status status = write_file(command->json_path, ops::bench_engine_json(*result));
        if (!status.ok()) return fail("bench engine", status);
      }
      return 0;
    };
  });
}

void add_bench_kernels(CommandLine& line, CLI::App& bench) {
  struct Command {
    ops::BenchKernelsOptions options;
    std::string json_path;
  };
  auto command = std::make_shared<Command>();
  ops::BenchKernelsOptions& o = command->options;
  CLI::App* app = bench.add_subcommand("kernels", "The operations of a step on a GPU beside its memory and its tensor cores.");
  app->add_option("--device", o.device, "cuda:N")->capture_default_str();
  app->add_option("--shape", o.shape, "whose shapes: llama-8b or qwen3-0.6b")->capture_default_str();
  app->add_option("--only", o.only, "operations whose name contains this [all]");
  app->add_option("--runs", o.runs, "runs of each; the median is shown")->capture_default_str();
  app->add_flag("--verify", o.verify, "hold every result beside the CPU's; takes minutes");
  app->add_option("--json", command->json_path, "write the result there as JSON");
  app->callback([&line, command] {
    line.action = [command] {
      Result<ops::BenchKernelsResult> result = ops::run_bench_kernels(command->options);
      if (!result.ok()) return fail("bench kernels", result.status());
      fmt::print("{}", ops::bench_kernels_table(*result));
      if (!command->json_path.empty()) {
        Status status = write_file(command->json_path, ops::bench_kernels_json(*result));
        if (!status.ok()) return fail("bench kernels", status);
      }
      const bool right = std::ranges::all_of(result->rows, [](const auto& row) { return row.error <= 1; });
      return right ? 0 : 1;
    };
  });
}

/// Sizes are words like 16KiB, which CLI11 leaves as they are.
Status parse_sizes(const std::vector<std::string>& words, const char* option, std::vector<uint64_t>& sizes) {
  sizes.clear();
  for (const std::string& word : words) {
    Result<int64_t> bytes = parse_bytes(word);
    if (!bytes.ok()) return bytes.status().with_context(option);
    if (*bytes <= 0) return invalid_argument("{} has '{}'; sizes are positive", option, word);
    sizes.push_back(static_cast<uint64_t>(*bytes));
  }
  return {};
}

void add_bench_transfer(CommandLine& line, CLI::App& bench) {
  struct Command {
    ops::BenchTransferOptions options;
    ops::BenchTransferTargetOptions target;
    std::vector<std::string> block_bytes = {"4KiB", "16KiB", "64KiB", "256KiB", "1MiB", "4MiB", "16MiB"};
    std::string pool_bytes = "512MiB";
    std::string role = "initiator", json_path, html_path;
    bool no_baseline = false, quiet = false;
  };
  auto command = std::make_shared<Command>();
  ops::BenchTransferOptions& o = command->options;
  CLI::App* app = bench.add_subcommand("transfer", "The transfer library between two processes or hosts, beside the bare transports.");
  app->add_option("--transport", o.transports, "auto, shm, tcp, efa, verbs, cuda_ipc, staged:shm, ...; one after the other")->capture_default_str();
  app->add_option("--operation", o.operation, "write (into the target's memory) or read (from it)")->capture_default_str();
  app->add_option("--block-bytes", command->block_bytes, "block sizes")->capture_default_str();
  app->add_option("--blocks", o.blocks, "blocks of one transfer [as many as come to 32 MiB, of GPU memory 256 MiB]");
  app->add_option("--order", o.order, "scattered, contiguous or both")->capture_default_str();
  app->add_option("--memory", o.memory, "the target's pool: shared (peers on its host may map it) or private; cuda: GPU memory on both sides")->capture_default_str();
  app->add_option("--device", o.device, "GPU of this side, with --memory cuda")->capture_default_str();
  app->add_option("--peer-device", o.peer_device, "GPU of the target [the next one, or the same where there is one]");
  app->add_option("--cuda-library", o.cuda_library, "CUDA's driver [libcuda.so.1]");
  app->add_option("--pool-bytes", command->pool_bytes, "memory on each side; with --listen the most that is given")->capture_default_str();
  app->add_option("--runs", o.runs, "runs of each; median, least and most are shown")->capture_default_str();
  app->add_option("--pings", o.pings, "blocks sent there and back for the notification latency, or read one by one")->capture_default_str();
  app->add_flag("--verify", o.verify, "compare every block on the target with the one here");
  app->add_flag("--integrity", o.integrity, "measure the library's integrity mode (hashes on both sides); no notification latency");
  app->add_flag("--no-baseline", command->no_baseline, "leave the bare transports out");
  CLI::Option* connect = app->add_option("--connect", o.connect, "HOST:PORT of a target [a process is started here]");
  CLI::Option* listen = app->add_option("--listen", command->target.listen, "be the target of one initiator: HOST:PORT");
  app->add_option("--timeout-ms", o.timeout_ms, "of one transfer")->capture_default_str();
  app->add_option("--seed", o.seed, "of the order of blocks")->capture_default_str();
  app->add_option("--json", command->json_path, "write the result there as JSON");
  app->add_option("--html", command->html_path, "write a report with pictures there");
  app->add_flag("-q,--quiet", command->quiet, "no line per row while it runs");
  connect->excludes(listen);
  // What the initiator starts itself with.
  app->add_option("--role", command->role)->group("");
  app->add_option("--fd", command->target.fd)->group("");
  app->callback([&line, command] {
    line.action = [command] {
      if (log_level() == LogLevel::kInfo) set_log_level(LogLevel::kWarning);
      ops::BenchTransferOptions& options = command->options;
      Result<int64_t> pool_bytes = parse_bytes(command->pool_bytes);
      if (!pool_bytes.ok()) return fail("bench transfer", pool_bytes.status());
      options.pool_bytes = static_cast<uint64_t>(std::max<int64_t>(*pool_bytes, 0));
      if (command->role == "target" || !command->target.listen.empty()) {
        command->target.max_pool_bytes = options.pool_bytes;
        command->target.timeout_ms = options.timeout_ms;
        command->target.cuda_library = options.cuda_library;
        Status status = ops::run_bench_transfer_target(command->target, [](uint16_t port) {
          fmt::print("waiting for an initiator on port {}\n", port);
          std::fflush(stdout);
        });
        return status.ok() ? 0 : fail("bench transfer", status);
      }
      if (Status status = parse_sizes(command->block_bytes, "--block-bytes", options.block_bytes); !status.ok()) {
        return fail("bench transfer", status);
      }
      options.baseline = !command->no_baseline;
      options.progress = !command->quiet;
      Result<ops::BenchTransferResult> result = ops::run_bench_transfer(options);
      if (!result.ok()) return fail("bench transfer", result.status());
      fmt::print("{}", ops::bench_transfer_table(*result));
      Status status;
      if (!command->json_path.empty()) status = write_file(command->json_path, ops::bench_transfer_json(*result));
      if (status.ok() && !command->html_path.empty()) status = write_file(command->html_path, ops::bench_transfer_html(*result));
      return status.ok() ? 0 : fail("bench transfer", status);
    };
  });
}

}  // namespace

void add_bench(CommandLine& line) {
  CLI::App* bench = line.app.add_subcommand("bench", "Measure a server, the engine, the GPU's kernels or the transfer library.");
  bench->require_subcommand(1);
  add_bench_serve(line, *bench);
  add_bench_engine(line, *bench);
  add_bench_kernels(line, *bench);
  add_bench_transfer(line, *bench);
}

}  // namespace baton::cli
