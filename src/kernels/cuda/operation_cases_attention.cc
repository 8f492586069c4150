// The cases that know the KV cache: what is written into it, and attention over it.
#include <algorithm>
#include <numeric>
#include <span>
#include <utility>

#include "kernels/cuda/operation_case_parts.h"
#include "kernels/cuda/operation_cases.h"

namespace baton::cuda {
namespace {

/// The same cache in both orders: rows of heads on the GPU, pairs on the CPU.
struct CacheShape {
  int32_t kv_heads, block_tokens, head_dim;

  size_t plane() const { return static_cast<size_t>(kv_heads) * static_cast<size_t>(block_tokens) * static_cast<size_t>(head_dim); }
  size_t row_place(int32_t head, int32_t token, int32_t d) const {
    return static_cast<size_t>((head * block_tokens + token) * head_dim + d);
  }
  size_t pair_place(bool v, int32_t head, int32_t token, int32_t d) const {
    const int32_t at = v ? (head * block_tokens / 2 + token / 2) * head_dim * 2 + d * 2 + token % 2
                         : (head * head_dim / 2 + d / 2) * block_tokens * 2 + token * 2 + d % 2;
    return static_cast<size_t>(at);
  }
  /// `planes` of alternating K and V.
  std::vector<bf16> to_pairs(std::span<const bf16> rows) const {
    std::vector<bf16> pairs(rows.size());
    for (size_t begin = 0; begin < rows.size(); begin += plane()) {
      const bool v = begin / plane() % 2 == 1;
      for (int32_t h = 0; h < kv_heads; ++h) {
        for (int32_t t = 0; t < block_tokens; ++t) {
          for (int32_t d = 0; d < head_dim; ++d) pairs[begin + pair_place(v, h, t, d)] = rows[begin + row_place(h, t, d)];
        }
      }
    }
    return pairs;
  }
};

class QkvCase final : public SimpleCase<bf16> {
 public:
  QkvCase(CudaKernels& kernels, const QkvShape& shape)
      : SimpleCase(kernels, "qkv_rope_kv_write",
                   fmt::format("{} rows, {}/{} x {}{}{}", shape.rows, shape.heads, shape.kv_heads, shape.head_dim,
                               shape.bias ? " bias" : "", shape.norm ? " norm" : "")),
        shape_(shape), cache_{shape.kv_heads, shape.block_tokens, shape.head_dim} {
    bytes_ = int64_t{shape.rows} * (shape.heads + 2 * shape.kv_heads) * shape.head_dim * 4;
    bound_ = {2e-3, 1.0 / 100};
  }
  Status init() {
    Random random(71);
    const QkvShape& s = shape_;
    const auto rows = static_cast<size_t>(s.rows), d = static_cast<size_t>(s.head_dim);
    const size_t width = static_cast<size_t>(s.heads + 2 * s.kv_heads) * d;
    const int32_t blocks = (s.rows + s.block_tokens - 1) / s.block_tokens + 2;
    positions_.resize(rows);
    std::iota(positions_.begin(), positions_.end(), kFirstPosition);
    table_.resize(static_cast<size_t>((kFirstPosition + s.rows + s.block_tokens - 1) / s.block_tokens));
    for (size_t i = 0; i < table_.size(); ++i) table_[table_.size() - 1 - i] = static_cast<int32_t>(i % static_cast<size_t>(blocks));
    for (size_t m = 0; m < rows; ++m) {
      const bool unused = s.unused_every > 0 && m % static_cast<size_t>(s.unused_every) == 0;
      const int32_t p = positions_[m];
      slots_.push_back(unused ? -1 : table_[static_cast<size_t>(p / s.block_tokens)] * s.block_tokens + p % s.block_tokens);
    }
    const auto max_positions = static_cast<size_t>(kFirstPosition + s.rows);
    BATON_ASSIGN_OR_RETURN(qkv_, Array<bf16>::random(gpu(), random, rows * width, 2));
    BATON_ASSIGN_OR_RETURN(bias_, Array<float>::random(gpu(), random, width));
    BATON_ASSIGN_OR_RETURN(q_norm_, Array<float>::random(gpu(), random, d));
    BATON_ASSIGN_OR_RETURN(k_norm_, Array<float>::random(gpu(), random, d));
    BATON_ASSIGN_OR_RETURN(cos_, Array<float>::random(gpu(), random, max_positions * d / 2));
    BATON_ASSIGN_OR_RETURN(sin_, Array<float>::random(gpu(), random, max_positions * d / 2));
    BATON_ASSIGN_OR_RETURN(device_positions_, Array<int32_t>::upload(gpu(), positions_));
    BATON_ASSIGN_OR_RETURN(device_slots_, Array<int32_t>::upload(gpu(), slots_));
    q_elements_ = rows * static_cast<size_t>(s.heads) * d;
    BATON_ASSIGN_OR_RETURN(out_, Array<bf16>::allocate(gpu(), q_elements_ + static_cast<size_t>(blocks) * 2 * cache_.plane()));
    return Status();
  }
  Status launch(CUstream stream) override {
    StepView step = {};
    step.positions = device_positions_.data();
    step.slots = device_slots_.data();
    step.rows = shape_.rows;
    QkvRope args = {};
    args.qkv = qkv_.data();
    args.heads = shape_.heads;
    args.bias = shape_.bias ? bias_.data() : nullptr;
    args.q_norm = shape_.norm ? q_norm_.data() : nullptr;
    args.k_norm = shape_.norm ? k_norm_.data() : nullptr;
    args.norm_eps = kEps;
    args.rope_cos = cos_.data();
    args.rope_sin = sin_.data();
    DeviceKv kv = {};
    kv.pool = reinterpret_cast<unsigned char*>(out_.data() + q_elements_);
    kv.block_stride_bytes = static_cast<int64_t>(2 * cache_.plane() * sizeof(bf16));
    kv.v_offset_bytes = kv.block_stride_bytes / 2;
    kv.block_tokens = shape_.block_tokens;
    kv.kv_heads = shape_.kv_heads;
    kv.head_dim = shape_.head_dim;
    return kernels_.qkv_rope_kv_write(stream, step, args, kv, out_.data());
  }

