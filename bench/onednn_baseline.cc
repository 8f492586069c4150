#include "onednn_baseline.h"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstring>
#include <oneapi/dnnl/dnnl.hpp>
#include <unordered_map>
#include <vector>

#include "base/random.h"
#include "tensor/dtype.h"

namespace baton {
namespace {

using dnnl::memory;

/// y[rows, out] = x[rows, in] W^T for one number of rows and one weight matrix.
class Product {
 public:
  Product(dnnl::engine& engine, dnnl::stream& stream, int64_t rows, int64_t in, int64_t out,
          const memory& plain_weight)
      : stream_(stream) {
    const memory::desc x({rows, in}, memory::data_type::bf16, memory::format_tag::ab);
    const memory::desc w({in, out}, memory::data_type::bf16, memory::format_tag::any);
    const memory::desc y({rows, out}, memory::data_type::f32, memory::format_tag::ab);
    const dnnl::matmul::primitive_desc desc(dnnl::matmul::desc(x, w, y), engine);
    implementation_ = desc.impl_info_str();
    product_ = dnnl::matmul(desc);
    x_ = memory(desc.src_desc(), engine);
    w_ = memory(desc.weights_desc(), engine);
    y_ = memory(desc.dst_desc(), engine);
    memory source = plain_weight;
    dnnl::reorder(source, w_).execute(stream, source, w_);
    stream.wait();
  }
  void run() {
    product_.execute(stream_, {{DNNL_ARG_SRC, x_}, {DNNL_ARG_WEIGHTS, w_}, {DNNL_ARG_DST, y_}});
    stream_.wait();
  }
  bf16* x() { return static_cast<bf16*>(x_.get_data_handle()); }
  const float* y() { return static_cast<const float*>(y_.get_data_handle()); }
  const std::string& implementation() const { return implementation_; }

 private:
  dnnl::stream& stream_;
  dnnl::matmul product_;
  memory x_, w_, y_;
  std::string implementation_;
};

}  // namespace

void bench_onednn() {
  dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const dnnl_version_t* const version = dnnl_version();
  fmt::print("\noneDNN {}.{}.{} matmul, bf16 x bf16 -> f32\n", version->major, version->minor, version->patch);
  fmt::print("{:>7} {:>6} {:>5} {:>10} {:>8} {:>9}  {}\n", "out", "in", "rows", "ms", "GB/s", "GFLOP/s",
             "row 0 as in a batch of 1");
  struct Shape {
    int64_t out, in;
  };
  for (const auto& [out, in] : {Shape{4096, 1024}, Shape{1024, 2048}, Shape{6144, 1024}, Shape{1024, 3072}}) {
    // Our weights are [out, in]: to oneDNN a transposed [in, out].
    memory plain({{in, out}, memory::data_type::bf16, memory::format_tag::ba}, engine);
    Random random(1);
    auto* const weights = static_cast<bf16*>(plain.get_data_handle());
    for (int64_t i = 0; i < in * out; ++i) weights[i] = bf16(static_cast<float>(random.uniform() - 0.5));
    std::vector<float> single(static_cast<size_t>(out));
    for (const int64_t rows : {1, 4, 16, 64, 512}) {
      // As in our own benchmark: enough copies that few rows find their weights in memory, not in the cache.
      const int64_t copies = rows >= 64 ? 4 : std::max<int64_t>(2, (int64_t{256} << 20) / (out * in * 2));
      std::vector<Product> products;
      products.reserve(static_cast<size_t>(copies));
      for (int64_t i = 0; i < copies; ++i) products.emplace_back(engine, stream, rows, in, out, plain);
      for (Product& product : products) {
        Random values(2);
        for (int64_t i = 0; i < rows * in; ++i) product.x()[i] = bf16(static_cast<float>(values.uniform() - 0.5));
      }
      std::vector<double> times;
      for (int pass = 0; pass < 8; ++pass) {
        const auto start = std::chrono::steady_clock::now();
        for (Product& product : products) product.run();
        const std::chrono::duration<double> took = std::chrono::steady_clock::now() - start;
        if (pass > 0) times.push_back(took.count() / static_cast<double>(copies));
      }
      std::sort(times.begin(), times.end());
      const double time = times[times.size() / 2];
      if (rows == 1) std::memcpy(single.data(), products[0].y(), single.size() * sizeof(float));
      const bool same = std::memcmp(single.data(), products[0].y(), single.size() * sizeof(float)) == 0;
      fmt::print("{:>7} {:>6} {:>5} {:>10.3f} {:>8.1f} {:>9.1f}  {} ({})\n", out, in, rows, time * 1e3,
                 static_cast<double>(out * in * 2) / time / 1e9,
                 2.0 * static_cast<double>(rows * out * in) / time / 1e9, same ? "same bits" : "other bits",
                 products[0].implementation());
    }
  }
}

}  // namespace baton
