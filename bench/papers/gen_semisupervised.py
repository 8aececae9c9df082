"""Section 5.4 and Figure 3 of the GENs paper: ten modes in two dimensions, and what labels of some images are worth.

    python bench/papers/gen_semisupervised.py --data DIR --out DIR   # MNIST, 10 000 of 50 000 images labelled
    python bench/papers/gen_semisupervised.py --quick                # scikit-learn's digits, 150 labelled, 30 seconds

The target is a ring of ten normals, one for each class (`kdejsd.models.SemiSupervisedGEN`). An image is given the class
whose mode is the most probable at its code. Models are trained for as many steps: with labels of some images; on as
many images that all have labels, so that what the unlabelled ones are worth shows; and without any label, where each
mode is afterwards named after a class of the training images, one to one, so that most of them fit.

Paper: S. Saha, S. Elhabian, R. T. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283. As there, 10 000 of
50 000 images have labels, and the bandwidth is found by samples of the target. The paper shows pictures of the codes
without and with labels and prints no accuracy. It says neither where its modes lie and how wide they are, nor how
labels enter its loss: the ring, which treats all classes alike, and the cross entropy are ours.

The KDE has m = 10 000 codes of images apart from those trained on, as in the paper. The models of this package take
the codes of images trained on instead, and a code leaves its own lagged copy out: the last row is a model like that.
Run again with the same --out, the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from pathlib import Path
from typing import NamedTuple

import lightning.pytorch as pl
import torch
from gen_table2 import Apart, LaggedApart
from quiet import quiet_trainer
from record import Record, Row, rounded
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from kdejsd import GaussianMixture, plots
from kdejsd.data import MNIST, Digits
from kdejsd.models import FC, SemiSupervisedGEN
from kdejsd.runs.measuring import encode_set

CLASSES = 10
RADIUS, SCALE = 4.0, 0.5  # neighbouring modes are 4.9 standard deviations apart
WEIGHT = 0.03
OTHERS, OWN = "other images", "images trained on"  # of which the lagged codes are
KEY = {"data": str, "images": int, "labels": int, "lagged": str, "num_lagged": int, "steps": int, "seed": int}
KINDS = KEY | dict.fromkeys(("accuracy", "reconstruction_error", "jsd", "jsd_of_target", "seconds"), float)


class Sizes(NamedTuple):
    """What the models of a study share: images trained on, those of them with labels, lagged codes, and the epochs of
    a model of all images, by which the steps of every model go."""

    train: int
    labelled: int
    num_lagged: int
    batch: int
    epochs: int

    @property
    def steps(self) -> int:
        return self.epochs * (self.train // self.batch)


SIZES, QUICK = Sizes(50_000, 10_000, 10_000, 100, 20), Sizes(1250, 150, 150, 50, 8)


class SemiSupervisedApart(LaggedApart, SemiSupervisedGEN):
    pass


def ring() -> GaussianMixture:
    angle = 2 * math.pi * torch.arange(CLASSES).double() / CLASSES
    return GaussianMixture(RADIUS * torch.stack([angle.cos(), angle.sin()], 1), SCALE)


def train(images: Apart, lagged: str, sizes: Sizes, seed: int) -> SemiSupervisedGEN:
    pl.seed_everything(seed, verbose=False)
    networks = FC(images.example_shape, 2)
    kind = SemiSupervisedApart if lagged == OTHERS else SemiSupervisedGEN
    model = kind(
        networks.encoder,
        networks.decoder,
        2,
        ring(),
        weight=WEIGHT,
        num_lagged=sizes.num_lagged,
        refresh="rolling",
    )
    if isinstance(model, LaggedApart):
        model.apart = images.lagged_images[torch.arange(sizes.num_lagged)][0]
    epochs = sizes.steps // (len(images.training) // sizes.batch)
    trainer = quiet_trainer(
        max_epochs=epochs,
        check_val_every_n_epoch=max(1, epochs // sizes.epochs),
        accelerator="cpu",
        callbacks=pl.callbacks.LambdaCallback(on_validation_end=tell_progress),
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


def measured(model: SemiSupervisedGEN, images: Apart, known: Apart) -> tuple[Row, Tensor]:
    """Measures of the held-out images' codes, and these codes [n, 2]. `known` are the same images with all labels."""
    held_out = encode_set(model, images.held_out)
    classes = model.classify(held_out.codes)
    if images.labelled_size == 0:
        classes = names_of_modes(model.classify(encode_set(model, known.training).codes), known.training.labels)[
            classes
        ]
    generator = torch.Generator().manual_seed(0)
    ideal = model.classes.sample(len(held_out.codes), generator)
    jsd, least = (float(model.lagged.jsd(codes, generator)) for codes in (held_out.codes, ideal))
    numbers = {
        "accuracy": float((classes == held_out.labels).double().mean()),
        "reconstruction_error": held_out.reconstruction_error,
        "jsd": jsd,
        "jsd_of_target": least,
    }
    return {name: rounded(value) for name, value in numbers.items()}, held_out.codes


