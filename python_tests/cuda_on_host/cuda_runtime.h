// Stands in for the CUDA runtime's header where the kernels of csrc/cuda are compiled as plain C++ and run on the host:
// blocks one after the other, a block's threads as coroutines that change places where they wait for each other. What a
// kernel computes is the same for any order of its threads, or it lacks a barrier; Device::backwards lets tests try
// two.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

// ----------------------------------------------------------------------------------------------------------------
// The language. All threads of a block are on one thread of the host: what is local to that one they share.

#define __host__
#define __device__
#define __global__
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(...)

struct dim3 {
  unsigned int x, y, z;
  dim3(unsigned int x = 1) : x(x), y(1), z(1) {}
};
inline dim3 threadIdx, blockIdx, blockDim;

// ----------------------------------------------------------------------------------------------------------------
// The device and its runtime, as far as the launchers ask for them

enum cudaError_t { cudaSuccess, cudaErrorInvalidValue, cudaErrorLaunchFailure, cudaErrorNoKernelImageForDevice };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

namespace host {

struct Device {
  int multiprocessors = 132;
  int shared_bytes = 227 * 1024;  // that a block may have
  bool backwards = false;         // the order in which threads run
  std::string error;              // of the last launch that failed
  int devices_set = 0;            // calls of cudaSetDevice
  int allowances = 0;             // calls of cudaFuncSetAttribute
};
inline Device device;

// Of dynamic shared memory, that a block of each kernel may have; 48 KiB where nothing was allowed.
inline std::map<const void*, int> allowed_bytes;

}  // namespace host

inline const char* cudaGetErrorName(cudaError_t) { return "cudaError"; }
inline const char* cudaGetErrorString(cudaError_t) { return host::device.error.c_str(); }
inline cudaError_t cudaGetDevice(int* index) { return *index = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return ++host::device.devices_set, cudaSuccess; }

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrMultiProcessorCount ? host::device.multiprocessors : host::device.shared_bytes;
  return cudaSuccess;
}

inline cudaError_t cudaFuncSetAttribute(const void* kernel, cudaFuncAttribute, int bytes) {
  ++host::device.allowances;
  if (bytes <= host::device.shared_bytes) {
    host::allowed_bytes[kernel] = bytes;
    return cudaSuccess;
  }
  host::device.error = "more shared memory than a block may have";
  return cudaErrorInvalidValue;
}

// As if every thread had 255 registers: what kernels really have, nvcc alone knows.
inline cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int threads, size_t bytes) {
  const int by_registers = 65536 / (256 * threads), by_memory = static_cast<int>(228 * 1024 / (bytes + 1024));
  *blocks = by_registers < by_memory ? by_registers : by_memory;
  return cudaSuccess;
}

inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  return std::memset(to, value, bytes), cudaSuccess;
}

// ----------------------------------------------------------------------------------------------------------------
// A block of threads

namespace kdejsd {
namespace cuda {
alignas(16) inline thread_local unsigned char shared_memory[227 * 1024];  // the dynamic part
}
}  // namespace kdejsd

namespace host {

constexpr int kWarp = 32;
constexpr int kLargestValue = 32;  // bytes that a lane shows the others at a time
constexpr size_t kStackBytes = 256 * 1024;

// A copy into shared memory that has been asked for: it happens when it is waited for, and no sooner.
struct Copy {
  void* to;
  const void* from;
  int bytes;
};

struct Thread {
  ucontext_t start;
  jmp_buf place;
  std::unique_ptr<unsigned char[]> stack{new unsigned char[kStackBytes]};
  bool started, done;
  int turn;  // of the two sets of slots for values
  std::vector<Copy> copies;
};

struct Barrier {
  int waiting, members, rounds;
};

struct Warp {
  Barrier barrier;
  alignas(16) unsigned char values[2][kWarp][kLargestValue];
};

class Block {
 public:
  // Runs the kernel in every thread; false if they end up waiting for each other for ever.
  bool run(const std::function<void()>& kernel, int count) {
    if (static_cast<int>(threads_.size()) < count) threads_.resize(count);
    kernel_ = &kernel;
    barrier_ = {0, count, 0};
    votes_[0] = votes_[1] = false;
    warps_.resize((count + kWarp - 1) / kWarp);
    for (Warp& warp : warps_) warp.barrier = {0, 0, 0};
    for (int i = 0; i < count; ++i) {
      Thread& thread = threads_[i];
      thread.started = thread.done = false;
      thread.turn = 0;
      thread.copies.clear();
      ++warps_[i / kWarp].barrier.members;
    }
    while (barrier_.members > 0) {
      moved_ = false;
      for (int i = 0; i < count; ++i) visit(host::device.backwards ? count - 1 - i : i);
      if (!moved_) return false;
    }
    return true;
  }