 private:
  static constexpr float kEps = 1e-6f;
  static constexpr int32_t kFirstPosition = 5;

  std::vector<bf16> reference() override {
    auto qkv = qkv_.download();
    auto bias = bias_.download();
    auto q_norm = q_norm_.download();
    auto k_norm = k_norm_.download();
    auto cos = cos_.download();
    auto sin = sin_.download();
    BATON_CHECK(qkv.ok() && bias.ok() && q_norm.ok() && k_norm.ok() && cos.ok() && sin.ok());
    std::vector<float> values(qkv->size());
    std::ranges::transform(*qkv, values.begin(), [](bf16 v) { return static_cast<float>(v); });
    std::vector<bf16> expected(out_.size());
    std::memset(static_cast<void*>(expected.data()), kPoison, expected.size() * sizeof(bf16));
    std::vector<bf16> pairs(expected.size() - q_elements_);
    std::memset(static_cast<void*>(pairs.data()), kPoison, pairs.size() * sizeof(bf16));
    // Each used row is a sequence of its own.
    std::vector<SequenceSlice> sequences;
    for (size_t m = 0; m < slots_.size(); ++m) {
      if (slots_[m] >= 0) sequences.push_back({static_cast<int32_t>(m), 1, positions_[m], table_.data()});
    }
    const auto row_bytes = static_cast<int64_t>(2 * cache_.plane() * sizeof(bf16));
    const KvLayerView kv = {.pool = reinterpret_cast<std::byte*>(pairs.data()), .block_stride_bytes = row_bytes, .k_offset_bytes = 0,
                            .v_offset_bytes = row_bytes / 2, .block_tokens = shape_.block_tokens, .kv_heads = shape_.kv_heads,
                            .head_dim = shape_.head_dim};
    const QkvArgs args = {.qkv = values.data(), .rows = shape_.rows, .heads = shape_.heads,
                          .bias = shape_.bias ? bias->data() : nullptr, .q_norm = shape_.norm ? q_norm->data() : nullptr,
                          .k_norm = shape_.norm ? k_norm->data() : nullptr, .norm_eps = kEps,
                          .rope = {cos->data(), sin->data(), kFirstPosition + shape_.rows}, .sequences = sequences, .kv = kv};
    cpu_kernels()->qkv_rope_kv_write(args, expected.data());
    for (size_t begin = 0; begin < pairs.size(); begin += cache_.plane()) {
      const bool v = begin / cache_.plane() % 2 == 1;
      for (int32_t h = 0; h < shape_.kv_heads; ++h) {
        for (int32_t t = 0; t < shape_.block_tokens; ++t) {
          for (int32_t d = 0; d < shape_.head_dim; ++d) {
            expected[q_elements_ + begin + cache_.row_place(h, t, d)] = pairs[begin + cache_.pair_place(v, h, t, d)];
          }
        }
      }
    }
    return expected;
  }

