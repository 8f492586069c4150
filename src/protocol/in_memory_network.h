#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/random.h"
#include "protocol/channel.h"

namespace baton::protocol {

/// The channels of many pretended processes inside one, driven by pump() and a Clock: same seed, same run.
///
/// Each direction of a channel keeps its order; between channels frames are delayed at random and so reordered.
/// Frames travel as bytes, so whatever can't be serialised is found. Processes can be killed, stopped
/// (SIGSTOP: nothing reaches them until they go on) and cut from each other.
///
/// One thread calls everything. Callbacks run inside pump() only, and may send, close and connect.
class InMemoryNetwork {
 public:
  struct Options {
    int64_t min_delay_us = 0;
    int64_t max_delay_us = 0;
    ChannelLimits limits;
  };
  /// `clock` must outlive the network.
  InMemoryNetwork(const Clock& clock, uint64_t seed, Options options);
  InMemoryNetwork(const Clock& clock, uint64_t seed) : InMemoryNetwork(clock, seed, Options()) {}
  ~InMemoryNetwork();

  /// The network as this process sees it. Valid until the InMemoryNetwork goes; after kill() a call with the
  /// same name gives the next life.
  Network& process(const std::string& name);

  /// Its listeners and channels are gone without a word: no callback runs on its side any more, the other sides get
  /// on_closed after a delay (not while they are partitioned from it).
  void kill(const std::string& name);
  /// Nothing reaches the process until thaw(); what it had sent still arrives.
  void freeze(const std::string& name);
  void thaw(const std::string& name);
  /// Frames and closings between the two wait until heal().
  void partition(const std::string& a, const std::string& b);
  void heal(const std::string& a, const std::string& b);
  /// As if the connections between the two broke: on_closed on both sides.
  void break_channels(const std::string& a, const std::string& b);

  /// Delivers what is due by the clock, in order of time. Returns how many callbacks ran.
  int64_t pump();
  /// When the next delivery is due; nothing when nothing waits (or only for a thaw or heal).
  std::optional<int64_t> next_event_ns() const;

 private:
  class Endpoint;
  class ProcessNetwork;
  class MemoryListener;
  struct Process;
  struct Event;

  bool blocked(const Event& event) const;
  void schedule(Event event);
  void deliver(Event& event);
  int64_t draw_delay_ns();

  const Clock& clock_;
  Random random_;
  const Options options_;
  uint64_t next_sequence_ = 0;
  uint64_t next_channel_ = 0;
  std::vector<std::unique_ptr<Process>> processes_;   // every life there was
  std::map<std::string, Process*> alive_;
  std::map<std::string, MemoryListener*> listeners_;  // by address
  std::set<std::string> frozen_;
  std::set<std::pair<std::string, std::string>> partitions_;  // names in order
  std::map<std::pair<int64_t, uint64_t>, Event> events_;      // by (due time, sequence)
};

}  // namespace baton::protocol
