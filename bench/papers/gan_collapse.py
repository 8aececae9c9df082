"""Figures 3.1 and 2.1 of Manoj's paper on latent density, on GANs of one's own: does the class radius tell mode
collapse?

    python bench/papers/gan_collapse.py --out DIR              # 40 GANs, about an hour of one core
    python bench/papers/gan_collapse.py --quick --out DIR      # under a minute: four GANs on nine modes, few steps

GANs of every objective, of two widths, with packing 1 and 2 (PacGAN), each with a seed of its own, are trained on
2D-Grid (`kdejsd.data.Grid2D`), l = 2, for as many steps each. Some collapse, some do not. Of each, by 10 000 samples:
the modes captured, the high-quality share and the reverse KL (`Grid2D.sample_measures`); and, a sample's class being
its nearest mode, the mean class radius, the collision entropy and the most that the radius can be at the probabilities
of the classes (`kdejsd.diversity_report`).

Shown are Spearman's rank correlations of the class radius with the modes captured and with the collision entropy, with
95 % intervals: GANs drawn with replacement, two thousand times. Then the pictures: the radius against the modes
captured, with the bound for as many equal classes (other probabilities allow more); class regions of the latent space
beside the samples, for the GANs that capture the fewest modes (at least one), the median and the most. A GAN with all
samples in one class has no class radius: it is counted as larger than any (the fewer the classes, the larger the
radius), and is not in the first picture. One with samples that are not finite is left out of all but the record. Run
again with the same --out, it goes on where it was stopped.

Paper: N. Manoj, "On the Density of the Latent Space of Deep Generative Models" (2018); the earlier version, "Looser is
Worse: On the Coding Space of Deep Generative Models", has both figures too. The grid of 25 modes and the classes are
those of Example 2.2 of 2018 and its Figure 2.1. Figure 3.1 plots the radius against the size of the support, without
numbers, for GANs on variants of the grid with (2n + 1)^2 modes. The paper says nothing about these GANs, nor how it
approximates the radius. Those here are others.
"""

from __future__ import annotations

import argparse
import itertools
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.figure import Figure
from quiet import quiet_trainer
from record import Record, Row, file_name, rounded
from scipy.stats import spearmanr

from kdejsd import diversity_report, plots
from kdejsd.data import Grid2D
from kdejsd.drawing import draw
from kdejsd.models import FC, built

OBJECTIVES = (
    *("non-saturating", "minimax", "wgan", "wgan-gp"),
    *("f-kl", "f-reverse-kl", "f-pearson", "f-squared-hellinger", "f-jensen-shannon", "f-gan"),
)
WIDTHS = (64, 192)
PACKINGS = (1, 2)
STEPS = 10_000
QUICK_OBJECTIVES, QUICK_WIDTHS, QUICK_STEPS = ("non-saturating", "f-pearson"), (64,), 150
SAMPLES = 10_000
DRAWS = 2000

KEY = {"objective": str, "width": int, "packing": int, "seed": int, "steps": int, "modes": int}
KINDS = KEY | {"modes_captured": float, "high_quality_share": float, "reverse_kl": float, "class_radius": float}
KINDS |= {"standard_error": float, "radius_bound": float, "collision_entropy": float, "seconds": int}


def train(data: Grid2D, objective: Any, width: int, packing: int, seed: int, steps: int) -> built.GAN:
    pl.seed_everything(seed, verbose=False)
    network = partial(FC, hidden=(width, width, width))
    model = built.GAN(data.example_shape, 2, network, objective=objective, packing=packing)
    trainer = quiet_trainer(max_steps=steps, limit_val_batches=0)
    try:
        trainer.fit(model, datamodule=data)
    except FloatingPointError:  # diverged: what it makes is no number, and its row says so
        for weight in model.generator.parameters():
            weight.data.fill_(math.nan)
    return model.to("cpu")


def measure(model: Any, data: Grid2D) -> Row:
    samples = model.sample(SAMPLES, torch.Generator().manual_seed(0))
    row = {name: rounded(value, 6) for name, value in data.sample_measures(samples).items()}
    if not bool(samples.isfinite().all()):
        return row
    found = diversity_report(model.generator, data.classifier(), 2, num_samples=SAMPLES)
    assert found.class_radius is not None
    radius = found.class_radius
    numbers = radius.mean, radius.standard_error, found.radius_bound, found.collision_entropy
    names = "class_radius", "standard_error", "radius_bound", "collision_entropy"
    return row | {name: rounded(value, 6) for name, value in zip(names, numbers, strict=True)}


# ----------------------------------------------------------------------------------------------------------------------
# What the GANs show together


def known(rows: list[Row]) -> list[Row]:
    """The GANs whose samples were finite."""
    return [row for row in rows if row["class_radius"] is not None]


def correlation(rows: list[Row], name: str) -> tuple[float, float, float]:
    """Spearman's correlation of the class radius with another measure, and its 95 % interval; NaN for fewer than three
    GANs."""
    data = [(row["class_radius"], row[name]) for row in known(rows)]
    if len(data) < 3:
        return math.nan, math.nan, math.nan

    def statistic(pairs: Any) -> float:
        radius, other = pairs.T
        # A draw of GANs that are all alike has no ranks.
        constant = len(set(radius)) == 1 or len(set(other)) == 1
        return math.nan if constant else float(spearmanr(radius, other).statistic)

    pairs, random = np.array(data), np.random.default_rng(0)
    draws = [statistic(pairs[random.integers(len(pairs), size=len(pairs))]) for _ in range(DRAWS)]
    low, high = np.nanquantile(draws, [0.025, 0.975])
    return statistic(pairs), float(low), float(high)


