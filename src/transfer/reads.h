#pragma once

#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "base/random.h"
#include "base/status.h"
#include "transfer/include/baton/transfer.h"

/// Reads (Peer::read): the owner of the memory is asked to write, with its ordinary write path, into the reader's memory.
///
///   reader                                        owner of the memory
///     Introduce{metadata}                 --->    checks it; nothing is opened yet
///     Read{tag, blocks, byte range}       --->    checks bounds and its own limits, opens a path back, writes
///     <---  Started{tag, messages}                so many messages will come for the tag
///     <---  ... data ...
///   done when as many have arrived
///     <---  Ended{tag, code, settled}             the write has ended: always, exactly once
///
/// A tag is a fresh inbox of the reader, one for each Read, and names it. Cancel{tag} asks for an early end; only Ended says
/// that nothing of it can arrive any more. A read of many blocks is several of these.
namespace baton::transfer {

struct ReadRequest {
  enum class Kind : uint8_t { kIntroduce = 1, kRead = 2, kCancel = 3 };
  static constexpr size_t kMaxBlocks = 4096;
  /// So many of one reader may be without an Ended.
  static constexpr uint32_t kMaxOpen = 16;

  Kind kind = Kind::kCancel;
  std::string metadata;  ///< kIntroduce: the reader's
  uint32_t tag = 0;      ///< kRead, kCancel
  // kRead:
  bool integrity = false;  ///< the blocks are hashed and compared, whatever the owner's setting
  uint32_t owner_pool = 0;
  uint32_t reader_pool = 0;
  uint64_t offset_bytes = 0;
  uint64_t length_bytes = 0;
  uint32_t timeout_ms = 0;
  struct Pair {
    uint32_t owner_block = 0;
    uint32_t reader_block = 0;
    bool operator==(const Pair&) const = default;
  };
  std::vector<Pair> blocks;
  bool operator==(const ReadRequest&) const = default;
};

struct ReadAnswer {
  enum class Kind : uint8_t { kStarted = 1, kEnded = 2 };
  Kind kind = Kind::kEnded;
  uint32_t tag = 0;
  uint64_t messages = 0;               ///< kStarted: at least one
  StatusCode code = StatusCode::kOk;   ///< kEnded
  bool settled = true;                 ///< kEnded: Transfer::settled() of the owner's write
  std::string reason;                  ///< kEnded, with an error
  bool operator==(const ReadAnswer&) const = default;
};

std::string encode_read_request(const ReadRequest& request);
Result<ReadRequest> parse_read_request(std::string_view payload);
std::string encode_read_answer(const ReadAnswer& answer);
Result<ReadAnswer> parse_read_answer(std::string_view payload);

/// How reads travel between the agents of one backend, in order in each direction. Under the agent's lock.
class ReadChannel {
 public:
  /// One end of a pair; Link::connection() on the reader's side.
  using Connection = uint64_t;
  struct Received {
    Connection connection;
    Epoch epoch;  ///< of the agent at its other end
    std::string from;
    ReadRequest request;
  };
  struct Answer {
    Connection connection;
    ReadAnswer answer;
  };

  virtual ~ReadChannel() = default;
  /// Both: false when it cannot be sent now; what opens the way is an event of progress().
  virtual bool send_read_request(Connection connection, const ReadRequest& request) = 0;
  virtual bool send_read_answer(Connection connection, const ReadAnswer& answer) = 0;
  /// True while the reader at that connection is let in: it has not hung up, and was not fenced.
  virtual bool serves(Connection connection) const = 0;
  /// What progress() has brought.
  virtual void take_read_requests(std::vector<Received>& requests) = 0;
  virtual void take_read_answers(std::vector<Answer>& answers) = 0;
  /// Readers that had introduced themselves and whose connection is closed.
  virtual void take_gone_readers(std::vector<Connection>& readers) = 0;
};

}  // namespace baton::transfer
