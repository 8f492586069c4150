#pragma once

#include <stddef.h>
#include <stdint.h>

/**
 * The C interface of Baton's transfer library: the same as <baton/transfer.h>, which says what is guaranteed when;
 * here stands only what differs. For C, and for every language that can call C.
 *
 * Errors: functions that can fail return a baton_code and, where `error` is not NULL, leave code and message in the
 * caller's buffer. `error` and outputs are written always (error) and on success only (outputs). No exception leaves
 * a function. A NULL where a handle or pointer is demanded is BATON_INVALID_ARGUMENT.
 *
 * Ownership: every handle that a function gives out is released with the function of its type, in any order, also
 * after the agent was destroyed. Releasing NULL does nothing. Strings and arrays that are passed in are copied.
 *
 * Threads: every function may be called from any thread, except that a handle must not be used while it is being
 * released. Callbacks run on the agent's progress thread: see <baton/transfer.h>. They must not throw or longjmp.
 *
 * Growth: structures start with `size`, the size that the caller was compiled with. Set them up with their _init
 * function, which fills in defaults; fields that a caller does not know keep their defaults.
 */
#ifdef __cplusplus
extern "C" {
#endif

/** What went wrong, coarse enough to act on. The numbers never change. */
typedef enum baton_code {
  BATON_OK = 0,
  BATON_INVALID_ARGUMENT = 1,    /**< the caller's input is wrong; trying again will not help */
  BATON_NOT_FOUND = 2,           /**< the named thing does not exist */
  BATON_UNAVAILABLE = 3,         /**< a peer or device is not there now */
  BATON_DEADLINE_EXCEEDED = 4,   /**< time ran out */
  BATON_RESOURCE_EXHAUSTED = 5,  /**< a bound was reached; later may work */
  BATON_FAILED_PRECONDITION = 6, /**< the state does not allow it */
  BATON_CANCELLED = 7,           /**< somebody asked for it to stop */
  BATON_INTERNAL = 8,            /**< the library's own fault */
  BATON_DATA_LOSS = 9,           /**< bytes are not what they should be */
  BATON_UNIMPLEMENTED = 10,      /**< this build or device cannot do it */
  BATON_ABORTED = 11             /**< the other side gave up */
} baton_code;

typedef struct baton_error {
  baton_code code;
  char message[1020]; /**< NUL-terminated; cut when longer; "" when code is BATON_OK */
} baton_error;

typedef struct baton_agent baton_agent;
typedef struct baton_region baton_region;     /**< a registration of memory */
typedef struct baton_peer baton_peer;         /**< a connected remote agent */
typedef struct baton_transfer baton_transfer; /**< one write or read under way */

typedef enum baton_memory_kind { BATON_MEMORY_HOST = 0, BATON_MEMORY_CUDA = 1 } baton_memory_kind;

/** A receiver's inbox; 0: none. */
typedef uint32_t baton_tag;

/** "0.1.0" */
const char* baton_transfer_version(void);
/** "UNAVAILABLE"; "UNKNOWN" for a number that is no code. */
const char* baton_code_name(int code);

typedef enum baton_log_level {
  BATON_LOG_DEBUG = 0,
  BATON_LOG_INFO = 1,
  BATON_LOG_WARNING = 2,
  BATON_LOG_ERROR = 3
} baton_log_level;
/** Of the whole process. Default: info, to stderr. */
void baton_set_log_level(baton_log_level level);
/** Gets every log line instead of stderr; NULL: stderr again. `message` lives during the call. May run on any
 * thread, one at a time. `log` must not log. */
void baton_set_log_function(void (*log)(void* user, baton_log_level level, const char* message), void* user);

/* ---- agent ---- */

typedef struct baton_agent_config {
  size_t size;
  const char* name;         /**< shown in logs and errors; default "agent" */
  const char* transport;    /**< "auto" (default), "shm", "tcp", "efa", "verbs", "staged:tcp", ... */
  const char* bind_address; /**< IP of this host that others reach; default "": the first interface that is up */
  int allow_tcp;            /**< "auto" may take TCP although there is an RDMA device; default 1 */
  int manual_progress;      /**< 1: no thread, the caller calls baton_agent_progress(); default 0 */
  uint32_t rails;           /**< NICs to use; 0 (default): what the topology suggests */
  uint32_t max_inflight_per_rail;
  uint32_t max_queued_transfers;
  uint32_t max_metadata_bytes;
  int64_t default_timeout_ms;
  int64_t stall_timeout_ms;
  int integrity; /**< 1: every block that is written is checked in the peer's memory; default 0 */
  uint32_t max_served_reads; /**< pieces of peers' reads that are served at once; 0: none; default 1024 */
  int64_t poll_us; /**< how long baton_transfer_wait() and baton_inbox_wait() look by themselves before they sleep; default 100 */
} baton_agent_config;

/** Call as baton_agent_config_init(&config, sizeof config). */
void baton_agent_config_init(baton_agent_config* config, size_t size);

/** `config` may be NULL: all defaults. */
baton_code baton_agent_create(const baton_agent_config* config, baton_agent** agent, baton_error* error);
/** Ends all transfers (their callbacks run first) and the thread. Not from a callback. */
void baton_agent_destroy(baton_agent* agent);
/** The number of this life of the agent; never 0 (0 for NULL). */
uint64_t baton_agent_epoch(const baton_agent* agent);

/** `data` .. `data + bytes` belongs to the caller and must outlive the registration, which lives until its handle is
 * released and no pool uses it any more (pools live as long as their agent). `kind`: a baton_memory_kind. */
baton_code baton_agent_register_memory(baton_agent* agent, void* data, size_t bytes, int memory_kind,
                                       baton_region** region, baton_error* error);
void baton_region_release(baton_region* region);
/** `count` blocks of `stride_bytes` from the start of `region`; known to those who get metadata afterwards. */
baton_code baton_agent_add_pool(baton_agent* agent, const baton_region* region, uint64_t stride_bytes, uint64_t count,
                                uint32_t* pool, baton_error* error);

/** What a peer needs to connect: opaque bytes, to be carried to it by whatever means. `*bytes`: in the room in
 * `buffer`, out the length. With too little room (or buffer NULL) `*bytes` says how much is needed and the answer is
 * BATON_RESOURCE_EXHAUSTED. */
baton_code baton_agent_metadata(const baton_agent* agent, void* buffer, size_t* bytes, baton_error* error);
baton_code baton_agent_connect(baton_agent* agent, const void* metadata, size_t bytes, baton_peer** peer,
                               baton_error* error);
/** Shuts the agent with that epoch out. Blocks for at most a second; not from a callback. BATON_UNAVAILABLE: it may
 * still write, call again. */
baton_code baton_agent_fence(baton_agent* agent, uint64_t epoch, baton_error* error);
/** One turn of work, with manual_progress only; `*count` (may be NULL): how much happened. Runs callbacks. */
baton_code baton_agent_progress(baton_agent* agent, size_t* count, baton_error* error);

typedef struct baton_agent_stats {
  size_t size; /**< set before the call; what lies beyond is not written */
  uint64_t peers, regions, registered_bytes;
  uint64_t messages_sent, bytes_sent, messages_received;
  uint64_t stray_messages, retries, failed_transfers, inbound_peers, fences;
  uint64_t checked_blocks, corrupt_blocks; /**< of this agent, by writers in integrity mode */
  uint64_t served_reads, refused_reads;    /**< pieces of peers' reads */
} baton_agent_stats;
baton_code baton_agent_get_stats(const baton_agent* agent, baton_agent_stats* stats, baton_error* error);
/** The transports that the agent offers, for people. Cut and NUL-terminated as snprintf does it; returns the whole
 * length. */
size_t baton_agent_describe(const baton_agent* agent, char* buffer, size_t bytes);

/* ---- receiving ---- */

baton_code baton_inbox_open(baton_agent* agent, baton_tag* tag, baton_error* error);
/** `on_complete(user)` runs once when `messages` in all have arrived, perhaps inside this call. Replaces an earlier
 * expectation of that inbox (its function does not run any more). */
baton_code baton_inbox_expect(baton_agent* agent, baton_tag tag, uint64_t messages, void (*on_complete)(void* user),
                              void* user, baton_error* error);
/** Blocks until `messages` in all have arrived, or BATON_DEADLINE_EXCEEDED. The quickest way to learn of them
 * (baton_agent_config.poll_us). Not from a callback, and not with manual_progress. */
baton_code baton_inbox_wait(baton_agent* agent, baton_tag tag, uint64_t messages, int64_t timeout_ms,
                            baton_error* error);
/** How many messages have arrived; 0 for an inbox that is not open. */
uint64_t baton_inbox_arrived(const baton_agent* agent, baton_tag tag);
/** After this its function does not run. */
void baton_inbox_close(baton_agent* agent, baton_tag tag);

/* ---- peers ---- */

uint64_t baton_peer_epoch(const baton_peer* peer);
/** Lives as long as `peer`. */
const char* baton_peer_name(const baton_peer* peer);
/** 0 after the peer was lost or closed. */
int baton_peer_alive(const baton_peer* peer);

typedef struct baton_path_info {
  size_t size;
  uint32_t rails;
  double bandwidth_bytes_per_s; /**< measured over what was written so far; 0: nothing yet */
  char transport[16];
  char provider[48];
  char reason[256];
} baton_path_info;
baton_code baton_peer_get_path(const baton_peer* peer, baton_path_info* path, baton_error* error);

typedef struct baton_peer_stats {
  size_t size;
  uint64_t writes, messages, bytes, failures, cancelled;
  double busy_s; /**< time with at least one message under way */
  uint64_t reads, read_bytes;
} baton_peer_stats;
baton_code baton_peer_get_stats(const baton_peer* peer, baton_peer_stats* stats, baton_error* error);

/** Ends everything to and from this peer for good. Blocks for at most a second; not from a callback. */
baton_code baton_peer_close(baton_peer* peer, baton_error* error);
/** Lets go of the handle; the connection stays until baton_peer_close(), its loss, or the agent's end. */
void baton_peer_release(baton_peer* peer);

/* ---- writing ---- */

typedef struct baton_block_pair {
  uint32_t local_block;
  uint32_t remote_block;
} baton_block_pair;

typedef struct baton_write {
  size_t size;
  uint32_t local_pool;
  uint32_t remote_pool;
  const baton_block_pair* blocks;
  size_t block_count;
  uint64_t offset_bytes; /**< the byte range inside each block */
  uint64_t length_bytes;
  baton_tag tag;      /**< 0: not counted by the receiver */
  int64_t timeout_ms; /**< 0: the agent's default_timeout_ms */
} baton_write;
/** Call as baton_write_init(&write, sizeof write). */
void baton_write_init(baton_write* write, size_t size);

/** Runs once, on the progress thread. `message` ("" if ok) lives during the call. */
typedef void (*baton_done_function)(void* user, baton_code code, const char* message);

/** Checks, queues, and returns at once. `on_done` may be NULL. `transfer` may be NULL when nobody asks for it later
 * (the write goes on all the same). `messages` (may be NULL): what the receiver's inbox has to expect for it. */
baton_code baton_peer_write(baton_peer* peer, const baton_write* write, baton_done_function on_done, void* user,
                            baton_transfer** transfer, uint64_t* messages, baton_error* error);

/* ---- reading ---- */

typedef struct baton_read {
  size_t size;
  uint32_t local_pool;
  uint32_t remote_pool;
  const baton_block_pair* blocks;
  size_t block_count;
  uint64_t offset_bytes; /**< the byte range inside each block */
  uint64_t length_bytes;
  int64_t timeout_ms; /**< 0: the agent's default_timeout_ms */
} baton_read;
/** Call as baton_read_init(&read, sizeof read). */
void baton_read_init(baton_read* read, size_t size);
/** Fetches blocks of the peer's pool into the local one, as baton_peer_write() brings them there: done means that they are in
 * local memory. One that failed and is not settled may still be written into it: baton_agent_fence() the peer first. */
baton_code baton_peer_read(baton_peer* peer, const baton_read* read, baton_done_function on_done, void* user,
                           baton_transfer** transfer, baton_error* error);

/* ---- both ---- */

int baton_transfer_done(const baton_transfer* transfer);
/** Its outcome; BATON_FAILED_PRECONDITION while it is not done. */
baton_code baton_transfer_status(const baton_transfer* transfer, baton_error* error);
/** Blocks until done (its deadline bounds that), then as baton_transfer_status(). Not from a callback. */
baton_code baton_transfer_wait(const baton_transfer* transfer, baton_error* error);
/** 0 for a read. */
uint64_t baton_transfer_messages(const baton_transfer* transfer);
uint64_t baton_transfer_bytes(const baton_transfer* transfer);
void baton_transfer_cancel(const baton_transfer* transfer);
/** 1 when it is done and nothing of it can reach the memory that it writes (the peer's; of a read, the local one) any more. */
int baton_transfer_settled(const baton_transfer* transfer);
/** Lets go of the handle; does not cancel. */
void baton_transfer_release(baton_transfer* transfer);

#ifdef __cplusplus
}
#endif
