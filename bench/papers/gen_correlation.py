"""Section 5.1 and Figure 1 of the GENs paper, computed anew: does the KDE's Jensen-Shannon divergence follow a
discriminator's, and do both follow the true one?

    python bench/papers/gen_correlation.py                  # all of it, 8 minutes of one idle core
    python bench/papers/gen_correlation.py --quick          # under a minute: two dimensions, small m
    ... --csv trials.csv --figure correlation.png           # leave a record; run again with it, it goes on from there

Paper: S. Saha, S. Elhabian, R. T. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283. As there, codes
follow an equal mixture of two normals in l dimensions, their centers s apart in a random direction, whitened; the
target is the standard normal. Each trial has its own s, direction and samples, and gets three divergences:

- KDE: `kdejsd.jsd` with m centers, m other samples of the mixture and m of the target, at `optimal_bandwidth`;
- discriminator: of a network that tells codes from samples of the target, three hidden layers, the first 10 l wide,
  early stopping on held-out data; log 2 minus its cross-entropy on fresh samples, which no network can bring above the
  truth;
- truth: by quadrature. The paper has none; this is ours.

Shown are the Pearson correlations of each two over the trials of a cell (l, m), with their 95 % confidence intervals,
and those of both estimates with s, as the paper has them in a figure.

In the paper s goes from 0 to 6. Here it is on an even grid from 0 to 8, the same in every cell, so that cells differ by
their estimators alone; the correlations with s are those of the trials up to 6. The paper whitens each set of samples;
here it is done by the covariance of the mixture, so that the truth is known. Of its discriminator the paper says no
more than what stands above, and that the widths are proportional to l. Ours are: its data, which are those of the KDE
(m samples of each kind to train on, m of each held out) and 10 000 fresh ones of each to test on; its other layers (5 l
and 2.5 l wide), leaky ReLU, Adam, and when to stop: `Discriminators`.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from record import Record, Row
from scipy import stats
from torch import Tensor, nn
from torch.nn.functional import leaky_relu, softplus

import kdejsd

LATENT_DIMS = (2, 5, 10, 20, 40)
NUM_SAMPLES = (250, 500, 1000, 2000, 4000, 8000)
TRIALS = 32
QUICK_DIMS = (2, 5)
QUICK_SAMPLES = (250, 500)
QUICK_TRIALS = 16

WIDEST_OF_PAPER = 6.0
WIDEST = 8.0  # in standard deviations of the two normals: 3 in 100 000 of the samples lie on the other's side
TEST_SAMPLES = 10_000
MINIBATCH = 64  # codes, and as many samples of the target
CHECK_EVERY = 50  # steps
PATIENCE = 10  # checks without a better held-out loss
MOST_STEPS = 20_000

# Divergences are in nats; `steps` are those after which the discriminator was best.
KINDS = {"latent_dim": int, "num_samples": int, "trial": int, "separation": float, "truth": float, "kde": float}
KINDS |= {"discriminator": float, "steps": int, "bandwidth": float, "seed": int}


# ----------------------------------------------------------------------------------------------------------------------
# The distribution of the codes


def whitened_axis(separation: Tensor) -> tuple[Tensor, Tensor]:
    """Means (-mu, mu) and standard deviation of the whitened mixture along the line through its centers.

    Before whitening they are (-s/2, s/2) and 1, the variance along the line is 1 + s^2/4, across it 1 already.
    """
    std = 1 / (1 + separation.square() / 4).sqrt()
    return separation / 2 * std, std


def true_jsd(separation: Tensor) -> Tensor:
    """JSD of the whitened mixture from the standard normal, in nats, [...] in float64, whatever l and the direction.

    Across the line through the centers both distributions are the same, so it is an integral along it. The
    trapezoidal rule converges faster than any power of the step for such integrands.
    """
    mean, std = (x[..., None] for x in whitened_axis(separation.double()))
    t = torch.linspace(-12, 12, 4001, dtype=torch.float64)

    def log_normal(z: Tensor) -> Tensor:
        return -0.5 * z.square() - 0.5 * math.log(2 * math.pi)

    log_target = log_normal(t)
    log_codes = torch.logaddexp(log_normal((t - mean) / std), log_normal((t + mean) / std)) - std.log() - math.log(2)
    gap = log_codes - log_target
    terms = log_codes.exp() * -softplus(-gap) + log_target.exp() * -softplus(gap)
    return math.log(2) + 0.5 * torch.trapezoid(terms, t)


def sample_mixture(separation: Tensor, direction: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """[B, n, l] samples of the whitened mixtures with separations [B] in unit directions [B, l]."""
    batch, dim = direction.shape
    mean, std = (x.float()[:, None] for x in whitened_axis(separation))
    z = torch.randn(batch, n, dim, generator=generator)
    sign = 2.0 * torch.randint(2, (batch, n), generator=generator) - 1
    along = torch.einsum("bnl,bl->bn", z, direction)
    return z.add_((sign * mean + (std - 1) * along)[..., None] * direction[:, None])


# ----------------------------------------------------------------------------------------------------------------------
# The discriminators of all trials at once


class Discriminators:
    """One network a trial, their weights stacked; [B, n, l] -> logits [B, n], positive for codes, negative for target.

    Trained by Adam (1e-3) on minibatches of 64 codes and 64 samples of the target. Every 50 steps the held-out loss is
    taken. A network is kept as it was at its best, and leaves the stack after 10 checks without a better one.
    """

    def __init__(self, batch: int, dim: int, generator: torch.Generator) -> None:
        self.parameters: list[Tensor] = []  # weights [B, inputs, outputs] and biases [B, 1, outputs] in turn
        for inputs, outputs in pairwise((dim, 10 * dim, 5 * dim, 5 * dim // 2, 1)):
            weights = torch.randn(batch, inputs, outputs, generator=generator) * math.sqrt(2 / inputs)
            self.parameters += [weights, torch.zeros(batch, 1, outputs)]

    def __call__(self, z: Tensor) -> Tensor:
        for weights, biases in zip(self.parameters[:-2:2], self.parameters[1:-2:2], strict=True):
            z = leaky_relu(torch.baddbmm(biases, z, weights), 0.2)  # with plain ReLU the narrow ones of l = 2 die
        weights, biases = self.parameters[-2:]
        return torch.baddbmm(biases, z, weights).squeeze(-1)

    def loss(self, codes: Tensor, normal: Tensor) -> Tensor:
        """Cross-entropy [B] of telling codes [B, n, l] from as many samples of the target, each half of the data."""
        logits = self(torch.cat((codes, normal), 1))
        return 0.5 * (softplus(-logits[:, : codes.shape[1]]).mean(1) + softplus(logits[:, codes.shape[1] :]).mean(1))

    @torch.no_grad()
    def evaluate(self, codes: Tensor, normal: Tensor) -> Tensor:
        """`loss`, by parts of the data."""
        parts = zip(codes.split(500, 1), normal.split(500, 1), strict=True)
        return sum(self.loss(*part) * part[0].shape[1] for part in parts) / codes.shape[1]

    def fit(
        self,
        training: Sequence[Tensor],
        held_out: Sequence[Tensor],
        generator: torch.Generator,
        most_steps: int = MOST_STEPS,
    ) -> Tensor:
        """Train until all are done, and put each back to its best; returns the steps [B] after which it was that.

        Args:
            training, held_out: codes and samples of the target, [B, n, l] each.
            generator: draws the minibatches.
            most_steps: after which all are stopped.
        """
        best = [p.clone() for p in self.parameters]
        best_loss = torch.full((len(training[0]),), math.inf)
        best_step = torch.zeros(len(best_loss), dtype=torch.int64)
        running = torch.arange(len(best_loss))
        optimizer = _adam(self.parameters)
        for step in range(1, most_steps + 1):
            drawn = torch.randint(training[0].shape[1], (2, MINIBATCH), generator=generator)
            loss = self.loss(*(samples[:, index] for samples, index in zip(training, drawn, strict=True)))
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            if step % CHECK_EVERY:
                continue
            now = self.evaluate(*held_out)
            better = now < best_loss[running]
            best_loss[running[better]], best_step[running[better]] = now[better], step
            for kept, p in zip(best, self.parameters, strict=True):
                kept[running[better]] = p.detach()[better]
            going = best_step[running] > step - PATIENCE * CHECK_EVERY
            if not going.any():
                break
            if not going.all():
                running = running[going]
                training, held_out = ([samples[going] for samples in part] for part in (training, held_out))
                states = [optimizer.state[p] for p in self.parameters]
                self.parameters = [p.detach()[going] for p in self.parameters]
                optimizer = _adam(self.parameters)
                for p, state in zip(self.parameters, states, strict=True):
                    optimizer.state[p] = {name: x[going] if x.ndim else x for name, x in state.items()}
        self.parameters = best
        return best_step


def _adam(parameters: list[Tensor]) -> torch.optim.Adam:
    return torch.optim.Adam([p.requires_grad_() for p in parameters], lr=1e-3, fused=True)


# ----------------------------------------------------------------------------------------------------------------------
# The study


def run_cell(dim: int, num_samples: int, trials: int, seed: int) -> list[Row]:
    """All trials of a cell in one batch: a function of its arguments alone."""
    state = np.random.SeedSequence((seed, dim, num_samples)).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    separation = torch.linspace(0, WIDEST, trials, dtype=torch.float64)
    direction = nn.functional.normalize(torch.randn(trials, dim, generator=generator), dim=1)
    sizes = (num_samples, num_samples, TEST_SAMPLES)
    codes, other_codes, test_codes = (sample_mixture(separation, direction, n, generator) for n in sizes)
    normal, other_normal, test_normal = (torch.randn(trials, n, dim, generator=generator) for n in sizes)

    bandwidth = kdejsd.optimal_bandwidth(dim, num_samples).value
    kde = kdejsd.jsd(other_codes, codes, bandwidth, other_normal)

    networks = Discriminators(trials, dim, generator)
    steps = networks.fit((codes, normal), (other_codes, other_normal), generator)
    discriminator = math.log(2) - networks.evaluate(test_codes, test_normal)

    columns = (separation, true_jsd(separation), kde, discriminator, steps)
    rows = []
    for trial, values in enumerate(zip(*(column.tolist() for column in columns), strict=True)):
        row = zip(KINDS, (dim, num_samples, trial, *values, bandwidth, seed), strict=True)
        rows.append({name: round(value, 6) for name, value in row})
    return rows


PAIRS = (("kde", "discriminator"), ("kde", "truth"), ("discriminator", "truth"))
Cells = dict[tuple[int, int], list[Row]]


def correlation(cell: list[Row], pair: tuple[str, str]) -> tuple[float, float, float, float]:
    """Pearson's r over the trials, the ends of its 95 % confidence interval, p of no correlation.

    The interval is Fisher's z, made for pairs that are jointly normal: with s on a grid a good approximation, no more.
    """
    found = stats.pearsonr(*([trial[name] for trial in cell] for name in pair))
    interval = found.confidence_interval(0.95)
    return float(found.statistic), float(interval.low), float(interval.high), float(found.pvalue)


def table(cells: Cells, pair: tuple[str, str]) -> str:
    """Correlations by l and m; last, whether they change from the least m to the greatest (Fisher's z, two-sided)."""
    dims, sizes = sorted({dim for dim, _ in cells}), sorted({m for _, m in cells})
    lines = [f"{'l':>3}" + "".join(f"{f'm = {m}':>23}" for m in sizes) + f"{'change':>18}"]
    for dim in dims:
        row = [correlation(cells[dim, m], pair) for m in sizes]
        texts = [f"{r:.3f} [{low:.2f}, {high:.2f}]{'*' if p < 0.001 else ' '}" for r, low, high, p in row]
        change = (math.atanh(row[-1][0]) - math.atanh(row[0][0])) / math.sqrt(2 / (len(cells[dim, sizes[0]]) - 3))
        texts.append(f"z = {change:.1f}, p = {2 * stats.norm.sf(abs(change)):.1g}")
        lines.append(f"{dim:>3}" + "".join(f"{text:>23}" for text in texts))
    return "\n".join(lines)


def differences(cells: Cells, name: str) -> str:
    """An estimate minus the truth by l and m: mean and standard deviation over the trials."""
    dims, sizes = sorted({dim for dim, _ in cells}), sorted({m for _, m in cells})
    lines = [f"{'l':>3}" + "".join(f"{f'm = {m}':>23}" for m in sizes)]
    for dim in dims:
        texts = []
        for m in sizes:
            errors = np.array([trial[name] - trial["truth"] for trial in cells[dim, m]])
            texts.append(f"{errors.mean():.4f} ± {errors.std(ddof=1):.4f}")
        lines.append(f"{dim:>3}" + "".join(f"{text:>23}" for text in texts))
    return "\n".join(lines)


def draw(cells: Cells) -> Figure:
    """The correlations against m, a line for each l, with bars of 95 %."""
    figure = Figure(figsize=(12, 4.2), dpi=150, layout="constrained")
    dims, sizes = sorted({dim for dim, _ in cells}), sorted({m for _, m in cells})
    all_axes = figure.subplots(1, len(PAIRS), sharey=True)
    for axes, pair in zip(all_axes, PAIRS, strict=True):
        for number, dim in enumerate(dims):
            r, low, high, _ = np.array([correlation(cells[dim, m], pair) for m in sizes]).T
            apart = 1.03 ** (number - (len(dims) - 1) / 2)  # so that bars do not cover each other
            x = np.array(sizes) * apart
            axes.errorbar(x, r, (r - low, high - r), fmt="o-", ms=4, lw=1, capsize=2, label=f"l = {dim}")
        axes.axhline(0, color="0.6", lw=0.6)
        axes.set(title=" and ".join(pair).replace("kde", "KDE"), xlabel="samples m", xscale="log")
        axes.set_xticks(sizes, [str(m) for m in sizes])
        axes.minorticks_off()
    all_axes[0].set_ylabel("Pearson correlation of divergences, 95 %")
    figure.legend(*all_axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


# ----------------------------------------------------------------------------------------------------------------------
# The command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="The correlation study of the GENs paper (arXiv 2010.15283, section 5.1), with the truth beside it."
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"l in {QUICK_DIMS}, m in {QUICK_SAMPLES}, {QUICK_TRIALS} trials"
    )
    parser.add_argument("--trials", type=int, help=f"trials per cell (default {TRIALS}; at least 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of samples and networks (default 0)")
    parser.add_argument(
        "--csv", type=Path, metavar="PATH", help="keep the trials in this file; cells that it has are not run again"
    )
    parser.add_argument("--figure", type=Path, metavar="PATH", help="draw the correlations to this file")
    options = parser.parse_args(arguments)
    trials = options.trials or (QUICK_TRIALS if options.quick else TRIALS)
    if trials < 5:
        parser.error(f"--trials must be at least 5, of which 4 for confidence intervals up to s = 6, got {trials}")
    if options.seed < 0:
        parser.error(f"--seed must be at least 0, got {options.seed}")
    record = Record(options.csv, KINDS)
    recorded = Counter((row["latent_dim"], row["num_samples"], row["seed"]) for row in record.rows)
    others = {(seed, number) for (*_, seed), number in recorded.items()} - {(options.seed, trials)}
    if others:
        seed, number = min(others)
        parser.error(
            f"--csv {options.csv} holds {number} trials per cell with seed {seed}, expected {trials} with seed "
            f"{options.seed}: name another file, or remove it"
        )

    dims, sizes = (QUICK_DIMS, QUICK_SAMPLES) if options.quick else (LATENT_DIMS, NUM_SAMPLES)
    wanted = [(dim, m) for dim in dims for m in sizes]
    cells: Cells = {}
    start = time.perf_counter()
    for number, (dim, m) in enumerate(wanted, 1):
        done = bool(record.find(latent_dim=dim, num_samples=m))
        if not done:
            record.add(*run_cell(dim, m, trials, options.seed))
        cells[dim, m] = record.find(latent_dim=dim, num_samples=m)
        (r, *_), (kde, *_), (network, *_) = (correlation(cells[dim, m], pair) for pair in PAIRS)
        print(
            f"[{number:2}/{len(wanted)}] l = {dim:2}, m = {m:4}: KDE and discriminator {r:6.3f}, "
            f"KDE and truth {kde:6.3f}, discriminator and truth {network:6.3f}   "
            f"({'from the record' if done else f'{time.perf_counter() - start:.0f} s'})",
            flush=True,
        )

    print(f"\nPearson correlations over {trials} trials, with 95 % confidence intervals; * for p < 0.001")
    for pair in PAIRS:
        print(f"\n{' and '.join(pair).replace('kde', 'KDE')}\n{table(cells, pair)}")
    within = {key: [trial for trial in cell if trial["separation"] <= WIDEST_OF_PAPER] for key, cell in cells.items()}
    print(f"\nAs in the paper, with s itself; only the trials with s up to {WIDEST_OF_PAPER:g}")
    for name in ("kde", "discriminator"):
        print(f"\n{name.replace('kde', 'KDE')} and s\n{table(within, (name, 'separation'))}")
    print("\nWhat correlations do not show: the estimate minus the truth, nats, mean ± standard deviation of trials")
    for name in ("kde", "discriminator"):
        print(f"\n{name.replace('kde', 'KDE')}\n{differences(cells, name)}")
    print(f"\nThe truth lies between 0 and {max(t['truth'] for cell in cells.values() for t in cell):.4f} nats.")
    print(f"Processor time: {time.process_time():.0f} s, threads: {torch.get_num_threads()}")
    if options.figure:
        options.figure.parent.mkdir(parents=True, exist_ok=True)
        draw(cells).savefig(options.figure)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
