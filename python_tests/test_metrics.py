"""The measures of `kdejsd.metrics`, but for the Frechet distance: values, errors, and all that is asked of a metric."""

import itertools
import math
import pickle
import subprocess
import sys

import pytest
import torch
from helpers import DEVICES, points, results_of_ranks
from torch import nn
from torchmetrics import Metric, MetricCollection, MetricTracker

from kdejsd import (
    GaussianMixture,
    StandardNormal,
    class_radius,
    collision_probability_from_counts,
    kde_entropy,
    renyi_entropy,
)
from kdejsd.divergence import target_jsd
from kdejsd.metrics import (
    ClassRadius,
    CodeEntropy,
    CodeJSD,
    CollisionEntropy,
    SlicedWasserstein,
    TwoSampleAccuracy,
    sliced_wasserstein,
    two_sample_accuracy,
)

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
    found = [two_sample_accuracy(points(50, 3, seed=seed), points(50, 3, seed=100 + seed)) for seed in range(2)]
    error = 1.5 * 0.5 / math.sqrt(100)
    assert {each.standard_error for each in found} == {error}
    assert sum(each.accuracy for each in found) / 2 == pytest.approx(0.5, abs=3 * error / math.sqrt(2))


def test_classifier_finds_what_it_is_to_find():
    # Samples at one place with probability 0.5 each, of which one set has only half: 3 of 4 can be told at best.
    first = torch.cat([torch.zeros(200, 2), torch.ones(200, 2)])
    assert two_sample_accuracy(first, torch.ones(400, 2)).accuracy == pytest.approx(0.75)
    # Normals at a distance: Phi(1) of them are on their own side of the middle.
    found = two_sample_accuracy(points(500, 2), points(500, 2, seed=1) + 2 * torch.tensor([0.6, 0.8]))
    assert found.accuracy == pytest.approx(0.8413, abs=0.04)


@pytest.mark.parametrize(("unit", "origin"), [(1e-50, 0.0), (1e200, 0.0), (1.0, 1e9)])
def test_classifier_sees_values_in_any_unit(unit, origin):
    first, second = points(200, 3), points(200, 3, seed=1) + 1
    expected = two_sample_accuracy(first, second).accuracy
    found = two_sample_accuracy(unit * first + origin, unit * second + origin).accuracy
    assert expected > 0.7 and found == pytest.approx(expected, abs=0.01)
    far = torch.cat([first[1:], torch.full((1, 3), 1e6, dtype=first.dtype)])  # which hides nothing of the rest
    assert two_sample_accuracy(far, second).accuracy == pytest.approx(expected, abs=0.05)


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


# ---- Metrics, each with the batches that it is given in turn

SIZES = [40, 7, 0, 33, 20]
CODES = points(100, 3).float()
LABELS = (CODES[:, 0] > 0).long() + (CODES[:, 1] > 1).long()
REAL, GENERATED = points(100, 2, 2, seed=1).float(), points(100, 2, 2, seed=2).float() + 0.5
MIXTURE = GaussianMixture([[-1.0, 0.0, 0.0], [1.0, 0.0, 0.0]], 0.7)


def batches(**whole):
    parts = zip(*(values.split(SIZES) for values in whole.values()), strict=True)
    return [dict(zip(whole, part, strict=True)) for part in parts]


SAMPLES = [
    each | {"real": real} for real, whole in ((True, REAL), (False, GENERATED)) for each in batches(samples=whole)
]
CASES = {
    "CodeJSD": (CodeJSD, batches(codes=CODES)),
    "CodeJSD of a mixture": (lambda: CodeJSD(MIXTURE, 0.5, seed=3), batches(codes=CODES)),
    "CodeJSD of a part": (lambda: CodeJSD(max_codes=50), batches(codes=CODES)),
    "CodeJSD of duplicates": (lambda: CodeJSD(max_codes=50), batches(codes=CODES.sign())),
    "CodeEntropy": (CodeEntropy, batches(codes=CODES)),
    "ClassRadius": (ClassRadius, batches(latents=CODES, labels=LABELS)),
    "CollisionEntropy": (lambda: CollisionEntropy(3), batches(labels=LABELS)),
    "CollisionEntropy of probabilities": (lambda: CollisionEntropy(3), batches(labels=CODES.softmax(1))),
    "TwoSampleAccuracy": (TwoSampleAccuracy, SAMPLES),
    "SlicedWasserstein": (SlicedWasserstein, SAMPLES),
}
each_metric = pytest.mark.parametrize("name", CASES)


