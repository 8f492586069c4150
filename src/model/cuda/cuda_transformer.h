#pragma once

#include <array>
#include <map>
#include <memory>
#include <span>
#include <string>

#include "kernels/cuda/cuda_kernels.h"
#include "kernels/cuda/cuda_linear.h"
#include "kernels/cuda/cuda_sampler.h"
#include "model/cuda/cuda_model.h"
#include "model/cuda/cuda_weights.h"
#include "model/cuda/event_pool.h"
#include "model/cuda/step_buffer.h"
#include "model/rope.h"

namespace baton {

/// The decoder of model/transformer.h on a GPU. A step of decoding alone is replayed as a CUDA graph, one for each size of
/// batch (rounded up); every other step is launched as it comes. All steps are on one stream; two may be under way, and the second
/// one then takes its tokens from where the first one puts them.
class CudaTransformer final : public Model {
 public:
  struct Parts {
    ModelConfig config;
    std::string model_id;
    int32_t max_model_len = 0;
    double memory_utilization = 0.9;
    bool batch_invariant = false;
    std::shared_ptr<const cuda::Gpu> gpu;
    std::unique_ptr<cuda::CudaKernels> kernels;
    std::unique_ptr<cuda::CudaLinear> linear;
    std::unique_ptr<cuda::CudaSampler> sampler;
    std::unique_ptr<CudaWeightStore> store;  // what `weights` points into
    CudaWeights weights;
  };
  static Result<std::unique_ptr<CudaTransformer>> create(Parts parts, const RopeTables& rope);
  ~CudaTransformer() override;

  const ModelConfig& config() const override { return config_; }
  BlockLayout layout(int32_t block_tokens) const override;
  int64_t weight_bytes() const override { return parts_.weights.bytes; }
  int32_t max_model_len() const override { return parts_.max_model_len; }
  Status forward(const ForwardBatch& batch, float* logits) override;
  bool can_choose(size_t edits) const override { return edits <= kMaxEdits; }
  bool runs_ahead() const override { return true; }
  Status launch(const ForwardBatch& batch, float* logits) override;
  Status finish() override;
  bool mostly_done() const override;
  std::string device_name() const override { return std::string(parts_.kernels->name()); }
  /// Of a copy inside the GPU, reading and writing together.
  Result<double> measure_read_bytes_per_s() override;
  int32_t usual_batched_tokens() const override { return 8192; }
  Status prepare(const BatchLimits& limits) override;
  int64_t spare_kv_bytes() const override;
  Result<std::unique_ptr<Memory>> allocate_kv(size_t bytes) override;
  Result<std::unique_ptr<Memory>> allocate_logits(size_t bytes) override;

 private:
  /// Of logits, in a step: some sequences with penalties over all of what they have said.
  static constexpr size_t kMaxEdits = size_t{1} << 17;

  /// Pointers into `memory_`, for `rows` rows and `logit_rows` of them with logits.
  struct Workspace {
    int64_t rows = 0, logit_rows = 0;
    float* x = nullptr;          // [rows, hidden]: the residual stream
    bf16* normed = nullptr;      // [rows, hidden]
    bf16* qkv = nullptr;         // [rows, (heads + 2 * kv_heads) * head_dim]
    bf16* q = nullptr;           // [rows, heads * head_dim]
    bf16* attended = nullptr;    // [rows, heads * head_dim]
    bf16* gate_up = nullptr;     // [rows, 2 * intermediate]
    bf16* act = nullptr;         // [rows, intermediate]
    float* kept_x = nullptr;     // [logit_rows, hidden]
    bf16* kept_q = nullptr;      // [logit_rows, heads * head_dim]
    float* logits = nullptr;     // [logit_rows, vocab]
    int32_t* chosen = nullptr;   // [logit_rows]
    cuda::CUdeviceptr decode = 0;
  };

  /// A step that was launched and not finished.
  struct Flight {
    cuda::CUevent mostly_done = nullptr, ended = nullptr;
    bool marked = false;         // it has recorded mostly_done
    cuda::PinnedMemory fetched;  // [logit_rows] int32: what was chosen
    std::span<int32_t> chosen;   // where that goes; empty: logits were asked for
  };
  static constexpr size_t kFlights = 2;

  explicit CudaTransformer(Parts parts) : parts_(std::move(parts)), config_(parts_.config) {}
  Status init(const RopeTables& rope);
  Status check(cuda::CUresult result, std::string_view call) const { return parts_.gpu->driver().check(result, call); }

  Status reserve(const StepCapacity& needed);
  Status tune_large_steps();
  bool is_decode(const ForwardBatch& batch) const;
  Status decode_step(const ForwardBatch& batch);
  Status mixed_step(const ForwardBatch& batch, int32_t tile_tokens, Flight* flight);
  Result<cuda::CUgraphExec> capture(const StepPlan& plan, const ForwardBatch& batch);
  /// `mark`: recorded when seven eighths are done; may be null.
  Status compute(const StepPlan& plan, const ForwardBatch& batch, cuda::CUevent mark);
  Status attend(const StepPlan& plan, const cuda::Attention& args, const cuda::DeviceKv& kv);
  /// y = bf16(norm(x)) W^T, in one kernel where there are few rows.
  Status normed_product(const float* x, int64_t rows, const CudaVector& norm, const CudaMatrix& weight, cuda::LinearOutput output, void* y);
  Status mlp(const CudaLayer& layer, float* x, int64_t rows);
  Status head(const StepPlan& plan, const float* x);
  Status product(const CudaMatrix& weight, int64_t rows, cuda::LinearOutput output, const bf16* x, void* y);
  Status fetch(const ForwardBatch& batch, float* logits, Flight* flight);
  void drop_graphs();

  Parts parts_;
  const ModelConfig& config_;
  cuda::CUstream stream_ = nullptr;
  std::shared_ptr<EventPool> events_;
  cuda::DeviceMemory rope_;                // cos, then sin: [max_model_len, head_dim / 2] each
  cuda::DeviceMemory memory_;
  Workspace work_;
  StepCapacity capacity_;
  StepBuffer mixed_step_, decode_step_;
  std::array<Flight, kFlights> flights_;   // taken in turn
  size_t next_flight_ = 0, under_way_ = 0;
  std::map<int32_t, cuda::CUgraphExec> graphs_;  // by rows
  const std::byte* graphs_pool_ = nullptr; // what they were made for
  int32_t graphs_block_tokens_ = 0;
};

}  // namespace baton
