"""GENs and their rivals by the number of latent dimensions: how well do held-out codes follow the normal, and what does
it cost?

    python bench/papers/gen_latent_dims.py --data DIR --csv FILE    # l = 8 to 256; an hour of one core
    python bench/papers/gen_latent_dims.py --quick                  # under a minute: scikit-learn's digits, l = 4

Rows that FILE holds already are printed and not run again: a stopped run goes on, and other dimensions can be added.

MNIST and Fashion-MNIST, the same fully connected networks, images and steps for every model. Codes of 10 000 held-out
images (of a model with a random encoder one sample of each image's posterior) against as many samples of the standard
normal:

    variances          least and greatest over the dimensions
    eigenvalues        least and greatest, of the codes' covariance
    told apart         held-out accuracy of a classifier that tells codes from samples (a network of 64 units on the
                       codes and their squares, half of the data to train on): 50 % is the best
    sliced W1          mean Wasserstein distance over 200 random directions; beside it that of two sets of samples
    Frechet            distance of 10 000 generated images from the held-out ones, by the features of a classifier of
                       their labels (no FID)

Models: "paper" is GEN as in the paper but for normalised codes (target itself, its optimal bandwidth, no kernel noise);
"smoothed" compares with the smoothed target by twice `optimal_bandwidth(..., smoothed=True)`, no kernel noise;
"stochastic" is StochasticGEN at three weights; the others are as they are by default.
"""

from __future__ import annotations

import argparse
import os
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from gen_table3 import as_tensor, features_for
from quiet import quiet_trainer
from record import Record, Row, rounded
from scipy.stats import wasserstein_distance
from sklearn.exceptions import ConvergenceWarning
from sklearn.neural_network import MLPClassifier
from torch import Tensor

from kdejsd import optimal_bandwidth
from kdejsd.data import MNIST, Digits, ExampleData, FashionMNIST
from kdejsd.metrics import frechet_distance
from kdejsd.models import built
from kdejsd.runs.measuring import encode_set

LATENT_DIMS, QUICK_DIMS = (8, 32, 64, 128, 256), (4,)
CENTERS, QUICK_CENTERS = 5000, 500
TRAIN_SIZE, EPOCHS, QUICK_EPOCHS = 20_000, 8, 3
MOST_CODES = 10_000
DIRECTIONS = 200
KINDS = {"data": str, "latent_dim": int, "model": str, "seed": int, "bandwidth": float, "error_per_pixel": float}
KINDS |= {"least_variance": float, "greatest_variance": float, "least": float, "greatest": float, "told_apart": float}
KINDS |= {"sliced": float, "sliced_of_samples": float, "frechet": float, "seconds": int}


def model_settings(dim: int, centers: int) -> dict[str, tuple[str, dict[str, Any]]]:
    """Of each row the class and its settings."""
    best, least = (optimal_bandwidth(dim, centers, smoothed=smoothed, trials=4).value for smoothed in (False, True))
    plain = {"num_lagged": centers, "kernel_noise": False}
    random = {"num_lagged": centers, "bandwidth": 1.5 * least}
    return {
        "GEN, paper": ("GEN", plain | {"smoothed": False, "bandwidth": best}),
        "GEN, smoothed": ("GEN", plain | {"bandwidth": 2 * least}),
        "GEN, stochastic": ("StochasticGEN", random),
        "GEN, stochastic, weight 0.3": ("StochasticGEN", random | {"weight": 0.3}),
        "GEN, stochastic, weight 0.1": ("StochasticGEN", random | {"weight": 0.1}),
        "WAE": ("WAE", {}),
        "AAE": ("AAE", {}),
        "VAE": ("VAE", {}),
    }


