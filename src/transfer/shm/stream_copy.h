#pragma once

#include <cstddef>

namespace baton::transfer {

/// memcpy() for many megabytes that this process will not look at again: stores go past the caches, so the
/// destination's lines are not read first (a third of a copy's traffic), and nobody's cache is emptied.
/// What it wrote may be announced to others only after a stream_fence().
void stream_copy(std::byte* to, const std::byte* from, size_t bytes);
void stream_fence();

}  // namespace baton::transfer
