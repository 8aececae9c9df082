"""Table 3 and Figure 2 of the GENs paper on one's own data: how near generated images come to real ones.

    python bench/papers/gen_table3.py --root DIR --out DIR     # MNIST and Fashion-MNIST, every model
    python bench/papers/gen_table3.py GEN --quick              # one model on scikit-learn's digits, under a minute

Every model is trained on the same images with the same networks, and as many images as are held out are generated from
its target. Reported is the Frechet distance between features of generated and of held-out images, as the mean over
seeds and its standard deviation; and, as the floor, that of as many training images.

The features are those of Inception where torch-fidelity and its weights are installed, and only then is the distance
the FID. Otherwise they are the last hidden layer of a small classifier of the data's own labels, trained here and kept
in the output folder. Values of different features, and of different numbers of images, do not compare.

Paper: S. Saha, S. Elhabian, R. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283, section 5.3.
"""

from __future__ import annotations

import argparse
import csv
import statistics
import time
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from quiet import quiet_trainer
from torch import Tensor, nn

from kdejsd import data, models, plots
from kdejsd.metrics import InceptionFeatures, encode_set, frechet_distance
from kdejsd.models.classifier import classifier_for

MODELS = ("GEN", "AAE", "VAE", "WAE")
LATENT_DIM = 8
# Of a model beside what all of them share.
SETTINGS: dict[str, dict[str, Any]] = {"GEN": {"num_lagged": 10_000}}
QUICK: dict[str, dict[str, Any]] = {"GEN": {"num_lagged": 500, "bandwidth": 0.4}}


def model_class(name: str) -> Any:
    """The model in the form whose networks are built for images."""
    return getattr(models.images, name)


def features_for(images: data.ImageData, folder: Path, epochs: int) -> tuple[nn.Module, str]:
    """The feature network, and what the distance is called with it."""
    try:
        return InceptionFeatures(), "FID (Inception v3)"
    except RuntimeError:
        name = type(images).__name__
        classifier = classifier_for(images, folder / f"classifier_{name.lower()}.ckpt", epochs)
        return classifier.features, f"Frechet distance (features: {classifier})"


def train(name: str, images: data.ImageData, network: Any, latent_dim: int, settings: dict, epochs: int, seed: int):
    pl.seed_everything(seed, verbose=False)
    model = model_class(name)(images.image_shape, latent_dim, network, **settings)
    trainer = quiet_trainer(max_epochs=epochs)
    trainer.fit(model, datamodule=images)
    return model.to("cpu")


def as_tensor(images: data.ImageSet, count: int) -> Tensor:
    """So many images, drawn by a fixed seed."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]][0]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Frechet distances of generated images (GENs paper, Table 3).")
    parser.add_argument("models", nargs="*", default=list(MODELS), help=f"default: {' '.join(MODELS)}")
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
        if not hasattr(models.images, name):
            parser.error(f"kdejsd.models.images has no {name}")
    for name in options.data:
        if not (isinstance(getattr(data, name, None), type) and issubclass(getattr(data, name), data.ImageData)):
            parser.error(f"kdejsd.data has no {name}")
        if name != "Digits" and options.root is None:
            parser.error(f"{name} needs --root")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)

    start, rows = time.perf_counter(), []
    for set_name in options.data:
        root = {} if set_name == "Digits" else {"root": options.root}
        images = getattr(data, set_name)(**root, train_size=options.train_size)
        features, measure = features_for(images, options.out, epochs=5)
        held_out = as_tensor(images.held_out, 10_000)
        floor = frechet_distance(held_out, as_tensor(images.training, len(held_out)), features)
        print(
            f"\n{set_name}: {measure}, {len(held_out)} images; {options.network}, l = {options.latent_dim}, "
            f"{options.epochs} epochs of {len(images.training)} images, {options.seeds} seeds",
            flush=True,
        )
        print(f"{'training images':16}{floor:10.3f}", flush=True)
        rows.append((set_name, "training images", "", f"{floor:.4f}", "", "", measure))
        for name in options.models:
            distances, errors = [], []
            for seed in range(options.seeds):
                began = time.perf_counter()
                settings = (QUICK if options.quick else SETTINGS).get(name, {})
                network = getattr(models, options.network)
                model = train(name, images, network, options.latent_dim, settings, options.epochs, seed)
                generated = model.sample(len(held_out), torch.Generator().manual_seed(seed)).clamp(0, 1)
                distances.append(frechet_distance(held_out, generated, features))
                errors.append(encode_set(model, images.held_out).reconstruction_error)
                seconds = time.perf_counter() - began
                rows.append(
                    (set_name, name, seed, f"{distances[-1]:.4f}", f"{errors[-1]:.6f}", f"{seconds:.0f}", measure)
                )
                if seed == 0:
                    plots.grid(generated[:100]).savefig(options.out / f"{set_name.lower()}_{name.lower()}.png")
            spread = f" ± {statistics.stdev(distances):.3f}" if len(distances) > 1 else ""
            print(
                f"{name:16}{statistics.mean(distances):10.3f}{spread}   reconstruction error "
                f"{statistics.mean(errors):.4f}   ({time.perf_counter() - start:.0f} s)",
                flush=True,
            )
    with (options.out / "gen_table3.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("data", "images of", "seed", "distance", "reconstruction_error", "seconds", "measure"))
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
