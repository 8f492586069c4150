#include "transfer/copied_messages.h"

namespace baton::transfer {

void CopiedMessages::tell(ControlPlane& control, ControlPlane::Id id) {
  if (untold_.empty()) return;
  std::vector<Arrival> arrivals;
  for (const Copied& copied : untold_) {
    if (copied.tag == Tag::kNone) continue;
    const auto tag = static_cast<uint32_t>(copied.tag);
    if (!arrivals.empty() && arrivals.back().tag == tag) {
      ++arrivals.back().count;
    } else {
      arrivals.push_back({tag, 1});
    }
  }
  if (!arrivals.empty() && !control.send_arrivals(id, arrivals)) return;
  for (const Copied& copied : untold_) told_.push_back(copied.cookie);
  untold_.clear();
}

}  // namespace baton::transfer
