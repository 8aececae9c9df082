"""Table 3 and Figure 2 of the GENs paper on one's own data: how near generated images come to real ones.

    python bench/papers/gen_table3.py --root DIR --out DIR     # MNIST and Fashion-MNIST, every model
    python bench/papers/gen_table3.py GEN --quick              # one model on scikit-learn's digits, under a minute

Every model is trained on the same images with the same networks, and as many images as are held out are generated from
its target. Reported is the Frechet distance between features of generated and of held-out images, as the mean over
seeds and its standard deviation; and, as the floor, that of as many training images. Beside it stand precision and
density (are generated images like real ones?), and recall and coverage (are all kinds of real images generated?), by
the package prdc, which `pip install prdc` brings. The weight of a model's latent term is its default times one of
`FACTORS`: from 1 on the next one is tried as long as the distance to a part of the training images, which the model
that is tried is not trained on, falls. Run again with the same --out, it goes on where it was stopped.

The features are those of Inception where torch-fidelity and its weights are installed, and only then is the distance
the FID. Otherwise they are the last hidden layer of a small classifier of the data's own labels, trained here and kept
in the output folder. Values of different features, and of different numbers of images, do not compare.

Paper: S. Saha, S. Elhabian, R. T. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283, section 5.3. It
prints FIDs of AAE, VAE and GEN: 56.08 ± 0.35, 55.21 ± 0.24 and 45.52 ± 0.33 on SVHN with l = 25, and 52.65 ± 0.06,
55.51 ± 0.25 and 43.65 ± 0.09 on CelebA with l = 40. These do not compare with distances on other data by other
features; only the order of the models does.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import math
import statistics
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from quiet import quiet_trainer
from record import Record, Row
from torch import Tensor, nn

from kdejsd import data, models, plots
from kdejsd.metrics import InceptionFeatures, frechet_distance
from kdejsd.models.image_classifier import classifier_for
from kdejsd.runs.measuring import encode_set

LATENT_DIM = 8
FACTORS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
QUICK_FACTORS = (0.1, 1.0)
TUNING_SEED = 100  # of none of the models of the table
WEIGHTS = {"VAE": "observation_variance"}  # what weighs a model's latent term, where it is not called `weight`
# Of each row the class and its settings beside what all of them share.
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "GEN": ("GEN", {"num_lagged": 10_000}),
    "StochasticGEN": ("StochasticGEN", {"num_lagged": 10_000}),
    "AAE": ("AAE", {}),
    "VAE": ("VAE", {}),
    "VAE-flow": ("VAE", {"prior": "flow"}),
    "WAE": ("WAE", {}),
}
QUICK: dict[str, dict[str, Any]] = {name: {"num_lagged": 500, "bandwidth": 0.4} for name in ("GEN", "StochasticGEN")}
NEAREST = 5  # neighbours of precision, recall, density and coverage
NEAR = ("precision", "recall", "density", "coverage")
KINDS = {"data": str, "run": str, "model": str, "part": str, "seed": int, "factor": float, "distance": float}
KINDS |= dict.fromkeys(NEAR, float) | {"reconstruction_error": float, "seconds": int, "measure": str}


def features_for(images: data.ExampleData, folder: Path, epochs: int) -> tuple[nn.Module, str]:
    """The feature network, and what the distance is called with it."""
    try:
        return InceptionFeatures(), "FID (Inception v3)"
    except RuntimeError:
        name = type(images).__name__
        classifier = classifier_for(images, folder / f"classifier_{name.lower()}.ckpt", epochs)
        return classifier.features, f"Frechet distance (features: {classifier})"


class Part(data.ExampleData):
    """Of a data set's training images a part to train on and the rest in place of the held-out ones."""

    def __init__(self, whole: data.ExampleData) -> None:
        super().__init__(whole.batch_size, seed=whole.seed)
        self.example_shape = whole.example_shape
        self.whole = whole

    def load(self) -> tuple[data.ExampleSet, data.ExampleSet]:
        return self._split(self.whole.training, held_out=0.2)


