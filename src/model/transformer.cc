#include "model/transformer.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "tensor/bandwidth.h"

namespace baton {
namespace {

// The MLP's intermediates are the widest; more rows at once would not make the products faster, only the
// workspace larger.
constexpr int64_t kMlpRows = 512;

Status grow(Buffer* buffer, size_t bytes) {
  if (buffer->bytes() >= bytes) return {};
  *buffer = Buffer();  // first give back, then ask
  BATON_ASSIGN_OR_RETURN(*buffer, Buffer::allocate(bytes));
  return {};
}

const float* data_or_null(const std::vector<float>& values) { return values.empty() ? nullptr : values.data(); }

}  // namespace

Transformer::Transformer(ModelConfig config, TransformerWeights weights, RopeTables rope, Kernels& kernels,
                         std::string model_id, int32_t max_model_len)
    : config_(std::move(config)),
      weights_(std::move(weights)),
      rope_(std::move(rope)),
      kernels_(kernels),
      model_id_(std::move(model_id)),
      max_model_len_(max_model_len) {}

BlockLayout Transformer::layout(int32_t block_tokens) const {
  BlockLayout layout;
  layout.model_id = model_id_;
  layout.layers = config_.layers;
  layout.kv_heads = config_.kv_heads;
  layout.head_dim = config_.head_dim;
  layout.block_tokens = block_tokens;
  return layout;
}

Status check_batch(const ModelConfig& config, int32_t max_model_len, const ForwardBatch& batch, const float* logits,
                   int32_t chosen_rows) {
  constexpr size_t kMaxRows = 1 << 20;
  if (batch.tokens.empty() || batch.tokens.size() > kMaxRows) {
    return invalid_argument("a batch of {} rows; it must be in [1, {}]", batch.tokens.size(), kMaxRows);
  }
  if (batch.kv_pool == nullptr || batch.block_tokens <= 0) return invalid_argument("a batch without a KV pool");
  for (int32_t token : batch.tokens) {
    if (token < -chosen_rows || token >= config.vocab_size) {
      return invalid_argument("token id {} is not in [0, {})", token, config.vocab_size);
    }
  }
  int64_t row = 0;
  for (const SequenceSlice& slice : batch.sequences) {
    if (slice.first_row != row || slice.rows <= 0 || slice.start_pos < 0 || slice.block_table == nullptr) {
      return invalid_argument("a slice of {} rows at row {} from position {}; row {} was to come", slice.rows,
                              slice.first_row, slice.start_pos, row);
    }
    row += slice.rows;
    if (int64_t{slice.start_pos} + slice.rows > max_model_len) {
      return invalid_argument("position {} is beyond the model's {}", int64_t{slice.start_pos} + slice.rows - 1,
                              max_model_len);
    }
  }
  const auto rows = static_cast<int64_t>(batch.tokens.size());
  if (row != rows) return invalid_argument("{} rows of tokens, but {} in slices", rows, row);
  int64_t previous = -1;
  for (int32_t logit_row : batch.logit_rows) {
    if (logit_row <= previous || logit_row >= rows) {
      return invalid_argument("logit row {} after {}; they must ascend below {}", logit_row, previous, rows);
    }
    previous = logit_row;
  }
  if (!batch.chosen.empty() && (batch.chosen.size() != batch.logit_rows.size() || batch.choices.size() != batch.logit_rows.size())) {
    return invalid_argument("{} tokens to choose in {} ways for {} rows", batch.chosen.size(), batch.choices.size(), batch.logit_rows.size());
  }
  if (!batch.logit_rows.empty() && batch.chosen.empty() && logits == nullptr) return invalid_argument("logits are wanted, but nowhere to put");
  return {};
}

Status Transformer::reserve(int64_t rows) {
  // In steps, so that a batch that grows by a row per iteration does not allocate anew each time.
  constexpr int64_t kStep = 64;
  const int64_t capacity = (rows + kStep - 1) / kStep * kStep;
  const auto n = static_cast<size_t>(capacity);
  const auto mlp_rows = static_cast<size_t>(std::min(capacity, kMlpRows));
  const auto hidden = static_cast<size_t>(config_.hidden_size);
  const auto inter = static_cast<size_t>(config_.intermediate_size);
  const auto q = static_cast<size_t>(config_.heads) * static_cast<size_t>(config_.head_dim);
  const auto kv = static_cast<size_t>(config_.kv_heads) * static_cast<size_t>(config_.head_dim);
  BATON_RETURN_IF_ERROR(grow(&work_.x, n * hidden * sizeof(float)));
  BATON_RETURN_IF_ERROR(grow(&work_.normed, n * hidden * sizeof(bf16)));
  BATON_RETURN_IF_ERROR(grow(&work_.qkv, n * (q + 2 * kv) * sizeof(float)));
  BATON_RETURN_IF_ERROR(grow(&work_.q, n * q * sizeof(bf16)));
  BATON_RETURN_IF_ERROR(grow(&work_.attended, n * q * sizeof(bf16)));
  BATON_RETURN_IF_ERROR(grow(&work_.gate_up, mlp_rows * 2 * inter * sizeof(float)));
  return grow(&work_.act, mlp_rows * inter * sizeof(bf16));
}

Result<double> Transformer::measure_read_bytes_per_s() {
  // Far more bytes than the last-level cache holds, few passes.
  BATON_ASSIGN_OR_RETURN(double gbps, measure_read_gbps(kernels_.threads(), size_t{1} << 29, 2));
  return gbps * 1e9;
}

double Transformer::measure_piecewise_read_bytes_per_s(std::span<const std::span<const std::byte>> pieces) {
  return measure_piecewise_read_gbps(kernels_.threads(), pieces, 2) * 1e9;
}

void Transformer::embed(const ForwardBatch& batch) {
  const auto rows = static_cast<int64_t>(batch.tokens.size());
  if (weights_.embed.data() == nullptr) {
    kernels_.embed_packed(batch.tokens.data(), rows, *weights_.lm_head, work_.x.as<float>());
  } else {
    kernels_.embed(batch.tokens.data(), rows, weights_.embed.as<bf16>(), config_.hidden_size, work_.x.as<float>());
  }
}

void Transformer::write_kv(const DecoderLayer& layer, const ForwardBatch& batch, const KvLayerView& kv) {
  const auto rows = static_cast<int64_t>(batch.tokens.size());
  kernels_.rms_norm(work_.x.as<float>(), rows, config_.hidden_size, layer.input_norm.data(), config_.rms_norm_eps,
                    work_.normed.as<bf16>());
  kernels_.linear(work_.normed.as<bf16>(), rows, *layer.qkv.weight, nullptr, /*accumulate=*/false,
                  work_.qkv.as<float>());
  QkvArgs args;
  args.qkv = work_.qkv.as<float>();
  args.rows = static_cast<int32_t>(rows);
  args.heads = config_.heads;
  args.bias = data_or_null(layer.qkv.bias);
  args.q_norm = data_or_null(layer.q_norm);
  args.k_norm = data_or_null(layer.k_norm);
  args.norm_eps = config_.rms_norm_eps;
  args.rope = rope_.view();
  args.sequences = batch.sequences;
  args.kv = kv;
  kernels_.qkv_rope_kv_write(args, work_.q.as<bf16>());
}

void Transformer::attend(const DecoderLayer& layer, int32_t window, std::span<const SequenceSlice> sequences,
                         int64_t rows, const KvLayerView& kv) {
  AttentionArgs args;
  args.q = work_.q.as<bf16>();
  args.out = work_.attended.as<bf16>();
  args.heads = config_.heads;
  args.scale = 1.0f / std::sqrt(static_cast<float>(config_.head_dim));
  args.sliding_window = window;
  args.sequences = sequences;
  args.kv = kv;
  kernels_.attention(args);
  kernels_.linear(work_.attended.as<bf16>(), rows, *layer.o.weight, data_or_null(layer.o.bias), /*accumulate=*/true,
                  work_.x.as<float>());
}

void Transformer::mlp(const DecoderLayer& layer, int64_t rows) {
  const int64_t hidden = config_.hidden_size, inter = config_.intermediate_size;
  kernels_.rms_norm(work_.x.as<float>(), rows, hidden, layer.post_attention_norm.data(), config_.rms_norm_eps,
                    work_.normed.as<bf16>());
  for (int64_t row = 0; row < rows; row += kMlpRows) {
    const int64_t count = std::min(kMlpRows, rows - row);
    kernels_.linear(work_.normed.as<bf16>() + row * hidden, count, *layer.gate_up.weight,
                    data_or_null(layer.gate_up.bias), /*accumulate=*/false, work_.gate_up.as<float>());
    kernels_.silu_mul(work_.gate_up.as<float>(), count, inter, work_.act.as<bf16>());
    kernels_.linear(work_.act.as<bf16>(), count, *layer.down.weight, data_or_null(layer.down.bias), /*accumulate=*/true,
                    work_.x.as<float>() + row * hidden);
  }
}

/// After the last layer's KV is written only the rows whose logits are wanted matter: moves their x and q to the
/// front and cuts the slices accordingly. Rows ascend, so nothing is overwritten before it is moved.
void Transformer::keep_logit_rows(const ForwardBatch& batch) {
  const auto hidden = static_cast<size_t>(config_.hidden_size);
  const auto q_width = static_cast<size_t>(config_.heads) * static_cast<size_t>(config_.head_dim);
  kept_sequences_.clear();
  size_t slice = 0;
  int32_t kept = 0;
  for (int32_t row : batch.logit_rows) {
    const auto from = static_cast<size_t>(row), to = static_cast<size_t>(kept);
    if (from != to) {
      std::memcpy(work_.x.as<float>() + to * hidden, work_.x.as<float>() + from * hidden, hidden * sizeof(float));
      std::memcpy(work_.q.as<bf16>() + to * q_width, work_.q.as<bf16>() + from * q_width, q_width * sizeof(bf16));
    }
    while (row >= batch.sequences[slice].first_row + batch.sequences[slice].rows) slice++;
    const SequenceSlice& origin = batch.sequences[slice];
    const int32_t position = origin.start_pos + (row - origin.first_row);
    bool continues = !kept_sequences_.empty() && kept_sequences_.back().block_table == origin.block_table &&
                     kept_sequences_.back().start_pos + kept_sequences_.back().rows == position;
    if (continues) {
      kept_sequences_.back().rows++;
    } else {
      kept_sequences_.push_back({kept, 1, position, origin.block_table});
    }
    kept++;
  }
}

Status Transformer::forward(const ForwardBatch& batch, float* logits) {
  BATON_RETURN_IF_ERROR(check_batch(config_, max_model_len_, batch, logits));
  if (!batch.chosen.empty()) return invalid_argument("this model does not choose tokens");
  const auto rows = static_cast<int64_t>(batch.tokens.size());
  const auto logit_rows = static_cast<int64_t>(batch.logit_rows.size());
  BATON_RETURN_IF_ERROR(reserve(rows));
  int64_t positions = 0;
  for (const SequenceSlice& slice : batch.sequences) {
    positions = std::max(positions, int64_t{slice.start_pos} + slice.rows);
  }
  rope_.ensure(positions, kernels_.threads());

  const BlockLayout layout = this->layout(batch.block_tokens);
  KvLayerView kv;
  kv.pool = batch.kv_pool;
  kv.block_stride_bytes = layout.block_bytes();
  kv.block_tokens = layout.block_tokens;
  kv.kv_heads = layout.kv_heads;
  kv.head_dim = layout.head_dim;

  embed(batch);
  for (int32_t l = 0; l < config_.layers; l++) {
    const DecoderLayer& layer = weights_.layers[static_cast<size_t>(l)];
    kv.k_offset_bytes = layout.layer_offset_bytes(l);
    kv.v_offset_bytes = kv.k_offset_bytes + layout.plane_bytes();
    write_kv(layer, batch, kv);
    // Nothing after this touches the layer's KV: it can leave while attention and MLP are computed.
    if (batch.layer_done) batch.layer_done(l, nullptr);
    if (l + 1 < config_.layers) {
      attend(layer, config_.window_of(l), batch.sequences, rows, kv);
      mlp(layer, rows);
    } else if (logit_rows > 0) {
      keep_logit_rows(batch);
      attend(layer, config_.window_of(l), kept_sequences_, logit_rows, kv);
      mlp(layer, logit_rows);
    }
  }
  if (logit_rows == 0) return {};
  kernels_.rms_norm(work_.x.as<float>(), logit_rows, config_.hidden_size, weights_.final_norm.data(),
                    config_.rms_norm_eps, work_.normed.as<bf16>());
  kernels_.linear(work_.normed.as<bf16>(), logit_rows, *weights_.lm_head, nullptr, /*accumulate=*/false, logits);
  return {};
}

}  // namespace baton
