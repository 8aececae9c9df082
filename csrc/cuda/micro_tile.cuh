// The tiles of pairs that the kernels of kde, omega and nearest work on: 16 x 16 threads, each with 4 rows and 4
// columns of 64 x 64. Sixteen pairs for eight points that are read from shared memory keep the arithmetic busy.
#pragma once

#include <cmath>

#include "cuda/launch.cuh"

namespace kdejsd {
namespace cuda {

constexpr int kSide = 16;              // threads along each side of a block
constexpr int kMicro = 4;              // rows and columns of a thread
constexpr int kTile = kSide * kMicro;  // rows and columns of a tile
constexpr int kTileThreads = kSide * kSide;

template <typename T>
using MicroTile = T[kMicro][kMicro];

template <typename T>
__device__ void clear(MicroTile<T>& tile) {
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
#pragma unroll
    for (int b = 0; b < kMicro; ++b) tile[a][b] = T(0);
  }
}

template <typename T>
__device__ void add(const MicroTile<T>& more, MicroTile<T>& tile) {
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
#pragma unroll
    for (int b = 0; b < kMicro; ++b) tile[a][b] += more[a][b];
  }
}

// squares[a][b] += (row[a] - column[b])^2
template <typename T>
__device__ void add_squared_differences(const T (&row)[kMicro], const T (&column)[kMicro], MicroTile<T>& squares) {
#pragma unroll
  for (int a = 0; a < kMicro; ++a) {
#pragma unroll
    for (int b = 0; b < kMicro; ++b) {
      const T difference = row[a] - column[b];
      squares[a][b] = std::fma(difference, difference, squares[a][b]);
    }
  }
}

}  // namespace cuda
}  // namespace kdejsd
