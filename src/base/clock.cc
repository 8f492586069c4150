#include "base/clock.h"

namespace baton {

const SteadyClock& SteadyClock::instance() {
  // Never destroyed: threads that still run while the process ends look at it.
  static const SteadyClock& clock = *new SteadyClock;
  return clock;
}

}  // namespace baton
