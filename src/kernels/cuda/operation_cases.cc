#include "kernels/cuda/operation_cases.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <span>
#include <utility>

#include "kernels/cuda/cuda_sampler.h"
#include "kernels/cuda/operation_case_parts.h"

namespace baton::cuda {
namespace {

class EmbedCase final : public SimpleCase<float> {
 public:
  EmbedCase(CudaKernels& kernels, int64_t rows, int64_t hidden, int64_t vocab)
      : SimpleCase(kernels, "embed", fmt::format("{} x {}", rows, hidden)), hidden_(hidden), vocab_(vocab) {
    Random random(11);
    tokens_.resize(static_cast<size_t>(rows));
    for (int32_t& token : tokens_) token = static_cast<int32_t>(random.below(static_cast<uint64_t>(vocab)));
    if (rows > 2) tokens_[1] = -1;
    // Every third row's token is one that an earlier step chose, from the last row on.
    chosen_.assign(tokens_.rbegin(), tokens_.rend());
    given_ = tokens_;
    for (size_t m = 0; m < given_.size(); ++m) {
      if (m % 3 == 0 || tokens_[m] < 0) given_[m] = -static_cast<int32_t>(given_.size() - m);
    }
    bytes_ = rows * hidden * 6;
  }
  Status init() {
    Random random(12);
    BATON_ASSIGN_OR_RETURN(table_, Array<bf16>::random(gpu(), random, static_cast<size_t>(vocab_ * hidden_)));
    BATON_ASSIGN_OR_RETURN(device_tokens_, Array<int32_t>::upload(gpu(), given_));
    BATON_ASSIGN_OR_RETURN(device_chosen_, Array<int32_t>::upload(gpu(), chosen_));
    BATON_ASSIGN_OR_RETURN(out_, Array<float>::allocate(gpu(), tokens_.size() * static_cast<size_t>(hidden_)));
    return Status();
  }
  Status launch(CUstream stream) override {
    StepView step = {};
    step.tokens = device_tokens_.data();
    step.rows = static_cast<int32_t>(tokens_.size());
    return kernels_.embed(stream, step, device_chosen_.data(), table_.data(), hidden_, out_.data());
  }

 private:
  std::vector<float> reference() override {
    auto table = table_.download();
    BATON_CHECK(table.ok());
    std::vector<float> expected(out_.size());
    for (size_t m = 0; m < tokens_.size(); ++m) {
      for (int64_t i = 0; i < hidden_ && tokens_[m] >= 0; ++i) {
        expected[m * static_cast<size_t>(hidden_) + static_cast<size_t>(i)] =
            static_cast<float>((*table)[static_cast<size_t>(tokens_[m] * hidden_ + i)]);
      }
    }
    return expected;
  }

  int64_t hidden_, vocab_;
  std::vector<int32_t> tokens_, chosen_, given_;  // given_: what the step says, tokens_ or where in chosen_ they are
  Array<bf16> table_;
  Array<int32_t> device_tokens_, device_chosen_;
};

class RmsNormCase final : public SimpleCase<bf16> {
 public:
  RmsNormCase(CudaKernels& kernels, int64_t rows, int64_t hidden)
      : SimpleCase(kernels, "rms_norm", fmt::format("{} x {}", rows, hidden)), rows_(rows), hidden_(hidden) {
    bytes_ = rows * hidden * 6;
    bound_ = kOneRounding;
  }
  Status init() {
    Random random(21);
    BATON_ASSIGN_OR_RETURN(x_, Array<float>::random(gpu(), random, static_cast<size_t>(rows_ * hidden_), 3));
    BATON_ASSIGN_OR_RETURN(weight_, Array<float>::random(gpu(), random, static_cast<size_t>(hidden_), 2));
    BATON_ASSIGN_OR_RETURN(out_, Array<bf16>::allocate(gpu(), static_cast<size_t>(rows_ * hidden_)));
    return Status();
  }
  Status launch(CUstream stream) override {
    return kernels_.rms_norm(stream, x_.data(), rows_, hidden_, weight_.data(), kEps, out_.data());
  }

 private:
  static constexpr float kEps = 1e-5f;
  std::vector<bf16> reference() override {
    auto x = x_.download();
    auto weight = weight_.download();
    BATON_CHECK(x.ok() && weight.ok());
    std::vector<bf16> expected(out_.size());
    cpu_kernels()->rms_norm(x->data(), rows_, hidden_, weight->data(), kEps, expected.data());
    return expected;
  }

