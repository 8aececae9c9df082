"""Times a training step of a GEN against the same autoencoder's step without the latent term.

    python bench/bench_step.py                      # about 4 minutes
    python bench/bench_step.py --quick              # small sizes, under 30 seconds
    python bench/bench_step.py --device cuda --csv step.csv

Real steps by Lightning's trainer, on random 28 x 28 images, with the FC networks: forward, backward, Adam, refresh.
Every way to refresh has its turn in each round, so that a slow minute of the machine hits all alike; within a turn a
step's time is the mean over whole periods of the refresh. `ratio` is a GEN's step over the plain one, the median of the
rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import harness
import lightning.pytorch as pl
import machine
import torch
from papers.quiet import quiet_trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from kdejsd.models.built import AE, GEN, BuiltModel

SHAPE = (1, 28, 28)
PERIOD = 10  # k_b
SIZES = [(300, 10_000, 8), (512, 100_000, 40)]  # batch, m, l
QUICK = [(100, 2_000, 8)]
PLAIN = "autoencoder"
POLICIES = ("full", "rolling", "queue", "tracked")
FIELDS = ("step", "batch", "m", "l", "ms", "p20", "p80", "ratio", "device", "threads", "machine", "versions", "commit")


class Images(Dataset[tuple[Tensor, Tensor, Tensor]]):
    """Random images."""

    def __init__(self, count: int) -> None:
        self.images = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor, Tensor]:
        return self.images[index], torch.tensor(0), torch.tensor(index)


class Clock(pl.Callback):
    """Time from the first step after a warm-up to the last."""

    def __init__(self, warm_up: int) -> None:
        self.warm_up = warm_up

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.warm_up:
            self.started = self._now(trainer)

    def on_train_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.step_ms = (self._now(trainer) - self.started) * 1e3 / (trainer.global_step - self.warm_up)

    def _now(self, trainer: pl.Trainer) -> float:
        if trainer.strategy.root_device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()


def turn(step: str, size: tuple[int, int, int], images: Images, device: str, periods: int) -> float:
    """Milliseconds of a step."""
    batch, m, dim = size
    pl.seed_everything(0, verbose=False)
    if step == PLAIN:  # the same networks, normalisation and optimiser, and no latent term
        model: BuiltModel = AE(SHAPE, latent_dim=dim, normalize_codes=True)
    else:
        model = GEN(SHAPE, latent_dim=dim, num_lagged=m, bandwidth=0.5, refresh_every=PERIOD, refresh=step)
    loader = DataLoader(images, batch_size=batch, shuffle=True, drop_last=True)
    clock = Clock(PERIOD)
    trainer = quiet_trainer(
        accelerator="gpu" if device == "cuda" else "cpu", max_steps=PERIOD * (1 + periods), callbacks=[clock]
    )
    trainer.fit(model, loader)
    return clock.step_ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small size")
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
        batch, m, dim = size
        images = Images(m)
        others = machine.OthersLoad()
        times: dict[str, list[float]] = {step: [] for step in (PLAIN, *POLICIES)}
        for _ in range(arguments.rounds or (2 if arguments.quick else 5)):
            for step, measured in times.items():
                measured.append(turn(step, size, images, arguments.device, 1 if m > 50_000 else 3))
        print(f"\nbatch = {batch}, m = {m}, l = {dim}; other processes kept {others.cores():.2f} cores busy")
        print(f"  {'step':12}{'ms':>10}{'(p20-p80)':>20}{'ratio':>8}")
        for step, measured in times.items():
            ratio = statistics.median(ours / plain for ours, plain in zip(measured, times[PLAIN], strict=True))
            middle, low, high = harness.spread(measured)
            print(f"  {step:12}{middle:10.2f}{f'({low:.2f}-{high:.2f})':>20}{ratio:8.2f}")
            rows.append(
                {"step": step, "batch": batch, "m": m, "l": dim, "ms": middle, "p20": low, "p80": high, "ratio": ratio}
            )
    with harness.csv_table(arguments.csv, FIELDS, shared) as write:
        write(rows)


if __name__ == "__main__":
    main()
