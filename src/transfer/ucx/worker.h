#pragma once

#include <memory>
#include <span>
#include <string>

#include "transfer/backend.h"
#include "transfer/ucx/library.h"

namespace baton::transfer::ucx {

/// Which transports of UCX an agent uses.
struct TransportChoice {
  std::string tls;      ///< for UCX_TLS of our own configuration; empty: as the environment says
  std::string devices;  ///< for UCX_NET_DEVICES, likewise
  /// RDMA: written with ucp_put, through one worker for all peers. A device acknowledges what is in the peer's memory,
  /// and a worker is dear there (33 MiB of receive buffers for each device).
  /// Otherwise tcp: there UCX emulates ucp_put, and every release so far aborts the process that is written into when
  /// the writer goes away (ucp_rma_sw_send_cmpl). So the data goes as active messages, which the owner of the memory
  /// places itself, and every peer has a worker of its own.
  bool one_sided = false;
};

/// `selection`: what stands behind "ucx:", or "". `environment`: UCX_TLS, or "". `ip`: where tcp is wanted, or "".
/// RDMA or tcp, never a mixture: a fence could not tell what is on its way. Never UCX's shared memory, which leaves
/// its segments behind when a process is killed.
Result<TransportChoice> choose_transports(const std::string& selection, const std::string& environment,
                                          const std::string& ip, bool has_rdma_device);

/// ucp_context. Shared by workers and registered memory, which may outlive the backend.
class Context {
 public:
  static Result<std::shared_ptr<Context>> create(const TransportChoice& choice, const std::string& name);
  ~Context();
  Context(const Context&) = delete;
  Context& operator=(const Context&) = delete;

  const Library& library() const { return *library_; }
  ucp_context_h get() const { return handle_; }
  const char* version() const { return library_->ucp_get_version_string(); }
  std::string text(ucs_status_t status) const { return library_->ucs_status_string(status); }

 private:
  explicit Context(const Library* library) : library_(library) {}
  const Library* library_;
  ucp_context_h handle_ = nullptr;
};

/// Memory that UCX knows, and the key that a peer unpacks to write into it.
class Region final : public BackendRegion {
 public:
  static Result<std::unique_ptr<BackendRegion>> create(std::shared_ptr<Context> context, std::span<std::byte> memory);
  ~Region() override;
  const std::string& packed_key() const { return packed_key_; }

 private:
  std::shared_ptr<Context> context_;
  ucp_mem_h memory_ = nullptr;
  std::string packed_key_;
};

/// ucp_worker: its own sockets or queues, its own descriptor to sleep on. Destroying one closes all that it has,
/// whatever its peers do: no request of it reads or writes memory afterwards. Not thread-safe.
class Worker {
 public:
  static Result<std::unique_ptr<Worker>> create(std::shared_ptr<Context> context);
  ~Worker();
  Worker(const Worker&) = delete;
  Worker& operator=(const Worker&) = delete;

  const Context& context() const { return *context_; }
  ucp_worker_h get() const { return handle_; }
  Result<std::string> address() const;
  /// Returns how many things happened; never more than `rounds` turns of UCX's own progress.
  size_t progress(int rounds);
  /// For a worker whose handshake is not finished, where Library::ends_handshakes is false: until the process ends it is neither
  /// driven nor destroyed, and touches nothing. About 1 MiB each.
  static void keep_for_good(std::unique_ptr<Worker> worker);
  /// Readable when progress() has something to do, after prepare_sleep() said yes. -1: there is none, poll.
  int wait_fd() const { return wait_fd_; }
  bool prepare_sleep();
  /// `handler` runs inside progress(), with `argument`, for messages with that id.
  Status on_message(unsigned id, ucp_am_recv_callback_t handler, void* argument);

  // For the backend: it has to be driven in the next turn; it must not be driven for now.
  bool awake = false;
  bool held = false;

 private:
  explicit Worker(std::shared_ptr<Context> context) : context_(std::move(context)) {}
  std::shared_ptr<Context> context_;
  ucp_worker_h handle_ = nullptr;
  int wait_fd_ = -1;
};

}  // namespace baton::transfer::ucx

namespace baton::transfer {

/// create_ucx_backend() with everything decided: for tests of what needs a device.
Result<std::unique_ptr<Backend>> create_ucx_backend_with(std::shared_ptr<BackendContext> context,
                                                         const std::string& transport, ucx::TransportChoice choice,
                                                         std::string ip);

}  // namespace baton::transfer
