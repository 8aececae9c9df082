"""Figures 2.2 and 4.1 to 4.3 of the LC-VAE paper, VAE beside LC-VAE, and as numbers what it could judge by eye alone.

    python bench/papers/lcvae_figures.py --data DIR --out DIR   # MNIST
    python bench/papers/lcvae_figures.py --quick                # scikit-learn's digits, 20 seconds
    python bench/papers/lcvae_figures.py --data DIR --out DIR --network HalfDeepConv --latent_dim 10 \
        --train_size 60000 --epochs 20 --seeds 1 --models VAE "LC-VAE, clip"   # the paper's settings, half as wide

Paper: N. Manoj, "On the Density of the Latent Space of Deep Generative Models" (2018), section 4, and the earlier
version, "Looser is Worse: On the Coding Space of Deep Generative Models". It trains convolutional networks (`DeepConv`)
for 20 epochs of MNIST's 60 000 images, in minibatches of 300, by Adam at 1e-3, with lambda = 30 and c = 0.30. By
default ours are smaller and train shorter, for a CPU. What each figure shows here, for l = 2:

    2.2  the regions of the latent plane by the class that a classifier sees in the decoded images
    4.1  codes of held-out images, by class
    4.2  images decoded from a grid of the plane, at quantiles of the standard normal in both directions
    4.3  images decoded between the codes of pairs of held-out images of two classes

In the paper 2.2 has the codes of a VAE, 4.1 those of both models, and 4.2 and 4.3 samples and reconstructions, l = 10.
For another l than 2 ours are these too, and 2.2 and 4.1 are left out.

Compared are a VAE and LC-VAEs (`kdejsd.models.LCVAE`): with clipped weights as in the paper, with spectral
normalisation, and clipped with the scale-free omega, at the same lambda and at 30 times it. All of a seed begin with
the same weights and see the same minibatches. The pictures are of the first seed. Run again with the same --out, it
goes on where it was stopped, within a model's training too; its seconds are those since then.

The numbers are of held-out images. omega is the mean over all pairs of 2000 of them, once of the codes as they are and
once of codes divided by their standard deviation (one for all dimensions): an encoder that only shrinks its codes
lowers the first and not the second. Beside these stands what codes of unit deviation would have that are dealt out to
other images: no more than that can be won by an arrangement. Under "largest" stands the largest ratio of those pairs, a
lower bound of the encoder's squared Lipschitz constant, under "clipped" the share of its weights that lie at the bound.
Collision entropy and class radius are of the classes that a classifier of real images sees in decoded samples of the
prior. Latent holes are the share of the prior where codes of training images are rare (0.05 if they follow the prior),
of the posterior's means and of samples of it. The Frechet distance is between features of 10 000 generated and the
held-out images, of the same classifier, so not the FID.
"""

from __future__ import annotations

import argparse
import io
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import matplotlib.image
import torch
from gen_interpolation import pairs
from matplotlib.figure import Figure
from quiet import quiet_trainer
from record import Record, file_name, rounded
from torch import Tensor, nn

from kdejsd import diversity_report, latent_holes, models, omega, plots
from kdejsd.data import MNIST, Digits, ExampleData
from kdejsd.metrics import frechet_distance
from kdejsd.models.image_classifier import ImageClassifier, classifier_for
from kdejsd.models.vae import kl_to_normal
from kdejsd.runs.checkpoints import RunCheckpoint, WholeCheckpointIO
from kdejsd.runs.measuring import encode_set

# lambda as a multiple of --omega_weight, and the other settings. Of a weight of 0 without constraint it is a VAE.
MODELS: dict[str, tuple[float, dict[str, Any]]] = {
    "VAE": (0, {"constraint": "none"}),
    "LC-VAE, clip": (1, {}),
    "LC-VAE, spectral": (1, {"constraint": "spectral"}),
    "LC-VAE, scale-free": (1, {"scale_free": True}),
    "scale-free, 30 lambda": (30, {"scale_free": True}),
}
# For so few and small images the prior must weigh less, or nothing is left of the codes.
QUICK = {"observation_variance": 0.02, "learning_rate": 3e-3}
OMEGA_IMAGES = 2000
MEASURES = {  # and what they are called in the table
    "reconstruction_error": "error per pixel",
    "kl": "KL, nats",
    "omega": "omega",
    "omega_normalised": "  of unit deviation",
    "omega_shuffled": "  ... and dealt out",
    "largest": "largest ratio",
    "largest_normalised": "  of unit deviation",
    "code_std": "deviation of codes",
    "clipped": "weights clipped",
    "collision_entropy": "collision entropy",
    "class_radius": "class radius",
    "holes_means": "holes, means",
    "holes_samples": "holes, samples",
    "frechet": "Frechet distance",
}
KEY = {"data": str, "network": str, "latent_dim": int, "omega_weight": float, "train_size": int, "batch_size": int}
KEY |= {"epochs": int, "model": str, "seed": int}
KINDS = KEY | dict.fromkeys((*MEASURES, "seconds"), float)


