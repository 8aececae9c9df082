"""First light on a device: every op, dtype and path in seconds, a line each. What a new kernel is tried with.

    python python_tests/cuda_first_light.py
    python python_tests/cuda_first_light.py --device cpu      # the same checks, of the CPU's kernels
    python python_tests/cuda_first_light.py --quick           # few and small inputs, as compute-sanitizer needs them
    python python_tests/cuda_first_light.py --only NaN        # the checks that have this in their name

A line gives the error of the value and of each gradient against float64 on the CPU, relative to the largest entry (to 1
where that is smaller), and in brackets the error of plain PyTorch on the device in the same dtype, kdejsd.reference.
Ours may be twice that and some units in the last place; reduced precision has limits of its own. Every check is caught
by itself, and every line is written at once. The exit status is 0 if the last line says that all of them are ok.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import math
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from helpers import points, worst
from test_kde import arguments, value_and_gradients
from torch import Tensor

import kdejsd
from kdejsd import reference
from kdejsd._native import cuda_problem
from kdejsd.divergence import DIVERGENCES

Call = dict[str, Any]

DIMENSIONS = (1, 2, 3, 5, 8, 12, 16, 17, 33, 40, 64, 65, 96, 128, 129, 200, 216, 217, 240, 256, 257, 513)
QUICK_DIMENSIONS = (1, 8, 40, 65, 129, 217, 257)
FEATURES = ("number", "per center", "weights", "excluded", "excluded, weights", "per center, weights")
PRECISIONS = ("highest", "high", "medium")
HALVES = (torch.bfloat16, torch.float16)
REDUCED_VALUE, REDUCED_GRADIENT = 1e-3, 1e-2
# Quiet, negative, with other bits, and the one that a GPU's arithmetic returns.
NAN_BITS = (0x7FC00000, 0x7FFFFFFF, -0x400000, 0x7FC00001)


class Wrong(Exception):
    """A value is not what it should be."""


class Skipped(Exception):
    """Why a check cannot be made here."""


@dataclass(frozen=True)
class Check:
    name: str
    run: Callable[[], str]  # says what it found
    quick: bool = False


# ----------------------------------------------------------------------------------------------------------------------
# Errors against float64


def cast(call: Call, device: str, dtype: torch.dtype | None = None) -> Call:
    """Copies the call, with other leaves. Without a dtype each tensor keeps its own."""

    def one(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        to = dtype if dtype and value.is_floating_point() else value.dtype
        return value.detach().to(device, to).requires_grad_(value.requires_grad)

    return {name: one(value) for name, value in call.items()}


def needing(call: Call, *names: str) -> Call:
    """The call with gradients for the named arguments alone, where there are any at all."""
    return {
        name: value.detach().requires_grad_(value.requires_grad and name in names)
        if isinstance(value, Tensor) and value.is_floating_point()
        else value
        for name, value in call.items()
    }


def compared(
    function: str, call: Call, device: str, dtype: torch.dtype, precision: str = "highest", floor: float = 0.0
) -> str:
    """One call of kdejsd and of the reference.

    Args:
        call: arguments by name, with leaves on the CPU.
        floor: an error that is allowed whatever plain PyTorch's.

    Raises:
        Wrong: an error is larger than plain PyTorch's allows.
    """

    def of(module: Any, inputs: Call) -> list[Tensor]:
        def value(**keywords: Any) -> Tensor:
            result = getattr(module, function)(**keywords)
            return result if isinstance(result, Tensor) else result[0]  # of omega's and nearest's named tuples

        return value_and_gradients(value, inputs)

    given = cast(call, device, dtype)
    truth = of(REFERENCE, cast(cast(call, "cpu", dtype), "cpu", torch.float64))
    plain = of(REFERENCE, given)
    with matmul_precision(precision):
        ours = of(kdejsd, given)
    names = ["value", *(k for k, v in call.items() if isinstance(v, Tensor) and v.requires_grad)]
    said, wrong = [], False
    for name, got, yardstick, expected in zip(names, ours, plain, truth, strict=True):
        if got.shape != expected.shape:
            raise Wrong(f"{name} has shape {list(got.shape)}, {list(expected.shape)} expected")
        error, yard = worst(got, expected), worst(yardstick, expected)
        if precision == "highest":
            allowed = max(floor, 2 * yard + rounding(name, got, call, dtype))
        else:
            allowed = REDUCED_VALUE if name == "value" else REDUCED_GRADIENT * (3 if got.ndim == 0 else 1)
        right = error <= allowed  # NaN is not
        wrong |= not right
        said.append(f"{name} {error:.1e} ({yard:.1e}{'' if right else f', allowed {allowed:.1e}'})")
    if wrong:
        raise Wrong("  ".join(said))
    return "  ".join(said)


def rounding(name: str, got: Tensor, call: Call, dtype: torch.dtype) -> float:
    """Returns the error that is allowed where plain PyTorch happens to have none."""
    numbers = [v for v in call.values() if isinstance(v, Tensor) and v.ndim > 1]
    if dtype == torch.float64:
        return 1e-13 * math.sqrt(max((v.shape[-1] for v in numbers), default=1))
    if name == "value":
        return 2e-6
    # The gradient of one bandwidth is a sum over the queries: their terms cancel, their roundings add up.
    floor = 3e-6 * (math.sqrt(numbers[0].shape[-2]) if got.ndim == 0 else 1)
    return floor if dtype == torch.float32 else max(floor, torch.finfo(dtype).eps)


@contextlib.contextmanager
def matmul_precision(precision: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _Reference:
    """kdejsd.reference under the names of the package."""

    kde_log_prob = staticmethod(reference.kde_log_prob)
    jsd_loss = staticmethod(reference.kde.jsd_loss)
    omega = staticmethod(reference.omega)
    class_radius_bound = staticmethod(reference.class_radius_bound)
    nearest_other_class = staticmethod(reference.nearest_other_class)


REFERENCE = _Reference()


def same_bits(found: list[Tensor], expected: list[Tensor], what: str) -> None:
    for i, (got, wanted) in enumerate(zip(found, expected, strict=True)):
        if not torch.equal(got, wanted):
            differing = int((got != wanted).sum())
            raise Wrong(f"{what}: {differing} of {got.numel()} numbers of {'the value' if i == 0 else 'a gradient'}")


# ----------------------------------------------------------------------------------------------------------------------
# The kde and the loss: every l, dtype, feature and precision


def kde_case(kind: str, n: int, m: int, dim: int) -> Call:
    return arguments(kind, n, m, dim, torch.float64, "cpu")


def size_of(dim: int, quick: bool) -> tuple[int, int]:
    """Odd numbers of queries and centers: a tile and some, and several in a row where there is time."""
    if quick:
        return 19, 83
    return (67, 195) if dim <= 65 else (35, 131)


def value_alone(call: Call, device: str) -> str:
    """No gradient is asked for: a kernel of its own."""
    call = needing(call)
    given = cast(call, device, torch.float32)
    truth = REFERENCE.kde_log_prob(**cast(cast(call, "cpu", torch.float32), "cpu", torch.float64))
    error, yard = (worst(function(**given), truth) for function in (kdejsd.kde_log_prob, REFERENCE.kde_log_prob))
    if not error <= 2 * yard + 2e-6:
        raise Wrong(f"value {error:.1e} ({yard:.1e})")
    return f"value {error:.1e} ({yard:.1e})"


def kde_checks(device: str, quick: bool) -> Iterator[Check]:
    for i, dim in enumerate(QUICK_DIMENSIONS if quick else DIMENSIONS):
        n, m = size_of(dim, quick)
        feature = FEATURES[i % len(FEATURES)]
        plain = needing(kde_case("scalar tensor", n, m, dim), "query", "bandwidth")
        featured = needing(kde_case(feature, n, m, dim), "query")
        every = kde_case("per center, weights", n, m, dim)
        run = partial(partial, compared, "kde_log_prob", device=device)
        name = f"kde l={dim}"
        yield Check(f"{name} float32", run(plain, dtype=torch.float32), True)
        yield Check(f"{name} float32, value alone", partial(value_alone, featured, device), True)
        yield Check(f"{name} float32, {feature}", run(featured, dtype=torch.float32))
        for precision in PRECISIONS[1:]:
            call = featured if precision == "medium" else plain
            yield Check(f"{name} reduced, {precision}", run(call, dtype=torch.float32, precision=precision), True)
        yield Check(f"{name} float32, all gradients", run(every, dtype=torch.float32), True)
        yield Check(f"{name} float64", run(plain, dtype=torch.float64), True)
        yield Check(
            f"{name} float64, all gradients, {feature}", run(kde_case(feature, n, m, dim), dtype=torch.float64), True
        )
    if quick:
        return
    for n, m in ((1, 1), (1, 7), (7, 1), (64, 64), (65, 129), (3, 9001), (1501, 3), (200, 801)):
        for dim in (1, 8, 40, 257):
            if n * m * dim > 3 * 10**6:
                continue
            name = f"kde n={n} m={m} l={dim}"
            plain = needing(kde_case("scalar tensor", n, m, dim), "query", "bandwidth")
            yield Check(f"{name} float32", run(plain, dtype=torch.float32))
            every = kde_case("per center, weights", n, m, dim)
            yield Check(f"{name} float32, all gradients", run(every, dtype=torch.float32))
    for dim in (3, 40):
        for dtype in (torch.float32, *HALVES, torch.float64):
            if dtype in HALVES:
                call = needing(kde_case("number", 67, 195, dim), "query")
                yield Check(f"kde l={dim} {dtype_name(dtype)}", run(call, dtype=dtype))
                call = kde_case("number", 67, 195, dim)
                yield Check(f"kde l={dim} {dtype_name(dtype)}, all gradients", run(call, dtype=dtype))
            call = kde_case("number", 51, 51, dim) | {"exclude_self": True}
            yield Check(f"kde l={dim} {dtype_name(dtype)}, leave one out", run(call, dtype=dtype))
        for shapes in (((3, 11), (7,)), ((11,), (3, 7)), ((4, 1, 11), (3, 7)), ((2, 3, 0), (3, 7))):
            for dtype in (torch.float32, torch.float64):
                call = batched(*shapes, dim)
                name = f"kde l={dim} {dtype_name(dtype)}, batch of {shapes[0]} queries and {shapes[1]} centers"
                yield Check(name, run(call, dtype=dtype))
                call = needing(call, "query")
                yield Check(f"{name}, query alone", run(call, dtype=dtype))


def batched(queries: tuple[int, ...], centers: tuple[int, ...], dim: int) -> Call:
    return {
        "query": points(*queries, dim, seed=1).requires_grad_(),
        "centers": points(*centers, dim, seed=2).requires_grad_(),
        "bandwidth": (0.5 + 0.15 * math.sqrt(dim) * (1 + points(*centers, seed=3).sigmoid())).requires_grad_(),
        "log_weights": points(*centers, seed=4).log_softmax(-1).requires_grad_(),
    }


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def loss_case(dim: int, n: int, m: int, **keywords: Any) -> Call:
    call = kde_case("scalar tensor", n, m, dim)
    return {"codes": call["query"], "lagged": call["centers"], "bandwidth": call["bandwidth"], **keywords}


def loss_checks(device: str, quick: bool) -> Iterator[Check]:
    run = partial(partial, compared, "jsd_loss", device=device)
    for dim in (8, 40, 257) if quick else (1, 2, 8, 17, 40, 129, 240, 257):
        n, m = size_of(dim, quick)
        for divergence in DIVERGENCES:
            name = f"jsd_loss {divergence} l={dim}"
            call = loss_case(dim, n, m, divergence=divergence, reduction="none")
            alone = needing(call, "codes")
            yield Check(f"{name} float32", run(alone, dtype=torch.float32), True)
            yield Check(f"{name} reduced, high", run(alone, dtype=torch.float32, precision="high"), True)
            yield Check(f"{name} float32, all gradients", run(call, dtype=torch.float32))
            yield Check(f"{name} float64", run(alone, dtype=torch.float64), True)
            if dim == 8 and not quick:
                for dtype in HALVES:
                    yield Check(f"{name} {dtype_name(dtype)}", run(alone, dtype=dtype))
                for reduction in ("mean", "sum"):
                    reduced = alone | {"reduction": reduction}
                    yield Check(f"{name} float32, {reduction}", run(reduced, dtype=torch.float32))
    if not quick:
        call = loss_case(8, 67, 195, target_samples=points(45, 8, seed=8))
        yield Check("jsd_loss l=8 float32, target samples", run(call, dtype=torch.float32))


# ----------------------------------------------------------------------------------------------------------------------
# The other ops


def omega_checks(device: str, quick: bool) -> Iterator[Check]:
    for b, d, dim in ((2, 1, 1), (70, 33, 5)) if quick else ((2, 1, 1), (70, 33, 5), (131, 130, 3), (64, 300, 40)):
        for pairs in ("halves", "all"):
            if pairs == "halves" and b % 2:
                continue
            for reduction in ("sum", "mean", "max", "none"):
                call = {
                    "inputs": points(b, d, seed=1).requires_grad_(),
                    "codes": points(b, dim, seed=2).requires_grad_(),
                    "pairs": pairs,
                    "reduction": reduction,
                }
                for dtype in (torch.float32, torch.float64, *(HALVES if reduction == "sum" and b == 70 else ())):
                    name = f"omega {pairs} {reduction} b={b} d={d} l={dim} {dtype_name(dtype)}"
                    yield Check(name, partial(compared, "omega", call, device, dtype), dtype not in HALVES)


def radius_checks(device: str, quick: bool) -> Iterator[Check]:
    for rows, classes in ((5, 70),) if quick else ((1, 1), (5, 70), (33, 10), (3, 5000)):
        for argument in ("p", "log_p"):
            masses = points(rows, classes, seed=1) if classes > 1 else torch.full((1, 1), -0.7, dtype=torch.float64)
            log_p = masses.log_softmax(-1) if classes > 1 else masses
            call = {argument: (log_p if argument == "log_p" else log_p.exp()).requires_grad_()}
            for dtype in (torch.float32, torch.float64, *HALVES):
                name = f"class_radius_bound {argument} {rows} x {classes} {dtype_name(dtype)}"
                yield Check(name, partial(compared, "class_radius_bound", call, device, dtype), dtype not in HALVES)


def nearest(call: Call, device: str, dtype: torch.dtype) -> str:
    said = compared("nearest_other_class", call, device, dtype)
    given = cast(needing(call), device, dtype)
    truth = reference.nearest_other_class(**cast(cast(needing(call), "cpu", dtype), "cpu", torch.float64))
    index = kdejsd.nearest_other_class(**given).index.cpu()
    # Another sample may be as near, up to rounding; what counts is its distance, and that it is of another class.
    latents, labels = cast(needing(call), "cpu", torch.float64)["latents"], call["labels"]
    if ((index < 0) != (truth.index < 0)).any() or (labels[index] == labels)[index >= 0].any():
        raise Wrong("an index is not that of a sample of another class")
    to_it = torch.linalg.vector_norm(latents - latents[index], dim=-1)[index >= 0]
    error = worst(to_it, truth.distance[index >= 0])
    allowed = 1e-13 if dtype == torch.float64 else 2e-6 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps
    if not error <= allowed:
        raise Wrong(f"{said}  distance to the index {error:.1e}, allowed {allowed:.1e}")
    return f"{said}  distance to the index {error:.1e}"


def nearest_checks(device: str, quick: bool) -> Iterator[Check]:
    for count, d in ((2, 1), (70, 3)) if quick else ((2, 1), (70, 3), (401, 10), (151, 130)):
        call = {"latents": points(count, d, seed=1).requires_grad_(), "labels": torch.arange(count) % 3}
        for dtype in (torch.float32, torch.float64, *HALVES):
            name = f"nearest_other_class N={count} d={d} {dtype_name(dtype)}"
            yield Check(name, partial(nearest, call, device, dtype), dtype not in HALVES)


# ----------------------------------------------------------------------------------------------------------------------
# NaN and infinity, in the places that the documentation names


def nan_of_bits(bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.int32).view(torch.float32)


def kde_nan(dim: int, device: str, dtype: torch.dtype, precision: str) -> str:
    """NaN in a query is NaN there; in a center, a bandwidth or a log-weight it is NaN everywhere."""
    n, m = 70, 131
    h = 0.5 + 0.15 * math.sqrt(dim)
    wrong, cases = [], 0

    def case(what: str, expected: set[int], change: Callable[[Call], None], bandwidth: str = "number") -> None:
        nonlocal cases
        cases += 1
        call: Call = {
            "query": points(n, dim, seed=1).to(device, dtype),
            "centers": points(m, dim, seed=2).to(device, dtype),
            "bandwidth": torch.full((1,) if bandwidth == "number" else (m,), h, dtype=dtype, device=device),
            "log_weights": torch.full((m,), -math.log(m), dtype=dtype, device=device),
        }
        change(call)
        call["query"].requires_grad_()
        value, gradient = value_and_gradients(kdejsd.kde_log_prob, call)
        found = set(value.isnan().nonzero().flatten().tolist())
        of_gradient = set(gradient.isnan().any(-1).nonzero().flatten().tolist())
        if found != expected or of_gradient != expected:
            wrong.append(f"{what}: {len(found)} values and {len(of_gradient)} gradients, not {len(expected)}")

    def put(name: str, index: int | tuple[int, int], bad: float | Tensor) -> Callable[[Call], None]:
        return lambda call: call[name].__setitem__(index, torch.as_tensor(bad).to(device, dtype))

    everywhere = set(range(n))
    with matmul_precision(precision):
        for bits in NAN_BITS:
            bad = nan_of_bits(bits)
            at = f"NaN {bits & 0xFFFFFFFF:08x} in"
            case(f"{at} a query", {5}, put("query", (5, dim - 1), bad))
            for center in (0, m // 2, m - 1):
                case(f"{at} center {center}", everywhere, put("centers", (center, dim // 2), bad))
        # A device's own arithmetic makes NaN, with the bits that it gives it.
        case("0/0 of the device in a query", {5}, lambda call: call["query"][5].sub_(call["query"][5]).div_(0.0))
        case("0/0 of the device in a center", everywhere, lambda call: call["centers"][77].mul_(0.0).div_(0.0))
        for bad_number in (math.nan, 0.0, -1.0, math.inf):
            case(f"the bandwidth {bad_number}", everywhere, put("bandwidth", 0, bad_number))
            for center in (0, 77):
                what = f"the bandwidth {bad_number} of center {center}"
                case(what, everywhere, put("bandwidth", center, bad_number), "per center")
        for bad_number in (math.nan, math.inf):
            case(f"the log-weight {bad_number}", everywhere, put("log_weights", 77, bad_number))
        case("the log-weight -inf", set(), put("log_weights", 77, -math.inf))
    if wrong:
        raise Wrong(f"{len(wrong)} of {cases} cases: " + "; ".join(wrong))
    return f"{cases} cases"


def kde_infinity(dim: int, device: str, dtype: torch.dtype, precision: str) -> str:
    """A query at infinity has the density 0; a center there has no weight."""
    query, centers = points(70, dim, seed=1).to(device, dtype), points(131, dim, seed=2).to(device, dtype)
    h = 0.5 + 0.15 * math.sqrt(dim)
    with matmul_precision(precision):
        far = query.clone()
        far[5, 0] = math.inf
        if (found := kdejsd.kde_log_prob(far, centers, h).isneginf().nonzero().flatten().tolist()) != [5]:
            raise Wrong(f"a query at infinity: -inf at {found}, not at [5]")
        without = kdejsd.kde_log_prob(query, torch.cat([centers[:100], centers[101:]]), h) + math.log(130 / 131)
        centers[100, dim - 1] = math.inf
        value = kdejsd.kde_log_prob(query, centers, h)
    error = worst(value, without)
    allowed = REDUCED_VALUE if precision != "highest" else 1e-12 if dtype == torch.float64 else 1e-5
    if not error <= allowed:
        raise Wrong(f"a center at infinity changes the density by {error:.1e}, allowed {allowed:.1e}")
    return f"as without the center to {error:.1e}"


def loss_nan(dim: int, device: str, precision: str) -> str:
    codes, lagged = (points(count, dim, seed=count).to(device, torch.float32) for count in (70, 131))
    h = 0.5 + 0.15 * math.sqrt(dim)
    with matmul_precision(precision):
        for divergence, bits in itertools.product(DIVERGENCES, NAN_BITS):
            terms = partial(kdejsd.jsd_loss, bandwidth=h, divergence=divergence, reduction="none")
            bad = codes.clone()
            bad[5, 0] = nan_of_bits(bits)
            if (found := terms(bad.requires_grad_(), lagged).isnan().nonzero().flatten().tolist()) != [5]:
                raise Wrong(f"{divergence}, a NaN code: NaN at {found}, not at [5]")
            bad = lagged.clone()
            bad[77, 0] = nan_of_bits(bits)
            if not terms(codes, bad).isnan().all():
                raise Wrong(f"{divergence}, a NaN lagged code: not all terms are NaN")
    return f"{len(DIVERGENCES) * len(NAN_BITS)} cases"


def others_nan(device: str, dtype: torch.dtype) -> str:
    """The other ops have NaN and infinity where the reference has them."""
    inputs, codes = points(70, 33, seed=1), points(70, 5, seed=2)
    inputs[7, 3], codes[11, 2] = math.nan, math.nan
    inputs[20], codes[21] = inputs[40], codes[41]
    calls: list[tuple[str, Call]] = [
        ("omega", {"inputs": inputs, "codes": codes, "pairs": pairs, "reduction": reduction})
        for pairs in ("halves", "all")
        for reduction in ("sum", "none", "max")
    ]
    p = points(5, 70, seed=3).softmax(-1)
    p[1, 4], p[2, 4], p[3, 4], p[4, 4] = math.nan, -0.1, 0.0, 1.0
    calls += [("class_radius_bound", {"p": p}), ("class_radius_bound", {"log_p": p.log()})]
    latents = points(70, 3, seed=4)
    latents[7, 1] = math.nan
    calls.append(("nearest_other_class", {"latents": latents, "labels": torch.arange(70) % 3}))
    latents = latents.clone()
    latents[7, 1], latents[8, 0] = 0.0, math.inf
    calls.append(("nearest_other_class", {"latents": latents, "labels": torch.arange(70) % 3}))
    calls.append(("nearest_other_class", {"latents": points(7, 3), "labels": torch.zeros(7, dtype=torch.int64)}))
    for function, call in calls:
        results = []
        for module, where in ((kdejsd, device), (REFERENCE, "cpu")):
            result = getattr(module, function)(**cast(call, where, dtype))
            results.append((result if isinstance(result, Tensor) else result[0]).cpu())
        got, expected = results
        chosen = ", ".join(str(v) for v in call.values() if isinstance(v, str))
        for what in ("isnan", "isposinf", "isneginf"):
            if not torch.equal(getattr(got, what)(), getattr(expected, what)()):
                raise Wrong(f"{function}({chosen}): {what} differs from the reference")
    return f"{len(calls)} cases"


def nan_checks(device: str, quick: bool) -> Iterator[Check]:
    if quick:
        return
    for dim in (1, 8, 16, 40, 200, 257):
        for precision in PRECISIONS:
            name = f"NaN l={dim} float32 {precision}"
            yield Check(f"kde, {name}", partial(kde_nan, dim, device, torch.float32, precision))
            yield Check(f"jsd_loss, {name}", partial(loss_nan, dim, device, precision))
            infinity = partial(kde_infinity, dim, device, torch.float32, precision)
            yield Check(f"kde, infinity l={dim} float32 {precision}", infinity)
        yield Check(f"kde, NaN l={dim} float64", partial(kde_nan, dim, device, torch.float64, "highest"))
        yield Check(f"kde, infinity l={dim} float64", partial(kde_infinity, dim, device, torch.float64, "highest"))
    for dtype in (torch.float32, torch.float64):
        yield Check(f"the other ops, NaN and infinity, {dtype_name(dtype)}", partial(others_nan, device, dtype))


# ----------------------------------------------------------------------------------------------------------------------
# Where the points lie, and where their memory does


def far_checks(device: str, quick: bool) -> Iterator[Check]:
    if quick:
        return
    run = partial(partial, compared, "kde_log_prob", device=device)

    def moved(call: Call, by: float) -> Call:
        return {
            k: (v.detach() + by).requires_grad_(v.requires_grad) if k in ("query", "centers") else v
            for k, v in call.items()
        }

    for dim in (1, 8, 40, 200, 257):
        n, m = size_of(dim, False)
        call = moved(needing(kde_case("scalar tensor", n, m, dim), "query", "bandwidth"), 100.0)
        yield Check(f"kde l={dim} float32, all points 100 away", run(call, dtype=torch.float32))
        yield Check(f"kde l={dim} reduced, high, all points 100 away", run(call, dtype=torch.float32, precision="high"))
        every = moved(kde_case("per center, weights", n, m, dim), 100.0)
        yield Check(f"kde l={dim} float32, all gradients, all points 100 away", run(every, dtype=torch.float32))
        call = needing(kde_case("number", n, m, dim), "query")
        with torch.no_grad():
            call["centers"] = call["centers"] + torch.linspace(60, 0, m, dtype=torch.float64).unsqueeze(1)
        yield Check(f"kde l={dim} float32, near centers come last", run(call, dtype=torch.float32, floor=1e-5))
        call = needing(kde_case("number", n, m, dim), "query")
        with torch.no_grad():
            call["query"] = (call["query"] * torch.logspace(0, 3, n, dtype=torch.float64).unsqueeze(1)).requires_grad_()
        yield Check(f"kde l={dim} float32, far queries", run(call, dtype=torch.float32))
    # Points are resolved to a unit in the last place of their distance from amid the centers, which is 1e-4 h here.
    # Taken from a place that is not amid them, as one far center can draw it away, they would lose more.
    for what, centers in (
        ("near 100", 100 + points(259, 1, seed=2)),
        ("near 100 but the first", torch.cat([torch.zeros(1, 1), 100 + 1e-3 * points(258, 1, seed=2)])),
    ):
        query = centers[1::4] + 1e-3 * points(65, 1, seed=1)
        call = {"query": query.requires_grad_(), "centers": centers, "bandwidth": 1e-3}
        yield Check(f"kde l=1 float32, centers {what}, h = 0.001", run(call, dtype=torch.float32, floor=1e-3))
    yield Check("kde, the weights of a far query sum to 1", partial(weights_of_far_queries, device))


def weights_of_far_queries(device: str) -> str:
    """The transposed pass must round a large exponent as the forward pass did."""
    errors = []
    for dim in (3, 40):
        for distance in (30.0, 200.0, 3000.0):
            query, centers = (points(n, dim, dtype=torch.float32, device=device) for n in (9, 130))
            query[:, 1] += distance
            log_weights = torch.full((130,), -math.log(130), device=device, requires_grad=True)
            value = kdejsd.kde_log_prob(query, centers, 1.0, log_weights=log_weights)
            (weights,) = torch.autograd.grad(value.sum(), log_weights)
            errors.append(abs(float(weights.double().sum()) / 9 - 1))
    if not max(errors) <= 3e-6:
        raise Wrong(f"off by {max(errors):.1e}, allowed 3.0e-06")
    return f"to {max(errors):.1e}"


def slices(dim: int, device: str, dtype: torch.dtype) -> str:
    """Rows that begin at any number of a buffer, and rows that are not contiguous, give what their copies give."""
    n, m = 35, 131

    def gradients(query: Tensor, centers: Tensor) -> list[Tensor]:
        query = query.detach().requires_grad_()
        found = value_and_gradients(kdejsd.kde_log_prob, {"query": query, "centers": centers, "bandwidth": 1.5})
        loss = kdejsd.jsd_loss(query, centers, 1.5)
        return [*found, loss.detach(), *torch.autograd.grad(loss, query)]

    buffer = points((n + m) * dim + 8, seed=1).to(device, dtype)
    for offset in (1, 2, 3):
        query, centers = buffer[offset:][: n * dim].view(n, dim), buffer[offset + n * dim :][: m * dim].view(m, dim)
        same_bits(gradients(query, centers), gradients(query.clone(), centers.clone()), f"offset {offset}")
    wide = points(dim, 2 * m, seed=2).to(device, dtype)
    query, centers = wide[:, : 2 * n : 2].T, wide[:, 1::2].T
    same_bits(
        gradients(query, centers), gradients(query.contiguous(), centers.contiguous()), "columns of a transposed array"
    )
    return "offsets 1, 2, 3; columns"


def other_slices(device: str) -> str:
    """Likewise for the other ops, whose buffers begin at an odd number too."""
    buffer = points(20_000, seed=3).to(device, torch.float32)

    def view(offset: int, *shape: int) -> Tensor:
        return buffer[offset:][: math.prod(shape)].view(shape)

    labels = torch.arange(70, device=device) % 3
    functions: list[tuple[str, Callable[..., Tensor], list[Tensor]]] = [
        ("omega", lambda x, z: kdejsd.omega(x, z, pairs="all"), [view(1, 70, 33), view(3001, 70, 5)]),
        ("omega, halves", kdejsd.omega, [view(1, 70, 33), view(3001, 70, 5)]),
        ("class_radius_bound", lambda p: kdejsd.class_radius_bound(log_p=-p.abs()), [view(1, 5, 70)]),
        ("nearest_other_class", lambda z: kdejsd.nearest_other_class(z, labels).distance, [view(1, 70, 3)]),
    ]
    for name, function, inputs in functions:
        results = []
        for given in (inputs, [t.clone() for t in inputs]):
            leaves = [t.detach().requires_grad_() for t in given]
            value = function(*leaves)
            results.append([value.detach(), *torch.autograd.grad(value.sum(), leaves)])
        same_bits(*results, name)
    return f"{len(functions)} calls"


def place_checks(device: str, quick: bool) -> Iterator[Check]:
    for dim in (8, 40, 200) if quick else (3, 4, 8, 16, 40, 65, 200, 256, 257):
        yield Check(f"kde l={dim} float32, slices", partial(slices, dim, device, torch.float32), True)
        if not quick:
            yield Check(f"kde l={dim} float64, slices", partial(slices, dim, device, torch.float64))
            yield Check(f"kde l={dim} bfloat16, slices", partial(slices, dim, device, torch.bfloat16))
    yield Check("the other ops, slices", partial(other_slices, device), True)


# ----------------------------------------------------------------------------------------------------------------------
# The same numbers again, at once, and from a graph


def repeated(call: Call, function: Callable[..., Tensor], device: str, dtype: torch.dtype) -> str:
    given = cast(call, device, dtype)
    first = value_and_gradients(function, given)
    for _ in range(3):
        same_bits(value_and_gradients(function, given), first, "another run differs")
    return "4 runs, the same bits"


def on_two_streams(device: str) -> str:
    """Calls of several paths, two at a time, each the same as alone."""
    if device != "cuda":
        raise Skipped("the CPU has no streams")
    cases = [needing(kde_case("number", 301, 9001, dim), "query") for dim in (8, 40, 256, 2)]
    cases.append(kde_case("per center, weights", 501, 301, 16))
    calls = [cast(call, device, torch.float32) for call in cases]
    alone = [value_and_gradients(kdejsd.kde_log_prob, call) for call in calls]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    rounds = 6
    found = []
    for i in range(rounds * len(calls)):
        with torch.cuda.stream(streams[i % 2]):
            found.append(value_and_gradients(kdejsd.kde_log_prob, calls[i % len(calls)]))
    torch.cuda.synchronize()
    for i, tensors in enumerate(found):
        same_bits(tensors, alone[i % len(calls)], f"call {i} of two streams")
    return f"{len(found)} calls"


def on_two_threads(device: str) -> str:
    """Two Python threads with other l: what one sets for its launch must not be undone by the other."""
    n, m = (301, 3001) if device == "cuda" else (35, 131)
    calls = [cast(needing(kde_case("number", n, m, dim), "query"), device, torch.float32) for dim in (17, 256)]
    alone = [value_and_gradients(kdejsd.kde_log_prob, call) for call in calls]
    problems: list[str] = []

    def work(call: Call, expected: list[Tensor]) -> None:
        try:
            for _ in range(20):
                same_bits(value_and_gradients(kdejsd.kde_log_prob, call), expected, "a call of two threads")
        except Exception as error:  # a thread has nobody to raise it to
            problems.append(f"{type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=pair) for pair in zip(calls, alone, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise Wrong("; ".join(problems))
    return "40 calls"


def from_a_graph(dim: int, device: str) -> str:
    """jsd_loss and its gradient, captured once and replayed for other codes."""
    if device != "cuda":
        raise Skipped("the CPU has no graphs")
    codes = points(101, dim, dtype=torch.float32, device=device).requires_grad_()
    lagged = points(3001, dim, dtype=torch.float32, device=device, seed=1)

    def step() -> list[Tensor]:
        loss = kdejsd.jsd_loss(codes, lagged, 1.5)
        return [loss.detach(), *torch.autograd.grad(loss, codes)]

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (9, 10):
        with torch.no_grad():
            codes.copy_(points(101, dim, device=device, seed=seed))
        graph.replay()
        same_bits(captured, step(), "a replay differs from the call")
    return "2 replays"


def without_waiting(device: str) -> str:
    if device != "cuda":
        raise Skipped("the CPU does not run behind")
    call = cast(needing(loss_case(40, 301, 3001), "codes"), device, torch.float32)
    kdejsd.jsd_loss(**call).backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        kdejsd.jsd_loss(**call).backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "value and gradient without a wait for the device"


def extra_memory(device: str) -> str:
    """No n x m array: of 4096 x 100 000 pairs it would take 1563 MiB."""
    if device != "cuda":
        raise Skipped("torch counts a device's memory alone")
    said = []
    for dim in (8, 40):
        codes = torch.randn(4096, dim, device=device, requires_grad=True)
        lagged = torch.randn(100_000, dim, device=device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        kdejsd.jsd_loss(codes, lagged, 1.5).backward()
        extra = (torch.cuda.max_memory_allocated() - held) / 2**20
        if extra > 64:
            raise Wrong(f"l = {dim}: {extra:.0f} MiB")
        said.append(f"{extra:.1f} MiB at l = {dim}")
    return ", ".join(said)


def again_checks(device: str, quick: bool) -> Iterator[Check]:
    if quick:
        return
    for n, m, dim in ((1001, 70, 8), (701, 3, 200), (35, 5001, 40), (35, 1001, 257)):
        for kind in ("number", "per center, weights"):
            call = kde_case(kind, n, m, dim) if "weights" in kind else needing(kde_case(kind, n, m, dim), "query")
            for dtype in (torch.float32, torch.float64):
                again = partial(repeated, call, kdejsd.kde_log_prob, device, dtype)
                yield Check(f"kde n={n} m={m} l={dim} {dtype_name(dtype)}, {kind}, again", again)
    call = {"inputs": points(301, 130, seed=1).requires_grad_(), "codes": points(301, 3, seed=2).requires_grad_()}
    again = partial(repeated, call, partial(kdejsd.omega, pairs="all"), device, torch.float32)
    yield Check("omega all, again", again)
    again = partial(repeated, loss_case(8, 101, 1001), kdejsd.jsd_loss, device, torch.float32)
    yield Check("jsd_loss, again", again)
    yield Check("two streams at once", partial(on_two_streams, device))
    yield Check("two threads at once", partial(on_two_threads, device))
    for dim in (2, 8, 40, 256, 257):
        yield Check(f"a CUDA graph of jsd_loss l={dim}", partial(from_a_graph, dim, device))
    yield Check("jsd_loss does not wait for the device", partial(without_waiting, device))
    yield Check("memory beside inputs and results", partial(extra_memory, device))


# ----------------------------------------------------------------------------------------------------------------------


def all_checks(device: str, quick: bool) -> list[Check]:
    groups = (
        kde_checks,
        loss_checks,
        omega_checks,
        radius_checks,
        nearest_checks,
        nan_checks,
        far_checks,
        place_checks,
        again_checks,
    )
    return [check for group in groups for check in group(device, quick) if check.quick or not quick]


def device_answers() -> str:
    """Empty, or why the device can do no more: after a fault in a kernel every later call fails."""
    try:
        torch.zeros(1, device="cuda").add_(1).item()
    except RuntimeError as error:
        return first_line(error)
    return ""


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"


def say(state: str, check: Check, text: str) -> None:
    print(f"{state:<5}{check.name}: {text}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="few and small inputs, and nothing but the ops themselves")
    parser.add_argument("--only", default="", metavar="TEXT", help="the checks that have this in their name")
    chosen = parser.parse_args()
    if chosen.device == "cuda" and (problem := cuda_problem()):
        print(f"FAIL no check was made: {problem}", flush=True)
        return 1
    if chosen.device == "cpu":
        torch.set_num_threads(1)  # the sums are short: threads would wait for each other
    checks = [check for check in all_checks(chosen.device, chosen.quick) if chosen.only in check.name]
    right = skipped = 0
    for done, check in enumerate(checks):
        try:
            found = check.run()
            if chosen.device == "cuda":
                torch.cuda.synchronize()  # a fault of this check's kernels shows here
        except Skipped as reason:
            skipped += 1
            say("skip", check, str(reason))
            continue
        except Wrong as error:
            say("FAIL", check, str(error))
        except Exception as error:  # whatever it is, the next check is another
            say("FAIL", check, first_line(error))
            if chosen.device == "cuda" and (problem := device_answers()):
                left = len(checks) - done - 1
                print(f"FAIL the device does not answer any more ({problem}): {left} checks not made", flush=True)
                break
        else:
            right += 1
            say("ok", check, found)
    made = len(checks) - skipped
    print(f"first light: {right} of {made} ok{f', {skipped} skipped' if skipped else ''}", flush=True)
    return int(right < made or right == 0)


if __name__ == "__main__":
    sys.exit(main())
