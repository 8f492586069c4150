#pragma once

#include <fmt/format.h>

#include <concepts>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <variant>

#include "base/check.h"

namespace baton {

/// What went wrong, coarse enough to act on. The numbers are part of the worker protocol: append only.
enum class StatusCode : int {
  kOk = 0,
  kInvalidArgument = 1,     ///< the caller's input is wrong; trying again will not help
  kNotFound = 2,            ///< the named thing does not exist
  kUnavailable = 3,         ///< a peer or device is not there now; another one may be
  kDeadlineExceeded = 4,    ///< time ran out
  kResourceExhausted = 5,   ///< a bound was reached (queue, memory, blocks); later may work
  kFailedPrecondition = 6,  ///< the state does not allow it (wrong epoch, not ready)
  kCancelled = 7,           ///< somebody asked for it to stop
  kInternal = 8,            ///< our own fault
  kDataLoss = 9,            ///< bytes are not what they should be
  kUnimplemented = 10,      ///< this build or device cannot do it
  kAborted = 11,            ///< the other side gave up
};

std::string_view status_code_name(StatusCode code);

/// Success or one failure with a message for a person: what, the value, the limit, what to do.
/// Cheap when ok (no allocation). A value type; safe to copy between threads.
class [[nodiscard]] Status {
 public:
  Status() = default;
  Status(StatusCode code, std::string message) : code_(code), message_(std::move(message)) {}

  bool ok() const { return code_ == StatusCode::kOk; }
  explicit operator bool() const { return ok(); }
  StatusCode code() const { return code_; }
  const std::string& message() const { return message_; }

  /// The same failure with "context: " put in front of its message; ok stays ok.
  Status with_context(std::string_view context) const;
  /// "UNAVAILABLE: worker decode-0 closed its channel"
  std::string to_string() const;

  bool operator==(const Status& other) const = default;

 private:
  StatusCode code_ = StatusCode::kOk;
  std::string message_;
};

/// Marks a dropped Status as deliberate.
inline void ignore_status(const Status&) {}

template <typename... Args>
Status make_status(StatusCode code, fmt::format_string<Args...> format, Args&&... args) {
  return Status(code, fmt::format(format, std::forward<Args>(args)...));
}

#define BATON_DEFINE_STATUS_MAKER(name, code)                                       \
  template <typename... Args>                                                       \
  Status name(fmt::format_string<Args...> format, Args&&... args) {                 \
    return Status(StatusCode::code, fmt::format(format, std::forward<Args>(args)...)); \
  }
BATON_DEFINE_STATUS_MAKER(invalid_argument, kInvalidArgument)
BATON_DEFINE_STATUS_MAKER(not_found, kNotFound)
BATON_DEFINE_STATUS_MAKER(unavailable, kUnavailable)
BATON_DEFINE_STATUS_MAKER(deadline_exceeded, kDeadlineExceeded)
BATON_DEFINE_STATUS_MAKER(resource_exhausted, kResourceExhausted)
BATON_DEFINE_STATUS_MAKER(failed_precondition, kFailedPrecondition)
BATON_DEFINE_STATUS_MAKER(cancelled, kCancelled)
BATON_DEFINE_STATUS_MAKER(internal_error, kInternal)
BATON_DEFINE_STATUS_MAKER(data_loss, kDataLoss)
BATON_DEFINE_STATUS_MAKER(unimplemented, kUnimplemented)
BATON_DEFINE_STATUS_MAKER(aborted, kAborted)
#undef BATON_DEFINE_STATUS_MAKER

/// A value or the Status that says why there is none. Reading the value of a failure is a bug (CHECK).
template <typename T>
class [[nodiscard]] Result {
 public:
  Result(Status status) : state_(std::move(status)) {  // NOLINT: implicit, so `return status;` works
    BATON_CHECK(!std::get<0>(state_).ok()) << "a Result needs a value or a failure";
  }
  template <typename U = T>
    requires(std::constructible_from<T, U &&> && !std::same_as<std::remove_cvref_t<U>, Result> &&
             !std::same_as<std::remove_cvref_t<U>, Status>)
  Result(U&& value) : state_(std::in_place_index<1>, std::forward<U>(value)) {}  // NOLINT

  bool ok() const { return state_.index() == 1; }
  explicit operator bool() const { return ok(); }
  /// The failure; an ok Status when there is a value.
  Status status() const { return ok() ? Status() : std::get<0>(state_); }

  T& value() & {
    check_ok();
    return std::get<1>(state_);
  }
  const T& value() const& {
    check_ok();
    return std::get<1>(state_);
  }
  T&& value() && {
    check_ok();
    return std::get<1>(std::move(state_));
  }
  T& operator*() & { return value(); }
  const T& operator*() const& { return value(); }
  T&& operator*() && { return std::move(*this).value(); }
  T* operator->() { return &value(); }
  const T* operator->() const { return &value(); }

 private:
  void check_ok() const { BATON_CHECK(ok()) << std::get<0>(state_).to_string(); }
  std::variant<Status, T> state_;
};

#define BATON_CONCAT_INNER(a, b) a##b
#define BATON_CONCAT(a, b) BATON_CONCAT_INNER(a, b)

/// Leaves the function with the Status when it is a failure.
#define BATON_RETURN_IF_ERROR(expression)                  \
  do {                                                     \
    ::baton::Status baton_status_ = (expression);          \
    if (!baton_status_.ok()) return baton_status_;         \
  } while (false)

/// BATON_ASSIGN_OR_RETURN(auto file, File::open(path));
#define BATON_ASSIGN_OR_RETURN(declaration, expression) \
  BATON_ASSIGN_OR_RETURN_INNER(BATON_CONCAT(baton_result_, __LINE__), declaration, expression)
#define BATON_ASSIGN_OR_RETURN_INNER(result, declaration, expression) \
  auto result = (expression);                                         \
  if (!result.ok()) return result.status();                           \
  declaration = std::move(result).value()

}  // namespace baton
