// Threads for the kernels: OpenMP where it was found, one thread otherwise.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

inline int thread_index() {
#ifdef _OPENMP
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace
