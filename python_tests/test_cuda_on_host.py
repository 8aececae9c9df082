"""The CUDA kernels' source, run on the host thread by thread: what it computes, without a device.

Calls with CPU tensors go the way of the package down to the kernels, where the CUDA ones take the place of the CPU's;
so the ops' own tests serve here too. What only a device can show (that it compiles there, races, speed) is not here.
"""

from __future__ import annotations

import ctypes
import math

import pytest
import test_divergence as divergences
import test_kde
import test_nearest
import test_omega
import test_properties
import test_radius
import torch
from cuda_on_host import OPS, SHARED_BYTES, CudaOnHost, build, missing, struct
from edges import around
from helpers import DTYPES, worst

import kdejsd
from kdejsd import reference

# Few multiprocessors: long loops in each block. Many: splits of one tile each, and merges. And both orders of threads.
DEVICES = [pytest.param((2, False), id="loops"), pytest.param((1000, True), id="splits, backwards")]


@pytest.fixture(scope="session")
def library(tmp_path_factory):
    if reason := missing():
        pytest.skip(reason)
    return build(tmp_path_factory.mktemp("cuda_on_host"))


@pytest.fixture(params=DEVICES)
def host(request, library, monkeypatch):
    host = CudaOnHost(library)
    host.multiprocessors, host.backwards = request.param
    for op in OPS:
        monkeypatch.setattr(f"kdejsd.ops.{op}.native", lambda: host)
    return host


def same_in_any_order(host, function, call) -> list[torch.Tensor]:
    """Value and gradients; those of threads in the other order must have the same bits."""
    found = test_kde.value_and_gradients(function, call)
    host.backwards = not host.backwards
    for got, expected in zip(test_kde.value_and_gradients(function, call), found, strict=True):
        assert torch.equal(got, expected)
    return found


# ----------------------------------------------------------------------------------------------------------------------
# The kde from differences: float64, small l, and what the transposed pass builds on


@pytest.mark.parametrize("kind", test_kde.KDES)
@pytest.mark.parametrize("size", [(65, 121, 7), (130, 59, 17), (33, 300, 40), (9, 70, 111)], ids=str)
def test_kde_gradients(size, kind, host):
    call = test_kde.arguments(kind, *size, torch.float64, "cpu")
    truth = test_kde.value_and_gradients(reference.kde_log_prob, call)
    for got, expected in zip(same_in_any_order(host, kdejsd.kde_log_prob, call), truth, strict=True):
        assert worst(got, expected) < 1e-13 * size[2] ** 0.5
    call = test_kde.in_dtype(call, torch.float32)
    truth = test_kde.value_and_gradients(reference.kde_log_prob, test_kde.in_dtype(call, torch.float64))
    plain = test_kde.value_and_gradients(reference.kde_log_prob, call)
    for got, yardstick, expected in zip(same_in_any_order(host, kdejsd.kde_log_prob, call), plain, truth, strict=True):
        assert worst(got, expected) <= 2 * worst(yardstick, expected) + 1.2e-6


# ----------------------------------------------------------------------------------------------------------------------
# Tensor cores: the gradient for queries and for a single bandwidth, float32, l up to 256


def query_gradients(call: dict) -> dict:
    """Copies the call, without the gradients that take the transposed pass, and so no tensor cores."""
    bandwidth = call["bandwidth"]
    keep = ["query"] if isinstance(bandwidth, torch.Tensor) and bandwidth.ndim else ["query", "bandwidth"]
    return {
        k: v.detach().requires_grad_(k in keep) if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in call.items()
    }


def errors(found: list[torch.Tensor], call: dict) -> list[float]:
    truth = test_kde.value_and_gradients(reference.kde_log_prob, test_kde.in_float64(call))
    return [worst(got, expected) for got, expected in zip(found, truth, strict=True)]