def train(
    name: str,
    images: ExampleData,
    network: Any,
    latent_dim: int,
    omega_weight: float,
    epochs: int,
    seed: int,
    checkpoint: Path,
    **shared: Any,
) -> models.LCVAE:
    """Trains a model, from its checkpoint on if there is one."""
    pl.seed_everything(seed, verbose=False)
    factor, settings = MODELS[name]
    settings = {"omega_weight": factor * omega_weight, **settings, **shared}
    model = models.built.LCVAE(images.example_shape, latent_dim, network, **settings)
    model.to(memory_format=torch.channels_last)  # in which convolutions take two thirds as long
    pl.seed_everything(seed, verbose=False)  # the same noise for all: spectral normalisation has drawn some
    saved = {"enable_checkpointing": True, "callbacks": [RunCheckpoint(checkpoint)], "plugins": [WholeCheckpointIO()]}
    trainer = quiet_trainer(max_epochs=epochs, accelerator="cpu", **saved)
    trainer.fit(model, datamodule=images, ckpt_path=checkpoint if checkpoint.exists() else None)
    return model.eval()


@torch.no_grad()
def measures(model: models.LCVAE, images: ExampleData, classifier: ImageClassifier, samples: int) -> dict[str, float]:
    """The numbers of `MEASURES`."""
    held_out, training = encode_set(model, images.held_out), encode_set(model, images.training)
    batch = some(images.held_out, 10_000)
    few = batch[:OMEGA_IMAGES]
    codes = model.encode(few)
    mean, shuffled = (float(omega(few, z, pairs="all", reduction="mean")) for z in (codes, codes.roll(1, 0)))
    largest = float(omega(few, codes, pairs="all", reduction="max").value)
    variance = float(held_out.codes.var(0).mean())
    report = diversity_report(model.generator, classifier, model.latent_dim, num_samples=samples, codes=training.codes)
    generated = model.sample(len(batch), torch.Generator().manual_seed(0)).clamp(0, 1)
    layers = [layer for layer in model.encoder.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
    bound = model.clip if model.constraint == "clip" else math.inf
    return {
        "reconstruction_error": held_out.reconstruction_error,
        "kl": float(kl_to_normal(*model.posterior(batch)).mean()),
        "omega": mean,
        "omega_normalised": mean / variance,
        "omega_shuffled": shuffled / variance,
        "largest": largest,
        "largest_normalised": largest / variance,
        "code_std": math.sqrt(variance),
        "clipped": float(torch.cat([layer.weight.flatten().abs() >= bound for layer in layers]).double().mean()),
        "collision_entropy": report.collision_entropy,
        "class_radius": report.class_radius.mean,
        "holes_means": report.holes.mass,
        "holes_samples": latent_holes(training.posterior, level=report.holes.level).mass,
        "frechet": frechet_distance(batch, generated, classifier.features),
    }


def some(images: Any, count: int) -> Tensor:
    """So many images, drawn by a fixed seed."""
    return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:count]][0]


@torch.no_grad()
def figures(model: models.LCVAE, images: ExampleData, classifier: ImageClassifier) -> dict[str, Figure]:
    """The paper's figures of one model, by the number that they have there."""
    if model.latent_dim != 2:
        batch = some(images.held_out, 10)
        samples = model.sample(100, torch.Generator().manual_seed(0))
        return {"4_2": plots.grid(samples), "4_3": plots.reconstructions(batch, model.decode(model.encode(batch)))}
    encoded = encode_set(model, images.held_out)
    quantiles = torch.special.ndtri((torch.arange(13) + 0.5) / 13)
    y, x = torch.meshgrid(-quantiles, quantiles, indexing="ij")
    ends = [images.held_out[index][0] for index in pairs(images.held_out, 8, seed=0)]
    start, end = (model.encode(batch) for batch in ends)
    decoded = model.decode(torch.stack([x, y], -1).reshape(-1, 2))
    return {
        "2_2": plots.latent_classes(model.generator, classifier, resolution=200),
        "4_1": plots.latent(encoded.codes, encoded.labels, model.target),
        "4_2": plots.grid(decoded, columns=13),
        "4_3": plots.interpolation(model.decode, start, end, steps=10),
    }


