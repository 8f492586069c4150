#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"

/// Integrity mode (AgentConfig::integrity): what the two ends of a pair tell each other about the bytes of a write.
///
///   writer                                        owner of the memory
///     hashes each block before it is posted
///     ... data ...                        --->
///     all of it is delivered
///     Check{blocks and their hashes}      --->    hashes its own memory, in pieces between other work;
///                                                 counts one message for the tag if all is right
///     <---  CheckResult
///   next Check, or the transfer ends
///
/// A Check stands for itself, so the owner keeps nothing of a transfer between two of them. Only the last one of a transfer
/// counts, and only when those before were right. Every Check gets one CheckResult.
namespace baton::transfer {

struct CheckedBlock {
  uint64_t offset = 0;  ///< of the bytes in the owner's pool
  uint64_t hash = 0;    ///< XXH3, 64 bits
  bool operator==(const CheckedBlock&) const = default;
};

struct Check {
  static constexpr size_t kMaxBlocks = 2048;
  /// Unless it is a single block: so that answers come steadily, and a cancel has not long to wait.
  static constexpr uint64_t kMaxBytes = 64u << 20;
  /// So many of one writer may be without an answer.
  static constexpr uint32_t kMaxOpen = 16;

  uint64_t id = 0;    ///< the writer's
  uint32_t tag = 0;   ///< the inbox of the transfer, without which nobody needs the check; 0: none
  bool counts = false;  ///< that inbox gets one message when all is right
  uint32_t pool = 0;
  uint64_t block_bytes = 0;
  std::vector<CheckedBlock> blocks;  ///< none: the writer takes back its Check with this id
  bool operator==(const Check&) const = default;

  static size_t blocks_per_check(uint64_t block_bytes);
};

struct CheckResult {
  enum class Outcome : uint8_t {
    kRight = 1,
    kWrong = 2,
    kSkipped = 3,  ///< taken back in time, or nobody waits for it any more: the inbox is closed
    kRefused = 4,  ///< no such memory, or it cannot be read: `reason`
  };
  uint64_t id = 0;
  Outcome outcome = Outcome::kRight;
  uint32_t bad_blocks = 0;
  uint64_t offset = 0;  ///< of the first bad block
  uint64_t hash = 0;    ///< what it has there
  std::string reason;
  bool operator==(const CheckResult&) const = default;
};

std::string encode_check(const Check& check);
Result<Check> parse_check(std::string_view payload);
std::string encode_check_result(const CheckResult& result);
Result<CheckResult> parse_check_result(std::string_view payload);

/// Hashes blocks of one size, one after the other, from pieces as they come.
class BlockHasher {
 public:
  explicit BlockHasher(uint64_t block_bytes);
  ~BlockHasher();
  BlockHasher(BlockHasher&&) noexcept;
  BlockHasher& operator=(BlockHasher&&) noexcept;

  /// What the block under way still lacks.
  uint64_t left() const { return left_; }
  bool at_start() const { return left_ == block_bytes_; }
  /// REQUIRES: at most left() bytes.
  void add(std::span<const std::byte> bytes);
  /// Ends the block; the next one begins. REQUIRES: left() == 0.
  uint64_t take();

 private:
  struct State;
  std::unique_ptr<State> state_;
  uint64_t block_bytes_;
  uint64_t left_;
};

/// How checks travel between the agents of one backend. Under the agent's lock.
class CheckChannel {
 public:
  /// One end of a pair; Link::connection() on the writer's side.
  using Connection = uint64_t;
  struct Received {
    Connection connection;
    std::string from;
    Check check;
  };
  struct Answer {
    Connection connection;
    CheckResult result;
  };

  virtual ~CheckChannel() = default;
  /// Both: false when it cannot be sent now; what opens the way is an event of progress().
  virtual bool send_check(Connection connection, const Check& check) = 0;
  virtual bool send_check_result(Connection connection, const CheckResult& result) = 0;
  /// True while the writer at that connection is let in: it has not hung up, and was not fenced.
  virtual bool serves(Connection connection) const = 0;
  /// What progress() has brought.
  virtual void take_checks(std::vector<Received>& checks) = 0;
  virtual void take_check_results(std::vector<Answer>& results) = 0;
};

}  // namespace baton::transfer
