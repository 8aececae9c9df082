"""Times a training step of a GEN against the same autoencoder's step without the latent term.

    python bench/bench_step.py                      # about 8 minutes
    python bench/bench_step.py --compiled           # with rows by torch.compile, some of which compile for a minute
    python bench/bench_step.py --quick              # small sizes, under 30 seconds
    python bench/bench_step.py --device cuda --csv step.csv

Real steps by Lightning's trainer, on random images of 8 x 8 and 28 x 28 bytes in the loaders of `kdejsd.data`, with
the FC networks: forward, backward, Adam, refresh. Every row has its turn in each round, so that a slow minute of the
machine hits all alike; within a turn a step's time is the mean over whole periods of the refresh. `ratio` is a row's
step over the autoencoder's, the median of the rounds. The rows:

    autoencoder                     the same networks, normalisation and optimiser, and no latent term
    full, rolling, queue, tracked   a GEN with each way to renew its lagged codes
    ..., own loop                   a plain loop of torch, with `LaggedRefresh`. It does without the trainer, logs,
                                    checks of the loss, decay of the learning rate, and calibration of the normalisation
    ..., all logged                 with `log_every_n_steps=1`; the others log every tenth step, as `kdejsd fit` does
    ..., compiled                   `trainer.fit(torch.compile(model))`; steps in which it compiles are not counted
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import harness
import lightning.pytorch as pl
import machine
import torch
from papers.quiet import quiet_trainer
from torch.nn.functional import mse_loss

from kdejsd import LaggedRefresh
from kdejsd.data import Batch, BatchLoader, BatchOrder, ExampleSet
from kdejsd.models import GEN as AnyGEN
from kdejsd.models import Autoencoder
from kdejsd.models.built import AE, GEN

PERIOD = 10  # k_b
WARM_UP = 2 * PERIOD


class Size(NamedTuple):
    """What a step is measured on: examples of a minibatch, m, l, the side of an image, and periods in a turn."""

    batch: int
    m: int
    dim: int
    side: int
    periods: int

    @property
    def steps(self) -> int:
        """The steps of a turn, less than an epoch: a GEN counts from its first step when it is time to refresh."""
        return WARM_UP + PERIOD * self.periods


SIZES = [
    Size(100, 1000, 8, 8, 20),
    Size(300, 10_000, 8, 28, 4),
    Size(512, 100_000, 40, 28, 1),
    Size(512, 10_000, 40, 28, 2),
]
QUICK = [Size(100, 2_000, 8, 8, 2)]
PLAIN = "autoencoder"
ROWS = (PLAIN, "full", "rolling", "queue", "tracked", f"{PLAIN}, own loop", "full, own loop", "full, all logged")
COMPILED = (f"{PLAIN}, compiled", "full, compiled", "tracked, compiled")
FIELDS = (
    *("step", "batch", "m", "l", "side", "ms", "p20", "p80", "ratio", "device", "threads", "machine", "versions"),
    "commit",
)


class Clock(pl.Callback):
    """Time of a step after a warm-up."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def begin(self) -> None:
        self.started = self._now()

    def end(self, steps: int) -> None:
        self.step_ms = (self._now() - self.started) * 1e3 / (steps - WARM_UP)

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == WARM_UP:
            self.begin()

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.end(trainer.global_step)

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


def turn(row: str, size: Size, images: ExampleSet, device: str) -> float:
    """Milliseconds of a step."""
    step, _, how = row.partition(", ")
    pl.seed_everything(0, verbose=False)
    shape = (1, size.side, size.side)
    model: Any
    if step == PLAIN:
        model = AE(shape, latent_dim=size.dim, normalize_codes=True)
    else:
        model = GEN(shape, latent_dim=size.dim, num_lagged=size.m, bandwidth=0.5, refresh_every=PERIOD, refresh=step)
    loader = BatchLoader(images, BatchOrder(len(images), size.batch, 0))
    clock = Clock(device)
    if how == "own loop":
        own_loop(model.to(device), loader, images, size.steps, clock)
    else:
        accelerator = "gpu" if device == "cuda" else "cpu"
        every = 1 if how == "all logged" else PERIOD
        trainer = quiet_trainer(
            accelerator=accelerator, max_steps=size.steps, callbacks=[clock], log_every_n_steps=every
        )
        if how == "compiled":
            torch._dynamo.reset()  # or it would compile no more after some turns
            model = torch.compile(model)
        trainer.fit(model, loader)
    return clock.step_ms


def own_loop(model: Autoencoder, loader: BatchLoader, images: ExampleSet, steps: int, clock: Clock) -> None:
    """The steps of an autoencoder, or of a GEN that encodes all lagged examples in every tenth."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.5, 0.999), fused=True)
    refresh = LaggedRefresh(model.lagged, model.encode, images, PERIOD) if isinstance(model, AnyGEN) else None
    for done, (examples, _, index) in zip(range(steps), endless(loader), strict=False):
        if done == WARM_UP:
            clock.begin()
        examples, index = examples.to(model.device), index.to(model.device)
        if refresh is not None:
            refresh.step()
        codes = model.encode(examples)
        loss = mse_loss(model.decode(codes), examples)
        if isinstance(model, AnyGEN):
            loss = loss + model.latent_terms(codes, index).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    clock.end(steps)


def endless(loader: BatchLoader) -> Iterator[Batch]:
    while True:
        yield from loader


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small size")
    parser.add_argument("--compiled", action="store_true", help="rows by torch.compile too")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: as it is")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--csv", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    facts = machine.facts(arguments.device)
    harness.print_facts(facts)
    shared = {"device": arguments.device, **{key: facts[key] for key in ("threads", "machine", "versions", "commit")}}
    rows = []
    for size in QUICK if arguments.quick else SIZES:
        count = max(size.m, size.batch * (size.steps + 1))
        pixels = torch.randint(256, (count, 1, size.side, size.side), dtype=torch.uint8)
        images = ExampleSet(pixels, torch.full((count,), -1))
        others = machine.OthersLoad()
        times: dict[str, list[float]] = {row: [] for row in ROWS + (COMPILED if arguments.compiled else ())}
        for _ in range(arguments.rounds or (2 if arguments.quick else 5)):
            for row, measured in times.items():
                measured.append(turn(row, size, images, arguments.device))
        print(
            f"\nbatch = {size.batch}, m = {size.m}, l = {size.dim}, images of {size.side} x {size.side}; "
            f"other processes kept {others.cores():.2f} cores busy"
        )
        print(f"  {'step':24}{'ms':>10}{'(p20-p80)':>20}{'ratio':>8}")
        for row, measured in times.items():
            ratio = statistics.median(ours / plain for ours, plain in zip(measured, times[PLAIN], strict=True))
            middle, low, high = harness.spread(measured)
            print(f"  {row:24}{middle:10.2f}{f'({low:.2f}-{high:.2f})':>20}{ratio:8.2f}")
            numbers = {"ms": middle, "p20": low, "p80": high, "ratio": ratio}
            rows.append({"step": row, "batch": size.batch, "m": size.m, "l": size.dim, "side": size.side} | numbers)
    with harness.csv_table(arguments.csv, FIELDS, shared) as write:
        write(rows)


if __name__ == "__main__":
    main()
