"""The ops on arguments that nobody would write down: odd shapes, strides, scales, duplicates, infinities, NaN.

Each result must be that of the float64 reference, within a bound that follows from the roundings of the inputs' own
size, or an error that names the argument. The bounds are those of an algorithm that knows every point to a unit in the
last place of its distance from amid the centers; where they pass the range of the dtype, so may the result.
"""

from __future__ import annotations

import faulthandler
import math
import sys

import hypothesis.strategies as st
import pytest
import torch
from edges import edges
from hypothesis import assume, given
from torch import Tensor

import kdejsd
from kdejsd import reference
from kdejsd.divergence import DIVERGENCES
from kdejsd.ops import streamed

SECONDS = 120  # for one example; it takes milliseconds
HALF = (torch.float16, torch.bfloat16)
SEVERAL = 32  # roundings that add up, in units in the last place
NAN, INF = math.nan, math.inf


@pytest.fixture(scope="module", autouse=True)
def watchdog():
    yield
    faulthandler.cancel_dump_traceback_later()


def start_watch() -> None:
    """Ends the process, with every thread's stack, if no other example starts in time."""
    faulthandler.dump_traceback_later(SECONDS, exit=True, file=sys.__stderr__)


# ----------------------------------------------------------------------------------------------------------------------
# Arguments

dtypes = st.sampled_from([torch.float32, torch.float64, *HALF])


def sizes_of(*counted: str) -> st.SearchStrategy[int]:
    """Small ones, and those at the edges of what the kernels take at a time, as far as examples are to be quick."""
    found = {size for name in counted for size in edges(name)}
    return st.one_of(st.integers(1, 9), st.sampled_from(sorted(size for size in found if size <= 130)))


sizes = sizes_of("kde_points", "omega_samples", "nearest_samples", "radius_classes")
dims = sizes_of("kde_dims", "omega_dims", "nearest_dims")
exponents = st.one_of(st.just(0), st.integers(-30, 30))
specials = st.sampled_from([0.0, -0.0, NAN, INF, -INF, 1e30, -1e30, 1e-30, 1e-45])
layouts = st.sampled_from(["contiguous", "transposed", "every second", "offset", "expanded"])


def laid_out(t: Tensor, layout: str) -> Tensor:
    """Lays the same numbers out in another place; "expanded" repeats the first point with stride 0."""
    if layout == "transposed":
        return t.mT.contiguous().mT
    if layout == "every second":
        return torch.stack((t, torch.full_like(t, NAN)), -1)[..., 0]
    if layout == "offset":
        return torch.cat((t.new_zeros(1), t.reshape(-1)))[1:].view(t.shape)
    if layout == "expanded" and t.shape[-2] > 0:
        return t[..., :1, :].expand(t.shape)
    return t


@st.composite
def point_sets(draw, *shape: int, dtype: torch.dtype, exponent: int = 0, special: bool = False) -> Tensor:
    """[..., points, dimensions] of the order of 10^exponent, as any dtype holds them."""
    numbers = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))), dtype=torch.float64)
    if draw(st.booleans()):
        numbers = numbers.round()  # duplicates
    if draw(st.integers(0, 4)) == 0:
        numbers = numbers + 100  # far from the origin
    numbers = numbers * 10.0**exponent
    if special and numbers.numel():
        for place, value in draw(st.lists(st.tuples(st.integers(0, numbers.numel() - 1), specials), max_size=3)):
            numbers.view(-1)[place] = value
    return laid_out(numbers.to(dtype), draw(layouts))


