// The omega op on CUDA devices.
//
// All pairs: a matrix of weights is made for a band of samples against all samples, and its differences summed; then
// the next band, so that no matrix of all pairs exists. Every pair is looked at from both sides, hence each sample's
// sums are its own block's: nothing is added by two blocks, and all orders are fixed. Values without gradients take the
// pairs i < j once, and no weights. Blocks are 16 x 16 threads, each with 4 rows and 4 columns of a tile of 64 x 64.
// Distances and gradients are from differences of coordinates, which pass through shared memory.
//
// Halves: one block per pair.
#include <algorithm>

#include "cuda/micro_tile.cuh"
#include "cuda/steps.h"
#include "kernels.h"
#include "math/omega.h"

namespace kdejsd {
namespace cuda {
namespace {

constexpr int kPad = 4;                     // puts rows 4 banks or more apart, whole vectors of 16 bytes
constexpr int64_t kBandBytes = 64ll << 20;  // of weights

// Everything that the blocks of a call leave, in the workspace.
template <typename T>
struct Scratch {
  double* sums;           // [tiles^2], of the blocks' ratios; or null
  OmegaLargest* largest;  // [tiles^2]; or null
  T* input_weights;       // [band, b]; or null
  T* code_weights;        // [band, b]; or null
};

struct Plan {
  int64_t tiles;                                       // along b
  int64_t band;                                        // samples, whole tiles
  int64_t sums, largest, input_weights, code_weights;  // offsets in bytes
  int64_t bytes;

  explicit Plan(const OmegaAll& args) {
    const int64_t element = args.dtype == DType::kFloat32 ? sizeof(float) : sizeof(double);
    tiles = ceil_div(args.b, kTile);
    band = kTile * std::min(tiles, std::max<int64_t>(1, kBandBytes / (2 * element * args.b * kTile)));
    const int64_t matrix = ceil_div(band * args.b * element, 16) * 16;
    sums = 0;
    largest = sums + (args.sum != nullptr ? ceil_div(tiles * tiles, 2) * 16 : 0);
    input_weights = largest + (args.largest != nullptr ? ceil_div(tiles * tiles * sizeof(OmegaLargest), 16) * 16 : 0);
    code_weights = input_weights + (args.dinputs != nullptr ? matrix : 0);
    bytes = code_weights + (args.dcodes != nullptr ? matrix : 0);
  }

