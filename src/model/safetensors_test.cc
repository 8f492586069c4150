#include "model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstring>
#include <fstream>

#include "model/checkpoint.h"

namespace baton {
namespace {

using testing::AllOf;
using testing::HasSubstr;

/// A folder that goes away with the test.
class Folder {
 public:
  Folder() {
    std::string pattern = (std::filesystem::temp_directory_path() / "baton-model-XXXXXX").string();
    BATON_CHECK(::mkdtemp(pattern.data()) != nullptr);
    path_ = pattern;
  }
  ~Folder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  std::filesystem::path write(const std::string& name, const std::string& content) const {
    std::ofstream(path_ / name, std::ios::binary) << content;
    return path_ / name;
  }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

std::string file_with(const std::string& header, size_t data_bytes, uint64_t claimed_header_bytes = UINT64_MAX) {
  uint64_t size = claimed_header_bytes == UINT64_MAX ? header.size() : claimed_header_bytes;
  std::string file(8, '\0');
  for (size_t i = 0; i < 8; i++) file[i] = static_cast<char>(size >> (8 * i));
  file += header;
  for (size_t i = 0; i < data_bytes; i++) file += static_cast<char>(i);
  return file;
}

std::string tensor(const std::string& name, const std::string& dtype, const std::string& shape, int begin, int end) {
  return fmt::format(R"("{}":{{"dtype":"{}","shape":{},"data_offsets":[{},{}]}})", name, dtype, shape, begin, end);
}

std::string parse_message(const std::string& file) {
  SafetensorMap tensors;
  uint64_t offset = 0;
  return parse_safetensors("w.safetensors", std::as_bytes(std::span(file)), &tensors, &offset).message();
}

TEST(Safetensors, ReadsTensorsAndMetadata) {
  Folder folder;
  auto path = folder.write("model.safetensors",
                           file_with("{\"__metadata__\":{\"format\":\"pt\"}," + tensor("b", "BF16", "[2,3]", 8, 20) +
                                         "," + tensor("a", "F32", "[2]", 0, 8) + "," + tensor("none", "F32", "[0]", 20, 20) +
                                         "," + tensor("scalar", "I64", "[]", 20, 28) + "}   ", 28));
  auto file = SafetensorsFile::open(path);
  ASSERT_TRUE(file.ok()) << file.status().to_string();
  EXPECT_EQ(file->tensors().size(), 4u);
  const SafetensorInfo& b = file->tensors().at("b");
  EXPECT_EQ(b.dtype, "BF16");
  EXPECT_EQ(b.shape, (std::vector<int64_t>{2, 3}));
  ASSERT_EQ(file->data(b).size(), 12u);
  EXPECT_EQ(file->data(b)[0], std::byte{8});
  file->prefetch(b);
  file->drop(b);
  EXPECT_EQ(file->data(b)[11], std::byte{19}) << "dropped pages come back";
}

struct BrokenFile {
  const char* name;
  std::string content;
  const char* message;
};

class BrokenSafetensors : public testing::TestWithParam<BrokenFile> {};

TEST_P(BrokenSafetensors, NamesFileAndTensor) {
  EXPECT_THAT(parse_message(GetParam().content), AllOf(HasSubstr("w.safetensors: "), HasSubstr(GetParam().message)));
}

INSTANTIATE_TEST_SUITE_P(
    Table, BrokenSafetensors,
    testing::Values(
        BrokenFile{"Empty", "", "0 bytes are too few"}, BrokenFile{"ShortPrefix", "1234567", "7 bytes are too few"},
        BrokenFile{"HeaderCutShort", file_with("{}", 0, 100), "claims 100 bytes, the file has 2; it is cut short"},
        BrokenFile{"HeaderOversized", file_with("{}", 0, 100'000'001), "at most 100000000 are allowed"},
        BrokenFile{"HeaderHuge", file_with("{}", 0, UINT64_MAX - 1), "at most 100000000"},
        BrokenFile{"NoJson", file_with("{x}", 0), "no valid JSON"},
        BrokenFile{"NoObject", file_with("[]", 0), "header"},
        BrokenFile{"Rubbish", file_with("{} {}", 0), "no valid JSON"},
        BrokenFile{"InvalidUtf8", file_with("{\"\xff\":1}", 0), "no valid JSON"},
        BrokenFile{"DataCutShort", file_with("{" + tensor("w", "F32", "[4]", 0, 16) + "}", 15),
                   "tensor \"w\": data_offsets [0, 16] are not inside the 15 bytes"},
        BrokenFile{"DataLeftOver", file_with("{" + tensor("w", "F32", "[4]", 0, 16) + "}", 17), "tensors end at 16"},
        BrokenFile{"Overlap", file_with("{" + tensor("a", "F32", "[4]", 0, 16) + "," + tensor("b", "F32", "[2]", 8, 16) + "}", 16),
                   "tensor \"b\" at 8 overlaps \"a\", which ends at 16"},
        BrokenFile{"SameBytesTwice", file_with("{" + tensor("a", "F32", "[4]", 0, 16) + "," + tensor("b", "F32", "[4]", 0, 16) + "}", 16),
                   "tensor \"b\" at 0 overlaps \"a\""},
        BrokenFile{"Hole", file_with("{" + tensor("a", "F32", "[1]", 0, 4) + "," + tensor("b", "F32", "[1]", 8, 12) + "}", 12),
                   "tensor \"b\" begins at 8, which leaves a hole after 4"},
        BrokenFile{"Backwards", file_with("{" + tensor("w", "F32", "[4]", 16, 0) + "}", 16), "tensor \"w\": data_offsets [16, 0]"},
        BrokenFile{"SizeOfShape", file_with("{" + tensor("w", "BF16", "[4]", 0, 16) + "}", 16),
                   "tensor \"w\": data_offsets [0, 16] span 16 bytes, but BF16 of shape [4] takes 8"},
        BrokenFile{"ShapeOverflow", file_with("{" + tensor("w", "F32", "[4294967296,4294967296]", 0, 0) + "}", 0),
                   "tensor \"w\": shape [4294967296, 4294967296] overflows"},
        BrokenFile{"ShapeTooLarge", file_with("{" + tensor("w", "F32", "[18446744073709551615]", 0, 0) + "}", 0), "tensor \"w\": shape holds"},
        BrokenFile{"ShapeNegative", file_with("{" + tensor("w", "F32", "[-1]", 0, 0) + "}", 0), "tensor \"w\": -1 where a size belongs"},
        BrokenFile{"ShapeFraction", file_with("{" + tensor("w", "F32", "[1.5]", 0, 0) + "}", 0), "tensor \"w\": 1.5 where a size belongs"},
        BrokenFile{"ShapeNested", file_with("{" + tensor("w", "F32", "[[1]]", 0, 4) + "}", 4), "tensor \"w\": a list"},
        BrokenFile{"RankTooLarge", file_with("{" + tensor("w", "F32", "[1,1,1,1,1,1,1,1,1]", 0, 4) + "}", 4), "tensor \"w\": a list of more than 8"},
        BrokenFile{"UnknownDtype", file_with("{" + tensor("w", "F31", "[1]", 0, 4) + "}", 4), "tensor \"w\": dtype \"F31\" is not known"},
        BrokenFile{"NameTwice", file_with("{" + tensor("w", "F32", "[1]", 0, 4) + "," + tensor("w", "F32", "[1]", 4, 8) + "}", 8),
                   "tensor \"w\": the name comes twice"},
        BrokenFile{"FieldTwice", file_with(R"({"w":{"dtype":"F32","dtype":"F32"}})", 0), "tensor \"w\": \"dtype\" comes twice"},
        BrokenFile{"FieldMissing", file_with(R"({"w":{"dtype":"F32","shape":[1]}})", 4), "tensor \"w\": dtype, shape or data_offsets is missing"},
        BrokenFile{"FieldUnknown", file_with(R"({"w":{"strides":[1]}})", 4), "tensor \"w\": unknown field \"strides\""},
        BrokenFile{"OneOffset", file_with(R"({"w":{"dtype":"F32","shape":[1],"data_offsets":[4]}})", 4), "tensor \"w\": data_offsets must be two"},
        BrokenFile{"NotAnObject", file_with(R"({"w":3})", 4), "tensor \"w\": a number"},
        BrokenFile{"ObjectInside", file_with(R"({"w":{"dtype":{}}})", 4), "tensor \"w\": an object"}),
    [](const auto& info) { return std::string(info.param.name); });

TEST(Safetensors, FilesThatCannotBeOpened) {
  Folder folder;
  EXPECT_THAT(SafetensorsFile::open(folder.path() / "no").status().message(), HasSubstr("no: cannot be opened"));
  EXPECT_THAT(SafetensorsFile::open(folder.path()).status().message(), HasSubstr("is not a regular file"));
  EXPECT_THAT(SafetensorsFile::open(folder.write("empty", "")).status().message(), HasSubstr("empty: is empty"));
}

constexpr WeightInit kAny{};

std::string fetch_message(Checkpoint& checkpoint, const std::string& name, std::vector<int64_t> shape) {
  return checkpoint.fetch(name, shape, kAny).status().message();
}

TEST(Checkpoint, FetchChecksShapeAndDtype) {
  Folder folder;
  folder.write("model.safetensors", file_with("{" + tensor("w", "BF16", "[2,2]", 0, 8) + "," + tensor("i", "I64", "[1]", 8, 16) +
                                                  "," + tensor("odd", "U8", "[1]", 16, 17) + "," +
                                                  tensor("unaligned", "F32", "[1]", 17, 21) + "}", 21));
  auto checkpoint = Checkpoint::open(folder.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().to_string();
  EXPECT_THAT(fetch_message(**checkpoint, "w", {4}),
              HasSubstr("model.safetensors: tensor \"w\" has shape [2, 2]; the config asks for [4]"));
  EXPECT_THAT(fetch_message(**checkpoint, "i", {1}), HasSubstr("tensor \"i\" has dtype I64; weights must be"));
  EXPECT_THAT(fetch_message(**checkpoint, "v", {1}), HasSubstr("model.safetensors: tensor \"v\" is missing"));
  const int64_t shape[] = {1};
  auto view = (*checkpoint)->fetch("unaligned", shape, kAny);
  ASSERT_TRUE(view.ok());
  EXPECT_EQ(reinterpret_cast<uintptr_t>(view->data) % 4, 0u);
  EXPECT_EQ(static_cast<const uint8_t*>(view->data)[0], 17);
  (*checkpoint)->release();
  EXPECT_THAT((*checkpoint)->finish().message(), HasSubstr("model.safetensors: tensor \"i\" has no place in the model"));
}

TEST(Checkpoint, IdentityIsThatOfTheValues) {
  auto identity = [](const std::string& content) {
    Folder folder;
    folder.write("model.safetensors", content);
    auto checkpoint = Checkpoint::open(folder.path());
    const int64_t shape[] = {4};
    BATON_CHECK((*checkpoint)->fetch("w", shape, kAny).ok());
    return (*checkpoint)->identity();
  };
  std::string content = file_with("{" + tensor("w", "BF16", "[4]", 0, 8) + "}", 8), changed = content;
  changed.back() ^= 1;
  EXPECT_EQ(identity(content), identity(content));
  EXPECT_NE(identity(content), identity(changed)) << "a fine-tune has the same header";
}

TEST(Checkpoint, Shards) {
  Folder folder;
  folder.write("one.safetensors", file_with("{" + tensor("a", "F32", "[1]", 0, 4) + "}", 4));
  folder.write("two.safetensors", file_with("{" + tensor("b", "F32", "[2]", 0, 8) + "}", 8));
  auto open_with = [&](const std::string& map) {
    folder.write("model.safetensors.index.json", "{\"metadata\":{},\"weight_map\":" + map + "}");
    return Checkpoint::open(folder.path());
  };
  auto checkpoint = open_with(R"({"a":"one.safetensors","b":"two.safetensors"})");
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().to_string();
  const int64_t one[] = {1}, two[] = {2};
  EXPECT_TRUE((*checkpoint)->fetch("a", one, kAny).ok());
  EXPECT_TRUE((*checkpoint)->fetch("b", two, kAny).ok());
  EXPECT_TRUE((*checkpoint)->finish().ok());
  EXPECT_THAT(fetch_message(**checkpoint, "b", {3}), HasSubstr("two.safetensors: tensor \"b\""));

  auto message = [&](const std::string& map) { return open_with(map).status().message(); };
  EXPECT_THAT(message(R"({"a":"one.safetensors","c":"two.safetensors"})"), HasSubstr("two.safetensors: has no tensor \"c\""));
  EXPECT_THAT(message(R"({"a":"three.safetensors"})"), HasSubstr("three.safetensors: cannot be opened"));
  EXPECT_THAT(message("{}"), HasSubstr("weight_map is missing"));
  EXPECT_THAT(message("3"), HasSubstr("weight_map is missing"));
  for (const char* file : {"../one.safetensors", "/etc/passwd", "a/b", "..", ".", "", "a\\\\b", "a\\u0000b"}) {
    EXPECT_THAT(message(fmt::format(R"({{"a":"{}"}})", file)),
                AllOf(HasSubstr("index.json: tensor \"a\""), HasSubstr("no plain file name")));
  }
  EXPECT_THAT(message(R"({"a":3})"), HasSubstr("no plain file name"));
  folder.write("one.safetensors", file_with("{" + tensor("a", "F32", "[1]", 0, 4) + "," + tensor("x", "F32", "[1]", 4, 8) + "}", 8));
  EXPECT_THAT(message(R"({"a":"one.safetensors"})"), HasSubstr("one.safetensors: has tensor \"x\", which"));
}

TEST(Checkpoint, FolderWithoutWeights) {
  Folder folder;
  EXPECT_THAT(Checkpoint::open(folder.path()).status().message(),
              HasSubstr("has neither model.safetensors nor model.safetensors.index.json"));
}

}  // namespace
}  // namespace baton
