#include "kv/block_layout.h"

#include <gtest/gtest.h>

namespace baton {
namespace {

BlockLayout qwen() {
  return {.model_id = "Qwen/Qwen3-0.6B@1234abcd", .layers = 28, .kv_heads = 8, .head_dim = 128,
          .block_tokens = 16, .dtype = "bf16", .element_bytes = 2};
}

TEST(BlockLayout, SizesFollowFromTheShape) {
  const BlockLayout layout = qwen();
  EXPECT_EQ(layout.plane_bytes(), 8 * 16 * 128 * 2);
  EXPECT_EQ(layout.block_bytes(), 28 * 2 * layout.plane_bytes());
  EXPECT_EQ(layout.layer_offset_bytes(3), 3 * layout.layer_bytes());
  EXPECT_EQ(layout.tokens_to_blocks(0), 0);
  EXPECT_EQ(layout.tokens_to_blocks(16), 1);
  EXPECT_EQ(layout.tokens_to_blocks(17), 2);
}

TEST(BlockLayout, FingerprintIsReadable) {
  EXPECT_EQ(qwen().fingerprint(),
            "baton-kv version=2 order=layer,kv,head,pairs dtype=bf16 element_bytes=2 layers=28 kv_heads=8 "
            "head_dim=128 block_tokens=16 model=Qwen/Qwen3-0.6B@1234abcd");
  EXPECT_TRUE(qwen().check_compatible(qwen().fingerprint()).ok());
}

TEST(BlockLayout, DifferencesAreNamedWithBothValues) {
  BlockLayout other = qwen();
  other.block_tokens = 32;
  other.dtype = "f16";
  const Status status = qwen().check_compatible(other.fingerprint());
  EXPECT_EQ(status.code(), StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(),
            "KV layouts differ, blocks cannot be moved as they are: dtype is bf16 here and f16 there; "
            "block_tokens is 16 here and 32 there");
}

TEST(BlockLayout, AModelNameCannotForgeFields) {
  BlockLayout tricky = qwen();
  tricky.model_id = "x layers=1 %20\n";
  EXPECT_EQ(tricky.fingerprint().find('\n'), std::string::npos);
  EXPECT_TRUE(tricky.check_compatible(tricky.fingerprint()).ok());
  BlockLayout plain = qwen();
  plain.model_id = std::string("x");  // a plain literal makes g++ 12 warn of its own header (GCC bug 105651)
  EXPECT_FALSE(plain.check_compatible(tricky.fingerprint()).ok());
}

TEST(BlockLayout, PeersNonsenseIsRefused) {
  const std::string own = qwen().fingerprint();
  for (const std::string& bad :
       {std::string(), std::string("hello"), std::string("baton-kv"), std::string("baton-kv x"), own + " extra=1",
        own + " ", std::string(100'000, 'a'), "baton-kv " + std::string(3000, '=')}) {
    const Status status = qwen().check_compatible(bad);
    EXPECT_FALSE(status.ok()) << bad.substr(0, 40);
    EXPECT_LT(status.message().size(), 2000u);
  }
}

TEST(BlockLayout, ValidateNamesTheFieldAndItsBounds) {
  EXPECT_TRUE(qwen().validate().ok());
  BlockLayout layout = qwen();
  layout.kv_heads = 0;
  EXPECT_EQ(layout.validate().message(), "KV layout: kv_heads = 0 is outside [1, 4096]");
  layout = qwen();
  layout.element_bytes = 4;
  EXPECT_FALSE(layout.validate().ok());
  layout = qwen();
  layout.model_id.clear();
  EXPECT_FALSE(layout.validate().ok());
  layout = qwen();
  layout.layers = layout.kv_heads = layout.head_dim = 4096;
  EXPECT_FALSE(layout.validate().ok());
}

}  // namespace
}  // namespace baton
