// Threads for the kernels, by the OpenMP runtime that torch has loaded; one thread where it has none.
//
// OpenMP's own barriers spin for milliseconds before they sleep. Where a neighbour has one of the cores, a thread spins
// there while the one that it waits for is not even running, at every barrier again. A team therefore has one barrier
// of OpenMP's, at its end, and comes to that one together. Between, whoever is there takes the next unit of work: a
// thread that is late finds nothing left to do, and holds up the others but for a unit that it has begun. A caller to
// whom its team costs more time than it spares works alone for a while.
//
// How the work is cut into units is the caller's affair, and must not depend on who is there: so it gives the same
// bits.
#pragma once

#include <atomic>
#include <cstdint>

namespace kdejsd::cpu {

// What is called of the runtime: the names that GCC's code calls, which LLVM's and Intel's runtimes have too. No
// runtime is linked: which file torch's is, and under which name, differs between its builds, and a second one beside
// it would keep the same cores busy.
struct OpenMP {
  void (*parallel)(void (*body)(void*), void* data, unsigned threads, unsigned flags) = nullptr;  // GOMP_parallel
  int (*thread_num)() = nullptr;                                                                  // omp_get_thread_num
  int (*num_threads)() = nullptr;                                                                 // omp_get_num_threads
};
extern OpenMP openmp;

// All times are in nanoseconds.
struct Clocks {
  int64_t wall, own;  // `own` is the time for which this thread has had a core

  static Clocks now();
};

// Of a caller's time in a region: its work, and what it waited; and what the others spared it, reckoned as if they were
// as fast.
struct Shares {
  int64_t worked = 0, waited = 0, spared = 0;
};

// What the calls of one thread have found out about their teams.
struct Waiting {
  int64_t alone_until = 0, pause = 0, last_loss = 0;
  int64_t alone = 0, teams = 0;  // regions that were completed so

  void add(Clocks began, Shares shares);
  void lose(int64_t lost, int64_t now);
};

Waiting& waiting();              // of this thread
extern const int64_t kPatience;  // after which work that was begun alone is worth a team all the same
int64_t nanoseconds();
void wait_for(const std::atomic<int64_t>& count, int64_t value);

}  // namespace kdejsd::cpu

namespace {

class Team {
 public:
  // Calls body(part) on up to `threads` threads, part.thread of each being less; without a runtime `threads` is 1. The
  // body runs the same stages on each of them, and nothing beside them that matters to others: it may be begun twice on
  // one.
  template <class Body>
  static void run(int threads, const Body& body) {
    Team team;
    kdejsd::cpu::Waiting& waiting = kdejsd::cpu::waiting();
    kdejsd::cpu::Clocks began = {0, 0};
    if (threads > 1) began = kdejsd::cpu::Clocks::now();
    if (threads == 1 || began.wall < waiting.alone_until) {
      Part alone(team, 0);
      if (threads > 1) alone.stop_at = began.wall + kdejsd::cpu::kPatience;
      body(alone);
      if (!alone.stopped) {
        waiting.alone++;
        return;
      }
      began = kdejsd::cpu::Clocks::now();
    }
    waiting.teams++;
    // OpenMP waits at both ends of a region, and spins there too.
    Part caller(team, 0);
    caller.is_timed = true;
    caller.last = began.wall;
    auto region = [&] {
      Part other(team, kdejsd::cpu::openmp.thread_num());
      Part& part = other.thread == 0 ? caller : other;
      part.add_wait();
      body(part);
      if (part.thread == 0) {
        part.wait_for(team.arrived, kdejsd::cpu::openmp.num_threads() - 1);
      } else {
        team.arrived.fetch_add(1, std::memory_order_release);
      }
    };
    using Region = decltype(region);
    kdejsd::cpu::openmp.parallel([](void* data) { (*static_cast<Region*>(data))(); }, &region,
                                 static_cast<unsigned>(threads), 0);
    caller.add_wait();
    waiting.add(began, caller.shares);
  }

  // One thread's way through the stages.
  class Part {
   public:
    const int thread;

    // A stage: f(unit) for every unit < count, each by one thread. Returns when all of them are done.
    template <class F>
    void each(int64_t count, const F& f) {
      if (stopped) return;
      const int64_t end = begin + count;
      int64_t unit = team.next.load(std::memory_order_relaxed), own = 0;
      while (unit < end) {
        if (!team.next.compare_exchange_weak(unit, unit + 1, std::memory_order_relaxed)) continue;
        f(unit - begin);
        own++;
        team.done.fetch_add(1, std::memory_order_release);
        unit = team.next.load(std::memory_order_relaxed);
        if (stop_at && unit < end && kdejsd::cpu::nanoseconds() > stop_at) {
          stopped = true;
          return;
        }
      }
      if (is_timed) {
        const int64_t worked = lap();
        shares.worked += worked;
        if (own) shares.spared += worked * (count - own) / own;
      }
      wait_for(team.done, end);
      begin = end;
    }

    // A stage of many small units: f(first, last) for a few ranges of them.
    template <class F>
    void ranges(int64_t count, int threads, const F& f) {
      const int64_t most = threads == 1 ? 1 : 8 * threads, pieces = count < most ? count : most;
      each(pieces, [&](int64_t piece) { f(count * piece / pieces, count * (piece + 1) / pieces); });
    }

   private:
    friend class Team;
    Part(Team& team, int thread) : thread(thread), team(team) {}

    void wait_for(const std::atomic<int64_t>& counter, int64_t value) {
      if (counter.load(std::memory_order_acquire) >= value) return;
      kdejsd::cpu::wait_for(counter, value);
      add_wait();
    }

    void add_wait() {
      if (is_timed) shares.waited += lap();
    }

    // The time since the last one.
    int64_t lap() {
      const int64_t before = last;
      last = kdejsd::cpu::nanoseconds();
      return last - before;
    }

    Team& team;
    int64_t begin = 0;  // the stage's first unit, counted over all stages
    kdejsd::cpu::Shares shares;
    int64_t last = 0, stop_at = 0;
    bool is_timed = false, stopped = false;
  };

 private:
  alignas(64) std::atomic<int64_t> next{0};  // unit that nobody has taken, counted over all stages
  alignas(64) std::atomic<int64_t> done{0};
  std::atomic<int64_t> arrived{0};  // threads that have nothing left to do
};

}  // namespace
