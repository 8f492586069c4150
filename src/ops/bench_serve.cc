#include "ops/bench_serve.h"

#include <algorithm>
#include <boost/asio/co_spawn.hpp>
#include <boost/asio/detached.hpp>
#include <boost/asio/io_context.hpp>
#include <boost/asio/redirect_error.hpp>
#include <boost/asio/steady_timer.hpp>
#include <boost/asio/use_awaitable.hpp>
#include <cmath>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "base/clock.h"
#include "base/random.h"
#include "ops/http_client.h"

namespace baton::ops {

namespace asio = boost::asio;
using nlohmann::json;

Status BenchServeOptions::validate() const {
  if (isl < 1 || osl < 1) return invalid_argument("--isl and --osl must be positive (are {} and {})", isl, osl);
  if (length_spread < 0 || length_spread > 1) return invalid_argument("--spread is {}; it must be from 0 to 1", length_spread);
  if (concurrency < 1 || concurrency > 65536) return invalid_argument("--concurrency is {}; give 1 to 65536", concurrency);
  if (requests < 1 && duration_s <= 0) return invalid_argument("give --requests or --duration");
  if (shared_prefix < 0 || shared_prefix > isl) return invalid_argument("--shared-prefix is {}; it can't be longer than --isl ({})", shared_prefix, isl);
  if (prefix_groups < 1) return invalid_argument("--prefix-groups is {}; it must be positive", prefix_groups);
  if (vocab_size < 8) return invalid_argument("--vocab-size is {}; give at least 8", vocab_size);
  if (disconnect < 0 || disconnect > 1) return invalid_argument("--disconnect is {}; it must be from 0 to 1", disconnect);
  if (rate < 0) return invalid_argument("--rate is {}; it must be positive", rate);
  return {};
}

Distribution describe(std::vector<double> values) {
  Distribution result;
  result.count = values.size();
  if (values.empty()) return result;
  std::sort(values.begin(), values.end());
  auto quantile = [&](double q) {
    double rank = q * static_cast<double>(values.size() - 1);
    size_t low = static_cast<size_t>(rank);
    size_t high = std::min(low + 1, values.size() - 1);
    return values[low] + (rank - static_cast<double>(low)) * (values[high] - values[low]);
  };
  for (double value : values) result.mean += value;
  result.mean /= static_cast<double>(values.size());
  result.p50 = quantile(0.5);
  result.p90 = quantile(0.9);
  result.p95 = quantile(0.95);
  result.p99 = quantile(0.99);
  result.max = values.back();
  return result;
}

namespace {

/// Request i of a run is a pure function of the seed and i, whoever sends it.
class Workload {
 public:
  explicit Workload(const BenchServeOptions& options) : options_(options) {}

  struct Item {
    std::string body;
    int32_t osl = 0;
    int32_t leave_after = -1;  ///< tokens after which the client leaves; -1: never
  };

  Item make(int64_t index, const std::string& model) const {
    Random random(mix_bits(options_.seed, static_cast<uint64_t>(index)));
    int32_t isl = draw(random, options_.isl);
    Item item;
    item.osl = draw(random, options_.osl);
    if (options_.disconnect > 0 && random.chance(options_.disconnect)) {
      item.leave_after = static_cast<int32_t>(random.below(static_cast<uint64_t>(item.osl) + 1));
    }
    int32_t prefix = std::min(options_.shared_prefix, isl);
    uint64_t group = random.below(static_cast<uint64_t>(options_.prefix_groups));
    Random prefix_random(mix_bits(options_.seed ^ 0x707265666978ull, group));
    std::string prompt;
    for (int32_t i = 0; i < isl; ++i) {
      uint64_t token = 3 + (i < prefix ? prefix_random : random).below(static_cast<uint64_t>(options_.vocab_size - 3));
      if (options_.text) {
        prompt += (i == 0 ? "w" : " w") + std::to_string(token);
      } else {
        prompt += (i == 0 ? "" : ",") + std::to_string(token);
      }
    }
    item.body = fmt::format(
        "{{\"model\":{},\"prompt\":{},\"max_tokens\":{},\"min_tokens\":{},\"ignore_eos\":true,\"temperature\":{},\"seed\":{},"
        "\"stream\":true,\"stream_options\":{{\"include_usage\":true}},\"return_token_ids\":true}}",
        json(model).dump(), options_.text ? json(prompt).dump() : "[" + prompt + "]", item.osl, item.osl,
        options_.temperature, index);
    return item;
  }

