"""Builds encoder and decoder pairs: fully connected ones for examples of any shape, convolutional ones for images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import Tensor, nn

from .._numbers import integer


class AutoencoderNetworks(nn.Module):
    """Pairs an encoder, examples [n, ...] -> codes [n, l], with a decoder back to examples.

    Derive a class from it for networks of your own: set `encoder` and `decoder`.

    Example:
        >>> import torch
        >>> from kdejsd.models import AutoencoderNetworks
        >>> class Linear(AutoencoderNetworks):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.encoder = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 2))
        ...         self.decoder = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Unflatten(1, (1, 8, 8)))
        >>> Linear()(torch.zeros(5, 1, 8, 8)).shape
        torch.Size([5, 1, 8, 8])
    """

    encoder: nn.Module
    decoder: nn.Module

    def forward(self, examples: Tensor) -> Tensor:
        """Returns the examples after encoding and decoding."""
        reconstruction: Tensor = self.decoder(self.encoder(examples))
        return reconstruction


Network = Callable[[Sequence[int], int], AutoencoderNetworks]  # from (example_shape, latent_dim)


class FC(AutoencoderNetworks):
    """Builds fully connected networks from an example's values to l codes and back, with ReLU between the layers.

    For images (C, H, W), whose values are in [0, 1], the decoder ends with a sigmoid. Examples of any other shape, such
    as rows of d columns (d,), can have any values, so there is no sigmoid.

    Args:
        example_shape: the shape of one example.
        latent_dim: l.
        hidden: widths of the encoder's hidden layers, in order; the decoder has them in reverse. None is (512, 256) for
            images and (128, 128, 128) for examples of any other shape.

    Raises:
        ValueError: if a size is below 1, or there is no hidden layer.

    Example:
        >>> import torch
        >>> from kdejsd.models import FC
        >>> networks = FC((1, 8, 8), latent_dim=2)
        >>> networks.encoder(torch.zeros(5, 1, 8, 8)).shape, networks.decoder(torch.zeros(5, 2)).shape
        (torch.Size([5, 2]), torch.Size([5, 1, 8, 8]))
    """

    def __init__(self, example_shape: Sequence[int], latent_dim: int, hidden: Sequence[int] | None = None) -> None:
        super().__init__()
        shape = tuple(integer("example_shape", size, 1) for size in example_shape)
        if not shape:
            raise ValueError("example_shape must have at least one dimension, got none")
        images = len(shape) == 3
        if hidden is None:
            hidden = (512, 256) if images else (128, 128, 128)
        if not hidden:
            raise ValueError("hidden must have one width at least, got none")
        hidden = [integer("hidden", width, 1) for width in hidden]
        latent_dim = integer("latent_dim", latent_dim, 1)
        widths = [math.prod(shape), *hidden, latent_dim]
        self.encoder = nn.Sequential(nn.Flatten(), *linear_stack(widths))
        end = [nn.Sigmoid()] if images else []
        self.decoder = nn.Sequential(*linear_stack(widths[::-1]), *end, nn.Unflatten(1, shape))


class Conv(AutoencoderNetworks):
    """Builds convolutional networks for square images of side 28, 32 or 64.

    Every layer of the encoder halves the side (kernel 4, stride 2, padding 1) and doubles the channels, until the side
    is 4 (3 for 28). A linear layer follows. The decoder mirrors it. Batch normalisation and ReLU stand between the
    layers.

    Args:
        example_shape: (C, H, W), H = W = 28, 32 or 64.
        latent_dim: l.
        channels: the number of channels of the first layer.
        encoder_batch_norm: False leaves batch normalisation out of the encoder. Use it for the discriminator of a GAN
            with a gradient penalty, where an image's output must not depend on the others of its minibatch.

    Raises:
        ValueError: if the images have another size, or a size is below 1.

    Example:
        >>> import torch
        >>> from kdejsd.models import Conv
        >>> networks = Conv((3, 32, 32), latent_dim=16)
        >>> networks.encoder(torch.zeros(5, 3, 32, 32)).shape
        torch.Size([5, 16])
    """

    def __init__(
        self, example_shape: Sequence[int], latent_dim: int, channels: int = 32, encoder_batch_norm: bool = True
    ) -> None:
        super().__init__()
        shape = _image_shape(example_shape)
        if shape[1] != shape[2] or shape[1] not in (28, 32, 64):
            raise ValueError(
                f"Conv takes square images of side 28, 32 or 64, got example_shape {list(shape)}; FC takes any"
            )
        channels, latent_dim = integer("channels", channels, 1), integer("latent_dim", latent_dim, 1)
        down: list[nn.Module] = []
        up: list[nn.Module] = []
        side, inputs, outputs = shape[1], shape[0], channels
        while side > 4:
            down += _halving(inputs, outputs, encoder_batch_norm)
            # 7 is halved to 3, and one row more is needed to come back to 7
            back = nn.ConvTranspose2d(outputs, inputs, 4, stride=2, padding=1, output_padding=side % 2)
            up = [nn.BatchNorm2d(outputs), nn.ReLU(), back, *up]
            side, inputs, outputs = side // 2, outputs, 2 * outputs
        bottom = (inputs, side, side)
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(math.prod(bottom), latent_dim))
        self.decoder = nn.Sequential(
            nn.Linear(latent_dim, math.prod(bottom)), nn.Unflatten(1, bottom), *up, nn.Sigmoid()
        )


class DeepConv(AutoencoderNetworks):
    """Builds the networks of the LC-VAE paper, for images of 28 x 28.

    The encoder has four convolutions of 128, 256, 512 and 1024 channels (kernel 4, stride 2, padding 1: side 28 - 14 -
    7 - 3 - 1), each with batch normalisation and ReLU, then one linear layer. The decoder has a linear layer to 256 x 7
    x 7 and two transposed convolutions that double the side, the first to 128 channels. Batch normalisation and ReLU
    stand between them, and a sigmoid at the end. (The paper prints the padding "SAME", with which the last side would
    be 2 and not 1, and names no batch normalisation after the decoder's linear layer.)

    Args:
        example_shape: (C, 28, 28).
        latent_dim: l.
        channels: the number of channels of the first convolution; all others are multiples of it.

    Raises:
        ValueError: if the images have another size, or a size is below 1.

    Source: Naren Manoj, "On the Density of the Latent Space of Deep Generative Models" (2018), Tables 1 and 2.

    Example:
        >>> import torch
        >>> from kdejsd.models import DeepConv
        >>> networks = DeepConv((1, 28, 28), latent_dim=8, channels=16)
        >>> networks.decoder(torch.zeros(2, 8)).shape
        torch.Size([2, 1, 28, 28])
    """

    def __init__(self, example_shape: Sequence[int], latent_dim: int, channels: int = 128) -> None:
        super().__init__()
        colors, *sides = _image_shape(example_shape)
        if sides != [28, 28]:
            raise ValueError(
                f"{type(self).__name__} takes images of 28 x 28, got example_shape {list(example_shape)}; FC takes any"
            )
        channels, latent_dim = integer("channels", channels, 1), integer("latent_dim", latent_dim, 1)
        widths = [colors, channels, 2 * channels, 4 * channels, 8 * channels]
        down = [layer for inputs, outputs in pairwise(widths) for layer in _halving(inputs, outputs)]
        bottom = (2 * channels, 7, 7)
        self.encoder = nn.Sequential(*down, nn.Flatten(), nn.Linear(widths[-1], latent_dim))
        self.decoder = nn.Sequential(
            *(nn.Linear(latent_dim, math.prod(bottom)), nn.Unflatten(1, bottom)),
            *(nn.BatchNorm2d(2 * channels), nn.ReLU()),
            *(nn.ConvTranspose2d(2 * channels, channels, 4, stride=2, padding=1), nn.BatchNorm2d(channels), nn.ReLU()),
            *(nn.ConvTranspose2d(channels, colors, 4, stride=2, padding=1), nn.Sigmoid()),
        )


class HalfDeepConv(DeepConv):
    """Builds `DeepConv` at half the width, for the CPU, with about a quarter of the work.

    The encoder has 64, 128, 256 and 512 channels, and the decoder begins at 128 x 7 x 7. This is not the paper's
    network. It takes the arguments of `DeepConv` except `channels`, and raises the same errors.

    Example:
        >>> from kdejsd.models import HalfDeepConv
        >>> [layer.out_channels for layer in HalfDeepConv((1, 28, 28), latent_dim=8).encoder[:12:3]]
        [64, 128, 256, 512]
    """

    def __init__(self, example_shape: Sequence[int], latent_dim: int) -> None:
        super().__init__(example_shape, latent_dim, channels=64)


def _halving(inputs: int, outputs: int, batch_norm: bool = True) -> list[nn.Module]:
    """Returns a convolution that halves the side of images, batch normalisation and ReLU."""
    norm = [nn.BatchNorm2d(outputs)] if batch_norm else []
    return [nn.Conv2d(inputs, outputs, 4, stride=2, padding=1), *norm, nn.ReLU()]


def linear_stack(widths: Sequence[int]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return layers[:-1]


def _image_shape(example_shape: Sequence[int]) -> tuple[int, int, int]:
    if len(example_shape) != 3 or min(example_shape) < 1:
        raise ValueError(f"example_shape must be (channels, height, width), each at least 1, got {list(example_shape)}")
    channels, height, width = example_shape
    return channels, height, width
