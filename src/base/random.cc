#include "base/random.h"

#include <sys/random.h>

#include "base/check.h"

namespace baton {

uint64_t random_id() {
  uint64_t value = 0;
  while (value == 0) {
    BATON_CHECK(getrandom(&value, sizeof(value), 0) == sizeof(value));
  }
  return value;
}

}  // namespace baton
