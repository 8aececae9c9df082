"""Compares how many kinds of images two models make, in the eyes of a classifier that is trained on the same images.

The first model is a GAN, the second a GEN, an autoencoder with kdejsd's loss. Both make images from samples of the
standard normal. The picture shows which class of digit each place of their latent spaces is decoded to.

python diversity.py
"""

import argparse
import math

import lightning.pytorch as pl
import numpy as np
import torch
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from scipy.ndimage import distance_transform_edt

import kdejsd
from kdejsd.data import Digits
from kdejsd.models import FC, GAN, GEN, ImageClassifier

# Ten colours that can be told apart with any colour vision.
COLORS = ["#3f90da", "#ffa90e", "#bd1f01", "#92dadd", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#94a4a2"]


def fit(model, digits, steps):
    trainer = pl.Trainer(max_steps=steps, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(model, digits)
    return model.eval()


@torch.no_grad()
def draw_classes(axes, model, classifier):
    """Draws the class that each point is decoded to, and the normal's 1, 2 and 3 standard deviations."""
    line = torch.linspace(-3.3, 3.3, 300)
    y, x = torch.meshgrid(line, line, indexing="ij")
    classes = classifier(model.decode(torch.stack([x, y], -1).flatten(0, 1))).argmax(1).reshape(300, 300)
    axes.imshow(classes, cmap=ListedColormap(COLORS), vmin=-0.5, vmax=9.5, extent=(-3.3, 3.3) * 2, origin="lower")
    for radius in (1, 2, 3):
        axes.add_patch(Circle((0, 0), radius, fill=False, ls="--", lw=1.2))
    for label in classes.unique():
        depth = distance_transform_edt(np.pad(classes == label, 1))[1:-1, 1:-1]  # points to the region's edge
        if depth.max() < 6:
            continue  # too small for a number
        middle = [line[place] for place in reversed(np.unravel_index(depth.argmax(), depth.shape))]
        box = {"facecolor": "w", "alpha": 0.8, "lw": 0, "boxstyle": "circle,pad=0.1"}
        axes.text(*middle, int(label), size=18, weight="bold", ha="center", va="center", bbox=box)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--figure", default="diversity.png")
    options = parser.parse_args()

    pl.seed_everything(0, verbose=False)
    digits = Digits()
    classifier = fit(ImageClassifier(digits.example_shape, 10, data="Digits"), digits, options.steps // 2)
    print(classifier)
    networks, others = FC(digits.example_shape, latent_dim=2), FC(digits.example_shape, latent_dim=2)
    discriminator = FC(digits.example_shape, latent_dim=1).encoder  # from images to one number
    models = {
        "GAN": GAN(networks.decoder, discriminator, latent_dim=2),
        "GEN": GEN(others.encoder, others.decoder, latent_dim=2, weight=0.1),
    }
    reports = []
    for name, model in models.items():
        fit(model, digits, options.steps)
        reports.append(kdejsd.diversity_report(model.decode, classifier, latent_dim=2))
        print(name, reports[-1], "", sep="\n")
    print(f"a is the GAN, b is the GEN: {kdejsd.compare_diversity(*reports)}")

    figure = Figure(figsize=(12, 6.5), dpi=100, layout="constrained")
    for axes, (name, model), report in zip(figure.subplots(1, 2), models.items(), reports, strict=True):
        draw_classes(axes, model, classifier)
        axes.set_title(f"{name}\nas diverse as {math.exp(report.collision_entropy):.1f} equal classes", size=18)
        axes.tick_params(labelsize=13)
    figure.savefig(options.figure)


if __name__ == "__main__":
    main()
