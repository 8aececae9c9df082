// What the kernels of omega, nearest and radius take at a time, beside the tiles of micro_tile.cuh. In a header, so
// that tests can stand at these edges.
#pragma once

namespace kdejsd {
namespace cuda {

constexpr int kOmegaStep = 32;            // coordinates, or samples, that are in shared memory at a time
constexpr int kOmegaPairThreads = 128;    // per pair of the halves
constexpr int kNearestChunk = 16;         // coordinates that are present at a time
constexpr int kRadiusWarpClasses = 4096;  // up to which a warp takes a row, and not a block

}  // namespace cuda
}  // namespace kdejsd
