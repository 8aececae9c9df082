"""The kde over parts of the centers, and the lagged codes that are kept in bfloat16 or on the host."""

import math

import pytest
import torch
from helpers import CUDA, points
from test_torch import Passing
from torch.autograd import forward_ad

from kdejsd import GaussianMixture, kde_log_prob, reference
from kdejsd.divergence import DIVERGENCES
from kdejsd.lagged import LaggedKDE
from kdejsd.ops import streamed

DIM, H = 5, 0.6
ROWS = 64  # of a part in these tests


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    monkeypatch.setattr(streamed, "PART_BYTES", ROWS * DIM * 4)


def streamed_log_prob(*arguments):
    return streamed.streamed_log_prob(*arguments)[0]


def with_gradient(log_prob, query, *arguments):
    query = query.detach().clone().requires_grad_()
    value = log_prob(query, *arguments)
    (gradient,) = torch.autograd.grad((value * torch.arange(1, len(value) + 1)).sum(), query)
    return value.detach(), gradient


def truth(query, centers, own=None):
    exclude = False if own is None else own
    return with_gradient(lambda q: reference.kde_log_prob(q, centers.double(), H, exclude_self=exclude), query.double())


@pytest.mark.parametrize("storage", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("m", [1, 2, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS, 3 * ROWS + 17])
def test_value_and_gradient_of_parts_are_those_of_the_whole(m, storage):
    query, centers = points(33, DIM, dtype=torch.float32), points(m, DIM, seed=1).to(storage)
    value, gradient = with_gradient(streamed_log_prob, query, centers, H)
    expected, slope = truth(query, centers)
    assert value.dtype == torch.float64 and gradient.dtype == torch.float32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-4)
    assert torch.equal(streamed_log_prob(query, centers, H), value)


def test_float64_queries_are_computed_in_float64():
    query, centers = points(9, DIM), points(200, DIM, seed=1, dtype=torch.float32)
    for found, expected in zip(with_gradient(streamed_log_prob, query, centers, H), truth(query, centers), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-11)


def test_each_query_leaves_out_its_own_center_whatever_part_it_is_in():
    """Centers at the part's boundaries, twice the same one, none, and a part that is one center, which is left out."""
    centers = points(2 * ROWS + 1, DIM, seed=1).bfloat16()
    own = torch.tensor([0, ROWS - 1, ROWS, ROWS + 1, 2 * ROWS - 1, 2 * ROWS, 2 * ROWS, -1, 70])
    query = centers[own].float() + 1e-3
    value, gradient = with_gradient(streamed_log_prob, query, centers, H, own)
    expected, slope = truth(query, centers, own)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-4)
    with pytest.raises(ValueError, match="at least 2 centers, got 1"):
        streamed_log_prob(query[:1], centers[:1], H, torch.tensor([0]))


@pytest.mark.parametrize("distance", [30.0, 1e4, 1e10])
def test_far_queries(distance):
    """The parts' densities differ by more than any number holds, and all of them underflow."""
    query, centers = points(7, DIM, dtype=torch.float32) * distance, points(3 * ROWS, DIM, seed=1).bfloat16()
    value, gradient = with_gradient(streamed_log_prob, query, centers, H)
    expected, slope = truth(query, centers)
    assert value.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-4 * distance)


def test_duplicates_count_as_often_as_they_come():
    query, one = points(6, DIM, dtype=torch.float32), points(1, DIM, seed=1).bfloat16()
    value, gradient = with_gradient(streamed_log_prob, query, one.expand(3 * ROWS + 5, DIM).contiguous(), H)
    expected, slope = truth(query, one)
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-5)
    torch.testing.assert_close(gradient.double(), slope, rtol=1e-5, atol=1e-4)


def test_no_queries():
    value, gradient = with_gradient(streamed_log_prob, torch.zeros(0, DIM), points(200, DIM).bfloat16(), H)
    assert value.shape == (0,) and gradient.shape == (0, DIM)


