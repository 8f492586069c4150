#include <algorithm>
#include <ctime>
#include <utility>

#include "base/log.h"
#include "base/random.h"
#include "http/api_context.h"
#include "http/api_render.h"
#include "http/json_text.h"
#include "text/detokenizer.h"
#include "text/stop_matcher.h"

namespace baton::http {

namespace {

// FinishReason of engine/request.h as it travels in TokenOutput.finish.
constexpr int kFinishStop = 1;
constexpr int kFinishLength = 2;

constexpr size_t kMaxPromptBytes = 16u << 20;
constexpr int64_t kMaxLogprobEntries = 1 << 20;
constexpr size_t kPromptTail = 8;  // tokens before the answer that decide about its first space

int64_t count_characters(std::string_view utf8) {
  return std::count_if(utf8.begin(), utf8.end(), [](char c) { return (static_cast<uint8_t>(c) & 0xc0) != 0x80; });
}

/// One output sequence: a prompt and one of its n answers.
struct Sequence {
  int32_t index = 0;
  size_t prompt = 0;
  uint64_t router_id = 0;
  std::unique_ptr<Detokenizer> detokenizer;
  StopMatcher matcher{{}, false};
  std::string text;                     // whole responses only
  int64_t text_chars = 0;               // characters (code points) of text so far, for text_offset
  std::vector<int32_t> token_ids;       // all (whole responses) or not yet sent (streams)
  std::vector<RenderedToken> rendered;  // likewise, with logprobs
  int64_t completion_tokens = 0;
  int32_t cached_tokens = 0;
  int64_t last_token_ns = 0;
  bool first_sent = false;
  bool done = false;
  std::string finish_reason;
  std::string stop_reason_json;
};

/// One HTTP request. Everything runs on the exchange's executor.
class CompletionTask : public std::enable_shared_from_this<CompletionTask> {
 public:
  CompletionTask(Api::Context& context, std::shared_ptr<Exchange> exchange, CompletionRequest request)
      : context_(context), exchange_(std::move(exchange)), request_(std::move(request)) {
    endpoint_ = request_.chat ? "/v1/chat/completions" : "/v1/completions";
    head_.chat = request_.chat;
    head_.id = fmt::format("{}-{:016x}", request_.chat ? "chatcmpl" : "cmpl", random_id());
    head_.created_s = std::time(nullptr);
    head_.model = request_.model.empty() ? context_.model.name : request_.model;
  }

  void start() {
    start_ns_ = SteadyClock::instance().now_ns();
    context_.metrics.running.Increment();
    if (Status status = prepare(); !status.ok()) return fail(to_api_error(status));
    exchange_->on_disconnect([self = shared_from_this()] { self->on_disconnect(); });
    submit_all();
  }

 private:
  Status prepare();
  Result<std::vector<int32_t>> tokenize(const Prompt& prompt) const;
  Status check_prompt(const std::vector<int32_t>& ids) const;
  /// What one token of every answer adds to the logprobs that a whole response keeps; 0 without logprobs.
  int64_t entries_per_token() const {
    return static_cast<int64_t>(prompts_.size()) * request_.n * (request_.sampling.logprobs() + 1);
  }
  void submit_all();
  void on_event(size_t index, RouterEvent&& event);
  void on_token(Sequence& sequence, const protocol::TokenOutput& output);
  void end_sequence(Sequence& sequence, std::string finish_reason);
  void send_delta(Sequence& sequence, std::string_view text, bool last);
  void send_result();
  void complete();
  void fail(const ApiError& error);
  void on_disconnect();
  void cancel_all();
  RenderedToken render_token(const protocol::TokenOutput& output, int64_t text_offset) const;
  std::pair<std::string, std::string> token_text(int32_t id) const;
  Usage usage() const;
  Choice choice_of(const Sequence& sequence) const;