def told_apart(codes: Tensor, samples: Tensor) -> float:
    """Share of the second halves of codes and samples, each [n, l], that a classifier of the first gets right."""
    half = len(codes) // 2
    features = [torch.cat([part, part.square() - 1], 1).numpy() for part in (codes, samples)]
    first, second = (np.concatenate([f[k * half : (k + 1) * half] for f in features]) for k in (0, 1))
    labels = np.repeat([0, 1], half)
    network = MLPClassifier((64,), early_stopping=True, max_iter=60, alpha=1e-3, random_state=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        network.fit(first, labels)
    return float((network.predict(second) == labels).mean())


def sliced_wasserstein(codes: Tensor, samples: Tensor) -> float:
    directions = torch.randn(codes.shape[1], DIRECTIONS, generator=torch.Generator().manual_seed(0))
    directions /= directions.norm(dim=0)
    pairs = zip((codes @ directions).T.numpy(), (samples @ directions).T.numpy(), strict=True)
    return float(np.mean([wasserstein_distance(a, b) for a, b in pairs]))


def normal_samples(count: int, dim: int, seed: int) -> Tensor:
    return torch.randn(count, dim, generator=torch.Generator().manual_seed(seed))


def measured(
    data: ExampleData, dim: int, kind: str, settings: dict[str, Any], epochs: int, seed: int, features: Any
) -> Row:
    """Trains a model and measures it: the columns of its row from "error_per_pixel" on."""
    began = time.perf_counter()
    pl.seed_everything(seed, verbose=False)
    model = getattr(built, kind)(data.example_shape, dim, **settings)
    try:
        quiet_trainer(max_epochs=epochs, check_val_every_n_epoch=epochs).fit(model, datamodule=data)
    except FloatingPointError:
        return {"seconds": round(time.perf_counter() - began)}
    encoded = encode_set(model, data.held_out)
    codes = encoded.codes if encoded.posterior is None else encoded.posterior
    if not codes.isfinite().all():
        return {"seconds": round(time.perf_counter() - began)}
    # In any order but that of the files: MNIST's first test images are of other writers than its last.
    codes = codes[torch.randperm(len(codes), generator=torch.Generator().manual_seed(0))[:MOST_CODES]]
    samples, others = (normal_samples(len(codes), dim, seed) for seed in (1, 2))
    covariance = codes.T.double().cov()
    variances, eigenvalues = covariance.diagonal(), torch.linalg.eigvalsh(covariance)
    real = as_tensor(data.held_out, MOST_CODES)
    generated = model.sample(len(real), torch.Generator().manual_seed(seed)).clamp(0, 1)
    return {
        "error_per_pixel": encoded.reconstruction_error,
        "least_variance": float(variances.min()),
        "greatest_variance": float(variances.max()),
        "least": float(eigenvalues[0]),
        "greatest": float(eigenvalues[-1]),
        "told_apart": told_apart(codes, samples),
        "sliced": sliced_wasserstein(codes, samples),
        "sliced_of_samples": sliced_wasserstein(others, samples),
        "frechet": frechet_distance(real, generated, features),
        "seconds": round(time.perf_counter() - began),
    }


def show(row: Row) -> None:
    bandwidth = f"{row['bandwidth']:.3f}" if row["bandwidth"] else "-"
    if row["told_apart"] is None:
        print(f"{row['model']:28}{bandwidth:>7}  its codes are not finite", flush=True)
        return
    print(
        f"{row['model']:28}{bandwidth:>7}{row['error_per_pixel']:9.4f}"
        f"{'{least_variance:.2f} to {greatest_variance:.2f}'.format(**row):>16}"
        f"{'{least:.3f} to {greatest:.2f}'.format(**row):>16}{100 * row['told_apart']:10.1f} %"
        f"{'{sliced:.4f} / {sliced_of_samples:.4f}'.format(**row):>18}{row['frechet']:9.1f}",
        flush=True,
    )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Codes of GENs and other models by the number of latent dimensions.")
    parser.add_argument("--quick", action="store_true", help="digits, four dimensions, few steps: nothing to believe")
    parser.add_argument("--data", default=os.environ.get("KDEJSD_DATA"), help="folder of the idx files of both sets")
    parser.add_argument("--latent-dims", type=int, nargs="+", metavar="L", help="default 8 32 64 128 256")
    parser.add_argument("--seed", type=int, default=0, help="default 0")
    parser.add_argument("--threads", type=int, default=1, help="as torch.set_num_threads (default 1)")
    parser.add_argument("--out", type=Path, default=Path("runs/gen_latent_dims"), help="folder of the classifiers")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="where results go, and from where a run goes on")
    options = parser.parse_args(arguments)
    if options.data is None and not options.quick:
        parser.error("--data DIR is needed: the folder of the sets' idx files (or KDEJSD_DATA)")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    sets: list[ExampleData] = (
        [Digits()] if options.quick else [kind(options.data, train_size=TRAIN_SIZE) for kind in (MNIST, FashionMNIST)]
    )
    centers, epochs = (QUICK_CENTERS, QUICK_EPOCHS) if options.quick else (CENTERS, EPOCHS)
    dims = options.latent_dims or (QUICK_DIMS if options.quick else LATENT_DIMS)

    record = Record(options.csv, KINDS)
    for data in sets:
        features, measure = features_for(data, options.out, epochs=5)
        print(f"\n{type(data).__name__}: {epochs} epochs of {len(data.training)} images; {measure}")
        for dim in dims:
            print(
                f"\nl = {dim}, m = {centers}\n{'':28}{'h':>7}{'error':>9}{'variances':>16}{'eigenvalues':>16}"
                f"{'told apart':>12}{'sliced W1':>18}{'Frechet':>9}",
                flush=True,
            )
            for name, (kind, settings) in model_settings(dim, centers).items():
                key = {"data": type(data).__name__, "latent_dim": dim, "model": name, "seed": options.seed}
                if not record.find(**key):
                    row = key | {"bandwidth": settings.get("bandwidth")}
                    row |= measured(data, dim, kind, settings, epochs, options.seed, features)
                    record.add({k: rounded(v, 6) if isinstance(v, float) else v for k, v in row.items()})
                show(record.find(**key)[0])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
