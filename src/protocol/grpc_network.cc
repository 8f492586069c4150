// Channels over gRPC's asynchronous API: one thread per listener and one for all outgoing channels, each polling
// one completion queue. gRPC carries opaque byte buffers; frames are serialised in send() on the caller's
// thread and parsed here, so every byte that waits is counted and nothing is copied twice.
//
// A channel owns up to six operations at a time (start, metadata, read, write, finish, alarm). It keeps itself alive
// while any is pending, and reports on_closed when the last one has come back. A completion queue is shut down
// only after all its channels are through: gRPC aborts the process when an operation starts on a queue
// that is already shut down.
#include <grpc/support/log.h>
#include <grpcpp/alarm.h>
#include <grpcpp/generic/async_generic_service.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <grpcpp/impl/codegen/proto_utils.h>
#include <pthread.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <deque>
#include <mutex>
#include <thread>
#include <unordered_set>
#include <utility>

#include "base/clock.h"
#include "base/log.h"
#include "protocol/baton.pb.h"
#include "protocol/channel.h"

namespace baton::protocol {
namespace {

constexpr char kMethod[] = "/baton.protocol.Worker/Connect";
/// close() sends what is queued, but waits no longer than this for a peer that does not read.
constexpr int64_t kLingerMs = 500;
/// A host that is gone, or a stopped process, is noticed after the sum of the two.
constexpr int kKeepAliveTimeMs = 5000;
constexpr int kKeepAliveTimeoutMs = 5000;
/// Flow-control window: a prompt of 100,000 tokens needs no extra round trip.
constexpr int kWindowBytes = 1 << 20;
constexpr size_t kMaxAcceptedChannels = 1024;

std::chrono::system_clock::time_point in_ms(int64_t timeout_ms) {
  return std::chrono::system_clock::now() + std::chrono::milliseconds(timeout_ms);
}

/// gRPC writes to stderr by itself; its lines are for people who debug gRPC.
void silence_grpc() {
  static std::once_flag once;
  std::call_once(once, [] {
    gpr_set_log_verbosity(GPR_LOG_SEVERITY_ERROR);
    gpr_set_log_function([](gpr_log_func_args* args) { log_debug("grpc: {}", args->message); });
  });
}

/// What a completion queue hands back.
class Completion {
 public:
  virtual void complete(bool ok) = 0;

 protected:
  ~Completion() = default;
};

/// Polls one completion queue and counts the users that may still start operations on it.
class Poller {
 public:
  explicit Poller(std::unique_ptr<grpc::CompletionQueue> queue) : queue_(std::move(queue)) {
    thread_ = std::thread([this] {
      pthread_setname_np(pthread_self(), "baton-grpc");
      void* tag = nullptr;
      bool ok = false;
      while (next(&tag, &ok)) {
        handed_over_.load(std::memory_order_acquire);
        static_cast<Completion*>(tag)->complete(ok);
      }
    });
  }
  ~Poller() { stop(); }

  /// Waits for the last user, then ends the thread. Idempotent.
  void stop() {
    if (!thread_.joinable()) return;
    BATON_CHECK(std::this_thread::get_id() != thread_.get_id()) << "a network was destroyed in its own callback";
    {
      std::unique_lock lock(mutex_);
      idle_.wait(lock, [this] { return users_ == 0; });
    }
    queue_->Shutdown();
    thread_.join();
  }

  grpc::CompletionQueue* queue() { return queue_.get(); }
  /// On the polling thread: it does not sleep before then.
  void stay_awake(int64_t until_ns) { awake_until_ns_ = until_ns; }
  /// Before every operation: what was written until now is seen by its completion. gRPC's queue says so too, but the
  /// thread sanitizer can't look into that library.
  void hand_over() { handed_over_.fetch_add(1, std::memory_order_release); }
  void add_user() {
    hand_over();
    std::lock_guard lock(mutex_);
    ++users_;
  }
  void remove_user() {
    std::lock_guard lock(mutex_);
    if (--users_ == 0) idle_.notify_all();
  }

