#include <unistd.h>

#include <ctime>
#include <thread>

#include "base/log.h"
#include "http/api.h"
#include "http/health_json.h"
#include "main/cli.h"
#include "main/options.h"
#include "model/model_config.h"
#include "router/router.h"

namespace baton::cli {

namespace {

struct RouterCommand {
  ModelFlags model;
  RouterFlags router;
  std::vector<std::string> workers;
  std::string name = "router";
  int notify_fd = -1;  ///< `baton serve` reads "listening PORT" and "ready HEALTH" there
};

/// Tokenizer, template and defaults of a model folder. A folder with only a config.json serves token ids.
Result<http::ServedModel> load_served_model(const ModelFlags& flags) {
  BATON_ASSIGN_OR_RETURN(std::filesystem::path folder, flags.path());
  BATON_ASSIGN_OR_RETURN(ModelConfig config, ModelConfig::load(folder));
  http::ServedModel served;
  served.name = flags.name();
  served.vocab_size = config.vocab_size;
  served.max_model_len = flags.max_model_len > 0 ? flags.max_model_len : config.max_position_embeddings;
  served.created_s = std::time(nullptr);
  served.defaults.temperature = config.default_temperature;
  served.defaults.top_p = config.default_top_p;
  served.defaults.min_p = config.default_min_p;
  served.defaults.top_k = config.default_top_k;
  served.defaults.repetition_penalty = config.default_repetition_penalty;
  if (!std::filesystem::exists(folder / "tokenizer.json")) {
    log_warning("{} has no tokenizer.json: only prompts of token ids can be served", folder.string());
    return served;
  }
  BATON_ASSIGN_OR_RETURN(served.tokenizer, Tokenizer::load(folder / "tokenizer.json"));
  Result<std::unique_ptr<ChatTemplate>> chat_template = ChatTemplate::load(folder);
  if (chat_template.ok()) {
    served.chat_template = std::move(chat_template).value();
  } else if (chat_template.status().code() == StatusCode::kNotFound) {
    log_warning("{}: /v1/chat/completions will be refused", chat_template.status().message());
  } else {
    return chat_template.status();
  }
  return served;
}

class Notifier {
 public:
  explicit Notifier(int fd) : fd_(fd) {}
  void line(const std::string& text) const {
    if (fd_ < 0) return;
    std::string out = text + "\n";
    [[maybe_unused]] ssize_t written = ::write(fd_, out.data(), out.size());
  }

 private:
  int fd_;
};

Status run(const RouterCommand& command) {
  block_stop_signals();
  set_log_process_name(command.name);
  BATON_ASSIGN_OR_RETURN(http::ServedModel served, load_served_model(command.model));
  RouterConfig config;
  config.name = command.name;
  config.workers = command.workers;
  config.served_model_name = served.name;
  config.policy = *parse_policy(command.router.policy);
  config.max_requests = command.router.max_requests;
  config.max_attempts = command.router.max_attempts;
  config.request_timeout_ms = command.router.request_timeout_ms;
  config.queue_timeout_ms = command.router.queue_timeout_ms;
  config.worker_silence_ms = command.router.worker_silence_ms;
  http::ServerConfig http_config;
  http_config.host = command.router.host;
  http_config.port = static_cast<uint16_t>(command.router.port);
  http_config.threads = command.router.http_threads;
  http_config.max_connections = command.router.max_connections;
  BATON_ASSIGN_OR_RETURN(int64_t max_body_bytes, parse_bytes(command.router.max_body));
  http_config.max_body_bytes = static_cast<uint64_t>(max_body_bytes);

  Notifier notifier(command.notify_fd);
  // Destruction runs upwards: the server first, so that no client's request outlives what answers it.
  std::unique_ptr<protocol::Network> network = protocol::make_grpc_network();
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<Router> router, Router::start(std::move(config), *network));
  http::Api api(served, *router);
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<http::Server> server, http::Server::start(http_config, api.handler()));
  api.set_server(server.get());
  log_info("listening on http://{}:{}, model '{}', {} workers, policy {}", command.router.host, server->port(),
           served.name, command.workers.size(), command.router.policy);
  notifier.line(fmt::format("listening {}", server->port()));
  std::jthread ready_thread([&](std::stop_token stop) {
    while (!stop.stop_requested()) {
      if (!router->wait_ready(200)) continue;
      RouterHealth health = router->health();
      log_info("ready: a request can be served end to end");
      notifier.line("ready " + http::health_json(health, served.name, false));
      return;
    }
  });

  wait_for_stop_signal();
  log_info("stopping: {} requests may finish within {} ms", router->health().requests, command.router.drain_timeout_ms);
  // Until what runs has ended, the door stays open: who comes is told 503 instead of finding nobody.
  api.set_draining();
  server->close_after_response();
  router->wait_idle(command.router.drain_timeout_ms);
  router->stop();           // what has not ended gets an error
  server->wait_sent(2'000);  // the last words may still be on their way
  server->stop();
  return {};
}

}  // namespace

void add_router(CommandLine& line) {
  auto command = std::make_shared<RouterCommand>();
  CLI::App* app = line.app.add_subcommand("router", "OpenAI-compatible HTTP in, workers behind it. Needs no GPU.");
  command->model.add_to(*app);
  command->router.add_to(*app);
  app->add_option("-w,--worker", command->workers, "a worker's address: HOST:PORT or unix:/PATH (repeat for each)")->required();
  app->add_option("--name", command->name, "shown in logs and to workers")->capture_default_str();
  app->add_option("--notify-fd", command->notify_fd)->group("");
  app->callback([&line, command] {
    line.action = [command] {
      Status status = run(*command);
      return status.ok() ? 0 : fail("router", status);
    };
  });
}

}  // namespace baton::cli
