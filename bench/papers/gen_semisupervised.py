"""Section 5.4 and Figure 3 of the GENs paper: ten modes in two dimensions, and what labels of some images are worth.

    python bench/papers/gen_semisupervised.py --root DIR --out DIR   # MNIST, 10 000 of 50 000 images labelled
    python bench/papers/gen_semisupervised.py --quick                # scikit-learn's digits, 150 labelled, 30 seconds

The target is a ring of ten normals, one for each class (`kdejsd.models.SemiSupervisedGEN`). An image is given the class
whose mode is the most probable at its code. Three models are trained for as many steps: with labels of some images; on
as many images that all have labels, so that what the unlabelled ones are worth shows; and without any label, where each
mode is afterwards named after a class of the training images, one to one, so that most of them fit.

Paper: S. Saha, S. Elhabian, R. T. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283. As there, 10 000 of
50 000 images have labels, and the bandwidth is found by samples of the target. The paper shows pictures of the codes
without and with labels and prints no accuracy. It says neither where its modes lie and how wide they are, nor how
labels enter its loss: the ring, which treats all classes alike, and the cross entropy are ours.

What differs: the paper's KDE has m = 10 000 codes of images apart from those trained on. Here m is 5000, for speed, and
they are codes of images trained on, as in every GEN of this package; a code leaves its own lagged copy out. That is
because codes of images apart made the training codes less normal (gen_table2.py --ablation). There the target is the
standard normal; with modes and labels it was not tried.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from quiet import quiet_trainer
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kdejsd import GaussianMixture, plots
from kdejsd.data import MNIST, Digits, ExampleData
from kdejsd.models import FC, SemiSupervisedGEN
from kdejsd.runs.measuring import encode_set

CLASSES = 10
RADIUS, SCALE = 4.0, 0.5  # neighbouring modes are 4.9 standard deviations apart
WEIGHT = 0.03
COLUMNS = ("images", "labels", "seed", "accuracy", "reconstruction_error", "jsd", "jsd_of_target", "seconds")


def ring() -> GaussianMixture:
    angle = 2 * math.pi * torch.arange(CLASSES).double() / CLASSES
    return GaussianMixture(RADIUS * torch.stack([angle.cos(), angle.sin()], 1), SCALE)


def train(images: ExampleData, num_lagged: int, epochs: int, learning_rate: float, seed: int) -> SemiSupervisedGEN:
    pl.seed_everything(seed, verbose=False)
    networks = FC(images.example_shape, 2)
    model = SemiSupervisedGEN(
        networks.encoder,
        networks.decoder,
        2,
        ring(),
        weight=WEIGHT,
        num_lagged=num_lagged,
        refresh="rolling",
        learning_rate=learning_rate,
    )
    trainer = quiet_trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=pl.callbacks.LambdaCallback(on_validation_end=tell_progress)
    )
    trainer.fit(model, datamodule=images)
    return model


def tell_progress(trainer: pl.Trainer, model: pl.LightningModule) -> None:
    numbers = ", ".join(f"{name} {float(value):.4g}" for name, value in sorted(trainer.callback_metrics.items()))
    print(f"  epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {numbers}", flush=True)


def names_of_modes(modes: Tensor, labels: Tensor) -> Tensor:
    """The class [K] that each mode is named after, one to one, so that most examples fit."""
    counts = torch.zeros(CLASSES, CLASSES).index_put_((modes, labels), torch.ones(len(labels)), accumulate=True)
    return torch.from_numpy(linear_sum_assignment(-counts.numpy())[1])


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Semi-supervised GENs with ten modes (GENs paper, section 5.4).")
    parser.add_argument("--root", help="folder of MNIST's files")
    parser.add_argument("--train_size", type=int, default=50_000, help="default 50000")
    parser.add_argument("--labelled_size", type=int, default=10_000, help="default 10000")
    parser.add_argument("--num_lagged", type=int, default=5000, help="default 5000")
    parser.add_argument("--epochs", type=int, default=20, help="of all the images (default 20)")
    parser.add_argument("--learning_rate", type=float, default=1e-3, help="of Adam (default 1e-3)")
    parser.add_argument("--seeds", type=int, default=1, help="models of each kind (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--out", type=Path, default=Path("runs/gen_semisupervised"), help="for table and pictures")
    parser.add_argument("--quick", action="store_true", help="Digits, 150 labelled, 8 epochs")
    options = parser.parse_args(arguments)
    if options.quick:
        options.train_size, options.labelled_size, options.num_lagged, options.epochs = 1400, 150, 150, 8
    elif options.root is None:
        parser.error("MNIST needs --root (or take --quick)")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)

    def images_of(train_size: int, labelled_size: int) -> ExampleData:
        kind = {"batch_size": 50} if options.quick else {"root": options.root}
        return (Digits if options.quick else MNIST)(**kind, train_size=train_size, labelled_size=labelled_size)

    rows = []
    for images_count, labels_count in (
        (options.train_size, options.labelled_size),
        (options.labelled_size, options.labelled_size),
        (options.train_size, 0),
    ):
        images = images_of(images_count, labels_count)
        epochs = round(options.epochs * options.train_size / images_count)  # as many steps for all
        for seed in range(options.seeds):
            print(f"{images_count} images, {labels_count} labelled, seed {seed}", flush=True)
            began = time.perf_counter()
            model = train(images, min(options.num_lagged, images_count), epochs, options.learning_rate, seed)
            seconds = time.perf_counter() - began
            held_out = encode_set(model, images.held_out)
            classes = model.classify(held_out.codes)
            if labels_count == 0:
                known = images_of(images_count, images_count).training
                classes = names_of_modes(model.classify(encode_set(model, known).codes), known.labels)[classes]
            generator = torch.Generator().manual_seed(0)
            ideal = model.classes.sample(len(held_out.codes), generator)
            jsd, least = (float(model.lagged.jsd(codes, generator)) for codes in (held_out.codes, ideal))
            accuracy = float((classes == held_out.labels).double().mean())
            error = held_out.reconstruction_error
            rows.append((images_count, labels_count, seed, accuracy, error, jsd, least, round(seconds)))
            if seed == 0:
                figure = plots.latent(held_out.codes, held_out.labels, model.classes)
                figure.savefig(options.out / f"gen_semisupervised_{images_count}_{labels_count}.png")

    print(
        f"\n{'images':>8}{'labelled':>10}{'seed':>6}{'held-out accuracy':>20}{'error per pixel':>18}{'JSD / least':>18}"
    )
    for images_count, labels_count, seed, accuracy, error, jsd, least, _ in rows:
        both = f"{jsd:.3f} / {least:.3f}"
        print(f"{images_count:8}{labels_count:10}{seed:6}{100 * accuracy:18.2f} %{error:18.4f}{both:>18}")
    print(
        "\nWithout labels the modes are named after classes of the training images. JSD in nats of held-out codes\n"
        "from the modes, beside that of as many samples of these."
    )
    with (options.out / "gen_semisupervised.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows(rows)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
