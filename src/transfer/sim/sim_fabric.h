#pragma once

#include <cstdint>
#include <memory>

#include "base/clock.h"
#include "base/random.h"
#include "base/status.h"
#include "transfer/include/baton/transfer.h"

namespace baton::transfer {

struct SimOptions {
  uint64_t seed = 1;
  /// A message takes between these two, uniformly, to be delivered; its completion as long again.
  int64_t min_delay_ns = 0;
  int64_t max_delay_ns = 0;
  /// Share of posts that get "not now".
  double again = 0;
  /// False: messages of one pair arrive in the order in which they were posted. True: in any order, as on
  /// EFA, so that counts may come before data of other messages.
  bool reorder = false;
  /// Pieces per message and the largest message, as a fabric has them.
  uint32_t max_segments = 1;
  uint64_t max_message_bytes = 1u << 20;
  /// After kill(): how long until operations towards the dead fail.
  int64_t death_notice_ns = 1'000'000;
  /// What is on its way still arrives after its sender has broken the path off or died, as with TCP: such
  /// transfers end unsettled, and only fence() stops the bytes.
  bool late_writes = true;
  /// Share of messages of which one bit arrives wrong.
  double corrupt = 0;
};

/// A network in one process: agents made with the same SimFabric reach each other. Moves the bytes at the
/// time of delivery and not before, so that a buffer that is reused too early shows. With a ManualClock and
/// manual_progress everything that happens depends on the seed alone.
///
/// Thread-safe. Must outlive its agents.
class SimFabric {
 public:
  explicit SimFabric(SimOptions options);
  ~SimFabric();
  SimFabric(const SimFabric&) = delete;
  SimFabric& operator=(const SimFabric&) = delete;

  /// The process with that agent dies: what is on its way to it is lost (from it: see late_writes),
  /// operations towards it fail after death_notice_ns. The agent itself can do nothing any more and should
  /// be destroyed.
  void kill(Epoch agent);
  /// Nothing reaches the agent, nothing from it is delivered, and nobody is told; until resume().
  void stall(Epoch agent);
  void resume(Epoch agent);

  /// When the next delivery or completion is due, by the agents' clock; INT64_MAX: nothing is under way.
  /// A simulation advances its ManualClock to this.
  int64_t next_event_ns() const;
  uint64_t delivered_messages() const;

  class Network;
  Network& network() { return *network_; }

 private:
  std::unique_ptr<Network> network_;
};

/// An agent on `fabric`. config.transport: "staged:sim" for GPU memory staged over it; anything else is taken as "sim".
Result<std::unique_ptr<Agent>> create_sim_agent(SimFabric& fabric, AgentConfig config,
                                                const Clock& clock = SteadyClock::instance());

}  // namespace baton::transfer
