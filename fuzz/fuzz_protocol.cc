// Frames from outside: whatever a router, a decode worker, a prefill worker or a stranger sends, a worker stays whole and
// holds nothing once they are gone. The input is a list of records: who (1 byte), length (1 byte), a Frame.
#include <prometheus/metric_family.h>

#include <algorithm>
#include <cstdint>

#include "base/check.h"
#include "base/log.h"
#include "protocol/metrics_codec.h"
#include "protocol/validate.h"
#include "worker/testing/core_world.h"

namespace {

using namespace baton;

void expect_nothing_left(worker::testing::CoreWorld& world) {
  for (auto* puppet : {&world.router, &world.decode, &world.prefill, &world.stranger}) {
    if (puppet->channel != nullptr) puppet->channel->close();
  }
  world.prefill_listener.reset();
  world.run(2500);
  EngineStats stats = world.engine->stats();
  BATON_CHECK(world.core->drained()) << "requests or prefills are left";
  BATON_CHECK(stats.blocks.used == 0 && stats.blocks.quarantined == 0 && stats.running == 0 && stats.waiting == 0)
      << "used " << stats.blocks.used << " quarantined " << stats.blocks.quarantined;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const bool quiet = (set_log_level(LogLevel::kError), set_log_sink([](LogLevel, std::string_view) {}), true);
  (void)quiet;
  ignore_status(protocol::decode_metrics({reinterpret_cast<const char*>(data), size}).status());

  worker::testing::CoreWorld world;
  world.introduce();
  worker::testing::Puppet* puppets[] = {&world.router, &world.decode, &world.prefill, &world.stranger};
  int frames = 0;
  while (size >= 2 && frames < 64) {
    const int who = data[0];
    const size_t length = std::min<size_t>(data[1], size - 2);
    protocol::Frame frame;
    if (frame.ParseFromArray(data + 2, static_cast<int>(length))) {
      for (auto sender : {protocol::Sender::kWorker, protocol::Sender::kStranger}) {
        ignore_status(protocol::validate_frame(frame, sender));
      }
      puppets[who & 3]->send(frame);
      ++frames;
      if (who & 4) world.run(10);
    }
    data += 2 + length;
    size -= 2 + length;
  }
  world.run(10);
  expect_nothing_left(world);
  return 0;
}
