"""How lagged codes are kept up to date: what each way costs in match, and how far its codes lag behind the encoder.

    python bench/papers/gen_refresh.py --data DIR --csv FILE --figure FILE   # MNIST, l = 8: 75 minutes on one core
    ... --set FashionMNIST --latent-dims 8 32
    python bench/papers/gen_refresh.py --quick                               # scikit-learn's digits, a minute

All rows train the same networks on 10 000 images, all of whose codes are lagged, for 4000 steps with minibatches of 100
(or on as many as --images says). Images, weights and minibatches depend on the seed. Up to 8 dimensions the settings
are GEN's defaults, beyond them those that its documentation names: no kernel noise, and twice the optimal bandwidth.
With --csv a run goes on where one that wrote the same files was stopped. The rows:

    fresh       all codes are encoded anew in every step, ten times as often as by default: what the others approach
    full        all codes in every tenth step, the paper's way and the default, at the weight 1 that all have and at 1/3
    rolling     a tenth of the codes in every step
    queue       the codes of the minibatches themselves
    momentum    the same, but of an encoder whose weights are an exponential average (0.99) of the trained one's
    tracked     a queue whose codes are moved along with the encoder by an affine map (`LaggedKDE.follow`), at both
                weights
    ..., a tenth
                lags the codes of a tenth of the images, at the bandwidth of all: a tenth of the work, and a queue whose
                codes are ten times as young

The columns, for the training images and for the held-out ones: mean squared error per pixel; leave-one-out KDE entropy
of the whitened codes less that of as many samples of the normal, in nats; Jensen-Shannon divergence of the codes from
the normal, in nats, beside that of its own samples. The file FILE_lag.csv and the figure have the lag: the root mean
square distance, per dimension, of the lagged codes from those that the encoder gives the same images now. Both are
normalised. The lag of "full" is taken half-way between two refreshes.
"""

from __future__ import annotations

import argparse
import copy
import os
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from gen_price import SETS, mean
from gen_table2 import entropy
from matplotlib.figure import Figure
from quiet import quiet_trainer
from record import Record, Row, matching, rounded
from torch import Tensor
from torch.nn.functional import batch_norm

from kdejsd import optimal_bandwidth
from kdejsd._modes import evaluating
from kdejsd.data import Digits, ExampleData
from kdejsd.divergence import target_jsd
from kdejsd.models import built
from kdejsd.runs.measuring import encode_set

IMAGES, STEPS, BATCH = 10_000, 4000, 100
QUICK_IMAGES, QUICK_STEPS = 1000, 60
PARTS = ("training", "held-out")
FEW_DIMS = 8  # up to here with the kernel's noise
PERIOD = 10  # k_b
AVERAGED = 0.99
KEY = {"data": str, "images": int, "latent_dim": int, "steps": int, "row": str, "seed": int}
KINDS = KEY | {"codes": str, "error": float, "gap": float, "jsd": float, "own_jsd": float, "seconds": int}
LAG_KINDS = KEY | {"step": int, "lag": float}


class MomentumGEN(built.GEN):
    """A queue of the codes that an exponential average of the encoder gives the minibatches."""

    def on_train_start(self) -> None:
        super().on_train_start()
        self.__dict__["slow"] = copy.deepcopy(self.encoder)  # no part of the model: neither trained nor saved

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        with torch.no_grad():  # not by the norm, whose running statistics are those of the encoder
            self._pushed = batch_norm(self.slow(batch[0]), None, None, training=True), batch[2]
        return loss

    @torch.no_grad()
    def on_train_batch_end(self, *args: Any) -> None:
        super().on_train_batch_end(*args)
        for slow, fast in zip(self.slow.parameters(), self.encoder.parameters(), strict=True):
            slow.lerp_(fast, 1 - AVERAGED)


