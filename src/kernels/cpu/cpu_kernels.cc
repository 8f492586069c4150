// The device table of the CPU: cuts each operation into tasks for the thread pool and calls the functions of one
// instruction set. Everything here is about who computes what; nothing here touches a number, so no result
// depends on it.

#include <algorithm>
#include <atomic>
#include <functional>
#include <system_error>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/cpu/packed_matrix.h"
#include "kernels/kernels.h"

namespace baton {
namespace cpu {
namespace {

constexpr int64_t kRowChunk = 512;          // of linear(): its packed activations stay in the caches
constexpr int64_t kAttentionRows = 64;      // query rows (tokens x heads of a group) that share a K/V tile
constexpr int64_t kInlineElements = 16384;  // element-wise work below this is not worth a fork
constexpr int64_t kMaxPartialFloats = int64_t{16} << 20;

const uint16_t* bits_of(const bf16* p) { return reinterpret_cast<const uint16_t*>(p); }
uint16_t* bits_of(bf16* p) { return reinterpret_cast<uint16_t*>(p); }

/// Memory that only grows: the hot path allocates nothing once the largest batch has been seen.
class Scratch {
 public:
  void* reserve(size_t bytes) {
    if (bytes > buffer_.bytes()) {
      auto grown = Buffer::allocate(bytes + bytes / 4);
      BATON_CHECK(grown.ok()) << "scratch of the CPU kernels: " << grown.status().to_string();
      buffer_ = std::move(grown).value();
    }
    return buffer_.data();
  }

 private:
  Buffer buffer_;
};

class CpuKernels final : public Kernels {
 public:
  CpuKernels(const IsaOps& ops, int threads)
      : ops_(ops), threads_(threads), thread_scratch_(static_cast<size_t>(threads_.threads())) {}

  std::string_view name() const override { return ops_.name; }
  ThreadPool& threads() override { return threads_; }

  Status validate_attention_shape(int64_t heads, int64_t kv_heads, int64_t head_dim) const override {
    if (head_dim < 8 || head_dim > kMaxHeadDim || head_dim % 8 != 0) {
      return unimplemented("head_dim {}: the CPU kernels take multiples of 8 from 8 to {}", head_dim, kMaxHeadDim);
    }
    if (kv_heads < 1 || heads < 1 || heads % kv_heads != 0 || heads / kv_heads > kMaxGroup) {
      return unimplemented("{} query heads over {} key-value heads: need a multiple, at most {} times as many", heads,
                           kv_heads, kMaxGroup);
    }
    return {};
  }

  Result<std::unique_ptr<PackedMatrix>> pack(std::span<const MatrixPart> parts, int64_t in_features) override {
    BATON_ASSIGN_OR_RETURN(std::unique_ptr<CpuPackedMatrix> matrix,
                           CpuPackedMatrix::pack(parts, in_features, threads_));
    return std::unique_ptr<PackedMatrix>(std::move(matrix));
  }

  void linear(const bf16* x, int64_t rows, const PackedMatrix& weight, const float* bias, bool accumulate,
              float* y) override {
    const CpuPackedMatrix& matrix = packed(weight);
    for (int64_t begin = 0; begin < rows; begin += kRowChunk) {
      const int64_t count = std::min(kRowChunk, rows - begin);
      linear_chunk(bits_of(x) + begin * matrix.in_features(), count, matrix, bias, accumulate,
                   y + begin * matrix.out_features());
    }
  }

  void embed(const int32_t* ids, int64_t rows, const bf16* table, int64_t hidden, float* x) override {
    for_rows(rows, hidden, [&](int64_t row) {
      const bf16* const source = table + int64_t{ids[row]} * hidden;
      float* const out = x + row * hidden;
      for (int64_t i = 0; i < hidden; ++i) out[i] = static_cast<float>(source[i]);
    });
  }

