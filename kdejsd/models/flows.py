"""Builds normalising flows: invertible maps with a known Jacobian determinant."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .._numbers import integer
from ..reference.kde import normal_log_prob
from .networks import linear_stack


class RealNVP(nn.Module):
    """Models a density by an invertible map f: log p(z) = log N(f(z); 0, I) + log|det J_f(z)|.

    Use it as a learned prior (`VAE` with prior="flow"), or train it on samples by its `log_prob`. f consists of affine
    coupling layers. In each, one half of the dimensions passes unchanged, and determines the factors and shifts that
    are applied to the other half. The halves (even and odd dimensions) change places from layer to layer. The flow
    begins as the identity.

    Args:
        dim: l, at least 2.
        layers: the number of coupling layers.
        hidden: width of the two hidden layers of each coupling layer's network.

    Raises:
        ValueError: if dim is below 2, or layers or hidden is below 1.

    Source: Dinh, Sohl-Dickstein, Bengio, "Density estimation using Real NVP", https://arxiv.org/abs/1605.08803, section
    3.

    Example:
        >>> import torch
        >>> from kdejsd.models import RealNVP
        >>> flow = RealNVP(dim=2)  # the identity, until it is trained
        >>> z = torch.tensor([[1.0, -1.0]])
        >>> u, log_det = flow(z)
        >>> torch.allclose(flow.inverse(u), z), flow.log_prob(z)
        (True, tensor([-2.8379], grad_fn=<...>))
    """

    def __init__(self, dim: int, layers: int = 10, hidden: int = 128) -> None:
        super().__init__()
        dim = integer("dim", dim, 2)
        layers, hidden = integer("layers", layers, 1), integer("hidden", hidden, 1)
        self.dim = dim
        self.couplings = nn.ModuleList(_Coupling(dim, i % 2, hidden) for i in range(layers))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Returns f(z) [n, l] and log|det J_f(z)| [n] at z [n, l]."""
        log_det = z.new_zeros(z.shape[0])
        for coupling in self.couplings:
            z, change = coupling(z)
            log_det = log_det + change
        return z, log_det

    def inverse(self, u: Tensor) -> Tensor:
        """Returns the z [n, l] with f(z) = u [n, l]."""
        for coupling in reversed(self.couplings):
            assert isinstance(coupling, _Coupling)
            u = coupling.inverse(u)
        return u

    def log_prob(self, z: Tensor) -> Tensor:
        """Returns the log-density in nats at z [n, l], as [n]."""
        u, log_det = self.forward(z)
        return normal_log_prob(u, 1.0) + log_det


class Inverse(nn.Module):
    """Makes a module of the inverse of a flow."""

    def __init__(self, flow: RealNVP) -> None:
        super().__init__()
        self.flow = flow

    def forward(self, u: Tensor) -> Tensor:
        return self.flow.inverse(u)


class _Coupling(nn.Module):
    """Scales and shifts every second dimension, from 1 - `kept` on, by amounts that depend on the others."""

    def __init__(self, dim: int, kept: int, hidden: int) -> None:
        super().__init__()
        self.kept, self.changed = slice(kept, None, 2), slice(1 - kept, None, 2)
        inputs, outputs = len(range(dim)[self.kept]), len(range(dim)[self.changed])
        self.net = nn.Sequential(*linear_stack([inputs, hidden, hidden, 2 * outputs]))
        last = self.net[-1]
        assert isinstance(last, nn.Linear)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def _scale_and_shift(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self.net(z[:, self.kept]).chunk(2, 1)
        return 2 * torch.tanh(log_scale / 2), shift  # a layer's factor is at most e^2, so that no product overflows

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        log_scale, shift = self._scale_and_shift(z)
        u = z.clone()
        u[:, self.changed] = z[:, self.changed] * log_scale.exp() + shift
        return u, log_scale.sum(1)

    def inverse(self, u: Tensor) -> Tensor:
        log_scale, shift = self._scale_and_shift(u)
        z = u.clone()
        z[:, self.changed] = (u[:, self.changed] - shift) * (-log_scale).exp()
        return z
