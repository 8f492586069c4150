#include "model/rope.h"

#include <algorithm>
#include <cmath>
#include <numbers>

namespace baton {
namespace {

constexpr double kTwoPi = 2.0 * std::numbers::pi;

/// Long wavelengths are stretched by `factor`, short ones left alone, those between interpolated.
void scale_llama3(const RopeConfig& config, std::vector<double>* inverse_frequencies) {
  const auto original = static_cast<double>(config.original_max_positions);
  const double low_wavelength = original / config.low_freq_factor;
  const double high_wavelength = original / config.high_freq_factor;
  for (double& frequency : *inverse_frequencies) {
    const double wavelength = kTwoPi / frequency;
    if (wavelength > low_wavelength) {
      frequency /= config.factor;
    } else if (wavelength >= high_wavelength) {
      const double smooth =
          (original / wavelength - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor);
      frequency = (1.0 - smooth) * frequency / config.factor + smooth * frequency;
    }
  }
}

/// "NTK by parts": pairs that turn more than beta_fast times over the original context keep their frequency, those
/// below beta_slow are interpolated by `factor`, with a linear ramp over the pair index between.
void scale_yarn(const RopeConfig& config, int32_t head_dim, std::vector<double>* inverse_frequencies) {
  const double dim = head_dim;
  auto pair_with_turns = [&](double turns) {
    const auto original = static_cast<double>(config.original_max_positions);
    return dim * std::log(original / (turns * kTwoPi)) / (2.0 * std::log(config.theta));
  };
  double low = pair_with_turns(config.beta_fast);
  double high = pair_with_turns(config.beta_slow);
  if (config.truncate) {
    low = std::floor(low);
    high = std::ceil(high);
  }
  low = std::max(low, 0.0);
  high = std::min(high, dim - 1.0);
  if (low == high) high += 0.001;
  for (size_t i = 0; i < inverse_frequencies->size(); i++) {
    const double interpolated = std::clamp((static_cast<double>(i) - low) / (high - low), 0.0, 1.0);
    double& frequency = (*inverse_frequencies)[i];
    frequency = frequency / config.factor * interpolated + frequency * (1.0 - interpolated);
  }
}

double yarn_attention_factor(const RopeConfig& config) {
  auto magnitude = [&](double mscale) {
    return config.factor <= 1.0 ? 1.0 : 0.1 * mscale * std::log(config.factor) + 1.0;
  };
  if (config.attention_factor > 0.0) return config.attention_factor;
  if (config.mscale > 0.0 && config.mscale_all_dim > 0.0) {
    return magnitude(config.mscale) / magnitude(config.mscale_all_dim);
  }
  return magnitude(1.0);
}

}  // namespace

RopeFrequencies rope_frequencies(const RopeConfig& config, int32_t head_dim) {
  RopeFrequencies result;
  for (int32_t i = 0; i < head_dim / 2; i++) {
    result.inverse_frequencies.push_back(1.0 / std::pow(config.theta, 2.0 * i / head_dim));
  }
  switch (config.type) {
    case RopeConfig::Type::kDefault:
      break;
    case RopeConfig::Type::kLinear:
      for (double& frequency : result.inverse_frequencies) frequency /= config.factor;
      break;
    case RopeConfig::Type::kLlama3:
      scale_llama3(config, &result.inverse_frequencies);
      break;
    case RopeConfig::Type::kYarn:
      scale_yarn(config, head_dim, &result.inverse_frequencies);
      result.attention_factor = yarn_attention_factor(config);
      break;
  }
  return result;
}

Result<RopeTables> RopeTables::create(const RopeConfig& config, int32_t head_dim, int64_t max_positions) {
  RopeFrequencies frequencies = rope_frequencies(config, head_dim);
  RopeTables tables;
  tables.inverse_frequencies_.assign(frequencies.inverse_frequencies.begin(), frequencies.inverse_frequencies.end());
  tables.attention_factor_ = static_cast<float>(frequencies.attention_factor);
  tables.max_positions_ = max_positions;
  const size_t bytes = static_cast<size_t>(max_positions) * tables.inverse_frequencies_.size() * sizeof(float);
  BATON_ASSIGN_OR_RETURN(tables.cos_, Buffer::allocate(bytes));
  BATON_ASSIGN_OR_RETURN(tables.sin_, Buffer::allocate(bytes));
  return tables;
}

void RopeTables::ensure(int64_t positions, ThreadPool& threads) {
  constexpr int64_t kStep = 2048;  // about a millisecond
  BATON_CHECK(positions <= max_positions_) << positions << " of " << max_positions_;
  if (positions <= filled_) return;
  const int64_t end = std::min((positions + kStep - 1) / kStep * kStep, max_positions_);
  const size_t half = inverse_frequencies_.size();
  threads.parallel_for(end - filled_, 64, [&](int64_t first, int64_t last, int) {
    for (int64_t row = filled_ + first; row < filled_ + last; row++) {
      float* cos_row = cos_.as<float>() + static_cast<size_t>(row) * half;
      float* sin_row = sin_.as<float>() + static_cast<size_t>(row) * half;
      for (size_t i = 0; i < half; i++) {
        // The angle is rounded to float32 first, as it was when the models were trained.
        const float angle = static_cast<float>(row) * inverse_frequencies_[i];
        cos_row[i] = std::cos(angle) * attention_factor_;
        sin_row[i] = std::sin(angle) * attention_factor_;
      }
    }
  });
  filled_ = end;
}

RopeTable RopeTables::view() const { return {cos_.as<float>(), sin_.as<float>(), filled_}; }

}  // namespace baton