def test_nan_in_a_query_is_its_own_and_in_a_center_everyones():
    query, centers = points(4, DIM, dtype=torch.float32), points(3 * ROWS, DIM, seed=1).bfloat16()
    query[2, 1] = math.nan
    value, gradient = with_gradient(streamed_log_prob, query, centers, H)
    assert value.isnan().tolist() == gradient.isnan().any(-1).tolist() == [False, False, True, False]
    centers[ROWS + 3, 0] = math.nan
    value, gradient = with_gradient(streamed_log_prob, query, centers, H)
    assert value.isnan().all() and gradient.isnan().any(-1).all()


def test_merged_parts_are_the_whole_and_empty_parts_do_not_count():
    logits, slopes = points(12, 4), points(12, 4, 3, seed=1)
    parts = [logits[a:b].logsumexp(0) for a, b in ((0, 5), (5, 6), (6, 12))]
    means = [(logits[a:b].softmax(0)[..., None] * slopes[a:b]).sum(0) for a, b in ((0, 5), (5, 6), (6, 12))]
    nothing = torch.full((4,), -math.inf, dtype=torch.float64), torch.full((4, 3), math.nan, dtype=torch.float64)
    log_sum, gradient = streamed.merged(torch.stack([nothing[0], *parts]), torch.stack([nothing[1], *means]))
    torch.testing.assert_close(log_sum, logits.logsumexp(0))
    torch.testing.assert_close(gradient, (logits.softmax(0)[..., None] * slopes).sum(0))


def test_second_derivatives_are_refused():
    query = points(3, DIM, dtype=torch.float32).requires_grad_()
    value = streamed_log_prob(query, points(100, DIM).bfloat16(), H).sum()
    with pytest.raises(RuntimeError, match="streamed kernel density has no second derivatives"):
        torch.autograd.grad(value, query, create_graph=True)


def test_what_the_kde_refuses_is_refused(monkeypatch):
    query, centers = points(3, DIM, dtype=torch.float32), points(100, DIM).bfloat16()
    with pytest.raises(ValueError, match="same number of dimensions l"):
        streamed_log_prob(query[:, :3], centers, H)
    with pytest.raises(ValueError, match="bandwidth must be positive"):
        streamed_log_prob(query, centers, -1.0)
    monkeypatch.setenv("KDEJSD_CHECK", "1")
    centers[90, 0] = math.inf
    with pytest.raises(ValueError, match="centers must be finite, got 1 values"):
        streamed_log_prob(query, centers, H)


def test_the_bandwidth_stays_a_number_from_part_to_part():
    """A part does not make a tensor of it; a traced call does, for the operator, and gives the same bits."""
    query, centers = points(9, DIM, dtype=torch.float32).requires_grad_(), points(3 * ROWS, DIM, seed=1).float()

    def made(parts):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            streamed_log_prob(query, centers[: parts * ROWS], H)
        return sum(event.name in ("aten::full", "aten::new_full") for event in profile.events())

    assert made(1) == made(2) == made(3)
    expected = with_gradient(streamed_log_prob, query, centers, H)
    with Passing():
        found = with_gradient(streamed_log_prob, query, centers, H)
    assert all(torch.equal(got, wanted) for got, wanted in zip(found, expected, strict=True))


def test_forward_mode_and_transforms():
    query, centers, own = points(3, DIM), points(100, DIM, seed=1).bfloat16(), torch.tensor([7, -1, 99])

    def value(z):
        return streamed_log_prob(z, centers, H, own)

    def expected(z):
        return reference.kde_log_prob(z, centers.double(), H, exclude_self=own)

    with forward_ad.dual_level():
        found = forward_ad.unpack_dual(value(forward_ad.make_dual(query, torch.ones_like(query)))).tangent
    torch.testing.assert_close(found, torch.func.jvp(expected, (query,), (torch.ones_like(query),))[1])
    torch.testing.assert_close(torch.func.jacrev(value)(query), torch.func.jacrev(expected)(query))
    torch.testing.assert_close(torch.func.vmap(value)(query.expand(2, 3, DIM)), expected(query).expand(2, 3))