 private:
  int32_t draw(Random& random, int32_t mean) const {
    double factor = 1 + options_.length_spread * (2 * random.uniform() - 1);
    return std::max(1, static_cast<int32_t>(std::lround(mean * factor)));
  }
  const BenchServeOptions& options_;
};

/// Takes server-sent events apart and notes when tokens came.
class StreamReader {
 public:
  StreamReader(RequestRecord& record, int64_t begin_ns, int32_t leave_after)
      : record_(record), begin_ns_(begin_ns), leave_after_(leave_after) {}

  bool on_data(std::string_view data) {
    buffer_ += data;
    size_t start = 0;
    for (size_t end; (end = buffer_.find('\n', start)) != std::string::npos; start = end + 1) {
      std::string_view line(buffer_.data() + start, end - start);
      if (line.ends_with('\r')) line.remove_suffix(1);
      if (line.starts_with("data:")) on_event(line.substr(line.starts_with("data: ") ? 6 : 5));
    }
    buffer_.erase(0, start);
    return leave_after_ < 0 || record_.output_tokens < leave_after_ || done_;
  }
  bool done() const { return done_; }

 private:
  void on_event(std::string_view text) {
    if (text == "[DONE]") {
      done_ = true;
      return;
    }
    json event = json::parse(text, nullptr, false);
    if (!event.is_object()) {
      record_.error = "an event is not JSON";
      return;
    }
    if (event.contains("error")) {
      record_.error = event["error"].is_object() ? event["error"].value("message", "error") : "error";
      return;
    }
    if (auto usage = event.find("usage"); usage != event.end() && usage->is_object()) {
      record_.prompt_tokens = usage->value("prompt_tokens", int64_t{0});
      record_.output_tokens = usage->value("completion_tokens", record_.output_tokens);
    }
    auto choices = event.find("choices");
    if (choices == event.end() || !choices->is_array() || choices->empty()) return;
    const json& choice = (*choices)[0];
    int64_t tokens = 0;
    if (auto ids = choice.find("token_ids"); ids != choice.end() && ids->is_array()) {
      tokens = static_cast<int64_t>(ids->size());
    } else if (choice.value("text", "") != "") {
      tokens = 1;
    }
    if (tokens == 0) return;
    double now_s = static_cast<double>(SteadyClock::instance().now_ns() - begin_ns_) * 1e-9;
    if (record_.output_tokens == 0) {
      record_.first_s = now_s;
    } else {
      record_.gaps_s.push_back(static_cast<float>(now_s - last_s_));
    }
    last_s_ = now_s;
    record_.output_tokens += tokens;
  }

  RequestRecord& record_;
  const int64_t begin_ns_;
  const int32_t leave_after_;
  std::string buffer_;
  double last_s_ = 0;
  bool done_ = false;
};

class LoadRun {
 public:
  LoadRun(const BenchServeOptions& options, Url url, std::string model)
      : options_(options), url_(std::move(url)), model_(std::move(model)), workload_(options_) {}

  std::vector<RequestRecord> run(double* wall_s) {
    if (options_.warmup > 0) {
      // Indices from the other end, so that the warm-up does not fill the prefix cache with the run's own prompts.
      limit_ = options_.warmup;
      next_ = 0;
      offset_ = int64_t{1} << 40;
      spawn_users();
      io_.run();
      io_.restart();
      records_.clear();
      finished_ = 0;
    }
    offset_ = 0;
    next_ = 0;
    limit_ = options_.duration_s > 0 ? std::numeric_limits<int64_t>::max() : options_.requests;
    begin_ns_ = now_ns();
    measuring_ = true;
    if (options_.rate > 0) {
      asio::co_spawn(io_, arrivals(this), asio::detached);
    } else {
      spawn_users();
    }
    if (options_.progress) asio::co_spawn(io_, report_progress(this), asio::detached);
    io_.run();
    *wall_s = static_cast<double>(now_ns() - begin_ns_) * 1e-9;
    if (options_.progress) std::fputc('\n', stderr);
    std::vector<RequestRecord> records(std::make_move_iterator(records_.begin()), std::make_move_iterator(records_.end()));
    return records;
  }