  void wait_for_block() { wait(barrier_); }
  bool vote(bool mine) {
    bool& all = votes_[barrier_.rounds % 2];
    all = all || mine;
    wait_for_block();
    return all;
  }
  void wait_for_warp() { wait(warp().barrier); }
  Thread& thread() { return threads_[threadIdx.x]; }

  // Shows a value to the warp; returns where all lanes' values then are.
 template <typename T>
 unsigned char (*show(const T& value)) [kLargestValue] {
   static_assert(sizeof(T) <= kLargestValue, "a lane has no more room");
   auto* values = warp().values[thread().turn ^= 1];
   std::memcpy(values[threadIdx.x % kWarp], &value, sizeof(T));
   wait_for_warp();
   return values;
 }

 private : static void enter();

  Warp& warp() { return warps_[threadIdx.x / kWarp]; }

  void visit(int i) {
    if (threads_[i].done) return;
    threadIdx.x = i;
    if (_setjmp(scheduler_) != 0) return;
    if (threads_[i].started) _longjmp(threads_[i].place, 1);
    threads_[i].started = true;
    getcontext(&threads_[i].start);
    threads_[i].start.uc_stack.ss_sp = threads_[i].stack.get();
    threads_[i].start.uc_stack.ss_size = kStackBytes;
    makecontext(&threads_[i].start, &Block::enter, 0);
    setcontext(&threads_[i].start);
  }

  void wait(Barrier& barrier) {
    const int round = barrier.rounds;
    ++barrier.waiting;
    release(barrier);
    while (barrier.rounds == round) {
      if (_setjmp(thread().place) == 0) _longjmp(scheduler_, 1);
    }
  }

  void release(Barrier& barrier) {
    if (barrier.waiting < barrier.members) return;
    barrier.waiting = 0;
    ++barrier.rounds;
    moved_ = true;
    if (&barrier == &barrier_) votes_[barrier.rounds % 2] = false;  // that of the round before, which all have read
  }

  void leave(Barrier& barrier) {  // who has left is not waited for
    --barrier.members;
    release(barrier);
  }

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Barrier barrier_;
  bool votes_[2];  // whether a thread that waits at the block's barrier has said so: of this round and of the next
  const std::function<void()>* kernel_;
  jmp_buf scheduler_;
  bool moved_;
};
inline Block block;

inline void Block::enter() {
  (*block.kernel_)();
  block.thread().done = true;
  block.leave(block.barrier_);
  block.leave(block.warp().barrier);
  block.moved_ = true;
  _longjmp(block.scheduler_, 1);
}

}  // namespace host

inline void __syncthreads() { host::block.wait_for_block(); }
inline int __syncthreads_or(int mine) { return host::block.vote(mine != 0); }
inline void __syncwarp(unsigned int = 0xffffffffu) { host::block.wait_for_warp(); }

template <typename T>
T __shfl_sync(unsigned int, T value, int lane) {
  const auto* values = host::block.show(value);
  std::memcpy(&value, values[lane % host::kWarp], sizeof(T));
  return value;
}

template <typename T>
T __shfl_xor_sync(unsigned int mask, T value, int lanes) {
  return __shfl_sync(mask, value, (threadIdx.x % host::kWarp) ^ lanes);
}

template <typename T>
T __shfl_down_sync(unsigned int mask, T value, int lanes) {
  const int lane = threadIdx.x % host::kWarp;
  return __shfl_sync(mask, value, lane + lanes < host::kWarp ? lane + lanes : lane);
}

inline bool __all_sync(unsigned int, bool mine) {
  const auto* values = host::block.show(mine);
  bool all = true;
  for (int lane = 0; lane < host::kWarp; ++lane) all = all && values[lane][0];
  return all;
}

// The NaN that a device's arithmetic gives has all bits set; the host's has one.
inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  return std::memcpy(&bits, &x, sizeof(bits)), x != x ? 0x7fffffffu : bits;
}

inline float __uint_as_float(uint32_t bits) {
  float x;
  return std::memcpy(&x, &bits, sizeof(x)), x;
}

// ----------------------------------------------------------------------------------------------------------------
// Launches

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  const auto allowed = host::allowed_bytes.find(reinterpret_cast<const void*>(kernel));
  if (config->dynamicSmemBytes > (allowed == host::allowed_bytes.end() ? 48 * 1024 : static_cast<size_t>(allowed->second))) {
    host::device.error = "more shared memory than the kernel is allowed";
    return cudaErrorInvalidValue;
  }
  const std::function<void()> call = [&] { kernel(static_cast<Parameters>(arguments)...); };
  blockDim = config->blockDim;
  for (unsigned int i = 0; i < config->gridDim.x; ++i) {
    blockIdx.x = i;
    std::memset(kdejsd::cuda::shared_memory, 0xff, sizeof(kdejsd::cuda::shared_memory));  // NaN: nothing is there yet
    if (!host::block.run(call, static_cast<int>(blockDim.x))) {
      host::device.error = "threads wait for each other for ever";
      return cudaErrorLaunchFailure;
    }
  }
  return cudaSuccess;
}