def side_by_side(parts: Mapping[str, Figure]) -> Figure:
    """One figure of several, under their names."""
    pictures = {}
    for name, part in parts.items():
        file = io.BytesIO()
        part.savefig(file, format="png")
        file.seek(0)
        pictures[name] = matplotlib.image.imread(file)
    height = max(4 * picture.shape[0] / picture.shape[1] for picture in pictures.values())
    figure = Figure(figsize=(4 * len(parts), height + 0.2), dpi=100, layout="constrained")
    for axes, (name, picture) in zip(figure.subplots(1, len(parts), squeeze=False)[0], pictures.items(), strict=True):
        axes.imshow(picture)
        axes.set_title(name)
        axes.set_axis_off()
    return figure


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="VAE beside LC-VAE (LC-VAE paper, figures 2.2 and 4.1 to 4.3).")
    parser.add_argument("--data", help="folder of MNIST's files")
    parser.add_argument("--network", choices=["FC", "HalfDeepConv", "DeepConv"], default="FC", help="default FC")
    parser.add_argument("--latent_dim", type=int, default=2, help="l (default 2)")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="default all")
    parser.add_argument("--omega_weight", type=float, default=30.0, help="lambda (default 30)")
    parser.add_argument("--train_size", type=int, default=20_000, help="images trained on (default 20000)")
    parser.add_argument("--batch_size", type=int, default=300, help="default 300")
    parser.add_argument("--epochs", type=int, default=10, help="of every model (default 10)")
    parser.add_argument("--seed", type=int, default=0, help="of the first models (default 0)")
    parser.add_argument("--seeds", type=int, default=2, help="models of each kind (default 2)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/lcvae_figures"), help="for record, pictures and checkpoints"
    )
    parser.add_argument("--quick", action="store_true", help="Digits, FC, 6 epochs, one seed")
    options = parser.parse_args(arguments)
    if options.quick:
        options.network, options.train_size, options.batch_size, options.epochs, options.seeds = "FC", 1400, 50, 6, 1
    elif options.data is None:
        parser.error("MNIST needs --data (or take --quick)")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)

    name = "digits" if options.quick else "mnist"
    root = {} if options.quick else {"root": options.data}
    kind = Digits if options.quick else MNIST
    classifier = classifier_for(kind(**root), options.out / f"classifier_{name}.ckpt")
    images = kind(**root, train_size=options.train_size, batch_size=options.batch_size)
    steps = options.epochs * (options.train_size // options.batch_size)
    print(
        f"{options.network}, l = {options.latent_dim}, lambda = {options.omega_weight:g}, {options.train_size} images, "
        f"{steps} steps of {options.batch_size}; {classifier}",
        flush=True,
    )
    seeds = range(options.seed, options.seed + options.seeds)
    record = Record(options.out / "lcvae_figures.csv", KINDS)
    found, drawn = {}, {}
    for seed in seeds:
        for model_name in options.models:
            sizes = options.latent_dim, options.omega_weight, options.train_size, options.batch_size, options.epochs
            key = dict(zip(KEY, (kind.__name__, options.network, *sizes, model_name, seed), strict=True))
            if not record.find(**key) or seed == options.seed:  # whose models are drawn
                began = time.perf_counter()
                checkpoint = options.out / f"{file_name(key)}.ckpt"
                network, shared = getattr(models, options.network), QUICK if options.quick else {}
                training = (options.latent_dim, options.omega_weight, options.epochs, seed, checkpoint)
                model = train(model_name, images, network, *training, **shared)
                if not record.find(**key):
                    numbers = measures(model, images, classifier, samples=2000 if options.quick else 10_000)
                    seconds = round(time.perf_counter() - began)
                    record.add(key | {k: rounded(v, 9) for k, v in numbers.items()} | {"seconds": seconds})
                if seed == options.seed:
                    drawn[model_name] = figures(model, images, classifier)
                print(f"{model_name}, seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
            found[model_name, seed] = record.find(**key)[0]

    print(
        f"\n{'seeds ' + ' / '.join(map(str, seeds)):20}{''.join(f'{model_name:>24}' for model_name in options.models)}"
    )
    for key, name in MEASURES.items():
        cells = [" / ".join(f"{found[model_name, seed][key]:.4g}" for seed in seeds) for model_name in options.models]
        print(f"{name:20}{''.join(f'{cell:>24}' for cell in cells)}")
    for number in next(iter(drawn.values())):
        parts = {model_name: pictures[number] for model_name, pictures in drawn.items()}
        dims = "" if options.latent_dim == 2 else f"_l{options.latent_dim}"
        side_by_side(parts).savefig(options.out / f"lcvae_figures{dims}_{number}.png")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