 private:
  /// Waits for the next completion, for some time without sleeping; false: the queue was shut down.
  bool next(void** tag, bool* ok) {
    while (SteadyClock::instance().now_ns() < awake_until_ns_) {
      switch (queue_->AsyncNext(tag, ok, gpr_time_0(GPR_CLOCK_MONOTONIC))) {
        case grpc::CompletionQueue::GOT_EVENT: return true;
        case grpc::CompletionQueue::SHUTDOWN: return false;
        case grpc::CompletionQueue::TIMEOUT: std::this_thread::yield();
      }
    }
    return queue_->Next(tag, ok);
  }

  std::unique_ptr<grpc::CompletionQueue> queue_;
  int64_t awake_until_ns_ = 0;
  std::atomic<uint64_t> handed_over_{0};
  std::mutex mutex_;
  std::condition_variable idle_;
  int64_t users_ = 0;
  std::thread thread_;
};

/// The live channels of a listener or network, so that it can close them.
class ChannelSet {
 public:
  void insert(const std::shared_ptr<Channel>& channel) {
    std::lock_guard lock(mutex_);
    channels_.insert(channel);
  }
  void erase(const std::shared_ptr<Channel>& channel) {
    std::lock_guard lock(mutex_);
    channels_.erase(channel);
  }
  size_t size() const {
    std::lock_guard lock(mutex_);
    return channels_.size();
  }
  void close_all() {
    std::unordered_set<std::shared_ptr<Channel>> channels;
    {
      std::lock_guard lock(mutex_);
      channels = channels_;
    }
    for (const auto& channel : channels) channel->close();
  }

 private:
  mutable std::mutex mutex_;
  std::unordered_set<std::shared_ptr<Channel>> channels_;
};

/// What both ends of a stream share. The subclass knows how to start, end and abort its kind of call.
class GrpcChannel : public Channel, public std::enable_shared_from_this<GrpcChannel> {
 public:
  GrpcChannel(std::shared_ptr<const ChannelHandler> handler, ChannelLimits limits, Poller& poller, ChannelSet& set)
      : limits_(limits), poller_(poller), handler_(std::move(handler)), set_(set) {}

  Status send(const Frame& frame) override {
    size_t bytes = frame.ByteSizeLong();
    if (bytes > limits_.max_frame_bytes) {
      return invalid_argument("a frame of {} bytes to {} is over the limit of {}", bytes, address(),
                              limits_.max_frame_bytes);
    }
    grpc::ByteBuffer buffer;
    bool own = false;
    grpc::Status status = grpc::GenericSerialize<grpc::ProtoBufferWriter, Frame>(frame, &buffer, &own);
    if (!status.ok()) return internal_error("frame to {}: {}", address(), status.error_message());

    std::lock_guard lock(mutex_);
    if (closing_ || ended_) return unavailable("the channel to {} is closed", address());
    // An empty queue takes any frame: a bound on bytes must not make a legal frame unsendable.
    if (queued_bytes_ > 0 && queued_bytes_ + bytes > limits_.max_queued_bytes) {
      return resource_exhausted("{} does not read: {} bytes wait to be sent, the limit is {}", address(),
                                queued_bytes_, limits_.max_queued_bytes);
    }
    queued_bytes_ += bytes;
    queue_.push_back({std::move(buffer), bytes});
    write_next();
    return {};
  }

  void close() override {
    std::lock_guard lock(mutex_);
    if (closing_ || ended_) return;
    closing_ = true;
    if (!connected_) {
      abort_call();
      return;
    }
    begin();
    linger_alarm_.Set(poller_.queue(), in_ms(kLingerMs), &linger_op_);
    write_next();
  }

 protected:
  /// One kind of operation of this channel; the address is the completion queue's tag.
  class Op final : public Completion {
   public:
    Op(GrpcChannel& channel, void (GrpcChannel::*on_complete)(bool)) : channel_(channel), on_complete_(on_complete) {}
    void complete(bool ok) override { channel_.complete_op(on_complete_, ok); }

   private:
    GrpcChannel& channel_;
    void (GrpcChannel::*on_complete_)(bool);
  };

  struct Outgoing {
    grpc::ByteBuffer buffer;
    size_t bytes = 0;
  };

