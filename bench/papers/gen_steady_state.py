"""The steady state of GENs' training, measured: the variance at which codes come to rest (section 4 of the paper).

    python bench/papers/gen_steady_state.py --data DIR     # MNIST for the trained GENs, about 3 minutes on one core
    python bench/papers/gen_steady_state.py --quick        # under a minute: few codes, a GEN on scikit-learn's digits

Paper: S. Saha, S. Elhabian, R. T. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283. Its prediction,
for many lagged codes: p_e is the distribution of the codes convolved with the kernel, so that p_e = p_t leaves the
codes the variance 1 - h^2. Against the target smoothed by the same kernel it leaves them 1, at any h.

Codes in families, from the least to the most of what training is:

    linear   codes x W of normal samples x, the matrix W is trained; the centers are codes of other samples
    free     each code is free to move; the centers are codes of another population, which is trained likewise
    kernel   each code is free; eq. 3 is taken at codes with the kernel's noise, under the KDE of all codes, their own
             kernel among them (`kdejsd.LaggedKDE.loss` with noise, the default of GEN)
    GEN      the codes of the training images of a GEN without normalisation of its codes, whose lagged codes are
             encoded anew in every step; "held-out" are the codes of other images, and "k_b = 10" those of the training
             images where the lagged codes are up to ten steps old, as in the paper

What bench/results/papers/gen_steady_state.txt shows: codes that generalise (linear) and a GEN with fresh lagged codes
follow the prediction where the kernel density is smooth enough; free codes are pushed apart without bound, as every
one of them can go where the centers happen to be thin; with the kernel's noise they rest, below the prediction where m
is small for the dimension (a code's own kernel then outweighs the others' push). Lagged codes ten steps old leave a raw
encoder far below the prediction.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from quiet import quiet_trainer
from torch import Tensor

from kdejsd import StandardNormal, jsd_loss, optimal_bandwidth
from kdejsd._modes import evaluating
from kdejsd.data import MNIST, BatchLoader, Digits, ExampleData
from kdejsd.models import built

FAMILIES = ("linear", "free", "kernel", "GEN", "held-out", "k_b = 10")
POPULATIONS = 2


class Row(NamedTuple):
    family: str
    latent_dim: int
    num_centers: int
    bandwidth: float
    smoothed: bool
    variance: float  # of a code's dimension, their mean
    predicted: float


def predicted_variance(bandwidth: float, smoothed: bool) -> float:
    return 1.0 if smoothed else 1 - bandwidth**2


def steady_codes(
    family: str, latent_dim: int, num_centers: int, bandwidth: float, smoothed: bool, steps: int, seed: int
) -> Tensor:
    """Codes [2, m, l] after so many steps of Adam whose rate falls to 0; each step takes all codes, and the centers are
    those of the step itself."""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(POPULATIONS, num_centers, latent_dim, generator=generator)
    matrix = torch.eye(latent_dim)
    trained = (matrix if family == "linear" else start).requires_grad_()
    normal = StandardNormal(latent_dim)
    target = normal.smoothed(bandwidth) if smoothed else normal
    optimizer = torch.optim.Adam([trained], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        codes = start @ matrix
        if family == "kernel":
            noise = torch.randn(codes.shape, generator=generator)
            loss = jsd_loss(codes + bandwidth * noise, codes.detach(), bandwidth, target=target)
        else:
            loss = jsd_loss(codes, codes.detach().flip(0), bandwidth, target=target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return (start @ matrix).detach()


def gen_codes(
    data: ExampleData, dim: int, num_lagged: int, bandwidth: float, smoothed: bool, every: int, steps: int, seed: int
) -> tuple[Tensor, Tensor]:
    """Codes [n, l] of training and held-out images from a GEN whose latent term weighs ten times the usual: the
    reconstruction would move the steady state."""
    pl.seed_everything(seed, verbose=False)
    model = built.GEN(
        data.example_shape,
        dim,
        num_lagged=num_lagged,
        refresh_every=every,
        bandwidth=bandwidth,
        smoothed=smoothed,
        normalize_codes=False,
        weight=1.0,
        learning_rate=2e-4,
        decay=False,
    )
    trainer = quiet_trainer(max_steps=steps, accelerator="cpu")
    loader: BatchLoader = data.train_dataloader()
    trainer.fit(model, loader)
    with torch.no_grad(), evaluating(model):
        training, held_out = (model.encode(part[torch.arange(len(part))][0]) for part in (data.training, data.held_out))
    return training, held_out


def table(rows: list[Row]) -> str:
    """A line for each dimension and bandwidth, the variance of each family beside the prediction."""
    columns = "".join(f"{name:>9}" for name in ("predicted", *FAMILIES))
    lines = [
        f"{'':12}{'the target itself':^63}   {'the smoothed target':^63}",
        f"{'l':>3}{'h':>8} {columns}   {columns}",
    ]
    found = {(row.latent_dim, row.bandwidth, row.smoothed, row.family): row for row in rows}
    for dim, bandwidth in sorted({(row.latent_dim, row.bandwidth) for row in rows}):
        halves = []
        for smoothed in (False, True):
            cells = [f"{predicted_variance(bandwidth, smoothed):9.3f}"]
            for family in FAMILIES:
                row = found.get((dim, bandwidth, smoothed, family))
                cells.append(f"{'':9}" if row is None else f"{row.variance:9.3f}")
            halves.append("".join(cells))
        lines.append(f"{dim:3}{bandwidth:8.3f} " + "   ".join(halves))
    return "\n".join(lines)


def figure(rows: list[Row]) -> Figure:
    """Variance by bandwidth, left against the target itself, right against the smoothed one; curves as predicted."""
    picture = Figure(figsize=(9, 4.2), dpi=110, layout="constrained")
    h = torch.linspace(0.2, 1, 200)
    dims = sorted({row.latent_dim for row in rows})
    markers = dict(zip(FAMILIES, "o^sDx+", strict=True))
    for axes, smoothed in zip(picture.subplots(1, 2, sharey=True), (False, True), strict=True):
        axes.plot(h.numpy(), [predicted_variance(float(x), smoothed) for x in h], color="k", lw=1)
        for row in rows:
            if row.smoothed == smoothed:
                color, marker = f"C{dims.index(row.latent_dim)}", markers[row.family]
                axes.plot(row.bandwidth, min(row.variance, 1.6), marker, color=color, fillstyle="none")
        title = "against the target smoothed by the kernel" if smoothed else "against the target itself (the paper)"
        axes.set(xlabel="bandwidth h", title=title, ylim=(0, 1.65))
    picture.axes[0].set_ylabel("variance of the codes (1.6 and more: at 1.6)")
    handles = [Line2D([], [], color="k", lw=1, label="predicted")]
    handles += [Line2D([], [], ls="", marker=m, color="0.4", fillstyle="none", label=f) for f, m in markers.items()]
    handles += [Patch(color=f"C{number}", label=f"l = {dim}") for number, dim in enumerate(dims)]
    picture.legend(handles=handles, loc="outside right center", frameon=False)
    return picture


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The steady state of GENs (arXiv 2010.15283, section 4).")
    parser.add_argument("--quick", action="store_true", help="l = 2, few codes, a GEN on scikit-learn's digits")
    parser.add_argument("--data", default=os.environ.get("KDEJSD_DATA"), metavar="DIR", help="of MNIST's idx files")
    parser.add_argument("--seed", type=int, default=0, help="of codes, weights and batches (default 0)")
    parser.add_argument("--out", type=Path, metavar="STEM", help="write STEM.csv and STEM.png as well")
    options = parser.parse_args(arguments)
    if not options.quick and options.data is None:
        parser.error("--data names the folder of MNIST's idx files (or set KDEJSD_DATA)")
    if options.quick:
        dims, centers, steps, gen_steps, data = (2,), 500, 300, 200, Digits(seed=options.seed)
    else:
        dims, centers, steps, gen_steps = (2, 8, 16), 1000, 300, 600
        data = MNIST(options.data, train_size=5000, seed=options.seed)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)

    rows: list[Row] = []
    start = time.perf_counter()
    for dim in dims:
        best = optimal_bandwidth(dim, centers).value
        bandwidths = [round(best + share * (1 - best), 3) for share in (0.0, 0.4, 0.8)]
        for bandwidth in bandwidths:
            for smoothed in (False, True):
                predicted = predicted_variance(bandwidth, smoothed)
                for family in FAMILIES[:3]:
                    codes = steady_codes(family, dim, centers, bandwidth, smoothed, steps, options.seed)
                    variance = float(codes.var(1).mean())
                    rows.append(Row(family, dim, centers, bandwidth, smoothed, variance, predicted))
                if bandwidth == bandwidths[1]:
                    lagged = min(centers, 500)
                    common = (data, dim, lagged, bandwidth, smoothed)
                    training, held_out = gen_codes(*common, 1, gen_steps, options.seed)
                    older, _ = gen_codes(*common, 10, gen_steps, options.seed)
                    for family, codes in zip(FAMILIES[3:], (training, held_out, older), strict=True):
                        variance = float(codes.var(0).mean())
                        rows.append(Row(family, dim, lagged, bandwidth, smoothed, variance, predicted))
                done = ", ".join(
                    f"{row.family} {row.variance:.3f}" for row in rows if row[3:5] == (bandwidth, smoothed)
                )
                print(
                    f"l = {dim:2}, h = {bandwidth:.3f}, {'smoothed target' if smoothed else 'target itself  '}: "
                    f"predicted {predicted:.3f}, {done}   ({time.perf_counter() - start:.0f} s)",
                    flush=True,
                )
    print(f"\nVariance of the codes at rest, mean over their dimensions\n\n{table(rows)}")
    if options.out:
        figure(rows).savefig(options.out.with_name(f"{options.out.name}.png"))
        with options.out.with_name(f"{options.out.name}.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
