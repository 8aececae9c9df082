"""Table 2 of the GENs paper, computed anew: the entropy of the latent codes of MNIST by the number of training images.

    python bench/papers/gen_table2.py --data DIR                # 5 models a cell; 1 to 2 minutes a model on one core
    python bench/papers/gen_table2.py --data DIR --ablation     # the recipe of GEN, one ingredient changed at a time
    python bench/papers/gen_table2.py --quick                   # under a minute: scikit-learn's digits, short runs

Paper: S. Saha, S. Elhabian, R. T. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283, section 5.2: fully
connected networks, l = 8. Their widths are ours, 784-512-256-l and back. DIR holds the idx files of MNIST (KDEJSD_DATA
names it too). Every model has the same networks, images, minibatches, number of epochs, and its own defaults otherwise.
The code of a VAE is the mean of its posterior.

A cell is the leave-one-out KDE entropy of whitened codes (`kdejsd.kde_entropy`) of the training images and, beside it,
of as many images held out (at most 10 000). It is biased by its KDE, the more the fewer codes: compare it with that of
as many samples of the standard normal, the first row, and with nothing else. Whitened codes have no entropy above the
normal's but by being more even than independent samples: an entropy of training codes above the first row is
over-fitting, too. `PRINTED` holds the paper's table. By the paper's notation the codes are those of training
images, and ours of training images are compared with it. With --csv FILE a run goes on where one that wrote the same
file was stopped.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch import seed_everything
from quiet import quiet_trainer
from record import Record, Row, matching, rounded
from torch import Tensor

import kdejsd
from kdejsd import kde_entropy
from kdejsd.data import MNIST, Digits, ExampleData, ExampleSet
from kdejsd.models import GEN, built
from kdejsd.runs.measuring import encode_set

LATENT_DIM = 8
BATCH = 100
SIZES = (1000, 2000, 5000, 10_000)
INPUT_DROPOUT = {1000: 0.4, 2000: 0.3, 5000: 0.15}  # of GEN, for small training sets
QUICK_SIZES = (300, 600)
ABLATION_SIZES = (1000, 10_000)
STEPS = {1000: 2000, 2000: 3000, 5000: 4000, 10_000: 4000}
QUICK_STEPS = 60
MODELS = ("GEN", "AAE", "VAE", "WAE")
NORMAL, RECIPE = "standard normal", "GEN"
MOST_CODES = 10_000
PRINTED_MODELS = 5
# Mean and standard deviation of the entropy over the paper's five models (or sets of normal samples).
PRINTED = {
    NORMAL: dict(zip(SIZES, [(11.668, 0.0552), (11.621, 0.0597), (11.575, 0.0200), (11.538, 0.0162)], strict=True)),
    "GEN": dict(zip(SIZES, [(11.681, 0.0231), (11.622, 0.0170), (11.497, 0.0068), (11.464, 0.0036)], strict=True)),
    "AAE": dict(zip(SIZES, [(6.552, 1.8164), (8.408, 0.5280), (8.742, 0.4209), (9.862, 1.1321)], strict=True)),
    "VAE": dict(zip(SIZES, [(10.478, 0.1647), (10.483, 0.2013), (10.347, 0.0769), (10.130, 0.1516)], strict=True)),
}
KINDS = {"data": str, "row": str, "train_size": int, "seed": int, "codes": str, "count": int, "entropy": float}
KINDS |= {"normal": float, "error_per_pixel": float, "steps": int, "seconds": float}

Maker = Callable[[ExampleData], tuple[pl.LightningModule, ExampleData]]


# ----------------------------------------------------------------------------------------------------------------------
# Models


def by_name(name: str, **changes: Any) -> Maker:
    """Makes a model for a data set by its name in kdejsd.models.built, with these settings and else its own."""

    def make(data: ExampleData) -> tuple[pl.LightningModule, ExampleData]:
        settings = recipe(data) if name == "GEN" else {}
        return getattr(built, name)(data.example_shape, LATENT_DIM, **settings | changes), data

    return make


def recipe(data: ExampleData) -> dict[str, Any]:
    """Returns the settings of a GEN that go by the training set: all its codes are lagged codes."""
    count = len(data.training)
    return {"num_lagged": count, "input_dropout": INPUT_DROPOUT.get(count, 0.0)}


def wider(data: ExampleData) -> tuple[pl.LightningModule, ExampleData]:
    h = kdejsd.optimal_bandwidth(LATENT_DIM, len(data.training)).value
    return by_name("GEN", bandwidth=1.5 * h)(data)


class OwnCopies(built.GEN):
    """A GEN that leaves no code's own lagged copy out."""

    def latent_terms(self, codes: Tensor, index: Tensor | None) -> Tensor:
        terms: Tensor = super().latent_terms(codes, None)
        return terms