  int64_t rows_, hidden_;
  Array<float> x_, weight_;
};

class SiluMulCase final : public SimpleCase<bf16> {
 public:
  SiluMulCase(CudaKernels& kernels, int64_t rows, int64_t inter, bool bias)
      : SimpleCase(kernels, "silu_mul", fmt::format("{} x {}{}", rows, inter, bias ? " bias" : "")),
        rows_(rows), inter_(inter), with_bias_(bias) {
    bytes_ = rows * inter * 6;
    bound_ = {1e-5, 1.0 / 100};
  }
  Status init() {
    Random random(31);
    BATON_ASSIGN_OR_RETURN(gate_up_, Array<bf16>::random(gpu(), random, static_cast<size_t>(rows_ * 2 * inter_), 8));
    BATON_ASSIGN_OR_RETURN(bias_, Array<float>::random(gpu(), random, static_cast<size_t>(2 * inter_)));
    BATON_ASSIGN_OR_RETURN(out_, Array<bf16>::allocate(gpu(), static_cast<size_t>(rows_ * inter_)));
    return Status();
  }
  Status launch(CUstream stream) override {
    return kernels_.silu_mul(stream, gate_up_.data(), with_bias_ ? bias_.data() : nullptr, rows_, inter_, out_.data());
  }

 private:
  std::vector<bf16> reference() override {
    auto gate_up = gate_up_.download();
    auto bias = bias_.download();
    BATON_CHECK(gate_up.ok() && bias.ok());
    std::vector<float> values(gate_up->size());
    for (size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>((*gate_up)[i]) + (with_bias_ ? (*bias)[i % bias->size()] : 0.0f);
    }
    std::vector<bf16> expected(out_.size());
    cpu_kernels()->silu_mul(values.data(), rows_, inter_, expected.data());
    return expected;
  }

  int64_t rows_, inter_;
  bool with_bias_;
  Array<bf16> gate_up_;
  Array<float> bias_;
};

class AddBiasCase final : public SimpleCase<float> {
 public:
  AddBiasCase(CudaKernels& kernels, int64_t rows, int64_t width)
      : SimpleCase(kernels, "add_bias", fmt::format("{} x {}", rows, width)), rows_(rows), width_(width) {
    bytes_ = rows * width * 8;
  }
  Status init() {
    Random random(41);
    x_ = random_values<float>(random, static_cast<size_t>(rows_ * width_));
    bias_ = random_values<float>(random, static_cast<size_t>(width_));
    BATON_ASSIGN_OR_RETURN(device_bias_, Array<float>::upload(gpu(), bias_));
    BATON_ASSIGN_OR_RETURN(out_, Array<float>::upload(gpu(), x_));
    return Status();
  }
  Status launch(CUstream stream) override { return kernels_.add_bias(stream, out_.data(), rows_, width_, device_bias_.data()); }

 private:
  Status reset() override {
    BATON_ASSIGN_OR_RETURN(out_, Array<float>::upload(gpu(), x_));
    return Status();
  }
  std::vector<float> reference() override {
    std::vector<float> expected = x_;
    for (size_t i = 0; i < expected.size(); ++i) expected[i] += bias_[i % bias_.size()];
    return expected;
  }

  int64_t rows_, width_;
  std::vector<float> x_, bias_;
  Array<float> device_bias_;
};

class GatherRowsCase final : public SimpleCase<int32_t> {
 public:
  GatherRowsCase(CudaKernels& kernels, int64_t rows, int64_t row_bytes)
      : SimpleCase(kernels, "gather_rows", fmt::format("{} x {} B", rows, row_bytes)), width_(static_cast<size_t>(row_bytes) / 4) {
    Random random(51);
    from_.resize(static_cast<size_t>(2 * rows + 1) * width_);
    for (int32_t& value : from_) value = static_cast<int32_t>(random());
    index_.resize(static_cast<size_t>(rows));
    for (int32_t& row : index_) row = static_cast<int32_t>(random.below(static_cast<uint64_t>(2 * rows + 1)));
    if (rows > 2) index_[1] = -1;
    bytes_ = 2 * rows * row_bytes;
  }
  Status init() {
    BATON_ASSIGN_OR_RETURN(device_from_, Array<int32_t>::upload(gpu(), from_));
    BATON_ASSIGN_OR_RETURN(device_index_, Array<int32_t>::upload(gpu(), index_));
    BATON_ASSIGN_OR_RETURN(out_, Array<int32_t>::allocate(gpu(), index_.size() * width_));
    return Status();
  }
  Status launch(CUstream stream) override {
    return kernels_.gather_rows(stream, device_from_.data(), static_cast<int64_t>(width_ * 4), device_index_.data(),
                                static_cast<int64_t>(index_.size()), out_.data());
  }

