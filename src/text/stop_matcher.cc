#include "text/stop_matcher.h"

#include <algorithm>
#include <utility>

namespace baton {

StopMatcher::StopMatcher(std::vector<std::string> stops, bool include_stop) : include_stop_(include_stop) {
  for (size_t i = 0; i < stops.size(); ++i) {
    if (stops[i].empty()) continue;
    Stop stop;
    stop.text = std::move(stops[i]);
    stop.index = i;
    stop.border.assign(stop.text.size(), 0);
    for (size_t at = 1, length = 0; at < stop.text.size(); ++at) {
      while (length > 0 && stop.text[at] != stop.text[length]) length = stop.border[length - 1];
      if (stop.text[at] == stop.text[length]) ++length;
      stop.border[at] = length;
    }
    stops_.push_back(std::move(stop));
  }
}

StopMatcher::Out StopMatcher::push(std::string_view text) {
  if (stopped_) return {.text = {}, .stopped = true, .which = which_};
  if (stops_.empty()) return {.text = std::string(text), .stopped = false, .which = 0};

  for (size_t i = 0; i < text.size(); ++i) {
    const char byte = text[i];
    const Stop* complete = nullptr;
    for (Stop& stop : stops_) {
      while (stop.matched > 0 && stop.text[stop.matched] != byte) stop.matched = stop.border[stop.matched - 1];
      if (stop.text[stop.matched] == byte) ++stop.matched;
      if (stop.matched == stop.text.size() && (complete == nullptr || stop.text.size() > complete->text.size())) {
        complete = &stop;
      }
    }
    if (complete != nullptr) {
      held_.append(text.substr(0, i + 1));
      if (!include_stop_) held_.resize(held_.size() - complete->text.size());
      stopped_ = true;
      which_ = complete->index;
      return {.text = std::exchange(held_, {}), .stopped = true, .which = which_};
    }
  }

  held_.append(text);
  size_t keep = 0;
  for (const Stop& stop : stops_) keep = std::max(keep, stop.matched);
  // A half character at the end of the kept-back text would split one: text comes in whole
  // characters, but a stop string given by a user as bytes need not.
  size_t cut = held_.size() - keep;
  while (cut > 0 && cut < held_.size() && (static_cast<unsigned char>(held_[cut]) & 0xC0) == 0x80) --cut;
  Out out;
  out.text = held_.substr(0, cut);
  held_.erase(0, cut);
  return out;
}

std::string StopMatcher::flush() {
  for (Stop& stop : stops_) stop.matched = 0;
  return std::exchange(held_, {});
}

}  // namespace baton
