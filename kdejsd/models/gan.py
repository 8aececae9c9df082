"""Defines generative adversarial networks: a discriminator teaches a generator to make examples like real ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn

from .._extras import train_extra
from .._numbers import integer, not_negative, positive
from ..data import Batch
from ..targets import StandardNormal
from .base import GenerativeModel, checked, inputs
from .f_divergences import FDivergence, by_name
from .networks import Network

with train_extra():
    from lightning.pytorch.core.optimizer import LightningOptimizer

Objective = Literal[
    "minimax",
    "non-saturating",
    "wgan",
    "wgan-gp",
    "f-kl",
    "f-reverse-kl",
    "f-pearson",
    "f-squared-hellinger",
    "f-jensen-shannon",
    "f-gan",
]
_PENALTIES = {"wgan-gp": 10.0, "f-kl": 1.0, "f-pearson": 1.0}
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)


class GAN(GenerativeModel):
    """Trains a generative adversarial network; the objective selects the divergence that it minimises.

    The discriminator V gives each example a number. It learns to tell real examples x from generated ones G(z), z
    standard normal, by raising a lower bound on a divergence between them. The generator learns to lower it.

    With softplus(v) = log(1 + exp v), and sigmoid(V) the probability that an example is real, the objectives are:

        objective        the discriminator lowers                              the generator lowers
        minimax          mean softplus(-V(x)) + mean softplus(V(G(z)))         -mean softplus(V(G(z)))
        non-saturating   the same                                              mean softplus(-V(G(z)))
        wgan             mean V(G(z)) - mean V(x), weights kept in [-c, c]     -mean V(G(z))
        wgan-gp          the same + gradient_penalty * penalty, no clipping    the same
        f-...            mean f*(g_f(V(G(z)))) - mean g_f(V(x))                -mean f*(g_f(V(G(z))))

    Any objective can have a gradient penalty. That of "wgan-gp" keeps the slope of V near 1 between real and generated
    examples. That of the others is half the mean of |grad V(x)|^2 at real examples (R1). Without it "f-kl" and
    "f-pearson" can diverge.

    "f-..." stands for "f-" and the name of one of `kdejsd.models.f_divergences`. Its generator lowers the bound itself
    (Algorithm 1 of the f-GAN paper), so the named divergence is the one that is minimised. The heuristic of section 3.2
    of that paper is here for f = "gan" alone, where it is "non-saturating". ("f-gan" itself is "minimax".)

    With packing p the discriminator sees p examples at a time, side by side as channels. It then recognises more easily
    a generator that makes few different examples.

    A step is a minibatch, in which the discriminator trains. In every `discriminator_steps`-th one the generator trains
    too, with latents of its own. Both are trained by Adam.

    It logs per step `loss/discriminator` and, where it trains, `loss/generator` (the losses above). It also logs
    `loss/divergence`, the minibatch's estimate of the divergence by the current discriminator:

    * for "minimax" and "non-saturating" the JSD in nats, 0 to log 2;
    * for the WGANs mean V(x) - mean V(G(z)). This is the Wasserstein distance times V's unknown Lipschitz constant,
      which is about 1 for "wgan-gp";
    * for the others the bound of the f-divergence.

    Per epoch it logs `val/divergence`, the estimate on held-out examples. With batch normalisation in the discriminator
    this bound is looser, since its running statistics are those of real and generated examples together.

    Args:
        generator: latents [n, l] -> examples [n, ...].
        discriminator: examples [n, p C, ...] -> V, [n] or [n, 1], any real number.
        latent_dim: l, the dimension of the latents.
        objective: the divergence that is minimised, with its losses; the documentation of `GAN` has a table of them.
        packing: p, the number of examples that the discriminator sees at a time; the minibatch must be a multiple of
            it.
        discriminator_steps: the number of steps of the discriminator for one of the generator; None is 5 for the WGANs,
            as in their papers, and else 1.
        clip: c, the largest absolute value of the discriminator's weights for "wgan".
        gradient_penalty: the weight of the gradient penalty. None is 10 for "wgan-gp", 1 for "f-kl" and "f-pearson",
            and 0, no penalty, for the others. The 10 is that of the paper, for images; "wgan-gp" learns points of the
            plane (`kdejsd.data.Grid2D`) much faster by 0.1.
        learning_rate: the learning rate of Adam. The default is for small fully connected networks; convolutions are
            usually trained by 2e-4.
        decay: lower the learning rate to 0 along a half cosine over the run, if its end is given in steps or epochs.
        betas: Adam's betas; None is (0, 0.9) for the WGANs and else (0.5, 0.999). (The authors of "wgan" found its
            critic unstable with momentum and trained it by RMSProp, which is Adam with a first beta of 0 up to the bias
            correction.)

    Raises:
        ValueError: if the objective is unknown, packing or discriminator_steps is below 1, clip is not positive,
            gradient_penalty is negative, or a discriminator with a gradient penalty has batch normalisation: the
            gradient of an example's output would depend on the other examples.

    Source of "minimax" and "non-saturating": Goodfellow et al., "Generative Adversarial Networks",
    https://arxiv.org/abs/1406.2661; of "wgan": Arjovsky, Chintala, Bottou, "Wasserstein GAN",
    https://arxiv.org/abs/1701.07875; of "wgan-gp": Gulrajani et al., "Improved Training of Wasserstein GANs",
    https://arxiv.org/abs/1704.00028; of R1: Mescheder, Geiger, Nowozin, "Which Training Methods for GANs do actually
    Converge?", https://arxiv.org/abs/1801.04406; of "f-...": Nowozin, Cseke, Tomioka, "f-GAN",
    https://arxiv.org/abs/1606.00709; of packing: Lin, Khetan, Fanti, Oh, "PacGAN",
    https://arxiv.org/abs/1712.04086.

    Example:
        >>> import torch
        >>> from kdejsd.models import FC, GAN
        >>> generator, discriminator = FC((1, 8, 8), latent_dim=2).decoder, FC((1, 8, 8), latent_dim=1).encoder
        >>> model = GAN(generator, discriminator, latent_dim=2, objective="wgan-gp")
        >>> model.sample(10).shape, model.discriminate(model.sample(10)).shape
        (torch.Size([10, 1, 8, 8]), torch.Size([10]))
        >>> model.divergence_name
        "critic's mean difference"
    """

    def __init__(
        self,
        generator: nn.Module,
        discriminator: nn.Module,
        latent_dim: int,
        objective: Objective = "non-saturating",
        packing: int = 1,
        discriminator_steps: int | None = None,
        clip: float = 0.01,
        gradient_penalty: float | None = None,
        learning_rate: float = 1e-3,
        decay: bool = True,
        betas: tuple[float, float] | None = None,
    ) -> None:
        if objective not in get_args(Objective):
            raise ValueError(f"objective must be one of {', '.join(get_args(Objective))}, got {objective!r}")
        packing = integer("packing", packing, 1)
        if discriminator_steps is not None:
            discriminator_steps = integer("discriminator_steps", discriminator_steps, 1)
        clip = positive("clip", clip)
        if gradient_penalty is None:
            gradient_penalty = _PENALTIES.get(objective, 0.0)
        gradient_penalty = not_negative("gradient_penalty", gradient_penalty)
        if gradient_penalty and any(isinstance(part, _BATCH_NORMS) for part in discriminator.modules()):
            raise ValueError(
                f'discriminator must have no batch normalisation for objective "{objective}" with a gradient penalty '
                f"of {gradient_penalty:g}, which is of each example's own gradient; Conv leaves it out with "
                "--model.network.encoder_batch_norm false; --model.gradient_penalty 0 is without a penalty"
            )
        wasserstein = objective in ("wgan", "wgan-gp")
        if betas is None:
            betas = (0.0, 0.9) if wasserstein else (0.5, 0.999)
        super().__init__(latent_dim, learning_rate, decay, betas)
        self.target = StandardNormal(latent_dim)
        self.generator = generator
        self.discriminator = discriminator
        self.objective = objective
        self.packing = packing
        steps = (5 if wasserstein else 1) if discriminator_steps is None else discriminator_steps
        self.discriminator_steps = steps
        self.clip = clip
        self.gradient_penalty = gradient_penalty
        self.losses = losses(objective)
        self.automatic_optimization = False

    @staticmethod
    def build_networks(
        network: Network, example_shape: Sequence[int], latent_dim: int, settings: Mapping[str, Any]
    ) -> tuple[nn.Module, nn.Module]:
        """Returns the decoder of one pair, and the encoder of another one, from packed examples to one number."""
        packing = integer("packing", settings.get("packing", 1), 1)
        channels, *size = example_shape
        return network(example_shape, latent_dim).decoder, network((packing * channels, *size), 1).encoder

    # Use

    def forward(self, latents: Tensor) -> Tensor:
        """Returns examples [n, ...] decoded from latents [n, l]."""
        return self.decode(latents)

    def predict_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Returns the "samples" [n, ...] decoded from latents [n, l]: the batch itself, or the first of its parts.

        Raises:
            TypeError: if there is no tensor.
            ValueError: if the latents have another shape.
        """
        latents = inputs(batch)
        if latents.ndim != 2 or latents.shape[1] != self.latent_dim:
            raise ValueError(f"latents must have shape [n, latent_dim = {self.latent_dim}], got {list(latents.shape)}")
        return {"samples": self.decode(latents)}

    def discriminate(self, examples: Tensor) -> Tensor:
        """Returns V of examples [n, ...], p at a time, as [n / p].

        Raises:
            ValueError: if n is no multiple of p, or the discriminator's output has another shape.
        """
        packed = pack(examples, self.packing)
        output: Tensor = self.discriminator(packed)
        if output.shape not in ((len(packed),), (len(packed), 1)):
            raise ValueError(
                f"discriminator must return [{len(packed)}] or [{len(packed)}, 1], got {list(output.shape)}"
            )
        return output.reshape(-1)

    def divergence(self, examples: Tensor, generated: Tensor) -> Tensor:
        """Returns the objective's estimate of the divergence between real and generated examples, each [n, ...].

        It is 0-dim, and computed with the discriminator as it is now. `divergence_name` says which divergence it
        estimates, and in which unit.
        """
        return self.losses.divergence(self.discriminate(examples), self.discriminate(generated))

    @property
    def divergence_name(self) -> str:
        """Returns the name of the divergence that `divergence` estimates, with its unit."""
        return self.losses.name

    # Training

    def configure_optimizers(self) -> Any:
        return self.adam(self.generator.parameters(), self.discriminator.parameters())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        examples = checked(batch)[0]
        generator, discriminator = cast("list[LightningOptimizer]", self.optimizers())

        with torch.no_grad():
            generated = self.decode(self.target_samples(len(examples)))
        if generated.shape != examples.shape:
            raise ValueError(
                f"generator must return the shape of the examples, {list(examples.shape)}, got {list(generated.shape)}"
            )
        real, fake = self.discriminate(examples), self.discriminate(generated)
        told = self.losses.discriminator(real, fake)
        if self.gradient_penalty:
            packed = (pack(part, self.packing) for part in (examples, generated))
            told = told + self.gradient_penalty * self.penalty(*packed)
        divergence = self.losses.divergence(real, fake).detach()
        self.log_terms({"loss/discriminator": told, "loss/divergence": divergence})
        discriminator.zero_grad()
        self.manual_backward(told)
        discriminator.step()  # which the trainer counts: a step for each minibatch
        if self.objective == "wgan":
            with torch.no_grad():
                for weight in self.discriminator.parameters():
                    weight.clamp_(-self.clip, self.clip)

        if self.trainer.global_step % self.discriminator_steps == 0:
            with generator.toggle_model():  # the discriminator's weights get no gradient
                fooled = self.losses.generator(self.discriminate(self.decode(self.target_samples(len(examples)))))
                self.log_terms({"loss/generator": fooled})
                generator.zero_grad()
                self.manual_backward(fooled)
                # Not generator.step(), which would be counted too.
                self.trainer.strategy.optimizer_step(generator.optimizer, lambda: None)
        self.step_schedulers()

    @torch.compiler.disable  # which has no second derivatives
    def penalty(self, examples: Tensor, generated: Tensor) -> Tensor:
        """Returns the gradient penalty at packed examples [n, ...], without its weight, 0-dim."""
        if self.objective == "wgan-gp":
            return gradient_penalty(self.discriminator, examples, generated)
        return real_gradient_penalty(self.discriminator, examples)

    # Evaluation

    def on_validation_epoch_start(self) -> None:
        self._rng = torch.Generator().manual_seed(0)  # the same latents every time

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        examples = checked(batch)[0]
        examples = examples[: len(examples) // self.packing * self.packing]
        if len(examples):  # the last batch can be smaller than a pack
            generated = self.decode(self.target_samples(len(examples), self._rng))
            self.log("val/divergence", self.divergence(examples, generated), prog_bar=True, batch_size=len(examples))

    # Reports

    def settings(self) -> dict[str, Any]:
        return super().settings() | {
            "objective": self.objective,
            "packing": self.packing,
            "discriminator_steps": self.discriminator_steps,
            "gradient_penalty": self.gradient_penalty,
        }


@dataclass(frozen=True)
class Wasserstein:
    """Computes the losses of a critic with outputs [n], each 0-dim, without the penalty."""

    name: ClassVar[str] = "critic's mean difference"

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        """Returns the loss that the discriminator lowers."""
        return fake.mean() - real.mean()

    def generator(self, fake: Tensor) -> Tensor:
        """Returns the loss that the generator lowers."""
        return -fake.mean()

    def divergence(self, real: Tensor, fake: Tensor) -> Tensor:
        """Returns the estimate that both losses belong to."""
        return real.mean() - fake.mean()


@dataclass(frozen=True)
class Variational:
    """Computes the losses of the lower bound of an f-divergence, for outputs [n], each 0-dim.

    Args:
        f: the divergence.
        heuristic: let the generator raise g_f(V) instead of lowering the bound (f-GAN, section 3.2).
    """

    f: FDivergence
    heuristic: bool = False

    @property
    def name(self) -> str:
        return f"lower bound of {self.f.name}"

    def discriminator(self, real: Tensor, fake: Tensor) -> Tensor:
        return -self.f.bound(real, fake)

    def generator(self, fake: Tensor) -> Tensor:
        return -(self.f.output(fake) if self.heuristic else self.f.fake_term(fake)).mean()

    def divergence(self, real: Tensor, fake: Tensor) -> Tensor:
        return self.f.bound(real, fake)


@dataclass(frozen=True)
class CrossEntropy(Variational):
    """Computes the losses of f = "gan", whose bound is 2 JSD - 2 log 2: the first GANs' losses are cross-entropies."""

    name: ClassVar[str] = "JSD, nats"

    def divergence(self, real: Tensor, fake: Tensor) -> Tensor:
        return math.log(2) + super().divergence(real, fake) / 2


def losses(objective: Objective) -> Wasserstein | Variational:
    """Returns the losses of an objective."""
    if objective in ("wgan", "wgan-gp"):
        return Wasserstein()
    if objective in ("minimax", "non-saturating"):
        return CrossEntropy(by_name("gan"), heuristic=objective == "non-saturating")
    return Variational(by_name(objective.removeprefix("f-")))


def pack(examples: Tensor, packing: int) -> Tensor:
    """Reshapes examples [n, ...] to [n / p, p C, ...]: p in a row stand side by side as channels, or as columns.

    Raises:
        ValueError: if n is no multiple of p.
    """
    if len(examples) % packing:
        raise ValueError(f"a batch must be a multiple of packing = {packing} examples, got {len(examples)}")
    return examples.reshape(-1, packing * examples.shape[1], *examples.shape[2:])


def gradient_penalty(discriminator: nn.Module, examples: Tensor, generated: Tensor) -> Tensor:
    """Returns the mean of (|grad V| - 1)^2 at points between real and generated examples.

    Each pair has one point, evenly distributed on the straight line between its examples (Algorithm 1 of the paper).
    The result is 0-dim and differentiable in the discriminator's weights.

    Args:
        discriminator: examples [n, ...] -> V, [n] or [n, 1]; an example's output must depend on that example alone.
        examples, generated: [n, ...] each.

    Source: Gulrajani et al., "Improved Training of Wasserstein GANs", https://arxiv.org/abs/1704.00028.
    """
    one_each = [len(examples), *[1] * (examples.ndim - 1)]
    share = torch.rand(one_each, dtype=examples.dtype, device=examples.device)
    between = torch.lerp(examples.detach(), generated.detach().to(examples), share).requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(between).sum(), between, create_graph=True)
    lengths: Tensor = torch.linalg.vector_norm(slope.flatten(1), dim=1)
    return (lengths - 1).square().mean()


def real_gradient_penalty(discriminator: nn.Module, examples: Tensor) -> Tensor:
    """Returns half the mean of |grad V|^2 at real examples, 0-dim and differentiable in the discriminator's weights.

    Args:
        discriminator: examples [n, ...] -> V, [n] or [n, 1]; an example's output must depend on that example alone.
        examples: [n, ...].

    Source: Mescheder, Geiger, Nowozin, "Which Training Methods for GANs do actually Converge?",
    https://arxiv.org/abs/1801.04406.
    """
    points = examples.detach().requires_grad_()
    (slope,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
    return slope.flatten(1).square().sum(1).mean() / 2