  template <typename T>
  Scratch<T> scratch(const OmegaAll& args, void* workspace) const {
    char* base = static_cast<char*>(workspace);
    return {args.sum != nullptr ? reinterpret_cast<double*>(base + sums) : nullptr,
            args.largest != nullptr ? reinterpret_cast<OmegaLargest*>(base + largest) : nullptr,
            args.dinputs != nullptr ? reinterpret_cast<T*>(base + input_weights) : nullptr,
            args.dcodes != nullptr ? reinterpret_cast<T*>(base + code_weights) : nullptr};
  }
};

// One value over all threads of the block, the same for each of them, in a fixed order; `scratch` has as many entries
// as the block threads.
template <typename U, typename Merge>
__device__ U over_block(U* scratch, U value, const Merge& merge) {
  __syncthreads();  // before scratch is written: it may be in use
  scratch[threadIdx.x] = value;
  __syncthreads();
  for (int half = blockDim.x / 2; half > 0; half /= 2) {  // blocks are powers of two
    if (threadIdx.x < half) scratch[threadIdx.x] = merge(scratch[threadIdx.x], scratch[threadIdx.x + half]);
    __syncthreads();
  }
  return scratch[0];
}

struct Add {
  __device__ double operator()(double a, double b) const { return a + b; }
};

struct Larger {
  __device__ OmegaLargest operator()(OmegaLargest a, const OmegaLargest& b) const {
    a.consider(b);
    return a;
  }
};

// ----------------------------------------------------------------------------------------------------------------
// All pairs: distances, and what follows from them

template <typename T>
using Points = T[kTile][kOmegaStep + kPad];

// Coordinates first_k ... first_k + kOmegaStep of a tile's samples; 0 beyond the last of either.
template <typename T>
__device__ void load_points(const T* points /* [b, dims] */, int64_t b, int64_t dims, int64_t first, int64_t first_k,
                            Points<T>& to) {
  const int64_t k = first_k + threadIdx.x % kOmegaStep;
  for (int row = threadIdx.x / kOmegaStep; row < kTile; row += kTileThreads / kOmegaStep) {
    to[row][threadIdx.x % kOmegaStep] = first + row < b && k < dims ? points[(first + row) * dims + k] : T(0);
  }
}

// Squared distances of rows 4 ty + a and columns tx + 16 b, first summed over kOmegaStep coordinates, then over those
// sums.
template <typename T>
__device__ void squared_distances(const T* points /* [b, dims] */, int64_t b, int64_t dims, int64_t first_row,
                                  int64_t first_column, Points<T>& rows, Points<T>& columns, MicroTile<T>& total) {
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  clear(total);
  for (int64_t first_k = 0; first_k < dims; first_k += kOmegaStep) {
    __syncthreads();
    load_points(points, b, dims, first_row, first_k, rows);
    load_points(points, b, dims, first_column, first_k, columns);
    __syncthreads();
    MicroTile<T> sums = {};
#pragma unroll 8
    for (int k = 0; k < kOmegaStep; ++k) {
      T row[kMicro], column[kMicro];
#pragma unroll
      for (int m = 0; m < kMicro; ++m) {
        row[m] = rows[kMicro * ty + m][k];
        column[m] = columns[tx + kSide * m][k];
      }
      add_squared_differences(row, column, sums);
    }
    add(sums, total);
  }
}

// One block per tile of rows of the band and tile of columns.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    omega_pairs_kernel(const OmegaAll args, const Scratch<T> scratch, int64_t tiles, int64_t first_row_tile) {
  __shared__ union {
    struct {
      Points<T> rows, columns;
    } points;
    double sums[kTileThreads];
    OmegaLargest largest[kTileThreads];
  } shared;
  const int64_t b = args.b, row_tile = first_row_tile + blockIdx.x / tiles, column_tile = blockIdx.x % tiles;
  const int64_t tile = row_tile * tiles + column_tile;
  const bool with_weights = scratch.input_weights != nullptr || scratch.code_weights != nullptr;
  if (column_tile < row_tile && !with_weights) {  // every pair of it is another block's
    if (threadIdx.x == 0 && scratch.sums != nullptr) scratch.sums[tile] = 0;
    if (threadIdx.x == 0 && scratch.largest != nullptr) scratch.largest[tile] = OmegaLargest::none();
    return;
  }
  MicroTile<T> distances, code_distances;
  squared_distances(static_cast<const T*>(args.inputs), b, args.d, row_tile * kTile, column_tile * kTile,
                    shared.points.rows, shared.points.columns, distances);
  squared_distances(static_cast<const T*>(args.codes), b, args.l, row_tile * kTile, column_tile * kTile,
                    shared.points.rows, shared.points.columns, code_distances);

