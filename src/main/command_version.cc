#include "main/cli.h"

namespace baton::cli {

void add_version(CommandLine& line) {
  CLI::App* app = line.app.add_subcommand("version", "The program's version.");
  app->callback([&line] {
    line.action = [] {
      fmt::print("baton {}\n", BATON_VERSION);
      return 0;
    };
  });
}

}  // namespace baton::cli
