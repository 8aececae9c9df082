"""Shows what divergences say of distributions that hardly overlap, and where GENs' training loss has no gradient.

    python bench/papers/divergences.py                      # all of it, 3 minutes of one idle core
    python bench/papers/divergences.py --quick              # a quarter of a minute: l up to 2, few samples
    ... --csv divergences.csv --figure divergences.png      # leave a record

Papers: M. Arjovsky, S. Chintala, L. Bottou, "Wasserstein GAN", arXiv 1701.07875, Example 1; S. Nowozin, B. Cseke,
R. Tomioka, "f-GAN", arXiv 1606.00709; S. Saha, S. Elhabian, R. T. Whitaker, "GENs: Generative Encoding Networks", arXiv
2010.15283, eq. 3.

Divergences by the shift of the model, Q, from the data, P:

    lines    P is (0, U), Q is (shift, U) in the plane, U uniform in 0 to 1: they touch at no shift but 0
    normals  P is N(0, I), Q is N(shift e_1, I)

Each is given as it is (KL(Q || P), JSD, W1) and as estimated from samples: by the KDE of Q's samples and the target
smoothed by the same kernel (for the lines, which have no density, the KDE of P's samples), which is an estimate of what
is left of it when both P and Q are blurred by the kernel, stated beside it; by a discriminator
(`kdejsd.models.f_divergences`, half the bound of "jensen-shannon", on fresh samples; networks and training of
gen_correlation.py); and W1 of the samples, exact in one dimension, by optimal assignment of 1000 to 1000 in more.

Gradients: codes are at shift e_1 with a standard deviation in every dimension, their lagged codes likewise, the target
is N(0, I). Shown is d loss / d shift with the lagged codes held, as in training: how strongly the loss pulls the codes
back. Its factor 1 - r = p_t / (p_e + p_t) is taken at the codes, which lie where p_e is large, so it is p_t's side of
the divergence that is missing: samples of the target where p_e << p_t have a gradient, but the lagged codes get it.

    itself      `jsd_loss` against the target itself, at the optimal bandwidth h: eq. 3 of the paper
    smoothed    against the target smoothed by the kernel, at several h
    noise       ... and at codes with the kernel's noise, which GEN adds by default (there each code's own kernel is
                among those of p_e; here the lagged codes are others)
    kl          divergence="kl" against the target itself
    W1          the Wasserstein distance of the codes from samples of the target

What bench/results/papers/divergences.txt shows: JSD is flat where P and Q do not overlap, W1 is not, and JSD by the KDE
is flat only where P and Q blurred by the kernel do not overlap. Away from the target eq. 3 pulls ever less; the
smoothed target and the kernel's noise reach further, a wide kernel by far, at a weaker pull near the target. "kl" pulls
in proportion to the shift, W1 with the same force everywhere. Normalised codes are never out there.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from gen_correlation import MOST_STEPS, Discriminators
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import linear_sum_assignment
from scipy.stats import wasserstein_distance
from torch import Tensor
from torch.nn.functional import logsigmoid

import kdejsd
from kdejsd.models.f_divergences import by_name
from kdejsd.targets import GaussianMixture, IsotropicNormal, StandardNormal

ASSIGNED = 1000  # samples of each distribution in an optimal assignment
LINE_SHIFTS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0, 1.5, 2.0)
NORMAL_SHIFTS = (0.0, 0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0)
GRADIENT_SHIFTS = (0.5, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0)
SPREADS = (1.0, 0.1)  # standard deviations of the codes: as spread as the target, and a bunch
WIDE = (1.0, 2.0, 4.0)  # bandwidths beside the optimal one


class Row(NamedTuple):
    """A line of the record. Divergences in nats, W1 and shifts in the target's standard deviations (for the lines, in
    their length); a gradient per unit of the shift."""

    study: str
    latent_dim: int
    spread: float
    bandwidth: float | None
    shift: float
    measure: str
    value: float


# ----------------------------------------------------------------------------------------------------------------------
# What is known


def normal_mean(function: Callable[[Tensor], Tensor]) -> float:
    """E f(x) of a standard normal x, by the trapezoidal rule in float64, which for such integrands converges faster
    than any power of the step."""
    x = torch.linspace(-12, 12, 8001, dtype=torch.float64)
    return float(torch.trapezoid(function(x) * (-0.5 * x.square()).exp(), x)) / math.sqrt(2 * math.pi)


def normal_jsd(shift: float) -> float:
    """JSD of N(0, 1) and N(shift, 1), nats: by symmetry log 2 + E log p / (p + q) over p alone."""
    return math.log(2) + normal_mean(lambda x: logsigmoid(shift * x + shift**2 / 2))


def gradient_limit(shift: float, bandwidth: float, noise: bool) -> float:
    """d loss / d shift against the smoothed target for codes N(shift e_1, I) and infinitely many lagged codes.

    Both densities are then of the variance v = 1 + h^2, log p_e - log p_t is (shift x + shift^2 / 2) / v at the codes,
    x of variance 1 (v with the kernel's noise), and s_e - s_t is shift / v.
    """
    v = 1 + bandwidth**2
    std = math.sqrt(v) if noise else 1.0
    return shift / v * normal_mean(lambda x: torch.sigmoid(-(shift * std * x + shift**2 / 2) / v))


# ----------------------------------------------------------------------------------------------------------------------
# Divergences


def assignment(a: Tensor, b: Tensor) -> Tensor:
    """Mean distance of samples a and b [n, l], assigned to each other at the least cost: W1 of the two sets, 0-dim."""
    distances = torch.cdist(a, b)
    rows, columns = linear_sum_assignment(distances.detach().numpy())
    return distances[rows, columns].mean()


def w1(a: Tensor, b: Tensor) -> float:
    if a.shape[1] == 1:
        return float(wasserstein_distance(a[:, 0], b[:, 0]))
    return float(assignment(a[:ASSIGNED], b[:ASSIGNED]))


def study_pair(study: str, dim: int, num_samples: int, tests: int, most_steps: int, seed: int) -> list[Row]:
    """All measures of P and Q at all their shifts, from as many samples of each to train on, as many held out and so
    many fresh ones."""
    generator = torch.Generator().manual_seed(seed)
    lines = study == "lines"
    shifts = LINE_SHIFTS if lines else NORMAL_SHIFTS

    def sample(n: int) -> Tensor:
        """[shifts, n, l] of P."""
        if not lines:
            return torch.randn(len(shifts), n, dim, generator=generator)
        height = torch.rand(len(shifts), n, 1, generator=generator)
        return torch.cat((torch.zeros_like(height), height), -1)

    along = torch.zeros(len(shifts), 1, dim)
    along[:, 0, 0] = torch.tensor(shifts)
    sizes = (num_samples, num_samples, tests)
    data, other_data, test_data = map(sample, sizes)
    model, other_model, test_model = (sample(n) + along for n in sizes)

    networks = Discriminators(len(shifts), dim, generator)
    networks.fit((data, model), (other_data, other_model), generator, most_steps)
    with torch.no_grad():
        outputs = networks(test_data), networks(test_model)

    best = kdejsd.optimal_bandwidth(dim, num_samples).value
    rows: list[Row] = []
    for number, shift in enumerate(shifts):

        def add(measure: str, value: float | Tensor, h: float | None = None, at: float = shift) -> None:
            rows.append(Row(study, dim, 1.0, h, at, measure, float(value)))

        if lines:
            kl, js = (math.inf, math.log(2)) if shift > 0 else (0.0, 0.0)
        else:
            kl, js = shift**2 / 2, normal_jsd(shift)
        for measure, value in (("KL", kl), ("JSD", js), ("W1", shift)):
            add(measure, value)
        for h in (0.05, best) if lines else (best,):
            blurred = shift / (h if lines else math.hypot(1, h))
            add("KL, blurred", blurred**2 / 2, h)
            add("JSD, blurred", normal_jsd(blurred), h)
            target = GaussianMixture(data[number], h) if lines else StandardNormal(dim).smoothed(h)
            centers = model[number]
            noisy = centers + h * torch.randn(centers.shape, generator=generator)  # samples of the KDE
            add("KL, KDE", kdejsd.jsd_loss(noisy, centers, h, target=target, divergence="kl"), h)
            add("JSD, KDE", kdejsd.jsd(noisy, centers, h, target.sample(num_samples, generator), target=target), h)
        add("JSD, discriminator", by_name("jensen-shannon").bound(*(output[number] for output in outputs)) / 2)
        add("W1, samples", w1(data[number], model[number]))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Gradients


def latent_loss(form: str, codes: Tensor, lagged: Tensor, h: float | None, generator: torch.Generator) -> Tensor:
    """The loss of one form: its terms at the codes, [n], or W1 (h is None), 0-dim."""
    n, dim = codes.shape
    target: IsotropicNormal = StandardNormal(dim)
    if h is None:
        return assignment(codes[:ASSIGNED], target.sample(min(n, ASSIGNED), generator).to(codes))
    if form in ("smoothed", "noise"):
        target = target.smoothed(h)
    if form == "noise":
        codes = codes + h * torch.randn(codes.shape, generator=generator, dtype=codes.dtype)
    return kdejsd.jsd_loss(codes, lagged, h, target=target, divergence="kl" if form == "kl" else "js", reduction="none")


def normalized(codes: Tensor) -> Tensor:
    return (codes - codes.mean(0)) / codes.std(0)


def study_gradients(dim: int, spread: float, num_samples: int, seed: int) -> list[Row]:
    """The gradient of every form at every shift, and the mean of 1 - r, raw and with normalised codes."""
    generator = torch.Generator().manual_seed(seed)
    codes, lagged = spread * torch.randn(2, num_samples, dim, generator=generator, dtype=torch.float64)
    best = kdejsd.optimal_bandwidth(dim, num_samples).value
    forms: list[tuple[str, float | None]] = [("itself", best)]
    forms += [(form, h) for form in ("smoothed", "noise") for h in (best, *WIDE)]
    forms += [("kl", best), ("W1", None)]
    rows = []
    for shift in GRADIENT_SHIFTS:
        along = torch.zeros(dim, dtype=torch.float64)
        along[0] = shift
        for form, h in forms:
            moved = along.clone().requires_grad_()
            loss = latent_loss(form, codes + moved, lagged + along, h, generator)
            (gradient,) = torch.autograd.grad(loss.mean(), moved)
            rows.append(Row("gradient", dim, spread, h, shift, form, float(gradient[0])))
            if form in ("smoothed", "noise") and spread == 1:
                limit = gradient_limit(shift, h, form == "noise")
                rows.append(Row("limit of the gradient", dim, spread, h, shift, form, limit))
        for name, change in (("1 - r", lambda z: z), ("1 - r, normalised", normalized)):
            terms = latent_loss("noise", change(codes + along), change(lagged + along), best, generator)
            weight = -torch.expm1(terms - math.log(2))
            rows.append(Row("gradient", dim, spread, best, shift, name, float(weight.mean())))
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# The record and the command


def cases(rows: list[Row]) -> list[list[Row]]:
    """The rows of each study, dimension and spread, in order."""
    keys = dict.fromkeys(row[:3] for row in rows)
    return [[row for row in rows if row[:3] == key] for key in keys]


def curves(case: list[Row]) -> dict[tuple[str, float | None], dict[float, float]]:
    """Value by shift for each measure and bandwidth."""
    found: dict[tuple[str, float | None], dict[float, float]] = {}
    for row in case:
        found.setdefault((row.measure, row.bandwidth), {})[row.shift] = row.value
    return found


def title(case: list[Row]) -> str:
    row = case[0]
    if row.study == "lines":
        return "parallel lines"
    return f"{row.study}, l = {row.latent_dim}" + ("" if row.study == "normals" else f", spread {row.spread:g}")


def table(case: list[Row]) -> str:
    """A line for each shift, a column for each measure and bandwidth."""
    exponents = "gradient" in case[0].study
    columns = [["shift", "", *(f"{shift:g}" for shift in dict.fromkeys(row.shift for row in case))]]
    for (measure, h), values in curves(case).items():
        cells = (f"{x:.1e}" if exponents else f"{round(x, 4) + 0.0:.4f}" for x in values.values())
        columns.append([measure, "" if h is None else f"h = {h:.3g}", *cells])
    widths = [max(map(len, column)) for column in columns]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in zip(*columns, strict=True)
    )


def draw(rows: list[Row]) -> Figure:
    """Above JSD and, against the axis on the right, W1 by shift; below the pull of each form of the loss."""
    above = [case for case in cases(rows) if "gradient" not in case[0].study]
    below = [case for case in cases(rows) if case[0].study == "gradient"]
    limits = {case[0].latent_dim: case for case in cases(rows) if case[0].study == "limit of the gradient"}
    columns = max(len(above), len(below))
    figure = Figure(figsize=(4.3 * columns, 8), dpi=100, layout="constrained")
    grid = figure.add_gridspec(2, columns)
    for number, case in enumerate(above):
        draw_divergences(figure.add_subplot(grid[0, number]), case)
    for number, case in enumerate(below):
        axes = figure.add_subplot(grid[1, number])
        draw_gradients(axes, case, limits[case[0].latent_dim] if case[0].spread == 1 else [])
        if number == 0:
            axes.legend(fontsize=7, loc="lower left")
    return figure


def draw_divergences(axes: Axes, case: list[Row]) -> None:
    """One pair of distributions; KL is left to the table."""
    right = axes.twinx()
    for (measure, h), values in curves(case).items():
        x, y = list(values), list(values.values())
        label = measure + ("" if h is None else f", h = {h:.2f}")
        color = "C0" if h is None or h > 0.1 else "C9"
        if measure == "JSD" and case[0].study == "lines":
            axes.plot([0, 0, x[-1]], [0, math.log(2), math.log(2)], "k", label=label)
        elif measure == "JSD":
            axes.plot(x, y, "k", label=label)
        elif measure == "JSD, blurred":
            axes.plot(x, y, ":", color=color, label=label)
        elif measure == "JSD, KDE":
            axes.plot(x, y, "o", fillstyle="none", color=color, label=label)
        elif measure == "JSD, discriminator":
            axes.plot(x, y, "C2^", fillstyle="none", label=label)
        elif measure == "W1":
            right.plot(x, y, "C3", label=label)
        elif measure == "W1, samples":
            right.plot(x, y, "C3x", label=label)
    axes.set(xlabel="shift", ylabel="nats", ylim=(-0.02, 0.75), title=title(case))
    right.set_ylabel("W1", color="C3")
    right.set_ylim(0)
    handles, labels = (a + b for a, b in zip(*(x.get_legend_handles_labels() for x in (axes, right)), strict=True))
    axes.legend(handles, labels, fontsize=7, loc="center right")


def draw_gradients(axes: Axes, case: list[Row], limits: list[Row]) -> None:
    """One spread of the codes; dotted the limit for infinitely many."""
    colors = {"itself": "k", "kl": "C1", "W1": "C3"}
    by_bandwidth = dict(zip(WIDE, ("C9", "C4", "C6"), strict=True))
    for (form, h), values in curves(case).items():
        if not form.startswith("1 - r"):
            color = colors.get(form) or by_bandwidth.get(h, "C0")
            label = form if h is None else f"{form}, h = {h:.2f}"
            pull = [abs(y) for y in values.values()]
            axes.semilogy(list(values), pull, "--" if form == "smoothed" else "-", color=color, label=label)
    for (_, h), values in curves(limits).items():
        axes.semilogy(list(values), list(values.values()), ":", lw=0.8, color=by_bandwidth.get(h, "C0"))
    axes.set(xlabel="shift of the codes", ylabel="|d loss / d shift|", ylim=(1e-16, 1e2), title=title(case))


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Divergences of what hardly overlaps (arXiv 1701.07875, Example 1), and the dead zone of GENs."
    )
    parser.add_argument("--quick", action="store_true", help="l up to 2, few samples and steps of the discriminator")
    parser.add_argument("--seed", type=int, default=0, help="of samples and networks (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--csv", type=Path, metavar="PATH", help="write every value to this file")
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw the curves to this file")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    dims, gradient_dims = ((1, 2), (2,)) if options.quick else ((1, 2, 8), (2, 8))
    sizes = (500, 2000, 600) if options.quick else (2000, 10_000, MOST_STEPS)

    rows: list[Row] = []
    start = time.perf_counter()
    for study, dim in (("lines", 2), *(("normals", dim) for dim in dims)):
        rows += study_pair(study, dim, *sizes, options.seed)
        print(f"{study}, l = {dim}   ({time.perf_counter() - start:.0f} s)", flush=True)
    for dim in gradient_dims:
        for spread in SPREADS:
            rows += study_gradients(dim, spread, sizes[0], options.seed)
            print(f"gradients, l = {dim}, spread {spread:g}   ({time.perf_counter() - start:.0f} s)", flush=True)

    print("\nDivergences in nats and W1: of both distributions, of both when blurred, and as estimated from samples.")
    print(
        "Gradients: d loss / d shift of the codes, negative where the loss pushes them further out; their limit is that"
    )
    print(
        "for infinitely many codes. 1 - r is the mean over the codes of the form noise; below 1e-16 it is rounded to 0."
    )
    for case in cases(rows):
        print(f"\n{title(case)}\n{table(case)}")
    print(f"\nProcessor time: {time.process_time():.0f} s, threads: {torch.get_num_threads()}")
    for path in (options.csv, options.figure):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(Row._fields)
            writer.writerows(rows)
    if options.figure:
        draw(rows).savefig(options.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