 private:
  std::vector<int32_t> reference() override {
    std::vector<int32_t> expected(out_.size());
    for (size_t m = 0; m < index_.size(); ++m) {
      if (index_[m] < 0) continue;
      std::copy_n(from_.begin() + index_[m] * static_cast<ptrdiff_t>(width_), width_,
                  expected.begin() + static_cast<ptrdiff_t>(m * width_));
    }
    return expected;
  }

  size_t width_;
  std::vector<int32_t> from_, index_;
  Array<int32_t> device_from_, device_index_;
};

class ArgmaxCase final : public SimpleCase<int32_t> {
 public:
  ArgmaxCase(CudaKernels& kernels, int64_t rows, int64_t vocab)
      : SimpleCase(kernels, "argmax", fmt::format("{} x {}", rows, vocab)), rows_(rows), vocab_(vocab) {
    Random random(61);
    logits_ = random_values<float>(random, static_cast<size_t>(rows * vocab), 10);
    constexpr float kInfinity = std::numeric_limits<float>::infinity();
    for (int64_t m = 1; m < rows; ++m) {
      const auto somewhere = [&] { return static_cast<size_t>(m * vocab) + random.below(static_cast<uint64_t>(vocab)); };
      const auto row = std::span(logits_).subspan(static_cast<size_t>(m * vocab), static_cast<size_t>(vocab));
      switch (m % 8) {
        case 1: logits_[somewhere()] = logits_[somewhere()] = logits_[somewhere()] = 11; break;  // a tie
        case 2: logits_[somewhere()] = std::numeric_limits<float>::quiet_NaN(); break;
        case 3: logits_[somewhere()] = kInfinity; break;
        case 4: std::ranges::fill(row, -kInfinity); break;
        case 5: std::ranges::fill(row, -kInfinity), logits_[somewhere()] = -1e30f; break;
        case 6: row.back() = 12; break;
        default: break;
      }
    }
    bytes_ = rows * vocab * 4;
  }
  Status init() {
    BATON_ASSIGN_OR_RETURN(device_logits_, Array<float>::upload(gpu(), logits_));
    BATON_ASSIGN_OR_RETURN(out_, Array<int32_t>::allocate(gpu(), static_cast<size_t>(rows_)));
    return Status();
  }
  Status launch(CUstream stream) override { return kernels_.argmax(stream, device_logits_.data(), rows_, vocab_, out_.data()); }

 private:
  std::vector<int32_t> reference() override {
    std::vector<int32_t> expected;
    for (int64_t m = 0; m < rows_; ++m) {
      const auto row = std::span(logits_).subspan(static_cast<size_t>(m * vocab_), static_cast<size_t>(vocab_));
      const bool sane = std::ranges::all_of(row, [](float v) { return v <= std::numeric_limits<float>::max(); });
      expected.push_back(sane ? static_cast<int32_t>(std::ranges::max_element(row) - row.begin()) : -1);
    }
    return expected;
  }

  int64_t rows_, vocab_;
  std::vector<float> logits_;
  Array<float> device_logits_;
};

class SampleCase final : public SimpleCase<int32_t> {
 public:
  SampleCase(CudaKernels& kernels, int64_t rows, int64_t vocab, bool limited)
      : SimpleCase(kernels, "sample", fmt::format("{} x {}{}", rows, vocab, limited ? " top-k top-p" : "")), rows_(rows), vocab_(vocab) {
    Random random(81);
    logits_.resize(static_cast<size_t>(rows * vocab));
    for (size_t i = 0; i < logits_.size(); ++i) {
      // Roughly normal; of many rows most are the first one's, shifted.
      const auto width = static_cast<size_t>(vocab);
      logits_[i] = i < 2 * width ? static_cast<float>((random.uniform() + random.uniform() + random.uniform() - 1.5) * 12)
                                 : logits_[i - width - 1];
    }
    for (int64_t m = 0; m < rows; ++m) {
      SampleRow row = {};
      row.uniform = random.uniform();
      row.scale = 1.0f / 0.8f;
      row.top_p = limited ? 0.9f : 1.0f;
      row.top_k = limited ? 50 : 0;
      row.min_p_offset = -std::numeric_limits<float>::infinity();
      row.edit_begin = static_cast<int32_t>(edits_.size());
      row.edit_count = static_cast<int32_t>(std::min<int64_t>(vocab, 20));
      for (int32_t i = 0; i < row.edit_count; ++i) edits_.push_back({i, 0.5f, 1.25f, 0.25f, 0.125f});
      how_.push_back(row);
    }
    bytes_ = rows * vocab * 4;
  }
  Status init() {
    BATON_ASSIGN_OR_RETURN(sampler_, CudaSampler::create(gpu()));
    BATON_ASSIGN_OR_RETURN(device_logits_, Array<float>::upload(gpu(), logits_));
    BATON_ASSIGN_OR_RETURN(device_how_, Array<SampleRow>::upload(gpu(), how_));
    BATON_ASSIGN_OR_RETURN(device_edits_, Array<SampleEdit>::upload(gpu(), edits_));
    BATON_ASSIGN_OR_RETURN(out_, Array<int32_t>::allocate(gpu(), how_.size()));
    return Status();
  }
  Status launch(CUstream stream) override {
    return sampler_->sample(stream, device_logits_.data(), rows_, vocab_, device_how_.data(), device_edits_.data(), out_.data());
  }

