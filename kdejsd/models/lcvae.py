"""Defines LC-VAE, a variational autoencoder with a penalty on codes that are farther apart than their examples."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from .._numbers import not_negative, positive
from ..ops.omega import omega
from .vae import VAE


class LCVAE(VAE):
    """Trains an LC-VAE: a VAE with a Lipschitz penalty on its encoder f and a constraint on the encoder's weights.

    The loss adds lambda omega to the VAE's KL. Everything is in nats of one example, times 2 s^2 / D (see `VAE`):

        mean squared error per value + (2 s^2 / D) (KL(posterior | prior) + lambda omega)

        omega = mean over the minibatch's pairs (i, i + b/2) of |f(x_i) - f(x_j)|^2 / |x_i - x_j|^2

    With the default s^2 = 1/2 this is the sum of squared errors + KL + lambda omega, divided by D. The paper has the
    sum of omega over the pairs, beside the KL and "the l2 norm between two images" (Appendix A.1), and does not say
    over what these are summed or averaged. We take the mean over the pairs and the sum of squared errors over the
    values; lambda = 30 then has the size of about a nat on MNIST. f(x) is the code of `encode`, the posterior's mean:
    omega bounds a map, and samples would add their variance to it. The last example of an odd minibatch is in no pair.
    Equal examples in a pair count as 0.

    Watch out: omega falls with the square of the codes' scale, whatever their arrangement. On MNIST nothing else
    happens (bench/results/papers). Examples are about equally far apart, so omega is little else than the variance of
    the codes. The encoder shrinks them, and leaves holes in the prior. `scale_free` prevents this: it divides omega by
    the variance of the minibatch's codes (the mean over the dimensions), as if the codes had been divided by their
    standard deviation. (All dimensions share one scale: a scale for each would blow up those that the posterior leaves
    to the prior.) Codes then keep their scale, but there is little left to gain. A larger lambda only yields a few far
    codes of examples that are far from all others.

    The constraint on the weights is one of these. Batch normalisation undoes any of them: it divides by the standard
    deviation of its input, and has a scale of its own.

    * "clip", the paper's: after each step the weights of the encoder's convolution and linear layers are clamped to
      [-clip, clip]. Biases, which have no part in a Lipschitz constant, and batch normalisation are left alone. This
      bounds each weight and so, very loosely, the norms; layers of many inputs start and mostly stay far inside the
      bounds.
    * "spectral", a better one, which the paper leaves open: these layers are divided by their largest singular value
      (`torch.nn.utils.parametrizations.spectral_norm`, one power iteration per step; of a convolution that of its
      kernel as a matrix [out, in x height x width]). The encoder that is given is changed in place. For fully connected
      networks f's Lipschitz constant is then at most 1; a convolution of kernel 4 and stride 2 has at most twice its
      kernel's norm.
    * "none".

    In addition to a VAE's measures it logs per step `loss/omega`, as it is in the loss, before lambda.

    Args:
        encoder, decoder, latent_dim: as in `VAE`.
        omega_weight: lambda, the weight of omega relative to the KL.
        constraint: "clip", "spectral" or "none".
        clip: c, the largest absolute value of a weight with "clip".
        scale_free: divide omega by the variance of the codes; NaN for codes that are all equal.
        kwargs: as in `VAE`.

    Raises:
        ValueError: if omega_weight is negative, the constraint is unknown, clip is not positive and finite, a minibatch
            has a single example, and in the cases of `VAE`.

    Source: Naren Manoj, "On the Density of the Latent Space of Deep Generative Models" (2018), section 4.

    Example:
        >>> import torch
        >>> from kdejsd.models import FC, LCVAE
        >>> encoder, decoder = FC((1, 8, 8), latent_dim=4).encoder, FC((1, 8, 8), latent_dim=2).decoder
        >>> model = LCVAE(encoder, decoder, latent_dim=2, omega_weight=10)
        >>> model.encode(torch.rand(5, 1, 8, 8)).shape
        torch.Size([5, 2])
        >>> model.settings()["omega_weight"], model.settings()["constraint"]
        (10.0, 'clip at 0.3')
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        omega_weight: float = 30.0,
        constraint: Literal["clip", "spectral", "none"] = "clip",
        clip: float = 0.30,
        scale_free: bool = False,
        **kwargs: Any,
    ) -> None:
        omega_weight = not_negative("omega_weight", omega_weight)
        clip = positive("clip", clip)
        if constraint not in ("clip", "spectral", "none"):
            raise ValueError(f'constraint must be "clip", "spectral" or "none", got {constraint!r}')
        super().__init__(encoder, decoder, latent_dim, **kwargs)
        self.omega_weight = omega_weight
        self.constraint = constraint
        self.clip = clip
        self.scale_free = scale_free
        self._weighted = [layer for layer in encoder.modules() if isinstance(layer, (nn.Conv2d, nn.Linear))]
        if constraint == "spectral":
            for layer in self._weighted:
                spectral_norm(layer)

    def penalty(self, examples: Tensor, mean: Tensor) -> Tensor:
        """Returns lambda omega, 0-dim, after logging omega."""
        even = len(examples) - len(examples) % 2
        if even == 0:
            raise ValueError(f"a minibatch of LCVAE must have at least 2 examples, got {len(examples)}")
        codes = self._code(mean)[:even].to(examples.dtype)  # which mixed precision has made another
        value = omega(examples[:even], codes, pairs="halves", reduction="mean")
        if self.scale_free:
            value = value / codes.var(0).mean()
        self.log_terms({"loss/omega": value})
        return self.omega_weight * value

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        if self.constraint == "clip":
            with torch.no_grad():
                for layer in self._weighted:
                    layer.weight.clamp_(-self.clip, self.clip)

    def settings(self) -> dict[str, object]:
        constraint = f"clip at {self.clip}" if self.constraint == "clip" else self.constraint
        return super().settings() | {
            "omega_weight": self.omega_weight,
            "constraint": constraint,
            "scale_free": self.scale_free,
        }
