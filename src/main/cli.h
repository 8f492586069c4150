#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "base/status.h"

namespace baton::cli {

/// The command line: one function per command adds its options to `app` and, when its command is chosen, leaves in
/// `action` what is to be done. Values come from the command line, else from BATON_<OPTION> in the environment, else from
/// the TOML file named with --config, else the default.
struct CommandLine {
  CLI::App app{"Baton: disaggregated LLM inference in one program.", "baton"};
  std::function<int()> action;
};

void add_serve(CommandLine& line);
void add_router(CommandLine& line);
void add_worker(CommandLine& line);
void add_generate(CommandLine& line);
void add_bench(CommandLine& line);
void add_version(CommandLine& line);

/// Prints "baton serve: message" and returns the exit code of a failed command.
int fail(const std::string& command, const Status& status);

/// Blocks SIGINT, SIGTERM and SIGHUP in the calling thread and all that it starts later; call before any thread starts.
void block_stop_signals();
/// Waits for one of them; the signal's number.
int wait_for_stop_signal();

}  // namespace baton::cli