def updated(name, updates=None):
    make, given = CASES[name]
    metric = make()
    for update in given if updates is None else updates:
        metric.update(**update)
    return metric


def assert_equal(found, expected, name):
    """Bit for bit, but where numbers that are not whole are added in another order."""
    tolerance = 1e-12 if name == "CollisionEntropy of probabilities" else 0
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=0)


def of_floats(value):
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def in_order(rows):
    return torch.tensor(sorted(map(tuple, rows.flatten(1).tolist())))


def test_values_are_those_of_the_functions():
    codes, rng = in_order(CODES), torch.Generator().manual_seed
    assert updated("CodeJSD").compute() == target_jsd(codes, StandardNormal(3), rng(0))
    assert updated("CodeJSD of a mixture").compute() == target_jsd(codes, MIXTURE, rng(3), 0.5)
    torch.testing.assert_close(updated("CodeEntropy").compute(), kde_entropy(CODES))
    radius, expected = updated("ClassRadius"), class_radius(CODES, LABELS)
    assert float(radius.compute()) == pytest.approx(expected.mean)
    assert radius.standard_error == pytest.approx(expected.standard_error)
    share = collision_probability_from_counts(LABELS.bincount())
    torch.testing.assert_close(updated("CollisionEntropy").compute(), -share.log())
    accuracy = updated("TwoSampleAccuracy")
    expected = two_sample_accuracy(in_order(REAL), in_order(GENERATED))
    assert (float(accuracy.compute()), accuracy.standard_error) == pytest.approx(expected)
    assert float(updated("SlicedWasserstein").compute()) == pytest.approx(sliced_wasserstein(REAL, GENERATED))


def test_collision_entropy_of_probabilities_is_the_mean_over_pairs():
    p = CODES.double().softmax(1)
    pairs = torch.stack([p[i] @ p[j] for i, j in itertools.combinations(range(len(p)), 2)])
    found = updated("CollisionEntropy of probabilities").compute()
    torch.testing.assert_close(found, -pairs.mean().log(), rtol=1e-6, atol=0)
    sure = CollisionEntropy(3)
    sure.update(nn.functional.one_hot(LABELS).float())
    assert sure.compute() == updated("CollisionEntropy").compute()
    many = CollisionEntropy(3)
    many.update(torch.tensor([0.5, 0.25, 0.25]).multinomial(10**5, replacement=True, generator=torch.Generator()))
    torch.testing.assert_close(
        many.compute(), renyi_entropy(torch.tensor([0.5, 0.25, 0.25]).double()), rtol=0.01, atol=0
    )


@each_metric
def test_batches_and_their_order_do_not_matter(name):
    given = CASES[name][1]
    expected = updated(name).compute()
    assert expected.ndim == 0 and expected.isfinite()
    assert_equal(updated(name, given[::-1]).compute(), expected, name)
    single = [
        {key: value[i : i + 1] if isinstance(value, torch.Tensor) else value for key, value in update.items()}
        for update in given
        for i in range(len(next(iter(update.values()))))
    ]
    assert_equal(updated(name, single).compute(), expected, name)


def test_a_part_is_drawn_from_all_codes():
    """Where more codes come than are measured, each is as likely to be: also of many that are equal."""
    codes = torch.cat([torch.zeros(3000, 1), torch.ones(1000, 1), 2 + torch.rand(1000, 1)])
    metric = CodeJSD(max_codes=1000)
    metric.update(codes)
    kept = metric._kept("codes")
    assert len(kept) == 1000
    for count, expected in (((kept == 0).sum(), 600), ((kept == 1).sum(), 200), ((kept >= 2).sum(), 200)):
        assert abs(int(count) - expected) < 4 * math.sqrt(expected)


