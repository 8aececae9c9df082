"""RealNVP: the inverse, the determinant, the density."""

import math

import pytest
import torch
from helpers import generator, points, worst

from kdejsd.models import RealNVP
from kdejsd.reference.kde import normal_log_prob


def flow(dim: int, layers: int = 4) -> RealNVP:
    """A flow in float64 that is far from the identity."""
    made = RealNVP(dim, layers, hidden=16).double()
    rng = generator(dim)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng, dtype=torch.float64))
    return made


@pytest.mark.parametrize(("dim", "layers"), [(2, 1), (2, 4), (3, 5), (8, 6), (17, 3)])
def test_the_inverse_undoes_the_flow(dim, layers):
    f, z = flow(dim, layers), 3 * points(50, dim)
    u = f(z)[0]
    assert (u - z).abs().max() > 0.5
    assert worst(f.inverse(u), z) < 1e-10
    assert worst(f(f.inverse(z))[0], z) < 1e-10


@pytest.mark.parametrize(("dim", "layers"), [(2, 1), (2, 4), (3, 5), (8, 6)])
def test_the_determinant_is_that_of_the_jacobian(dim, layers):
    f, z = flow(dim, layers), points(7, dim)
    expected = [
        torch.linalg.slogdet(torch.autograd.functional.jacobian(lambda x: f(x[None])[0][0], point)) for point in z
    ]
    assert all(sign == 1 for sign, _ in expected)
    assert worst(f(z)[1], torch.stack([log_det for _, log_det in expected])) < 1e-12


def test_the_density_integrates_to_one_and_is_that_of_the_inverse_of_normal_samples():
    f = flow(2)
    line = torch.linspace(-20, 20, 601, dtype=torch.float64)
    grid = torch.cartesian_prod(line, line)
    with torch.no_grad():
        density = f.log_prob(grid).exp()
        samples = f.inverse(points(50_000, 2))
    cell = float(line[1] - line[0]) ** 2
    assert float(density.sum()) * cell == pytest.approx(1, abs=1e-3)
    for moment in (grid, grid.square()):
        expected = (density[:, None] * moment).sum(0) * cell
        moments = samples if moment is grid else samples.square()
        error = moments.std(0) / math.sqrt(len(samples))
        assert ((moments.mean(0) - expected).abs() < 5 * error + 1e-3).all()


def test_it_begins_as_the_identity_and_learns_a_law():
    torch.manual_seed(0)
    f = RealNVP(2, layers=6, hidden=32)
    side = torch.randn(1000, 1).sign()
    z = torch.cat([2 * side, side], 1) + 0.3 * torch.randn(1000, 2)  # two clusters
    u, log_det = f(z)
    assert torch.equal(u, z) and (log_det == 0).all()
    torch.testing.assert_close(f.log_prob(z), normal_log_prob(z, 1.0))
    optimizer = torch.optim.Adam(f.parameters(), 3e-3)
    before = float(f.log_prob(z).mean().detach())
    for _ in range(150):
        optimizer.zero_grad()
        (-f.log_prob(z).mean()).backward()
        optimizer.step()
    entropy = math.log(2) + math.log(2 * math.pi * math.e * 0.3**2)
    assert before < -entropy - 1.5 and -entropy - 0.4 < float(f.log_prob(z).mean().detach()) < -entropy + 0.1


@pytest.mark.parametrize(
    ("sizes", "text"),
    [
        ({"dim": 1}, "dim must be at least 2, got 1"),
        ({"dim": 2, "layers": 0}, "layers must be at least 1, got 0"),
        ({"dim": 2, "hidden": 0}, "hidden must be at least 1, got 0"),
    ],
)
def test_refusals(sizes, text):
    with pytest.raises(ValueError, match=text):
        RealNVP(**sizes)
