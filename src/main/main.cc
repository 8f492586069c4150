#include <cctype>
#include <cstdio>

#include "base/log.h"
#include "main/cli.h"
#include "main/help.h"

namespace {

/// Every long option can be set as BATON_<NAME>: --max-model-len is BATON_MAX_MODEL_LEN.
void name_environment_variables(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    if (option->get_lnames().empty() || option->get_lnames()[0] == "help" || option->get_lnames()[0] == "config") continue;
    std::string name = "BATON_";
    for (char c : option->get_lnames()[0]) {
      name += c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
    }
    option->envname(name);
  }
  for (CLI::App* subcommand : app.get_subcommands({})) name_environment_variables(*subcommand);
}

}  // namespace

int main(int argc, char** argv) {
  baton::cli::CommandLine line;
  line.app.require_subcommand(1);
  line.app.set_config("--config", "", "TOML file with options, a [section] per command");
  line.app.fallthrough();
  line.app.formatter(std::make_shared<baton::cli::HelpFormatter>());
  line.app.get_formatter()->column_width(36);
  std::string log_level = "info";
  line.app.add_option("--log-level", log_level, "debug, info, warning or error")
      ->capture_default_str()
      ->check(CLI::IsMember({"debug", "info", "warning", "error"}));
  baton::cli::add_serve(line);
  baton::cli::add_router(line);
  baton::cli::add_worker(line);
  baton::cli::add_generate(line);
  baton::cli::add_bench(line);
  baton::cli::add_version(line);
  name_environment_variables(line.app);
  const char* footer = "Every option can be set as BATON_<OPTION> in the environment (--max-model-len: BATON_MAX_MODEL_LEN), or in a TOML file "
                       "(baton --config FILE COMMAND).";
  line.app.footer(std::string("`baton COMMAND --help` lists a command's options.\n") + footer);
  for (CLI::App* command : line.app.get_subcommands({})) command->footer(footer);
  try {
    line.app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return line.app.exit(error);
  }
  baton::LogLevel level = baton::LogLevel::kInfo;
  baton::parse_log_level(log_level, &level);
  baton::set_log_level(level);
  return line.action ? line.action() : 2;
}
