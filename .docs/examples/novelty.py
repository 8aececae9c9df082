"""Finds the images that are unlike those that a model was trained on.

A GEN learns from normal images alone. The novelty of an image is its negative log-density, computed through the
decoder. The picture shows the least and the most novel of the images that the model has not seen.

python novelty.py                                  # scikit-learn's digits: 0 to 4 are normal, 5 to 9 are novel
python novelty.py --normal DIR --novel OTHER_DIR   # two folders of your own images
"""

import argparse

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from sklearn.metrics import roc_auc_score

import kdejsd
from kdejsd.data import Digits, ImageFolder
from kdejsd.models import FC, GEN

SHOWN = 12  # images in a row of the picture


class SomeDigits(Digits):
    """Those of the digits that lie in a range."""

    def __init__(self, first, last):
        super().__init__()
        self.kinds = torch.arange(first, last + 1)

    def load(self):
        parts = super().load()
        return tuple(part.subset(torch.isin(part.labels, self.kinds).nonzero()[:, 0]) for part in parts)


def images_of(*parts):
    return torch.cat([part[torch.arange(len(part))][0] for part in parts])


def draw(path, images, is_novel, score):
    """Draws the images of the lowest and the highest score; truly novel ones have a red frame."""
    order = score.argsort()
    figure = Figure(figsize=(12, 2.9), dpi=100, layout="constrained")
    for row, title, chosen in zip(
        figure.subfigures(2, 1),
        ("The least novel images", "The most novel images"),
        (order, order.flip(0)),
        strict=True,
    ):
        row.suptitle(title, size=16)
        for axes, index in zip(row.subplots(1, SHOWN), chosen, strict=False):
            axes.imshow(images[index].permute(1, 2, 0), cmap="gray_r")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set(color="#bd1f01" if is_novel[index] else "0.7", linewidth=4 if is_novel[index] else 1)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--normal", metavar="DIR", help="a folder of normal images, most of them to train on")
    parser.add_argument("--novel", metavar="DIR", help="a folder of other images")
    parser.add_argument("--size", type=int, default=32, help="of these images, in pixels")
    parser.add_argument("--latent-dim", type=int, default=8)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--figure", default="novelty.png")
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    if options.normal:
        data, others = (ImageFolder(folder, size=options.size) for folder in (options.normal, options.novel))
    else:
        data, others = SomeDigits(0, 4), SomeDigits(5, 9)
    networks = FC(data.example_shape, options.latent_dim)
    num_lagged = min(1000, len(data.training))
    model = GEN(networks.encoder, networks.decoder, options.latent_dim, num_lagged=num_lagged, weight=0.1)
    trainer = pl.Trainer(max_steps=options.steps, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(model, data)

    variance = kdejsd.residual_variance(model.encode, model.decode, images_of(data.training))
    images = images_of(data.held_out, others.training, others.held_out)
    is_novel = torch.arange(len(images)) >= len(data.held_out)
    found = kdejsd.novelty_score(model.encode, model.decode, images, variance=variance)
    of_score, of_error = (roc_auc_score(is_novel, values) for values in (found.score, found.reconstruction_error))
    print(f"{len(data.held_out)} normal and {int(is_novel.sum())} novel images that the model has not seen")
    print(f"AUROC of the novelty score {of_score:.3f}, of the reconstruction error alone {of_error:.3f}")
    draw(options.figure, images, is_novel, found.score)


if __name__ == "__main__":
    main()
