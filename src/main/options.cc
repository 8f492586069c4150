#include "main/options.h"

#include <cctype>
#include <cstdlib>

namespace baton::cli {

namespace {

// Where a build tree or an installation keeps the demo model, seen from the program.
constexpr const char* kDemoModelPlaces[] = {"../../models/demo", "../share/baton/models/demo", "models/demo"};

std::filesystem::path program_folder() {
  std::error_code error;
  return std::filesystem::read_symlink("/proc/self/exe", error).parent_path();
}

template <typename T>
void push(std::vector<std::string>& out, const char* flag, const T& value, const T& default_value) {
  if (value == default_value) return;
  out.push_back(flag);
  out.push_back(fmt::format("{}", value));
}

}  // namespace

Result<int64_t> parse_bytes(const std::string& text) {
  char* end = nullptr;
  double value = std::strtod(text.c_str(), &end);
  std::string unit;
  for (; end != nullptr && *end != '\0'; ++end) {
    if (!std::isspace(static_cast<unsigned char>(*end))) unit += static_cast<char>(std::tolower(static_cast<unsigned char>(*end)));
  }
  double scale = 0;
  if (unit.empty() || unit == "b") scale = 1;
  if (unit == "k" || unit == "kib") scale = 1024;
  if (unit == "m" || unit == "mib") scale = 1 << 20;
  if (unit == "g" || unit == "gib") scale = 1 << 30;
  if (unit == "kb") scale = 1e3;
  if (unit == "mb") scale = 1e6;
  if (unit == "gb") scale = 1e9;
  if (text.empty() || scale == 0 || !(value > 0) || value * scale > 1e15) {
    return invalid_argument("'{}' is not a size; write it as 512MiB, 2GiB or a number of bytes", text);
  }
  return static_cast<int64_t>(value * scale);
}

void ModelFlags::add_to(CLI::App& command) {
  command.add_option("-m,--model", model, "model folder in Hugging Face format [the bundled demo model]")->group("Model");
  command.add_option("--served-model-name", served_model_name, "name that clients use [the folder's name]")->group("Model");
  command.add_option("--load-format", load_format, "auto (safetensors) or dummy (real shapes, random weights)")
      ->check(CLI::IsMember({"auto", "dummy"}))
      ->capture_default_str()
      ->group("Model");
  command.add_option("--max-model-len", max_model_len, "longest prompt + answer in tokens [the model's]")->group("Model");
}

std::vector<std::string> ModelFlags::arguments() const {
  std::vector<std::string> out;
  ModelFlags defaults;
  push(out, "--model", model, defaults.model);
  push(out, "--served-model-name", served_model_name, defaults.served_model_name);
  push(out, "--load-format", load_format, defaults.load_format);
  push(out, "--max-model-len", max_model_len, defaults.max_model_len);
  return out;
}

Result<std::filesystem::path> ModelFlags::path() const {
  std::error_code error;
  if (!model.empty()) {
    std::filesystem::path folder = model;
    if (!std::filesystem::is_directory(folder, error)) {
      return not_found("--model {} is not a folder; give one that holds config.json and *.safetensors", model);
    }
    return folder;
  }
  std::string places;
  for (const char* place : kDemoModelPlaces) {
    std::filesystem::path folder = program_folder() / place;
    if (std::filesystem::exists(folder / "config.json", error)) return folder.lexically_normal();
    places += " " + folder.lexically_normal().string();
  }
  return not_found("the bundled demo model is in none of{}; name a model with --model", places);
}

std::string ModelFlags::name() const {
  if (!served_model_name.empty()) return served_model_name;
  if (model.empty()) return "baton-demo";
  std::filesystem::path folder = std::filesystem::path(model).lexically_normal();
  if (folder.filename().empty()) folder = folder.parent_path();
  return folder.filename().string();
}

void EngineFlags::add_to(CLI::App& command) {
  command.add_option("--kv-memory", kv_memory, "memory of the KV cache per worker, such as 2GiB")->group("Engine");
  command.add_option("--kv-blocks", kv_blocks, "the same, in blocks")->group("Engine");
  command.add_option("--block-tokens", block_tokens, "tokens per KV block")->capture_default_str()->group("Engine");
  command.add_option("--max-batched-tokens", max_batched_tokens, "tokens computed per step; longer prompts are chunked [512; 8192 on a GPU]")
      ->group("Engine");
  command.add_option("--max-running", max_running, "sequences computed at once")->capture_default_str()->group("Engine");
  command.add_flag("--no-prefix-cache", no_prefix_cache, "never reuse the KV of an earlier equal prefix")->group("Engine");
  command.add_option("--threads", threads, "compute threads per worker [the CPUs it may use]")->group("Engine");
  command.add_option("--device", device, "auto, cpu or cuda:N; auto: a GPU if one can be used; serve deals out several: cuda:0,cuda:1")
      ->capture_default_str()->group("Engine");
  command.add_option("--gpu-memory-utilization", gpu_memory_utilization, "share of a GPU's memory that a worker may take")
      ->check(CLI::Range(0.01, 1.0))->capture_default_str()->group("Engine");
  command.add_flag("--batch-invariant", batch_invariant,
                   "on a GPU: the same tokens whatever else is computed, as on the CPU; slower")->group("Engine");
  command.add_option("--isa", isa, "auto, avx512bf16, avx2 or plain")->capture_default_str()->group("Engine");
}

std::vector<std::string> EngineFlags::arguments() const {
  std::vector<std::string> out;
  EngineFlags defaults;
  push(out, "--kv-memory", kv_memory, defaults.kv_memory);
  push(out, "--kv-blocks", kv_blocks, defaults.kv_blocks);
  push(out, "--block-tokens", block_tokens, defaults.block_tokens);
  push(out, "--max-batched-tokens", max_batched_tokens, defaults.max_batched_tokens);
  push(out, "--max-running", max_running, defaults.max_running);
  push(out, "--threads", threads, defaults.threads);
  push(out, "--isa", isa, defaults.isa);
  push(out, "--device", device, defaults.device);
  push(out, "--gpu-memory-utilization", gpu_memory_utilization, defaults.gpu_memory_utilization);
  if (no_prefix_cache) out.push_back("--no-prefix-cache");
  if (batch_invariant) out.push_back("--batch-invariant");
  return out;
}

DeviceOptions EngineFlags::device_options() const {
  DeviceOptions out;
  out.device = device;
  out.isa = isa;
  out.threads = threads;
  out.gpu_memory_utilization = gpu_memory_utilization;
  out.batch_invariant = batch_invariant;
  return out;
}

Result<int64_t> EngineFlags::kv_bytes() const {
  if (kv_memory.empty()) return int64_t{0};
  Result<int64_t> bytes = parse_bytes(kv_memory);
  if (!bytes.ok()) return bytes.status().with_context("--kv-memory");
  return bytes;
}

void TransferFlags::add_to(CLI::App& command) {
  command.add_option("--transport", transport, "path of the KV cache: auto, shm, tcp, efa or verbs; of GPU memory: auto, cuda_ipc, staged:shm, staged:tcp, ...")
      ->capture_default_str()->group("Handoff");
  command.add_flag("--no-tcp", no_tcp, "refuse a pair rather than use TCP between hosts")->group("Handoff");
  command.add_option("--bind-address", bind_address, "address that KV traffic over TCP uses; several, with commas: one rail each")->group("Handoff");
  command.add_option("--transfer-timeout-ms", transfer_timeout_ms, "a KV write fails after so long")
      ->capture_default_str()->group("Handoff");
  command.add_flag("--transfer-integrity", transfer_integrity,
                   "hash every KV block before it is sent and after it has arrived; for tests and diagnosis; a third of the speed on one host")
      ->group("Handoff");
  command.add_option("--local-prefill-tokens", local_prefill_tokens,
                     "the decode worker computes prompts below this many new tokens itself; -1: measured, 256 at first")
      ->capture_default_str()->group("Handoff");
  command.add_option("--lease-ms", lease_ms, "a prefill worker that shows no progress for so long is given up")
      ->capture_default_str()->group("Handoff");
}

std::vector<std::string> TransferFlags::arguments() const {
  std::vector<std::string> out;
  TransferFlags defaults;
  push(out, "--transport", transport, defaults.transport);
  push(out, "--bind-address", bind_address, defaults.bind_address);
  push(out, "--transfer-timeout-ms", transfer_timeout_ms, defaults.transfer_timeout_ms);
  push(out, "--local-prefill-tokens", local_prefill_tokens, defaults.local_prefill_tokens);
  push(out, "--lease-ms", lease_ms, defaults.lease_ms);
  if (no_tcp) out.push_back("--no-tcp");
  if (transfer_integrity) out.push_back("--transfer-integrity");
  return out;
}

void RouterFlags::add_to(CLI::App& command) {
  command.add_option("--host", host, "address to listen on")->capture_default_str()->group("Frontend");
  command.add_option("-p,--port", port, "port to listen on; 0: any free one")->capture_default_str()
      ->check(CLI::Range(0, 65535))->group("Frontend");
  command.add_option("--policy", policy, "round-robin or least-loaded")
      ->check(CLI::IsMember({"round-robin", "least-loaded"}))->capture_default_str()->group("Frontend");
  command.add_option("--http-threads", http_threads, "threads for HTTP, tokenizing and detokenizing")
      ->capture_default_str()->group("Frontend");
  command.add_option("--max-requests", max_requests, "sequences inside at once; more get 429")
      ->capture_default_str()->group("Frontend");
  command.add_option("--max-connections", max_connections, "client connections at once; more get 503")
      ->capture_default_str()->group("Frontend");
  command.add_option("--max-attempts", max_attempts, "workers a request may be tried on")->capture_default_str()->group("Frontend");
  command.add_option("--max-body", max_body, "largest request body")->capture_default_str()->group("Frontend");
  command.add_option("--request-timeout-ms", request_timeout_ms, "of a whole request; 0: none")
      ->capture_default_str()->group("Frontend");
  command.add_option("--queue-timeout-ms", queue_timeout_ms, "longest wait for a worker with room")
      ->capture_default_str()->group("Frontend");
  command.add_option("--worker-silence-ms", worker_silence_ms, "a worker that says nothing for so long is given up")
      ->capture_default_str()->group("Frontend");
  command.add_option("--drain-timeout-ms", drain_timeout_ms, "at SIGTERM requests may go on for so long")
      ->capture_default_str()->group("Frontend");
}

std::vector<std::string> RouterFlags::arguments() const {
  std::vector<std::string> out;
  RouterFlags defaults;
  push(out, "--host", host, defaults.host);
  push(out, "--port", port, defaults.port);
  push(out, "--policy", policy, defaults.policy);
  push(out, "--http-threads", http_threads, defaults.http_threads);
  push(out, "--max-requests", max_requests, defaults.max_requests);
  push(out, "--max-connections", max_connections, defaults.max_connections);
  push(out, "--max-attempts", max_attempts, defaults.max_attempts);
  push(out, "--max-body", max_body, defaults.max_body);
  push(out, "--request-timeout-ms", request_timeout_ms, defaults.request_timeout_ms);
  push(out, "--queue-timeout-ms", queue_timeout_ms, defaults.queue_timeout_ms);
  push(out, "--worker-silence-ms", worker_silence_ms, defaults.worker_silence_ms);
  push(out, "--drain-timeout-ms", drain_timeout_ms, defaults.drain_timeout_ms);
  return out;
}

}  // namespace baton::cli
