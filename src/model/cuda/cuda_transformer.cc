#include "model/cuda/cuda_transformer.h"

#include <algorithm>
#include <cmath>

#include "base/log.h"
#include "model/model_files.h"
#include "model/transformer.h"

namespace baton {

using cuda::CUdeviceptr;
using cuda::CurrentDevice;
using cuda::LinearOutput;

namespace {

/// Decode batches beyond this are launched kernel by kernel: launching hides behind computing by then.
constexpr int32_t kMaxGraphRows = 256;
constexpr int64_t kAlignment = 256;

/// The size of graph that a batch of `rows` runs in.
int32_t graph_rows(int32_t rows) {
  if (rows <= 2) return rows;
  if (rows <= 4) return 4;
  const int32_t step = rows <= 64 ? 8 : rows <= 128 ? 16 : 32;
  return (rows + step - 1) / step * step;
}

CUdeviceptr address_of(const void* device) { return reinterpret_cast<CUdeviceptr>(device); }

class CudaKvMemory final : public Memory {
 public:
  explicit CudaKvMemory(cuda::DeviceMemory memory) : memory_(std::move(memory)) {}
  std::span<std::byte> span() const override { return memory_.span(); }
  MemoryPlace place() const override { return MemoryPlace::kCuda; }

 private:
  cuda::DeviceMemory memory_;
};

class PinnedHostMemory final : public Memory {
 public:
  explicit PinnedHostMemory(cuda::PinnedMemory memory) : memory_(std::move(memory)) {}
  std::span<std::byte> span() const override { return {memory_.data(), memory_.bytes()}; }
  MemoryPlace place() const override { return MemoryPlace::kHost; }

