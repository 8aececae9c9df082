"""Trains an autoencoder whose latent space has a place for each class, with labels for some of the examples.

The target is a mixture of ten normals on a circle. The latent term matches the codes of all digits to it, and the known
labels decide which digit goes to which normal. The picture shows the codes of held-out digits, and what the decoder
makes of samples of each normal.

python mixture_with_labels.py
python mixture_with_labels.py --labels 100
"""

import argparse

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle

import kdejsd
from kdejsd.data import Digits
from kdejsd.models import FC, SemiSupervisedGEN

# Ten colours that can be told apart with any colour vision.
COLORS = ["#3f90da", "#ffa90e", "#bd1f01", "#92dadd", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#94a4a2"]
RADIUS, SCALE = 4.0, 0.5


def draw(path, model, codes, labels):
    figure = Figure(figsize=(12, 6.3), dpi=100, layout="constrained")
    left, right = figure.subplots(1, 2)
    left.scatter(*codes.T, s=30, c=[COLORS[label] for label in labels], linewidths=0.5, edgecolors="w")
    for label, mean in enumerate(model.classes.means):
        left.add_patch(Circle(mean.tolist(), 2 * SCALE, fill=False, color=COLORS[label], lw=2))
        left.text(*(1.4 * mean).tolist(), label, color=COLORS[label], weight="bold", size=18, ha="center", va="center")
    left.set_title("Held-out codes, coloured by true class", size=18)
    left.set(xlim=(-6.5, 6.5), ylim=(-6.5, 6.5), aspect="equal", xticks=[], yticks=[])

    torch.manual_seed(0)
    samples = model.classes.means.float()[:, None] + SCALE * torch.randn(10, 10, 2)
    decoded = torch.nn.functional.pad(model.decode(samples.flatten(0, 1)), (1, 1, 1, 1))  # a gap between images
    tiles = decoded.reshape(10, 10, 10, 10).transpose(1, 2).reshape(100, 100)
    right.imshow(tiles, cmap="gray_r", vmin=0, vmax=1)
    right.set_title("Decoded from each class's normal", size=18)
    right.set_xticks([])
    right.set_yticks([10 * label + 4.5 for label in range(10)], range(10), size=16)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--labels", type=int, default=300, help="the number of training examples with a label")
    parser.add_argument("--steps", type=int, default=1400)
    parser.add_argument("--figure", default="mixture_with_labels.png")
    options = parser.parse_args()

    angles = torch.arange(10) / 10 * 2 * torch.pi
    target = kdejsd.GaussianMixture(RADIUS * torch.stack([angles.cos(), angles.sin()], 1), SCALE)
    pl.seed_everything(0, verbose=False)
    digits = Digits(labelled_size=options.labels)
    networks = FC(digits.example_shape, latent_dim=2)
    model = SemiSupervisedGEN(networks.encoder, networks.decoder, 2, target, weight=0.3, label_weight=0.1)
    trainer = pl.Trainer(max_steps=options.steps, logger=False, enable_checkpointing=False, enable_model_summary=False)
    trainer.fit(model, digits)

    model.eval()
    with torch.no_grad():
        codes = model.encode(digits.held_out.examples)
        error = torch.nn.functional.mse_loss(model.decode(codes), digits.held_out.examples)
        right = (model.classify(codes) == digits.held_out.labels).float().mean()
        draw(options.figure, model, codes, digits.held_out.labels)
    print(f"{options.labels} of {len(digits.training)} training examples have a label")
    print(f"held-out images: {right:.1%} of the classes right, reconstruction error {error:.4f}")


if __name__ == "__main__":
    main()
