"""Compares the bandwidths of the standard normal, which are computed by an integral, with those that samples give.

    python bench/bench_bandwidth.py            # some minutes
    python bench/bench_bandwidth.py --quick    # a few seconds

`kdejsd.optimal_bandwidth` maximises the mean of an objective over all sets of samples, without any. With `trials` it
searches the maximum for each of some sets, and takes the mean, which has a standard error. A row has both bandwidths,
their difference in standard errors, and the seconds that each took. The exit status is 1 if a difference is more than 4
standard errors. The mean of the maxima is not quite the maximum of the mean: where sets differ much, at l = 1 and 2,
the search's is a little smaller.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time

import torch

import kdejsd
from kdejsd.bandwidth import OptimalBandwidth, optimal_bandwidth

Cell = tuple[int, int, int]  # l, m, trials

QUICK: list[Cell] = [(2, 100, 10), (8, 300, 10), (64, 200, 5)]
FULL: list[Cell] = [
    *((dim, m, 20) for dim in (1, 2, 8, 64, 256) for m in (100, 1000)),
    *((dim, 10_000, 5) for dim in (1, 2, 8, 64, 256)),
    *((dim, 100_000, 2) for dim in (2, 8)),
]
MOST = 4.0  # standard errors


def timed(dim: int, m: int, trials: int | None) -> tuple[OptimalBandwidth, float]:
    began = time.perf_counter()
    found = optimal_bandwidth(dim, m, trials=trials)
    return found, time.perf_counter() - began


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="few samples, a few seconds")
    cells = QUICK if parser.parse_args(arguments).quick else FULL
    optimal_bandwidth(3, 3)  # what is imported by the first call is not timed
    with tempfile.TemporaryDirectory() as empty:
        # The search would else be read from the disk, where an earlier run has kept it.
        os.environ["XDG_CACHE_HOME"] = empty
        return compare(cells)


def compare(cells: list[Cell]) -> int:
    info = kdejsd.build_info()
    print(f"torch {torch.__version__}, {info['cpu_level']}, {torch.get_num_threads()} threads")
    print(f"{'l':>4}{'m':>9}{'integral':>12}{'search':>12}{'error':>10}{'trials':>8}{'difference':>12}{'seconds':>18}")
    largest = 0.0
    for dim, m, trials in cells:
        (integral, quick), (search, slow) = timed(dim, m, None), timed(dim, m, trials)
        difference = (integral.value - search.value) / search.standard_error
        largest = max(largest, abs(difference))
        print(
            f"{dim:>4}{m:>9}{integral.value:>12.5f}{search.value:>12.5f}{search.standard_error:>10.5f}{trials:>8}"
            f"{difference:>12.1f}{quick:>9.2f}{slow:>9.2f}",
            flush=True,
        )
    print(f"the largest difference is {largest:.1f} standard errors")
    return int(largest > MOST)


if __name__ == "__main__":
    raise SystemExit(main())