# ---- Ranks


def of_rank(rank, ranks):
    """Values where no rank has samples, then where they are divided, and where the first rank has all of them."""
    found = {}
    for name, (make, given) in CASES.items():
        metric = make()
        found[name, "none"] = metric.compute()
        for update in given[rank::ranks]:
            metric.update(**update)
        found[name, "divided"] = metric.compute()
        metric.reset()
        for update in given if rank == 0 else []:
            metric.update(**update)
        found[name, "first alone"] = metric.compute()
    wrong = CodeJSD()
    wrong.update(torch.zeros(5, 2 + rank))
    try:
        wrong.compute()
    except ValueError as error:
        found["wrong"] = str(error)
    return found


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return results_of_ranks(2, tmp_path_factory.mktemp("ranks"), of_rank)


@each_metric
def test_ranks_together_have_the_value_of_one_process(ranks, name):
    expected = updated(name).compute()
    for found in ranks:
        assert found[name, "none"].isnan()
        assert_equal(found[name, "divided"], expected, name)
        assert_equal(found[name, "first alone"], expected, name)


def test_samples_of_another_shape_on_another_rank_are_refused(ranks):
    for found in ranks:
        assert found["wrong"] == "every update must have samples of one shape, got samples of [2, 3] values"


# ---- What torchmetrics asks of a metric


@pytest.mark.parametrize("name", [name for name, (_, given) in CASES.items() if given is not SAMPLES])
def test_forward_gives_the_value_of_the_batch_and_adds_it(name):
    make, given = CASES[name]
    metric = make()
    for update in given:
        if len(next(iter(update.values()))):
            assert_equal(metric(**update), updated(name, [update]).compute(), name)
    assert_equal(metric.compute(), updated(name).compute(), name)


@each_metric
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.filterwarnings("ignore:.* is NaN")
def test_copies_go_on_and_a_reset_metric_begins_anew(name, device):
    given, expected = CASES[name][1], updated(name).compute()
    begun = updated(name, given[:4])
    for copy in (begun.clone(), pickle.loads(pickle.dumps(begun)), begun.to(device)):
        for update in given[4:]:
            copy.update(**update)
        assert copy.compute().device.type == (device if copy is begun else "cpu")
        if copy.device.type == "cpu":  # samples are others on other devices
            assert_equal(copy.compute(), expected, name)
    begun.reset()
    assert not begun.update_called
    with pytest.warns(UserWarning, match="before the ``update``"):
        assert begun.compute().isnan()


@each_metric
def test_a_model_with_a_metric_has_nothing_of_it_in_its_checkpoint(name):
    model = nn.Module()
    model.metric = updated(name)
    assert not model.state_dict() and not list(model.parameters())


@pytest.mark.skipif(not hasattr(Metric, "merge_state"), reason="this torchmetrics has no merge_state")
@each_metric
def test_states_are_merged(name):
    given = CASES[name][1]
    metric = updated(name, given[:1])
    metric.merge_state(updated(name, given[1:]))
    assert_equal(metric.compute(), updated(name).compute(), name)


@each_metric
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes_are_measured_in_that_of_the_metric(name, dtype):
    given = CASES[name][1]
    floating = [each | {key: value.to(dtype) for key, value in each.items() if of_floats(value)} for each in given]
    single = [each | {key: value.float() for key, value in each.items() if of_floats(value)} for each in floating]
    found = updated(name, floating).compute()
    assert found.dtype == (torch.float64 if "Collision" in name else torch.float32)
    torch.testing.assert_close(found, updated(name, single).compute(), rtol=1e-6, atol=0)