 private:
  static int64_t now_ns() { return SteadyClock::instance().now_ns(); }

  bool over() const {
    if (next_ >= limit_) return true;
    return measuring_ && options_.duration_s > 0 && static_cast<double>(now_ns() - begin_ns_) * 1e-9 >= options_.duration_s;
  }

  void spawn_users() {
    for (int32_t i = 0; i < options_.concurrency && i < limit_; ++i) asio::co_spawn(io_, user(this), asio::detached);
  }

  /// Closed loop: one request after the other.
  static asio::awaitable<void> user(LoadRun* run) {
    HttpClient client(run->io_.get_executor(), run->url_);
    ++run->active_;
    while (!run->over()) co_await one_request(run, client, run->next_++);
    if (--run->active_ == 0) run->wake_progress();
  }

  /// Open loop: requests come when they come.
  static asio::awaitable<void> arrivals(LoadRun* run) {
    Random random(run->options_.seed ^ 0x617272697661ull);
    asio::steady_timer timer(run->io_);
    auto due = std::chrono::steady_clock::now();
    ++run->active_;
    while (!run->over()) {
      double gap_s = -std::log(1 - random.uniform()) / run->options_.rate;
      due += std::chrono::nanoseconds(static_cast<int64_t>(gap_s * 1e9));
      timer.expires_at(due);
      co_await timer.async_wait(asio::use_awaitable);
      int64_t index = run->next_++;
      if (run->active_ > run->options_.concurrency) {
        RequestRecord record;
        record.start_s = static_cast<double>(now_ns() - run->begin_ns_) * 1e-9;
        record.error = "not sent: --concurrency requests are under way";
        run->records_.push_back(std::move(record));
        continue;
      }
      asio::co_spawn(run->io_, single(run, index), asio::detached);
    }
    if (--run->active_ == 0) run->wake_progress();
  }
  static asio::awaitable<void> single(LoadRun* run, int64_t index) {
    HttpClient client(run->io_.get_executor(), run->url_);
    ++run->active_;
    co_await one_request(run, client, index);
    if (--run->active_ == 0) run->wake_progress();
  }

  static asio::awaitable<void> one_request(LoadRun* run, HttpClient& client, int64_t index) {
    Workload::Item item = run->workload_.make(index + run->offset_, run->model_);
    RequestRecord record;
    int64_t begin_ns = run->measuring_ ? run->begin_ns_ : now_ns();
    record.start_s = static_cast<double>(now_ns() - begin_ns) * 1e-9;
    StreamReader reader(record, begin_ns, item.leave_after);
    auto on_data = [&reader](std::string_view data) { return reader.on_data(data); };
    HttpClient::Reply reply = co_await HttpClient::request(client, "POST", "/v1/completions", std::move(item.body),
                                                           run->options_.timeout_ms, on_data);
    record.end_s = static_cast<double>(now_ns() - begin_ns) * 1e-9;
    if (reply.status.code() == StatusCode::kCancelled) {
      record.disconnected = true;
    } else if (!reply.status.ok()) {
      record.error = reply.status.message();
    } else if (reply.code != 200) {
      json body = json::parse(reply.body, nullptr, false);
      std::string message = body.is_object() && body.contains("error") && body["error"].is_object()
                                ? body["error"].value("message", "") : reply.body.substr(0, 200);
      record.error = fmt::format("HTTP {}: {}", reply.code, message);
    } else if (record.error.empty() && !reader.done()) {
      record.error = "the stream ended without [DONE]";
    } else if (record.error.empty() && record.output_tokens == 0) {
      record.error = "no token came";
    }
    record.ok = record.error.empty() && !record.disconnected;
    ++run->finished_;
    run->tokens_ += record.output_tokens;
    run->records_.push_back(std::move(record));
  }

  void wake_progress() {
    if (progress_timer_) progress_timer_->cancel();
  }
  static asio::awaitable<void> report_progress(LoadRun* run) {
    asio::steady_timer timer(run->io_);
    run->progress_timer_ = &timer;
    while (run->active_ > 0 || run->finished_ == 0) {
      boost::system::error_code ignored;
      timer.expires_after(std::chrono::seconds(1));
      co_await timer.async_wait(asio::redirect_error(asio::use_awaitable, ignored));
      double elapsed_s = static_cast<double>(now_ns() - run->begin_ns_) * 1e-9;
      fmt::print(stderr, "\r{:6.0f} s  {} requests done, {} running, {:.0f} tokens/s   ", elapsed_s, run->finished_,
                 run->active_, static_cast<double>(run->tokens_) / elapsed_s);
      std::fflush(stderr);
      if (run->active_ == 0) break;
    }
    run->progress_timer_ = nullptr;
  }

