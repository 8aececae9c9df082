"""The CUDA kernels' source, run on the host thread by thread: what it computes, without a device.

Calls with CPU tensors go the way of the package down to the kernels, where the CUDA ones take the place of the CPU's;
so the ops' own tests serve here too. What only a device can show (that it compiles there, races, speed) is not here.
"""

from __future__ import annotations

import pytest
import test_kde
import test_nearest
import test_omega
import test_radius
import torch
from cuda_on_host import OPS, CudaOnHost, build, missing
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
    for call in [((3, 11, 2), (3, 7, 2), (7,), (3, 11)), ((4, 1, 11, 2), (3, 7, 2), (4, 1, 7), (4, 3, 11))]:
        test_kde.test_batches_broadcast(*call, weighted=True, device="cpu")


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


@pytest.mark.parametrize("dtype", DTYPES)
def test_nearest_op(dtype, host):
    for size in [(1, 1), (70, 2), (130, 70)]:
        test_nearest.test_distance_and_index(size, dtype, "cpu")
