"""Encoder and decoder pairs for images: fully connected and convolutional."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn


class AutoencoderNetworks(nn.Module):
    """An encoder, images [n, C, H, W] -> codes [n, l], and a decoder back to images in [0, 1]."""

    encoder: nn.Module
    decoder: nn.Module

    def forward(self, images: Tensor) -> Tensor:
        """The images after encoding and decoding."""
        reconstruction: Tensor = self.decoder(self.encoder(images))
        return reconstruction


Network = Callable[[Sequence[int], int], AutoencoderNetworks]  # from (image_shape, latent_dim)


class FC(AutoencoderNetworks):
    """Fully connected: pixels - 512 - 256 - l and back, with ReLU between and a sigmoid at the end.

    Args:
        image_shape: (C, H, W), any.
        latent_dim: l.
        hidden: widths of the encoder's hidden layers, in order; the decoder has them in reverse.

    Raises:
        ValueError: sizes below 1, or no hidden layer.
    """

    def __init__(self, image_shape: Sequence[int], latent_dim: int, hidden: Sequence[int] = (512, 256)) -> None:
        super().__init__()
        shape = _image_shape(image_shape)
        if not hidden or min(hidden) < 1 or latent_dim < 1:
            raise ValueError(f"hidden and latent_dim must be at least 1, got {list(hidden)} and {latent_dim}")
        widths = [math.prod(shape), *hidden, latent_dim]
        self.encoder = nn.Sequential(nn.Flatten(), *linear_stack(widths))
        self.decoder = nn.Sequential(*linear_stack(widths[::-1]), nn.Sigmoid(), nn.Unflatten(1, shape))


class Conv(AutoencoderNetworks):
    """Convolutional, for square images of side 28, 32 or 64: every layer halves the side (kernel 4, stride 2, padding
    1) and doubles the channels until the side is 4 (3 for 28), then one linear layer; the decoder mirrors it. Batch
    normalisation and ReLU between.

    Args:
        image_shape: (C, H, W), H = W = 28, 32 or 64.
        latent_dim: l.
        channels: of the first layer.

    Raises:
        ValueError: another image size, or sizes below 1.
    """

    def __init__(self, image_shape: Sequence[int], latent_dim: int, channels: int = 32) -> None:
        super().__init__()
        shape = _image_shape(image_shape)
        if shape[1] != shape[2] or shape[1] not in (28, 32, 64):
            raise ValueError(
                f"Conv takes square images of side 28, 32 or 64, got image_shape {list(shape)}; FC takes any"
            )
        if channels < 1 or latent_dim < 1:
            raise ValueError(f"channels and latent_dim must be at least 1, got {channels} and {latent_dim}")
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        side, inputs, outputs = shape[1], shape[0], channels
        while side > 4:
            down += [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), nn.BatchNorm2d(outputs), nn.ReLU()]
            # 7 is halved to 3, and one row more is needed to come back to 7
            back = nn.ConvTranspose2d(outputs, inputs, 4, stride=2, padding=1, output_padding=side % 2)
            up = [nn.BatchNorm2d(outputs), nn.ReLU(), back, *up]
            side, inputs, outputs = side // 2, outputs, 2 * outputs
        bottom = (inputs, side, side)
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(math.prod(bottom), latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, math.prod(bottom)), nn.Unflatten(1, bottom), *up, nn.Sigmoid()
        )


def linear_stack(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return layers[:-1]


def _image_shape(image_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(image_shape) != 3 or min(image_shape) < 1:
        raise ValueError(f"image_shape must be (channels, height, width), each at least 1, got {list(image_shape)}")
    channels, height, width = image_shape
    return channels, height, width
