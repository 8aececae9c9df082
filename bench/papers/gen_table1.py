"""Table 1 of the GENs paper, computed anew: the optimal bandwidth by latent dimension l and number of centers m.

    python bench/papers/gen_table1.py                  # the whole table
    python bench/papers/gen_table1.py --quick          # under a minute: small m, few trials

Paper: S. Saha, S. Elhabian, R. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283. Its printed cells are
compared where they are known here: `PRINTED` below, and what `--printed` adds from one's own copy of the paper.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from dataclasses import dataclass
from pathlib import Path

from kdejsd.bandwidth import OptimalBandwidth, optimal_bandwidth

LATENT_DIMS = (2, 5, 10, 20, 40)
NUM_CENTERS = (250, 500, 1000, 2000, 4000, 8000)
QUICK_CENTERS = (250, 500, 1000)
TRIALS = 100
QUICK_TRIALS = 10


@dataclass(frozen=True)
class Printed:
    """A cell as the paper prints it: a number, or "> x"; and the standard error of the paper's own mean."""

    text: str
    standard_error: float = 0.0

    def agrees(self, ours: OptimalBandwidth) -> bool:
        """Within 3 standard errors of the difference, and half a unit of the last printed digit for rounding."""
        allowed = 3 * math.hypot(ours.standard_error, self.standard_error)
        if self.text.startswith(">"):
            return ours.value + allowed > float(self.text[1:])
        decimals = len(self.text.partition(".")[2])
        return abs(ours.value - float(self.text)) <= allowed + 0.5 * 10.0**-decimals


# From this project's design notes, which name the three cells of l = 40 that carry a bound; the other 27 carry numbers
# that the notes do not give. No copy of the table could be had for this, and nothing is given from memory.
PRINTED = {(40, 250): Printed("> 1.0"), (40, 500): Printed("> 1.0"), (40, 1000): Printed("> 1.0")}


def read_printed(path: Path) -> dict[tuple[int, int], Printed]:
    """Printed cells from a CSV file with the columns latent_dim, num_centers, printed and, if known, standard_error."""
    cells = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            try:
                cell = Printed(row["printed"].strip(), float(row.get("standard_error") or 0))
                float(cell.text.lstrip(">"))
                cells[int(row["latent_dim"]), int(row["num_centers"])] = cell
            except (KeyError, ValueError) as error:
                raise ValueError(
                    f"{path}: expected latent_dim, num_centers and printed as numbers, got {row}"
                ) from error
    return cells


def table(found: dict[tuple[int, int], OptimalBandwidth], printed: dict[tuple[int, int], Printed]) -> str:
    """Ours with its standard error above the printed cell and whether they agree, a pair of lines per dimension."""
    columns = sorted({m for _, m in found})
    lines = [f"{'l':>3} {'':7}" + "".join(f"{f'm = {m}':>18}" for m in columns)]
    for dim in sorted({dim for dim, _ in found}):
        ours = [f"{found[dim, m].value:.4f} ± {found[dim, m].standard_error:.4f}" for m in columns]
        theirs = []
        for m in columns:
            cell = printed.get((dim, m))
            theirs.append(
                "?" if cell is None else f"{cell.text} {'agrees' if cell.agrees(found[dim, m]) else 'DIFFERS'}"
            )
        lines += [f"{dim:>3} {'ours':7}" + "".join(f"{text:>18}" for text in ours)]
        lines += [f"{'':3} {'printed':7}" + "".join(f"{text:>18}" for text in theirs)]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Table 1 of the GENs paper (arXiv 2010.15283) beside our own values.")
    parser.add_argument("--quick", action="store_true", help=f"m up to {QUICK_CENTERS[-1]}, {QUICK_TRIALS} trials")
    parser.add_argument("--trials", type=int, help=f"trials per cell (default {TRIALS}; at least 2)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the samples (default 0)")
    parser.add_argument(
        "--printed",
        type=Path,
        metavar="CSV",
        help="file with further printed cells: latent_dim, num_centers, printed[, standard_error]",
    )
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write the table to this file as well")
    options = parser.parse_args(arguments)
    trials = options.trials or (QUICK_TRIALS if options.quick else TRIALS)
    if trials < 2:
        parser.error(f"--trials must be at least 2, for a standard error, got {trials}")
    if options.csv:
        options.csv.parent.mkdir(parents=True, exist_ok=True)
    printed = PRINTED | (read_printed(options.printed) if options.printed else {})

    found = {}
    cells = [(dim, m) for dim in LATENT_DIMS for m in (QUICK_CENTERS if options.quick else NUM_CENTERS)]
    start = time.perf_counter()
    for number, (dim, m) in enumerate(cells, 1):
        found[dim, m] = ours = optimal_bandwidth(dim, m, trials=trials, seed=options.seed)
        print(
            f"[{number:2}/{len(cells)}] l = {dim:2}, m = {m:4}: h = {ours.value:.4f}, spread {ours.std:.4f}, "
            f"standard error {ours.standard_error:.4f}   ({time.perf_counter() - start:.1f} s)",
            flush=True,
        )

    known = [cell for cell in cells if cell in printed]
    agreeing = sum(printed[cell].agrees(found[cell]) for cell in known)
    print(f"\nOptimal bandwidth for a standard normal target: mean of {trials} trials ± its standard error\n")
    print(table(found, printed))
    print(
        "\nA printed number agrees if it is within 3 standard errors (ours and, where known, the paper's, combined)\n"
        'plus half a unit of its last digit for rounding; "> x" agrees if ours plus 3 standard errors is above x.'
    )
    print(f"Of the {len(known)} printed cells known here, {agreeing} agree.")
    if len(known) < len(cells):
        print(
            f"NOT COMPARED: the {len(cells) - len(known)} cells marked ?, whose printed numbers are not available here "
            "(--printed takes\nthem from a file)."
        )
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(
                ("latent_dim", "num_centers", "bandwidth", "spread", "standard_error", "trials", "printed", "agrees")
            )
            for (dim, m), ours in found.items():
                cell = printed.get((dim, m))
                compared = ("", "") if cell is None else (cell.text, cell.agrees(ours))
                numbers = (f"{x:.6f}" for x in (ours.value, ours.std, ours.standard_error))
                writer.writerow((dim, m, *numbers, trials, *compared))
    return 0 if agreeing == len(known) else 1


if __name__ == "__main__":
    raise SystemExit(main())