  QkvShape shape_;
  CacheShape cache_;
  std::vector<int32_t> positions_, slots_, table_;
  Array<bf16> qkv_;
  Array<float> bias_, q_norm_, k_norm_, cos_, sin_;
  Array<int32_t> device_positions_, device_slots_;
  size_t q_elements_ = 0;
};

std::string describe(const AttentionShape& s) {
  const auto used = static_cast<size_t>(std::ranges::count_if(s.sequences, [](const CaseSequence& q) { return q.rows > 0; }));
  const CaseSequence& last = s.sequences.back();
  std::string text = fmt::format("{}/{} x {}, {} x ", s.heads, s.kv_heads, s.head_dim, used);
  text += last.rows > 1 ? fmt::format("{}+{}", last.start_pos, last.rows) : fmt::format("{}", last.start_pos + 1);
  if (s.sliding_window > 0) text += fmt::format(", window {}", s.sliding_window);
  return text;
}

class AttentionCase final : public SimpleCase<bf16> {
 public:
  AttentionCase(CudaKernels& kernels, const AttentionShape& shape, bool decode)
      : SimpleCase(kernels, decode ? "attention_decode" : "attention_prefill", describe(shape)),
        shape_(shape), decode_(decode), cache_{shape.kv_heads, shape.block_tokens, shape.head_dim} {
    const int64_t token_bytes = int64_t{4} * shape.kv_heads * shape.head_dim;
    bound_ = {6e-3, 1.0 / 64};  // weights are rounded to bf16 here and there
    for (const CaseSequence& sequence : shape.sequences) {
      rows_ += sequence.rows;
      for (int32_t i = 0; i < sequence.rows; ++i) {
        const int32_t end = sequence.start_pos + i + 1;
        const int64_t seen = shape.sliding_window > 0 ? std::min(end, shape.sliding_window) : end;
        flops_ += seen * shape.heads * shape.head_dim * 4;
        if (decode) bytes_ += seen * token_bytes;
      }
      if (!decode) bytes_ += int64_t{sequence.start_pos + sequence.rows} * token_bytes;
    }
    bytes_ += int64_t{rows_} * shape.heads * shape.head_dim * 4;
  }

  Status init() {
    const AttentionShape& s = shape_;
    BATON_RETURN_IF_ERROR(kernels_.validate_attention_shape(s.heads, s.kv_heads, s.head_dim, s.block_tokens));
    Random random(s.seed);
    int32_t row = 0;
    for (const CaseSequence& sequence : s.sequences) {
      sequences_.push_back({row, sequence.rows, sequence.start_pos, static_cast<int32_t>(tables_.size())});
      row += sequence.rows;
      const int32_t blocks = sequence.rows == 0 ? 0 : (sequence.start_pos + sequence.rows + s.block_tokens - 1) / s.block_tokens;
      for (int32_t i = 0; i < blocks; ++i) tables_.push_back(static_cast<int32_t>(tables_.size()));
    }
    for (size_t i = tables_.size(); i > 1; --i) std::swap(tables_[i - 1], tables_[random.below(i)]);
    layer_bytes_ = static_cast<int64_t>(2 * cache_.plane() * sizeof(bf16));
    const size_t pool = tables_.size() * 2 * cache_.plane() * static_cast<size_t>(s.copies);
    BATON_ASSIGN_OR_RETURN(pool_, Array<bf16>::random(gpu(), random, pool, 1.5));
    const size_t row_elements = static_cast<size_t>(s.heads) * static_cast<size_t>(s.head_dim);
    // One row more than is used, which nothing may touch.
    BATON_ASSIGN_OR_RETURN(q_, Array<bf16>::random(gpu(), random, static_cast<size_t>(rows_ + 1) * row_elements, 1.5));
    BATON_ASSIGN_OR_RETURN(out_, Array<bf16>::allocate(gpu(), static_cast<size_t>(rows_ + 1) * row_elements));
    BATON_ASSIGN_OR_RETURN(device_sequences_, Array<DeviceSequence>::upload(gpu(), sequences_));
    BATON_ASSIGN_OR_RETURN(device_tables_, Array<int32_t>::upload(gpu(), tables_));
    const auto count = static_cast<int32_t>(sequences_.size());
    if (decode_) {
      BATON_ASSIGN_OR_RETURN(workspace_, Array<std::byte>::allocate(gpu(), kernels_.decode_workspace_bytes(count, s.heads, s.head_dim)));
      return workspace_.poison();
    }
    std::vector<PrefillTile> tiles;
    const int32_t tile_tokens = kernels_.prefill_tile_tokens(s.heads, s.kv_heads, s.head_dim);
    for (int32_t i = 0; i < count; ++i) {
      for (int32_t at = 0; at < sequences_[static_cast<size_t>(i)].rows; at += tile_tokens) tiles.push_back({i, at});
    }
    std::ranges::stable_sort(tiles, std::greater<>(), [&](const PrefillTile& tile) {
      return sequences_[static_cast<size_t>(tile.sequence)].start_pos + tile.token_begin;
    });
    BATON_ASSIGN_OR_RETURN(tiles_, Array<PrefillTile>::upload(gpu(), tiles));
    return Status();
  }

