"""The match without its price: how near can codes come to the normal at the error of a plain autoencoder?

    python bench/papers/gen_price.py --data DIR --csv FILE --figure FILE    # MNIST, l = 8, 10 000 images, 4000 steps
    ... --steps 4000 16000 64000 --rows "AE" "GEN, weight 1"                # longer runs, of some rows
    ... --latent-dims 32 64 --images 20000                                  # more dimensions
    python bench/papers/gen_price.py --quick                                # under a minute: scikit-learn's digits

All rows have the same images, minibatches of 100, number of steps, and learning rates that fall to 0; flows of a
trained AE have as many steps again. All but the wider ones have the same networks. The images depend on the seed. With
--csv a run goes on where one that wrote the same file was stopped. A row has, for the training images, for as many of
the same file that are not trained on ("unseen", if there are so many), and for as many held-out ones (at most 10 000):

    error          mean squared error per pixel of the images decoded from these codes, in per cent of the AE's too
    gap            leave-one-out KDE entropy of the whitened codes less that of as many samples of the normal, in nats
    told apart     held-out accuracy of a classifier that tells the codes from such samples: 50 % is the best

What is tried:

    AE                      no latent term: its error is the bar
    GEN, weight w           a GEN whose lagged codes are those of all training images, with its latent term times w
    GEN, rising weight      the weight rises from 0 towards 1 over the run, linearly
    GEN, faster encoder     the encoder, which alone the latent term trains, has 3 times the decoder's learning rate
    AE, wider; GEN, wider   hidden layers of 1024 and 512 units in place of 512 and 256; weight 1
    AE, then a flow by KDE  an invertible map (RealNVP) of the trained AE's codes, trained for as many steps by the
                            latent term of a GEN alone: it costs no pixels
    AE, then a flow         the same map, trained by its likelihood
    VAE, flow, s^2 = v      encoder with noise, decoder and map trained together: the VAE with a flow as its prior, by
                            its observation variance. Its codes are samples, one of each image's posterior. The flow
                            has ten layers of 128 units, the small one six of 64.
    ..., another flow       its flow is replaced by one that learns, in as many steps, the codes of as many other
                            images, none of them trained on or measured: is it the encoder that knows its images by
                            heart, or the flow?
    StochasticGEN, weight w a GEN with noise, in many dimensions

Paper: S. Saha, S. Elhabian, R. T. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283. Section 5.2 reports
a GEN with an entropy of 11.46 at an error of about 0.02, "close to" that of an autoencoder without a latent term.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from gen_latent_dims import told_apart
from gen_table2 import entropy
from matplotlib.figure import Figure
from quiet import quiet_trainer
from record import Record, Row, matching, rounded
from torch import Tensor, nn

from kdejsd import LaggedKDE
from kdejsd.data import MNIST, Digits, ExampleData, ExampleSet, FashionMNIST
from kdejsd.models import AE, FC, GEN, RealNVP, built
from kdejsd.models.autoencoder import reconstruction_error
from kdejsd.models.schedule import HalfCosine
from kdejsd.runs.measuring import encode_set

LATENT_DIM, QUICK_DIM = 8, 4
IMAGES, STEPS = 10_000, 4000
QUICK_IMAGES, QUICK_STEPS = 1000, 60
BATCH = 100
MOST_CODES = 10_000
LAYERS, HIDDEN = 10, 128  # of the flows
WIDER = (1024, 512)
SETS = {"MNIST": MNIST, "FashionMNIST": FashionMNIST}
PARTS = ("training", "unseen", "held-out")
KINDS = {"data": str, "images": int, "latent_dim": int, "steps": int, "row": str, "seed": int}
KINDS |= {"codes": str, "error": float, "gap": float, "told_apart": float, "seconds": int}


class Encoded(NamedTuple):
    """Codes [n, l] of a set of images, and the mean squared error per pixel of what is decoded from them."""

    codes: Tensor
    error: float


# A recipe trains on a data set, with l dimensions and so many steps, and returns the trained model's `encoded`.
Recipe = Callable[[ExampleData, int, int], Callable[[ExampleSet], Encoded]]


# ----------------------------------------------------------------------------------------------------------------------
# Images


def measured_on(data: ExampleData) -> int:
    """How many images are measured: as many for each of `PARTS`."""
    return min(len(data.training), len(data.held_out), MOST_CODES)


@lru_cache(maxsize=1)
def whole_file(data: ExampleData) -> ExampleSet:
    """All images of the training file, which is read once for all rows of a seed."""
    return data.load()[0]


def not_trained_on(data: ExampleData, count: int, skipped: int = 0) -> ExampleSet:
    """At most `count` images of the training file that are not trained on, less the first ones of these."""
    whole, start = whole_file(data), len(data.training) + skipped
    return whole.subset(data._shuffled(len(whole))[start : start + count])


def not_looked_at(data: ExampleData) -> ExampleSet:
    """As many images as are trained on, or as there are, that are neither trained nor measured on."""
    return not_trained_on(data, len(data.training), skipped=measured_on(data))


# ----------------------------------------------------------------------------------------------------------------------
# Recipes


def fitted(model: Any, data: ExampleData, steps: int) -> Any:
    epochs = max(1, steps // (len(data.training) // BATCH))
    quiet_trainer(max_epochs=epochs, check_val_every_n_epoch=epochs).fit(model, datamodule=data)
    return model


@torch.no_grad()
def encoded(model: Any, images: ExampleSet) -> Encoded:
    """Samples of the posterior where the model has one, and the error of their reconstructions."""
    found = encode_set(model, images)
    if found.posterior is None:
        return Encoded(found.codes, found.reconstruction_error)
    return Encoded(found.posterior, decoding_error(model, found.posterior, images))


@torch.no_grad()
def decoding_error(model: Any, codes: Tensor, images: ExampleSet) -> float:
    """Mean squared error per pixel of the images decoded from codes [n, l]."""
    error = 0.0
    for part in torch.arange(len(images)).split(1000):
        error += float(reconstruction_error(model.decode(codes[part]), images[part][0])) * len(part)
    return error / len(images)


def trained(kind: Any, **settings: Any) -> Recipe:
    """Trains a model of a class that builds its networks, with these settings and else its own."""

    def recipe(data: ExampleData, dim: int, steps: int) -> Callable[[ExampleSet], Encoded]:
        own = {"num_lagged": min(len(data.training), MOST_CODES)} if issubclass(kind, GEN) else {}
        return partial(encoded, fitted(kind(data.example_shape, dim, **own | settings), data, steps))

    return recipe


def with_flow(observation_variance: float, layers: int = LAYERS, hidden: int = HIDDEN) -> Recipe:
    flow = {"flow_layers": layers, "flow_hidden": hidden}
    return trained(built.VAE, prior="flow", observation_variance=observation_variance, **flow)


def with_another_flow(observation_variance: float) -> Recipe:
    """Trains a VAE with a flow, then another flow, on the posteriors of images not trained on or measured."""

    def recipe(data: ExampleData, dim: int, steps: int) -> Callable[[ExampleSet], Encoded]:
        others = not_looked_at(data)
        if len(others) < len(data.training):
            raise ValueError(f"another flow needs {len(data.training)} more images, got {len(others)}")
        model = built.VAE(data.example_shape, dim, prior="flow", observation_variance=observation_variance)
        fitted(model, data, steps)
        with torch.no_grad():
            mean, log_variance = model.posterior(others[torch.arange(len(others))][0])
        deviation = (log_variance / 2).exp()
        flow = model.flow = RealNVP(dim, LAYERS, HIDDEN)

        def latent(step: int, chosen: Tensor) -> Tensor:
            return -flow.log_prob(torch.normal(mean[chosen], deviation[chosen])).mean()

        train(flow, len(mean), steps, latent)
        return partial(encoded, model)

    return recipe


class RisingGEN(built.GEN):
    """A GEN whose weight rises from 0 to what it was given, linearly over the run."""

    def on_fit_start(self) -> None:
        super().on_fit_start()
        self.last_weight = self.weight

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.weight = self.last_weight * self.global_step / self.trainer.estimated_stepping_batches


class FastEncoderGEN(built.GEN):
    """A GEN whose encoder has 3 times the learning rate of its decoder."""

    def configure_optimizers(self) -> Any:
        encoder = {"params": self.encoder.parameters(), "lr": 3 * self.learning_rate}
        return self.adam([encoder, {"params": self.decoder.parameters()}])


def wider(shape: Any, dim: int) -> FC:
    return FC(shape, dim, hidden=WIDER)


class Flow(nn.Module):
    """Maps codes [n, l]: scales each dimension to mean 0 and variance 1, then applies a flow, at first the identity."""

    def __init__(self, codes: Tensor) -> None:
        super().__init__()
        self.mean, self.deviation = codes.mean(0), codes.std(0)
        self.flow = RealNVP(codes.shape[1], LAYERS, HIDDEN)

    def scaled(self, codes: Tensor) -> Tensor:
        return (codes - self.mean) / self.deviation

    def forward(self, codes: Tensor) -> Tensor:
        z: Tensor = self.flow(self.scaled(codes))[0]
        return z

    def inverse(self, z: Tensor) -> Tensor:
        return self.flow.inverse(z) * self.deviation + self.mean


def then_a_flow(by_kde: bool) -> Recipe:
    """Trains an AE, then for as many steps a flow that maps its codes."""

    def recipe(data: ExampleData, dim: int, steps: int) -> Callable[[ExampleSet], Encoded]:
        model: AE = fitted(built.AE(data.example_shape, dim), data, steps)
        trained_on = encode_set(model, data.training).codes
        flow = Flow(trained_on)
        (train_by_kde if by_kde else train_by_likelihood)(flow, trained_on, steps)

        @torch.no_grad()
        def mapped(images: ExampleSet) -> Encoded:
            z = flow(encode_set(model, images).codes)
            return Encoded(z, decoding_error(model, flow.inverse(z), images))

        return mapped

    return recipe


def train_by_likelihood(flow: Flow, codes: Tensor, steps: int) -> None:
    z = flow.scaled(codes)
    train(flow, len(z), steps, lambda step, chosen: -flow.flow.log_prob(z[chosen]).mean())


def train_by_kde(flow: Flow, codes: Tensor, steps: int) -> None:
    """The latent term of a GEN with its defaults, whose lagged codes are encoded anew in every tenth step.

    No code normalisation follows the flow, which would leave its scale free.
    """
    index = torch.randperm(len(codes))[:MOST_CODES].sort().values
    lagged = LaggedKDE(len(index), codes.shape[1])

    def latent(step: int, chosen: Tensor) -> Tensor:
        if step % 10 == 0:
            with torch.no_grad():
                lagged.refresh(flow(codes[index]), index)
        z = flow(codes[chosen])
        return lagged.loss(z, chosen, noise=torch.randn_like(z))

    train(flow, len(codes), steps, latent, betas=(0.5, 0.999))


def train(
    flow: Flow,
    count: int,
    steps: int,
    loss: Callable[[int, Tensor], Tensor],
    betas: tuple[float, float] = (0.9, 0.999),
) -> None:
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-3, betas=betas)
    schedule = HalfCosine(optimizer, lambda: steps)
    for step in range(steps):
        optimizer.zero_grad()
        loss(step, torch.randperm(count)[:BATCH]).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()


RECIPES: dict[str, Recipe] = {
    "AE": trained(built.AE),
    "GEN, weight 1": trained(built.GEN),
    "GEN, weight 0.1": trained(built.GEN, weight=0.1),
    "GEN, weight 0.01": trained(built.GEN, weight=0.01),
    "GEN, weight 0.001": trained(built.GEN, weight=0.001),
    "GEN, rising weight": trained(RisingGEN),
    "GEN, faster encoder": trained(FastEncoderGEN),
    "AE, wider": trained(built.AE, network=wider),
    "GEN, wider": trained(built.GEN, network=wider),
    "AE, then a flow by KDE": then_a_flow(by_kde=True),
    "AE, then a flow": then_a_flow(by_kde=False),
    "VAE, flow, s^2 = 0.5": with_flow(0.5),
    "VAE, flow, s^2 = 0.25": with_flow(0.25),
    "VAE, flow, s^2 = 0.1": with_flow(0.1),
    "VAE, flow, s^2 = 0.05": with_flow(0.05),
    "VAE, flow, s^2 = 0.03": with_flow(0.03),
    "VAE, another flow, s^2 = 0.1": with_another_flow(0.1),
    "VAE, small flow, s^2 = 0.1": with_flow(0.1, layers=6, hidden=64),
    "StochasticGEN, weight 1": trained(built.StochasticGEN),
    "StochasticGEN, weight 0.1": trained(built.StochasticGEN, weight=0.1),
}
IN_MANY_DIMENSIONS = ("AE", "AE, then a flow", "VAE, flow, s^2 = 0.1", "VAE, flow, s^2 = 0.03")
IN_MANY_DIMENSIONS += ("StochasticGEN, weight 1", "StochasticGEN, weight 0.1")


# ----------------------------------------------------------------------------------------------------------------------
# Measures


def measured(row: str, data: ExampleData, dim: int, steps: int, seed: int) -> list[Row]:
    """Trains by a recipe: the columns from "codes" on, for each of `PARTS` that has enough images."""
    began = time.perf_counter()
    pl.seed_everything(seed, verbose=False)
    encode = RECIPES[row](data, dim, steps)
    seconds = round(time.perf_counter() - began)
    count = measured_on(data)
    sets = dict(zip(PARTS, (data.training, not_trained_on(data, count), data.held_out), strict=True))
    rng = torch.Generator().manual_seed(seed)
    samples = torch.randn(count, dim, generator=rng)
    normal = entropy(samples)
    rows = []
    for part, images in sets.items():
        if len(images) < count:
            continue
        codes, error = encode(images)
        # In any order but that of the files: MNIST's first test images are of other writers than its last.
        codes = codes[torch.randperm(len(codes), generator=rng)[:count]]
        numbers = {"error": error, "gap": entropy(codes) - normal, "told_apart": told_apart(codes, samples)}
        rows.append({"codes": part} | {k: rounded(v) for k, v in numbers.items()} | {"seconds": seconds})
    return rows


# ----------------------------------------------------------------------------------------------------------------------
# Table and figure


def mean(rows: list[Row], name: str) -> float:
    return statistics.fmean(row[name] for row in rows)


def shares(rows: list[Row], bars: dict[tuple[int, str], float]) -> str:
    """Errors in per cent of those of the AEs, by the seeds and the codes that both have."""
    cells = []
    for part in PARTS:
        own = matching(rows, codes=part)
        known = [(row["error"], bars[key]) for row in own if (key := (row["seed"], part)) in bars]
        cells.append(f"{sum(e for e, _ in known) / sum(bar for _, bar in known):.0%}" if known else "-")
    return " / ".join(cells)


def means(rows: list[Row], name: str, form: str) -> str:
    """Of a column, for each of `PARTS`."""
    parts = [matching(rows, codes=part) for part in PARTS]
    return " / ".join(f"{mean(part, name):{form}}" if part else "-" for part in parts)


def counts(rows: list[Row]) -> str:
    """The number of models, of each of `PARTS` where it differs."""
    found = [len(matching(rows, codes=part)) for part in PARTS]
    return str(found[0]) if set(found) <= {0, found[0]} else "/".join(map(str, found))


def table(rows: list[Row]) -> str:
    """A block for each data set, l and number of steps; means over the seeds."""
    lines = []
    settings = ("data", "images", "latent_dim", "steps")
    for data, images, dim, steps in dict.fromkeys(tuple(row[k] for k in settings) for row in rows):
        block = matching(rows, data=data, images=images, latent_dim=dim, steps=steps)
        lines += [f"\n{data}, {images} images, l = {dim}, {steps} steps; codes of {' / '.join(PARTS)} images"]
        lines += [f"{'':30}{'models':>6}{'error per pixel':>25}{'of the AE':>22}{'gap':>24}{'told apart':>25}{'s':>7}"]
        bars = {(row["seed"], row["codes"]): row["error"] for row in matching(block, row="AE")}
        for name in (name for name in RECIPES if matching(block, row=name)):
            found = matching(block, row=name)
            first = matching(found, codes=PARTS[0])
            lines += [
                f"{name:30}{counts(found):>6}{means(found, 'error', '.4f'):>25}{shares(found, bars):>22}"
                f"{means(found, 'gap', '+.2f'):>24}{means(found, 'told_apart', '.1%'):>25}"
                f"{mean(first, 'seconds'):>7.0f}"
            ]
    return "\n".join(lines)


def draw(rows: list[Row]) -> Figure:
    """The gap of training and of held-out codes of one set and l against the error, for every number of steps."""
    lengths = sorted({row["steps"] for row in rows})
    parts = (PARTS[0], PARTS[-1])
    figure = Figure(figsize=(4.5 * len(parts), 3.2 * len(lengths)), layout="constrained")
    panels = figure.subplots(len(lengths), len(parts), squeeze=False, sharex=True, sharey=True)
    families = {
        "GEN, weight": "C0o-",
        "VAE, flow": "C1s-",
        "AE, then": "C2^",
        "GEN, rising": "C3D",
        "GEN, wider": "C4v",
        "GEN, faster encoder": "C5P",
    }
    for line, steps in zip(panels, lengths, strict=True):
        for axes, part in zip(line, parts, strict=True):
            found = matching(rows, steps=steps, codes=part)
            for family, style in families.items():
                names = [name for name in RECIPES if name.startswith(family) and matching(found, row=name)]
                points = [[mean(matching(found, row=name), k) for name in names] for k in ("error", "gap")]
                if names:
                    axes.plot(*points, style, markersize=4, label=family)
                for name, x, y in zip(names, *points, strict=True):
                    below = family == "VAE, flow"  # where they would be on each other
                    text = name.removeprefix(family).lstrip(", ").removeprefix("s^2 = ")
                    place = {"xytext": (3, -8 if below else 3), "textcoords": "offset points"}
                    axes.annotate(text, (x, y), fontsize=6, **place)
            if bar := matching(found, row="AE"):
                axes.axvline(mean(bar, "error"), color="grey", linestyle=":", label="error of the AE")
            axes.axhline(0, color="grey", linewidth=0.8)
            axes.set_title(f"codes of {part} images, {steps} steps", fontsize=9)
            axes.set_xlabel("mean squared error per pixel", fontsize=8)
            axes.set_ylabel("entropy less the normal's, nats", fontsize=8)
            axes.tick_params(labelsize=7)
    panels[0, 0].legend(fontsize=7)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Match of codes to the normal against the error that it costs.")
    parser.add_argument("--quick", action="store_true", help="digits, four dimensions, few steps: nothing to believe")
    parser.add_argument("--data", default=os.environ.get("KDEJSD_DATA"), help="folder of the idx files")
    parser.add_argument("--set", choices=list(SETS), default="MNIST", help="default MNIST")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"images trained on (default {IMAGES})")
    parser.add_argument("--latent-dims", type=int, nargs="+", metavar="L", help=f"default {LATENT_DIM}")
    parser.add_argument("--steps", type=int, nargs="+", metavar="N", help=f"default {STEPS}")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only these; default all that suit the dimension")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], metavar="N", help="one model each (default 0)")
    parser.add_argument("--threads", type=int, default=1, help="as torch.set_num_threads (default 1)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where results go, and from where a run goes on")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="a picture of the gap against the error")
    options = parser.parse_args(arguments)
    if unknown := set(options.rows or ()) - set(RECIPES):
        parser.error(f"--rows must be of {'; '.join(RECIPES)}, got {'; '.join(sorted(unknown))}")
    if options.data is None and not options.quick:
        parser.error("--data DIR is needed: the folder of the idx files (or KDEJSD_DATA)")
    epoch = (QUICK_IMAGES if options.quick else options.images) // BATCH
    if wrong := [steps for steps in options.steps or () if steps < 1 or steps % epoch]:
        parser.error(f"--steps must be multiples of an epoch's {epoch}, got {wrong[0]}")
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("medium")
    dims = options.latent_dims or [QUICK_DIM if options.quick else LATENT_DIM]

    record = Record(options.csv, KINDS)
    start = time.perf_counter()
    data: ExampleData
    for seed in options.seeds:
        if options.quick:
            data = Digits(batch_size=BATCH, train_size=QUICK_IMAGES, seed=seed)
        else:
            data = SETS[options.set](options.data, batch_size=BATCH, train_size=options.images, seed=seed)
        for dim in dims:
            few = [name for name in RECIPES if not name.startswith("Stochastic")]
            if len(not_looked_at(data)) < len(data.training):
                few = [name for name in few if "another" not in name]
            for steps in options.steps or [QUICK_STEPS if options.quick else STEPS]:
                for name in options.rows or (few if dim <= LATENT_DIM else IN_MANY_DIMENSIONS):
                    key = {"data": type(data).__name__, "images": len(data.training), "latent_dim": dim}
                    key |= {"steps": steps, "row": name, "seed": seed}
                    if not record.find(**key):
                        record.add(*(key | row for row in measured(name, data, dim, steps, seed)))
                        print(f"{tuple(key.values())}: {time.perf_counter() - start:.0f} s", flush=True)
    print(table(record.rows))
    if options.figure:
        drawn = {"data": type(data).__name__, "images": len(data.training), "latent_dim": dims[0]}
        lengths = options.steps or [QUICK_STEPS if options.quick else STEPS]
        draw([row for row in record.find(**drawn) if row["steps"] in lengths]).savefig(options.figure, dpi=150)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