@st.composite
def kde_calls(draw, special: bool, batched: bool = True, streamed: bool = False) -> dict:
    """Arguments of kde_log_prob, or such as the streamed kde takes too."""
    dtype = draw(dtypes.filter(lambda dtype: dtype not in HALF) if streamed else dtypes)
    exponent = 0 if dtype in HALF else draw(exponents)
    n, m, dim = draw(st.one_of(st.just(0), sizes)), draw(sizes), draw(dims)
    batches = draw(st.sampled_from([((), ())] * 3 + [((2,), ()), ((), (3,)), ((2, 1), (3,)), ((3,), (3,)), ((0,), ())]))
    if not batched:
        batches = ((), ())
    call: dict = {
        "query": draw(point_sets(*batches[0], n, dim, dtype=dtype, exponent=exponent, special=special)),
        "centers": draw(point_sets(*batches[1], m, dim, dtype=dtype, exponent=exponent, special=special)),
    }
    apart = draw(st.sampled_from([0, 0, 0, -3, 3, *([] if dtype in HALF else [-12, 12])]))
    h = min(max(10.0 ** (exponent + apart) * (0.5 + math.sqrt(dim) / 4), 1e-40), 1e38)
    kind = "number" if streamed else draw(st.sampled_from(["number", "scalar", "per center", "per center and batch"]))
    if kind == "number":
        call["bandwidth"] = h
    else:
        shape = {"scalar": (), "per center": (m,), "per center and batch": (*batches[1], m)}[kind]
        seed, spread = draw(st.integers(0, 99)), draw(st.sampled_from([0.3, 3.0]))
        logs = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        call["bandwidth"] = (h * torch.exp(spread * logs)).to(dtype)
        if special and call["bandwidth"].numel() and draw(st.integers(0, 5)) == 0:
            call["bandwidth"].view(-1)[-1] = draw(st.sampled_from([0.0, -1.0, NAN, INF, 1e-40]))
    if not streamed and draw(st.booleans()):
        weights = torch.randn(m, generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
        if draw(st.booleans()):
            weights[draw(st.integers(0, m - 1))] = -INF
        if special and draw(st.integers(0, 5)) == 0:
            weights[draw(st.integers(0, m - 1))] = draw(st.sampled_from([NAN, INF, 1e3, -1e30]))
        call["log_weights"] = weights.to(dtype)
    if draw(st.integers(0, 2)) == 0 and m > 1:
        if n == m and not streamed and draw(st.booleans()):
            call["exclude_self"] = True
        else:
            own = torch.randint(-1, m, (n,), generator=torch.Generator().manual_seed(draw(st.integers(0, 99))))
            if n and draw(st.booleans()):  # out of range: none
                own[-1] = draw(st.sampled_from([m, -2, 2**63 - 1, -(2**63)]))
            call["exclude_self"] = own
    return call


# ----------------------------------------------------------------------------------------------------------------------
# The kde: what its roundings allow


def compute_dtype(call: dict) -> torch.dtype:
    dtype = next(iter(call.values())).dtype
    return torch.float32 if dtype in HALF else dtype


def widened(call: dict) -> dict:
    return {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in call.items()}


class Allowed:
    """The exponents a [..., n, m] of a call, the error E of each, and what follows for sums of exp(a)."""

    def __init__(self, call: dict) -> None:
        dtype = compute_dtype(call)
        limits = torch.finfo(dtype)
        self.unit, self.largest, self.least = limits.eps, limits.max, limits.tiny
        wide = widened(call)
        query, centers = wide["query"], wide["centers"]
        self.dim, m = query.shape[-1], centers.shape[-2]
        h = torch.as_tensor(wide["bandwidth"], dtype=dtype).double()
        self.h = (h.unsqueeze(-2) if h.ndim else h.reshape(1, 1)).expand(*h.shape[:-1], 1, m)
        self.differences = centers.unsqueeze(-3) - query.unsqueeze(-2)  # [..., n, m, l]
        distance = self.differences.norm(dim=-1)
        shift = centers.mean(-2, keepdim=True)
        shift = shift.where(shift.isfinite(), 0)
        off = self.unit * SEVERAL * shift.norm(dim=-1, keepdim=True)  # the kernel's own mean is rounded
        reach = (query - shift).norm(dim=-1).unsqueeze(-1) + (centers - shift).norm(dim=-1).unsqueeze(-2) + off
        log_weights = wide.get("log_weights")
        log_weights = torch.tensor(-math.log(m)) if log_weights is None else log_weights.unsqueeze(-2)
        logs = self.dim * self.h.log()
        self.exponents = log_weights - logs - distance.square() / (2 * self.h.square())
        own = wide.get("exclude_self", False)
        if own is not False:
            own = torch.arange(query.shape[-2]) if own is True else own
            excluded = own.unsqueeze(-1) == torch.arange(m)
            self.exponents = self.exponents.masked_fill(excluded, -INF)
        slack = SEVERAL * self.unit
        self.offset_error = slack * reach / self.h  # of a difference, in bandwidths
        relative = slack + self.unit * self.dim
        # Points that are the same are so exactly.
        moved = self.offset_error * distance / self.h + self.offset_error.square()
        self.moved = moved.masked_fill(distance == 0, 0)
        self.error = (
            self.moved
            + relative * (distance / self.h).square()
            + slack * (1 + logs.abs() + self.dim * (self.h / self.h.amin(-1, keepdim=True)).log())
            + slack * log_weights.abs()
        )
        self.error = self.error.masked_fill(self.exponents == -INF, 0)
        too_far_apart = self.h.amax(-1) / self.h.amin(-1) > (1e30 if dtype == torch.float32 else 1e300)
        self.out_of_range = (reach / self.h > 0.03 * self.largest).any(-1) | too_far_apart
        # Squares of distances in the middle bandwidth pass the range: those of the nearest center too.
        middle = (self.h.amin(-1, keepdim=True) * self.h.amax(-1, keepdim=True)).sqrt()
        squares_pass = reach / middle > math.sqrt(0.03 * self.largest)
        self.no_weight = squares_pass.gather(-1, self.exponents.argmax(-1, keepdim=True)).squeeze(-1)
        self.log_sum = self.exponents.logsumexp(-1)
        above = (self.exponents + self.error).logsumexp(-1) - self.log_sum
        below = self.log_sum - (self.exponents - self.error).logsumexp(-1)
        self.value = torch.maximum(above, below) + slack

    def weights(self) -> tuple[Tensor, Tensor]:
        """pi [..., n, m], and the error of each."""
        logs = self.exponents - self.log_sum.unsqueeze(-1)
        share, most = logs.exp(), (logs + self.error + self.value.unsqueeze(-1)).exp()
        return share, most - share + SEVERAL * self.unit * share + self.least

    def gradients(self, upstream: Tensor) -> dict[str, Tensor]:
        """Errors of the gradients of sum(upstream * log p_e), before sums over broadcast dimensions."""
        share, off = (x * upstream.abs().unsqueeze(-1) for x in self.weights())
        h, distance = self.h, self.differences.norm(dim=-1)
        points = off.unsqueeze(-1) * self.differences.abs() / h.square().unsqueeze(-1)
        points = points + ((share + off) * self.offset_error / h).unsqueeze(-1)
        pull = (distance / h).square() + self.dim
        widths = (off * pull + (share + off) * (2 * self.moved + SEVERAL * self.unit * self.dim * pull)) / h
        bounds = {"query": points.sum(-2), "centers": points.sum(-3), "bandwidth": widths.sum(-2)}
        return {k: v.nan_to_num(INF, INF) for k, v in {**bounds, "log_weights": off.sum(-2)}.items()}


def near(got: Tensor, truth: Tensor, allowed: Tensor, largest: float, pardoned: Tensor | bool = False) -> Tensor:
    """Where a result is right: NaN for NaN, within what is allowed, or out of range where the truth may be."""
    got = got.detach().double()
    close = ((got - truth).abs() <= allowed) | (got == truth) | (got.isnan() & truth.isnan())
    may_pass = ~(truth.abs() + allowed < 0.03 * largest)
    return close | (may_pass & (got.isnan() | got.isinf())) | (got.isnan() & pardoned)


def check_value(got: Tensor, truth: Tensor, call: dict) -> Allowed:
    allowed = Allowed(call)
    assert got.shape == truth.shape and got.dtype == compute_dtype(call)
    # What a center that is left out holds is of no account, or makes the query's density NaN.
    odd = ~call["centers"].isfinite().all(-1)
    bandwidth, weights = call["bandwidth"], call.get("log_weights")
    if isinstance(bandwidth, Tensor):
        odd = odd | ~((bandwidth > 0) & (bandwidth < INF))
    if weights is not None:
        odd = odd | ~(weights < INF)
    pardoned = allowed.out_of_range | (odd.any(-1, keepdim=True) if "exclude_self" in call else False)
    right = near(got, truth, allowed.value + SEVERAL * allowed.unit * truth.abs(), allowed.largest, pardoned)
    right = right | (got.isneginf() & allowed.no_weight)
    assert right.all(), f"{got[~right][0]} for {truth[~right][0]}"
    return allowed


@given(kde_calls(special=True))
def test_kde_values(call):
    start_watch()
    got = kdejsd.kde_log_prob(**call)
    check_value(got, reference.kde_log_prob(**widened(call)), call)


@given(kde_calls(special=False), st.integers(0, 99))
def test_kde_gradients(call, seed):
    start_watch()
    h = torch.as_tensor(call["bandwidth"])
    assume(bool(((h > 0) & (h < INF)).all()))
    wide = widened(call)
    names = [k for k in ("query", "centers", "bandwidth", "log_weights") if isinstance(call.get(k), Tensor)]
    for k in names:
        call[k], wide[k] = call[k].detach().requires_grad_(), wide[k].requires_grad_()
    got, truth = kdejsd.kde_log_prob(**call), reference.kde_log_prob(**wide)
    allowed = check_value(got, truth, call)
    # A density of 0 has no gradient, and neither has anything that shares in it.
    assume(bool(got.isfinite().all()))
    upstream = torch.randn(truth.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    upstream = upstream.to(got.dtype)
    bounds = allowed.gradients(upstream.double())
    found = torch.autograd.grad(got, [call[k] for k in names], upstream)
    expected = torch.autograd.grad(truth, [wide[k] for k in names], upstream.double())
    for k, a, b in zip(names, found, expected, strict=True):
        assert a.shape == call[k].shape and a.dtype == call[k].dtype
        bound = bounds[k].sum_to_size(b.shape) if b.numel() else b.abs()
        limits = torch.finfo(a.dtype)
        right = near(a, b, bound + SEVERAL * limits.eps * b.abs() + limits.tiny, limits.max)
        assert right.all(), f"{k}: {a[~right][0]} for {b[~right][0]}, within {bound[~right][0]}"


# Found once, or next to what was found.
@pytest.mark.parametrize("dim", [2, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bandwidths_far_apart(dtype, dim):
    """Ones of which each is far from the first: the wide ones' density, the narrow ones' at a center, no NaN."""
    query, centers = torch.zeros(2, 3, dim, dtype=dtype)
    query[:, :2] = torch.tensor([[0.3, 1.0], [1.0, -1.0], [0.0, 2.0]], dtype=dtype)
    centers[:, :2] = torch.tensor([[1.0, -1.0], [0.5, 0.5], [2.0, 0.0]], dtype=dtype)
    for bandwidth in ([1e-14, 1.0, 1e14], [1e14, 1e-14, 1.0], [1.0, 1e-14, 1e14], [1e-29, 1.0, 1.0]):
        call = {"query": query, "centers": centers, "bandwidth": torch.tensor(bandwidth, dtype=dtype)}
        value, truth = kdejsd.kde_log_prob(**call), reference.kde_log_prob(**widened(call))
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-5)
        weights = torch.zeros(3, dtype=dtype, requires_grad=True)
        (share,) = torch.autograd.grad(kdejsd.kde_log_prob(**call, log_weights=weights).sum(), weights)
        truth = reference.kde_log_prob(**widened(call), log_weights=weights.double()).sum()
        torch.testing.assert_close(share, *torch.autograd.grad(truth, weights), rtol=1e-3, atol=1e-6)
        left_out = {**call, "exclude_self": torch.tensor([2, 0, 2])}
        value, truth = kdejsd.kde_log_prob(**left_out), reference.kde_log_prob(**widened(left_out))
        torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-5)
    ratio = 1e31 if dtype == torch.float32 else 1e301
    assert kdejsd.kde_log_prob(query, centers, torch.tensor([1.0, 1.0, ratio], dtype=dtype)).isnan().all()


@pytest.mark.parametrize(("dtype", "h"), [(torch.float32, 1e-44), (torch.float64, 5e-324)])
def test_a_bandwidth_that_is_not_a_normal_number(dtype, h):
    """Its inverse passes the range."""
    points = h * torch.tensor([[1.0], [2.0], [4.0]], dtype=torch.float64).to(dtype) / 1
    value = kdejsd.kde_log_prob(points, points, torch.tensor(h, dtype=dtype))
    unit = torch.tensor([[1.0], [2.0], [4.0]], dtype=dtype)
    expected = kdejsd.kde_log_prob(unit, unit, 1.0) - torch.tensor(h, dtype=dtype).double().log()
    torch.testing.assert_close(value.double(), expected.double(), rtol=1e-5, atol=0)
    query, center = (points[:1].clone().requires_grad_() for _ in range(2))
    for gradient in torch.autograd.grad(kdejsd.kde_log_prob(query, center, h), (query, center)):
        assert gradient.item() == 0


@pytest.mark.parametrize("distance", [1e15, 1e20, INF])
def test_a_far_query_takes_nothing_from_the_center_it_leaves_out(distance):
    """Whose bandwidth is the widest."""
    query = torch.tensor([[distance]])
    centers, h = torch.tensor([[0.0], [1.0], [2.0]]), torch.tensor([1.0, 1.0, 1e8])
    call = {"query": query, "centers": centers, "bandwidth": h, "exclude_self": torch.tensor([2])}
    value = kdejsd.kde_log_prob(**call)
    assert value.isneginf() if distance > 1e19 else value.item() == pytest.approx(-0.5e30, rel=1e-5)
    (gradient,) = torch.autograd.grad(kdejsd.kde_log_prob(**call | {"bandwidth": h.requires_grad_()}), h)
    assert gradient[2] == 0 if distance < 1e19 else gradient.isnan().any()


def test_a_loss_keeps_digits_below_those_of_torchs_softplus():
    codes = torch.tensor([[math.sqrt(2 * 21)]], dtype=torch.float64)
    for module in (kdejsd, reference):  # log p_e - log p_t is 21
        loss = module.jsd_loss(codes, codes, 1.0, target_samples=codes)
        assert loss.item() == pytest.approx(2 * math.log(2) - 21 - 2 * math.log1p(math.exp(-21)), rel=1e-15)


# ----------------------------------------------------------------------------------------------------------------------
# What is built on the kde


@st.composite
def loss_calls(draw) -> dict:
    call = draw(kde_calls(special=draw(st.booleans()), batched=False))
    call = {{"query": "codes", "centers": "lagged"}.get(k, k): v for k, v in call.items()}
    call["divergence"], call["reduction"] = (
        draw(st.sampled_from(list(DIVERGENCES))),
        draw(st.sampled_from(["none", "mean", "sum"])),
    )
    return call


@given(loss_calls())
def test_jsd_loss(call):
    """The log-ratio is off by as much as log p_e; its part in the loss by at most that."""
    start_watch()
    got, truth = kdejsd.jsd_loss(**call), reference.jsd_loss(**widened(call))
    kde = {{"codes": "query", "lagged": "centers"}.get(k, k): v for k, v in call.items()}
    divergence, reduction = kde.pop("divergence"), kde.pop("reduction")
    log_prob, allowed = kdejsd.kde_log_prob(**kde).double(), Allowed(kde)
    target = reference.kde.normal_log_prob(call["codes"].double(), 1.0)
    size = reference.kde_log_prob(**widened(kde)).abs() + target.abs()
    off = allowed.value + SEVERAL * allowed.unit * size
    terms = reference.kde._TERMS[divergence](log_prob - target)  # of log p_e as it was found, which has its own test
    assert got.shape == truth.shape and got.dtype == compute_dtype(call)
    if reduction == "none":
        right = near(got, truth, off, allowed.largest, allowed.out_of_range | terms.isnan())
    else:
        total = off.sum() / (len(off) if reduction == "mean" else 1)
        off_range = bool((~log_prob.isfinite()).any() or ~(off.sum() + size.sum() < 0.03 * allowed.largest))
        right = near(got, truth, total, allowed.largest) | off_range
    assert right.all(), f"{got} for {truth}"


@given(st.data())
def test_jsd(data):
    start_watch()
    dtype, dim = data.draw(dtypes), data.draw(dims)
    exponent = 0 if dtype in HALF else data.draw(st.integers(-9, 9))
    batch = data.draw(st.sampled_from([(), (2,)]))
    samples, centers, targets = (
        data.draw(point_sets(*b, data.draw(sizes), dim, dtype=dtype, exponent=exponent)) for b in (batch, (), batch)
    )
    h = 10.0**exponent
    got = kdejsd.jsd(samples, centers, h, targets)
    wide = (samples.double(), centers.double(), h, targets.double())
    truth = 0.5 * (
        reference.jsd_loss(*wide[:3], reduction="none").mean(-1)
        + reference.jsd_loss(*wide[:3], target_samples=None, reduction="none").mean(-1) * 0
        + _at_targets(*wide[1:]).mean(-1)
    )
    off = sum(
        (a.value + SEVERAL * a.unit * (a.log_sum.abs() + z.double().square().sum(-1) + 1)).mean(-1)
        for z in (samples, targets)
        for a in [Allowed({"query": z, "centers": centers, "bandwidth": h})]
    )
    assert got.shape == batch and got.dtype == compute_dtype({"samples": samples})
    assert near(got, truth, off, torch.finfo(got.dtype).max).all(), f"{got} for {truth}"


def _at_targets(centers: Tensor, h: float, targets: Tensor) -> Tensor:
    """log 2 + log p_t / (p_e + p_t)"""
    log_ratio = reference.kde_log_prob(targets, centers, h) - reference.kde.normal_log_prob(targets, 1.0)
    return math.log(2) - torch.nn.functional.softplus(log_ratio)


@given(
    kde_calls(special=False, batched=False, streamed=True),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    st.integers(1, 70),
)
def test_streamed(call, storage, rows):
    """Centers of another dtype, a part at a time: the same density."""
    start_watch()
    query, bandwidth, own = call["query"], call["bandwidth"], call.get("exclude_self")
    centers = call["centers"].to(storage)
    before, streamed.PART_BYTES = streamed.PART_BYTES, rows * query.shape[-1] * query.element_size()
    try:
        got, _ = streamed.streamed_log_prob(query, centers, bandwidth, own)
    finally:
        streamed.PART_BYTES = before
    whole = {"query": query, "centers": centers.to(query.dtype), "bandwidth": bandwidth}
    whole |= {} if own is None else {"exclude_self": own}
    # Each part has a middle of its own, none further from its points than all are from each other.
    allowed = Allowed(whole)
    truth = reference.kde_log_prob(**widened(whole))
    bound = 4 * allowed.value + SEVERAL * allowed.unit * truth.abs()
    assert near(got, truth, bound, allowed.largest, allowed.out_of_range).all(), f"{got} for {truth}"


# ----------------------------------------------------------------------------------------------------------------------
# omega, the radius, the nearest


@given(st.data(), st.sampled_from(["halves", "all"]), st.sampled_from(["sum", "mean", "max", "none"]))
def test_omega(data, pairs, reduction):
    start_watch()
    dtype = data.draw(dtypes)
    b = data.draw(sizes) * (2 if pairs == "halves" else 1) + (2 if reduction == "max" else 0)
    special = data.draw(st.booleans())
    inputs, codes = (
        data.draw(point_sets(b, data.draw(dims), dtype=dtype, exponent=e, special=special))
        for e in ((0, 0) if dtype in HALF else (data.draw(exponents), data.draw(exponents)))
    )
    compute = torch.float32 if dtype in HALF else dtype
    limits = torch.finfo(compute)
    x, z = (t.to(compute).detach().requires_grad_() for t in (inputs, codes))
    got = kdejsd.omega(x, z, pairs=pairs, reduction=reduction)
    first, second = reference.omega.__globals__["pair_indices"](b, pairs, x.device)
    differences = [(t.detach()[first] - t.detach()[second]).double() for t in (x, z)]
    squares = [d.square().sum(-1) for d in differences]
    # The documented range: beyond it squares lose digits, are 0 or infinite, in an order that is the kernel's own.
    inside = all(
        bool(((s == 0) | ((s > limits.tiny / limits.eps**2) & (s < 0.03 * limits.max))).all()) for s in squares
    )
    ratios = torch.where((squares[0] == 0) & ~squares[1].isnan(), 0.0, squares[1] / squares[0])
    slack = SEVERAL * limits.eps + (inputs.shape[1] + codes.shape[1]) * limits.eps
    if reduction == "max":
        value, pair = got
        assert value.dtype == compute and 0 <= pair[0] < pair[1] < b and (pairs == "all" or pair[1] - pair[0] == b // 2)
        if inside and not ratios.isnan().any():
            assert near(value, ratios.max(), slack * ratios.max() + limits.tiny, limits.max)
        elif ratios.isnan().any():
            assert value.isnan()
        return
    if reduction == "none":
        truth = ratios
        if pairs == "all":
            truth = ratios.new_zeros(b, b).index_put((first, second), ratios)
            truth = truth + truth.mT
    else:
        truth = ratios.sum() if reduction == "sum" else ratios.mean()
    assert got.shape == truth.shape and got.dtype == compute
    if not inside:
        assert bool((got.isnan() | ~truth.isnan()).all())  # NaN stays
        return
    assert near(got, truth, slack * truth + limits.tiny, limits.max).all(), f"{got} for {truth}"
    if reduction == "none" or bool(truth.isnan()):
        return
    wide = [t.detach().double().requires_grad_() for t in (x, z)]
    found = torch.autograd.grad(got, (x, z), materialize_grads=True)
    expected = torch.autograd.grad(
        reference.omega(*wide, pairs=pairs, reduction=reduction), wide, materialize_grads=True
    )
    # Each pair's part in its samples' gradients: 2 ratio / |inputs' difference|, 2 |codes' difference| / |inputs'|^2.
    distance = squares[0].where(squares[0] > 0, INF).sqrt()
    parts = 2 * ratios / distance, 2 * squares[1].sqrt() / distance.square()
    for a, truth, part in zip(found, expected, parts, strict=True):
        bound = part.new_zeros(b).index_add(0, first, part).index_add(0, second, part).unsqueeze(-1) * slack
        right = near(a, truth, bound + limits.tiny * (1 + 1 / distance.amin().square() if b > 1 else 1), limits.max)
        # The gradient's factors pass the range before it does.
        assert (right | ~(parts[0].max() / distance.amin() < 0.03 * limits.max)).all() if b > 1 else True, (
            f"{a} for {truth}"
        )


@given(st.data(), st.booleans(), dtypes)
def test_class_radius_bound(data, is_log, dtype):
    start_watch()
    classes = data.draw(st.one_of(sizes, st.just(1000)))
    rows = data.draw(st.sampled_from([(), (1,), (3,), (2, 2), (0,)]))
    seed, sharpness = data.draw(st.integers(0, 99)), data.draw(st.sampled_from([0.1, 1.0, 10.0, 100.0, 1e4, 1e30]))
    logits = torch.randn((*rows, classes), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    masses = (sharpness * logits).log_softmax(-1) if is_log else (sharpness * logits).softmax(-1)
    odd = [0.0, -0.0, NAN, INF, -INF, 1.0, -1e-3, 1e-45, 1e-30, -1e30, 0.5, -math.log(2)]
    for value in data.draw(st.lists(st.sampled_from(odd), max_size=2)) if masses.numel() else []:
        masses.view(-1)[data.draw(st.integers(0, masses.numel() - 1))] = value
    masses = masses.to(dtype)
    if rows:
        masses = laid_out(masses, data.draw(layouts))
    compute = torch.float32 if dtype in HALF else dtype
    limits = torch.finfo(compute)
    ours, wide = masses.to(compute).detach().requires_grad_(), masses.double().requires_grad_()
    name = "log_p" if is_log else "p"
    got, truth = kdejsd.class_radius_bound(**{name: ours}), reference.class_radius_bound(**{name: wide})
    assert got.shape == rows and got.dtype == compute
    units = SEVERAL * limits.eps
    assert near(got, truth, units * truth + limits.tiny * classes, limits.max).all(), f"{got} for {truth}"
    found, expected = torch.autograd.grad(got.sum(), ours)[0], torch.autograd.grad(truth.sum(), wide)[0]
    right = near(found, expected, units * expected.abs() + limits.tiny, limits.max)
    assert right.all(), f"{found[~right][0]} for {expected[~right][0]} at {ours[~right][0]}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_mass_of_minus_0(dtype):
    masses = torch.tensor([[-0.0, 0.5, 0.5]], dtype=dtype, requires_grad=True)
    value = kdejsd.class_radius_bound(masses)
    assert torch.equal(value, kdejsd.class_radius_bound(masses.detach().abs()))
    assert torch.autograd.grad(value, masses)[0][0, 0] == 0


@given(st.data(), dtypes)
def test_nearest_other_class(data, dtype):
    start_watch()
    n, dim = data.draw(st.one_of(st.just(0), sizes)), data.draw(dims)
    batch = data.draw(st.sampled_from([(), (2,), (0,)]))
    exponent = 0 if dtype in HALF else data.draw(exponents)
    latents = data.draw(point_sets(*batch, n, dim, dtype=dtype, exponent=exponent, special=data.draw(st.booleans())))
    kinds = data.draw(st.sampled_from([[0], [0, 1], [-(2**63), 2**63 - 1], list(range(50))]))
    labels = torch.tensor(kinds)[torch.randint(len(kinds), (n,), generator=torch.Generator().manual_seed(n))]
    compute = torch.float32 if dtype in HALF else dtype
    limits = torch.finfo(compute)
    got = kdejsd.nearest_other_class(latents, labels)
    assert got.distance.shape == got.index.shape == (*batch, n) and got.distance.dtype == compute
    wide = latents.double()
    truth = reference.nearest_other_class(wide, labels)
    squares = (wide.unsqueeze(-2) - wide.unsqueeze(-3)).square().sum(-1)
    inside = bool(((squares == 0) | (squares > limits.tiny / limits.eps) | squares.isnan()).all())
    exists = got.index >= 0
    far = ~(truth.distance.square() < 0.03 * limits.max)
    assert torch.equal(got.distance.isnan(), truth.distance.isnan())
    assert (exists | far | truth.index.lt(0)).all()
    assert (got.distance[~exists].isnan() | got.distance[~exists].isinf()).all()
    if not n:
        return
    chosen = labels.expand(*batch, n).gather(-1, got.index.clamp_min(0))
    assert (chosen != labels)[exists].all()
    if inside:
        least = truth.distance
        right = near(got.distance, least, (SEVERAL + dim) * limits.eps * least + limits.tiny, limits.max) | (
            far & ~exists
        )
        assert right.all(), f"{got.distance} for {least}"


# ----------------------------------------------------------------------------------------------------------------------
# Errors

Z, C = torch.zeros(4, 3), torch.zeros(5, 3)
odd_tensors = st.one_of(
    st.sampled_from([None, 3, 0.5, "text", [[0.0]], Z.numpy(), Z.to_sparse(), Z.to("meta"), Z.bool(), Z.cfloat()]),
    st.builds(
        torch.zeros,
        st.lists(st.integers(0, 5), max_size=4).map(tuple),
        dtype=st.sampled_from([torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.uint8]),
    ),
)
CALLS = {
    "kde_log_prob": (
        kdejsd.kde_log_prob,
        {"query": Z, "centers": C, "bandwidth": 0.5, "log_weights": C[:, 0], "exclude_self": False},
    ),
    "jsd_loss": (
        kdejsd.jsd_loss,
        {"codes": Z, "lagged": C, "bandwidth": 0.5, "log_weights": C[:, 0], "target_samples": Z},
    ),
    "jsd": (kdejsd.jsd, {"samples": Z, "centers": C, "bandwidth": 0.5, "target_samples": Z}),
    "omega": (kdejsd.omega, {"inputs": Z, "codes": Z, "pairs": "halves"}),
    "class_radius_bound": (kdejsd.class_radius_bound, {"p": Z, "log_p": None}),
    "nearest_other_class": (kdejsd.nearest_other_class, {"latents": Z, "labels": torch.arange(4)}),
}


@pytest.mark.parametrize("name", CALLS)
@given(st.data())
def test_an_odd_argument_is_served_or_named(name, data):
    start_watch()
    function, call = CALLS[name]
    changed = data.draw(st.lists(st.sampled_from(sorted(call.keys() - {"pairs"})), min_size=1, max_size=2, unique=True))
    call = call | {k: data.draw(odd_tensors) for k in changed}
    try:
        result = function(**call)
    except (TypeError, ValueError, RuntimeError) as error:
        assert any(k in str(error) for k in call), f"{type(error).__name__}: {error}"
        assert not isinstance(error, RuntimeError) or "device" in str(error), f"{type(error).__name__}: {error}"
    else:
        tensors = result if isinstance(result, tuple) else (result,)
        assert all(isinstance(t, Tensor) for t in tensors)


@pytest.mark.parametrize(
    ("text", "function", "arguments"),
    [
        (
            "centers and bandwidth and query.*got \\[5\\] and \\[\\] and \\[2\\]",
            kdejsd.kde_log_prob,
            (Z.expand(2, 4, 3), C.expand(5, 5, 3), 0.5),
        ),
        (
            "centers and bandwidth must broadcast, got \\[2\\] and \\[3\\]",
            kdejsd.kde_log_prob,
            (Z, C.expand(2, 5, 3), torch.ones(3, 5)),
        ),
        ("samples and target_samples must", kdejsd.jsd, (Z.expand(2, 4, 3), C, 0.5, Z.expand(3, 4, 3))),
    ],
)
def test_leading_dimensions_that_do_not_broadcast(text, function, arguments):
    with pytest.raises(ValueError, match=f"the leading dimensions of {text}"):
        function(*arguments)


@pytest.mark.parametrize(
    ("bandwidth", "text"),
    [(1e-300, r"torch\.float32, got 1"), (1e300, r"torch\.float32, got 1"), (10**400, "float64, got a number of 401")],
)
def test_a_number_beyond_the_dtype(bandwidth, text):
    with pytest.raises(ValueError, match=f"bandwidth must be in the range of {text}"):
        kdejsd.kde_log_prob(Z, C, bandwidth)
