// The sizes at which the kernels cut their work, so that tests can stand at these edges. The file of each op has a list
// of them, made from the constants that its kernels use, and so one list for each instruction set.
#pragma once

#include <cstdint>

namespace kdejsd::cpu {

// Dimensions from which the products of the kde op are those of matrices, where the caller allows their error and the
// instruction set has them: below, they gain nothing.
constexpr int64_t kMatrixDims = 32;

struct TileSize {
  const char* counted;  // the op and what the size counts, such as "kde_points"; null behind the last of a list
  const char* name;     // of what has that size, such as "tile"
  int64_t size;
};

}  // namespace kdejsd::cpu