 private:
  Status reset() override {
    BATON_ASSIGN_OR_RETURN(device_logits_, Array<float>::upload(gpu(), logits_));
    return out_.poison();
  }
  /// By sorting, in double.
  std::vector<int32_t> reference() override {
    std::vector<int32_t> expected;
    for (size_t m = 0; m < how_.size(); ++m) {
      const SampleRow& how = how_[m];
      const auto width = static_cast<size_t>(vocab_);
      std::vector<float> logits(logits_.begin() + static_cast<ptrdiff_t>(m * width), logits_.begin() + static_cast<ptrdiff_t>((m + 1) * width));
      for (int32_t i = 0; i < how.edit_count; ++i) {
        const SampleEdit& edit = edits_[static_cast<size_t>(how.edit_begin + i)];
        float& logit = logits[static_cast<size_t>(edit.token)];
        logit += edit.bias;
        logit = logit > 0 ? logit / edit.repetition : logit * edit.repetition;
        logit = logit - edit.frequency - edit.presence;
      }
      std::vector<int32_t> order(width);
      std::iota(order.begin(), order.end(), 0);
      std::ranges::stable_sort(order, std::greater<>(), [&](int32_t i) { return logits[static_cast<size_t>(i)]; });
      const auto weight = [&](int32_t i) {
        return std::exp(static_cast<double>((logits[static_cast<size_t>(i)] - logits[static_cast<size_t>(order[0])]) * how.scale));
      };
      size_t kept = width;
      if (how.top_k > 0 && static_cast<size_t>(how.top_k) < width) {
        kept = static_cast<size_t>(how.top_k);
        const float least = logits[static_cast<size_t>(order[kept - 1])];
        while (kept < width && logits[static_cast<size_t>(order[kept])] == least) ++kept;
      }
      double mass = 0, passed = 0;
      for (size_t i = 0; i < kept; ++i) mass += weight(order[i]);
      for (size_t i = 0; i < kept && how.top_p < 1; ++i) {
        passed += weight(order[i]);
        if (passed >= static_cast<double>(how.top_p) * mass) kept = i + 1;
      }
      order.resize(kept);
      std::ranges::sort(order);
      mass = passed = 0;
      for (const int32_t i : order) mass += weight(i);
      int32_t chosen = 0;
      for (const int32_t i : order) {
        chosen = i;
        passed += weight(i);
        if (passed > how.uniform * mass) break;
      }
      expected.push_back(chosen);
    }
    return expected;
  }

  int64_t rows_, vocab_;
  std::vector<float> logits_;
  std::vector<SampleRow> how_;
  std::vector<SampleEdit> edits_;
  std::unique_ptr<CudaSampler> sampler_;
  Array<float> device_logits_;
  Array<SampleRow> device_how_;
  Array<SampleEdit> device_edits_;
};

}  // namespace

CaseResult embed_case(CudaKernels& kernels, int64_t rows, int64_t hidden, int64_t vocab) {
  return make_case<EmbedCase>(kernels, rows, hidden, vocab);
}
CaseResult rms_norm_case(CudaKernels& kernels, int64_t rows, int64_t hidden) { return make_case<RmsNormCase>(kernels, rows, hidden); }
CaseResult silu_mul_case(CudaKernels& kernels, int64_t rows, int64_t inter, bool bias) {
  return make_case<SiluMulCase>(kernels, rows, inter, bias);
}
CaseResult add_bias_case(CudaKernels& kernels, int64_t rows, int64_t width) { return make_case<AddBiasCase>(kernels, rows, width); }
CaseResult gather_rows_case(CudaKernels& kernels, int64_t rows, int64_t row_bytes) {
  return make_case<GatherRowsCase>(kernels, rows, row_bytes);
}
CaseResult argmax_case(CudaKernels& kernels, int64_t rows, int64_t vocab) { return make_case<ArgmaxCase>(kernels, rows, vocab); }
CaseResult sample_case(CudaKernels& kernels, int64_t rows, int64_t vocab, bool limited) {
  return make_case<SampleCase>(kernels, rows, vocab, limited);
}

}  // namespace baton::cuda
