#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <unordered_map>
#include <vector>

#include "transfer/control.h"
#include "transfer/ucx/messages.h"
#include "transfer/ucx/worker.h"

namespace baton::transfer::ucx {

/// The owner's half of a pair whose writer sends active messages: puts what they carry into the pools that were
/// open when it connected, and remembers what to confirm. Nothing outside of those pools is written, whatever a
/// header says. Destroying it ends everything that comes from that writer.
///
/// A writer that is gone before its first message came leaves UCX with a handshake that it cannot answer, and UCX before 1.18
/// aborts when such a worker is destroyed or driven on. It is then left as it is, for good: undriven it touches nothing.
class Inbound {
 public:
  /// Under the id by which peers know it.
  struct Pool {
    std::byte* data = nullptr;
    uint64_t bytes = 0;
  };

  static Result<std::unique_ptr<Inbound>> create(std::unique_ptr<Worker> worker, std::string name,
                                                 std::unordered_map<uint32_t, Pool> pools,
                                                 std::vector<Arrival>& arrivals);

  ~Inbound();

  Worker& worker() { return *worker_; }
  /// Confirms over the control connection what has been placed. False when that is full: the writer does not read
  /// it, and nothing more is taken from it until it does.
  bool confirm(ControlPlane& control, ControlPlane::Id id);
  bool unconfirmed() const { return !placed_.empty(); }

 private:
  Inbound(std::string name, std::unordered_map<uint32_t, Pool> pools, std::vector<Arrival>& arrivals)
      : name_(std::move(name)), pools_(std::move(pools)), arrivals_(arrivals) {}

  static ucs_status_t on_hello(void* inbound, const void* header, size_t header_bytes, void* data, size_t bytes,
                               const ucp_am_recv_param_t* parameters);
  static ucs_status_t on_write(void* inbound, const void* header, size_t header_bytes, void* data, size_t bytes,
                               const ucp_am_recv_param_t* parameters);
  void on_placed(const WriteHeader& header);

  const std::string name_;
  const std::unordered_map<uint32_t, Pool> pools_;
  std::vector<Arrival>& arrivals_;  // the backend's
  std::vector<Arrival> placed_;     // runs of ids
  bool connected_ = false;
  std::unique_ptr<Worker> worker_;  // last, so that it goes first
};

}  // namespace baton::transfer::ucx