  void embed_packed(const int32_t* ids, int64_t rows, const PackedMatrix& table, float* x) override {
    const CpuPackedMatrix& matrix = packed(table);
    const int64_t hidden = matrix.in_features();
    for_rows(rows, hidden * 16, [&](int64_t row) { matrix.unpack_row(ids[row], x + row * hidden); });
  }

  void rms_norm(const float* x, int64_t rows, int64_t hidden, const float* weight, float eps, bf16* out) override {
    for_rows(rows, hidden,
             [&](int64_t row) { ops_.rms_norm(x + row * hidden, hidden, weight, eps, bits_of(out) + row * hidden); });
  }

  void silu_mul(const float* gate_up, int64_t rows, int64_t inter, bf16* out) override {
    for_rows(rows, inter, [&](int64_t row) {
      const float* const gate = gate_up + row * 2 * inter;
      ops_.silu_mul(gate, gate + inter, inter, bits_of(out) + row * inter);
    });
  }

  void qkv_rope_kv_write(const QkvArgs& args, bf16* q_out) override;
  void attention(const AttentionArgs& args) override;

 private:
  static constexpr int64_t kMaxGroup = 256;

  static const CpuPackedMatrix& packed(const PackedMatrix& matrix) {
    const auto* const result = dynamic_cast<const CpuPackedMatrix*>(&matrix);
    BATON_CHECK(result != nullptr) << "a matrix packed by another device";
    return *result;
  }

  /// body(row) for each row, on this thread alone when `row_cost` elements per row make too little work.
  template <typename Body>
  void for_rows(int64_t rows, int64_t row_cost, const Body& body) {
    const auto range = [&](int64_t begin, int64_t end, int) {
      for (int64_t row = begin; row < end; ++row) body(row);
    };
    if (rows * row_cost < kInlineElements) {
      range(0, rows, 0);
      return;
    }
    const int64_t grain = std::max<int64_t>(1, rows / (threads_.threads() * 4));
    threads_.parallel_for(rows, grain, std::cref(range));
  }

  void linear_chunk(const uint16_t* x, int64_t rows, const CpuPackedMatrix& matrix, const float* bias,
                    bool accumulate, float* y);
  void add_attention_tasks(const AttentionArgs& args, const SequenceSlice& sequence, int heads_per_task);
  int heads_per_task(const AttentionArgs& args) const;
  void split_attention_tasks();

