#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "base/unique_handle.h"

/// How the two processes of `baton bench transfer` talk: the initiator asks, the target answers, one at a time, over
/// one stream socket. Frame: length (u32, little-endian, of what follows), then one record.
namespace baton::ops {

inline constexpr uint32_t kBenchWireVersion = 4;
inline constexpr size_t kMaxBenchFrameBytes = 8u << 20;
inline constexpr size_t kMaxBenchBlocks = 1u << 18;  ///< of one transfer
inline constexpr size_t kMaxBenchSizes = 64;         ///< block sizes of one run

enum class BenchCommand : uint8_t {
  kHello = 1,       ///< version; answered with host and process id
  kOpen,            ///< transport, memory, pool_bytes, block_sizes: makes an agent with a pool for each size
  kAttach,          ///< metadata: connect back to the initiator's agent
  kEcho,            ///< block_bytes, tag, count: answer every block that arrives with one, to that tag
  kEchoStop,
  kFill,            ///< count: a seed; every word of the pool differs from the others
  kPrepare,         ///< block_bytes, blocks: overwrite these
  kCheck,           ///< block_bytes, blocks, hashes: compare
  kUsage,           ///< CPU time and memory of the target's process
  kRawMemory,       ///< where the pools are, for the copies without an agent (of a GPU: a handle)
  kRawFabricOpen,   ///< transport: a bare endpoint
  kRawFabricRun,    ///< progress it until the next frame comes
  kRawSocketOpen,   ///< listens; the initiator connects
  kRawSocketRun,    ///< bytes: read as many, answer one byte
  kRawSocketEcho,   ///< bytes, count: read and send back
  kPongOpen,        ///< block_bytes, bytes, count (the number of its block), tag: makes an inbox for a conversation
  kPongRun,         ///< count: waits for a block and writes one back, so many times
  kRawMemoryPong,   ///< bytes, count: the same by memory alone
  kRawFabricAttach, ///< metadata (a name), bytes (base), count (key): where the initiator's endpoint is
  kRawFabricPong,   ///< bytes, count
  kStop,            ///< ends kRawFabricRun
  kClose,           ///< closes the agent and what is raw
  kBye,
};
inline constexpr BenchCommand kLastBenchCommand = BenchCommand::kBye;

/// A field that a command does not use is zero or empty.
struct BenchRequest {
  BenchCommand command = BenchCommand::kHello;
  uint32_t version = kBenchWireVersion;
  bool shared_memory = false;
  bool gpu_memory = false;
  uint32_t device = 0;  ///< of the target; as a negative int32_t: see GpuPool::open()
  uint32_t tag = 0;
  uint64_t pool_bytes = 0;
  uint64_t block_bytes = 0;
  uint64_t bytes = 0;
  uint64_t count = 0;
  std::string transport = {};
  std::string metadata = {};
  std::vector<uint64_t> block_sizes = {};
  std::vector<uint32_t> blocks = {};
  std::vector<uint64_t> hashes = {};

  bool operator==(const BenchRequest&) const = default;
};

struct BenchReply {
  StatusCode code = StatusCode::kOk;
  std::string message;
  std::string host_id;
  std::string text;       ///< metadata, endpoint name, handle
  std::string device;     ///< the target's GPU
  uint32_t tag = 0;
  uint32_t port = 0;
  uint64_t pid = 0;
  uint64_t fd = 0;        ///< of the shared pool, in the target's process
  uint64_t address = 0;   ///< of the pool, or what a bare endpoint adds offsets to
  uint64_t bytes = 0;
  uint64_t key = 0;
  uint64_t elapsed_ns = 0;
  uint64_t cpu_ns = 0;
  uint64_t resident_bytes = 0;
  uint64_t retries = 0;
  uint64_t bad_blocks = 0;

  Status status() const { return code == StatusCode::kOk ? Status() : Status(code, message); }
  bool operator==(const BenchReply&) const = default;
};

std::string encode(const BenchRequest& request);
std::string encode(const BenchReply& reply);
/// Input from outside: every length is checked, and nothing may be left over.
Result<BenchRequest> parse_bench_request(std::string_view bytes);
Result<BenchReply> parse_bench_reply(std::string_view bytes);

/// "10.0.0.1:7000", "[::1]:7000", "host:7000"; port 0 only where `allow_any_port`.
struct HostPort {
  std::string host, port;
};
Result<HostPort> parse_host_port(const std::string& text, bool allow_any_port);

/// Frames on a connected stream socket. One thread.
class BenchChannel {
 public:
  explicit BenchChannel(FileDescriptor socket) : socket_(std::move(socket)) {}

  Status send(std::string_view payload) const;
  /// Waits up to timeout_ms (negative: for ever). unavailable: the other end is gone.
  Result<std::string> receive(int64_t timeout_ms) const;
  /// Without waiting: is there something to receive (or the end)?
  bool readable() const;
  /// The IP of this end; empty for a socket that is no TCP socket.
  std::string local_ip() const;
  std::string remote_ip() const;

 private:
  Status read_exactly(void* data, size_t bytes, int64_t deadline_ns) const;

  FileDescriptor socket_;
};

/// Tries every address of the name, up to timeout_ms each.
Result<FileDescriptor> connect_tcp(const HostPort& address, int64_t timeout_ms);
/// Returns the listening socket; *port is the port it got.
Result<FileDescriptor> listen_tcp(const HostPort& address, uint16_t* port);
Result<FileDescriptor> accept_tcp(int listener, int64_t timeout_ms);

}  // namespace baton::ops