def table(rows: list[Row]) -> str:
    lines = [
        f"{'images':>8}{'labelled':>10}  {'lagged codes of':18}{'seed':>5}{'held-out accuracy':>20}"
        f"{'error per pixel':>18}{'JSD / least':>16}"
    ]
    lines += [
        f"{row['images']:8}{row['labels']:10}  {row['lagged']:18}{row['seed']:5}{100 * row['accuracy']:18.2f} %"
        f"{row['reconstruction_error']:18.4f}{'{jsd:.3f} / {jsd_of_target:.3f}'.format(**row):>16}"
        for row in rows
    ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Semi-supervised GENs with ten modes (GENs paper, section 5.4).")
    parser.add_argument("--data", default=os.environ.get("KDEJSD_DATA"), help="folder of MNIST's idx files")
    parser.add_argument("--seeds", type=int, default=1, help="models of each kind (default 1)")
    parser.add_argument("--threads", type=int, default=1, help="default 1")
    parser.add_argument("--out", type=Path, default=Path("runs/gen_semisupervised"), help="for table and pictures")
    parser.add_argument("--quick", action="store_true", help="Digits, 150 labelled, 8 epochs")
    options = parser.parse_args(arguments)
    if options.data is None and not options.quick:
        parser.error("--data DIR is needed: the folder of MNIST's idx files (or KDEJSD_DATA)")
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    sizes = QUICK if options.quick else SIZES
    whole = Digits(batch_size=sizes.batch) if options.quick else MNIST(options.data, batch_size=sizes.batch)

    def images_of(train_size: int, labelled_size: int) -> Apart:
        return Apart(whole, len(whole.training) - sizes.train, train_size=train_size, labelled_size=labelled_size)

    record = Record(options.out / "gen_semisupervised.csv", KINDS)
    rows = []
    for images_count, labels_count, lagged in (
        (sizes.train, sizes.labelled, OTHERS),
        (sizes.labelled, sizes.labelled, OTHERS),
        (sizes.train, 0, OTHERS),
        (sizes.train, sizes.labelled, OWN),
    ):
        images = images_of(images_count, labels_count)
        for seed in range(options.seeds):
            texts = type(whole).__name__, images_count, labels_count, lagged, sizes.num_lagged, sizes.steps, seed
            key = dict(zip(KEY, texts, strict=True))
            if not record.find(**key):
                print(f"{images_count} images, {labels_count} labelled, codes of {lagged}, seed {seed}", flush=True)
                began = time.perf_counter()
                model = train(images, lagged, sizes, seed)
                seconds = round(time.perf_counter() - began)
                numbers, codes = measured(model, images, images_of(images_count, images_count))
                if seed == 0:
                    name = f"gen_semisupervised_{images_count}_{labels_count}{'_own' if lagged == OWN else ''}.png"
                    plots.latent(codes, images.held_out.labels, model.classes).savefig(options.out / name)
                record.add(key | numbers | {"seconds": seconds})
            rows += record.find(**key)

    print(f"\n{sizes.steps} steps, m = {sizes.num_lagged}\n\n{table(rows)}")
    print(
        "\nWithout labels the modes are named after classes of the training images. JSD in nats of held-out codes\n"
        "from the modes, beside that of as many samples of these."
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
