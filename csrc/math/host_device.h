// Marks a function that is compiled for the host and, by nvcc, for the device too.
#pragma once

#ifdef __CUDACC__
#define KDEJSD_HD __host__ __device__
#else
#define KDEJSD_HD
#endif
