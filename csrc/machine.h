// What bindings.cpp can ask of the build and the machine, and choose.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>

namespace kdejsd {
namespace cpu {

// Instruction sets: "amx" (v4 and matrices of bfloat16), "v4" (AVX-512), "v3" (AVX2 with FMA), "base"; built_levels
// lists them, best last.
const char* level();
std::string built_levels();
bool set_level(const std::string& name);  // false: this processor lacks it, or it was not built; nothing changes
// Where the kernels of the level in use cut their work: the sizes by name, of each thing that an op counts.
std::map<std::string, std::map<std::string, int64_t>> tile_sizes();

}  // namespace cpu

#ifdef KDEJSD_CUDA
namespace cuda {

// The cut-offs of the kde op that kde_plan.h names, for benchmarks that compare them without a rebuild.
std::map<std::string, int> tuning();
std::map<std::string, std::pair<int, int>> tuning_ranges();  // the least and the most that set_tuning takes
bool set_tuning(const std::string& name, int value);  // false: no such name, or out of its range; nothing changes

int device_count(std::string* error);  // 0 and the reason where there is none
int runtime_version();                 // of the static CUDA runtime, as 1000 major + 10 minor
int driver_version();                  // 0 without a driver
std::string built_architectures();

}  // namespace cuda
#endif

}  // namespace kdejsd
