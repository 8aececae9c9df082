// Chooses, once and at run time, the instruction set whose copy of the kernels is called.

#include <cstdlib>
#include <stdexcept>

#include "kernels.h"

namespace kdejsd::cpu {

#define KDEJSD_DECLARE_LEVEL(level)           \
  namespace level {                           \
  void kde_forward(const KdeForward&, int);   \
  void kde_backward(const KdeBackward&, int); \
  }
KDEJSD_DECLARE_LEVEL(base)
#ifdef KDEJSD_X86_LEVELS
KDEJSD_DECLARE_LEVEL(v3)
KDEJSD_DECLARE_LEVEL(v4)
#endif
#undef KDEJSD_DECLARE_LEVEL

namespace {

struct Level {
  const char* name;
  void (*kde_forward)(const KdeForward&, int);
  void (*kde_backward)(const KdeBackward&, int);
};

constexpr Level kLevels[] = {
    {"base", base::kde_forward, base::kde_backward},
#ifdef KDEJSD_X86_LEVELS
    {"v3", v3::kde_forward, v3::kde_backward},
    {"v4", v4::kde_forward, v4::kde_backward},
#endif
};

bool runs_here(const std::string& name) {
#ifdef KDEJSD_X86_LEVELS
  // The compiler's names for what x86-64-v3 and v4 add; older compilers lack the names of the levels themselves.
  __builtin_cpu_init();
  const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (name == "v3") return v3;
  if (name == "v4") {
    return v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl");
  }
#endif
  return name == "base";
}

const Level* find(const std::string& name) {
  for (const Level& candidate : kLevels) {
    if (name == candidate.name && runs_here(name)) return &candidate;
  }
  return nullptr;
}

const Level* best() {
  const Level* chosen = kLevels;
  for (const Level& candidate : kLevels) {
    if (runs_here(candidate.name)) chosen = &candidate;
  }
  return chosen;
}

const Level* current = best();

}  // namespace

void kde_forward(const KdeForward& args, int threads) { current->kde_forward(args, threads); }
void kde_backward(const KdeBackward& args, int threads) { current->kde_backward(args, threads); }

const char* level() { return current->name; }

std::string built_levels() {
  std::string names;
  for (const Level& built : kLevels) names += (names.empty() ? "" : ",") + std::string(built.name);
  return names;
}

bool set_level(const std::string& name) {
  const Level* chosen = find(name);
  if (chosen) current = chosen;
  return chosen != nullptr;
}

bool has_openmp() {
#ifdef _OPENMP
  return true;
#else
  return false;
#endif
}

}  // namespace kdejsd::cpu