  // All with mutex_ held.
  virtual void start_read() = 0;
  virtual void start_write(const grpc::ByteBuffer& buffer) = 0;
  /// Everything was sent: tells the peer that no more comes.
  virtual void end_gracefully() = 0;
  virtual void abort_call() = 0;
  /// The stream can't be read any more: fetches or sends the final status. Called once.
  virtual void start_finish() = 0;

  /// Counts an operation that is about to start.
  void begin() {
    poller_.hand_over();
    if (pending_ops_++ == 0) {
      self_ = shared_from_this();
      poller_.add_user();
      set_.insert(self_);
    }
  }

  void write_next() {
    if (!writable_ || writing_ || ended_ || ending_) return;
    if (!queue_.empty()) {
      writing_ = true;
      begin();
      start_write(queue_.front().buffer);
    } else if (closing_) {
      ending_ = true;
      end_gracefully();
    }
  }

  /// The stream is over, for whatever reason; idempotent.
  void end(Status status) {
    if (ended_) return;
    ended_ = true;
    final_status_ = closing_ ? Status() : std::move(status);
    linger_alarm_.Cancel();
    if (writing_) abort_call();  // a write to a peer that does not read would never come back
    finish_when_quiet();
  }

  void finish_when_quiet() {
    if (!ended_ || finishing_ || writing_) return;
    finishing_ = true;
    start_finish();
  }

  // Completions, each with mutex_ held.
  void on_write(bool ok) {
    writing_ = false;
    queued_bytes_ -= queue_.front().bytes;
    queue_.pop_front();
    if (ended_) {
      finish_when_quiet();
    } else if (ok) {
      write_next();
    } else {
      abort_call();  // the read fails next and ends the stream
    }
  }
  void on_read(bool ok) {
    read_ok_ = ok;
    if (!ok) end(unavailable("{} closed the channel", address()));
  }
  void on_linger(bool fired) {
    if (fired) abort_call();
  }
  void on_finish(bool) {}
  void on_ignored(bool) {}

  void complete_op(void (GrpcChannel::*on_complete)(bool), bool ok) {
    std::unique_lock lock(mutex_);
    (this->*on_complete)(ok);
    if (std::exchange(read_ok_, false)) {
      deliver(lock);
    }
    if (--pending_ops_ > 0) return;
    // The last operation: nothing can start any more, because ended_ is set before finish starts.
    auto self = std::move(self_);
    queue_.clear();
    queued_bytes_ = 0;
    Status status = std::move(final_status_);
    bool report = report_closed_;
    lock.unlock();
    // The handler's captures may own this channel through what they were told: they go with the last call.
    std::shared_ptr<const ChannelHandler> handler = std::move(handler_);
    if (report) handler->on_closed(self, std::move(status));
    set_.erase(self);
    Poller& poller = poller_;
    self.reset();  // before the network may go away
    poller.remove_user();
  }

  /// Hands the frame that was read to the owner and reads on.
  void deliver(std::unique_lock<std::mutex>& lock) {
    Frame frame;
    // The read is still counted as pending here, so the channel stays alive and calls don't overlap.
    grpc::ProtoBufferReader reader(&incoming_);
    bool parsed = frame.ParseFromZeroCopyStream(&reader) && reader.status().ok();
    if (!parsed) {
      log_warning("{} sent {} bytes that are not a frame; the channel is closed", address(), incoming_.Length());
      end(data_loss("{} sent bytes that are not a frame", address()));
      abort_call();
      return;
    }
    incoming_.Clear();
    lock.unlock();
    handler_->on_frame(shared_from_this(), std::move(frame));
    if (handler_->awake_until_ns != nullptr) poller_.stay_awake(handler_->awake_until_ns->load());
    lock.lock();
    begin();
    start_read();
  }

  const ChannelLimits limits_;
  Poller& poller_;

