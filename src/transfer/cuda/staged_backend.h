#pragma once

#include <functional>
#include <memory>
#include <string>
#include <string_view>

#include "base/unique_handle.h"
#include "transfer/backend.h"

namespace baton::transfer {

/// "staged:<host transport>": GPU memory over a transport that moves host memory only, between any two agents, and
/// between GPU and host memory.
///
///   writer                                            owner of the memory
///     gathers the pieces into a slot of its own
///     Want{n}                               ---->
///     <---- Grant{slot, number}                         as slots become free, in turn, with a share per writer
///     one message of the host transport     ====>       descriptor and data, into that slot; the tag says which one
///                                                       checks the descriptor, copies the pieces to where they belong,
///                                                       counts the message once the GPU has reported the end
///     <---- Done{slot, number}
///
/// The notes go over a control connection of its own; the data over a host backend of its own, to which the slots are the only
/// pool, so a writer that comes in this way reaches nothing else. Every message of the agent is one message here, so
/// nothing depends on order.
///
/// Memory: 32 MiB of slots for each direction that is used, page-locked when a GPU is involved, and 32 MiB on each GPU.
using HostBackendFactory =
    std::function<Result<std::unique_ptr<Backend>>(std::shared_ptr<BackendContext>, const std::string& transport)>;

/// The sockets of an agent's staged backends that nobody has used yet, behind one descriptor: everybody pays for these
/// with every sleep of the progress thread.
class UnusedSockets {
 public:
  static Result<std::shared_ptr<UnusedSockets>> create();
  Status watch(int fd);
  int poll_fd() const { return epoll_.get(); }
  /// True for the one backend that waits on it for all of them.
  bool is_mine(const Backend* backend) { return (first_ == nullptr ? first_ = backend : first_) == backend; }

 private:
  FileDescriptor epoll_;
  const Backend* first_ = nullptr;
};

inline constexpr std::string_view kStagedPrefix = "staged:";
inline bool is_staged_transport(std::string_view transport) { return transport.starts_with(kStagedPrefix); }
/// "tcp" of "staged:tcp".
inline std::string staged_over(std::string_view transport) { return std::string(transport.substr(kStagedPrefix.size())); }

/// `open_host` makes the host backend; the driver is opened when GPU memory is registered.
Result<std::unique_ptr<Backend>> create_staged_backend(std::shared_ptr<BackendContext> context,
                                                       const std::string& transport, const HostBackendFactory& open_host,
                                                       std::shared_ptr<UnusedSockets> unused);

}  // namespace baton::transfer