@pytest.mark.parametrize("kind", ["scalar tensor", "per center, weights", "excluded, weights"])
@pytest.mark.parametrize(
    "size",
    [(1, 1, 16), (33, 300, 40), (130, 259, 17), (9, 70, 111), (20, 100, 256), (65, 121, 1), (140, 70, 5), (9, 300, 8)],
    ids=str,
)
def test_tensor_cores(size, kind, host):
    call = query_gradients(test_kde.arguments(kind, *size, torch.float32, "cpu"))
    if size[1] == 1:
        call.pop("exclude_self", None)
    yardstick = errors(test_kde.value_and_gradients(reference.kde_log_prob, call), call)
    split = same_in_any_order(host, kdejsd.kde_log_prob, call)
    for error, plain in zip(errors(split, call), yardstick, strict=True):
        assert error <= 2 * plain + 1.2e-6
    host.reduced = True
    rounded = same_in_any_order(host, kdejsd.kde_log_prob, call)
    truth = test_kde.value_and_gradients(reference.kde_log_prob, test_kde.in_float64(call))
    assert worst(rounded[0], truth[0]) < 3e-4 and worst(rounded[1], truth[1]) < 3e-3
    if kind == "scalar tensor":  # the sum over n queries of differences whose second part is l / h
        part = size[0] * size[2] / call["bandwidth"].item()
        assert abs(rounded[2].item() - truth[2].item()) < 5e-4 * part
    assert size[1] == 1 or size[2] == 1 or not torch.equal(rounded[1], split[1])


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("two_clusters", [False, True])
@pytest.mark.parametrize(("offset", "h"), [(3.0, 0.28), (100.0, 0.28), (100.0, 0.1)])
def test_tensor_cores_where_the_expanded_square_loses_digits(h, offset, two_clusters, reduced, host):
    """Small bandwidths far from the origin, for one cluster, and for two, between which no shift helps."""
    host.reduced = reduced
    query, centers = (test_kde.points(n, 18, dtype=torch.float32, seed=n) + offset for n in (40, 200))
    if two_clusters:
        centers[::2] *= -1
    query[:30] = centers[:30] + h * test_kde.points(30, 18, dtype=torch.float32, seed=5)
    call = {"query": query.requires_grad_(), "centers": centers, "bandwidth": h}
    yardstick = errors(test_kde.value_and_gradients(reference.kde_log_prob, call), call)
    found = errors(test_kde.value_and_gradients(kdejsd.kde_log_prob, call), call)
    if reduced and h == 0.28 and not two_clusters:  # near enough for products
        assert max(found) < 3e-3
        return
    for i, (error, plain) in enumerate(zip(found, yardstick, strict=True)):
        assert error <= (2 if i == 0 else 3) * plain + 1.2e-6


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("dim", [16, 64, 256])
def test_tensor_cores_keep_the_bound_on_an_exponent(dim, reduced, host):
    """2^-17 or 2^-9 of its parts, shortly before pairs are taken from differences; beyond, what differences have."""
    host.reduced = reduced
    bound, limit = (2**-9, min(12 * dim, 512)) if reduced else (2**-17, 12 * dim)
    for share in (0.85, 1.4):
        radius = math.sqrt(share * limit / (dim * math.log2(math.e)))
        query, center = (radius * test_kde.points(n, dim, dtype=torch.float32, seed=n) for n in (70, 1))
        error = test_kde.error_of_exponents(query, center)
        if share < 1:
            assert bound / 500 < error < bound / 4
        else:
            assert error < 2**-20


