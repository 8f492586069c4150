#include "http/health_json.h"

#include <fmt/format.h>

#include "http/json_text.h"

namespace baton::http {

namespace {

std::string pair_json(const protocol::PairStatus& pair) {
  return fmt::format("{{\"prefill\":{},\"address\":{},\"ready\":{},\"why_not\":{},\"transport\":{},\"provider\":{},"
                     "\"rails\":{},\"reason\":{},\"bandwidth_bytes_per_s\":{:.0f}}}",
                     json_string(pair.peer()), json_string(pair.address()), pair.ready(), json_string(pair.why_not()),
                     json_string(pair.transport()), json_string(pair.provider()), pair.rails(),
                     json_string(pair.reason()), pair.bandwidth_bytes_per_s());
}

std::string worker_json(const WorkerView& worker) {
  const protocol::Load& load = worker.load;
  std::string role = worker.role.starts_with("ROLE_") ? worker.role.substr(5) : worker.role;
  for (char& c : role) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  std::string out = fmt::format(
      "{{\"name\":{},\"address\":{},\"role\":{},\"state\":{},\"why_not\":{},\"epoch\":\"{:016x}\",\"transport\":{},"
      "\"running\":{},\"waiting\":{},\"queued_tokens\":{},\"draining\":{},"
      "\"kv_blocks\":{{\"total\":{},\"free\":{},\"cached\":{},\"used\":{},\"quarantined\":{}}},\"pairs\":[",
      json_string(worker.name), json_string(worker.address), json_string(role), json_string(worker.state),
      json_string(worker.why_not), worker.epoch, json_string(worker.transport), load.running(), load.waiting(),
      load.queued_tokens(), load.draining(), load.blocks_total(), load.blocks_free(), load.blocks_cached(),
      load.blocks_used(), load.blocks_quarantined());
  for (int i = 0; i < load.pairs_size(); ++i) {
    if (i > 0) out += ',';
    out += pair_json(load.pairs(i));
  }
  return out + "]}";
}

}  // namespace

std::string health_json(const RouterHealth& health, const std::string& model, bool draining) {
  bool ready = health.ready && !draining;
  std::string_view status = draining ? "draining" : !ready ? "not ready" : health.degraded ? "degraded" : "ready";
  std::string out = fmt::format(
      "{{\"status\":\"{}\",\"ready\":{},\"degraded\":{},\"why_not\":{},\"model\":{},\"max_model_len\":{},"
      "\"requests\":{},\"workers\":[",
      status, ready, health.degraded, json_string(draining ? "the server is shutting down" : health.why_not),
      json_string(model), health.max_model_len, health.requests);
  for (size_t i = 0; i < health.workers.size(); ++i) {
    if (i > 0) out += ',';
    out += worker_json(health.workers[i]);
  }
  return out + "]}";
}

}  // namespace baton::http
