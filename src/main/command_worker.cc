#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <csignal>
#include <mutex>

#include "base/log.h"
#include "base/metrics.h"
#include "http/json_text.h"
#include "http/server.h"
#include "main/cli.h"
#include "main/options.h"
#include "main/progress.h"
#include "worker/worker.h"

namespace baton::cli {

namespace {

struct WorkerCommand {
  ModelFlags model;
  EngineFlags engine;
  TransferFlags transfer;
  std::string role = "both";
  std::string name;
  std::string listen = "127.0.0.1:0";
  int32_t max_queued = 4096;
  int64_t drain_timeout_ms = 10'000;
  std::string http_host = "127.0.0.1";
  int32_t http_port = -1;
};

std::string health_body(const WorkerHealth& health) {
  std::string pairs;
  for (const WorkerPair& pair : health.pairs) {
    if (!pairs.empty()) pairs += ',';
    pairs += fmt::format("{{\"prefill\":{},\"ready\":{},\"why_not\":{},\"transport\":{},\"provider\":{},\"reason\":{}}}",
                         http::json_string(pair.peer), pair.ready, http::json_string(pair.why_not),
                         http::json_string(pair.transport), http::json_string(pair.provider), http::json_string(pair.reason));
  }
  const BlockCounts& blocks = health.engine.blocks;
  return fmt::format("{{\"status\":\"{}\",\"name\":{},\"role\":{},\"address\":{},\"transport\":{},\"routers\":{},\"requests\":{},"
                     "\"prefills\":{},\"kv_blocks\":{{\"total\":{},\"free\":{},\"cached\":{},\"used\":{},\"quarantined\":{}}},"
                     "\"pairs\":[{}]}}",
                     health.draining ? "draining" : "ready", http::json_string(health.name), http::json_string(health.role),
                     http::json_string(health.address), http::json_string(health.transport), health.routers, health.requests,
                     health.active_prefills, blocks.total, blocks.free, blocks.cached, blocks.used, blocks.quarantined, pairs);
}

/// /live, /ready, /health and /metrics of one worker, for probes.
Result<std::unique_ptr<http::Server>> start_probes(const WorkerCommand& command, const Worker& worker) {
  http::ServerConfig config;
  config.host = command.http_host;
  config.port = static_cast<uint16_t>(command.http_port);
  config.max_connections = 64;
  config.max_body_bytes = 4096;
  return http::Server::start(config, [&worker](std::shared_ptr<http::Exchange> exchange) {
    const std::string& path = exchange->request().path;
    if (path == "/live") return exchange->respond({200, "application/json", R"({"status":"live"})", {}});
    if (path == "/metrics") {
      return exchange->respond({200, "text/plain; version=0.0.4; charset=utf-8", to_prometheus_text(worker.metrics()), {}});
    }
    if (path == "/ready" || path == "/health") {
      WorkerHealth health = worker.health();
      return exchange->respond({health.draining ? 503 : 200, "application/json", health_body(health), {}});
    }
    exchange->respond({404, "application/json", R"({"error":{"message":"a worker has /live, /ready, /health and /metrics"}})", {}});
  });
}

Status run(const WorkerCommand& command) {
  block_stop_signals();
  set_log_process_name(command.name.empty() ? command.role : command.name);
  BATON_ASSIGN_OR_RETURN(std::filesystem::path folder, command.model.path());
  WorkerConfig config;
  config.name = command.name.empty() ? command.role : command.name;
  config.role = command.role;
  config.listen_address = command.listen;
  config.served_model_name = command.model.name();
  config.model.path = folder;
  config.model.load_format = command.model.load_format;
  config.model.max_model_len = command.model.max_model_len;
  LoadProgress progress(config.name);
  config.model.progress = [&progress](int64_t done, int64_t total) { progress.update(done, total); };
  config.engine.block_tokens = command.engine.block_tokens;
  config.engine.kv_blocks = command.engine.kv_blocks;
  BATON_ASSIGN_OR_RETURN(config.engine.kv_bytes, command.engine.kv_bytes());
  config.engine.max_batched_tokens = command.engine.max_batched_tokens;
  config.engine.max_running = command.engine.max_running;
  config.engine.max_model_len = command.model.max_model_len;
  config.engine.prefix_cache = !command.engine.no_prefix_cache;
  config.device = command.engine.device_options();
  config.transfer.name = config.name;
  config.transfer.transport = command.transfer.transport;
  config.transfer.allow_tcp = !command.transfer.no_tcp;
  config.transfer.integrity = command.transfer.transfer_integrity;
  config.transfer.bind_address = command.transfer.bind_address;
  config.transfer.default_timeout_ms = command.transfer.transfer_timeout_ms;
  config.local_prefill_tokens = command.transfer.local_prefill_tokens;
  config.lease_ms = command.transfer.lease_ms;
  config.max_queued = command.max_queued;

  std::mutex lost_mutex;
  Status lost;
  config.on_device_lost = [&](const Status& status) {
    std::lock_guard lock(lost_mutex);
    lost = status;
    ::kill(::getpid(), SIGTERM);
  };

  std::unique_ptr<protocol::Network> network = protocol::make_grpc_network();
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<Worker> worker, Worker::start(std::move(config), *network));
  std::unique_ptr<http::Server> probes;
  if (command.http_port >= 0) {
    BATON_ASSIGN_OR_RETURN(probes, start_probes(command, *worker));
    log_info("probes and metrics on http://{}:{}", command.http_host, probes->port());
  }
  log_info("worker is ready at {}, role {}", worker->address(), command.role);
  wait_for_stop_signal();
  {
    std::lock_guard lock(lost_mutex);
    if (!lost.ok()) return lost.with_context("the device is lost; start the worker again");
  }
  log_info("stopping: what runs may finish within {} ms", command.drain_timeout_ms);
  worker->stop(command.drain_timeout_ms);
  if (probes) probes->stop();
  return {};
}

}  // namespace

void add_worker(CommandLine& line) {
  auto command = std::make_shared<WorkerCommand>();
  CLI::App* app = line.app.add_subcommand("worker", "One engine on one device: prefills, decodes, or both.");
  app->add_option("--role", command->role, "prefill, decode or both: what routers send it first")
      ->check(CLI::IsMember({"prefill", "decode", "both"}))->capture_default_str();
  app->add_option("--name", command->name, "shown in logs, metrics and /health [the role]");
  app->add_option("--listen", command->listen, "address for routers and workers: HOST:PORT or unix:/PATH")->capture_default_str();
  app->add_option("--max-queued", command->max_queued, "requests that may wait for blocks")->capture_default_str();
  app->add_option("--drain-timeout-ms", command->drain_timeout_ms, "at SIGTERM requests may go on for so long")->capture_default_str();
  app->add_option("--http-host", command->http_host, "address for probes and metrics")->capture_default_str();
  app->add_option("--http-port", command->http_port, "port for /live, /ready, /health and /metrics [none]")->check(CLI::Range(-1, 65535));
  command->model.add_to(*app);
  command->engine.add_to(*app);
  command->transfer.add_to(*app);
  app->callback([&line, command] {
    line.action = [command] {
      Status status = run(*command);
      return status.ok() ? 0 : fail("worker", status);
    };
  });
}

}  // namespace baton::cli
