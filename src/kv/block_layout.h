#pragma once

#include <cstdint>
#include <string>

#include "base/status.h"

namespace baton {

/// How the KV cache of a model lies in memory. A block is `block_tokens` tokens of all layers, contiguous:
///   [layer][K|V][kv_head][tokens' vectors]
/// so a whole block is one range, one layer of it is one range, and one head of it is a smaller one. The order inside a head is
/// the kernels': `order`.
struct BlockLayout {
  static constexpr int kVersion = 2;  ///< 1 had [token][head_dim] in both

  std::string model_id;       ///< what both sides must agree on: name and a hash of config and weights' header
  int32_t layers = 0;
  int32_t kv_heads = 0;
  int32_t head_dim = 0;
  int32_t block_tokens = 16;
  std::string dtype = "bf16";
  std::string order = "pairs";  ///< inside a head: "pairs" (the CPU's kernels), "rows" ([token][head_dim], a GPU's)
  int32_t element_bytes = 2;

  int64_t plane_bytes() const {  ///< K or V of one layer
    return int64_t{kv_heads} * block_tokens * head_dim * element_bytes;
  }
  int64_t layer_bytes() const { return 2 * plane_bytes(); }
  int64_t block_bytes() const { return layers * layer_bytes(); }
  int64_t layer_offset_bytes(int32_t layer) const { return layer * layer_bytes(); }
  int64_t tokens_to_blocks(int64_t tokens) const { return (tokens + block_tokens - 1) / block_tokens; }

  Status validate() const;
  /// A readable line with every field; equal fingerprints mean bytes can be moved as they are.
  std::string fingerprint() const;
  /// ok, or failed_precondition naming the first fields that differ with both values.
  Status check_compatible(const std::string& other_fingerprint) const;
};

}  // namespace baton
