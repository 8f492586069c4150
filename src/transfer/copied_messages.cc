#include "transfer/copied_messages.h"

namespace baton::transfer {

void CopiedMessages::tell(ControlPlane& control, ControlPlane::Id id, Doorbell* doorbell) {
  if (untold_.empty()) return;
  std::vector<Arrival> by_socket;
  size_t rung = 0;  // of untold_, those in front that the doorbell took, and those between without a tag
  for (size_t i = 0; i < untold_.size();) {
    const Tag tag = untold_[i].tag;
    Arrival arrival{static_cast<uint32_t>(tag), 0};
    for (; i < untold_.size() && untold_[i].tag == tag; ++i) ++arrival.count;
    if (tag != Tag::kNone && (!by_socket.empty() || doorbell == nullptr || !doorbell->ring(arrival))) by_socket.push_back(arrival);
    if (by_socket.empty()) rung = i;
  }
  // An empty word only ends the owner's sleep. It is not needed, either, when the socket is full of others.
  const bool woken = doorbell != nullptr && rung > 0 && doorbell->must_wake();
  bool told = true;
  if (!by_socket.empty()) {
    told = control.send_arrivals(id, by_socket);
  } else if (woken) {
    (void)control.send_arrivals(id, {});
  }
  const size_t count = told ? untold_.size() : rung;
  for (size_t i = 0; i < count; ++i) told_.push_back(untold_[i].cookie);
  untold_.erase(untold_.begin(), untold_.begin() + static_cast<ptrdiff_t>(count));
}

}  // namespace baton::transfer