def own_copies(data: ExampleData) -> tuple[pl.LightningModule, ExampleData]:
    return OwnCopies(data.example_shape, LATENT_DIM, **recipe(data)), data


class Apart(ExampleData):
    """Of the training images of a data set, drawn by its seed, some for the lagged codes alone (`lagged_images`), and
    the others to train on."""

    def __init__(self, data: ExampleData, lagged_size: int, **settings: Any) -> None:
        super().__init__(data.batch_size, seed=data.seed, **settings)
        self.example_shape = data.example_shape
        self.whole = data
        count = len(data.training)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(data.seed))
        used, lagged = order.split([count - lagged_size, lagged_size])
        self.lagged_images = data.training.subset(lagged)
        self._used = data.training.subset(used)

    def load(self) -> tuple[ExampleSet, ExampleSet]:
        return self._used, self.whole.held_out


class LaggedApart(GEN):
    """A GEN whose lagged codes are those of images that it is not trained on, given as `apart` [m, C, H, W]."""

    apart: Tensor

    def _drawn_examples(self, count: int) -> Tensor:
        return torch.full((len(self.apart),), -1, device=self.device)

    def _read_examples(self, index: Tensor) -> Iterator[Tensor]:  # of all, at the start of a run, which keeps them
        for part in self.apart.split(1000):
            yield part.to(self.device, self.dtype)


class BuiltLaggedApart(LaggedApart, built.GEN):
    pass


