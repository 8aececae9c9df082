"""Shows what a GEN's latent term does in many dimensions, where the answer is known: bandwidths and forms of the loss.

    python bench/papers/gen_large_l.py --csv gen_large_l.csv       # 10 minutes of one idle core
    python bench/papers/gen_large_l.py --quick                     # a few seconds: eight dimensions, few steps

With --csv a run goes on where one that wrote the same file was stopped.

The encoder is a linear map of normal data, z = A x, x ~ N(0, Sigma): codes are normal whatever A is, and their
divergence from the target, KL(N(0, A Sigma A^T) | N(0, I)), has a closed form. The variances of x go from 0.1 to 3.2,
evenly in their logarithm, in a random orientation; A begins as the identity and is trained by the latent term alone,
by minibatches of 100, with the codes of other 4000 samples as lagged codes, encoded anew every 10 steps. One run each;
what differs between runs is the form of the loss. Let h be `optimal_bandwidth(..., smoothed=True)`.

    paper          the target itself, at the bandwidth that is optimal for it (eq. 3)
    noise          the smoothed target, at the same bandwidth, codes with the kernel's noise: GEN's default
    h x f          the smoothed target, codes as they are, bandwidth f h
    ladder         ... the mean of the loss over h, 1.5 h and 2.25 h
    background     ... at 2/3 h, the kernel density mixed with a tenth of one broad normal, of 1.5 times the variance of
                   the smoothed target, which bounds the loss below
    Abramson       ... at h, the bandwidth of each center times (p / g)^(-1/(2 l)), p the density there and g its
                   geometric mean, between a half and 2: his square root rule per dimension, or any two centers would
                   differ by orders of magnitude

each as "js" and as "kl". This is a study of our own; the GENs paper (arXiv 2010.15283) stops at 50 dimensions.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from record import Record, rounded
from torch import Tensor

from kdejsd import LaggedKDE, StandardNormal, jsd_loss, kde_log_prob, optimal_bandwidth
from kdejsd.divergence import DIVERGENCES
from kdejsd.targets import IsotropicNormal

LATENT_DIMS, QUICK_DIMS = (16, 64, 128), (8,)
STEPS, QUICK_STEPS = 600, 60
CENTERS, BATCH, REFRESH_EVERY = 4000, 100, 10
LEARNING_RATE = 1e-2
BACKGROUND, BROADER = 0.1, 1.5

# Eigenvalues of the codes' covariance after training, and the codes' divergence from the target in nats.
KINDS = {"latent_dim": int, "seed": int, "form": str, "divergence": str, "bandwidth": float}
KINDS |= dict.fromkeys(("least", "median", "greatest", "kl", "seconds"), float)

Loss = Callable[[Tensor, Tensor], Tensor]  # codes [n, l], lagged codes [m, l] -> 0-dim


# ----------------------------------------------------------------------------------------------------------------------
# Forms of the loss


def of_the_library(dim: int, h: float, divergence: Any, *, smoothed: bool = True, noise: bool = False) -> Loss:
    kde = LaggedKDE(CENTERS, dim, h, smoothed=smoothed, divergence=divergence)

    def loss(codes: Tensor, centers: Tensor) -> Tensor:
        kde.refresh(centers)
        return kde.loss(codes, noise=torch.randn_like(codes) if noise else None)

    return loss


def ladder(dim: int, bandwidths: Sequence[float], divergence: str) -> Loss:
    rungs = [of_the_library(dim, h, divergence) for h in bandwidths]
    return lambda codes, centers: torch.stack([rung(codes, centers) for rung in rungs]).mean()


def background(dim: int, h: float, divergence: str) -> Loss:
    target = StandardNormal(dim).smoothed(h)
    broad = IsotropicNormal(dim, BROADER * target.variance)

    def loss(codes: Tensor, centers: Tensor) -> Tensor:
        wide = codes.double()
        density = math.log1p(-BACKGROUND) + kde_log_prob(codes, centers, h).double()
        density = torch.logaddexp(density, math.log(BACKGROUND) + broad.log_prob(wide))
        return DIVERGENCES[divergence].terms(target.log_prob(wide) - density).mean()

    return loss


def abramson(dim: int, h: float, divergence: str) -> Loss:
    target = StandardNormal(dim).smoothed(h)

    def loss(codes: Tensor, centers: Tensor) -> Tensor:
        density = kde_log_prob(centers, centers, h, exclude_self=True)
        bandwidths = h * (-(density - density.mean()) / (2 * dim)).exp().clamp(0.5, 2)
        return jsd_loss(codes, centers, bandwidths, target=target, divergence=divergence)

    return loss


def forms(dim: int, divergence: str) -> Iterator[tuple[str, float, Loss]]:
    """Name, bandwidth and loss of each form."""
    best = optimal_bandwidth(dim, CENTERS).value
    h = optimal_bandwidth(dim, CENTERS, smoothed=True).value
    yield "paper", best, of_the_library(dim, best, divergence, smoothed=False)
    yield "noise", best, of_the_library(dim, best, divergence, noise=True)
    for factor in (2 / 3, 1.0, 1.5, 2.5, 4.0):
        yield f"h x {factor:.2g}", factor * h, of_the_library(dim, factor * h, divergence)
    yield "ladder", h, ladder(dim, (h, 1.5 * h, 2.25 * h), divergence)
    yield "background, h x 0.67", 2 / 3 * h, background(dim, 2 / 3 * h, divergence)
    yield "Abramson", h, abramson(dim, h, divergence)


# ----------------------------------------------------------------------------------------------------------------------
# One run


def train(dim: int, loss: Loss, steps: int, seed: int) -> Tensor:
    """Eigenvalues [l], ascending, of the covariance of the codes."""
    torch.manual_seed(seed)
    scales = torch.logspace(-1, 0.5, dim).sqrt()
    orientation = torch.linalg.qr(torch.randn(dim, dim)).Q

    def samples(count: int) -> Tensor:
        return (torch.randn(count, dim) * scales) @ orientation.T

    reference = samples(CENTERS)
    linear = torch.eye(dim, requires_grad=True)
    optimizer = torch.optim.Adam([linear], lr=LEARNING_RATE, betas=(0.5, 0.999))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        if step % REFRESH_EVERY == 0:
            centers = reference @ linear.detach().T
        optimizer.zero_grad()
        loss(samples(BATCH) @ linear.T, centers).backward()
        optimizer.step()
        schedule.step()
    root = linear.detach().double() @ orientation.double() * scales.double()
    return torch.linalg.svdvals(root).square().flip(0)


def kl_from_normal(eigenvalues: Tensor) -> float:
    """KL(N(0, C) | N(0, I)) in nats of the eigenvalues of C."""
    return float(0.5 * (eigenvalues - 1 - eigenvalues.log()).sum())


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A GEN's latent term in many dimensions, with linear encoders.")
    parser.add_argument("--quick", action="store_true", help="eight dimensions, few steps: no result to believe")
    parser.add_argument("--seed", type=int, default=0, help="of data, map and minibatches (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="as torch.set_num_threads (default 1)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where results go, and from where a run goes on")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    dims, steps = (QUICK_DIMS, QUICK_STEPS) if options.quick else (LATENT_DIMS, STEPS)

    record = Record(options.csv, KINDS)
    line = "{form:24}{divergence:6}{bandwidth:7.3f}   {least:12.4g}{median:12.4g}{greatest:12.4g}  {kl:10.4g}"
    for dim in dims:
        print(
            f"\nl = {dim}, m = {CENTERS}, {steps} steps\n{'form':24}{'':6}{'h':>7}   "
            f"{'eigenvalues: least, median, greatest':38}{'KL, nats':>10}",
            flush=True,
        )
        for divergence in ("js", "kl"):  # those of the record
            for form, bandwidth, loss in forms(dim, divergence):
                key = {"latent_dim": dim, "form": form, "divergence": divergence, "seed": options.seed}
                if not record.find(**key):
                    began = time.perf_counter()
                    found = train(dim, loss, steps, options.seed)
                    seconds = round(time.perf_counter() - began, 1)
                    least, median, greatest = (float(found[k]) for k in (0, dim // 2, -1))
                    row = {"bandwidth": bandwidth, "least": least, "median": median, "greatest": greatest}
                    row["kl"] = kl_from_normal(found)
                    record.add(key | {k: rounded(v, 6) for k, v in row.items()} | {"seconds": seconds})
                print(line.format(**record.find(**key)[0]), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
