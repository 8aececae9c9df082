"""Trains autoencoders whose codes follow other distributions than the normal: one of torch's, and one of your own.

The first target is a mixture of three long normals by torch.distributions. The second is the uniform distribution on a
square, which is written here. The picture shows the codes of held-out digits over the density of each target.

python distribution_target.py
"""

import argparse

import lightning.pytorch as pl
import torch
from matplotlib.figure import Figure
from torch.distributions import Categorical, MixtureSameFamily, MultivariateNormal, Normal

from kdejsd.data import Digits
from kdejsd.models import FC, GEN

# Ten colours that can be told apart with any colour vision.
COLORS = ["#3f90da", "#ffa90e", "#bd1f01", "#92dadd", "#832db6", "#a96b59", "#e76300", "#b9ac70", "#717581", "#94a4a2"]


def propeller():
    """Returns three normals around the middle, each about three times as long as wide."""
    angles = torch.tensor([3.0, 7.0, 11.0]) * torch.pi / 6
    along = torch.stack([angles.cos(), angles.sin()], 1)
    covariances = 0.1 * torch.eye(2) + 0.9 * along[:, :, None] * along[:, None, :]
    return MixtureSameFamily(Categorical(torch.ones(3)), MultivariateNormal(2 * along, covariances))


class Square:
    """The uniform distribution on a square, or what it becomes when normal noise of some deviation is added."""

    dim = 2

    def __init__(self, half=2.0, noise=0.0):
        self.half, self.noise = half, noise

    def log_prob(self, z):
        if self.noise == 0:
            share = (z.abs() <= self.half).float()
        else:
            normal = Normal(0.0, self.noise)
            share = normal.cdf(self.half - z) - normal.cdf(-self.half - z)
        return (share.clamp_min(1e-30) / (2 * self.half)).log().sum(-1)

    def sample(self, n, rng=None):
        uniform = self.half * (2 * torch.rand(n, 2, generator=rng) - 1)
        return uniform + self.noise * torch.randn(n, 2, generator=rng)

    def smoothed(self, bandwidth):
        return Square(self.half, (self.noise**2 + bandwidth**2) ** 0.5)


def draw(axes, name, target, codes, labels):
    line = torch.linspace(-4.5, 4.5, 300)
    density = target.log_prob(torch.cartesian_prod(line, line)).exp().reshape(300, 300).T
    levels = [share * float(density.max()) for share in (0.02, 0.1, 0.3, 0.6, 1.01)]
    axes.contourf(line, line, density, levels, cmap="Greys", alpha=0.35)
    axes.scatter(*codes.T, s=30, c=[COLORS[label] for label in labels], linewidths=0.5, edgecolors="w")
    axes.set_title(name, size=18)
    axes.set(aspect="equal", xticks=range(-4, 5, 2), yticks=range(-4, 5, 2))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--figure", default="distribution_target.png")
    options = parser.parse_args()

    digits = Digits()
    images, labels = digits.held_out.examples, digits.held_out.labels
    figure = Figure(figsize=(12, 6.3), dpi=100, layout="constrained")
    targets = {"Three long normals": propeller(), "A square": Square()}
    for axes, (name, target) in zip(figure.subplots(1, 2), targets.items(), strict=True):
        pl.seed_everything(0, verbose=False)
        networks = FC(digits.example_shape, latent_dim=2)
        model = GEN(networks.encoder, networks.decoder, 2, target=target, weight=0.3)
        trainer = pl.Trainer(max_steps=options.steps, logger=False, enable_checkpointing=False)
        trainer.fit(model, Digits())

        model.eval()
        rng = torch.Generator().manual_seed(0)
        with torch.no_grad():
            codes = model.encode(images)
            error = torch.nn.functional.mse_loss(model.decode(codes), images)
            of_codes, of_target = (model.jsd(z, rng) for z in (codes, model.target_samples(len(codes), rng)))
        print(f"{name}: reconstruction error {error:.4f} on held-out images")
        print(f"divergence of their codes {of_codes:.3f} nats, of as many samples of the target {of_target:.3f}")
        draw(axes, name, target, codes, labels)
    figure.savefig(options.figure)


if __name__ == "__main__":
    main()
