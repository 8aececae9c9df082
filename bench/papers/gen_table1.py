"""Table 1 of the GENs paper, computed anew: the optimal bandwidth by latent dimension l and number of centers m.

    python bench/papers/gen_table1.py                  # the whole table, a few minutes
    python bench/papers/gen_table1.py --quick          # under a minute: small m, few trials
    ... --csv FILE                                     # leave a record; run again with it, it goes on from there

Paper: S. Saha, S. Elhabian, R. T. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283. `PRINTED` holds its
table: means and standard deviations of ten trials, to two decimals.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import get_type_hints

from record import Record

from kdejsd.bandwidth import optimal_bandwidth

LATENT_DIMS = (2, 5, 10, 20, 40)
NUM_CENTERS = (250, 500, 1000, 2000, 4000, 8000)
QUICK_CENTERS = (250, 500, 1000)
TRIALS = 100
QUICK_TRIALS = 10
PRINTED_TRIALS = 10
ROUNDING = 0.005  # half a unit of the paper's last digit


@dataclass(frozen=True)
class Cell:
    """One of our cells, and a row of the record."""

    latent_dim: int
    num_centers: int
    seed: int
    trials: int
    bandwidth: float
    spread: float

    @property
    def standard_error(self) -> float:
        return self.spread / math.sqrt(self.trials)


KINDS = get_type_hints(Cell)


@dataclass(frozen=True)
class Printed:
    """A cell as the paper prints it: mean and standard deviation over its trials, or only that it is above a number."""

    value: float
    spread: float | None = None

    def __str__(self) -> str:
        return f"> {self.value}" if self.spread is None else f"{self.value:.2f} ± {self.spread:.2f}"

    def agrees(self, ours: Cell) -> bool:
        """Within 3 standard errors of the difference, and half a unit of the last printed digit for rounding.

        A printed deviation of 0.00 is a rounded one, and counts as the largest that is printed so.
        """
        if self.spread is None:
            return ours.bandwidth + 3 * ours.standard_error > self.value
        error = (self.spread or ROUNDING) / math.sqrt(PRINTED_TRIALS)
        return abs(ours.bandwidth - self.value) <= 3 * math.hypot(ours.standard_error, error) + ROUNDING


_ROWS = {
    2: [(0.46, 0.08), (0.41, 0.04), (0.38, 0.03), (0.34, 0.02), (0.31, 0.03), (0.28, 0.01)],
    5: [(0.65, 0.03), (0.59, 0.02), (0.55, 0.02), (0.51, 0.01), (0.47, 0.01), (0.44, 0.01)],
    10: [(0.77, 0.02), (0.73, 0.01), (0.69, 0.01), (0.66, 0.01), (0.63, 0.01), (0.60, 0.01)],
    20: [(0.92, 0.01), (0.89, 0.01), (0.86, 0.00), (0.82, 0.01), (0.80, 0.00), (0.77, 0.00)],
    40: [(1.0,), (1.0,), (1.0,), (0.98, 0.00), (0.95, 0.00), (0.94, 0.00)],
}
PRINTED = {(dim, m): Printed(*cell) for dim, row in _ROWS.items() for m, cell in zip(NUM_CENTERS, row, strict=True)}


def table(cells: dict[tuple[int, int], Cell]) -> str:
    """Ours with its standard error above the printed cell and whether they agree, a pair of lines per dimension."""
    columns = sorted({m for _, m in cells})
    lines = [f"{'l':>3} {'':7}" + "".join(f"{f'm = {m}':>21}" for m in columns)]
    for dim in sorted({dim for dim, _ in cells}):
        row = [cells[dim, m] for m in columns]
        ours = [f"{cell.bandwidth:.4f} ± {cell.standard_error:.4f}" for cell in row]
        printed = [(PRINTED[dim, m], PRINTED[dim, m].agrees(cells[dim, m])) for m in columns]
        theirs = [f"{cell} {'agrees' if agrees else 'DIFFERS'}" for cell, agrees in printed]
        lines += [f"{dim:>3} {'ours':7}" + "".join(f"{text:>21}" for text in ours)]
        lines += [f"{'':3} {'printed':7}" + "".join(f"{text:>21}" for text in theirs)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Table 1 of the GENs paper (arXiv 2010.15283) beside our own values.")
    parser.add_argument("--quick", action="store_true", help=f"m up to {QUICK_CENTERS[-1]}, {QUICK_TRIALS} trials")
    parser.add_argument("--trials", type=int, help=f"trials per cell (default {TRIALS}; at least 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where results go, and from where a run goes on")
    options = parser.parse_args(arguments)
    trials = options.trials or (QUICK_TRIALS if options.quick else TRIALS)
    if trials < 2:
        parser.error(f"--trials must be at least 2, for a standard error, got {trials}")

    record = Record(options.csv, KINDS)
    known = (Cell(**row) for row in record.find(seed=options.seed, trials=trials))
    cells = {(cell.latent_dim, cell.num_centers): cell for cell in known}
    wanted = [(dim, m) for dim in LATENT_DIMS for m in (QUICK_CENTERS if options.quick else NUM_CENTERS)]
    todo = [key for key in wanted if key not in cells]
    start = time.perf_counter()
    for number, (dim, m) in enumerate(todo, 1):
        found = optimal_bandwidth(dim, m, trials=trials, seed=options.seed)
        cells[dim, m] = ours = Cell(dim, m, options.seed, trials, round(found.value, 6), round(found.std, 6))
        record.add(asdict(ours))
        print(
            f"[{number:2}/{len(todo)}] l = {dim:2}, m = {m:4}: h = {ours.bandwidth:.4f}, spread {ours.spread:.4f}, "
            f"standard error {ours.standard_error:.4f}   ({time.perf_counter() - start:.1f} s)",
            flush=True,
        )

    agreeing = sum(PRINTED[key].agrees(cells[key]) for key in wanted)
    print(f"\nOptimal bandwidth for a standard normal target: mean of {trials} trials ± its standard error;")
    print(f"printed: mean of {PRINTED_TRIALS} trials ± their standard deviation\n")
    print(table({key: cells[key] for key in wanted}))
    print(
        "\nA printed number agrees if it is within 3 standard errors of the difference plus half a unit of its last\n"
        f"digit for rounding. The paper's standard error is the printed deviation over the root of {PRINTED_TRIALS};\n"
        f'one of 0.00 counts as {ROUNDING}. A "> x" agrees if ours plus 3 standard errors is above x.'
    )
    print(f"Of the {len(wanted)} printed cells {agreeing} agree.")
    return 0 if agreeing == len(wanted) else 1


if __name__ == "__main__":
    raise SystemExit(main())
