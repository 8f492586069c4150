#pragma once

#include <cstdint>
#include <deque>
#include <iterator>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <utility>
#include <vector>

#include "base/clock.h"
#include "base/random.h"
#include "base/status.h"
#include "base/unique_handle.h"
#include "transfer/integrity.h"
#include "transfer/reads.h"

/// The control connection between two agents: one stream socket (unix on one host, TCP between hosts) per
/// pair and direction, beside the data path. It does what fabrics do not:
///
///   writer                               owner of the memory
///     Hello{epochs, serial, name}  ---->   refuses old epochs and fenced peers; opens what it receives on
///     <---- Welcome{rails, keys}           only now the writer may write
///     Arrived{(tag, count)...}     ---->   (shm, ucx: other fabrics carry the tag with the data)
///     <---- Arrived{(message, count)...}   (ucx: the owner itself has put these messages into its memory)
///     Rail{down, open}             ---->   (several rails: one has failed, or is tried again)
///     <---- Rail{count, ready}
///     Check{blocks, hashes}        ---->   (integrity mode: transfer/integrity.h)
///     <---- CheckResult
///     Read{blocks}                 ---->   (transfer/reads.h)
///     <---- ReadAnswer
///     <---- Fence                          stop writing; answered by closing, after the last write ended
///   closed by either side, or by the kernel when a process dies: the pair is over
///
/// So the owner knows everybody who can write to it, a death is seen at once on both sides, and nobody
/// writes after the owner has shut the door.
namespace baton::transfer {

struct Hello {
  Epoch from = Epoch::kNone;
  Epoch to = Epoch::kNone;
  uint64_t serial = 0;  ///< of the metadata that the writer connected with
  std::string name;
};

struct Welcome {
  struct Pool {
    uint32_t id = 0;
    uint64_t base = 0;
    uint64_t key = 0;
    std::string packed_key = {};  ///< what 64 bits do not hold (ucx)
    uint16_t rail = 0;            ///< where base and key are valid
  };
  std::vector<std::string> rails;  ///< one endpoint address each
  std::vector<Pool> pools;
};

struct Arrival {
  uint32_t tag = 0;
  uint32_t count = 0;
};

/// What the two ends of a pair with several rails tell each other when one of them fails (fabric/fabric_link.h has the
/// whole procedure). A generation is one life of a rail between the two.
struct RailNote {
  enum class Kind : uint8_t {
    kDown = 1,   ///< writer: I have closed my end; how much of it arrived?
    kCount = 2,  ///< owner: my end is closed, too; `count` counted messages came in all, the first `count` that you posted
    kOpen = 3,   ///< writer: let us try it again
    kReady = 4,  ///< owner: here is a new end, at `address` (empty: I could not open one)
  };
  Kind kind = Kind::kDown;
  uint16_t rail = 0;
  uint32_t generation = 0;
  uint64_t count = 0;
  std::string address;
  bool operator==(const RailNote&) const = default;
};

std::string encode_rail_note(const RailNote& note);
Result<RailNote> parse_rail_note(std::string_view payload);

std::string encode_hello(const Hello& hello);
std::string encode_welcome(const Welcome& welcome);
Result<Hello> parse_hello(std::string_view payload);
Result<Welcome> parse_welcome(std::string_view payload);

/// "unix:<abstract name>" or "tcp:<ip>:<port>" ("tcp:[v6]:port").
using SocketAddress = std::string;

/// A connected (or connecting) stream socket with frames on it. Not thread-safe.
class FrameSocket {
 public:
  enum class Type : uint8_t { kHello = 1, kWelcome = 2, kReject = 3, kArrived = 4, kFence = 5, kRail = 6, kCheck = 7, kCheckResult = 8,
                              kRead = 9, kReadAnswer = 10 };
  struct Frame {
    Type type;
    std::string payload;
  };
  static constexpr size_t kMaxFrameBytes = 1u << 20;
  static constexpr size_t kMaxUnsentBytes = 4u << 20;

  explicit FrameSocket(FileDescriptor fd) : fd_(std::move(fd)) {}
  int fd() const { return fd_.get(); }
  bool unsent() const { return sent_ < out_.size(); }
  size_t unsent_bytes() const { return out_.size() - sent_; }
  /// False when too much is waiting already. The last word before the end is taken all the same.
  bool send(Type type, std::string_view payload, bool last = false);
  /// Both: what can be done without blocking. A failure (or the end) is final.
  Status flush();
  Status receive(std::deque<Frame>& frames);

 private:
  FileDescriptor fd_;
  std::string out_;
  size_t sent_ = 0;
  std::string in_;
};

/// All control connections of one backend. Under the agent's lock.
class ControlPlane final : public CheckChannel, public ReadChannel {
 public:
  using Id = uint64_t;
  static_assert(std::is_same_v<Id, CheckChannel::Connection> && std::is_same_v<Id, ReadChannel::Connection>);

  class Delegate {
   public:
    virtual ~Delegate() = default;
    /// A writer wants in (epochs and fences are checked already). An error is sent to it as the reason.
    virtual Result<Welcome> on_inbound(Id id, const Hello& hello) = 0;
    /// The writer is gone, or was shut out: release what was opened for it. Runs before fence() returns.
    /// `socket` is that of the connection, open until this returns.
    virtual void on_inbound_closed(Id id, int socket) = 0;
    virtual void on_inbound_arrived(Id id, const Arrival& arrival) = 0;
    virtual void on_outbound_arrived(Id, const Arrival&) {}
    virtual void on_inbound_rail(Id, const RailNote&) {}
    virtual void on_outbound_rail(Id, const RailNote&) {}
    virtual void on_welcome(Id id, Welcome welcome) = 0;
    /// The owner of the memory is gone, has refused or fenced us: nothing may be posted after this. The
    /// delegate calls close_outbound() once nothing that was posted can write any more.
    virtual void on_outbound_closed(Id id, const Status& why) = 0;
  };