  const BenchServeOptions& options_;
  Url url_;
  std::string model_;
  Workload workload_;
  asio::io_context io_{1};
  std::vector<RequestRecord> records_;
  int64_t next_ = 0, limit_ = 0, offset_ = 0, finished_ = 0, tokens_ = 0;
  int64_t begin_ns_ = 0;
  int32_t active_ = 0;
  bool measuring_ = false;
  asio::steady_timer* progress_timer_ = nullptr;
};

Result<std::string> first_model(const Url& url) {
  asio::io_context io;
  HttpClient client(io.get_executor(), url);
  HttpClient::Reply reply;
  asio::co_spawn(io, HttpClient::request(client, "GET", "/v1/models", "", 10'000, {}),
                 [&reply](std::exception_ptr failure, HttpClient::Reply result) {
                   if (failure) {
                     reply.status = internal_error("the client failed");
                   } else {
                     reply = std::move(result);
                   }
                 });
  io.run();
  if (!reply.status.ok()) return reply.status;
  json body = json::parse(reply.body, nullptr, false);
  if (reply.code != 200 || !body.is_object() || !body["data"].is_array() || body["data"].empty()) {
    return failed_precondition("GET /v1/models answered HTTP {}; name the model with --model", reply.code);
  }
  return body["data"][0].value("id", "");
}

}  // namespace

Result<BenchServeResult> run_bench_serve(const BenchServeOptions& options) {
  BATON_RETURN_IF_ERROR(options.validate());
  BATON_ASSIGN_OR_RETURN(Url url, Url::parse(options.url));
  BenchServeResult result;
  result.options = options;
  result.model = options.model;
  if (result.model.empty()) {
    BATON_ASSIGN_OR_RETURN(result.model, first_model(url));
  }
  LoadRun run(options, url, result.model);
  result.records = run.run(&result.wall_s);
  std::sort(result.records.begin(), result.records.end(),
            [](const RequestRecord& a, const RequestRecord& b) { return a.start_s < b.start_s; });

  std::vector<double> ttft, itl, tpot, e2e;
  double output_tokens = 0, prompt_tokens = 0, good = 0;
  for (const RequestRecord& record : result.records) {
    output_tokens += static_cast<double>(record.output_tokens);
    if (record.disconnected) ++result.disconnected;
    if (!record.ok) {
      if (!record.disconnected) {
        ++result.failed;
        ++result.errors[record.error];
      }
      continue;
    }
    ++result.succeeded;
    prompt_tokens += static_cast<double>(record.prompt_tokens);
    double ttft_ms = (record.first_s - record.start_s) * 1e3, e2e_ms = (record.end_s - record.start_s) * 1e3;
    ttft.push_back(ttft_ms);
    e2e.push_back(e2e_ms);
    double mean_gap_ms = 0;
    for (float gap : record.gaps_s) {
      itl.push_back(gap * 1e3);
      mean_gap_ms += gap * 1e3;
    }
    if (!record.gaps_s.empty()) {
      mean_gap_ms /= static_cast<double>(record.gaps_s.size());
      tpot.push_back(mean_gap_ms);
    }
    bool within = (options.slo_ttft_ms <= 0 || ttft_ms <= options.slo_ttft_ms) &&
                  (options.slo_itl_ms <= 0 || mean_gap_ms <= options.slo_itl_ms);
    if (within) good += 1;
  }
  result.ttft_ms = describe(std::move(ttft));
  result.itl_ms = describe(std::move(itl));
  result.tpot_ms = describe(std::move(tpot));
  result.e2e_ms = describe(std::move(e2e));
  if (result.wall_s > 0) {
    result.requests_per_s = static_cast<double>(result.succeeded) / result.wall_s;
    result.output_tokens_per_s = output_tokens / result.wall_s;
    result.total_tokens_per_s = (output_tokens + prompt_tokens) / result.wall_s;
    result.goodput_per_s = good / result.wall_s;
  }
  return result;
}

}  // namespace baton::ops