def test_a_metric_can_be_of_float64():
    metric = CodeEntropy().set_dtype(torch.float64)
    metric.update(points(100, 3))
    torch.testing.assert_close(metric.compute(), kde_entropy(points(100, 3)), rtol=1e-12, atol=0)


@each_metric
def test_values_over_steps_are_drawn(name):
    metric = updated(name)
    value = metric.compute()
    for figure, ax in (metric.plot(), metric.plot([value, value + 0.1])):
        assert ax.get_title() or ax.get_ylabel() or ax.lines
        figure.clear()
    assert metric.is_differentiable is False and metric.full_state_update is False
    if metric.plot_lower_bound is not None:
        assert metric.plot_lower_bound <= value <= (metric.plot_upper_bound or math.inf)


def test_collections_and_trackers_take_them():
    collection = MetricCollection([CodeJSD(), CodeEntropy()])
    tracker = MetricTracker(collection, maximize=[metric.higher_is_better for metric in collection.values()])
    for scale in (1.0, 0.2):
        tracker.increment()
        for update in batches(codes=scale * CODES):
            tracker.update(**update)
    best, steps = tracker.best_metric(return_step=True)
    assert steps["CodeJSD"] == 0 and best["CodeJSD"] == pytest.approx(float(updated("CodeJSD").compute()))
    both = MetricCollection([ClassRadius(), CollisionEntropy(3)])
    both.update(latents=CODES, labels=LABELS)
    assert both.compute()["CollisionEntropy"] == updated("CollisionEntropy").compute()


# ---- Errors