  struct Options {
    Epoch epoch = Epoch::kNone;
    std::string name;
    /// Fencing needs the writer's own word (it writes into our memory by itself), not just our hanging up.
    bool writer_must_confirm = false;
    size_t max_inbound = 4096;
    int64_t hello_timeout_ms = 5000;
  };

  ControlPlane(Options options, Delegate& delegate, const Clock& clock);
  ~ControlPlane() override;

  /// `address`: "unix:" for a fresh abstract name, or "tcp:<ip>" with any port.
  Status listen(const SocketAddress& address);
  const SocketAddress& address() const { return address_; }

  Result<Id> connect(const SocketAddress& address, Epoch to, uint64_t serial);
  /// The process at the other end, as this one's pid namespace sees it (unix only); 0: unknown.
  int remote_pid(Id id) const;
  bool send_arrivals(Id id, std::span<const Arrival> arrivals);
  bool send_rail_note(Id id, const RailNote& note);
  /// False when the other end has hung up (its process is gone), even if that was not processed yet.
  bool still_connected(Id id) const;
  /// Ends the connection, `last` being its last words. When the other side takes none just now (it is stopped) the socket stays open
  /// until it has, for a bounded time (control_linger.h).
  void close_outbound(Id id, std::span<const Arrival> last = {});

  // CheckChannel and ReadChannel
  bool send_check(Id id, const Check& check) override;
  bool send_check_result(Id id, const CheckResult& result) override;
  bool serves(Id id) const override;
  void take_checks(std::vector<CheckChannel::Received>& checks) override { take(checks_, checks); }
  void take_check_results(std::vector<CheckChannel::Answer>& results) override { take(check_results_, results); }
  bool send_read_request(Id id, const ReadRequest& request) override;
  bool send_read_answer(Id id, const ReadAnswer& answer) override;
  void take_read_requests(std::vector<ReadChannel::Received>& requests) override { take(read_requests_, requests); }
  void take_read_answers(std::vector<ReadChannel::Answer>& answers) override { take(read_answers_, answers); }
  void take_gone_readers(std::vector<Id>& readers) override { take(gone_readers_, readers); }

  /// Asks a writer that broke the rules to stop; its connection stays until it has.
  void expel(Id id) { (void)shut({id}); }
  Status fence(Epoch peer, uint64_t serial);
  /// Fences everybody who is connected, and lets nobody in any more.
  Status fence_all();

  size_t progress();
  int poll_fd() const { return epoll_.get(); }
  bool wants_time() const;
  /// Connections that have ended here, and wait for the other side to hear it.
  size_t lingering() const;
  size_t inbound() const { return inbound_count_; }
  /// Words are waited for: of a read under way, or the next one of a reader.
  bool reads_going_on() const { return readers_ + awaited_reads_ > 0; }

 private:
  struct Connection {
    std::unique_ptr<FrameSocket> socket;
    bool outbound = false;
    bool connecting = false;
    bool established = false;  // Welcome sent or received
    bool fenced = false;
    bool watching_out = false;
    Epoch peer = Epoch::kNone;
    std::string name;
    int64_t opened_ns = 0;
    uint32_t open_checks = 0;  // inbound: without an answer
    uint32_t open_reads = 0;   // the same, in both directions
    bool reads = false;        // inbound: it has introduced itself
  };

  template <typename T>
  static void take(std::vector<T>& from, std::vector<T>& to) {
    to.insert(to.end(), std::make_move_iterator(from.begin()), std::make_move_iterator(from.end()));
    from.clear();
  }
  bool send(Id id, FrameSocket::Type type, std::string_view payload);
  size_t shut(const std::vector<Id>& inbound);
  void accept_all();
  bool turn_away(int error);
  void handle(Id id, uint32_t events);
  void handle_frame(Id id, Connection& connection, const FrameSocket::Frame& frame, Status* failure);
  void handle_hello(Id id, Connection& connection, std::string_view payload, Status* failure);
  void close(Id id, const Status& why);
  void watch(Id id, Connection& connection);
  Status add(Id id, Connection connection);

  Options options_;
  Delegate& delegate_;
  const Clock& clock_;
  SocketAddress address_;
  FileDescriptor epoll_;
  FileDescriptor listener_;
  FileDescriptor spare_;  // to take a connection with, and hang up, when there are no descriptors left
  uint64_t turned_away_ = 0;
  int64_t turned_away_said_ns_ = 0;
  std::unordered_map<Id, Connection> connections_;
  std::unique_ptr<class LingeringSockets> lingering_;
  std::unordered_map<Epoch, uint64_t> fenced_;  // peer -> serial up to which it is refused
  std::deque<Epoch> fenced_order_;
  std::vector<CheckChannel::Received> checks_;
  std::vector<CheckChannel::Answer> check_results_;
  std::vector<ReadChannel::Received> read_requests_;
  std::vector<ReadChannel::Answer> read_answers_;
  std::vector<Id> gone_readers_;
  size_t readers_ = 0;        // inbound connections that have introduced themselves
  size_t awaited_reads_ = 0;  // of outbound ones, without an Ended
  Id next_id_ = 1;
  size_t inbound_count_ = 0;
  bool closing_ = false;
  size_t waiting_for_hello_ = 0;
};

}  // namespace baton::transfer
