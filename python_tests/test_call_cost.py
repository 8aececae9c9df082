"""A call's cost beside its kernel, counted and not timed: torch operators, calls in kdejsd's files, graph nodes.

With few points the kernel takes 2 microseconds; a torch operator takes 1 to 4, a call in Python a tenth of one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

import pytest
import torch
from helpers import operators, points

import kdejsd

PACKAGE = os.path.dirname(kdejsd.__file__) + os.sep


LAGGED = points(16, 4, dtype=torch.float32, seed=1)
OWN = points(8, 4, dtype=torch.float32, seed=2)
FUNCTIONS = {
    "jsd_loss": lambda codes: kdejsd.jsd_loss(codes, LAGGED, 0.7),
    "jsd_loss with own": lambda codes: kdejsd.jsd_loss(codes, LAGGED, 0.7, own=OWN),
    "kde_log_prob": lambda codes: kdejsd.kde_log_prob(codes, LAGGED, 0.7),
}


def a_call(function: str, with_gradient: bool) -> Callable[[], None]:
    codes = points(8, 4, dtype=torch.float32).requires_grad_(with_gradient)
    upstream = torch.ones(8) if function == "kde_log_prob" else torch.ones(())

    def call() -> None:
        value = FUNCTIONS[function](codes)
        if with_gradient:
            value.backward(upstream)
            codes.grad = None

    call()  # what is done once is over
    return call


def calls_in_the_package(call: Callable[[], None]) -> list[str]:
    """The functions, and the items of generator expressions, that Python ran in kdejsd's files."""
    names = []

    def note(frame, event, _):
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            names.append(frame.f_code.co_name)

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return names


@pytest.mark.parametrize(
    ("function", "with_gradient", "most_operators", "most_calls"),
    [
        # one for the terms, their mean, its conversion
        ("jsd_loss", False, 3, 30),
        # and for the gradient; in the backward pass the conversion, the division, the product, and torch's own detach
        ("jsd_loss", True, 8, 34),
        # no operator more; five calls that check it
        ("jsd_loss with own", False, 3, 35),
        ("jsd_loss with own", True, 8, 39),
        # one for the value, its conversion
        ("kde_log_prob", False, 2, 25),
        # and for the gradient; in the backward pass the upstream's dtype and shape, the product, detach
        ("kde_log_prob", True, 7, 34),
    ],
)
def test_few_operators_and_calls(function, with_gradient, most_operators, most_calls):
    call = a_call(function, with_gradient)
    found = operators(call)
    assert 0 < len(found) <= most_operators, found
    names = calls_in_the_package(call)
    assert 0 < len(names) <= most_calls, names


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_graph_is_one_node(function):
    """Conversion and reduction are steps of the node: a node of their own costs more than what they do."""
    codes = points(8, 4, dtype=torch.float32).requires_grad_()
    value = FUNCTIONS[function](codes)
    assert value.dtype == torch.float32
    nodes = [node for node, _ in value.grad_fn.next_functions if node is not None]
    assert [node.name() for node in nodes] == ["torch::autograd::AccumulateGrad"]