def test_no_transforms_of_sharded_centers():
    """A transform has no rule for what is sent between ranks."""
    query, centers = points(3, DIM), points(100, DIM, seed=1)
    with pytest.raises(RuntimeError, match="sharded"):
        torch.func.vmap(lambda z: streamed_log_prob(z, centers, H, None, True))(query.expand(2, 3, DIM))


# ----------------------------------------------------------------------------------------------------------------------
# LaggedKDE


def kept(m, seed=0, target=None, divergence="js", **storage):
    lagged = LaggedKDE(m, DIM, H, target, divergence=divergence, **storage)
    lagged.refresh(points(m, DIM, dtype=torch.float32, seed=seed), torch.arange(m).flip(0) * 2)
    return lagged


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("target", [None, GaussianMixture([[-1.0] * DIM, [1.0] * DIM], 0.7)])
@pytest.mark.parametrize("noisy", [False, True])
@pytest.mark.parametrize("indexed", [False, True])
def test_bfloat16_codes_give_what_their_values_give(divergence, target, noisy, indexed):
    m = 3 * ROWS + 9
    rounded, whole = kept(m, target=target, divergence=divergence, storage_dtype=torch.bfloat16), None
    whole = LaggedKDE(m, DIM, H, target, divergence=divergence)
    whole.refresh(rounded.codes.float(), rounded.indices)
    index = torch.arange(50, 90) if indexed else None  # half of them have a lagged copy
    noise = points(40, DIM, dtype=torch.float32, seed=3) if noisy else None
    found = []
    for lagged in (rounded, whole):
        z = (1.5 * points(40, DIM, dtype=torch.float32, seed=2)).requires_grad_()
        loss = lagged.loss(z, index, noise=noise, reduction="none")
        found.append((loss.detach(), *torch.autograd.grad(loss.sum(), z), lagged.log_prob(z, index).detach()))
        assert all(t.dtype == torch.float32 for t in found[-1])
        for reduction in ("mean", "sum"):
            expected = getattr(loss, reduction)()
            torch.testing.assert_close(lagged.loss(z, index, noise=noise, reduction=reduction), expected)
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=2e-5)
    z = points(40, DIM, dtype=torch.float32)
    assert torch.equal(*(lagged.jsd(z, torch.Generator().manual_seed(0)) for lagged in (rounded, whole)))


@pytest.mark.parametrize(("dim", "h"), [(5, 0.3), (64, 0.8)])
def test_what_rounding_to_bfloat16_changes_is_bounded(dim, h):
    codes, z = points(2000, dim, seed=1), points(100, dim, seed=2) * math.sqrt(1 + h * h)
    lagged = LaggedKDE(2000, dim, h, storage_dtype=torch.bfloat16)
    lagged.refresh(codes)
    moved = (lagged.codes.double() - codes).norm(dim=1)
    assert (moved <= 2**-8 * codes.norm(dim=1)).all()
    exact = kde_log_prob(z, codes, h)
    change = (lagged.log_prob(z.float()).double() - exact).abs()
    assert (change <= (moved * (2 * torch.cdist(z, codes) + moved)).max(1).values / (2 * h * h)).all()
    assert change.max() < 0.1 and change.mean() < 0.02


def test_update_push_and_refresh_by_parts_round_to_the_storage():
    lagged, other = (kept(100, storage_dtype=dtype) for dtype in (torch.bfloat16, torch.float32))
    codes = points(100, DIM, dtype=torch.float32, seed=5)
    for kde in (lagged, other):
        kde.update(codes[:7], 30)
        kde.push(codes[7:20], torch.arange(13))
    assert lagged.codes.dtype == torch.bfloat16 and torch.equal(lagged.codes, other.codes.bfloat16())
    lagged.refresh(iter(codes.split(33)), torch.arange(100))
    assert torch.equal(lagged.codes, codes.bfloat16())
    for count, text in ((99, "must be 100 in all their parts, got 99"), (101, "in all their parts, got at least 101")):
        with pytest.raises(ValueError, match=text):
            lagged.refresh(points(count, DIM).split(33))


