"""The measures of `kdejsd.metrics`, but for the Frechet distance: values, errors, and all that is asked of a metric."""

import itertools
import math

import pytest
import torch
from helpers import points

from kdejsd.metrics import sliced_wasserstein, two_sample_accuracy

# ---- Two sets of samples


def by_permutations(first, second):
    """The distance of [n, d] and [n, d] along each axis: the least mean square over all ways to pair the samples."""
    pairings = [list(order) for order in itertools.permutations(range(len(first)))]
    squares = [(first - second[order]).square().mean(0) for order in pairings]
    return torch.stack(squares).amin(0).sqrt()


def test_sliced_wasserstein_of_one_value_is_the_best_pairing():
    first, second = points(6, 1), 2 + 3 * points(6, 1, seed=1)
    assert sliced_wasserstein(first, second) == pytest.approx(float(by_permutations(first, second)))


def test_sliced_wasserstein_of_unequal_numbers_is_that_of_repeated_samples():
    first, second = points(6, 4), points(4, 4, seed=1)
    expected = sliced_wasserstein(first.repeat(2, 1), second.repeat_interleave(3, 0))
    assert sliced_wasserstein(first, second) == pytest.approx(expected)
    assert sliced_wasserstein(second, first) == pytest.approx(expected)
    assert sliced_wasserstein(first, first.repeat(3, 1)) == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("dim", [1, 3, 30])
def test_sliced_wasserstein_of_a_shift(dim):
    first, shift = points(50, dim), points(dim, seed=1)
    found = sliced_wasserstein(first, first.flip(0) + shift, projections=4000)
    assert found == pytest.approx(float(shift.norm()) / math.sqrt(dim), rel=0.05)


def test_sliced_wasserstein_of_normals():
    found = sliced_wasserstein(points(4000, 3), 0.5 * points(2000, 3, seed=1))
    assert found == pytest.approx(0.5, abs=0.03)  # the difference of the deviations, in every direction


def test_sliced_wasserstein_takes_images_and_half_types():
    images = points(20, 3, 4, 4).half()
    expected = sliced_wasserstein(images.double().flatten(1), 1 + images.double().flatten(1))
    assert sliced_wasserstein(images, (1 + images.double())) == pytest.approx(expected)
    assert sliced_wasserstein(images, (1 + images.double()), seed=1) != pytest.approx(expected)


def test_classifier_does_not_tell_one_law_apart():
    found = [two_sample_accuracy(points(50, 3, seed=seed), points(50, 3, seed=100 + seed)) for seed in range(4)]
    error = 1.5 * 0.5 / math.sqrt(100)
    assert {each.standard_error for each in found} == {error}
    assert sum(each.accuracy for each in found) / 4 == pytest.approx(0.5, abs=3 * error / 2)


def test_classifier_finds_what_it_is_to_find():
    # Samples at one place with probability 0.5 each, of which one set has only half: 3 of 4 can be told at best.
    first = torch.cat([torch.zeros(200, 2), torch.ones(200, 2)])
    assert two_sample_accuracy(first, torch.ones(400, 2)).accuracy == pytest.approx(0.75)
    # Normals at a distance: Phi(1) of them are on their own side of the middle.
    found = two_sample_accuracy(points(500, 2), points(500, 2, seed=1) + 2 * torch.tensor([0.6, 0.8]))
    assert found.accuracy == pytest.approx(0.8413, abs=0.04)


def test_the_larger_set_has_no_more_weight():
    found = two_sample_accuracy(points(1000, 2), points(50, 2, seed=1))
    assert found.standard_error == 1.5 * 0.5 / math.sqrt(100)
    assert found.accuracy == pytest.approx(0.5, abs=3 * found.standard_error)  # where 0.95 are of the larger set
    assert found == two_sample_accuracy(points(1000, 2), points(50, 2, seed=1))
    assert found != two_sample_accuracy(points(1000, 2), points(50, 2, seed=1), seed=1)


@pytest.mark.parametrize("measure", [sliced_wasserstein, two_sample_accuracy])
@pytest.mark.parametrize(
    "first, second, error, text",
    [
        (points(9), points(9), ValueError, r"first must have shape \[n, ...\] with n at least \d.*, got \[9\]"),
        (points(9, 2), points(0, 2), ValueError, r"second must have shape .*, got \[0, 2\]"),
        (points(9, 0), points(9, 0), ValueError, r"first must have shape .*, got \[9, 0\]"),
        (points(9, 2), points(9, 3), ValueError, r"second must have samples of the shape of first, \[2\], got \[3\]"),
        (points(9, 2), points(9, 2) / 0, ValueError, "second must be finite, got 18 values"),
        ([[1.0]], points(9, 2), TypeError, "first must be a tensor, got list"),
        (points(9, 2), points(9, 2).long(), TypeError, "second must be float32, float64"),
    ],
)
def test_bad_sets_are_refused(measure, first, second, error, text):
    with pytest.raises(error, match=text):
        measure(first, second)


def test_bad_numbers_are_refused():
    with pytest.raises(ValueError, match="projections must be at least 1, got 0"):
        sliced_wasserstein(points(9, 2), points(9, 2), projections=0)
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        two_sample_accuracy(points(9, 2), points(9, 2), seed=-1)
