"""Trains an autoencoder alone, with codes of the normal's mean and variance, and with kdejsd's loss added.

The picture shows the codes of held-out images, and what the decoders make of the same samples of the standard normal.

python before_after.py              # scikit-learn's digits of 8x8 pixels
python before_after.py --data DIR   # MNIST, from a folder of its idx files
"""

import argparse

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import nn

import kdejsd
from kdejsd.data import MNIST, Digits
from kdejsd.models import FC

# Ten colours that can be told apart with any colour vision.
COLORS = ["#3f90da", "#ffa90e", "#bd1f01", "#92dadd", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#94a4a2"]
SIDE = 6  # images in a row of the picture


def train(images, steps, normalize, weight):
    """Returns an encoder to two dimensions and a decoder; a weight of 0 leaves kdejsd's loss out."""
    torch.manual_seed(0)
    networks = FC(images.shape[1:], latent_dim=2, hidden=(256, 128))
    encoder, decoder = networks.encoder, networks.decoder
    if normalize:
        encoder.append(nn.BatchNorm1d(2, affine=False))  # keeps the codes where the loss has a gradient
    if weight:
        lagged = kdejsd.LaggedKDE(num_centers=len(images), latent_dim=2)
        refresh = kdejsd.LaggedRefresh(lagged, encoder, images, every=10)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        index = torch.randint(len(images), (100,))
        codes = encoder(images[index])
        loss = nn.functional.mse_loss(decoder(codes), images[index])
        if weight:
            refresh.step()  # every 10 steps: encodes the lagged examples anew
            loss = loss + weight * lagged.loss(codes, index, noise=torch.randn_like(codes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder.eval(), decoder.eval()


def draw(path, columns, labels, extent):
    """Draws a column of each title, codes [n, 2] and images [SIDE^2, 1, h, w]; the codes are drawn to one scale."""
    figure = Figure(figsize=(12, 8.6), dpi=100, layout="constrained")
    panels = figure.subplots(2, len(columns))
    for (codes_axes, image_axes), (title, codes, images) in zip(panels.T, columns, strict=True):
        shown = codes[:3000]
        codes_axes.scatter(*shown.T, s=7, linewidths=0, c=[COLORS[label] for label in labels[: len(shown)]])
        for radius in (1, 2, 3):
            codes_axes.add_patch(Circle((0, 0), radius, fill=False, ls="--", lw=1.5))
        outside = (codes.abs() > extent).any(1).float().mean()
        note = f"{outside:.0%} of the codes outside"
        box = {"facecolor": "w", "edgecolor": "none", "alpha": 0.9}
        codes_axes.text(0.97, 0.04, note, size=14, ha="right", transform=codes_axes.transAxes, bbox=box)
        codes_axes.set_title(title, size=19, weight="bold", pad=12)
        codes_axes.set(xlim=(-extent, extent), ylim=(-extent, extent), aspect="equal")
        codes_axes.set(xticks=range(-4, 5, 2), yticks=range(-4, 5, 2))
        codes_axes.tick_params(labelsize=12)
        height, width = images.shape[2] + 2, images.shape[3] + 2  # with a gap between images
        padded = nn.functional.pad(images, (1, 1, 1, 1)).reshape(SIDE, SIDE, height, width)
        tiles = padded.transpose(1, 2).reshape(SIDE * height, SIDE * width)
        image_axes.imshow(tiles, cmap="gray_r", vmin=0, vmax=1, interpolation="nearest")
        image_axes.set_title("Decoded from normal samples", size=15)
        image_axes.set(xticks=[], yticks=[])
    names = [codes_axes.scatter([], [], s=150, color=COLORS[label], label=label) for label in labels.unique().tolist()]
    figure.legend(handles=names, loc="outside lower center", ncols=len(names), fontsize=16, frameon=False)
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", metavar="DIR", help="a folder of MNIST's idx files")
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--weight", type=float, default=0.03, help="of kdejsd's loss beside the error per pixel")
    parser.add_argument("--figure", default="before_after.png")
    options = parser.parse_args()

    data = MNIST(options.data, train_size=10_000) if options.data else Digits()
    images, held_out = (part[torch.arange(len(part))][0] for part in (data.training, data.held_out))
    torch.manual_seed(0)
    normal, columns = torch.randn(len(held_out), 2), []
    models = {
        "Autoencoder alone": (False, 0.0),
        "Codes normalised": (True, 0.0),
        "With kdejsd's loss": (True, options.weight),
    }
    for title, (normalize, weight) in models.items():
        encoder, decoder = train(images, options.steps, normalize, weight)
        with torch.no_grad():
            codes = encoder(held_out)
            error = nn.functional.mse_loss(decoder(codes), held_out)
            columns.append((title, codes, decoder(normal[: SIDE**2])))
        print(f"{title}: reconstruction error {error:.4f} on held-out images")
        print(f"their farthest code {codes.norm(dim=1).max():.1f} from 0")
        print(f"entropy of their whitened codes {kdejsd.kde_entropy(codes):.2f} nats")
    print(f"entropy of as many normal samples {kdejsd.kde_entropy(normal):.2f} nats")
    draw(options.figure, columns, data.held_out.labels, extent=5)


if __name__ == "__main__":
    main()