def test_state_goes_from_one_storage_to_another():
    lagged, other = kept(100), LaggedKDE(100, DIM, 0.1, storage_dtype=torch.bfloat16, storage_device="cpu")
    other.load_state_dict(lagged.state_dict())
    assert other.codes.dtype == torch.bfloat16 and torch.equal(other.codes, lagged.codes.bfloat16())
    lagged.load_state_dict(other.state_dict())
    assert lagged.codes.dtype == torch.float32 and torch.equal(lagged.codes, other.codes.float())
    z = points(10, DIM, dtype=torch.float32)
    torch.testing.assert_close(lagged.loss(z, torch.arange(10)), other.loss(z, torch.arange(10)), rtol=1e-5, atol=1e-5)


def test_codes_that_are_to_stay_on_the_host_do():
    """The device without memory stands for another one."""
    module = torch.nn.Sequential(kept(100, storage_device="cpu"), kept(100))
    stays, goes = module[0].codes.clone(), module[1].codes.clone()
    module.to("meta")
    assert torch.equal(module[0].codes, stays) and module[0].indices.is_meta
    assert module[1].codes.is_meta and module[1].codes.shape == goes.shape
    assert torch.equal(module.state_dict()["0.codes"], stays)


@pytest.mark.parametrize("device", [CUDA])
@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.bfloat16])
def test_codes_on_the_host_are_computed_with_on_the_device(device, storage_dtype):
    """Also when they are overwritten as soon as the loss returns."""
    host = kept(9 * ROWS + 5, storage_dtype=storage_dtype)
    apart = kept(9 * ROWS + 5, storage_dtype=storage_dtype, storage_device="cpu").to(device)
    assert apart.codes.is_pinned() and apart.indices.device.type == device
    for round_ in range(5):
        z, new = points(20, DIM, dtype=torch.float32, seed=round_), points(9 * ROWS + 5, DIM, seed=50 + round_).float()
        losses, gradients = [], []
        for lagged, query in ((host, z.requires_grad_()), (apart, z.detach().to(device).requires_grad_())):
            loss = lagged.loss(query, torch.arange(20, device=query.device))
            if lagged is host:  # autograd refuses a gradient once codes in place have changed
                gradients.append(torch.autograd.grad(loss, query)[0])
            lagged.refresh(new, torch.arange(len(new), device=query.device))
            lagged.push(query.detach()[:7], torch.arange(7, device=query.device))
            losses.append(loss.detach().cpu())
            if lagged is apart:
                gradients.append(torch.autograd.grad(loss, query)[0].cpu())
        torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-6)
        assert torch.equal(host.codes, apart.codes)


@pytest.mark.parametrize(
    ("storage", "error", "text"),
    [
        ({"storage_dtype": torch.float16}, TypeError, "must be torch.float32 or torch.bfloat16, got torch.float16"),
        ({"storage_device": "cuda"}, ValueError, "storage_device must be \"cpu\" or None, got 'cuda'"),
    ],
)
def test_other_storages_are_refused(storage, error, text):
    with pytest.raises(error, match=text):
        LaggedKDE(10, DIM, H, **storage)


def test_the_loss_can_be_compiled_around_the_pass():
    lagged, z = kept(3 * ROWS, storage_dtype=torch.bfloat16), points(6, DIM, dtype=torch.float32)
    compiled = torch.compile(lambda z: lagged.loss(2 * z), backend="eager")
    torch.testing.assert_close(compiled(z), lagged.loss(2 * z))
