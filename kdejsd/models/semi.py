"""Defines a GEN whose target has a component for each class, to train with few labels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss

from .._extras import train_extra
from .._numbers import not_negative
from ..data import Batch
from ..targets import GaussianMixture
from .gen import GEN

with train_extra():
    from torchmetrics import MeanMetric


class SemiSupervisedGEN(GEN):
    """Trains a GEN whose target has a component for each class, into which labels pull the codes.

    Use it if some of the examples have labels: all examples shape the latent space, and the labelled ones decide which
    class goes where. The joint distribution of code and class is to be that of the target, p_t(z, y) = w_y N(z; mu_y,
    sigma_y^2 I). By the chain rule

        KL(p_e(z, y) | p_t(z, y)) = KL(p_e(z) | p_t(z)) + E log p_e(y | z) - E log p_t(y | z).

    The first term is the latent term of a GEN, which needs no labels. The second term is at most 0, and 0 where a code
    has one class alone; leaving it out gives an upper bound. The third is a cross entropy, estimated by the labelled
    examples. So

        loss = error per value + weight * latent term + label_weight * mean of -log p_t(y | z).

    The density of a code within its mode, -log p(z | y), is not minimised. It differs from the third term by log w_y -
    log p_t(z), which the latent term contains already. By itself it would draw every code to its mode's mean.

    In addition to a GEN's measures it logs per step `loss/label`, the third term in nats over the minibatch's labelled
    examples. If the validation set has labels, it logs per epoch `val/accuracy`, the share of them that `classify` gets
    right.

    Args:
        encoder, decoder, latent_dim: as in `GEN`.
        target: one component for each class, in the order of the labels 0 to K - 1.
        label_weight: the weight of the third term; None is `weight`, as the chain rule has it.
        kwargs: as in `GEN`.

    Raises:
        TypeError: if the target is no GaussianMixture.
        ValueError: if label_weight is negative, a label has no component, and in the cases of `GEN`.

    Source: Saha, Elhabian, Whitaker, "GENs: Generative Encoding Networks", https://arxiv.org/abs/2010.15283, section
    5.4.

    Example:
        >>> import torch
        >>> from kdejsd import GaussianMixture
        >>> from kdejsd.models import FC, SemiSupervisedGEN
        >>> target = GaussianMixture(torch.tensor([[-2.0, 0.0], [2.0, 0.0]]), 0.5)
        >>> networks = FC((1, 8, 8), latent_dim=2)
        >>> model = SemiSupervisedGEN(networks.encoder, networks.decoder, 2, target, num_lagged=200)
        >>> model.classify(torch.tensor([[-1.5, 1.0], [0.5, 0.0]]))
        tensor([0, 1])
    """

    def __init__(
        self,
        encoder: nn.Module,
        decoder: nn.Module,
        latent_dim: int,
        target: GaussianMixture,
        label_weight: float | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(target, GaussianMixture):
            raise TypeError(f"target must be a GaussianMixture, one component per class, got {type(target).__name__}")
        if label_weight is not None:
            label_weight = not_negative("label_weight", label_weight)
        super().__init__(encoder, decoder, latent_dim, target=target, **kwargs)
        self.label_weight = self.weight if label_weight is None else label_weight
        self._right = MeanMetric(distributed_available_fn=self._measures_are_gathered)

    @property
    def classes(self) -> GaussianMixture:
        """Returns the target, whose components are the classes."""
        assert isinstance(self.lagged.target, GaussianMixture)
        return self.lagged.target

    @torch.no_grad()
    def classify(self, codes: Tensor) -> Tensor:
        """Returns the most probable class [n] int64 of codes [n, l] under the target.

        With components of equal scale and weight it is the one whose mean is nearest.
        """
        return self.classes.component_log_prob(codes).argmax(-1)

    def label_term(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Returns the mean of -log p_t(y | z) in nats over the codes [n, l] with a label [n] int64, 0-dim.

        It is 0 if no code has a label.
        """
        count = self.classes.means.shape[0]
        if codes.device.type == "cpu" and len(labels) and int(labels.max()) >= count:
            raise ValueError(f"labels must be below {count}, one component per class, got {int(labels.max())}")
        log_posterior = self.classes.component_log_prob(codes).log_softmax(-1)
        total = nll_loss(log_posterior, labels.clamp_min(-1), ignore_index=-1, reduction="sum")
        return total / (labels >= 0).sum().clamp_min(1)

    def penalty(self, codes: Tensor, labels: Tensor) -> Tensor:
        """Returns label_weight times the label term, 0-dim, after logging the term."""
        term = self.label_term(codes, labels)
        self.log_terms({"loss/label": term})
        return self.label_weight * term

    def validation_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        found = super().validation_step(batch, batch_idx)
        labels = batch[1]
        self._right.update((self.classify(found["codes"]) == labels)[labels >= 0].float())
        return found

    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        if float(self._right.weight) > 0 or self._measures_are_gathered():
            # Gathered, it is logged by ranks without labels too, or the others would wait for them.
            self.log("val/accuracy", self._right, prog_bar=True)
