#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "base/status.h"
#include "model/device_model.h"

namespace baton::cli {

/// Options that several commands share, each group with the flags that pass it on to a child process.

struct ModelFlags {
  std::string model;               ///< folder; empty: the bundled demo model
  std::string served_model_name;   ///< empty: the folder's name
  std::string load_format = "auto";
  int32_t max_model_len = 0;

  void add_to(CLI::App& command);
  std::vector<std::string> arguments() const;
  /// The folder to load, checked to be one. Errors say where the demo model was looked for.
  Result<std::filesystem::path> path() const;
  std::string name() const;
};

struct EngineFlags {
  int64_t kv_blocks = 0;
  std::string kv_memory;           ///< "512MiB"
  int32_t block_tokens = 16;
  int32_t max_batched_tokens = 0;  // 0: what suits the device
  int32_t max_running = 256;
  bool no_prefix_cache = false;
  int32_t threads = 0;
  std::string isa = "auto";
  std::string device = "auto";
  double gpu_memory_utilization = 0.9;
  bool batch_invariant = false;

  void add_to(CLI::App& command);
  std::vector<std::string> arguments() const;
  DeviceOptions device_options() const;
  /// kv_memory in bytes; 0 when empty.
  Result<int64_t> kv_bytes() const;
};

struct TransferFlags {
  std::string transport = "auto";
  bool no_tcp = false;
  bool transfer_integrity = false;
  std::string bind_address;
  int64_t transfer_timeout_ms = 30'000;
  int32_t local_prefill_tokens = -1;
  int64_t lease_ms = 5'000;

  void add_to(CLI::App& command);
  std::vector<std::string> arguments() const;
};

struct RouterFlags {
  std::string host = "127.0.0.1";
  int32_t port = 8000;
  std::string policy = "least-loaded";
  int32_t http_threads = 2;
  int32_t max_requests = 4096;
  int32_t max_connections = 4096;
  int32_t max_attempts = 4;
  std::string max_body = "32MiB";
  int64_t request_timeout_ms = 600'000;
  int64_t queue_timeout_ms = 30'000;
  int64_t worker_silence_ms = 60'000;
  int64_t drain_timeout_ms = 10'000;

  void add_to(CLI::App& command);
  std::vector<std::string> arguments() const;
};

/// "512MiB", "2GB", "1048576" → bytes.
Result<int64_t> parse_bytes(const std::string& text);

}  // namespace baton::cli