def test_tensor_cores_edges(host):
    for reduced in (False, True):
        host.reduced = reduced
        query, centers = (test_kde.points(n, 24, dtype=torch.float32, seed=n) for n in (70, 130))
        query[1, 3], query[2, 5], query[3, 0] = math.nan, math.inf, 1e30
        call = {"query": query.requires_grad_(), "centers": centers, "bandwidth": 1.0}
        value, gradient = test_kde.value_and_gradients(kdejsd.kde_log_prob, call)
        assert value.isnan().nonzero().tolist() == [[1]] and value.isneginf().nonzero().tolist() == [[2], [3]]
        expected = reference.kde_log_prob(query[4:].double(), centers.double(), 1.0)
        assert gradient[1].isnan().all() and worst(value[4:], expected) < 3e-4
        assert value[0].isfinite() and gradient[4:].isfinite().all()
        for bad in (math.nan, -math.inf):
            log_weights = torch.zeros(130)
            log_weights[77] = bad
            value = kdejsd.kde_log_prob(query[4:], centers, 1.0, log_weights=log_weights)
            assert value.isnan().all() if math.isnan(bad) else value.isfinite().all()
        centers[129, 23] = math.nan
        assert kdejsd.kde_log_prob(query, centers, 1.0).isnan().all()
        wide = test_kde.points(3, 50, 21, dtype=torch.float32)
        call = {"query": wide[:, :20], "centers": wide[:, 20:, :], "bandwidth": torch.tensor([[1.0], [2.0], [0.5]])}
        assert worst(kdejsd.kde_log_prob(**call), reference.kde_log_prob(**test_kde.in_float64(call))) < 3e-4


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("dim", [1, 16])
def test_tensor_cores_lose_no_nan(dim, reduced, host):
    """The norms and the products both carry it."""
    host.reduced = reduced
    query, centers = (test_kde.points(n, dim, dtype=torch.float32, seed=n) for n in (70, 130))
    for row in (0, 37, 69):
        bad = query.clone()
        bad[row, row % dim] = math.nan
        value, gradient = test_kde.value_and_gradients(
            kdejsd.kde_log_prob, {"query": bad.requires_grad_(), "centers": centers, "bandwidth": 2.0}
        )
        assert value.isnan().nonzero().tolist() == [[row]] and gradient[row].isnan().all()
        assert not gradient[:row].isnan().any() and not gradient[row + 1 :].isnan().any()
    for row in (0, 64, 129):
        bad = centers.clone()
        bad[row, row % dim] = math.nan
        call = {"query": query.requires_grad_(), "centers": bad, "bandwidth": 2.0}
        for tensor in test_kde.value_and_gradients(kdejsd.kde_log_prob, call):
            assert tensor.isnan().all()


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("far", [1e18, 3e38, math.inf])
def test_tensor_cores_and_a_center_that_is_far_away(far, reduced, host):
    """It counts for nothing, whatever its square and its parts become."""
    host.reduced = reduced
    query, centers = (test_kde.points(n, 20, dtype=torch.float32, seed=n) for n in (40, 100))
    expected = reference.kde_log_prob(query.double(), centers[1:].double(), 2.0) + math.log(99 / 100)
    centers[0, 3] = far
    assert worst(kdejsd.kde_log_prob(query, centers, 2.0), expected) < (3e-4 if reduced else 1e-6)


@pytest.mark.parametrize("dim", [3, 20, 70])
@pytest.mark.parametrize("case", ["far centers", "narrow centers", "near centers"])
def test_tensor_cores_beyond_what_float16_holds(case, dim, host):
    """Centers whose coordinates are too large for it, or so narrow that their weights are; and the smallest ones."""
    query, centers = (0.1 * test_kde.points(n, dim, dtype=torch.float32, seed=n) for n in (70, 130))
    call = {"query": query, "centers": centers, "bandwidth": 1.0}
    if case == "far centers":
        call["centers"] = 2e4 * centers
    elif case == "narrow centers":
        call["bandwidth"] = torch.linspace(1.0, 1.5, 130)
        call["bandwidth"][17] = 1 / 200
        call["query"][:40] = centers[17] = 0
        call["query"][:40, 0] = torch.linspace(-1e-3, 1e-3, 40)
    else:
        call |= {"query": 1e-4 * query, "centers": 1e-4 * centers}
    call["query"].requires_grad_()
    yardstick = errors(test_kde.value_and_gradients(reference.kde_log_prob, call), call)
    found = errors(test_kde.value_and_gradients(kdejsd.kde_log_prob, call), call)
    for error, plain in zip(found, yardstick, strict=True):
        assert error <= 2 * plain + 1.2e-6


def test_tensor_cores_need_shared_memory(host):
    """A device that has too little for l = 256 computes it as without them, and no launch fails."""
    call = query_gradients(test_kde.arguments("number", 20, 100, 256, torch.float32, "cpu"))
    host.reduced = True
    with_them = kdejsd.kde_log_prob(**call)
    host.shared_bytes = 99 * 1024
    without = kdejsd.kde_log_prob(**call)
    assert not torch.equal(with_them, without) and worst(with_them, without) < 1e-4
    host.reduced = False
    assert torch.equal(kdejsd.kde_log_prob(**call), without)