  const T* upstream = static_cast<const T*>(args.upstream);
  T* ratios = static_cast<T*>(args.ratios);
  double sum = 0;
  OmegaLargest largest = OmegaLargest::none();
#pragma unroll
  for (int m = 0; m < kMicro; ++m) {
    const int64_t i = row_tile * kTile + kMicro * (threadIdx.x / kSide) + m;
    const int64_t in_band = i - first_row_tile * kTile;
#pragma unroll
    for (int n = 0; n < kMicro; ++n) {
      const int64_t j = column_tile * kTile + threadIdx.x % kSide + kSide * n;
      if (i >= b || j >= b) continue;
      OmegaTerms<T> terms = omega_terms(distances[m][n], code_distances[m][n]);
      if (i < j) {
        sum += static_cast<double>(terms.ratio);
        largest.consider({static_cast<double>(terms.ratio), i, j});
        if (ratios != nullptr) ratios[i * b + j] = ratios[j * b + i] = terms.ratio;
      }
      if (i == j && ratios != nullptr) ratios[i * b + j] = T(0);
      // A pair that counts for nothing stays so, also where the upstream gradient is infinite.
      const bool scaled = upstream != nullptr && terms.code_weight != T(0);
      const T grad = scaled ? upstream[i * b + j] + upstream[j * b + i] : T(1);
      if (scratch.input_weights != nullptr) scratch.input_weights[in_band * b + j] = grad * terms.input_weight;
      if (scratch.code_weights != nullptr) scratch.code_weights[in_band * b + j] = grad * terms.code_weight;
    }
  }
  if (scratch.sums != nullptr) {
    const double total = over_block(shared.sums, sum, Add());
    if (threadIdx.x == 0) scratch.sums[tile] = total;
  }
  if (scratch.largest != nullptr) {
    const OmegaLargest total = over_block(shared.largest, largest, Larger());
    if (threadIdx.x == 0) scratch.largest[tile] = total;
  }
}

// ----------------------------------------------------------------------------------------------------------------
// All pairs: gradients

// gradient[i] = sum over j of weights[i, j] (points[i] - points[j]) for the band's samples i. One block per tile of
// samples and tile of coordinates; a thread has rows 4 ty + m and coordinates 4 tx + n.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    omega_gradient_kernel(const T* points /* [b, dims] */, int64_t b, int64_t dims, const T* weights /* [band, b] */,
                          int64_t first_row, int64_t coordinate_tiles, T* gradient /* [b, dims] */) {
  __shared__ __align__(16) T tile_weights[kOmegaStep][kTile + kPad];  // [other sample][row]
  __shared__ __align__(16) T others[kOmegaStep][kTile + kPad];        // [other sample][coordinate]
  const int ty = threadIdx.x / kSide, tx = threadIdx.x % kSide;
  const int64_t in_band = blockIdx.x / coordinate_tiles * kTile;  // of the tile's first row
  const int64_t first_k = blockIdx.x % coordinate_tiles * kTile;
  MicroTile<T> own, total = {};
#pragma unroll
  for (int m = 0; m < kMicro; ++m) {
#pragma unroll
    for (int n = 0; n < kMicro; ++n) {
      const int64_t i = first_row + in_band + kMicro * ty + m, k = first_k + kMicro * tx + n;
      own[m][n] = i < b && k < dims ? points[i * dims + k] : T(0);
    }
  }
  for (int64_t first = 0; first < b; first += kOmegaStep) {
    __syncthreads();
#pragma unroll 2
    for (int e = threadIdx.x; e < kOmegaStep * kTile; e += kTileThreads) {
      const int64_t j = first + e % kOmegaStep, row = in_band + e / kOmegaStep;
      tile_weights[e % kOmegaStep][e / kOmegaStep] = j < b && first_row + row < b ? weights[row * b + j] : T(0);
      const int64_t other = first + e / kTile, k = first_k + e % kTile;
      others[e / kTile][e % kTile] = other < b && k < dims ? points[other * dims + k] : T(0);
    }
    __syncthreads();
    MicroTile<T> sums = {};
#pragma unroll 4
    for (int j = 0; j < kOmegaStep; ++j) {
      T weight[kMicro], other[kMicro];
#pragma unroll
      for (int m = 0; m < kMicro; ++m) {
        weight[m] = tile_weights[j][kMicro * ty + m];
        other[m] = others[j][kMicro * tx + m];
      }
#pragma unroll
      for (int m = 0; m < kMicro; ++m) {
#pragma unroll
        for (int n = 0; n < kMicro; ++n) sums[m][n] = std::fma(weight[m], own[m][n] - other[n], sums[m][n]);
      }
    }
    add(sums, total);
  }
#pragma unroll
  for (int m = 0; m < kMicro; ++m) {
#pragma unroll
    for (int n = 0; n < kMicro; ++n) {
      const int64_t i = first_row + in_band + kMicro * ty + m, k = first_k + kMicro * tx + n;
      if (i < b && k < dims) gradient[i * dims + k] = total[m][n];
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// What all blocks found, by one block

__global__ void __launch_bounds__(kTileThreads)
    omega_total_kernel(const double* sums /* [count] or null */, const OmegaLargest* largest /* [count] or null */,
                       int64_t count, double* sum /* [1] */, int64_t* pair /* [2] */) {
  __shared__ double shared_sums[kTileThreads];
  __shared__ OmegaLargest shared_largest[kTileThreads];
  if (sums != nullptr) {
    double own = 0;
    for (int64_t e = threadIdx.x; e < count; e += kTileThreads) own += sums[e];
    own = over_block(shared_sums, own, Add());
    if (threadIdx.x == 0) *sum = own;
  }
  if (largest != nullptr) {
    OmegaLargest own = OmegaLargest::none();
    for (int64_t e = threadIdx.x; e < count; e += kTileThreads) own.consider(largest[e]);
    own = over_block(shared_largest, own, Larger());
    if (threadIdx.x == 0) {
      pair[0] = own.i;
      pair[1] = own.j;
    }
  }
}

// ----------------------------------------------------------------------------------------------------------------
// Halves

template <typename T>
__device__ T row_distance(const T* a, const T* b, int64_t dims, double* scratch /* [kOmegaPairThreads] */) {
  T sum = T(0);
  for (int64_t k = threadIdx.x; k < dims; k += kOmegaPairThreads) {
    const T difference = a[k] - b[k];
    sum = std::fma(difference, difference, sum);
  }
  return static_cast<T>(over_block(scratch, static_cast<double>(sum), Add()));
}

template <typename T>
__device__ void write_differences(const T* a, const T* b, int64_t dims, T weight, T* da, T* db) {
  for (int64_t k = threadIdx.x; k < dims; k += kOmegaPairThreads) {
    const T gradient = weight * (a[k] - b[k]);
    da[k] = gradient;
    db[k] = -gradient;
  }
}

template <typename T>
__global__ void __launch_bounds__(kOmegaPairThreads)
    omega_halves_kernel(const OmegaHalves args, double* ratios /* [pairs] */) {
  __shared__ double scratch[kOmegaPairThreads];
  const int64_t pair = blockIdx.x, x = pair * args.d, z = pair * args.l;
  const int64_t other_x = x + args.pairs * args.d, other_z = z + args.pairs * args.l;
  const T* inputs = static_cast<const T*>(args.inputs);
  const T* codes = static_cast<const T*>(args.codes);
  const T distance = row_distance(inputs + x, inputs + other_x, args.d, scratch);
  const OmegaTerms<T> terms = omega_terms(distance, row_distance(codes + z, codes + other_z, args.l, scratch));
  if (threadIdx.x == 0) ratios[pair] = static_cast<double>(terms.ratio);
  if (args.dinputs != nullptr) {
    T* dinputs = static_cast<T*>(args.dinputs);
    write_differences(inputs + x, inputs + other_x, args.d, terms.input_weight, dinputs + x, dinputs + other_x);
  }
  if (args.dcodes != nullptr) {
    T* dcodes = static_cast<T*>(args.dcodes);
    write_differences(codes + z, codes + other_z, args.l, terms.code_weight, dcodes + z, dcodes + other_z);
  }
}

// ----------------------------------------------------------------------------------------------------------------
// Launchers

void launch_total(const double* sums, const OmegaLargest* largest, int64_t count, double* sum, int64_t* pair,
                  cudaStream_t stream) {
  if (sums == nullptr && largest == nullptr) return;
  launch("omega_total_kernel", omega_total_kernel, 1, kTileThreads, 0, stream, sums, largest, count, sum, pair);
}

template <typename T>
void launch_gradient(const void* points, int64_t b, int64_t dims, const T* weights, int64_t first_row,
                     int64_t row_tiles, void* gradient, cudaStream_t stream) {
  if (gradient == nullptr) return;
  const int64_t coordinate_tiles = ceil_div(dims, kTile);
  launch("omega_gradient_kernel", omega_gradient_kernel<T>, row_tiles * coordinate_tiles, kTileThreads, 0, stream,
         static_cast<const T*>(points), b, dims, weights, first_row, coordinate_tiles, static_cast<T*>(gradient));
}

template <typename T>
void launch_all(const OmegaAll& args, void* workspace, cudaStream_t stream) {
  const Plan plan(args);
  const Scratch<T> scratch = plan.scratch<T>(args, workspace);
  const bool with_weights = args.dinputs != nullptr || args.dcodes != nullptr;
  const int64_t band_tiles = with_weights ? plan.band / kTile : plan.tiles;
  for (int64_t first = 0; first < plan.tiles; first += band_tiles) {
    const int64_t row_tiles = std::min(band_tiles, plan.tiles - first);
    launch("omega_pairs_kernel", omega_pairs_kernel<T>, row_tiles * plan.tiles, kTileThreads, 0, stream, args, scratch,
           plan.tiles, first);
    launch_gradient(args.inputs, args.b, args.d, scratch.input_weights, first * kTile, row_tiles, args.dinputs, stream);
    launch_gradient(args.codes, args.b, args.l, scratch.code_weights, first * kTile, row_tiles, args.dcodes, stream);
  }
  launch_total(scratch.sums, scratch.largest, plan.tiles * plan.tiles, args.sum, args.largest, stream);
}

template <typename T>
void launch_halves(const OmegaHalves& args, void* workspace, cudaStream_t stream) {
  double* ratios = static_cast<double*>(workspace);
  launch("omega_halves_kernel", omega_halves_kernel<T>, args.pairs, kOmegaPairThreads, 0, stream, args, ratios);
  launch_total(ratios, nullptr, args.pairs, args.sum, nullptr, stream);
}

}  // namespace

int64_t omega_all_workspace(const OmegaAll& args, int) { return Plan(args).bytes; }

void omega_all(const OmegaAll& args, void* workspace, int, uintptr_t stream) {
  if (args.dtype == DType::kFloat32) {
    launch_all<float>(args, workspace, reinterpret_cast<cudaStream_t>(stream));
  } else {
    launch_all<double>(args, workspace, reinterpret_cast<cudaStream_t>(stream));
  }
}

int64_t omega_halves_workspace(const OmegaHalves& args, int) {
  return args.pairs * static_cast<int64_t>(sizeof(double));
}

void omega_halves(const OmegaHalves& args, void* workspace, int, uintptr_t stream) {
  if (args.dtype == DType::kFloat32) {
    launch_halves<float>(args, workspace, reinterpret_cast<cudaStream_t>(stream));
  } else {
    launch_halves<double>(args, workspace, reinterpret_cast<cudaStream_t>(stream));
  }
}

}  // namespace cuda
}  // namespace kdejsd
