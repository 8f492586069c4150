#include <unistd.h>

#include <cstdio>
#include <ctime>
#include <nlohmann/json.hpp>

#include "base/log.h"
#include "base/random.h"
#include "engine/engine.h"
#include "kernels/kernels.h"
#include "main/cli.h"
#include "main/options.h"
#include "model/model.h"
#include "text/chat_template.h"
#include "text/detokenizer.h"
#include "text/tokenizer.h"

namespace baton::cli {

namespace {

struct GenerateCommand {
  ModelFlags model;
  EngineFlags engine;
  std::string prompt;
  bool raw = false;
  int32_t max_tokens = 256;
  float temperature = 0.0f;
  float top_p = 1.0f;
  int32_t top_k = 0;
  uint64_t seed = 0;
  bool verbose = false;
};

Result<std::vector<int32_t>> encode_prompt(const GenerateCommand& command, const std::filesystem::path& folder,
                                           const Tokenizer& tokenizer) {
  if (command.raw) return tokenizer.encode(command.prompt, true);
  Result<std::unique_ptr<ChatTemplate>> chat_template = ChatTemplate::load(folder);
  if (!chat_template.ok()) {
    if (chat_template.status().code() == StatusCode::kNotFound) return tokenizer.encode(command.prompt, true);
    return chat_template.status();
  }
  nlohmann::json messages = nlohmann::json::array({{{"role", "user"}, {"content", command.prompt}}});
  ChatTemplateInputs inputs;
  inputs.messages_json = messages.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  inputs.now_unix_s = std::time(nullptr);
  BATON_ASSIGN_OR_RETURN(std::string text, (*chat_template)->render(inputs));
  return tokenizer.encode(text, false);
}

Status run(GenerateCommand& command) {
  if (command.prompt.empty() && !isatty(STDIN_FILENO)) {
    char buffer[65536];
    for (size_t got; (got = std::fread(buffer, 1, sizeof(buffer), stdin)) > 0;) command.prompt.append(buffer, got);
  }
  if (command.prompt.empty()) return invalid_argument("there is no prompt; give it as an argument or on standard input");
  BATON_ASSIGN_OR_RETURN(std::filesystem::path folder, command.model.path());
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<Tokenizer> tokenizer, Tokenizer::load(folder / "tokenizer.json"));
  ModelOptions options;
  options.path = folder;
  options.load_format = command.model.load_format;
  options.max_model_len = command.model.max_model_len;
  BATON_ASSIGN_OR_RETURN(DeviceModel loaded, load_on_device(options, command.engine.device_options()));
  Model* const model = loaded.model.get();
  BATON_ASSIGN_OR_RETURN(std::vector<int32_t> prompt, encode_prompt(command, folder, *tokenizer));

  EngineConfig config;
  config.block_tokens = command.engine.block_tokens;
  config.max_batched_tokens = command.engine.max_batched_tokens;
  config.max_model_len = command.model.max_model_len;
  BlockLayout layout = model->layout(config.block_tokens);
  config.kv_blocks = layout.tokens_to_blocks(static_cast<int64_t>(prompt.size()) + command.max_tokens) + 1;
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<Engine> engine, Engine::create(config, *model));

  Request request;
  request.id = RequestId{1};
  request.prompt = prompt;
  request.sampling.max_tokens = command.max_tokens;
  request.sampling.temperature = command.temperature;
  request.sampling.top_p = command.top_p;
  request.sampling.top_k = command.top_k;
  request.sampling.seed = command.seed != 0 ? command.seed : random_id();
  BATON_RETURN_IF_ERROR(engine->submit(std::move(request)));

  Detokenizer detokenizer(*tokenizer, true);
  const Clock& clock = SteadyClock::instance();
  int64_t begin_ns = clock.now_ns(), first_ns = 0;
  int64_t tokens = 0;
  while (engine->has_work()) {
    for (const TokenOutput& output : engine->step().tokens) {
      if (output.finish == FinishReason::kError) return output.status;
      if (!output.token) continue;
      if (++tokens == 1) first_ns = clock.now_ns();
      std::string text = output.finish == FinishReason::kStop ? "" : detokenizer.push(*output.token);
      std::fwrite(text.data(), 1, text.size(), stdout);
      std::fflush(stdout);
    }
  }
  std::string rest = detokenizer.flush() + "\n";
  std::fwrite(rest.data(), 1, rest.size(), stdout);
  if (command.verbose) {
    double prefill_s = static_cast<double>(first_ns - begin_ns) * 1e-9;
    double decode_s = static_cast<double>(clock.now_ns() - first_ns) * 1e-9;
    fmt::print(stderr, "{} prompt tokens in {:.3f} s ({:.0f} tok/s), {} tokens in {:.3f} s ({:.1f} tok/s), kernels {}\n",
               prompt.size(), prefill_s, static_cast<double>(prompt.size()) / prefill_s, tokens, decode_s,
               tokens > 1 ? static_cast<double>(tokens - 1) / decode_s : 0.0, loaded.name);
  }
  return {};
}

}  // namespace

void add_generate(CommandLine& line) {
  auto command = std::make_shared<GenerateCommand>();
  CLI::App* app = line.app.add_subcommand("generate", "Answers one prompt, without a server.");
  app->add_option("prompt", command->prompt, "the prompt [standard input]");
  command->model.add_to(*app);
  command->engine.add_to(*app);
  app->add_flag("--raw", command->raw, "continue the prompt as it is, without the chat template");
  app->add_option("-n,--max-tokens", command->max_tokens, "longest answer")->capture_default_str()->check(CLI::Range(1, 1 << 20));
  app->add_option("--temperature", command->temperature, "0: always the most likely token")->capture_default_str()->check(CLI::Range(0.0, 100.0));
  app->add_option("--top-p", command->top_p, "nucleus sampling")->capture_default_str()->check(CLI::Range(0.0, 1.0));
  app->add_option("--top-k", command->top_k, "0: all tokens")->capture_default_str();
  app->add_option("--seed", command->seed, "0: a random one")->capture_default_str();
  app->add_flag("--stats", command->verbose, "print tokens per second at the end");
  app->callback([&line, command] {
    line.action = [command] {
      set_log_level(LogLevel::kWarning);
      Status status = run(*command);
      return status.ok() ? 0 : fail("generate", status);
    };
  });
}

}  // namespace baton::cli
