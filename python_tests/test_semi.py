"""SemiSupervisedGEN: the term of the labels, and what labels of a few digits are worth."""

import math

import lightning.pytorch as pl
import pytest
import torch
from helpers import points
from test_gen import train

from kdejsd import GaussianMixture, StandardNormal
from kdejsd.data import Digits
from kdejsd.models import FC, SemiSupervisedGEN
from kdejsd.runs.measuring import encode_set

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*GPU available but not used"
)


def ring(count: int = 10) -> GaussianMixture:
    angle = 2 * math.pi * torch.arange(count) / count
    return GaussianMixture(4 * torch.stack([angle.cos(), angle.sin()], 1), 0.5)


def make(target=None, **options) -> SemiSupervisedGEN:
    pl.seed_everything(0, verbose=False)
    networks = FC(Digits.example_shape, 2)
    settings = {"num_lagged": 200, "bandwidth": 0.2, "learning_rate": 1e-3} | options
    return SemiSupervisedGEN(networks.encoder, networks.decoder, 2, target or ring(), **settings)


def test_label_term_is_the_cross_entropy_of_the_components():
    means, scales, weights = points(3, 2) * 3, torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0.2, 0.3, 0.5])
    model = make(GaussianMixture(means, scales, weights))
    z = (3 * points(8, 2, seed=1)).requires_grad_()
    labels = torch.tensor([0, 1, 2, -1, 2, -1, 0, 0])
    densities = weights / scales**2 * torch.exp(-(z[:, None] - means).square().sum(-1) / (2 * scales**2))
    known = torch.nonzero(labels >= 0)[:, 0]
    expected = -(densities / densities.sum(1, keepdim=True))[known, labels[known]].log().mean()
    found = model.label_term(z, labels)
    torch.testing.assert_close(found, expected)
    for got, wanted in zip(torch.autograd.grad(found, z), torch.autograd.grad(expected, z), strict=True):
        torch.testing.assert_close(got, wanted)
        assert not got[labels < 0].any()


def test_no_labels_no_term():
    model = make()
    z = points(5, 2, dtype=torch.float32).requires_grad_()
    term = model.label_term(z, torch.full((5,), -1))
    (gradient,) = torch.autograd.grad(term, z)
    assert float(term.detach()) == 0 and not gradient.any()


def test_a_code_far_from_its_mode_is_pulled_and_not_lost():
    model = make()
    z = torch.tensor([[4000.0, 0.0], [-4.0, 0.0]], requires_grad=True)
    term = model.label_term(z, torch.tensor([5, 0]))  # modes at (-4, 0) and (4, 0)
    (gradient,) = torch.autograd.grad(term, z)
    assert term.isfinite() and gradient.isfinite().all()
    assert gradient[0, 0] > 1 and gradient[1, 0] < -1


def test_classify_is_the_nearest_of_equal_modes():
    model = make()
    z = 5 * points(500, 2, dtype=torch.float32)
    nearest = torch.cdist(z.double(), ring().means).argmin(1)
    assert torch.equal(model.classify(z), nearest)


def test_labels_pull_codes_to_their_modes():
    accuracy, share = {}, {}
    for labelled in (150, 0):
        data = Digits(labelled_size=labelled, batch_size=50)
        model = make(num_lagged=1000, weight=0.03, learning_rate=2e-3)
        trainer = train(model, 12, data=data)
        held_out = encode_set(model, data.held_out)
        right = model.classify(held_out.codes) == held_out.labels
        accuracy[labelled] = float(right.float().mean())
        share[labelled] = model.classify(held_out.codes).bincount(minlength=10) / len(right)
        assert float(trainer.callback_metrics["val/accuracy"]) == pytest.approx(accuracy[labelled], abs=0.01)
        assert held_out.reconstruction_error < 0.09
    assert accuracy[150] > 0.65 and accuracy[0] < 0.4
    assert share[150].min() > 0.05 and share[150].max() < 0.17


def test_every_label_hidden_is_a_gen_of_the_mixture():
    models = []
    for label_weight in (0.0, 7.0):
        models.append(make(label_weight=label_weight))
        train(models[-1], 1, data=Digits(train_size=300, labelled_size=0))
    state, other = (model.state_dict() for model in models)
    for name, value in state.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name
    assert make(weight=0.3).label_weight == 0.3


@pytest.mark.parametrize("refresh", ["full", "rolling", "queue", "tracked"])
def test_every_way_to_refresh(refresh):
    model = make(refresh=refresh, refresh_every=3)
    train(model, 2, data=Digits(train_size=300, labelled_size=100))
    assert model.lagged.codes.isfinite().all() and not model.lagged.codes.requires_grad


def test_refusals():
    with pytest.raises(TypeError, match="target must be a GaussianMixture, one component per class, got StandardN"):
        make(StandardNormal(2))
    with pytest.raises(ValueError, match=r"label_weight must be at least 0 and finite, got -0\.1"):
        make(label_weight=-0.1)
    with pytest.raises(ValueError, match="labels must be below 7, one component per class, got 9"):
        train(make(ring(7)), 1, data=Digits(train_size=300))