# ----------------------------------------------------------------------------------------------------------------------
# The frame of reference


@pytest.mark.parametrize("dim", [1, 20])
@pytest.mark.parametrize("place", [0, 61, 199])
@pytest.mark.parametrize("other", [0.0, -100.0, 1e20])
def test_a_center_apart_takes_no_digits_from_the_others(other, place, dim, host):
    """Centers near 100, whose gradients at so small a bandwidth are lost unless points are taken relative to them."""
    query, centers = (100 + 0.003 * test_kde.points(n, dim, dtype=torch.float32, seed=n) for n in (40, 200))
    centers[place] = other
    call = {"query": query.requires_grad_(), "centers": centers, "bandwidth": 1e-3 * dim**0.5}
    yardstick = errors(test_kde.value_and_gradients(reference.kde_log_prob, call), call)
    found = errors(test_kde.value_and_gradients(kdejsd.kde_log_prob, call), call)
    for error, plain in zip(found, yardstick, strict=True):
        assert error <= 2 * plain + 1.2e-6


@pytest.mark.parametrize("for_centers", [False, True])
@pytest.mark.parametrize("kind", test_kde.FAR)
@pytest.mark.parametrize(("dim", "h"), [(2, 0.27), (17, 0.5)])
def test_points_far_from_others_take_none_of_their_digits(dim, h, kind, for_centers, host):
    test_kde.test_points_far_from_others_take_none_of_their_digits(dim, h, kind, for_centers, None)


@pytest.mark.parametrize("for_centers", [False, True])
@pytest.mark.parametrize("spread", [0.02, 0.2])
@pytest.mark.parametrize(("dim", "offset"), [(2, 3.0), (12, 1.0), (40, 30.0)])
def test_a_narrow_cluster_beside_the_origin(dim, offset, spread, for_centers, host):
    """Its points differ by less than a bandwidth, and from the origin by a few."""
    query, centers = (offset + spread * test_kde.points(n, dim, dtype=torch.float32, seed=n) for n in (80, 96))
    call = {"query": query.requires_grad_(), "centers": centers.requires_grad_(for_centers), "bandwidth": 0.3}
    test_kde.assert_at_most_twice_the_error_of_plain_pytorch(call)


@pytest.mark.parametrize("for_centers", [False, True])
@pytest.mark.parametrize(("dim", "per_center"), [(3, False), (3, True), (40, False), (40, True), (300, False)])
def test_blocks_of_one_cluster_and_of_both(dim, per_center, for_centers, host):
    """Two clusters one after the other: blocks of queries or of centers near the origin, far from it, and of both."""
    query, centers = (0.1 * test_kde.points(n, dim, dtype=torch.float32, seed=n) for n in (170, 150))
    query[70:] += 1000
    centers[80:] += 1000
    bandwidth = 0.3 + 0.7 * torch.rand(150, generator=torch.Generator().manual_seed(3)) if per_center else 0.4
    if per_center:
        bandwidth.requires_grad_(for_centers)
    call = {"query": query.requires_grad_(), "centers": centers.requires_grad_(for_centers), "bandwidth": bandwidth}
    test_kde.assert_at_most_twice_the_error_of_plain_pytorch(call)


# ----------------------------------------------------------------------------------------------------------------------
# Plans and launches


def forward_arguments(n: int, m: int, dim: int, products: str, *, batch: int = 1, gradient: bool = True, **more: bool):
    """KdeForward of float32 arrays that nobody will read."""
    mixture = struct("KdeMixture")(
        dtype="kFloat32",
        batch=batch,
        n=n,
        m=m,
        l=dim,
        query=8,
        centers=8,
        bandwidth=8,
        log_weights=0,
        exclude=0,
        per_center=more.get("per_center", False),
        query_stride=n * dim if batch > 1 else 0,
        centers_stride=m * dim if batch > 1 else 0,
        bandwidth_stride=m if batch > 1 else 0,
        log_weights_stride=0,
        exclude_stride=0,
        bandwidth_number=0.0,
    )
    return struct("KdeForward")(
        mixture=mixture,
        value_kind="kLogProb",
        target_variance=1.0,
        products=products,
        own=0,
        value=8,
        dquery=8 if gradient else 0,
        dbandwidth=8 if more.get("dbandwidth") else 0,
    )