  Api::Context& context_;
  std::shared_ptr<Exchange> exchange_;
  CompletionRequest request_;
  std::string_view endpoint_;
  ResponseHead head_;
  std::vector<std::vector<int32_t>> prompts_;
  std::vector<Sequence> sequences_;
  size_t unfinished_ = 0;
  bool streaming_ = false;
  bool over_ = false;
  int64_t start_ns_ = 0;
};

Result<std::vector<int32_t>> CompletionTask::tokenize(const Prompt& prompt) const {
  if (const auto* ids = std::get_if<std::vector<int32_t>>(&prompt)) return *ids;
  const std::string& text = std::get<std::string>(prompt);
  if (context_.model.tokenizer == nullptr) {
    return invalid_argument("model '{}' has no tokenizer.json; give the prompt as token ids", context_.model.name);
  }
  if (text.size() > kMaxPromptBytes) {
    return invalid_argument("the prompt has {} bytes; the limit is {}", text.size(), kMaxPromptBytes);
  }
  return context_.model.tokenizer->encode(text, request_.add_special_tokens);
}

Status CompletionTask::check_prompt(const std::vector<int32_t>& ids) const {
  if (ids.empty()) return invalid_argument("the prompt has no tokens; give at least one");
  int32_t vocab_size = context_.model.vocab_size;
  for (int32_t id : ids) {
    if (id < 0 || (vocab_size > 0 && id >= vocab_size)) {
      return invalid_argument("token id {} is outside the vocabulary of {} tokens", id, vocab_size);
    }
  }
  int32_t limit = context_.max_model_len();
  if (limit > 0 && static_cast<int64_t>(ids.size()) >= limit) {
    return invalid_argument("the prompt has {} tokens; this model's maximum context length is {} tokens, and at least one "
                            "must be left for the answer", ids.size(), limit);
  }
  if (limit > 0 && request_.has_max_tokens &&
      static_cast<int64_t>(ids.size()) + request_.sampling.max_tokens() > limit) {
    return invalid_argument("this model's maximum context length is {} tokens, but {} were asked for ({} in the prompt, "
                            "{} for the answer); shorten the prompt or max_tokens", limit,
                            ids.size() + request_.sampling.max_tokens(), ids.size(), request_.sampling.max_tokens());
  }
  return {};
}

Status CompletionTask::prepare() {
  if (request_.chat) {
    BATON_ASSIGN_OR_RETURN(auto ids,
                           render_chat(context_.model, request_.messages_json, request_.tools_json,
                                       request_.template_kwargs_json, request_.add_generation_prompt,
                                       request_.add_special_tokens));
    prompts_.push_back(std::move(ids));
  } else {
    for (const Prompt& prompt : request_.prompts) {
      BATON_ASSIGN_OR_RETURN(auto ids, tokenize(prompt));
      prompts_.push_back(std::move(ids));
    }
  }
  for (const auto& ids : prompts_) BATON_RETURN_IF_ERROR(check_prompt(ids));
  // From here on only the token ids are needed; texts can be megabytes.
  std::vector<Prompt>().swap(request_.prompts);
  for (std::string* text : {&request_.messages_json, &request_.tools_json, &request_.template_kwargs_json}) {
    std::string().swap(*text);
  }
  // Logprobs of a whole response are kept until it is complete.
  const int64_t logprob_entries = entries_per_token() * request_.sampling.max_tokens();
  if (request_.has_max_tokens && !request_.stream && logprob_entries > kMaxLogprobEntries) {
    return invalid_argument("prompts x n x max_tokens x logprobs make {} entries, the limit is {}; ask for fewer, or use "
                            "'stream': true", logprob_entries, kMaxLogprobEntries);
  }
  // Stop strings need text.
  if (!request_.stop.empty() && context_.model.tokenizer == nullptr) {
    return invalid_argument("'stop' needs text, and model '{}' has no tokenizer.json; use 'stop_token_ids'",
                            context_.model.name);
  }
  for (size_t prompt = 0; prompt < prompts_.size(); ++prompt) {
    for (int32_t i = 0; i < request_.n; ++i) {
      Sequence sequence;
      sequence.index = static_cast<int32_t>(sequences_.size());
      sequence.prompt = prompt;
      sequence.matcher = StopMatcher(request_.stop, request_.include_stop_string);
      if (context_.model.tokenizer != nullptr) {
        std::span<const int32_t> ids = prompts_[prompt];
        sequence.detokenizer = std::make_unique<Detokenizer>(*context_.model.tokenizer, request_.skip_special_tokens,
                                                             ids.last(std::min(ids.size(), kPromptTail)));
      }
      sequences_.push_back(std::move(sequence));
    }
  }
  unfinished_ = sequences_.size();
  return {};
}

void CompletionTask::submit_all() {
  uint64_t seed = request_.has_seed ? request_.sampling.seed() : random_id();
  for (size_t i = 0; i < sequences_.size() && !over_; ++i) {
    Sequence& sequence = sequences_[i];
    RouterRequest body;
    body.prompt = prompts_[sequence.prompt];
    body.sampling = request_.sampling;
    int32_t limit = context_.max_model_len();
    int32_t room = limit > 0 ? limit - static_cast<int32_t>(body.prompt.size()) : body.sampling.max_tokens();
    // Chat without max_tokens may fill the context, as OpenAI's does (or what a whole response may keep); completions
    // keep their default of 16.
    if (!request_.has_max_tokens && request_.chat && limit > 0) {
      const int64_t entries = request_.stream ? 0 : entries_per_token();
      const int64_t kept = entries == 0 ? room : std::max<int64_t>(1, kMaxLogprobEntries / entries);
      body.sampling.set_max_tokens(static_cast<int32_t>(std::min<int64_t>(room, kept)));
    }
    body.sampling.set_max_tokens(std::max(1, std::min(body.sampling.max_tokens(), room)));
    // The first of n answers is the one that n = 1 would give.
    int32_t copy = sequence.index % request_.n;
    body.sampling.set_seed(copy == 0 ? seed : mix_bits(seed, copy));
    sequence.last_token_ns = start_ns_;
    auto self = shared_from_this();
    Result<uint64_t> id = context_.router.submit(std::move(body), [self, i](RouterEvent&& event) {
      auto shared_event = std::make_shared<RouterEvent>(std::move(event));
      self->exchange_->post([self, i, shared_event] { self->on_event(i, std::move(*shared_event)); });
    });
    if (!id.ok()) return fail(to_api_error(id.status()));
    sequence.router_id = *id;
  }
}

void CompletionTask::on_event(size_t index, RouterEvent&& event) {
  Sequence& sequence = sequences_[index];
  if (over_ || sequence.done) return;
  if (event.finished && !event.status.ok()) {
    sequence.done = true;
    return fail(to_api_error(event.status));
  }
  for (const auto& output : event.tokens) {
    if (sequence.done) break;
    on_token(sequence, output);
  }
  if (over_) return;
  if (event.finished && !sequence.done) end_sequence(sequence, "stop");
}

std::pair<std::string, std::string> CompletionTask::token_text(int32_t id) const {
  const Tokenizer* tokenizer = context_.model.tokenizer.get();
  if (tokenizer == nullptr) return {fmt::format("token_id:{}", id), ""};
  std::string bytes = tokenizer->token_bytes(id);
  if (request_.tokens_as_ids) return {fmt::format("token_id:{}", id), std::move(bytes)};
  int32_t ids[] = {id};
  return {tokenizer->decode(ids, false), std::move(bytes)};
}

RenderedToken CompletionTask::render_token(const protocol::TokenOutput& output, int64_t text_offset) const {
  RenderedToken token;
  token.id = output.token();
  std::tie(token.text, token.bytes) = token_text(output.token());
  token.logprob = output.logprob();
  token.text_offset = text_offset;
  for (const auto& entry : output.top_logprobs()) {
    RenderedToken::Alternative alternative;
    std::tie(alternative.text, alternative.bytes) = token_text(entry.token());
    alternative.logprob = entry.logprob();
    token.top.push_back(std::move(alternative));
  }
  return token;
}

void CompletionTask::on_token(Sequence& sequence, const protocol::TokenOutput& output) {
  std::string text;
  bool stopped_by_string = false;
  if (output.has_token()) {
    int64_t now = SteadyClock::instance().now_ns();
    double gap_s = static_cast<double>(now - sequence.last_token_ns) * 1e-9;
    if (sequence.completion_tokens == 0) {
      context_.metrics.ttft_s.Observe(gap_s);
      sequence.cached_tokens = output.cached_prompt_tokens();
    } else {
      context_.metrics.itl_s.Observe(gap_s);
    }
    sequence.last_token_ns = now;
    ++sequence.completion_tokens;
    sequence.token_ids.push_back(output.token());
    if (request_.sampling.logprobs() >= 0) {
      sequence.rendered.push_back(render_token(output, sequence.text_chars));
    }
    // The token that stops is not part of the text, unless it was asked for.
    bool hidden = output.finish() == kFinishStop && !request_.include_stop_string;
    if (sequence.detokenizer != nullptr && !hidden) {
      std::string fresh = sequence.detokenizer->push(output.token());
      sequence.text_chars += count_characters(fresh);
      // A stop string counts from the first token on that min_tokens allows to be the last.
      StopMatcher::Out out = sequence.completion_tokens < request_.sampling.min_tokens()
                                 ? StopMatcher::Out{std::move(fresh), false, 0}
                                 : sequence.matcher.push(fresh);
      text = std::move(out.text);
      if (out.stopped) {
        stopped_by_string = true;
        sequence.stop_reason_json = json_string(request_.stop[out.which]);
      }
    }
  }
  bool finished = output.finish() == kFinishStop || output.finish() == kFinishLength;
  if (finished && !stopped_by_string && sequence.detokenizer != nullptr) {
    StopMatcher::Out out = sequence.matcher.push(sequence.detokenizer->flush());
    text += out.text;
    if (out.stopped) {
      stopped_by_string = true;
      sequence.stop_reason_json = json_string(request_.stop[out.which]);
    } else {
      text += sequence.matcher.flush();
    }
  }
  if (!request_.stream) sequence.text += text;
  if (finished || stopped_by_string) {
    if (!finished) context_.router.cancel(sequence.router_id);
    if (output.finish() == kFinishStop && !stopped_by_string && output.has_token()) {
      for (int32_t id : request_.sampling.stop_token_ids()) {
        if (id == output.token()) sequence.stop_reason_json = fmt::format("{}", id);
      }
    }
    sequence.finish_reason = stopped_by_string || output.finish() == kFinishStop ? "stop" : "length";
    if (request_.stream) send_delta(sequence, text, true);
    end_sequence(sequence, sequence.finish_reason);
  } else if (request_.stream && (!text.empty() || request_.return_token_ids)) {
    send_delta(sequence, text, false);
  }
}

Choice CompletionTask::choice_of(const Sequence& sequence) const {
  Choice choice;
  choice.index = sequence.index;
  choice.finish_reason = sequence.finish_reason;
  choice.stop_reason_json = sequence.stop_reason_json;
  choice.has_logprobs = request_.sampling.logprobs() >= 0;
  choice.tokens = sequence.rendered;
  choice.has_token_ids = request_.return_token_ids;
  choice.token_ids = sequence.token_ids;
  return choice;
}

void CompletionTask::send_delta(Sequence& sequence, std::string_view text, bool last) {
  if (!streaming_) {
    streaming_ = true;
    exchange_->start_stream("text/event-stream; charset=utf-8");
  }
  std::string echoed;
  bool first = !sequence.first_sent;
  Choice choice = choice_of(sequence);
  if (!last) {
    choice.finish_reason = {};
    choice.stop_reason_json = {};
  }
  if (first && request_.echo && context_.model.tokenizer != nullptr) {
    echoed = context_.model.tokenizer->decode(prompts_[sequence.prompt], request_.skip_special_tokens);
    echoed += text;
    text = echoed;
  }
  if (first && request_.return_token_ids) choice.prompt_token_ids = &prompts_[sequence.prompt];
  choice.text = text;
  exchange_->write(render_stream_event(head_, choice, first, request_.include_usage));
  sequence.first_sent = true;
  sequence.token_ids.clear();
  sequence.rendered.clear();
}

void CompletionTask::end_sequence(Sequence& sequence, std::string finish_reason) {
  sequence.finish_reason = std::move(finish_reason);
  sequence.done = true;
  sequence.detokenizer.reset();
  if (--unfinished_ > 0) return;
  if (request_.stream) {
    if (request_.include_usage) exchange_->write(render_stream_usage(head_, usage()));
    exchange_->write(std::string(kStreamEnd));
    exchange_->finish();
  } else {
    send_result();
  }
  context_.metrics.requests.Add({{"endpoint", std::string(endpoint_)}, {"code", "200"}}).Increment();
  complete();
}

Usage CompletionTask::usage() const {
  Usage usage;
  for (const auto& prompt : prompts_) usage.prompt_tokens += static_cast<int64_t>(prompt.size());
  for (const auto& sequence : sequences_) {
    usage.completion_tokens += sequence.completion_tokens;
    if (sequence.index % request_.n == 0) usage.cached_tokens += sequence.cached_tokens;
  }
  return usage;
}

void CompletionTask::send_result() {
  std::vector<Choice> choices;
  std::vector<std::string> texts(sequences_.size());
  for (size_t i = 0; i < sequences_.size(); ++i) {
    const Sequence& sequence = sequences_[i];
    Choice choice = choice_of(sequence);
    if (request_.echo && context_.model.tokenizer != nullptr) {
      texts[i] = context_.model.tokenizer->decode(prompts_[sequence.prompt], request_.skip_special_tokens);
    }
    texts[i] += sequence.text;
    choice.text = texts[i];
    if (request_.return_token_ids) choice.prompt_token_ids = &prompts_[sequence.prompt];
    choices.push_back(choice);
  }
  exchange_->respond({200, "application/json", render_response(head_, choices, usage()), {}});
}

void CompletionTask::complete() {
  over_ = true;
  context_.metrics.running.Decrement();
  context_.metrics.e2e_s.Observe(static_cast<double>(SteadyClock::instance().now_ns() - start_ns_) * 1e-9);
  Usage totals = usage();
  context_.metrics.prompt_tokens.Increment(static_cast<double>(totals.prompt_tokens));
  context_.metrics.completion_tokens.Increment(static_cast<double>(totals.completion_tokens));
}

void CompletionTask::cancel_all() {
  for (Sequence& sequence : sequences_) {
    if (!sequence.done && sequence.router_id != 0) context_.router.cancel(sequence.router_id);
    sequence.done = true;
  }
}

void CompletionTask::fail(const ApiError& error) {
  if (over_) return;
  cancel_all();
  if (streaming_) {
    // The status line is gone already: the error is an event of the stream, as OpenAI and vLLM send it.
    exchange_->write(render_stream_error(error));
    exchange_->write(std::string(kStreamEnd));
    exchange_->finish();
    context_.metrics.requests.Add({{"endpoint", std::string(endpoint_)}, {"code", std::to_string(error.http_status)}})
        .Increment();
  } else {
    respond_error(context_, *exchange_, endpoint_, error);
  }
  complete();
}

void CompletionTask::on_disconnect() {
  if (over_) return;
  context_.metrics.disconnects.Increment();
  context_.metrics.requests.Add({{"endpoint", std::string(endpoint_)}, {"code", "499"}}).Increment();
  cancel_all();
  complete();
}

}  // namespace

void start_completion(Api::Context& context, std::shared_ptr<Exchange> exchange, CompletionRequest request) {
  std::make_shared<CompletionTask>(context, std::move(exchange), std::move(request))->start();
}

}  // namespace baton::http
