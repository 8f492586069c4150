#pragma once

namespace baton {

/// oneDNN's bf16 matrix product (weights in the layout that it asks for) on our shapes, and whether a row has the same
/// bits in another batch. A comparison for docs/performance.md; Baton does not use oneDNN.
void bench_onednn();

}  // namespace baton