  const IsaOps& ops_;
  ThreadPool threads_;
  Scratch activations_;
  Scratch partials_;
  std::vector<Scratch> thread_scratch_;
  struct RowPlace {
    int64_t pos;
    int64_t block;  // elements from the layer's K (V) of block 0, head 0
  };
  std::vector<RowPlace> places_;
  std::vector<AttentionTask> tasks_;
  std::vector<AttentionTask> merges_;
};

void CpuKernels::linear_chunk(const uint16_t* x, int64_t rows, const CpuPackedMatrix& matrix, const float* bias,
                              bool accumulate, float* y) {
  const int64_t k_pairs = matrix.k_pairs();
  const RowBlocks blocks(rows, ops_.max_block_rows);
  const int64_t row_bytes = k_pairs * ops_.activation_pair_bytes;
  auto* const a = static_cast<std::byte*>(activations_.reserve(static_cast<size_t>(rows * row_bytes)));
  for_rows(blocks.count, ops_.max_block_rows * k_pairs / 2, [&](int64_t i) {
    const int64_t begin = blocks.begin(i);
    ops_.pack_block(x + begin * k_pairs * 2, blocks.begin(i + 1) - begin, k_pairs, a + begin * row_bytes);
  });

  const LinearTask whole = {.a = a,
                            .rows = rows,
                            .k_pairs = k_pairs,
                            .weights = matrix.words(),
                            .panel_begin = 0,
                            .panel_end = 0,
                            .out_features = matrix.out_features(),
                            .bias = bias,
                            .accumulate = accumulate,
                            .y = y,
                            .scratch = nullptr};
  const auto panels = [&](int64_t begin, int64_t end, int thread) {
    LinearTask task = whole;
    const size_t scratch_bytes = static_cast<size_t>(rows * kPanelLanes) * sizeof(float);
    task.scratch = static_cast<float*>(thread_scratch_[static_cast<size_t>(thread)].reserve(scratch_bytes));
    task.panel_begin = begin;
    task.panel_end = end;
    ops_.linear(task);
  };
  if (rows * k_pairs * matrix.out_features() < kInlineElements) {
    panels(0, matrix.panels(), 0);
  } else {
    // Every new stream costs the memory half a microsecond, and a panel is a stream of microseconds.
    threads_.stream_for(matrix.panels(), std::cref(panels));
  }
}

void CpuKernels::qkv_rope_kv_write(const QkvArgs& args, bf16* q_out) {
  const KvLayerView& kv = args.kv;
  const int64_t d = kv.head_dim;
  BATON_CHECK(validate_attention_shape(args.heads, kv.kv_heads, d).ok())
      << validate_attention_shape(args.heads, kv.kv_heads, d).to_string();
  places_.assign(static_cast<size_t>(args.rows), RowPlace{-1, 0});
  for (const SequenceSlice& sequence : args.sequences) {
    BATON_CHECK(sequence.first_row >= 0 && sequence.first_row + sequence.rows <= args.rows)
        << "rows " << sequence.first_row << "+" << sequence.rows << " of " << args.rows;
    BATON_CHECK(sequence.start_pos >= 0 && int64_t{sequence.start_pos} + sequence.rows <= args.rope.max_positions)
        << "position " << sequence.start_pos << "+" << sequence.rows << " of " << args.rope.max_positions;
    for (int32_t i = 0; i < sequence.rows; ++i) {
      const int64_t pos = int64_t{sequence.start_pos} + i;
      const int64_t block = sequence.block_table[pos / kv.block_tokens];
      places_[static_cast<size_t>(sequence.first_row + i)] = {
          pos, block * kv.block_stride_bytes / 2};
    }
  }
  const int64_t width = (args.heads + 2 * int64_t{kv.kv_heads}) * d;
  for_rows(args.rows, width, [&](int64_t row) {
    const RowPlace place = places_[static_cast<size_t>(row)];
    if (place.pos < 0) return;  // padding that belongs to no sequence
    const int64_t slot = place.pos % kv.block_tokens;
    const QkvRow task = {
        .qkv = args.qkv + row * width,
        .bias = args.bias,
        .q_norm = args.q_norm,
        .k_norm = args.k_norm,
        .cos = args.rope.cos + place.pos * (d / 2),
        .sin = args.rope.sin + place.pos * (d / 2),
        .norm_eps = args.norm_eps,
        .heads = args.heads,
        .kv_heads = kv.kv_heads,
        .head_dim = kv.head_dim,
        .q_out = bits_of(q_out) + row * args.heads * d,
        .k_out = reinterpret_cast<uint16_t*>(kv.pool + kv.k_offset_bytes) + place.block + 2 * slot,
        .v_out = reinterpret_cast<uint16_t*>(kv.pool + kv.v_offset_bytes) + place.block + slot / 2 * 2 * d + slot % 2,
        .kv_head_stride = kv.block_tokens * d,
        .k_pair_stride = 2 * int64_t{kv.block_tokens},
        .v_step = slot + 1 == kv.block_tokens && slot % 2 == 0 ? 1 : 2,
    };
    ops_.qkv_row(task);
  });
}

void CpuKernels::add_attention_tasks(const AttentionArgs& args, const SequenceSlice& sequence, int heads_per_task) {
  const KvLayerView& kv = args.kv;
  const int group = args.heads / kv.kv_heads;
  const int64_t tokens_per_task = std::max<int64_t>(1, kAttentionRows / group);
  const int64_t row_offset = int64_t{sequence.first_row} * args.heads * kv.head_dim;
  for (int64_t begin = 0; begin < sequence.rows; begin += tokens_per_task) {
    AttentionTask task = {};
    task.token_begin = begin;
    task.token_end = std::min<int64_t>(begin + tokens_per_task, sequence.rows);
    task.q = bits_of(args.q) + row_offset;
    task.out = bits_of(args.out) + row_offset;
    task.heads = args.heads;
    task.group = group;
    task.head_dim = kv.head_dim;
    task.scale = args.scale;
    task.window = args.sliding_window;
    task.start_pos = sequence.start_pos;
    task.k_pool = reinterpret_cast<const uint16_t*>(kv.pool + kv.k_offset_bytes);
    task.v_offset = (kv.v_offset_bytes - kv.k_offset_bytes) / 2;
    task.block_stride = kv.block_stride_bytes / 2;
    task.head_stride = int64_t{kv.block_tokens} * kv.head_dim;
    task.block_tokens = kv.block_tokens;
    task.block_table = sequence.block_table;
    const int64_t first_key = task.window > 0 ? std::max<int64_t>(0, task.start_pos + begin - task.window + 1) : 0;
    task.segment_begin = first_key / kSegmentKeys;
    task.segment_end = (task.start_pos + task.token_end + kSegmentKeys - 1) / kSegmentKeys;
    const int64_t rows = (task.token_end - task.token_begin) * group;
    const int heads = std::clamp<int>(static_cast<int>(kAttentionRows / rows), 1, heads_per_task);
    for (int32_t head = 0; head < kv.kv_heads; head += heads) {
      task.kv_head = head;
      task.kv_heads = std::min(heads, kv.kv_heads - head);
      tasks_.push_back(task);
    }
  }
}

/// With few rows (decode) attention is a matter of reading: the more heads of a block one task reads, the longer the runs of
/// memory. As many as leave two tasks for each thread, counting that they can be cut at segment borders.
int CpuKernels::heads_per_task(const AttentionArgs& args) const {
  int64_t segments = 0;
  for (const SequenceSlice& sequence : args.sequences) {
    const int64_t keys = int64_t{sequence.start_pos} + sequence.rows;
    const int64_t seen = args.sliding_window > 0 ? std::min<int64_t>(keys, args.sliding_window + sequence.rows) : keys;
    segments += (seen + kSegmentKeys - 1) / kSegmentKeys;
  }
  const int64_t wanted = int64_t{2} * threads_.threads();
  return static_cast<int>(std::clamp<int64_t>(segments * args.kv.kv_heads / wanted, 1, args.kv.kv_heads));
}

/// When there are too few tasks to go round (one sequence, few heads, many cores), those with few rows are cut at
/// segment borders; their states are merged afterwards.
void CpuKernels::split_attention_tasks() {
  merges_.clear();
  const int64_t wanted = int64_t{4} * threads_.threads();
  const int64_t whole_tasks = static_cast<int64_t>(tasks_.size());
  if (threads_.threads() == 1 || whole_tasks >= wanted) return;
  const auto rows = [](const AttentionTask& task) {
    return (task.token_end - task.token_begin) * task.group * task.kv_heads;
  };
  const auto can_split = [](const AttentionTask& task) {
    return (task.token_end - task.token_begin) * task.group <= 16 && task.segment_end - task.segment_begin > 1;
  };
  const auto partial_floats = [&](const AttentionTask& task) {
    return (task.segment_end - task.segment_begin) * rows(task) * partial_stride(task.head_dim);
  };
  int64_t floats = 0;
  for (const AttentionTask& task : tasks_) {
    if (can_split(task)) floats += partial_floats(task);
  }
  if (floats == 0 || floats > kMaxPartialFloats) return;
  float* partial = static_cast<float*>(partials_.reserve(static_cast<size_t>(floats) * sizeof(float)));
  const int64_t pieces = (wanted + whole_tasks - 1) / whole_tasks;
  for (int64_t i = 0; i < whole_tasks; ++i) {
    AttentionTask task = tasks_[static_cast<size_t>(i)];
    if (!can_split(task)) continue;
    task.partial = partial;
    partial += partial_floats(task);
    merges_.push_back(task);
    const int64_t first = task.segment_begin, count = task.segment_end - first;
    const int64_t piece_count = std::min(pieces, count);
    const int64_t floats_per_segment = partial_floats(task) / count;
    for (int64_t piece = 0; piece < piece_count; ++piece) {
      AttentionTask part = task;
      part.segment_begin = first + count * piece / piece_count;
      part.segment_end = first + count * (piece + 1) / piece_count;
      part.partial = task.partial + (part.segment_begin - first) * floats_per_segment;
      if (piece == 0) {
        tasks_[static_cast<size_t>(i)] = part;
      } else {
        tasks_.push_back(part);
      }
    }
  }
}

void CpuKernels::attention(const AttentionArgs& args) {
  const KvLayerView& kv = args.kv;
  BATON_CHECK(validate_attention_shape(args.heads, kv.kv_heads, kv.head_dim).ok())
      << validate_attention_shape(args.heads, kv.kv_heads, kv.head_dim).to_string();
  tasks_.clear();
  const int heads = heads_per_task(args);
  for (const SequenceSlice& sequence : args.sequences) add_attention_tasks(args, sequence, heads);
  if (tasks_.empty()) return;
  split_attention_tasks();

  // The longest first, so that no thread begins a long one when the others are done.
  const auto cost = [](const AttentionTask& task) {
    return (task.segment_end - task.segment_begin) * (task.token_end - task.token_begin) * task.kv_heads;
  };
  std::sort(tasks_.begin(), tasks_.end(),
            [&](const AttentionTask& a, const AttentionTask& b) { return cost(a) > cost(b); });

  const int64_t group = args.heads / kv.kv_heads;
  const size_t scratch_bytes =
      ops_.attention_scratch_bytes(static_cast<int>(std::max(kAttentionRows, group)), kv.head_dim);
  const auto body = [&](int64_t begin, int64_t end, int thread) {
    void* const scratch = thread_scratch_[static_cast<size_t>(thread)].reserve(scratch_bytes);
    for (int64_t i = begin; i < end; ++i) {
      tasks_[static_cast<size_t>(i)].scratch = scratch;
      ops_.attention(tasks_[static_cast<size_t>(i)]);
    }
  };
  threads_.parallel_for(static_cast<int64_t>(tasks_.size()), 1, std::cref(body));
  for (const AttentionTask& merge : merges_) ops_.attention_merge(merge);
}

const IsaOps* find_isa(std::string_view isa) {
#if defined(BATON_CPU_X86)
  const bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512bf16");
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  if (avx512 && (isa == "auto" || isa == "avx512bf16")) return &kAvx512Bf16Ops;
  if (avx2 && (isa == "auto" || isa == "avx2")) return &kAvx2Ops;
#endif
  return isa == "auto" || isa == "plain" ? &kPlainOps : nullptr;
}

}  // namespace
}  // namespace cpu

Result<std::unique_ptr<Kernels>> make_cpu_kernels(std::string_view isa, int threads) {
  if (isa != "auto" && isa != "avx512bf16" && isa != "avx2" && isa != "plain") {
    return invalid_argument("unknown CPU instruction set '{}': expected auto, avx512bf16, avx2 or plain", isa);
  }
  constexpr int kMaxThreads = 1024;
  if (threads < 0 || threads > kMaxThreads) {
    return invalid_argument("{} threads: expected 0 (all CPUs) to {}", threads, kMaxThreads);
  }
  const cpu::IsaOps* const ops = cpu::find_isa(isa);
  if (ops == nullptr) return unimplemented("this CPU has no {}; use --isa auto", isa);
  try {
    return std::unique_ptr<Kernels>(std::make_unique<cpu::CpuKernels>(*ops, threads));
  } catch (const std::system_error& error) {
    return resource_exhausted("cannot start {} kernel threads: {}", threads, error.what());
  }
}

}  // namespace baton