  Status launch(CUstream stream) override {
    StepView step = {};
    step.sequences = device_sequences_.data();
    step.block_tables = device_tables_.data();
    step.rows = rows_;
    step.sequences_count = static_cast<int32_t>(sequences_.size());
    const int64_t layer = turn_++ % shape_.copies;
    DeviceKv kv = {};
    kv.pool = reinterpret_cast<unsigned char*>(pool_.data());
    kv.block_stride_bytes = layer_bytes_ * shape_.copies;
    kv.k_offset_bytes = layer * layer_bytes_;
    kv.v_offset_bytes = kv.k_offset_bytes + layer_bytes_ / 2;
    kv.block_tokens = shape_.block_tokens;
    kv.kv_heads = shape_.kv_heads;
    kv.head_dim = shape_.head_dim;
    const Attention args = {q_.data(), out_.data(), shape_.heads, scale(), shape_.sliding_window};
    if (!decode_) return kernels_.attention_prefill(stream, step, tiles_.data(), static_cast<int32_t>(tiles_.size()), args, kv);
    const int32_t count = shape_.launched < 0 ? step.sequences_count : shape_.launched;
    return kernels_.attention_decode(stream, step, shape_.first, count, args, kv, workspace_.address());
  }

 private:
  float scale() const { return 1.0f / std::sqrt(static_cast<float>(shape_.head_dim)); }
  Status reset() override {
    turn_ = 0;
    return out_.poison();
  }

  std::vector<bf16> reference() override {
    auto q = q_.download();
    auto pool = pool_.download();
    BATON_CHECK(q.ok() && pool.ok());
    const std::vector<bf16> pairs = cache_.to_pairs(*pool);
    std::vector<bf16> expected(out_.size());
    std::memset(static_cast<void*>(expected.data()), kPoison, expected.size() * sizeof(bf16));
    std::vector<SequenceSlice> slices;
    for (const DeviceSequence& s : sequences_) {
      if (s.rows > 0) slices.push_back({s.first_row, s.rows, s.start_pos, tables_.data() + s.table_offset});
    }
    const KvLayerView kv = {.pool = reinterpret_cast<std::byte*>(const_cast<bf16*>(pairs.data())),
                            .block_stride_bytes = layer_bytes_ * shape_.copies, .k_offset_bytes = 0,
                            .v_offset_bytes = layer_bytes_ / 2, .block_tokens = shape_.block_tokens,
                            .kv_heads = shape_.kv_heads, .head_dim = shape_.head_dim};
    cpu_kernels()->attention({.q = q->data(), .out = expected.data(), .heads = shape_.heads, .scale = scale(),
                              .sliding_window = shape_.sliding_window, .sequences = slices, .kv = kv});
    return expected;
  }

  AttentionShape shape_;
  bool decode_;
  CacheShape cache_;
  int32_t rows_ = 0;
  int64_t layer_bytes_ = 0, turn_ = 0;
  std::vector<DeviceSequence> sequences_;
  std::vector<int32_t> tables_;
  Array<bf16> pool_, q_;
  Array<DeviceSequence> device_sequences_;
  Array<int32_t> device_tables_;
  Array<PrefillTile> tiles_;
  Array<std::byte> workspace_;
};

}  // namespace

CaseResult qkv_rope_kv_write_case(CudaKernels& kernels, const QkvShape& shape) { return make_case<QkvCase>(kernels, shape); }
CaseResult attention_decode_case(CudaKernels& kernels, const AttentionShape& shape) {
  return make_case<AttentionCase>(kernels, shape, true);
}
CaseResult attention_prefill_case(CudaKernels& kernels, const AttentionShape& shape) {
  return make_case<AttentionCase>(kernels, shape, false);
}

}  // namespace baton::cuda