 private:
  cuda::PinnedMemory memory_;
};

}  // namespace

Result<std::unique_ptr<CudaTransformer>> CudaTransformer::create(Parts parts, const RopeTables& rope) {
  std::unique_ptr<CudaTransformer> model(new CudaTransformer(std::move(parts)));
  BATON_RETURN_IF_ERROR(model->init(rope));
  return model;
}

Status CudaTransformer::init(const RopeTables& rope) {
  CurrentDevice current(*parts_.gpu);
  const cuda::Driver& cu = parts_.gpu->driver();
  BATON_RETURN_IF_ERROR(check(cu.stream_create(&stream_, cuda::kStreamNonBlocking, 0), "cuStreamCreate"));
  for (Flight& flight : flights_) {
    for (cuda::CUevent* event : {&flight.mostly_done, &flight.ended}) {
      BATON_RETURN_IF_ERROR(check(cu.event_create(event, cuda::kEventDisableTiming), "cuEventCreate"));
    }
  }
  events_ = std::make_shared<EventPool>(parts_.gpu);
  const size_t plane_bytes = static_cast<size_t>(parts_.max_model_len) * static_cast<size_t>(config_.head_dim / 2) * sizeof(float);
  BATON_ASSIGN_OR_RETURN(rope_, cuda::DeviceMemory::allocate(parts_.gpu, 2 * plane_bytes));
  const RopeTable table = rope.view();
  BATON_RETURN_IF_ERROR(check(cu.copy_to_device(rope_.address(), table.cos, plane_bytes), "sending the RoPE table"));
  return check(cu.copy_to_device(rope_.address() + plane_bytes, table.sin, plane_bytes), "sending the RoPE table");
}

CudaTransformer::~CudaTransformer() {
  if (stream_ == nullptr) return;
  CurrentDevice current(*parts_.gpu);
  (void)parts_.gpu->driver().stream_synchronize(stream_);
  drop_graphs();
  for (const Flight& flight : flights_) {
    for (cuda::CUevent event : {flight.mostly_done, flight.ended}) {
      if (event != nullptr) (void)parts_.gpu->driver().event_destroy(event);
    }
  }
  (void)parts_.gpu->driver().stream_destroy(stream_);
}

BlockLayout CudaTransformer::layout(int32_t block_tokens) const {
  BlockLayout layout;
  layout.model_id = parts_.model_id;
  layout.layers = config_.layers;
  layout.kv_heads = config_.kv_heads;
  layout.head_dim = config_.head_dim;
  layout.block_tokens = block_tokens;
  layout.order = "rows";
  return layout;
}

// -- Memory. -----------------------------------------------------------------------------------------------------------

Status CudaTransformer::prepare(const BatchLimits& limits) {
  BATON_RETURN_IF_ERROR(parts_.kernels->validate_attention_shape(config_.heads, config_.kv_heads, config_.head_dim,
                                                                 limits.block_tokens));
  const int64_t tile = parts_.kernels->prefill_tile_tokens(config_.heads, config_.kv_heads, config_.head_dim);
  const int64_t blocks = (limits.sequence_tokens + limits.block_tokens - 1) / limits.block_tokens;
  const int64_t sequences = std::min(limits.sequences, limits.rows);
  BATON_RETURN_IF_ERROR(reserve({.rows = limits.rows,
                                 .sequences = sequences,
                                 .logit_rows = sequences,
                                 .table_entries = sequences * blocks,
                                 .tiles = limits.rows / tile + sequences}));
  return tune_large_steps();
}

/// What prompts are cut into: their products are worth half a second of the start.
Status CudaTransformer::tune_large_steps() {
  constexpr int64_t kLeastRows = 1024;
  CurrentDevice current(*parts_.gpu);
  const CudaLayer& layer = parts_.weights.layers.front();
  // On zeros products run faster than they will, and not in the same order.
  const CudaMatrix& values = parts_.weights.lm_head;
  const auto fill = [&](bf16* to, int64_t width) {
    const int64_t count = std::min(capacity_.rows * width, values.out_features * values.in_features);
    return check(parts_.gpu->driver().copy_async(address_of(to), address_of(values.data), static_cast<size_t>(count) * sizeof(bf16), stream_),
                 "cuMemcpy");
  };
  const auto tune = [&](int64_t rows, const CudaMatrix& weight, LinearOutput output, const bf16* x, void* y) {
    return parts_.linear->tune(stream_, {rows, weight.out_features, weight.in_features, output}, x, weight.data, y);
  };
  for (int64_t rows = capacity_.rows; rows >= kLeastRows; rows /= 2) {
    BATON_RETURN_IF_ERROR(fill(work_.normed, layer.qkv.weight.in_features));
    BATON_RETURN_IF_ERROR(fill(work_.attended, layer.o.weight.in_features));
    BATON_RETURN_IF_ERROR(fill(work_.act, layer.down.weight.in_features));
    BATON_RETURN_IF_ERROR(tune(rows, layer.qkv.weight, LinearOutput::kBf16, work_.normed, work_.qkv));
    BATON_RETURN_IF_ERROR(tune(rows, layer.o.weight, LinearOutput::kAddFloat, work_.attended, work_.x));
    BATON_RETURN_IF_ERROR(tune(rows, layer.gate_up.weight, LinearOutput::kBf16, work_.normed, work_.gate_up));
    BATON_RETURN_IF_ERROR(tune(rows, layer.down.weight, LinearOutput::kAddFloat, work_.act, work_.x));
  }
  return {};
}

Status CudaTransformer::reserve(const StepCapacity& needed) {
  if (capacity_.holds(needed)) return {};
  StepCapacity now = {.rows = std::max(needed.rows, capacity_.rows),
                      .sequences = std::max(needed.sequences, capacity_.sequences),
                      .logit_rows = std::max(needed.logit_rows, capacity_.logit_rows),
                      .table_entries = std::max(needed.table_entries, capacity_.table_entries),
                      .tiles = std::max(needed.tiles, capacity_.tiles)};
  CurrentDevice current(*parts_.gpu);
  BATON_RETURN_IF_ERROR(check(parts_.gpu->driver().stream_synchronize(stream_), "cuStreamSynchronize"));
  drop_graphs();
  capacity_ = {};
  memory_ = {};
  mixed_step_ = {};
  decode_step_ = {};

  const int64_t hidden = config_.hidden_size, inter = config_.intermediate_size;
  const int64_t q = int64_t{config_.heads} * config_.head_dim, kv = int64_t{config_.kv_heads} * config_.head_dim;
  // A graph is padded to its size.
  const int64_t rows = std::max<int64_t>(now.rows, graph_rows(static_cast<int32_t>(std::min<int64_t>(now.sequences, kMaxGraphRows))));
  const int64_t logit_rows = std::max<int64_t>(now.logit_rows, graph_rows(static_cast<int32_t>(std::min<int64_t>(now.logit_rows, kMaxGraphRows))));
  const int64_t most_sequences = std::max(logit_rows, std::max<int64_t>(now.sequences, 1));
  const size_t decode_bytes = parts_.kernels->decode_workspace_bytes(static_cast<int32_t>(most_sequences), config_.heads, config_.head_dim);
  constexpr int64_t kHalf = sizeof(bf16), kFloat = sizeof(float);

  size_t bytes = 0;
  const auto place = [&](auto** pointer, int64_t size) {
    *pointer = reinterpret_cast<std::remove_reference_t<decltype(*pointer)>>(memory_.address() + bytes);
    bytes += static_cast<size_t>((size + kAlignment - 1) / kAlignment * kAlignment);
  };
  const auto place_all = [&] {
    bytes = 0;
    std::byte* decode = nullptr;
    work_.rows = rows;
    work_.logit_rows = logit_rows;
    place(&work_.x, rows * hidden * kFloat);
    place(&work_.normed, rows * hidden * kHalf);
    place(&work_.qkv, rows * (q + 2 * kv) * kHalf);
    place(&work_.q, rows * q * kHalf);
    place(&work_.attended, rows * q * kHalf);
    place(&work_.gate_up, rows * 2 * inter * kHalf);
    place(&work_.act, rows * inter * kHalf);
    place(&work_.kept_x, logit_rows * hidden * kFloat);
    place(&work_.kept_q, logit_rows * q * kHalf);
    place(&work_.logits, logit_rows * config_.vocab_size * kFloat);
    place(&work_.chosen, logit_rows * static_cast<int64_t>(sizeof(int32_t)));
    place(&decode, static_cast<int64_t>(decode_bytes));
    work_.decode = address_of(decode);
  };
  place_all();
  auto memory = cuda::DeviceMemory::allocate(parts_.gpu, bytes);
  if (!memory.ok()) {
    return memory.status().with_context(fmt::format("workspace for {} tokens a step; a smaller --max-batched-tokens needs less", rows));
  }
  memory_ = std::move(memory).value();
  place_all();
  BATON_RETURN_IF_ERROR(check(parts_.gpu->driver().memory_set(memory_.address(), 0, bytes), "cuMemset"));
  for (Flight& flight : flights_) {
    BATON_ASSIGN_OR_RETURN(flight.fetched, cuda::PinnedMemory::allocate(parts_.gpu, static_cast<size_t>(logit_rows) * sizeof(int32_t)));
  }
  now.edits = kMaxEdits;
  BATON_ASSIGN_OR_RETURN(mixed_step_, StepBuffer::create(parts_.gpu, now));
  const int64_t decode_rows = graph_rows(static_cast<int32_t>(std::min<int64_t>(now.sequences, kMaxGraphRows)));
  BATON_ASSIGN_OR_RETURN(decode_step_, StepBuffer::create(parts_.gpu, {.rows = decode_rows,
                                                                       .sequences = decode_rows,
                                                                       .logit_rows = decode_rows,
                                                                       .table_entries = now.table_entries,
                                                                       .tiles = 1,
                                                                       .edits = kMaxEdits}));
  BATON_RETURN_IF_ERROR(parts_.linear->reserve(stream_));
  capacity_ = now;
  return {};
}

int64_t CudaTransformer::spare_kv_bytes() const {
  CurrentDevice current(*parts_.gpu);
  size_t free_bytes = 0, total_bytes = 0;
  if (!check(parts_.gpu->driver().memory_info(&free_bytes, &total_bytes), "cuMemGetInfo").ok()) return 0;
  // What this process has, as far as it can be known, and what the driver keeps for it: others may use the GPU, too.
  constexpr double kContextBytes = 600e6;
  const double own = static_cast<double>(parts_.weights.bytes) + static_cast<double>(memory_.bytes() + rope_.bytes()) + kContextBytes;
  const double share = static_cast<double>(total_bytes) * parts_.memory_utilization - own;
  return static_cast<int64_t>(std::max(0.0, std::min(share, 0.95 * static_cast<double>(free_bytes))));
}

Result<std::unique_ptr<Memory>> CudaTransformer::allocate_kv(size_t bytes) {
  BATON_ASSIGN_OR_RETURN(cuda::DeviceMemory memory, cuda::DeviceMemory::allocate(parts_.gpu, bytes));
  CurrentDevice current(*parts_.gpu);
  BATON_RETURN_IF_ERROR(check(parts_.gpu->driver().memory_set(memory.address(), 0, bytes), "cuMemset"));
  return std::unique_ptr<Memory>(std::make_unique<CudaKvMemory>(std::move(memory)));
}

Result<std::unique_ptr<Memory>> CudaTransformer::allocate_logits(size_t bytes) {
  BATON_ASSIGN_OR_RETURN(cuda::PinnedMemory memory, cuda::PinnedMemory::allocate(parts_.gpu, bytes));
  return std::unique_ptr<Memory>(std::make_unique<PinnedHostMemory>(std::move(memory)));
}

Result<double> CudaTransformer::measure_read_bytes_per_s() {
  constexpr size_t kBytes = size_t{1} << 30;
  constexpr int kCopies = 8;
  BATON_ASSIGN_OR_RETURN(cuda::DeviceMemory memory, cuda::DeviceMemory::allocate(parts_.gpu, 2 * kBytes));
  CurrentDevice current(*parts_.gpu);
  const cuda::Driver& cu = parts_.gpu->driver();
  cuda::CUevent events[2] = {};
  Status status;
  for (cuda::CUevent& event : events) {
    if (status.ok()) status = check(cu.event_create(&event, cuda::kEventDefault), "cuEventCreate");
  }
  float ms = 0;
  if (status.ok()) {
    for (int i = 0; i <= kCopies && status.ok(); ++i) {  // the first one warms up
      if (i == 1) status = check(cu.event_record(events[0], stream_), "cuEventRecord");
      if (status.ok()) status = check(cu.copy_async(memory.address(), memory.address() + kBytes, kBytes, stream_), "cuMemcpy");
    }
    if (status.ok()) status = check(cu.event_record(events[1], stream_), "cuEventRecord");
    if (status.ok()) status = check(cu.stream_synchronize(stream_), "measuring the memory");
    if (status.ok()) status = check(cu.event_elapsed_ms(&ms, events[0], events[1]), "cuEventElapsedTime");
  }
  for (cuda::CUevent event : events) {
    if (event != nullptr) (void)cu.event_destroy(event);
  }
  BATON_RETURN_IF_ERROR(status);
  return 2.0 * static_cast<double>(kBytes) * kCopies / (static_cast<double>(ms) * 1e-3);
}

// -- A step. -----------------------------------------------------------------------------------------------------------

Status CudaTransformer::forward(const ForwardBatch& batch, float* logits) {
  BATON_CHECK(under_way_ == 0) << under_way_ << " steps are under way";
  BATON_RETURN_IF_ERROR(launch(batch, logits));
  return finish();
}

Status CudaTransformer::launch(const ForwardBatch& batch, float* logits) {
  BATON_CHECK(under_way_ < kFlights) << under_way_ << " steps are under way";
  const size_t chosen_rows = under_way_ == 0 ? 0 : flights_[(next_flight_ + kFlights - 1) % kFlights].chosen.size();
  BATON_RETURN_IF_ERROR(check_batch(config_, parts_.max_model_len, batch, logits, static_cast<int32_t>(chosen_rows)));
  if (batch.block_tokens % 8 != 0) return invalid_argument("blocks of {} tokens; on a GPU it must be a multiple of 8", batch.block_tokens);
  CurrentDevice current(*parts_.gpu);
  const int32_t tile = parts_.kernels->prefill_tile_tokens(config_.heads, config_.kv_heads, config_.head_dim);
  const StepCapacity needed = StepBuffer::measure(batch, tile);
  if (under_way_ > 0 && !capacity_.holds(needed)) {
    return internal_error("a step of {} tokens in {} sequences is more than was prepared for, and another one is under way",
                          needed.rows, needed.sequences);
  }
  BATON_RETURN_IF_ERROR(reserve(needed));
  Flight& flight = flights_[next_flight_];
  flight.marked = false;
  Status done = is_decode(batch) ? decode_step(batch) : mixed_step(batch, tile, &flight);
  if (done.ok()) done = fetch(batch, logits, &flight);
  if (!done.ok()) {
    // What was launched before the failure may still write into blocks that the caller takes back now.
    (void)parts_.gpu->driver().stream_synchronize(stream_);
    return done;
  }
  next_flight_ = (next_flight_ + 1) % kFlights;
  ++under_way_;
  return {};
}

Status CudaTransformer::finish() {
  BATON_CHECK(under_way_ > 0) << "nothing was launched";
  const Flight& flight = flights_[(next_flight_ + kFlights - under_way_) % kFlights];
  --under_way_;
  CurrentDevice current(*parts_.gpu);
  BATON_RETURN_IF_ERROR(check(parts_.gpu->driver().event_synchronize(flight.ended), "a step on the GPU"));
  const auto* fetched = reinterpret_cast<const int32_t*>(flight.fetched.data());
  std::copy(fetched, fetched + flight.chosen.size(), flight.chosen.begin());
  return {};
}

bool CudaTransformer::mostly_done() const {
  const Flight& newest = flights_[(next_flight_ + kFlights - 1) % kFlights];
  if (under_way_ == 0 || !newest.marked) return true;
  CurrentDevice current(*parts_.gpu);
  return parts_.gpu->driver().event_query(newest.mostly_done) != cuda::kNotReady;
}

Status CudaTransformer::mixed_step(const ForwardBatch& batch, int32_t tile_tokens, Flight* flight) {
  const StepPlan plan =
      mixed_step_.build(batch, static_cast<int32_t>(batch.tokens.size()), tile_tokens, parts_.batch_invariant);
  BATON_RETURN_IF_ERROR(mixed_step_.send(stream_));
  flight->marked = true;
  return compute(plan, batch, flight->mostly_done);
}

bool CudaTransformer::is_decode(const ForwardBatch& batch) const {
  return batch.sequences.size() == batch.tokens.size() && batch.logit_rows.size() == batch.tokens.size() &&
         batch.tokens.size() <= kMaxGraphRows && !batch.layer_done && !parts_.batch_invariant;
}

Status CudaTransformer::decode_step(const ForwardBatch& batch) {
  if (graphs_pool_ != batch.kv_pool || graphs_block_tokens_ != batch.block_tokens) {
    BATON_RETURN_IF_ERROR(check(parts_.gpu->driver().stream_synchronize(stream_), "a step on the GPU"));
    drop_graphs();
    graphs_pool_ = batch.kv_pool;
    graphs_block_tokens_ = batch.block_tokens;
  }
  const StepPlan plan = decode_step_.build(batch, graph_rows(static_cast<int32_t>(batch.tokens.size())), 1, false);
  BATON_RETURN_IF_ERROR(decode_step_.send(stream_));
  cuda::CUgraphExec& graph = graphs_[plan.step.rows];
  if (graph != nullptr) return check(parts_.gpu->driver().graph_launch(graph, stream_), "cuGraphLaunch");
  // The first one of its size outside of a graph: what is chosen and loaded at first use. It is captured for the next one.
  BATON_RETURN_IF_ERROR(compute(plan, batch, nullptr));
  BATON_ASSIGN_OR_RETURN(graph, capture(plan, batch));
  return {};
}

Result<cuda::CUgraphExec> CudaTransformer::capture(const StepPlan& plan, const ForwardBatch& batch) {
  const cuda::Driver& cu = parts_.gpu->driver();
  BATON_RETURN_IF_ERROR(check(cu.capture_begin(stream_, cuda::kCaptureModeThreadLocal), "cuStreamBeginCapture"));
  const Status launched = compute(plan, batch, nullptr);
  cuda::CUgraph captured = nullptr;
  cuda::CUgraphExec graph = nullptr;
  const Status ended = check(cu.capture_end(stream_, &captured), "cuStreamEndCapture");
  Status made = !launched.ok() ? launched : ended;
  if (made.ok()) made = check(cu.graph_instantiate(&graph, captured, 0), "cuGraphInstantiate");
  if (captured != nullptr) (void)cu.graph_destroy(captured);
  BATON_RETURN_IF_ERROR(made);
  return graph;
}

void CudaTransformer::drop_graphs() {
  for (auto& [rows, graph] : graphs_) {
    if (graph != nullptr) (void)parts_.gpu->driver().graph_exec_destroy(graph);
  }
  graphs_.clear();
  graphs_pool_ = nullptr;
}

Status CudaTransformer::product(const CudaMatrix& weight, int64_t rows, LinearOutput output, const bf16* x, void* y) {
  return parts_.linear->product(stream_, {rows, weight.out_features, weight.in_features, output}, x, weight.data, y);
}

Status CudaTransformer::normed_product(const float* x, int64_t rows, const CudaVector& norm, const CudaMatrix& weight,
                                       LinearOutput output, void* y) {
  const cuda::LinearShape shape{rows, weight.out_features, weight.in_features, output};
  if (parts_.linear->supports_fused(shape)) {
    return parts_.linear->normed_product(stream_, shape, {x, norm.data, config_.rms_norm_eps}, weight.data, y);
  }
  BATON_RETURN_IF_ERROR(parts_.kernels->rms_norm(stream_, x, rows, weight.in_features, norm.data, config_.rms_norm_eps, work_.normed));
  return product(weight, rows, output, work_.normed, y);
}

Status CudaTransformer::attend(const StepPlan& plan, const cuda::Attention& args, const cuda::DeviceKv& kv) {
  if (plan.decodes) {
    BATON_RETURN_IF_ERROR(parts_.kernels->attention_decode(stream_, plan.step, 0, plan.step.sequences_count, args, kv, work_.decode));
  }
  if (plan.tile_count == 0) return {};
  return parts_.kernels->attention_prefill(stream_, plan.step, plan.tiles, plan.tile_count, args, kv);
}

Status CudaTransformer::mlp(const CudaLayer& layer, float* x, int64_t rows) {
  const cuda::LinearShape gate_up{rows, layer.gate_up.weight.out_features, layer.gate_up.weight.in_features, LinearOutput::kBf16};
  if (layer.gate_up.bias.data == nullptr && gate_up.out_features % 16 == 0 && parts_.linear->supports_fused(gate_up)) {
    BATON_RETURN_IF_ERROR(parts_.linear->normed_silu_product(stream_, gate_up, {x, layer.post_attention_norm.data, config_.rms_norm_eps},
                                                             layer.gate_up.weight.data, work_.act));
  } else {
    BATON_RETURN_IF_ERROR(normed_product(x, rows, layer.post_attention_norm, layer.gate_up.weight, LinearOutput::kBf16, work_.gate_up));
    BATON_RETURN_IF_ERROR(parts_.kernels->silu_mul(stream_, work_.gate_up, layer.gate_up.bias.data, rows,
                                                   config_.intermediate_size, work_.act));
  }
  BATON_RETURN_IF_ERROR(product(layer.down.weight, rows, LinearOutput::kAddFloat, work_.act, x));
  if (layer.down.bias.data == nullptr) return {};
  return parts_.kernels->add_bias(stream_, x, rows, config_.hidden_size, layer.down.bias.data);
}

Status CudaTransformer::head(const StepPlan& plan, const float* x) {
  const int64_t rows = plan.kept.rows;
  BATON_RETURN_IF_ERROR(normed_product(x, rows, parts_.weights.final_norm, parts_.weights.lm_head, LinearOutput::kFloat, work_.logits));
  return parts_.sampler->sample(stream_, work_.logits, rows, config_.vocab_size, plan.choices, plan.edits, work_.chosen);
}

Status CudaTransformer::compute(const StepPlan& plan, const ForwardBatch& batch, cuda::CUevent mark) {
  cuda::CudaKernels& kernels = *parts_.kernels;
  const int64_t rows = plan.step.rows;
  const BlockLayout layout = this->layout(batch.block_tokens);
  cuda::DeviceKv kv{reinterpret_cast<unsigned char*>(batch.kv_pool), layout.block_bytes(), 0, 0,
                    batch.block_tokens, config_.kv_heads, config_.head_dim};
  const auto* cos = reinterpret_cast<const float*>(rope_.address());
  cuda::QkvRope rope{};
  rope.qkv = work_.qkv;
  rope.heads = config_.heads;
  rope.norm_eps = config_.rms_norm_eps;
  rope.rope_cos = cos;
  rope.rope_sin = cos + static_cast<size_t>(parts_.max_model_len) * static_cast<size_t>(config_.head_dim / 2);

  const CudaMatrix& table = parts_.weights.embed.data != nullptr ? parts_.weights.embed : parts_.weights.lm_head;
  BATON_RETURN_IF_ERROR(kernels.embed(stream_, plan.step, work_.chosen, table.data, config_.hidden_size, work_.x));
  for (int32_t l = 0; l < config_.layers; ++l) {
    const CudaLayer& layer = parts_.weights.layers[static_cast<size_t>(l)];
    if (mark != nullptr && l == config_.layers * 7 / 8) {
      BATON_RETURN_IF_ERROR(check(parts_.gpu->driver().event_record(mark, stream_), "cuEventRecord"));
    }
    kv.k_offset_bytes = layout.layer_offset_bytes(l);
    kv.v_offset_bytes = kv.k_offset_bytes + layout.plane_bytes();
    BATON_RETURN_IF_ERROR(normed_product(work_.x, rows, layer.input_norm, layer.qkv.weight, LinearOutput::kBf16, work_.qkv));
    rope.bias = layer.qkv.bias.data;
    rope.q_norm = layer.q_norm.data;
    rope.k_norm = layer.k_norm.data;
    BATON_RETURN_IF_ERROR(kernels.qkv_rope_kv_write(stream_, plan.step, rope, kv, work_.q));
    if (batch.layer_done) {
      BATON_ASSIGN_OR_RETURN(std::shared_ptr<void> written, events_->record(stream_));
      batch.layer_done(l, written);
    }

    // After the last layer's KV is written only the rows whose logits are wanted matter.
    float* x = work_.x;
    int64_t left = rows;
    cuda::Attention args{work_.q, work_.attended, config_.heads, 1.0f / std::sqrt(static_cast<float>(config_.head_dim)),
                         config_.window_of(l)};
    const bool last = l + 1 == config_.layers;
    if (last && plan.kept.rows == 0) return {};
    if (last && !plan.keeps_all) {
      x = work_.kept_x;
      left = plan.kept.rows;
      const int64_t q_bytes = int64_t{config_.heads} * config_.head_dim * static_cast<int64_t>(sizeof(bf16));
      BATON_RETURN_IF_ERROR(kernels.gather_rows(stream_, work_.x, config_.hidden_size * static_cast<int64_t>(sizeof(float)),
                                                plan.kept_rows, left, x));
      BATON_RETURN_IF_ERROR(kernels.gather_rows(stream_, work_.q, q_bytes, plan.kept_rows, left, work_.kept_q));
      args.q = work_.kept_q;
      BATON_RETURN_IF_ERROR(parts_.batch_invariant
                                ? kernels.attention_prefill(stream_, plan.kept, plan.kept_tiles, plan.kept.rows, args, kv)
                                : kernels.attention_decode(stream_, plan.kept, 0, plan.kept.rows, args, kv, work_.decode));
    } else {
      BATON_RETURN_IF_ERROR(attend(plan, args, kv));
    }
    BATON_RETURN_IF_ERROR(product(layer.o.weight, left, LinearOutput::kAddFloat, work_.attended, x));
    if (layer.o.bias.data != nullptr) {
      BATON_RETURN_IF_ERROR(kernels.add_bias(stream_, x, left, config_.hidden_size, layer.o.bias.data));
    }
    BATON_RETURN_IF_ERROR(mlp(layer, x, left));
  }
  return head(plan, plan.keeps_all ? work_.x : work_.kept_x);
}

/// Queues what brings the results to the host, and the event behind it.
Status CudaTransformer::fetch(const ForwardBatch& batch, float* logits, Flight* flight) {
  const cuda::Driver& cu = parts_.gpu->driver();
  const size_t count = batch.logit_rows.size();
  flight->chosen = batch.chosen;
  if (count > 0 && batch.chosen.empty()) {
    const size_t bytes = count * static_cast<size_t>(config_.vocab_size) * sizeof(float);
    BATON_RETURN_IF_ERROR(check(cu.copy_async(address_of(logits), address_of(work_.logits), bytes, stream_), "fetching logits"));
  } else if (count > 0) {
    BATON_RETURN_IF_ERROR(check(cu.copy_async(flight->fetched.address(), address_of(work_.chosen), count * sizeof(int32_t), stream_),
                                "fetching tokens"));
  }
  return check(cu.event_record(flight->ended, stream_), "cuEventRecord");
}

// -- Loading. ----------------------------------------------------------------------------------------------------------

namespace {

/// unimplemented: sizes that the kernels do not take.
Status check_shape(const ModelConfig& config, const cuda::CudaKernels& kernels) {
  constexpr int32_t kUsualBlockTokens = 16;
  const Status attention = kernels.validate_attention_shape(config.heads, config.kv_heads, config.head_dim, kUsualBlockTokens);
  if (!attention.ok()) return unimplemented("{}; use --device cpu", attention.message());
  // Rows of weights are read 16 bytes at a time.
  constexpr int32_t kMultiple = 8;
  for (const auto& [field, size] : {std::pair("hidden_size", config.hidden_size), std::pair("intermediate_size", config.intermediate_size),
                                    std::pair("vocab_size", config.vocab_size)}) {
    if (size % kMultiple != 0) {
      return unimplemented("{} is {}; on a GPU it must be a multiple of {}: use --device cpu", field, size, kMultiple);
    }
  }
  return {};
}

}  // namespace

Result<std::unique_ptr<Model>> load_cuda_model(const ModelOptions& options, const CudaOptions& cuda) {
  if (!(cuda.memory_utilization > 0.0 && cuda.memory_utilization <= 1.0)) {
    return invalid_argument("the GPU memory utilization is {}; it must be above 0 and at most 1", cuda.memory_utilization);
  }
  BATON_ASSIGN_OR_RETURN(std::shared_ptr<const cuda::Driver> driver, cuda::Driver::load(cuda.driver_library));
  if (!driver->can_compute) return unavailable("the CUDA driver is too old to compute with: 12.0 or newer is needed");
  if (cuda.ordinal < 0 || cuda.ordinal >= driver->devices) {
    return invalid_argument("there is no GPU {}; the driver sees {}", cuda.ordinal, driver->devices);
  }
  CudaTransformer::Parts parts;
  BATON_ASSIGN_OR_RETURN(parts.gpu, cuda::Gpu::open(driver, cuda.ordinal));
  BATON_ASSIGN_OR_RETURN(parts.kernels, cuda::CudaKernels::create(parts.gpu));
  BATON_ASSIGN_OR_RETURN(parts.sampler, cuda::CudaSampler::create(parts.gpu));
  BATON_ASSIGN_OR_RETURN(parts.linear, cuda::CudaLinear::create(parts.gpu, cuda.blas_library, cuda.batch_invariant));

  ThreadPool threads(cuda.threads);
  BATON_ASSIGN_OR_RETURN(ModelFiles files, ModelFiles::open(options, threads));
  const Status shape = check_shape(files.config, *parts.kernels);
  if (!shape.ok()) return shape.with_context(options.path.string());
  BATON_ASSIGN_OR_RETURN(parts.store, CudaWeightStore::create(parts.gpu, threads));
  BATON_ASSIGN_OR_RETURN(parts.weights, WeightsLoader<CudaWeightStore>(files.config, files.architecture->tensor_names(), *files.source,
                                                                       *parts.store, options.progress).load());
  BATON_RETURN_IF_ERROR(parts.store->finish());
  BATON_ASSIGN_OR_RETURN(RopeTables rope, RopeTables::create(files.config.rope, files.config.head_dim, files.max_model_len));
  rope.ensure(files.max_model_len, threads);
  parts.model_id = files.model_id();
  parts.config = std::move(files.config);
  parts.max_model_len = files.max_model_len;
  parts.memory_utilization = cuda.memory_utilization;
  parts.batch_invariant = cuda.batch_invariant;
  BATON_ASSIGN_OR_RETURN(std::unique_ptr<Model> model, CudaTransformer::create(std::move(parts), rope));
  return model;
}

}  // namespace baton
