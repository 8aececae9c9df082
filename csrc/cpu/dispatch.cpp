// Chooses, once and at run time, the instruction set whose copy of the kernels is called.

#include <pthread.h>
#ifdef KDEJSD_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/parallel.h"
#include "cpu/tile_sizes.h"
#include "kernels.h"
#include "machine.h"

namespace kdejsd::cpu {

#define KDEJSD_DECLARE_OP(name, Args) void name(const Args&, int);
#define KDEJSD_DECLARE_LEVEL    \
  KDEJSD_OPS(KDEJSD_DECLARE_OP) \
  extern const TileSize kde_sizes[], omega_sizes[], radius_sizes[], nearest_sizes[];
namespace base {
KDEJSD_DECLARE_LEVEL
}
#ifdef KDEJSD_X86_LEVELS
namespace v3 {
KDEJSD_DECLARE_LEVEL
}
namespace v4 {
KDEJSD_DECLARE_LEVEL
}
#endif
#ifdef KDEJSD_AMX
namespace amx {
KDEJSD_DECLARE_OP(kde_forward, KdeForward)
extern const TileSize kde_sizes[];
}  // namespace amx
#endif
#undef KDEJSD_DECLARE_LEVEL
#undef KDEJSD_DECLARE_OP

namespace {

struct Level {
  const char* level;
#define KDEJSD_OP_POINTER(name, Args) void (*name)(const Args&, int);
  KDEJSD_OPS(KDEJSD_OP_POINTER)
#undef KDEJSD_OP_POINTER
  const TileSize* sizes[5];  // null behind the last list
};

#ifdef KDEJSD_AMX
// The matrix instructions serve where the caller allows their error, and where they gain something.
void kde_forward_amx(const KdeForward& args, int threads) {
  const bool by_matrices =
      args.mixture.dtype == DType::kFloat32 && args.products == KdeProducts::kReduced && args.mixture.l >= kMatrixDims;
  (by_matrices ? amx::kde_forward : v4::kde_forward)(args, threads);
}
#endif

#define KDEJSD_SIZES(level) level::kde_sizes, level::omega_sizes, level::radius_sizes, level::nearest_sizes
constexpr Level kLevels[] = {
#define KDEJSD_BASE_OP(name, Args) base::name,
    {"base", KDEJSD_OPS(KDEJSD_BASE_OP){KDEJSD_SIZES(base)}},
#ifdef KDEJSD_X86_LEVELS
#define KDEJSD_V3_OP(name, Args) v3::name,
#define KDEJSD_V4_OP(name, Args) v4::name,
    {"v3", KDEJSD_OPS(KDEJSD_V3_OP){KDEJSD_SIZES(v3)}},
    {"v4", KDEJSD_OPS(KDEJSD_V4_OP){KDEJSD_SIZES(v4)}},
#endif
#ifdef KDEJSD_AMX
    {"amx",
     kde_forward_amx,
     v4::kde_backward,
     v4::omega_all,
     v4::omega_halves,
     v4::radius,
     v4::nearest,
     {amx::kde_sizes, KDEJSD_SIZES(v4)}},
#endif
};

#ifdef KDEJSD_AMX
// Whether the processor multiplies matrices of bfloat16, and the system keeps their registers for this process: it is
// asked once, and may refuse.
bool has_amx() {
  static const bool has = [] {
    unsigned int a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned int kNeeded = 1u << 22 | 1u << 24;  // AMX-BF16, AMX-TILE
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || (d & kNeeded) != kNeeded) return false;
    constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  }();
  return has;
}
#endif

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
#ifdef KDEJSD_AMX
  if (name == "amx") return runs_here("v4") && has_amx();
#endif
#endif
  return name == "base";
}

const Level* find(const std::string& name) {
  for (const Level& candidate : kLevels) {
    if (name == candidate.level && runs_here(name)) return &candidate;
  }
  return nullptr;
}

const Level* best() {
  const Level* chosen = kLevels;
  for (const Level& candidate : kLevels) {
    if (runs_here(candidate.level)) chosen = &candidate;
  }
  return chosen;
}

const Level* current = best();

// A forked process has the thread that forked alone, but OpenMP waits for those that it had before: no second one then.
bool is_forked = false;
[[maybe_unused]] const int registered = pthread_atfork(nullptr, nullptr, [] { is_forked = true; });

}  // namespace

#define KDEJSD_CALL_OP(name, Args) \
  void name(const Args& args, int threads) { current->name(args, is_forked || !openmp.parallel ? 1 : threads); }
KDEJSD_OPS(KDEJSD_CALL_OP)

const char* level() { return current->level; }

std::string built_levels() {
  std::string names;
  for (const Level& built : kLevels) names += (names.empty() ? "" : ",") + std::string(built.level);
  return names;
}

bool set_level(const std::string& name) {
  const Level* chosen = find(name);
  if (chosen) current = chosen;
  return chosen != nullptr;
}

std::map<std::string, std::map<std::string, int64_t>> tile_sizes() {
  std::map<std::string, std::map<std::string, int64_t>> found;
  for (const TileSize* list : current->sizes) {
    for (; list && list->counted; list++) found[list->counted][list->name] = list->size;
  }
  return found;
}

}  // namespace kdejsd::cpu
