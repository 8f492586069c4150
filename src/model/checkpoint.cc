#include "model/checkpoint.h"

#include <algorithm>
#include <cstring>
#include <nlohmann/json.hpp>
#include <optional>

#include "model/config_reader.h"
#include "xxhash.h"

namespace baton {

using nlohmann::json;

namespace {

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";
constexpr size_t kMaxIndexBytes = 100'000'000;
constexpr size_t kMaxShards = 4096;
constexpr size_t kMaxShownName = 200;

/// A file next to the index, and nothing else: a checkpoint must not make us open other files.
bool is_plain_file_name(std::string_view name) {
  return !name.empty() && name.size() <= 255 && name.front() != '.' &&
         name.find_first_of(std::string_view("/\\\0", 3)) == std::string_view::npos;
}

/// dtype and shape alone are equal for every fine-tune of a model, so the values are sampled as well: the first
/// and the last 4 KiB, whose pages are about to be read anyway.
uint64_t hash_tensor(const std::string& name, const SafetensorInfo& info, std::span<const std::byte> data) {
  constexpr size_t kSampleBytes = 4096;
  const std::string head = fmt::format("{} {} {}", name, info.dtype, shape_text(info.shape));
  uint64_t hash = XXH3_64bits(head.data(), head.size());
  const size_t sample = std::min(kSampleBytes, data.size());
  hash = XXH3_64bits_withSeed(data.data(), sample, hash);
  return XXH3_64bits_withSeed(data.data() + data.size() - sample, sample, hash);
}

bool may_stay_unused(std::string_view name) {
  // Tables that transformers once stored, and the copy of tied embeddings.
  return name.ends_with("rotary_emb.inv_freq") || name == "lm_head.weight";
}

}  // namespace

Status parse_safetensors_index(std::string_view file_name, std::string_view text,
                               std::map<std::string, std::string>* files_of_tensors) {
  json object;
  BATON_RETURN_IF_ERROR(parse_json_object(text, file_name, &object));
  auto weight_map = object.find("weight_map");
  if (weight_map == object.end() || !weight_map->is_object() || weight_map->empty()) {
    return data_loss("{}: weight_map is missing, empty or no object", file_name);
  }
  if (weight_map->size() > SafetensorsFile::kMaxTensors) {
    return data_loss("{}: weight_map has {} tensors; at most {}", file_name, weight_map->size(),
                     SafetensorsFile::kMaxTensors);
  }
  for (const auto& [tensor, file] : weight_map->items()) {
    if (!file.is_string() || !is_plain_file_name(file.get_ref<const std::string&>())) {
      std::string shown = file.is_string() ? file.get<std::string>() : file.type_name();
      return data_loss("{}: tensor \"{}\" is said to be in \"{}\", which is no plain file name", file_name,
                       tensor.substr(0, kMaxShownName), shown.substr(0, kMaxShownName));
    }
    files_of_tensors->emplace(tensor, file.get<std::string>());
  }
  return {};
}

Status Checkpoint::add_file(const std::filesystem::path& path) {
  BATON_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::open(path));
  files_.push_back(std::move(file));
  return {};
}

Status Checkpoint::open_index(const std::filesystem::path& model_dir) {
  const std::filesystem::path path = model_dir / kIndexFile;
  BATON_ASSIGN_OR_RETURN(MappedFile mapping, MappedFile::open(path));
  if (mapping.bytes().size() > kMaxIndexBytes) {
    return data_loss("{}: is larger than {} bytes", path.string(), kMaxIndexBytes);
  }
  std::map<std::string, std::string> files_of_tensors;
  std::string_view text(reinterpret_cast<const char*>(mapping.bytes().data()), mapping.bytes().size());
  BATON_RETURN_IF_ERROR(parse_safetensors_index(path.string(), text, &files_of_tensors));

  std::map<std::string, size_t> opened;
  for (const auto& [tensor, file_name] : files_of_tensors) opened.emplace(file_name, 0);
  if (opened.size() > kMaxShards) {
    return data_loss("{}: names {} files; at most {}", path.string(), opened.size(), kMaxShards);
  }
  files_.reserve(opened.size());  // SafetensorInfo pointers survive moves of the map, but not of the vector's tail
  for (auto& [file_name, index] : opened) {
    index = files_.size();
    BATON_RETURN_IF_ERROR(add_file(model_dir / file_name).with_context(kIndexFile));
  }
  for (const auto& [tensor, file_name] : files_of_tensors) {
    const size_t index = opened[file_name];
    auto found = files_[index].tensors().find(tensor);
    if (found == files_[index].tensors().end()) {
      return data_loss("{}: has no tensor \"{}\", which {} says it has", files_[index].name(),
                       tensor.substr(0, kMaxShownName), kIndexFile);
    }
    tensors_.emplace(tensor, Location{index, &found->second});
  }
  // A tensor that the index leaves out would be left out of the model.
  for (const SafetensorsFile& file : files_) {
    for (const auto& [tensor, info] : file.tensors()) {
      if (!files_of_tensors.contains(tensor)) {
        return data_loss("{}: has tensor \"{}\", which {} does not name", file.name(),
                         tensor.substr(0, kMaxShownName), kIndexFile);
      }
    }
  }
  return {};
}

