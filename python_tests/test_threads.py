"""Calls from several threads of Python, from a forked process, and what they leave to others meanwhile."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import generator, points
from torch import Tensor

import kdejsd
from kdejsd._native import native

LONG = "kdejsd.kde_log_prob(torch.zeros(20_000, 8), torch.zeros(20_000, 8), 1.0)"  # half a second of one core, or more


def gradients(value: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [value.detach(), *torch.autograd.grad(value.sum(), inputs)]


def kde(seed: int) -> list[Tensor]:
    query = points(200, 5, dtype=torch.float32, seed=seed).requires_grad_()
    centers = points(700, 5, dtype=torch.float32, seed=seed + 50).requires_grad_()
    return gradients(kdejsd.kde_log_prob(query, centers, 0.5), query, centers)


def wide_kde(seed: int) -> list[Tensor]:
    """Few queries, many centers: the threads share the centers of one chunk."""
    query = points(3, 40, dtype=torch.float32, seed=seed).requires_grad_()
    return gradients(kdejsd.jsd_loss(query, points(5000, 40, dtype=torch.float32, seed=seed + 50), 2.0), query)


def omega(seed: int) -> list[Tensor]:
    inputs, codes = points(300, 20, seed=seed).requires_grad_(), points(300, 3, seed=seed + 50).requires_grad_()
    return gradients(kdejsd.omega(inputs, codes, pairs="all"), inputs, codes)


def radius(seed: int) -> list[Tensor]:
    masses = points(40, 1000, seed=seed).softmax(-1).requires_grad_()
    return gradients(kdejsd.class_radius_bound(masses), masses)


def nearest(seed: int) -> list[Tensor]:
    labels = torch.randint(0, 5, (3000,), generator=generator(seed))
    return list(kdejsd.nearest_other_class(points(3000, 3, seed=seed), labels))


@pytest.mark.parametrize("op", [kde, wide_kde, omega, radius, nearest])
@pytest.mark.parametrize("threads", [1, 3])
def test_concurrent_calls_give_the_bits_of_single_ones(op, threads):
    """Of the same arguments and of different ones, whatever else is computed meanwhile."""
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)  # the threads of Python take it over
        expected = [op(seed) for seed in range(3)]
        with ThreadPoolExecutor(4, initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            found = list(pool.map(op, [seed % 3 for seed in range(60)]))
        for number, tensors in enumerate(found):
            assert all(torch.equal(a, b) for a, b in zip(tensors, expected[number % 3], strict=True))
    finally:
        torch.set_num_threads(before)


def regions_of(op) -> tuple[int, int]:
    """Regions of this thread that were completed by one thread alone, and by teams, while op ran."""
    alone, teams = native().regions()
    op()
    after = native().regions()
    return after[0] - alone, after[1] - teams


def lose(nanoseconds: int) -> None:
    """Pretends that teams have cost this thread so much; once might be a hiccup of the system."""
    for _ in range(2):
        native().lose_by_waiting(nanoseconds)


@pytest.fixture
def threads_again():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("op", [kde, wide_kde, omega, radius, nearest])
@pytest.mark.parametrize("threads", [2, 64])
def test_bits_do_not_depend_on_who_is_there(op, threads, threads_again):
    """A caller whose team kept it waiting does all of the team's work, cut as the team would have."""
    torch.set_num_threads(1)
    right = op(0)
    torch.set_num_threads(threads)
    expected = op(0)
    for a, b in zip(expected, right, strict=True):
        torch.testing.assert_close(a, b)
    alone = 0
    for _ in range(5):
        lose(10**9)
        found = []
        alone += regions_of(lambda: found.extend(op(0)))[0]  # noqa: B023
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert alone > 0


@pytest.mark.skipif(not native().has_openmp(), reason="built without OpenMP")
def test_long_work_that_was_begun_alone_gets_a_team(threads_again):
    """And no part of it is done twice, or not at all."""
    torch.set_num_threads(2)
    query, centers = points(6000, 8, seed=1), points(20_000, 8)
    expected = kdejsd.kde_log_prob(query, centers, 0.5)
    lose(10**9)
    found = []
    assert regions_of(lambda: found.append(kdejsd.kde_log_prob(query, centers, 0.5))) == (0, 1)
    assert torch.equal(found[0], expected)


@pytest.mark.skipif(not native().has_openmp(), reason="built without OpenMP")
def test_teams_come_back_after_a_pause(threads_again):
    torch.set_num_threads(2)
    lose(10**6)
    end = time.monotonic() + 100
    while not regions_of(lambda: kde(0))[1]:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_each_thread_learns_for_itself(threads_again):
    """The waiting of one Python thread says nothing about the others' teams: its calls alone are counted as such."""
    torch.set_num_threads(1)
    counted = regions_of(lambda: kdejsd.kde_log_prob(torch.zeros(4, 2), torch.zeros(5, 2), 1.0))
    assert counted == (1, 0)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(native().regions).result() == (0, 0)


def test_other_threads_go_on_meanwhile():
    """The kernels do not hold Python's lock: a data loader's thread is not kept waiting."""
    done = threading.Event()
    thread = threading.Thread(target=lambda: (eval(LONG), done.set()))
    thread.start()
    steps = 0
    while not done.is_set():
        time.sleep(0.001)
        steps += 1
    thread.join()
    assert steps > 20


def python(code: str) -> subprocess.Popen[str]:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path)}
    environment["OMP_WAIT_POLICY"] = "passive"  # threads that wait for each other keep no core busy
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.skipif(not native().has_openmp(), reason="built without OpenMP")
def test_a_forked_process_computes_with_one_thread():
    """Where OpenMP would wait for ever for threads that the fork left behind, as torch's own operators do."""
    code = """
import os, signal, torch, kdejsd
torch.set_num_threads(2)
query, centers = torch.linspace(-1, 1, 3000).reshape(1000, 3), torch.linspace(-2, 1, 3000).reshape(1000, 3)
latents, labels = query.double(), torch.arange(1000) % 3
masses = torch.eye(1000)
def values():
    found = [kdejsd.kde_log_prob(query, centers, 0.5), kdejsd.omega(latents, latents, pairs="all")]
    return found + [kdejsd.class_radius_bound(masses), kdejsd.nearest_other_class(latents, labels).index]
expected = values()
child = os.fork()
if child == 0:
    signal.alarm(100)
    for a, b in zip(values(), expected):
        torch.testing.assert_close(a, b)
    os._exit(7)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    process = python(code)
    try:
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert out.strip() == "7", err


def test_an_interrupt_waits_for_the_kernel():
    """Ctrl-C is heard when the kernel returns, and leaves the process in order."""
    code = f"""
import signal, torch, kdejsd
signal.signal(signal.SIGINT, signal.default_int_handler)  # it is ignored where the tests run in the background
try:
    print("ready", flush=True)
    while True:
        {LONG}
except KeyboardInterrupt:
    value = kdejsd.kde_log_prob(torch.zeros(4, 2), torch.zeros(5, 2), 1.0)
    print("interrupted", bool(value.isfinite().all()))
"""
    process = python(code)
    try:
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert out.strip() == "interrupted True", err
