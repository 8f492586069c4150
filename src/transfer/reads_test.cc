#include "transfer/reads.h"

#include <gtest/gtest.h>

#include <string>

#include "transfer/inbox.h"

namespace baton::transfer {
namespace {

ReadRequest some_request() {
  ReadRequest request;
  request.kind = ReadRequest::Kind::kRead;
  request.tag = 0x01020304;
  request.integrity = true;
  request.owner_pool = 3;
  request.reader_pool = 4;
  request.offset_bytes = 512;
  request.length_bytes = 1ull << 40;
  request.timeout_ms = 30'000;
  request.blocks = {{0, 1}, {~0u, 7}};
  return request;
}

ReadRequest some_cancel() {
  ReadRequest request;
  request.kind = ReadRequest::Kind::kCancel;
  request.tag = 9;
  return request;
}

ReadAnswer some_start() {
  ReadAnswer answer;
  answer.kind = ReadAnswer::Kind::kStarted;
  answer.tag = 9;
  answer.messages = 12;
  return answer;
}

ReadAnswer some_end() {
  ReadAnswer answer;
  answer.tag = 9;
  answer.code = StatusCode::kUnavailable;
  answer.settled = false;
  answer.reason = "why";
  return answer;
}

TEST(ReadFrames, ComeBackAsTheyWere) {
  EXPECT_EQ(*parse_read_request(encode_read_request(some_request())), some_request());
  EXPECT_EQ(*parse_read_request(encode_read_request(some_cancel())), some_cancel());
  ReadRequest introduction;
  introduction.kind = ReadRequest::Kind::kIntroduce;
  introduction.metadata = std::string("any\0bytes", 9);
  EXPECT_EQ(*parse_read_request(encode_read_request(introduction)), introduction);
  ReadRequest large = some_request();
  large.blocks.resize(ReadRequest::kMaxBlocks);
  EXPECT_EQ(*parse_read_request(encode_read_request(large)), large);
  EXPECT_EQ(*parse_read_answer(encode_read_answer(some_start())), some_start());
  EXPECT_EQ(*parse_read_answer(encode_read_answer(some_end())), some_end());
  ReadAnswer good;
  good.tag = 1;
  EXPECT_EQ(*parse_read_answer(encode_read_answer(good)), good);
}

TEST(ReadFrames, CutOrLongOnesAreRefused) {
  for (const ReadRequest& request : {some_request(), some_cancel()}) {
    const std::string bytes = encode_read_request(request);
    for (size_t i = 0; i < bytes.size(); ++i) EXPECT_FALSE(parse_read_request(bytes.substr(0, i)).ok()) << i;
    EXPECT_FALSE(parse_read_request(bytes + '\0').ok());
  }
  for (const ReadAnswer& answer : {some_start(), some_end()}) {
    const std::string bytes = encode_read_answer(answer);
    for (size_t i = 0; i < bytes.size(); ++i) EXPECT_FALSE(parse_read_answer(bytes.substr(0, i)).ok()) << i;
    EXPECT_FALSE(parse_read_answer(bytes + '\0').ok());
  }
  EXPECT_FALSE(parse_read_request("\x04").ok());
  EXPECT_FALSE(parse_read_answer(std::string("\x03\x01\0\0\0", 5)).ok());
}

TEST(ReadFrames, WhatMakesNoSenseIsRefused) {
  const auto request_is_refused = [](auto change) {
    ReadRequest request = some_request();
    change(request);
    return !parse_read_request(encode_read_request(request)).ok();
  };
  EXPECT_FALSE(request_is_refused([](ReadRequest&) {}));
  EXPECT_TRUE(request_is_refused([](ReadRequest& request) { request.tag = 0; }));
  EXPECT_TRUE(request_is_refused([](ReadRequest& request) { request.tag = kFirstReservedTag; }));
  EXPECT_TRUE(request_is_refused([](ReadRequest& request) { request.length_bytes = 0; }));
  EXPECT_TRUE(request_is_refused([](ReadRequest& request) { request.blocks.clear(); }));
  std::string many = encode_read_request(some_request());
  many[many.size() - 2 * 8 - 1] = '\x7f';  // of the number of blocks
  EXPECT_FALSE(parse_read_request(many).ok());
  const auto answer_is_refused = [](ReadAnswer answer, auto change) {
    change(answer);
    return !parse_read_answer(encode_read_answer(answer)).ok();
  };
  EXPECT_TRUE(answer_is_refused(some_start(), [](ReadAnswer& answer) { answer.messages = 0; }));
  EXPECT_TRUE(answer_is_refused(some_end(), [](ReadAnswer& answer) { answer.tag = ~0u; }));
  EXPECT_TRUE(answer_is_refused(some_end(), [](ReadAnswer& answer) { answer.code = static_cast<StatusCode>(12); }));
  EXPECT_TRUE(answer_is_refused(some_end(), [](ReadAnswer& answer) { answer.code = StatusCode::kOk; }));
}

}  // namespace
}  // namespace baton::transfer
