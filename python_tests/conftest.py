"""Workers of a parallel run (`-n`) take one thread each: two OpenMP teams on the same cores wait for each other."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which comes later