  std::mutex mutex_;
  std::deque<Outgoing> queue_;  // the front one is being written while writing_
  size_t queued_bytes_ = 0;
  bool writable_ = false;   // our initial metadata is out
  bool connected_ = false;  // the peer has answered
  bool writing_ = false;
  bool closing_ = false;    // close() was called
  bool ending_ = false;     // end_gracefully() was called
  bool ended_ = false;      // nothing more can be read
  bool finishing_ = false;
  bool read_ok_ = false;
  bool report_closed_ = true;
  int pending_ops_ = 0;
  Status final_status_;
  grpc::ByteBuffer incoming_;
  grpc::Alarm linger_alarm_;

  Op read_op_{*this, &GrpcChannel::on_read};
  Op write_op_{*this, &GrpcChannel::on_write};
  Op linger_op_{*this, &GrpcChannel::on_linger};
  Op finish_op_{*this, &GrpcChannel::on_finish};
  Op ignored_op_{*this, &GrpcChannel::on_ignored};

 private:
  std::shared_ptr<const ChannelHandler> handler_;
  ChannelSet& set_;
  std::shared_ptr<GrpcChannel> self_;  // while operations are pending
};

class ClientChannel final : public GrpcChannel {
 public:
  ClientChannel(std::string address, std::shared_ptr<const ChannelHandler> handler, ChannelLimits limits,
                Poller& poller, ChannelSet& set)
      : GrpcChannel(std::move(handler), limits, poller, set), address_(std::move(address)) {}

  const std::string& address() const override { return address_; }

  void start(const std::shared_ptr<grpc::Channel>& channel, int64_t connect_timeout_ms) {
    std::lock_guard lock(mutex_);
    connect_timeout_ms_ = connect_timeout_ms;
    grpc::GenericStub stub(channel);
    stream_ = stub.PrepareCall(&context_, kMethod, poller_.queue());
    begin();
    begin();
    connect_alarm_.Set(poller_.queue(), in_ms(connect_timeout_ms), &connect_alarm_op_);
    stream_->StartCall(&start_op_);
  }

 private:
  void start_read() override { stream_->Read(&incoming_, &read_op_); }
  void start_write(const grpc::ByteBuffer& buffer) override { stream_->Write(buffer, &write_op_); }
  void end_gracefully() override {
    begin();
    stream_->WritesDone(&ignored_op_);
  }
  void abort_call() override { context_.TryCancel(); }
  void start_finish() override {
    connect_alarm_.Cancel();
    begin();
    stream_->Finish(&call_status_, &finish_op_client_);
  }

  // Op takes members of GrpcChannel; these are of the subclass, hence the casts.
  template <void (ClientChannel::*Method)(bool)>
  static void (GrpcChannel::*as_base())(bool) {
    return static_cast<void (GrpcChannel::*)(bool)>(Method);
  }
  void on_start(bool ok) {
    if (!ok) {
      end(unavailable("cannot connect to {}", address_));
      return;
    }
    writable_ = true;
    begin();
    stream_->ReadInitialMetadata(&metadata_op_);
    write_next();
  }
  void on_metadata(bool ok) {
    if (!ok) {
      end(unavailable("{} did not answer", address_));
      return;
    }
    connected_ = true;
    connect_alarm_.Cancel();
    begin();
    start_read();
  }
  void on_connect_alarm(bool fired) {
    if (!fired || connected_ || ended_) return;
    timed_out_ = true;
    abort_call();
  }
  void on_client_finish(bool) {
    if (final_status_.ok() || final_status_.code() != StatusCode::kUnavailable) return;
    if (timed_out_) {
      final_status_ = unavailable("{} did not answer within {} ms", address_, connect_timeout_ms_);
    } else if (!call_status_.ok()) {
      final_status_ = unavailable("channel to {}: {}", address_, call_status_.error_message());
    }
  }

  const std::string address_;
  int64_t connect_timeout_ms_ = 0;
  bool timed_out_ = false;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> stream_;
  grpc::Status call_status_;
  grpc::Alarm connect_alarm_;
  Op start_op_{*this, as_base<&ClientChannel::on_start>()};
  Op metadata_op_{*this, as_base<&ClientChannel::on_metadata>()};
  Op connect_alarm_op_{*this, as_base<&ClientChannel::on_connect_alarm>()};
  Op finish_op_client_{*this, as_base<&ClientChannel::on_client_finish>()};
};

class ServerChannel final : public GrpcChannel {
 public:
  using GrpcChannel::GrpcChannel;

  const std::string& address() const override { return address_; }
  grpc::GenericServerContext* context() { return &context_; }
  grpc::GenericServerAsyncReaderWriter* stream() { return &stream_; }

  /// The call has arrived. `refusal`: ended with it instead of being served.
  void start(uint64_t number, const grpc::Status& refusal) {
    std::lock_guard lock(mutex_);
    address_ = fmt::format("{}#{}", context_.peer(), number);
    if (!refusal.ok()) {
      ended_ = finishing_ = true;
      report_closed_ = false;
      begin();
      stream_.Finish(refusal, &finish_op_);
      return;
    }
    connected_ = true;
    begin();
    stream_.SendInitialMetadata(&start_op_);
    begin();
    start_read();
  }

 private:
  void start_read() override { stream_.Read(&incoming_, &read_op_); }
  void start_write(const grpc::ByteBuffer& buffer) override { stream_.Write(buffer, &write_op_); }
  void end_gracefully() override {
    // Finishing makes the pending read fail, which ends the stream.
    finishing_ = true;
    begin();
    stream_.Finish(grpc::Status::OK, &finish_op_);
  }
  void abort_call() override { context_.TryCancel(); }
  void start_finish() override {
    begin();
    stream_.Finish(grpc::Status::OK, &finish_op_);
  }
  void on_start(bool ok) {
    writable_ = ok;
    write_next();
  }

  std::string address_;
  grpc::GenericServerContext context_;
  grpc::GenericServerAsyncReaderWriter stream_{&context_};
  Op start_op_{*this, static_cast<void (GrpcChannel::*)(bool)>(&ServerChannel::on_start)};
};

void set_transport_arguments(grpc::ChannelArguments* arguments) {
  arguments->SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);  // else a dead peer's back-off outlives its channel
  arguments->SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  arguments->SetInt(GRPC_ARG_SERVICE_CONFIG_DISABLE_RESOLUTION, 1);
  arguments->SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepAliveTimeMs);
  arguments->SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepAliveTimeoutMs);
  arguments->SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  arguments->SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  arguments->SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kWindowBytes);
}

class GrpcListener final : public Listener {
 public:
  static Result<std::unique_ptr<Listener>> create(const std::string& address, ChannelHandler handler,
                                                  ChannelLimits limits) {
    auto listener = std::unique_ptr<GrpcListener>(new GrpcListener(std::move(handler), limits));
    BATON_RETURN_IF_ERROR(listener->start(address));
    return std::unique_ptr<Listener>(std::move(listener));
  }

  ~GrpcListener() override {
    if (server_ == nullptr) return;
    channels_.close_all();
    server_->Shutdown(in_ms(2 * kLingerMs));  // refuses new calls, waits, then cancels what is left
    poller_->stop();                          // waits for the last completions
    server_.reset();                          // before its queue, which goes with poller_
  }

  const std::string& address() const override { return address_; }

 private:
  /// Waits for one call, then makes the next of its kind.
  class Accept final : public Completion {
   public:
    explicit Accept(GrpcListener& listener) : listener_(listener) {
      channel_ = std::make_shared<ServerChannel>(listener.handler_, listener.limits_, *listener.poller_,
                                                 listener.channels_);
      ServerChannel& channel = *channel_;
      Poller& poller = *listener.poller_;
      poller.add_user();  // from here on this object belongs to the poller's thread
      listener.service_.RequestCall(channel.context(), channel.stream(), poller.queue(), listener.server_queue_, this);
    }
    void complete(bool ok) override {
      if (ok) {
        new Accept(listener_);  // deletes itself when it completes, as this one does
        grpc::Status refusal;
        if (channel_->context()->method() != kMethod) {
          refusal = grpc::Status(grpc::StatusCode::UNIMPLEMENTED, "only " + std::string(kMethod));
        } else if (listener_.channels_.size() >= kMaxAcceptedChannels) {
          refusal = grpc::Status(grpc::StatusCode::RESOURCE_EXHAUSTED, "too many channels");
        }
        channel_->start(++listener_.accepted_, refusal);
      }
      Poller& poller = *listener_.poller_;
      delete this;
      poller.remove_user();
    }