ROWS: dict[str, tuple[type[built.GEN], dict[str, Any]]] = {
    "fresh": (built.GEN, {"refresh": "full", "refresh_every": 1}),
    "full": (built.GEN, {"refresh": "full"}),
    "full, weight 1/3": (built.GEN, {"refresh": "full", "weight": 1 / 3}),
    "rolling": (built.GEN, {"refresh": "rolling"}),
    "queue": (built.GEN, {"refresh": "queue"}),
    "momentum": (MomentumGEN, {"refresh": "queue"}),
    "tracked": (built.GEN, {"refresh": "tracked"}),
    "tracked, weight 1/3": (built.GEN, {"refresh": "tracked", "weight": 1 / 3}),
    "full, a tenth": (built.GEN, {"refresh": "full", "share": 0.1}),
    "queue, a tenth": (built.GEN, {"refresh": "queue", "share": 0.1}),
    "tracked, a tenth": (built.GEN, {"refresh": "tracked", "share": 0.1}),
}


WAYS = list(dict.fromkeys(name.partition(", ")[0] for name in ROWS))
STYLES = {"": "-", "weight 1/3": ":", "a tenth": "--"}


class Lag(pl.Callback):
    """Measures how far the lagged codes are from those of the encoder, at about 40 steps of a run."""

    def __init__(self, data: ExampleData, steps: int) -> None:
        self.data = data
        self.every = max(PERIOD, steps // 40 // PERIOD * PERIOD)
        self.found: list[tuple[int, float]] = []

    def on_train_batch_end(self, trainer: pl.Trainer, model: Any, *_: Any) -> None:
        if trainer.global_step % self.every != PERIOD // 2:
            return
        with torch.no_grad(), evaluating(model.encoder, model.norm):
            codes = torch.cat([model.encode(part) for part in self.data.training[model.lagged.indices][0].split(1000)])
        lag = _normalised(codes) - _normalised(model.lagged.codes)
        self.found.append((trainer.global_step, float(lag.square().mean().sqrt())))


def _normalised(codes: Tensor) -> Tensor:
    return (codes - codes.mean(0)) / codes.std(0)


def measured(row: str, data: ExampleData, dim: int, steps: int, seed: int) -> tuple[list[Row], list[Row]]:
    """Trains in one of the ways: the columns from "codes" on, and those of the lag from "step" on."""
    began = time.perf_counter()
    pl.seed_everything(seed, verbose=False)
    kind, settings = ROWS[row]
    count, few = len(data.training), dim <= FEW_DIMS
    common = {
        "num_lagged": round(settings.get("share", 1) * count),
        "refresh_every": PERIOD,
        "bandwidth": (1 if few else 2) * optimal_bandwidth(dim, count, smoothed=not few).value,
        "kernel_noise": few,
    }
    model = kind(data.example_shape, dim, **common | {k: v for k, v in settings.items() if k != "share"})
    epochs = max(1, steps // (count // BATCH))
    lag = Lag(data, steps)
    quiet_trainer(max_epochs=epochs, check_val_every_n_epoch=epochs, callbacks=[lag]).fit(model, datamodule=data)
    seconds = round(time.perf_counter() - began)
    rng = torch.Generator().manual_seed(seed)
    rows = []
    for part, images in zip(PARTS, (data.training, data.held_out), strict=True):
        found = encode_set(model, images)
        codes = found.codes[torch.randperm(len(found.codes), generator=rng)[:IMAGES]]
        samples = torch.randn(codes.shape, generator=rng)
        numbers = {"error": found.reconstruction_error, "gap": entropy(codes) - entropy(samples)}
        for name, points in (("jsd", codes), ("own_jsd", samples)):
            numbers[name] = float(target_jsd(points, model.target, torch.Generator().manual_seed(0)))
        rows.append({"codes": part} | {k: rounded(v) for k, v in numbers.items()} | {"seconds": seconds})
    return rows, [{"step": step, "lag": rounded(value)} for step, value in lag.found]


def spread(rows: list[Row], name: str, digits: int) -> str:
    values = [row[name] for row in rows]
    sign = "+" if name == "gap" else ""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{mean(rows, name):{sign}.{digits}f}{deviation}"


def table(rows: list[Row]) -> str:
    """A block for each data set and l: means over the seeds, with their standard deviations."""
    lines = []
    for data, images, dim, steps in dict.fromkeys(
        tuple(row[k] for k in ("data", "images", "latent_dim", "steps")) for row in rows
    ):
        block = matching(rows, data=data, images=images, latent_dim=dim, steps=steps)
        lines += [f"\n{data}, {images} images, l = {dim}, {steps} steps"]
        lines += [f"{'':21}{'codes':10}{'models':>7}{'error':>18}{'gap':>18}{'divergence':>18}{'own':>8}{'s':>7}"]
        for name in (name for name in ROWS if matching(block, row=name)):
            for part in PARTS:
                found = matching(block, row=name, codes=part)
                lines += [
                    f"{name:21}{part:10}{len(found):>7}{spread(found, 'error', 4):>18}{spread(found, 'gap', 3):>18}"
                    f"{spread(found, 'jsd', 4):>18}{mean(found, 'own_jsd'):>8.4f}"
                    f"{mean(found, 'seconds'):>7.0f}"
                ]
    return "\n".join(lines)


def draw(rows: list[Row]) -> Figure:
    """The lag along the run of the first seed, a panel for each data set, number of images and l."""
    panels = list(dict.fromkeys((row["data"], row["images"], row["latent_dim"]) for row in rows))
    figure = Figure(figsize=(4.5 * len(panels), 3.4), layout="constrained")
    for axes, (data, images, dim) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        found = matching(rows, data=data, images=images, latent_dim=dim)
        for name in (name for name in ROWS if matching(found, row=name)):
            own = matching(found, row=name, seed=found[0]["seed"])
            way, _, variant = name.partition(", ")
            style = f"C{WAYS.index(way)}{STYLES[variant]}"
            axes.plot([row["step"] for row in own], [row["lag"] for row in own], style, label=name, linewidth=1)
        axes.set(title=f"{data}, {images} images, l = {dim}", xlabel="step", ylabel="lag of the codes", ylim=(0, None))
    figure.axes[0].legend(fontsize=7)
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Ways to keep the lagged codes of a GEN up to date.")
    parser.add_argument("--quick", action="store_true", help="digits, four dimensions, few steps: nothing to believe")
    parser.add_argument("--data", default=os.environ.get("KDEJSD_DATA"), help="folder of the idx files")
    parser.add_argument("--set", choices=list(SETS), default="MNIST", help="default MNIST")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"images trained on (default {IMAGES})")
    parser.add_argument("--latent-dims", type=int, nargs="+", metavar="L", help=f"default {FEW_DIMS}")
    parser.add_argument("--steps", type=int, help=f"default {STEPS}")
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), help="only these; default all")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="one model each (default 0 1 2; quick: 0)")
    parser.add_argument("--threads", type=int, default=1, help="as torch.set_num_threads (default 1)")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where results go, and from where a run goes on")
    parser.add_argument("--figure", type=Path, metavar="FILE", help="a picture of the lag along the run")
    options = parser.parse_args(arguments)
    if options.data is None and not options.quick:
        parser.error("--data DIR is needed: the folder of the idx files (or KDEJSD_DATA)")
    torch.set_num_threads(options.threads)
    torch.set_float32_matmul_precision("medium")

    record = Record(options.csv, KINDS)
    lags = Record(options.csv and options.csv.with_name(f"{options.csv.stem}_lag.csv"), LAG_KINDS)
    steps = options.steps or (QUICK_STEPS if options.quick else STEPS)
    start = time.perf_counter()
    data: ExampleData
    for seed in options.seeds or ([0] if options.quick else [0, 1, 2]):
        if options.quick:
            data = Digits(batch_size=BATCH, train_size=QUICK_IMAGES, seed=seed)
        else:
            data = SETS[options.set](options.data, batch_size=BATCH, train_size=options.images, seed=seed)
        for dim in options.latent_dims or [4 if options.quick else FEW_DIMS]:
            for name in options.rows:
                key = {"data": type(data).__name__, "images": len(data.training), "latent_dim": dim}
                key |= {"steps": steps, "row": name, "seed": seed}
                if not record.find(**key):
                    rows, lag = measured(name, data, dim, steps, seed)
                    if not lags.find(**key):  # or a run was stopped between the two files
                        lags.add(*(key | row for row in lag))
                    record.add(*(key | row for row in rows))
                    print(f"{tuple(key.values())}: {time.perf_counter() - start:.0f} s", flush=True)
    print(table(record.rows))
    if options.figure:
        draw(lags.rows).savefig(options.figure, dpi=150)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