Result<std::unique_ptr<Checkpoint>> Checkpoint::open(const std::filesystem::path& model_dir) {
  auto checkpoint = std::make_unique<Checkpoint>();
  checkpoint->directory_ = model_dir.string();
  std::error_code error;
  if (std::filesystem::exists(model_dir / kSingleFile, error)) {
    BATON_RETURN_IF_ERROR(checkpoint->add_file(model_dir / kSingleFile));
    for (const auto& [name, info] : checkpoint->files_[0].tensors()) {
      checkpoint->tensors_.emplace(name, Location{0, &info});
    }
  } else if (std::filesystem::exists(model_dir / kIndexFile, error)) {
    BATON_RETURN_IF_ERROR(checkpoint->open_index(model_dir));
  } else {
    return not_found("{}: has neither {} nor {}; convert other formats with transformers, or use --load-format dummy",
                     model_dir.string(), kSingleFile, kIndexFile);
  }
  return checkpoint;
}

Result<WeightView> Checkpoint::fetch(const std::string& name, std::span<const int64_t> shape, WeightInit) {
  auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    return data_loss("{}: tensor \"{}\" is missing; the config asks for it with shape {}",
                     files_.size() == 1 ? files_[0].name() : directory_, name, shape_text(shape));
  }
  const Location location = found->second;
  const SafetensorsFile& file = files_[location.file];
  const SafetensorInfo& info = *location.info;
  if (!std::ranges::equal(info.shape, shape)) {
    return data_loss("{}: tensor \"{}\" has shape {}; the config asks for {}", file.name(), name,
                     shape_text(info.shape), shape_text(shape));
  }
  std::optional<DType> dtype = parse_dtype(info.dtype);
  if (!dtype || *dtype == DType::kI32) {
    return data_loss("{}: tensor \"{}\" has dtype {}; weights must be BF16, F16 or F32", file.name(), name,
                     info.dtype);
  }
  file.prefetch(info);
  fetched_.push_back(location);
  std::span<const std::byte> data = file.data(info);
  hashes_[name] = hash_tensor(name, info, data);
  if (reinterpret_cast<uintptr_t>(data.data()) % dtype_bytes(*dtype) != 0) {
    // Writers pad the header so that this does not happen, but the format does not demand it.
    copies_.emplace_back(data.begin(), data.end());
    data = copies_.back();
  }
  return WeightView{data.data(), *dtype};
}

void Checkpoint::release() {
  for (const Location& location : fetched_) files_[location.file].drop(*location.info);
  fetched_.clear();
  copies_.clear();
}

Status Checkpoint::finish() {
  for (const auto& [name, location] : tensors_) {
    if (!hashes_.contains(name) && !may_stay_unused(name)) {
      return data_loss("{}: tensor \"{}\" has no place in the model that config.json describes",
                       files_[location.file].name(), name.substr(0, kMaxShownName));
    }
  }
  return {};
}

uint64_t Checkpoint::identity() const {
  uint64_t hash = 0;
  for (const auto& [name, tensor_hash] : hashes_) hash = XXH3_64bits_withSeed(&tensor_hash, sizeof(tensor_hash), hash);
  return hash;
}

}  // namespace baton