def weighted(kind: str, factor: float, settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the default weight of the latent term times the factor."""
    weight = WEIGHTS.get(kind, "weight")
    # A class may hand the argument on to the one that it is derived from.
    signatures = (inspect.signature(part).parameters for part in getattr(models, kind).__mro__)
    default = next(parameters[weight].default for parameters in signatures if weight in parameters)
    return settings | {weight: factor * default}


@torch.no_grad()
def nearness(real: Tensor, generated: Tensor, features: nn.Module) -> dict[str, float]:
    """Precision and recall (Kynkaanniemi et al., arXiv 1904.06991), density and coverage (Naeem et al., arXiv
    2002.09797) by the balls around each image's features that reach to its nearest neighbours."""
    import prdc  # not above: studies that take other parts of this file do without it

    both = [torch.cat([features(part) for part in images.split(1000)]).numpy() for images in (real, generated)]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the numbers of images
        found = prdc.compute_prdc(*both, nearest_k=NEAREST)
    return {name: round(float(value), 4) for name, value in found.items()}


def train(kind: str, images: data.ExampleData, network: Any, latent_dim: int, settings: dict, epochs: int, seed: int):
    pl.seed_everything(seed, verbose=False)
    model = getattr(models.built, kind)(images.example_shape, latent_dim, network, **settings)
    trainer = quiet_trainer(max_epochs=epochs)
    trainer.fit(model, datamodule=images)
    return model.to("cpu")


def as_tensor(images: data.ExampleSet, count: int) -> Tensor:
    """So many images, drawn by a fixed seed."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]][0]


class Study:
    """Finds the rows of one data set in the record, or measures them."""

    def __init__(self, record: Record, set_name: str, images: data.ExampleData, options: argparse.Namespace) -> None:
        self.record = record
        self.set_name = set_name
        self.parts = {"test": images, "tuning": Part(images)}
        self.options = options
        self.run = (
            f"{options.network}, l = {options.latent_dim}, {options.epochs} epochs of {len(images.training)} images"
            f"{', quick' if options.quick else ''}"
        )
        self.features, self.measure = features_for(images, options.out, epochs=5)
        self.key = {"data": set_name, "run": self.run}

    def floor(self) -> Row:
        """The row of as many training images in place of generated ones."""
        key = self.key | {"model": "training images", "part": "test"}
        if not self.record.find(**key):
            held_out = self.held_out("test")
            training = as_tensor(self.parts["test"].training, len(held_out))
            distance = round(frechet_distance(held_out, training, self.features), 4)
            near = nearness(held_out, training, self.features)
            self.record.add(key | near | {"distance": distance, "measure": self.measure})
        return self.record.find(**key)[0]

    def held_out(self, part: str) -> Tensor:
        return as_tensor(self.parts[part].held_out, 10_000)

    def measured(self, name: str, part: str, seed: int, factor: float) -> Row:
        """The row of one model, trained here unless an earlier run did."""
        key = self.key | {"model": name, "part": part, "seed": seed, "factor": factor}
        if not self.record.find(**key):
            began = time.perf_counter()
            kind, settings = ROWS[name]
            settings = weighted(kind, factor, settings | (QUICK.get(name, {}) if self.options.quick else {}))
            network, images = getattr(models, self.options.network), self.parts[part]
            model = train(kind, images, network, self.options.latent_dim, settings, self.options.epochs, seed)
            real = self.held_out(part)
            generated = model.sample(len(real), torch.Generator().manual_seed(seed)).clamp(0, 1)
            row = key | {"distance": round(frechet_distance(real, generated, self.features), 4)}
            row["reconstruction_error"] = round(encode_set(model, images.held_out).reconstruction_error, 6)
            row |= nearness(real, generated, self.features) if part == "test" else {}
            self.record.add(row | {"seconds": round(time.perf_counter() - began), "measure": self.measure})
            if (part, seed) == ("test", 0):
                picture = self.options.out / f"{self.set_name.lower()}_{name.lower()}.png"
                plots.grid(generated[:100]).savefig(picture)
        return self.record.find(**key)[0]

    def tuned(self, name: str) -> dict[float, float]:
        """The distances of the factors tried."""
        factors = QUICK_FACTORS if self.options.quick else FACTORS
        start = factors.index(1.0)
        tried = {}
        for way in (factors[start::-1], factors[start:]):
            least = math.inf
            for factor in way:
                tried[factor] = self.measured(name, "tuning", TUNING_SEED, factor)["distance"]
                if not tried[factor] < least:
                    break
                least = tried[factor]
            if least < tried[1.0]:
                break
        return tried


def line(name: str, rows: list[Row]) -> str:
    """Means over the rows, and the standard deviation of the distance."""
    distances = [row["distance"] for row in rows]
    spread = f" ± {statistics.stdev(distances):.3f}" if len(rows) > 1 else ""
    text = f"{name:16}{f'{statistics.mean(distances):.3f}{spread}':>18}"
    for column in (*NEAR, "reconstruction_error"):
        numbers = [row[column] for row in rows if row[column] is not None]
        text += f"{statistics.mean(numbers):>11.4f}" if numbers else f"{'-':>11}"
    return text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Frechet distances of generated images (GENs paper, Table 3).")
    parser.add_argument("models", nargs="*", default=list(ROWS), help=f"default: {' '.join(ROWS)}")
    parser.add_argument("--data", nargs="+", default=["MNIST", "FashionMNIST"], help="classes of kdejsd.data")
    parser.add_argument("--root", help="folder of the data's files")
    parser.add_argument("--network", choices=["FC", "Conv"], default="FC", help="networks of the models (default FC)")
    parser.add_argument("--latent_dim", type=int, default=LATENT_DIM, help=f"default {LATENT_DIM}")
    parser.add_argument("--train_size", type=int, help="images trained on (default: all)")
    parser.add_argument("--epochs", type=int, default=20, help="of every model (default 20)")
    parser.add_argument("--seeds", type=int, default=3, help="models of each kind (default 3)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--out", type=Path, default=Path("runs/gen_table3"), help="for table, pictures, classifiers")
    parser.add_argument("--quick", action="store_true", help="Digits, l = 2, 5 epochs, 2 seeds")
    options = parser.parse_args(arguments)
    if options.quick:
        options.data, options.latent_dim, options.epochs, options.seeds = ["Digits"], 2, 5, 2
    for name in options.models:
        if find_spec("prdc") is None:
            parser.error("precision, recall, density and coverage need prdc: pip install prdc")
        if name not in ROWS:
            parser.error(f"models must be of {', '.join(ROWS)}, got {name}")
    for name in options.data:
        if not (isinstance(getattr(data, name, None), type) and issubclass(getattr(data, name), data.ExampleData)):
            parser.error(f"kdejsd.data has no {name}")
        if name != "Digits" and options.root is None:
            parser.error(f"{name} needs --root")
    options.out.mkdir(parents=True, exist_ok=True)
    record = Record(options.out / "gen_table3.csv", KINDS)
    torch.set_num_threads(options.threads)

    start = time.perf_counter()
    for set_name in options.data:
        root = {} if set_name == "Digits" else {"root": options.root}
        images = getattr(data, set_name)(**root, train_size=options.train_size)
        study = Study(record, set_name, images, options)
        floor = study.floor()
        print(
            f"\n{set_name}: {study.measure}, {len(study.held_out('test'))} images; {study.run}, {options.seeds} seeds\n"
            f"\n{'':16}{'distance':>18}" + "".join(f"{title:>11}" for title in (*NEAR, "error")),
            flush=True,
        )
        print(line("training images", [floor]), flush=True)
        for name in options.models:
            tuning = study.tuned(name)
            factor = min(tuning, key=tuning.__getitem__)
            found = [study.measured(name, "test", seed, factor) for seed in range(options.seeds)]
            tried = ", ".join(f"{key:g}: {distance:.1f}" for key, distance in sorted(tuning.items()))
            print(
                f"{line(name, found)}   weight x {factor:g} (when tuned {tried})"
                f"   ({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