   private:
    GrpcListener& listener_;
    std::shared_ptr<ServerChannel> channel_;
  };

  GrpcListener(ChannelHandler handler, ChannelLimits limits)
      : handler_(std::make_shared<const ChannelHandler>(std::move(handler))), limits_(limits) {}

  Status start(const std::string& address) {
    grpc::ServerBuilder builder;
    int port = 0;
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
    builder.RegisterAsyncGenericService(&service_);
    builder.SetMaxReceiveMessageSize(static_cast<int>(limits_.max_frame_bytes));
    builder.SetMaxSendMessageSize(-1);
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);  // a second worker on the port must fail, not share
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, kKeepAliveTimeMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, kKeepAliveTimeoutMs);
    builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, kKeepAliveTimeMs / 2);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 0);
    builder.AddChannelArgument(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kWindowBytes);
    auto queue = builder.AddCompletionQueue();
    server_queue_ = queue.get();
    server_ = builder.BuildAndStart();
    bool unix_socket = address.starts_with("unix:");
    if (server_ == nullptr || (!unix_socket && port == 0)) {
      if (server_ != nullptr) server_->Shutdown();
      server_.reset();
      queue->Shutdown();
      void* tag = nullptr;
      bool ok = false;
      while (queue->Next(&tag, &ok)) {
      }
      return unavailable("cannot listen on {}: in use, or not an address of this machine", address);
    }
    poller_ = std::make_unique<Poller>(std::move(queue));
    address_ = unix_socket ? address : fmt::format("{}:{}", address.substr(0, address.rfind(':')), port);
    new Accept(*this);
    return {};
  }

  std::shared_ptr<const ChannelHandler> handler_;
  const ChannelLimits limits_;
  std::string address_;
  uint64_t accepted_ = 0;  // on the poller's thread
  grpc::AsyncGenericService service_;
  ChannelSet channels_;
  grpc::ServerCompletionQueue* server_queue_ = nullptr;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<Poller> poller_;
};

class GrpcNetwork final : public Network {
 public:
  explicit GrpcNetwork(ChannelLimits limits)
      : limits_(limits), poller_(std::make_unique<Poller>(std::make_unique<grpc::CompletionQueue>())) {
    silence_grpc();
  }
  ~GrpcNetwork() override {
    channels_.close_all();
    poller_.reset();
  }

  Result<std::unique_ptr<Listener>> listen(const std::string& address, ChannelHandler handler) override {
    return GrpcListener::create(address, std::move(handler), limits_);
  }

  std::shared_ptr<Channel> connect(const std::string& address, ChannelHandler handler,
                                   int64_t connect_timeout_ms) override {
    grpc::ChannelArguments arguments;
    set_transport_arguments(&arguments);
    arguments.SetMaxReceiveMessageSize(static_cast<int>(limits_.max_frame_bytes));
    arguments.SetMaxSendMessageSize(-1);
    auto grpc_channel = grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), arguments);
    auto channel = std::make_shared<ClientChannel>(
        address, std::make_shared<const ChannelHandler>(std::move(handler)), limits_, *poller_, channels_);
    channel->start(grpc_channel, connect_timeout_ms);
    return channel;
  }

 private:
  const ChannelLimits limits_;
  ChannelSet channels_;
  std::unique_ptr<Poller> poller_;
};

}  // namespace

std::unique_ptr<Network> make_grpc_network(ChannelLimits limits) {
  return std::make_unique<GrpcNetwork>(limits);
}

}  // namespace baton::protocol

#if defined(__SANITIZE_THREAD__)
// Their locks are futexes of their own in libraries that are not instrumented.
extern "C" __attribute__((weak)) const char* __tsan_default_suppressions() {
  return "race:libgrpc\nrace:libgpr\nrace:libabsl_\nrace:libprotobuf\nrace:libfabric\nmutex:libabsl_\ndeadlock:libabsl_\n";
}
#endif