@pytest.mark.parametrize(
    "make, error, text",
    [
        (lambda: CodeJSD(target=3), TypeError, "target must be None, StandardNormal"),
        (lambda: CodeJSD(bandwidth=0), ValueError, "bandwidth must be positive and finite, got 0"),
        (lambda: CodeJSD(seed=-1), ValueError, "seed must be at least 0"),
        (lambda: CodeEntropy(max_codes=1), ValueError, "max_codes must be at least 2, got 1"),
        (lambda: ClassRadius(max_codes=1.5), TypeError, "max_codes must be an integer, got 1.5"),
        (lambda: CollisionEntropy(0), ValueError, "num_classes must be at least 1, got 0"),
        (lambda: TwoSampleAccuracy(max_samples=4), ValueError, "max_samples must be at least 5, got 4"),
        (lambda: SlicedWasserstein(projections=0), ValueError, "projections must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_refused_at_once(make, error, text):
    with pytest.raises(error, match=text):
        make()


@pytest.mark.parametrize(
    "name, update, error, text",
    [
        ("CodeJSD", {"codes": CODES[0]}, ValueError, r"codes must have shape \[n, l\] with l at least 1, got \[3\]"),
        ("CodeJSD", {"codes": CODES[:, :0]}, ValueError, r"codes must have shape .*, got \[100, 0\]"),
        ("CodeJSD", {"codes": CODES.long()}, TypeError, "codes must be float32"),
        (
            "CodeJSD of a mixture",
            {"codes": CODES[:, :2]},
            ValueError,
            "target must have 2 dimensions, as each code has",
        ),
        ("CodeEntropy", {"codes": CODES.tolist()}, TypeError, "codes must be a tensor, got list"),
        ("CodeEntropy", {"codes": CODES[:, :2]}, ValueError, r"of one shape, got samples of \[2, 3\] values"),
        ("ClassRadius", {"latents": CODES, "labels": LABELS[:3]}, ValueError, r"labels must have shape \[100\]"),
        ("ClassRadius", {"latents": CODES, "labels": LABELS.int()}, TypeError, "labels must be int64"),
        (
            "ClassRadius",
            {"latents": CODES, "labels": LABELS + 2**24},
            ValueError,
            "labels must be exact in",
        ),
        ("CollisionEntropy", {"labels": LABELS + 1}, ValueError, "num_classes = 3, got 1 to 3"),
        ("CollisionEntropy", {"labels": LABELS - 1}, ValueError, "labels must be at least 0 .* got -1 to 1"),
        ("CollisionEntropy", {"labels": CODES}, ValueError, "labels must be probabilities"),
        ("CollisionEntropy", {"labels": CODES[:, :2]}, ValueError, r"labels must have shape \[n\] or \[n, 3\]"),
        ("CollisionEntropy", {"labels": LABELS[:, None]}, ValueError, r"labels must have shape \[n\] or \[n, 3\]"),
        ("TwoSampleAccuracy", {"samples": REAL[0, 0], "real": True}, ValueError, r"samples must have shape \[n, ...\]"),
        (
            "TwoSampleAccuracy",
            {"samples": REAL, "real": GENERATED},
            TypeError,
            "real must be True or False, got Tensor",
        ),
        ("SlicedWasserstein", {"samples": CODES, "real": False}, ValueError, r"got samples of \[3, 4\] values"),
    ],
)
def test_bad_batches_are_refused(name, update, error, text):
    with pytest.raises(error, match=text):
        updated(name).update(**update)


@pytest.mark.parametrize(
    "make, updates, text",
    [
        (CodeJSD, [{"codes": CODES[:0]}], "CodeJSD is NaN: update must be given codes first"),
        (CodeJSD, [{"codes": CODES / 0}], "CodeJSD is NaN: codes must be finite"),
        (CodeEntropy, [{"codes": CODES[:1]}], "CodeEntropy is NaN: codes must"),
        (
            CodeEntropy,
            [{"codes": CODES * torch.tensor([1.0, 1.0, 0.0])}],
            "NaN: .* covariance has rank 2",
        ),
        (CodeEntropy, [{"codes": CODES / 0}], "CodeEntropy is NaN: codes must be finite"),
        (ClassRadius, [{"latents": CODES[:1], "labels": LABELS[:1]}], "ClassRadius is NaN: latents must have shape"),
        (
            TwoSampleAccuracy,
            [{"samples": REAL, "real": True}],
            "NaN: update must be given generated samples",
        ),
        (TwoSampleAccuracy, [*SAMPLES[:1], {"samples": REAL[:4], "real": False}], "second must .* n at least 5"),
        (SlicedWasserstein, [*SAMPLES[:-1], {"samples": REAL / 0, "real": False}], "second must be finite"),
    ],
)
def test_a_value_that_there_is_not_is_nan(make, updates, text):
    metric = make()
    for update in updates:
        metric.update(**update)
    with pytest.warns(UserWarning, match=text):
        assert metric.compute().isnan() and math.isnan(getattr(metric, "standard_error", math.nan))


def test_batches_may_be_written_over():
    metric, batch = SlicedWasserstein(), torch.ones(5, 2)
    metric.update(batch, real=True)
    metric.update(batch.zero_(), real=False)
    assert float(metric.compute()) == pytest.approx(1, rel=0.1)


def test_any_seed_will_do():
    metric = TwoSampleAccuracy(seed=2**40)
    metric.update(torch.rand(20, 2), real=True)
    metric.update(torch.rand(20, 2), real=False)
    assert math.isfinite(float(metric.compute()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_collision_entropy_counts_in_float64_whatever_the_dtype_of_a_collection(dtype):
    metrics = MetricCollection([CollisionEntropy(2)]).set_dtype(dtype)
    metrics.update(torch.zeros(5000, dtype=torch.int64))
    assert metrics.compute()["CollisionEntropy"] == 0


def test_collision_entropy_without_collisions():
    metric = CollisionEntropy(3)
    metric.update(torch.tensor([1]))
    assert metric.compute().isnan()
    metric.update(torch.tensor([2]))
    assert metric.compute() == math.inf


@pytest.mark.parametrize("package, text", [("lightning", ""), ("torchmetrics", 'pip install "kdejsd[train]"')])
def test_metrics_need_torchmetrics_alone(package, text):
    code = f"import sys; sys.modules[{package!r}] = None; import kdejsd.metrics; kdejsd.metrics.CodeJSD()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert text in done.stderr and bool(text) == bool(done.returncode)
