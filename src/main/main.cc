#include <sys/resource.h>

#include <cctype>
#include <csignal>
#include <cstdio>
#include <cstdlib>

#include "base/log.h"
#include "main/cli.h"
#include "main/help.h"

namespace {

std::string environment_name(const std::string& option) {
  std::string name = "BATON_";
  for (char c : option) name += c == '-' ? '_' : static_cast<char>(std::toupper(static_cast<unsigned char>(c)));
  return name;
}

/// Every long option can be set as BATON_<NAME>: --max-model-len is BATON_MAX_MODEL_LEN.
void name_environment_variables(CLI::App& app) {
  for (CLI::Option* option : app.get_options()) {
    if (option->get_lnames().empty() || option->get_lnames()[0] == "help" || option->get_lnames()[0] == "config") continue;
    option->envname(environment_name(option->get_lnames()[0]));
  }
  for (CLI::App* subcommand : app.get_subcommands({})) name_environment_variables(*subcommand);
}

/// CLI11 from 2.3.2 on passes over a variable whose value it does not take; a setting must not get lost like that.
void check_environment_variables(const CLI::App& app) {
  for (const CLI::Option* option : app.get_options()) {
    const char* value = option->get_envname().empty() ? nullptr : std::getenv(option->get_envname().c_str());
    if (value != nullptr && *value != '\0' && option->count() == 0) {
      throw CLI::ValidationError(option->get_name(), option->get_envname() + " in the environment is '" + value +
                                                         "', which this option does not take");
    }
  }
  for (const CLI::App* subcommand : app.get_subcommands()) check_environment_variables(*subcommand);
}

/// CLI11 lets the file win over the environment; here it is the other way round, so that a variable can change what a
/// mounted file says.
class EnvironmentFirstConfig : public CLI::ConfigTOML {
 public:
  std::vector<CLI::ConfigItem> from_config(std::istream& input) const override {
    std::vector<CLI::ConfigItem> items = CLI::ConfigTOML::from_config(input);
    std::erase_if(items, [](const CLI::ConfigItem& item) {
      return item.name != "++" && item.name != "--" && std::getenv(environment_name(item.name).c_str()) != nullptr;
    });
    return items;
  }
};

/// libinfinipath, which libfabric brings along, catches fatal signals to print a backtrace and then calls exit() inside the
/// handler: a process that crashes would hang for ever in the C library's locks instead of dying.
void take_back_signals() {
  for (int number : {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT, SIGINT, SIGTERM}) std::signal(number, SIG_DFL);
}

/// Each client is a file descriptor, and the usual soft limit of 1024 is for programs that use select().
void raise_descriptor_limit() {
  rlimit limit{};
  if (getrlimit(RLIMIT_NOFILE, &limit) != 0 || limit.rlim_cur == limit.rlim_max) return;
  limit.rlim_cur = limit.rlim_max == RLIM_INFINITY ? 1 << 20 : limit.rlim_max;
  (void)setrlimit(RLIMIT_NOFILE, &limit);
}

}  // namespace

int main(int argc, char** argv) {
  take_back_signals();
  baton::cli::CommandLine line;
  line.app.require_subcommand(1);
  line.app.allow_config_extras(CLI::config_extras_mode::error);  // a misspelt option must not pass unnoticed
  line.app.set_config("--config", "", "TOML file with options, a [section] per command");
  line.app.config_formatter(std::make_shared<EnvironmentFirstConfig>());
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
    check_environment_variables(line.app);
  } catch (const CLI::ParseError& error) {
    return line.app.exit(error) == 0 ? 0 : 2;
  }
  raise_descriptor_limit();
  baton::LogLevel level = baton::LogLevel::kInfo;
  baton::parse_log_level(log_level, &level);
  baton::set_log_level(level);
  return line.action ? line.action() : 2;
}
