#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "base/status.h"
#include "model/safetensors.h"
#include "model/weight_source.h"

namespace baton {

/// The weights of a model folder: model.safetensors, or the shards that model.safetensors.index.json names.
class Checkpoint final : public WeightSource {
 public:
  static Result<std::unique_ptr<Checkpoint>> open(const std::filesystem::path& model_dir);

  Result<WeightView> fetch(const std::string& name, std::span<const int64_t> shape, WeightInit init) override;
  void release() override;
  /// Refuses a checkpoint with tensors that nobody fetched (a bias the config does not have, another architecture):
  /// leaving them out would give a different model. rotary tables and a tied lm_head are harmless.
  Status finish() override;
  uint64_t identity() const override;

 private:
  struct Location {
    size_t file;
    const SafetensorInfo* info;
  };

  Status add_file(const std::filesystem::path& path);
  Status open_index(const std::filesystem::path& model_dir);

  std::string directory_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, Location, std::less<>> tensors_;
  std::map<std::string, uint64_t> hashes_;           // of those fetched
  std::vector<Location> fetched_;                    // since release()
  std::vector<std::vector<std::byte>> copies_;       // of those whose data is not aligned
};

/// Parses model.safetensors.index.json: tensor name -> file name. File names must be plain names.
Status parse_safetensors_index(std::string_view file_name, std::string_view text,
                               std::map<std::string, std::string>* files_of_tensors);

}  // namespace baton
