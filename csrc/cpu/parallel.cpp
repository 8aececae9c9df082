#include "cpu/parallel.h"

#include <algorithm>
#include <chrono>
#include <ctime>
#include <thread>

namespace kdejsd {
namespace cpu {

// A small loss is no matter, and a single one, a hiccup of the system, says nothing about the next call. After a second
// one the caller works alone for a time that is long beside the loss, and longer where losses go on right after it: a
// busy machine takes a small share of the time, and one that was busy for a moment is used again soon.
constexpr int64_t kNoise = 300000, kMemory = 100000000;
constexpr int64_t kPauses = 20, kLongestPause = 1000000000;

constexpr int kSpins = 1000;  // some ten microseconds

OpenMP openmp;

const int64_t kPatience = 20000000;

void Waiting::add(Clocks began, Shares shares) {
  if (nanoseconds() - began.wall < kNoise) return;  // nor can more have been lost; the other clock is a slow one
  const Clocks now = Clocks::now();
  // What others took of the time for its work. One who works alone may lose that too, but not to a thread of its own
  // process, which spins on the same core until it gets its share of the next region.
  const int64_t without_core = (now.wall - began.wall) - (now.own - began.own);
  const int64_t away = std::min(std::max<int64_t>(without_core - shares.waited, 0), shares.worked);
  const double speed = shares.worked ? 1.0 - static_cast<double>(away) / static_cast<double>(shares.worked) : 0.0;
  lose(shares.waited + away - static_cast<int64_t>(static_cast<double>(shares.spared) * speed), now.wall);
}

void Waiting::lose(int64_t lost, int64_t now) {
  if (lost < kNoise) return;
  const bool again = now < std::max(last_loss, alone_until) + pause + kMemory;
  pause = again ? std::min(std::max(kPauses * lost, 2 * pause), kLongestPause) : 0;
  last_loss = now;
  alone_until = now + pause;
}

Waiting& waiting() {
  static thread_local Waiting of_this_thread;
  return of_this_thread;
}

Clocks Clocks::now() {
  timespec own = {};
  clock_gettime(CLOCK_THREAD_CPUTIME_ID, &own);
  return {nanoseconds(), own.tv_sec * int64_t{1000000000} + own.tv_nsec};
}

int64_t nanoseconds() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

void wait_for(const std::atomic<int64_t>& count, int64_t value) {
  for (int tries = 0; count.load(std::memory_order_acquire) < value; tries++) {
    // The one that is waited for may need this core.
    if (tries >= kSpins) {
      std::this_thread::yield();
    } else {
#if defined(__x86_64__)
      __builtin_ia32_pause();
#endif
    }
  }
}

}  // namespace cpu
}  // namespace kdejsd