def table(rows: list[Row]) -> str:
    lines = [
        f"{'objective':20}{'width':>6}{'packing':>8}{'modes':>7}{'quality':>9}{'rev. KL':>9}{'radius':>9}{'bound':>8}"
    ]
    diverged = [row for row in rows if row["class_radius"] is None]
    ordered = sorted(known(rows), key=lambda row: (row["modes_captured"], -row["reverse_kl"]))
    for row in [*ordered, *diverged]:
        line = f"{row['objective']:20}{row['width']:>6}{row['packing']:>8}"
        for name, form, width in (
            ("modes_captured", ".0f", 7),
            ("high_quality_share", ".3f", 9),
            ("reverse_kl", ".3f", 9),
            ("class_radius", ".4f", 9),
            ("radius_bound", ".4f", 8),
        ):
            line += f"{'-' if row[name] is None else format(row[name], form):>{width}}"
        lines.append(line)
    return "\n".join(lines)


def radius_figure(rows: list[Row]) -> Figure | None:
    """None if no GAN captures two modes."""
    curves: dict[str, list[tuple[float, float, float]]] = {}
    for row in known(rows):
        classes, radius = row["modes_captured"], row["class_radius"]
        if classes >= 2 and math.isfinite(radius):
            curves.setdefault(row["objective"], []).append((classes, radius, row["standard_error"]))
    return plots.radius_vs_support(curves) if curves else None


# ----------------------------------------------------------------------------------------------------------------------
# Command


def checkpoint_of(row: Row, folder: Path) -> Path:
    return folder / f"gan_{file_name({name: row[name] for name in KEY})}.pt"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Class radius and mode collapse of GANs on 2D-Grid.")
    parser.add_argument("--quick", action="store_true", help="nine modes, few GANs and steps: no result to believe")
    parser.add_argument("--seed", type=int, default=0, help="of the first GAN; the others count on (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="as torch.set_num_threads (default 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/gan_collapse"), help="folder of record and pictures")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)

    n, steps = (1, QUICK_STEPS) if options.quick else (2, STEPS)
    kinds = (QUICK_OBJECTIVES, QUICK_WIDTHS, PACKINGS) if options.quick else (OBJECTIVES, WIDTHS, PACKINGS)
    data = Grid2D(n)
    record, rows = Record(options.out / "gan_collapse.csv", KINDS), []
    start = time.perf_counter()
    for seed, (objective, width, packing) in enumerate(itertools.product(*kinds), options.seed):
        key = dict(zip(KEY, (objective, width, packing, seed, steps, len(data.modes)), strict=True))
        checkpoint = checkpoint_of(key, options.out)
        if not record.find(**key) or not checkpoint.exists():
            began = time.perf_counter()
            model = train(data, objective, width, packing, seed, steps)
            torch.save(model.generator.state_dict(), checkpoint)
            record.add(key | measure(model, data) | {"seconds": round(time.perf_counter() - began)})
        row = record.find(**key)[-1]  # of the last one trained, whose checkpoint it is
        rows.append(row)
        print(
            f"[{len(rows):2}/{math.prod(map(len, kinds))}] {objective}, width {width}, packing {packing}: "
            f"{row['modes_captured']:g} modes   ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )

    print(f"\n{len(rows)} GANs of {steps} steps on {len(data.modes)} modes\n\n{table(rows)}\n")
    print(f"Spearman's correlation of the class radius, {len(known(rows))} GANs, with its 95 % interval")
    for name in ("modes_captured", "collision_entropy"):
        value, low, high = correlation(rows, name)
        print(f"  with {name.replace('_', ' '):20} {value:.3f}   {low:.3f} to {high:.3f}")
    if (figure := radius_figure(rows)) is not None:
        figure.savefig(options.out / "gan_collapse_radius.png")
    covering = [row for row in known(rows) if row["modes_captured"] >= 1]
    covering.sort(key=lambda row: (row["modes_captured"], row["high_quality_share"]))
    if covering:
        for name, row in (("fewest", covering[0]), ("median", covering[len(covering) // 2]), ("most", covering[-1])):
            hidden = (row["width"],) * 3
            generator = FC(data.example_shape, 2, hidden).decoder
            generator.load_state_dict(torch.load(checkpoint_of(row, options.out), weights_only=True))
            plots.latent_classes(generator, data.classifier()).savefig(options.out / f"gan_collapse_{name}_classes.png")
            with torch.no_grad():
                samples = generator(torch.randn(SAMPLES, 2, generator=torch.Generator().manual_seed(0)))
            draw(data, samples).savefig(options.out / f"gan_collapse_{name}_samples.png")
            kind = f"{row['objective']}, width {row['width']}, packing {row['packing']}"
            print(f"{name}: {kind}: {row['modes_captured']:g} modes")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