@pytest.mark.parametrize("shared_bytes", [227 * 1024, 163 * 1024, 99 * 1024], ids=["sm_90", "sm_80", "sm_86"])
@pytest.mark.parametrize("products", ["kNone", "kSplit", "kReduced"])
@pytest.mark.parametrize("dim", [1, 16, 17, 64, 65, 128, 129, 200, 256, 257, 1000])
def test_plan_of_a_forward_pass(dim, products, shared_bytes, host):
    for n, m, batch in [(1, 1, 1), (100, 10_000, 1), (4096, 4096, 1), (7, 3, 500), (512, 10**6, 1), (10**6, 10**9, 1)]:
        for more in ({}, {"per_center": True}, {"dbandwidth": True}, {"gradient": False}):
            args = forward_arguments(n, m, dim, products, batch=batch, **more)
            plan = host.forward_plan(args, 132, shared_bytes)
            rows, columns = 64, 64
            if plan["tensor_steps"]:
                assert products != "kNone" and 16 * plan["tensor_steps"] >= dim and plan["tensor_warps"] in (4, 8)
                assert plan["bytes"] <= shared_bytes
                assert plan["tensor_m_tiles"] == (2 if plan["tensor_steps"] <= 4 else 1)
                rows = 16 * plan["tensor_m_tiles"] * plan["tensor_warps"]
                columns = 32 if plan["tensor_steps"] <= 8 else 16
                assert plan["groups"] == 1
            elif more.get("gradient", True):  # the blocks' chunks are all of l, none twice
                chunks = -(-dim // (16 * plan["lc"]))
                assert plan["groups"] * plan["chunks"] >= chunks > (plan["groups"] - 1) * plan["chunks"]
                assert plan["chunks"] <= plan["slabs"]
            assert plan["query_tiles"] == -(-n // rows) and plan["center_tiles"] == -(-m // columns)
            # Every tile in one split, no split empty, and few enough tiles that 32 bits count their centers.
            splits, each = plan["splits"], plan["tiles_per_split"]
            assert splits * each >= plan["center_tiles"] > (splits - 1) * each
            assert each * columns < 2**31
            # The workspace's arrays lie one behind the other.
            sums = splits * batch * n
            moments = sums if more.get("dbandwidth") else 0
            in_dquery = splits == 1 or not more.get("gradient", True)
            assert plan["max"] == 0 and plan["sum"] == sums and plan["moment"] == 2 * sums
            assert plan["sum_centers"] == 2 * sums + moments
            assert plan["middle"] == plan["sum_centers"] + (0 if in_dquery else sums * dim)
            assert plan["elements"] == plan["middle"] + (2 * batch if more.get("per_center") else 0)


def test_plan_fills_the_device_and_keeps_most_warps_at_work(host):
    def plan(n, m, dim, shared_bytes=227 * 1024):
        return host.forward_plan(forward_arguments(n, m, dim, "kSplit"), 132, shared_bytes)

    for n, m, dim in [(100, 10_000, 8), (512, 100_000, 40), (1024, 10**6, 64), (512, 100_000, 256)]:
        found = plan(n, m, dim)
        assert found["tensor_steps"] and found["splits"] * found["query_tiles"] >= 132
    # One block of 8 warps has the room of one of 4: both cannot be there twice.
    assert plan(512, 100_000, 256)["tensor_warps"] == 8
    assert plan(512, 100_000, 256, shared_bytes=163 * 1024)["tensor_warps"] == 4
    assert plan(512, 100_000, 64)["tensor_warps"] == 4
    # A tile of 32 centers may be too large where one of 16 is not.
    assert [plan(512, 100_000, dim, shared_bytes=99 * 1024)["tensor_steps"] for dim in (64, 100, 128, 160, 256)] == [
        *(4, 8, 16, 16, 0)
    ]


def test_tuning(host):
    """A benchmark may set these, and leaves the rest as it was."""

    def plan(dim=40):
        return host.forward_plan(forward_arguments(512, 100_000, dim, "kSplit"), 132, SHARED_BYTES)

    usual = plan()
    try:
        assert host.set_tuning("splits", 7) and plan()["splits"] == 7
        assert host.set_tuning("splits", 0) and plan() == usual
        assert host.set_tuning("tensor_warps", 8) and plan()["tensor_warps"] == 8
        assert host.set_tuning("tensor_from", 41) and plan()["tensor_steps"] == 0 and plan(41)["tensor_steps"] == 4
        for name, value in [
            ("splits", -1),
            ("tensor_from", 0),
            ("tensor_from", 258),
            ("tensor_warps", 9),
            ("depth", 1),
        ]:
            assert not host.set_tuning(name, value)
    finally:
        for name, value in [("splits", 0), ("tensor_warps", 0), ("tensor_from", 1)]:
            host.set_tuning(name, value)
    assert plan() == usual


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("warps", [4, 8])
@pytest.mark.parametrize("dim", [9, 40])
def test_blocks_of_either_size(dim, warps, reduced, host):
    """Each choice that is made for speed gives the same numbers up to the rounding of either."""
    host.reduced = reduced
    call = query_gradients(test_kde.arguments("excluded, weights", 70, 130, dim, torch.float32, "cpu"))
    usual = test_kde.value_and_gradients(kdejsd.kde_log_prob, call)
    try:
        assert host.set_tuning("tensor_warps", warps)
        args = forward_arguments(70, 130, dim, "kReduced" if reduced else "kSplit")
        assert host.forward_plan(args, 132, SHARED_BYTES)["tensor_warps"] == warps
        found = same_in_any_order(host, kdejsd.kde_log_prob, call)
    finally:
        host.set_tuning("tensor_warps", 0)
    for got, expected in zip(found, usual, strict=True):
        assert worst(got, expected) < (3e-4 if reduced else 1e-6)


@pytest.mark.parametrize("size", [(65, 121, 2), (33, 300, 40)], ids=str)
def test_without_tensor_cores(size, host):
    """The other kernel does what they do, where a benchmark asks for it."""
    call = query_gradients(test_kde.arguments("excluded, weights", *size, torch.float32, "cpu"))
    yardstick = errors(test_kde.value_and_gradients(reference.kde_log_prob, call), call)
    with_them = test_kde.value_and_gradients(kdejsd.kde_log_prob, call)
    assert host.set_tuning("tensor_from", 257)
    try:
        without = same_in_any_order(host, kdejsd.kde_log_prob, call)
    finally:
        host.set_tuning("tensor_from", 1)
    assert not torch.equal(with_them[1], without[1])
    for error, plain in zip(errors(without, call), yardstick, strict=True):
        assert error <= 2 * plain + 1.2e-6


def test_launches_leave_devices_and_limits_alone(host):
    """A device that is set back may get a context it never had; a limit that a call sets may be lowered before another
    thread's launch."""
    query, centers = (test_kde.points(n, 250, dtype=torch.float32, seed=n) for n in (20, 50))
    kdejsd.kde_log_prob(query, centers, 4.0)
    before = host.devices_set(), host.allowances()
    for dim in (200, 140, 250):
        kdejsd.kde_log_prob(query[:, :dim].contiguous(), centers[:, :dim].contiguous(), 4.0)
    kdejsd.omega(query, centers[:20])
    kdejsd.nearest_other_class(query, torch.arange(20) % 2)
    assert (host.devices_set(), host.allowances()) == before and before[0] == 0


# ----------------------------------------------------------------------------------------------------------------------
# A center of its own for each code


@pytest.mark.parametrize("divergence", divergences.DIVERGENCES)
def test_own_center(divergence, host):
    for exclusion in divergences.EXCLUSIONS:
        for name in ("none", "smoothed", "mixture"):
            for reduction in ("mean", "none"):
                divergences.test_own_is_the_reference(name, divergence, reduction, exclusion, divergences.CODES, "cpu")
    for size in divergences.OWN_SIZES:
        divergences.test_own_in_float32(size, divergence, divergences.CODES, "cpu")
    for where in ("its own center", "the lagged", "neither"):
        divergences.test_own_of_codes_at_10_000_bandwidths(where, divergence, "cpu")
    divergences.test_own_twice(divergence, "cpu")


def test_own_center_edges(host):
    divergences.test_own_where_the_lagged_codes_are_beyond_the_range_of_float32("cpu")
    divergences.test_own_not_contiguous("cpu")
    divergences.test_own_of_no_codes()
    for dtype in DTYPES:
        divergences.test_own_nan_in_nan_out(dtype, "none", divergences.CODES, "cpu")
    for batch in [((3, 11, 3), (7, 3), (), (3, 11, 3)), ((4, 1, 11, 3), (3, 7, 3), (4, 1, 1), (3, 11, 3))]:
        divergences.test_own_batches_broadcast(*batch, "none", divergences.CODES, "cpu")


def test_own_center_beside_products_in_reduced(host):
    host.reduced = True
    call = divergences.fresh(divergences.own_arguments("index", n=33, m=300, dim=40), torch.float32, divergences.CODES)
    wide = divergences.fresh(call, torch.float64, divergences.CODES)
    found, expected = (
        divergences.value_and_gradients(f, c | {"divergence": "kl", "reduction": "none"})
        for f, c in ((kdejsd.jsd_loss, call), (reference.jsd_loss, wide))
    )
    assert worst(found[0], expected[0]) < 1e-3 and worst(found[1], expected[1]) < 3e-3


# ----------------------------------------------------------------------------------------------------------------------
# Edges


@pytest.mark.parametrize("dtype", DTYPES)
def test_kde_of_many_chunks_and_far_points(dtype, host):
    test_kde.test_far_queries_and_large_dimension(dtype, "cpu")
    test_kde.test_near_centers_come_last("excluded", dtype, "cpu")
    test_kde.test_beyond_the_range_of_exponentials(dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
def test_kde_edges(dtype, host):
    test_kde.test_nan_in_nan_out(dtype, "cpu")
    test_kde.test_not_contiguous(dtype, "cpu")
    test_kde.test_zero_weight_is_no_center("cpu")
    test_kde.test_infinite_query_has_density_zero("cpu")
    test_kde.test_empty_queries("cpu")
    for distance in (30.0, 3000.0):
        test_kde.test_the_weights_of_a_far_query_sum_to_1(distance, "cpu")
    for distance in (1e3, 1e4, 1e5):
        for dim in (1, 20, 70):
            test_kde.test_equal_centers_share_a_far_query(distance, dim, "cpu")
    for call in [((3, 11, 2), (3, 7, 2), (7,), (3, 11)), ((4, 1, 11, 2), (3, 7, 2), (4, 1, 7), (4, 3, 11))]:
        test_kde.test_batches_broadcast(*call, weighted=True, device="cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [2, 20])
def test_kde_bandwidths_far_apart(dim, dtype, host):
    """In l = 20 the tensor cores take float32."""
    test_properties.test_bandwidths_far_apart(dtype, dim)


@pytest.mark.parametrize("places", [(0, 1099), (1050, 40), (1024, 1023)])
def test_kde_bandwidths_too_far_apart_wherever_they_are(places, host):
    """The least and the greatest of a batch item, which the threads of a block look for."""
    query, centers = (test_kde.points(2, n, 2, dtype=torch.float32, seed=n) for n in (3, 1100))
    bandwidth = torch.ones(2, 1100)
    bandwidth[0, list(places)] = torch.tensor([1e-16, 1e16])
    value = kdejsd.kde_log_prob(query, centers, bandwidth)
    assert value[0].isnan().all() and value[1].isfinite().all()
    bandwidth[0, list(places)] = torch.tensor([-1.0, 1.0])
    value = kdejsd.kde_log_prob(query, centers, bandwidth, exclude_self=torch.full((3,), places[0]))
    assert value[0].isnan().all() and value[1].isfinite().all()


def test_kde_numbers_at_the_ends_of_their_range(host):
    for dtype, h in [(torch.float32, 1e-44), (torch.float64, 5e-324)]:
        test_properties.test_a_bandwidth_that_is_not_a_normal_number(dtype, h)
    for distance in (1e15, 1e20, math.inf):
        test_properties.test_a_far_query_takes_nothing_from_the_center_it_leaves_out(distance)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [3, 20])
@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_kde_log_weights_that_are_no_weights(weight, dim, dtype, host):
    query, centers = (test_kde.points(n, dim, dtype=dtype, seed=n) for n in (70, 130))
    query[0] = math.inf
    for place in (0, 129):
        log_weights = torch.zeros(130, dtype=dtype)
        log_weights[place] = weight
        call = {"query": query, "centers": centers.requires_grad_(), "bandwidth": 1.0, "log_weights": log_weights}
        for tensor in test_kde.value_and_gradients(kdejsd.kde_log_prob, call):
            assert tensor.isnan().all()


# ----------------------------------------------------------------------------------------------------------------------
# The other ops


@pytest.mark.parametrize("call", test_omega.CALLS, ids="-".join)
def test_omega_op(call, host):
    for size in [(2, 1, 1), (70, 33, 5), (130, 3, 40)]:
        test_omega.test_float64_is_the_reference(size, call, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_log", [False, True], ids=["p", "log_p"])
def test_radius_op(is_log, dtype, host):
    for shape in [(1, 2), (37, 101), (2, 5000)]:
        test_radius.test_rows(shape, dtype, is_log, "cpu")
    test_radius.test_ends_and_nan(dtype, "cpu")
    test_properties.test_a_mass_of_minus_0(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_op(dtype, host):
    for size in [(1, 1), (70, 2), (130, 70)]:
        test_nearest.test_distance_and_index(size, dtype, "cpu")


# ----------------------------------------------------------------------------------------------------------------------
# The edges of what the kernels take at a time, as their sources tell them


@pytest.fixture
def edges(library):
    """One below, at and one above each size of what an op counts."""
    library.tile_sizes.restype = ctypes.c_char_p
    sizes = [line.split() for line in library.tile_sizes().decode().splitlines()]
    return lambda counted: around(int(size) for name, size in sizes if name == counted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_of_queries_and_centers(dtype, edges, host):
    bound = 5e-6 if dtype == torch.float32 else 1e-13
    for size in edges("kde_points"):
        for n, m in ((size, 9), (9, size)):
            assert_close_to_float64(test_kde.arguments("excluded, weights", n, m, 3, dtype, "cpu"), bound)


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_of_dimensions(dtype, edges, host):
    for size in edges("kde_dims"):
        bound = 5e-6 if dtype == torch.float32 else 1e-13 * size**0.5
        assert_close_to_float64(test_kde.arguments("per center, weights", 5, 9, size, dtype, "cpu"), bound)


def assert_close_to_float64(call: dict, bound: float) -> None:
    """With every gradient, and with those of the queries alone, for which tensor cores may serve."""
    assert max(test_kde.errors_beside_float64("kde_log_prob", call)) < bound
    assert max(test_kde.errors_beside_float64("kde_log_prob", test_kde.with_gradients_for(call, "query"))) < bound
    assert max(test_kde.errors_beside_float64("jsd_loss", test_kde.loss_call(call))) < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_of_omega(dtype, edges, host):
    """All pairs are cut into tiles, and a pair of the halves into coordinates alone."""
    bound = 3e-6 if dtype == torch.float32 else 1e-13
    for size in edges("omega_samples"):
        for reduction in ("sum", "max", "none"):
            samples = test_omega.samples(size, 3, 2, dtype, "cpu")
            assert test_omega.error_beside_float64(*samples, ("all", reduction)) < bound
    for size in edges("omega_dims"):
        for pairs in ("all", "halves"):
            samples = test_omega.samples(10, size, size + 1, dtype, "cpu")
            assert test_omega.error_beside_float64(*samples, (pairs, "sum")) < bound


@pytest.mark.parametrize("dtype", DTYPES)
def test_edges_of_nearest(dtype, edges, host):
    for size in [(n, 3) for n in edges("nearest_samples")] + [(40, dim) for dim in edges("nearest_dims")]:
        test_nearest.test_distance_and_index(size, dtype, "cpu")
        test_nearest.assert_gradient(size, dtype, "cpu")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_log", [False, True], ids=["p", "log_p"])
def test_edges_of_radius(is_log, dtype, edges, host):
    for size in edges("radius_classes"):
        test_radius.test_rows((2, size), dtype, is_log, "cpu")
