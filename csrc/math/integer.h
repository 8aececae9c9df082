// Whole numbers on host and device.
#pragma once

#include <cstdint>

#include "math/host_device.h"

namespace kdejsd {

KDEJSD_HD constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace kdejsd
