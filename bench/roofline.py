"""Draws what bench_kde.py measured under the roof of the machine.

    python bench/bench_kde.py --csv kde.csv
    python bench/roofline.py kde.csv [MORE.csv ...] --out roofline.png

Across: multiply-adds per exponential, 2 l for value and gradient, which is what decides between the two limits. Up: the
multiply-adds per second that a provider reached, counted as README.md beside this says. The roof is the machine's limit
as it was measured beside each size; a method that leaves out work that cannot matter can pass it, and the picture then
says so.
"""

from __future__ import annotations

import argparse
import csv
import math
from collections import defaultdict
from pathlib import Path

from harness import GRADIENT
from matplotlib.figure import Figure

KDEJSD = "kdejsd"
LEVELS = {"amx": "AMX", "v4": "AVX-512", "v3": "AVX2", "base": "SSE2"}
NAMES = {
    "gemm": "PyTorch: matrix product",
    "cdist": "PyTorch: torch.cdist",
    "gemm compiled": "PyTorch: matrix product, compiled",
    "stream compiled": "PyTorch: in chunks, compiled",
    "attention": "PyTorch: attention operator",
    "differences": "PyTorch: all differences",
    "pykeops": "PyKeOps",
    "kdejsd bf16x2": "kdejsd, products of bfloat16 parts",
}
Size = tuple[int, int, int]
Rates = dict[str, dict[Size, float]]  # GFLOP/s by provider and size


def read(path: Path) -> tuple[Rates, dict[Size, float]]:
    """Draws what each provider reached, and the roof, over the sizes of a record."""
    times: Rates = defaultdict(dict)
    shares: dict[Size, float] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["mode"] != GRADIENT or not row["value"] or row["kernel"] != "jsd_loss":
                continue
            size = int(row["n"]), int(row["m"]), int(row["l"])
            if row["metric"] == "time":
                name = row["provider"] if row["provider"] != KDEJSD else f"{KDEJSD}, {row['level']}"
                times[name][size] = float(row["value"])
            elif row["metric"] == "share of limit" and row["provider"] == KDEJSD:
                shares[size] = float(row["value"])
                level = row["level"]
    if not shares:
        raise SystemExit(f"{path} is no record of bench_kde.py: it has no share of the limit of {KDEJSD}")
    rates = {
        name: {size: 4 * math.prod(size) / ms * 1e-6 for size, ms in of_provider.items()}
        for name, of_provider in times.items()
    }
    return rates, {size: rates[f"{KDEJSD}, {level}"][size] / share for size, share in shares.items()}


def named(provider: str) -> str:
    """Names a provider in full; README.md beside this says more of each."""
    level = provider.removeprefix(f"{KDEJSD}, ")
    return f"{KDEJSD}, {LEVELS.get(level, level)}" if level != provider else NAMES.get(provider, provider)


def draw(records: list[tuple[Rates, dict[Size, float]]], smallest: int) -> Figure:
    """Draws a point for each provider and size of at least `smallest` pairs, and the roof of each record."""
    figure = Figure(figsize=(9, 5.4), dpi=150, layout="constrained")
    axes = figure.subplots()
    colors: dict[str, str] = {}
    above = False
    for number, (rates, roof) in enumerate(records):
        kept = sorted((size for size in roof if size[0] * size[1] >= smallest), key=lambda size: (size[2], size))
        heights = {size[2]: max(roof[other] for other in kept if other[2] == size[2]) for size in kept}
        own = next(name for name in rates if name.startswith(f"{KDEJSD}, "))
        for name, of_provider in rates.items():
            sizes = [size for size in kept if size in of_provider]
            if number and not name.startswith(KDEJSD):
                continue  # the peers are the same in every record
            color = colors.setdefault(name, f"C{len(colors)}")
            values = [of_provider[size] for size in sizes]
            marker = "o" if name.startswith(KDEJSD) else "x"
            axes.plot([2 * size[2] for size in sizes], values, marker, color=color, ms=6, label=named(name))
            above |= marker == "o" and any(of_provider[size] > heights[size[2]] for size in sizes)
        label = f"limit of the machine, {named(own).removeprefix(f'{KDEJSD}, ')}"
        axes.plot([2 * dim for dim in heights], list(heights.values()), color=colors[own], lw=1.5, label=label)
    title = "Value and gradient of jsd_loss: what was reached, under the limit of the machine"
    if above:
        title += "\nA dot above its limit: centers that the limit counts were left out, as their weight cannot matter"
    figure.suptitle(title, fontsize="medium")
    axes.set(xscale="log", yscale="log", ylabel="GFLOP/s (higher is faster)")
    axes.set_xlabel("multiply-adds per exponential: 2 x the dimension l")
    handles, names = axes.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: not names[i].startswith((KDEJSD, "limit")))
    figure.legend([handles[i] for i in order], [names[i] for i in order], loc="outside right center", frameon=False)
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("records", type=Path, nargs="+", metavar="CSV", help="of bench_kde.py; peers from the first")
    parser.add_argument("--out", type=Path, required=True, metavar="PNG")
    parser.add_argument("--smallest", type=int, default=100_000, help="least n m of a size (default: 100000)")
    arguments = parser.parse_args()
    draw([read(path) for path in arguments.records], arguments.smallest).savefig(arguments.out)


if __name__ == "__main__":
    main()
