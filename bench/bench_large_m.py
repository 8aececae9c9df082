"""The latent term of a training step with up to a million lagged codes, and a training with as many.

    python bench/bench_large_m.py --threads 1       # about 2 minutes
    python bench/bench_large_m.py --quick           # small sizes, under 30 seconds
    python bench/bench_large_m.py --device cuda --csv large_m.csv

First `LaggedKDE.loss` with the kernel's noise, as GEN takes it, value and gradient for n codes, with the m lagged codes
kept in each way. The ways take turns in each round. `ms / 1e6` is the time for a million codes: the same down the table
if time is linear in m. `extra` is the peak of memory during the step beyond what was held before, to be compared with
`codes`, what the lagged codes take, and `n x m`, one array of plain PyTorch's in float32. `value` and `gradient` say
what the rounding changes: the difference of the loss in nats, and |g - g'| / |g'|.

Then steps of a GEN by Lightning's trainer on m random images of 8 x 8 bytes, all of them lagged. `extra` is the peak of
memory during the whole run, from before the model is made, with the lagged codes in it and without the images.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import harness
import lightning.pytorch as pl
import machine
import torch
from papers.quiet import quiet_trainer
from torch import Tensor

from kdejsd import LaggedKDE
from kdejsd.data.base import BatchLoader, BatchOrder, ExampleSet
from kdejsd.models.built import GEN

N, DIM = 256, 64
BANDWIDTH = 1.9  # with which a million kernels still reach each other in so many dimensions
SIZES, QUICK = (10_000, 100_000, 1_000_000), (1_000, 10_000)
SHAPE = (1, 8, 8)
FIELDS = (
    *("part", "codes", "refresh", "n", "m", "l", "ms", "p20", "p80", "codes_mib", "extra_mib", "plain_mib"),
    *("value_change", "gradient_change", "first_rec", "last_rec", "last_latent", "others", "device"),
    *("threads", "machine", "versions", "commit", "date"),
)


def storages(device: str) -> dict[str, dict[str, Any]]:
    """The ways to keep the codes, first the one that is a single kernel call."""
    ways: dict[str, dict[str, Any]] = {"float32": {}, "bfloat16": {"storage_dtype": torch.bfloat16}}
    if device == "cuda":
        ways |= {f"{name}, host": way | {"storage_device": "cpu"} for name, way in ways.items()}
    return ways


# ----------------------------------------------------------------------------------------------------------------------
# The latent term


def term_rows(m: int, device: str, rounds: int) -> list[harness.Row]:
    generator = torch.Generator().manual_seed(0)
    centers, z, noise = (torch.randn(count, DIM, generator=generator) for count in (m, N, N))
    z, noise = z.to(device).requires_grad_(), noise.to(device)
    index = torch.arange(N, device=device)
    modules = {}
    for name, way in storages(device).items():
        modules[name] = LaggedKDE(m, DIM, BANDWIDTH, **way).to(device)
        modules[name].refresh(centers, torch.arange(m))
    del centers

    def step(name: str) -> tuple[Tensor, Tensor]:
        loss = modules[name].loss(z, index, noise=noise)
        return loss.detach(), torch.autograd.grad(loss, z)[0]

    extra, results = {}, {}
    for name in modules:
        step(name)
        with machine.peak_memory(device) as peak:
            results[name] = step(name)
        extra[name] = peak.mib
    load = machine.OthersLoad()
    times: dict[str, list[float]] = {name: [] for name in modules}
    for _ in range(rounds):
        for name, measured in times.items():
            measured += harness.timed(lambda name=name: step(name), 1 if m > 500_000 else 3, device)
    loss, gradient = results["float32"]
    rows = []
    for name, measured in times.items():
        middle, low, high = harness.spread(measured)
        codes = modules[name].codes
        rows.append(
            {
                **{"part": "term", "codes": name, "n": N, "m": m, "l": DIM, "ms": middle, "p20": low, "p80": high},
                **{"codes_mib": codes.nbytes / machine.MIB, "extra_mib": extra[name]},
                **{"plain_mib": 4 * N * m / machine.MIB, "value_change": float(results[name][0] - loss)},
                "gradient_change": float((results[name][1] - gradient).norm() / gradient.norm()),
                "others": load.cores(),
            }
        )
    return rows


def print_term(rows: list[harness.Row]) -> None:
    print(
        f"\nlatent term, value and gradient: n = {N}, m = {rows[0]['m']}, l = {DIM}, h = {BANDWIDTH}; "
        f"other processes kept {rows[0]['others']:.2f} cores busy"
    )
    print(
        f"  {'codes':16}{'ms':>9}{'(p20-p80)':>18}{'ms / 1e6':>10}{'codes':>10}{'extra':>9}{'n x m':>9}"
        f"{'MiB':>5}{'value':>10}{'gradient':>10}"
    )
    for row in rows:
        print(
            f"  {row['codes']:16}{row['ms']:9.2f}{'({p20:.2f}-{p80:.2f})'.format(**row):>18}"
            f"{1e6 * row['ms'] / row['m']:10.0f}{row['codes_mib']:10.1f}{row['extra_mib']:9.1f}{row['plain_mib']:9.0f}"
            f"{'':5}{row['value_change']:10.1e}{row['gradient_change']:10.1e}"
        )


def print_growth(rows: list[harness.Row]) -> None:
    """The exponents of m between neighbouring sizes."""
    for name in dict.fromkeys(row["codes"] for row in rows):
        mine = [(row["m"], row["ms"]) for row in rows if row["codes"] == name]
        found = ", ".join(
            f"{math.log(t / t0) / math.log(m / m0):.2f} from {m0} to {m}" for (m0, t0), (m, t) in pairwise(mine)
        )
        print(f"  {name}: time grows like m to the {found}")


# ----------------------------------------------------------------------------------------------------------------------
# Training


class Course(pl.Callback):
    """Times of the steps after the first, the error per pixel of each, and the latent term."""

    def __init__(self) -> None:
        self.ms: list[float] = []
        self.rec: list[float] = []
        self.latent: list[float] = []

    def on_train_batch_start(self, *_: Any) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.rec.append(float(trainer.callback_metrics["loss/reconstruction"]))  # waits for the device
        self.latent.append(float(trainer.callback_metrics["loss/latent"]))
        if trainer.global_step > 1:
            self.ms.append(1e3 * (time.perf_counter() - self.started))


def training_row(images: ExampleSet, codes: str, refresh: str, steps: int, device: str) -> harness.Row:
    m = len(images)
    course, load = Course(), machine.OthersLoad()
    with machine.peak_memory(device) as peak:
        pl.seed_everything(0, verbose=False)
        model = GEN(
            *(SHAPE, DIM),
            num_lagged=m,
            bandwidth=BANDWIDTH,
            refresh=refresh,
            refresh_every=100,
            lagged_dtype=codes,
            keep_examples=False,
        )
        trainer = quiet_trainer(
            accelerator="gpu" if device == "cuda" else "cpu", max_steps=steps, callbacks=[course], log_every_n_steps=1
        )
        trainer.fit(model, BatchLoader(images, BatchOrder(m, min(N, m), 0)))
    middle, low, high = harness.spread(course.ms)
    return {
        **{"part": "training", "codes": codes, "refresh": refresh, "n": N, "m": m, "l": DIM},
        **{"ms": middle, "p20": low, "p80": high, "others": load.cores()},
        **{"codes_mib": model.lagged.codes.nbytes / machine.MIB, "extra_mib": peak.mib},
        **{"first_rec": course.rec[0], "last_rec": course.rec[-1], "last_latent": statistics.mean(course.latent[-5:])},
    }


def print_training(row: harness.Row) -> None:
    print(
        f"  {row['codes']:10}{row['refresh']:10}{row['ms']:9.1f}{'({p20:.1f}-{p80:.1f})'.format(**row):>18}"
        f"{row['codes_mib']:10.1f}{row['extra_mib']:9.1f}"
        f"{'':5}{row['first_rec']:10.4f}{row['last_rec']:9.4f}{row['last_latent']:9.3f}{row['others']:9.2f}"
    )


def random_images(count: int) -> ExampleSet:
    """Smooth ones, of five numbers each, so that there is something to learn."""
    generator = torch.Generator().manual_seed(0)
    waves = torch.randn(5, math.prod(SHAPE), generator=generator)
    images = torch.empty(count, *SHAPE, dtype=torch.uint8)
    for part in images.split(10_000):
        mixed = torch.randn(len(part), 5, generator=generator) @ waves
        part.copy_(255 * mixed.sigmoid().unflatten(1, SHAPE))
    return ExampleSet(images, torch.zeros(count, dtype=torch.int64))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small sizes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; default: as it is")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    parser.add_argument("--csv", type=Path, help="write the numbers here too")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)

    device = arguments.device
    facts = machine.facts(device)
    harness.print_facts(facts)
    sizes = QUICK if arguments.quick else SIZES
    term: list[harness.Row] = []
    for m in sizes:
        rows = term_rows(m, device, arguments.rounds)
        print_term(rows)
        term += rows
    print_growth(term)

    training_row(random_images(1000), "bfloat16", "rolling", 2, device)  # what the first run loads does not count
    print(f"\ntraining: n = {N}, m = {sizes[-1]} = all images, l = {DIM}, {arguments.steps} steps")
    print(
        f"  {'codes':10}{'refresh':10}{'ms':>9}{'(p20-p80)':>18}{'codes':>10}{'extra':>9}{'MiB':>5} "
        f"{'rec, first':>10}{'last':>9}{'latent':>9}{'others':>9}"
    )
    images = random_images(sizes[-1])
    trained = []
    for codes, refresh in (("float32", "queue"), ("bfloat16", "queue"), ("bfloat16", "rolling")):
        trained.append(training_row(images, codes, refresh, arguments.steps, device))
        print_training(trained[-1])
    shared = {"device": device, **{key: facts[key] for key in harness.FACTS}}
    with harness.csv_table(arguments.csv, FIELDS, shared) as write:
        write(term + trained)


if __name__ == "__main__":
    main()