def lagged_apart(data: ExampleData) -> tuple[pl.LightningModule, ExampleData]:
    halves = Apart(data, len(data.training) // 2)
    model = BuiltLaggedApart(data.example_shape, LATENT_DIM, **recipe(data) | {"num_lagged": len(halves.lagged_images)})
    model.apart = halves.lagged_images[torch.arange(len(halves.lagged_images))][0]
    return model, halves


ABLATION: dict[str, Maker] = {
    RECIPE: by_name("GEN"),
    "no code normalisation": by_name("GEN", normalize_codes=False),
    "own lagged copy counted": own_copies,
    "lagged codes of images apart": lagged_apart,
    "weight / 3": by_name("GEN", weight=1 / 3),
    "weight x 3": by_name("GEN", weight=3.0),
    "target not smoothed": by_name("GEN", smoothed=False),
    "no kernel noise": by_name("GEN", kernel_noise=False),
    'divergence "kl"': by_name("GEN", divergence="kl"),
    "bandwidth x 1.5": wider,
    'refresh "rolling"': by_name("GEN", refresh="rolling"),
    'refresh "queue"': by_name("GEN", refresh="queue"),
    "all pixels seen": by_name("GEN", input_dropout=0.0),
    "no decay": by_name("GEN", decay=False),
    "learning rate 2e-4, no decay": by_name("GEN", learning_rate=2e-4, decay=False),
}


# ----------------------------------------------------------------------------------------------------------------------
# One model


def entropy(codes: Tensor) -> float:
    """Of the whitened codes, in nats; NaN where they cannot be whitened."""
    try:
        return float(kde_entropy(codes))
    except ValueError:
        return float("nan")


def normal_entropy(count: int, seed: int) -> float:
    return entropy(torch.randn(count, LATENT_DIM, generator=torch.Generator().manual_seed(seed)))


def train_and_measure(row: str, make: Maker, data: ExampleData, seed: int, steps: int) -> list[Row]:
    """Trains one model and measures its codes: a row for the training images, one for the held-out ones."""
    seed_everything(seed, verbose=False)
    size = len(data.training)
    model, data = make(data)
    epochs = max(1, steps // (len(data.training) // BATCH))
    # Epochs, not steps: a model with two optimisers counts two steps a minibatch. The one validation is the last
    # epoch's: with it a GEN's statistics of the codes are those of the encoder as it is at the end.
    trainer = quiet_trainer(max_epochs=epochs, check_val_every_n_epoch=epochs)
    start = time.perf_counter()
    trainer.fit(model, datamodule=data)
    seconds = time.perf_counter() - start
    rows = []
    count = min(len(data.training), len(data.held_out), MOST_CODES)
    for part, image_set in (("training", data.training), ("held-out", data.held_out)):
        encoded = encode_set(model, image_set)
        rows.append(
            {
                "row": row,
                "train_size": size,
                "seed": seed,
                "codes": part,
                "count": count,
                "entropy": rounded(entropy(encoded.codes[:count])),
                "normal": rounded(normal_entropy(count, seed)),
                "error_per_pixel": rounded(encoded.reconstruction_error),
                "steps": epochs * (len(data.training) // BATCH),
                "seconds": round(seconds, 1),
            }
        )
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Tables


def spread(numbers: list[float]) -> str:
    """Mean ± standard deviation."""
    mean = f"{statistics.fmean(numbers):.3f}"
    return f"{mean} ± {statistics.stdev(numbers):.3f}" if len(numbers) > 1 else mean


def judged(ours: list[float], printed: tuple[float, float]) -> str:
    """How far our mean is from the printed one, and whether that is within 3 standard errors of the difference."""
    mean, deviation = printed
    difference = statistics.fmean(ours) - mean
    if len(ours) < 2:
        return f"{difference:+.3f}"
    error = math.hypot(statistics.stdev(ours) / math.sqrt(len(ours)), deviation / math.sqrt(PRINTED_MODELS))
    return f"{difference:+.3f} {'agrees' if abs(difference) <= 3 * error else 'DIFFERS'}"


def line(name: str, texts: Iterable[str]) -> str:
    return f"{name:28}" + "".join(f"{text or '-':>17}" for text in texts)


def entropies(rows: list[Row], names: list[str], sizes: Iterable[int]) -> str:
    """The table for the codes of training images, with the paper's below each row, and for those of held-out images;
    and the errors of the reconstruction."""
    sizes = list(sizes)

    def values(name: str, part: str, field: str) -> list[list[float]]:
        return [[r[field] for r in matching(rows, row=name, train_size=size, codes=part)] for size in sizes]

    lines = []
    for part in ("training", "held-out"):
        lines.append(line(f"codes of {part} images", map(str, sizes)))
        for name in (NORMAL, *names):
            ours = values(names[0], part, "normal") if name == NORMAL else values(name, part, "entropy")
            lines.append(line(f"  {name}", (spread(cell) if cell else "" for cell in ours)))
            printed = [PRINTED.get(name, {}).get(size) for size in sizes]
            if part == "training" and any(printed):
                both = list(zip(ours, printed, strict=True))
                lines.append(
                    line("    printed", (f"{cell[0]:.3f} ± {cell[1]:.3f}" if cell else "" for cell in printed))
                )
                lines.append(line("    ours less printed", (judged(*cells) if all(cells) else "" for cells in both)))
        lines.append("")
    lines.append(
        "squared error per pixel, training / held-out; the paper says about 0.02 of GEN, AAE and VAE at every size"
    )
    for name in names:
        errors = zip(*(values(name, part, "error_per_pixel") for part in ("training", "held-out")), strict=True)
        lines.append(
            line(f"  {name}", (" / ".join(f"{statistics.fmean(e):.4f}" for e in pair if e) for pair in errors))
        )
    return "\n".join(lines)


def differences(rows: list[Row], names: Iterable[str], sizes: Iterable[int]) -> str:
    """Entropy less that of as many normal samples, training / held-out, and the held-out images' error per pixel."""
    lines = [f"{'':30}" + "".join(f"{f'{size} images':>26}" for size in sizes)]
    for name in names:
        line = f"{name:30}"
        for size in sizes:
            found = {}
            for part in ("training", "held-out"):
                if chosen := matching(rows, row=name, train_size=size, codes=part):
                    gap = statistics.fmean(r["entropy"] - r["normal"] for r in chosen)
                    found[part] = gap, statistics.fmean(r["error_per_pixel"] for r in chosen)
            if found:
                (train, _), (held, error) = found["training"], found["held-out"]
                line += f"{f'{train:+.2f} / {held:+.2f}   {error:.4f}':>26}"
            else:
                line += f"{'-':>26}"
        lines.append(line)
    return "\n".join(lines)


def verdict(rows: list[Row], names: list[str], sizes: Iterable[int]) -> str:
    """How far GEN's training codes are from the normal row, and whether they are above the other models', a line per
    column."""
    lines = []
    for size in sizes:
        means = {}
        for name in names:
            if chosen := matching(rows, row=name, train_size=size, codes="training"):
                means[name] = statistics.fmean(r["entropy"] for r in chosen)
                normal = statistics.fmean(r["normal"] for r in chosen)
        if RECIPE in means:
            gap = means[RECIPE] - normal
            near = "within" if abs(gap) <= 0.1 else "NOT within"
            others = {name: mean for name, mean in means.items() if name != RECIPE}
            above = "no other model trained"
            if others:
                best = max(others, key=others.__getitem__)
                above = f"{'above' if means[RECIPE] > others[best] else 'NOT above'} {best}, the best of the others"
            lines.append(f"{size} images: GEN {gap:+.3f} from the normal row, {near} 0.1; {above}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------------------------------
# Command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Table 2 of the GENs paper (arXiv 2010.15283): entropy of the latent codes of MNIST."
    )
    parser.add_argument("--quick", action="store_true", help="scikit-learn's digits, few steps: no result to believe")
    parser.add_argument("--ablation", action="store_true", help="GEN with one ingredient changed at a time instead")
    parser.add_argument("--data", default=os.environ.get("KDEJSD_DATA"), help="folder of MNIST's idx files")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these: models or ingredients, by their names")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="numbers of training images")
    parser.add_argument("--trials", type=int, help="models per cell, seeds 0, 1, ... (default 5, --ablation 1)")
    parser.add_argument("--threads", type=int, help="as torch.set_num_threads")
    parser.add_argument(
        "--precision", default="highest", help="as torch.set_float32_matmul_precision (default highest)"
    )
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where results go, and from where a run goes on")
    options = parser.parse_args(arguments)
    makers = ABLATION if options.ablation else {name: by_name(name) for name in MODELS}
    if unknown := set(options.rows or ()) - set(makers):
        parser.error(f"--rows must be of {', '.join(makers)}, got {', '.join(sorted(unknown))}")
    trials = options.trials or (1 if options.quick or options.ablation else 5)
    sizes = options.sizes or (QUICK_SIZES if options.quick else ABLATION_SIZES if options.ablation else SIZES)
    if options.threads:
        torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision(options.precision)

    names = options.rows or list(makers)
    record = Record(options.csv, KINDS)
    set_name = "Digits" if options.quick else "MNIST"
    done = {(r["seed"], r["train_size"], r["row"]) for r in record.find(data=set_name)}
    todo = [key for key in itertools.product(range(trials), sizes, names) if key not in done]
    if todo and options.data is None and not options.quick:
        parser.error("--data DIR is needed: the folder of MNIST's idx files (or KDEJSD_DATA)")
    start = time.perf_counter()
    for number, (seed, size, name) in enumerate(todo, 1):
        data: ExampleData
        if options.quick:
            data, steps = Digits(batch_size=BATCH, train_size=size, seed=seed), QUICK_STEPS
        else:
            data = MNIST(options.data, batch_size=BATCH, train_size=size, seed=seed)
            steps = STEPS.get(size, max(STEPS.values()))
        found = train_and_measure(name, makers[name], data, seed, steps)
        record.add(*({"data": set_name} | row for row in found))
        parts = "; ".join(f"{r['codes']} {r['entropy']:.3f} ({r['error_per_pixel']:.4f})" for r in found)
        print(
            f"[{number:2}/{len(todo)}] {name}, {size} images, seed {seed}: {parts}; normal {found[0]['normal']:.3f}"
            f"   ({time.perf_counter() - start:.0f} s)",
            flush=True,
        )

    rows = [row for row in record.find(data=set_name) if row["seed"] < trials]
    print(f"\n{trials} model{'s' if trials > 1 else ''} a cell; whitened codes, l = {LATENT_DIM}; nats", end="")
    if options.ablation:
        print(": entropy less that of as many normal samples,\ntraining / held-out codes; squared error per pixel\n")
        print(differences(rows, names, sizes))
    else:
        print(", mean ± standard deviation")
        print(f"agrees: within 3 standard errors of the difference, {trials} models here and {PRINTED_MODELS} there\n")
        print(entropies(rows, names, sizes))
        print("\n" + verdict(rows, names, sizes))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
