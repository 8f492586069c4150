#pragma once

#include <ucp/api/ucp.h>

#include "base/status.h"

namespace baton::transfer::ucx {

#define BATON_UCX_FUNCTIONS(X)                                                                           \
  X(ucp_config_modify) X(ucp_config_read) X(ucp_config_release) X(ucp_get_version) X(ucp_get_version_string) \
  X(ucp_init_version) X(ucp_cleanup) X(ucp_worker_create) X(ucp_worker_destroy)                         \
  X(ucp_worker_get_address) X(ucp_worker_release_address) X(ucp_worker_progress)                        \
  X(ucp_worker_get_efd) X(ucp_worker_arm) X(ucp_worker_set_am_recv_handler) X(ucp_ep_create)            \
  X(ucp_ep_close_nbx) X(ucp_ep_flush_nbx) X(ucp_ep_print_info) X(ucp_ep_rkey_unpack)                    \
  X(ucp_rkey_destroy) X(ucp_rkey_pack) X(ucp_rkey_buffer_release) X(ucp_mem_map) X(ucp_mem_unmap)       \
  X(ucp_put_nbx) X(ucp_am_send_nbx) X(ucp_request_free) X(ucs_status_string)

/// UCX's functions, found in libucp.so.0 when the first agent asks for them: the program itself does not need UCX.
struct Library {
#define BATON_UCX_MEMBER(name) decltype(&::name) name = nullptr;
  BATON_UCX_FUNCTIONS(BATON_UCX_MEMBER)
#undef BATON_UCX_MEMBER

  /// Whether a worker whose handshake is not finished can be destroyed. Before 1.18 that aborts, here or at the other end.
  bool ends_handshakes = false;
  /// Of settings of tcp in ucp_config_modify(): none before 1.18, "TCP_" from it on. The other one is passed over, with a warning.
  const char* tcp_prefix = "";

  /// Loads it once per process; it stays for good (it has a thread and hooks of its own). Sets UCX_LOG_FILE in the environment
  /// where that is not set: UCX would write its log to the program's standard output. From any thread.
  static Result<const Library*> load();
};

}  // namespace baton::transfer::ucx
