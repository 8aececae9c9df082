"""Tests kdejsd.sklearn by scikit-learn's own checks and its KernelDensity, SciPy's gaussian_kde, and known laws."""

from __future__ import annotations

import io
import math
import pickle
import re
import subprocess
import sys

import joblib
import numpy as np
import pytest
import torch
from helpers import DEVICES, DTYPES, points, worst
from scipy.stats import gaussian_kde, kstest, multivariate_normal, norm
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.model_selection import GridSearchCV
from sklearn.neighbors import KernelDensity as Peer
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import kdejsd
from kdejsd import reference
from kdejsd._native import cuda_problem
from kdejsd.sklearn import KernelDensity


def samples(count: int, dim: int, seed: int = 0) -> np.ndarray:
    """Correlated normal samples of different scales, away from the origin."""
    scales = np.linspace(0.5, 2, dim)
    return points(count, dim, seed=seed).numpy() @ (np.diag(scales) + 0.2) + 3


WEIGHTS = np.random.default_rng(5).uniform(0.1, 3, 200)
QUERY = samples(50, 3, seed=1)


# ----------------------------------------------------------------------------------------------------------------------
# scikit-learn's own checks


def not_applicable(estimator: KernelDensity) -> dict[str, str]:
    """Returns the checks whose data are none that the estimator's bandwidth exists for."""
    found = {}
    if estimator.bandwidth == "entropy":
        reason = "each of its samples has a duplicate, so that no bandwidth is the most likely one"
        found |= dict.fromkeys(("check_sample_weights_shape", "check_sample_weights_not_overwritten"), reason)
    if estimator.whiten:
        reason = "it has fewer samples than dimensions, which cannot be whitened"
        found["check_sample_weight_equivalence_on_dense_data"] = reason
    return found


@parametrize_with_checks(
    [
        KernelDensity(),
        KernelDensity("scott", debias=True),
        KernelDensity("silverman", whiten=True),
        KernelDensity("entropy", whiten=True, debias=True),
    ],
    expected_failed_checks=not_applicable,
)
def test_checks_of_scikit_learn(estimator, check):
    check(estimator)


# ----------------------------------------------------------------------------------------------------------------------
# Against scikit-learn and SciPy


@pytest.mark.parametrize("dim", [1, 3, 40])
@pytest.mark.parametrize("bandwidth", [0.7, "scott", "silverman"])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_scikit_learn(dim, bandwidth, weighted):
    x, query = samples(200, dim), samples(50, dim, seed=1)
    weights = WEIGHTS if weighted else None
    ours = KernelDensity(bandwidth).fit(x, sample_weight=weights)
    # A single leaf makes it exact. It counts rows, whatever their weights, where a rule asks for the sample size.
    theirs = Peer(bandwidth=ours.bandwidth_, leaf_size=len(x)).fit(x, sample_weight=weights)
    np.testing.assert_allclose(ours.score_samples(query), theirs.score_samples(query), rtol=1e-12)
    assert ours.score(query) == pytest.approx(theirs.score(query), rel=1e-12)
    if not weighted:
        assert ours.bandwidth_ == Peer(bandwidth=bandwidth).fit(x).bandwidth_


@pytest.mark.parametrize("dim", [1, 3])
@pytest.mark.parametrize("rule", ["scott", "silverman", 0.4])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_whitened_is_scipy(dim, rule, weights):
    x, query = samples(200, dim), samples(50, dim, seed=1)
    theirs = gaussian_kde(x.T, bw_method=rule, weights=weights)
    ours = KernelDensity(rule, whiten=True).fit(x, sample_weight=weights)
    assert ours.bandwidth_ == pytest.approx(theirs.factor)
    np.testing.assert_allclose(ours.score_samples(query), theirs.logpdf(query.T), rtol=1e-10)
    if dim == 1:
        np.testing.assert_allclose(
            ours.cdf(query), [theirs.integrate_box_1d(-np.inf, q) for q in query[:, 0]], rtol=1e-10
        )


# ----------------------------------------------------------------------------------------------------------------------
# Bandwidths


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_matrices_and_deviations(weights):
    x = samples(200, 3)
    covariance = np.cov(x.T) / 4
    shares = np.full(200, 1 / 200) if weights is None else weights / weights.sum()
    for bandwidth, kernel in (
        (covariance, covariance),
        (torch.from_numpy(covariance), covariance),
        ([0.5, 1.0, 2.0], np.diag([0.25, 1.0, 4.0])),
        (0.5, np.eye(3) / 4),
    ):
        found = KernelDensity(bandwidth).fit(x, sample_weight=weights).score_samples(QUERY)
        law = multivariate_normal(np.zeros(3), kernel)
        np.testing.assert_allclose(found, np.log(law.pdf(QUERY[:, None] - x) @ shares), rtol=1e-10)


def leave_one_out(x: np.ndarray, weights: np.ndarray, h: float) -> float:
    """The weighted mean of each sample's log-density among the weighted others, from all pairs in NumPy."""
    exponents = -0.5 * ((x[:, None] - x) ** 2).sum(-1) / h**2 - x.shape[1] * math.log(h)
    np.fill_diagonal(exponents, -np.inf)
    return float(weights @ np.log(np.exp(exponents) @ weights))


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("whiten", [False, True])
def test_entropy_bandwidth_is_the_most_likely_one(weights, whiten):
    x = samples(200, 2)
    density = KernelDensity("entropy", whiten=whiten).fit(x, sample_weight=weights)
    h = density.bandwidth_
    if weights is None:
        z = x if not whiten else np.linalg.solve(np.linalg.cholesky(np.cov(x.T)), x.T).T
        assert h == pytest.approx(kdejsd.entropy_bandwidth(torch.from_numpy(z)), rel=1e-6)
        weights = np.ones(200)
    else:
        z = x if not whiten else np.linalg.solve(np.linalg.cholesky(np.cov(x.T, aweights=weights)), x.T).T
        assert abs(h / KernelDensity("entropy", whiten=whiten).fit(x).bandwidth_ - 1) > 1e-3
    best = leave_one_out(z, weights, h)
    assert best > max(leave_one_out(z, weights, 0.99 * h), leave_one_out(z, weights, 1.01 * h))


def test_zero_weights_leave_samples_out():
    x = samples(200, 3)
    weights = np.where(np.arange(200) < 120, WEIGHTS, 0)
    for settings in ({}, {"bandwidth": "entropy", "whiten": True, "debias": True}):
        some = KernelDensity(**settings).fit(x, sample_weight=weights)
        first = KernelDensity(**settings).fit(x[:120], sample_weight=weights[:120])
        assert some.centers_.shape == (120, 3)
        np.testing.assert_allclose(some.score_samples(QUERY), first.score_samples(QUERY), rtol=1e-12)
    tiny = KernelDensity().fit(x[:2], sample_weight=[1e300, 1e-300])
    np.testing.assert_allclose(tiny.score_samples(QUERY), KernelDensity().fit(x[:1]).score_samples(QUERY))


@pytest.mark.parametrize("debias", [False, True])
def test_whole_weights_are_repeats(debias):
    x, counts = samples(30, 3), np.arange(30) % 4
    weighted = KernelDensity(0.8, debias=debias).fit(x, sample_weight=counts)
    repeated = KernelDensity(0.8, debias=debias).fit(np.repeat(x, counts, axis=0))
    np.testing.assert_allclose(weighted.score_samples(QUERY), repeated.score_samples(QUERY), rtol=1e-10)


# ----------------------------------------------------------------------------------------------------------------------
# Debiased


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("settings", [{"bandwidth": 0.7}, {"bandwidth": 0.4, "whiten": True}])
def test_debiased_centers_have_moved_along_the_score(weights, settings):
    x = samples(200, 3)
    plain, debiased = (
        KernelDensity(**settings, debias=debias).fit(x, sample_weight=weights) for debias in (False, True)
    )
    kernel = settings["bandwidth"] ** 2 * (np.cov(x.T, aweights=weights) if settings.get("whiten") else np.eye(3))
    law = multivariate_normal(np.zeros(3), kernel)
    shares = law.pdf(x[:, None] - x) * (1 if weights is None else weights)
    shares /= shares.sum(1, keepdims=True)
    # Half the kernel's covariance times the score there, which leads to the mean of the samples around.
    np.testing.assert_allclose(debiased.centers_, (x + shares @ x) / 2, rtol=1e-10)
    np.testing.assert_allclose(plain.centers_, x, rtol=1e-12)
    np.testing.assert_array_equal(debiased.weights_, plain.weights_)
    assert debiased.weights_.sum() == pytest.approx(1)


@pytest.mark.parametrize(("dim", "plain", "debiased"), [(1, 0.29, 0.45), (2, 0.35, 0.54), (5, 0.48, 0.57)])
def test_debiasing_lowers_the_squared_error(dim, plain, debiased):
    """The integrated squared error from a normal, each way at its best bandwidth for 1000 samples."""
    query = 1.5 * points(2000, dim, seed=1).numpy()
    law = multivariate_normal(np.zeros(dim)).pdf(query)
    proposal = multivariate_normal(np.zeros(dim), 1.5**2).pdf(query)
    errors = []
    for settings in ({"bandwidth": plain}, {"bandwidth": debiased, "debias": True}):
        found = [
            np.exp(KernelDensity(**settings).fit(points(1000, dim, seed=s)).score_samples(query)) for s in (2, 3, 4)
        ]
        errors.append(np.mean((np.array(found) - law) ** 2 / proposal))
    assert errors[1] < 0.75 * errors[0]


# ----------------------------------------------------------------------------------------------------------------------
# The distribution function, and samples


@pytest.mark.parametrize("settings", [{}, {"whiten": True}, {"debias": True}, {"bandwidth": [0.5]}])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_cdf_is_the_integral_of_the_density(settings, weights, monkeypatch):
    monkeypatch.setattr("kdejsd.sklearn._PAIRS", 1000)  # some parts
    density = KernelDensity(**settings).fit(samples(200, 1), sample_weight=weights)
    grid = np.linspace(-20, 20, 4001)[:, None]
    cdf = density.cdf(grid)
    assert cdf[0] < 1e-10 and 1 - 1e-10 < cdf[-1] <= 1 and (np.diff(cdf) >= 0).all()
    heights = np.exp(density.score_samples(grid))
    areas = (heights[1:] + heights[:-1]) / 2 * 0.01
    np.testing.assert_allclose(np.cumsum(areas), cdf[1:] - cdf[0], atol=1e-5)
    assert density.cdf([[-1e300], [1e300]]) == pytest.approx([0, 1], abs=1e-12)


def test_cdf_is_exact_far_below_the_data():
    far = np.array([[-8.0], [-12.0], [-30.0]])
    np.testing.assert_allclose(KernelDensity(1.0).fit([[0.0]]).cdf(far), norm.cdf(far[:, 0]), rtol=1e-12)


@pytest.mark.parametrize("scale", [1e-9, 1e-150])
def test_columns_of_very_unlike_units_are_whitened(scale):
    x = samples(200, 3)
    units = np.array([1.0, scale, 1 / scale])
    expected = KernelDensity("entropy", whiten=True).fit(x).score_samples(QUERY)
    found = KernelDensity("entropy", whiten=True).fit(x * units).score_samples(QUERY * units)
    np.testing.assert_allclose(found, expected - np.log(units).sum(), rtol=1e-6)


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_entropy_bandwidth_has_any_unit(scale):
    x = samples(100, 2)
    expected = KernelDensity("entropy").fit(x).bandwidth_
    assert KernelDensity("entropy").fit(x * scale).bandwidth_ == pytest.approx(expected * scale, rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64, torch.bool])
def test_weights_may_be_tensors_of_any_dtype(dtype):
    weights = torch.arange(5).to(dtype)
    density = KernelDensity().fit(torch.eye(5), sample_weight=weights)
    np.testing.assert_allclose(density.weights_, weights[1:].double() / weights.double().sum())


@pytest.mark.parametrize("settings", [{"bandwidth": 0.5}, {"whiten": True, "bandwidth": "scott", "debias": True}])
def test_samples_follow_the_density(settings):
    density = KernelDensity(**settings).fit(samples(200, 1), sample_weight=WEIGHTS)
    drawn = density.sample(5000, random_state=0)
    assert drawn.shape == (5000, 1)
    assert kstest(drawn[:, 0], lambda x: density.cdf(x[:, None])).pvalue > 0.01


def test_samples_have_the_covariance_of_the_estimate():
    x = samples(500, 3)
    kernel = np.cov(x.T)[::-1, ::-1]
    kernel.setflags(write=False)
    drawn = KernelDensity(kernel).fit(x).sample(50_000, random_state=0)
    np.testing.assert_allclose(drawn.mean(0), x.mean(0), atol=0.05)
    np.testing.assert_allclose(np.cov(drawn.T), np.cov(x.T, bias=True) + kernel, atol=0.1)


def test_samples_by_seed():
    density = KernelDensity(0.5).fit(samples(200, 3))
    np.testing.assert_array_equal(density.sample(10, random_state=3), density.sample(10, random_state=3))
    state = np.random.RandomState(3)
    assert np.array_equal(density.sample(10, random_state=state), density.sample(10, random_state=3))
    assert not np.array_equal(density.sample(10, random_state=state), density.sample(10, random_state=3))
    assert density.sample().shape == (1, 3)


# ----------------------------------------------------------------------------------------------------------------------
# Arrays, data frames, tensors


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("settings", [{}, {"bandwidth": "scott", "whiten": True, "debias": True}])
def test_tensors(dtype, device, settings):
    x, query = points(300, 5, dtype=dtype, device=device), points(40, 5, dtype=dtype, device=device, seed=1)
    density = KernelDensity(**settings).fit(x, sample_weight=torch.linspace(0, 1, 300, device=device))
    truth = KernelDensity(**settings).fit(x.cpu().double().numpy(), sample_weight=np.linspace(0, 1, 300))
    found = density.score_samples(query.requires_grad_())
    for tensor in (found, density.sample(3), density.centers_):
        assert tensor.dtype == dtype and tensor.device == x.device
    assert worst(found, torch.from_numpy(truth.score_samples(query.detach().cpu().double().numpy()))) < 1e-5
    assert density.weights_.sum().item() == pytest.approx(1)
    (slope,) = torch.autograd.grad(found.sum(), query)
    ahead = density.score_samples(query.detach() + 1e-3 * slope).sum() - found.detach().sum()
    assert float(ahead) == pytest.approx(1e-3 * float(slope.square().sum()), rel=0.05)
    assert isinstance(density.score_samples(query.detach().cpu().numpy()), np.ndarray)
    assert isinstance(density.score(query), float)


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, np.int64])
def test_arrays_keep_their_dtype(dtype):
    x = (10 * samples(100, 1)).astype(dtype)
    density = KernelDensity(debias=True).fit(x)
    expected = np.float32 if dtype == np.float32 else np.float64
    for found in (density.score_samples(x), density.cdf(x.tolist()), density.sample(2), density.centers_):
        assert isinstance(found, np.ndarray) and found.dtype == expected
    assert density.score_samples(torch.zeros(1, 1)).dtype == getattr(torch, expected.__name__)


def test_half_tensors_become_float32():
    x = points(50, 2).bfloat16()
    density = KernelDensity().fit(x)
    assert torch.equal(density.score_samples(x), KernelDensity().fit(x.float()).score_samples(x.float()))


def test_data_frames_have_names():
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame(samples(100, 3), columns=["a", "b", "c"])
    density = KernelDensity().fit(frame)
    assert list(density.feature_names_in_) == ["a", "b", "c"]
    found = density.score_samples(frame)
    np.testing.assert_array_equal(found, KernelDensity().fit(frame.to_numpy()).score_samples(frame.to_numpy()))
    with pytest.raises(ValueError, match="feature names"):
        density.score_samples(frame[["c", "b", "a"]])


def test_data_can_change_later():
    for x in (samples(100, 3), points(100, 3)):
        density = KernelDensity().fit(x)
        before = density.score_samples(QUERY)
        x[:] = 0
        np.testing.assert_array_equal(density.score_samples(QUERY), before)


def test_as_the_reference_in_float32_far_from_the_origin():
    x = points(300, 4, dtype=torch.float32) + 100
    truth = reference.kde_log_prob(x.double(), x.double(), 0.5)
    assert worst(KernelDensity(0.5).fit(x).score_samples(x), truth) < 1e-5


# ----------------------------------------------------------------------------------------------------------------------
# In scikit-learn's company


def test_grid_search_finds_a_bandwidth():
    x = points(400, 1).numpy()
    search = GridSearchCV(KernelDensity(), {"bandwidth": [0.01, 0.1, 0.3, 1.0, 10.0]}, n_jobs=1).fit(x)
    assert search.best_params_ == {"bandwidth": 0.3}
    theirs = GridSearchCV(Peer(), {"bandwidth": [0.01, 0.1, 0.3, 1.0, 10.0]}).fit(x)
    np.testing.assert_allclose(search.cv_results_["mean_test_score"], theirs.cv_results_["mean_test_score"])
    grid = {"bandwidth": ["scott", "entropy", [0.3]], "debias": [False, True]}
    assert np.isfinite(GridSearchCV(KernelDensity(), grid).fit(x).cv_results_["mean_test_score"]).all()


def test_pipeline():
    x = samples(200, 3)
    pipeline = make_pipeline(StandardScaler(), KernelDensity("scott"))
    pipeline.fit(x, kerneldensity__sample_weight=WEIGHTS)
    scaled = StandardScaler().fit(x)
    alone = KernelDensity("scott").fit(scaled.transform(x), sample_weight=WEIGHTS)
    np.testing.assert_array_equal(pipeline.score_samples(QUERY), alone.score_samples(scaled.transform(QUERY)))


@pytest.mark.parametrize("bandwidth", [0.5, "entropy", np.array([1.0, 2.0, 3.0]), np.eye(3)])
def test_copies(bandwidth, tmp_path):
    density = KernelDensity(bandwidth, debias=True).fit(samples(100, 3), sample_weight=WEIGHTS[:100])
    joblib.dump(density, tmp_path / "density")
    for copy in (pickle.load(io.BytesIO(pickle.dumps(density))), joblib.load(tmp_path / "density")):
        np.testing.assert_array_equal(copy.score_samples(QUERY), density.score_samples(QUERY))
        np.testing.assert_array_equal(copy.sample(5, random_state=0), density.sample(5, random_state=0))
    fresh = clone(density)
    assert fresh.get_params().keys() == {"bandwidth", "whiten", "debias", "device"} and fresh.debias
    with pytest.raises(NotFittedError):
        fresh.score_samples(QUERY)
    fitted = fresh.set_params(bandwidth=2.0, debias=False).fit(QUERY)
    assert fitted.bandwidth_ == 2.0
    np.testing.assert_array_equal(fitted.centers_, QUERY)


# ----------------------------------------------------------------------------------------------------------------------
# Errors

CONSTANT = np.column_stack([QUERY, np.ones(50)])
DUPLICATES = np.repeat(QUERY, 2, axis=0)


@pytest.mark.parametrize(
    ("settings", "x", "error", "said"),
    [
        ({"bandwidth": 0.0}, QUERY, ValueError, "bandwidth must be positive and finite, got 0.0"),
        ({"bandwidth": "wide"}, QUERY, ValueError, 'bandwidth must be a number, an array, "scott", "silverman" or'),
        ({"bandwidth": None}, QUERY, TypeError, "bandwidth must be a real number, got None"),
        ({"bandwidth": [1.0, -1.0, 1.0]}, QUERY, ValueError, "positive and finite in each dimension"),
        ({"bandwidth": [1.0, 1.0]}, QUERY, ValueError, r"shape \[3\] or \[3, 3\] for X with 3 columns, got \[2\]"),
        ({"bandwidth": -np.eye(3)}, QUERY, ValueError, "bandwidth must be symmetric and positive definite"),
        ({"bandwidth": np.eye(3) + np.eye(3, k=1)}, QUERY, ValueError, "bandwidth must be symmetric"),
        ({"bandwidth": np.full((3, 3), np.nan)}, QUERY, ValueError, "bandwidth must be symmetric"),
        ({"bandwidth": np.eye(3), "whiten": True}, QUERY, ValueError, "whiten=True needs a bandwidth that is a number"),
        ({"bandwidth": "scott", "whiten": True}, CONSTANT, ValueError, "vary in all its 4 dimensions .* has rank 3"),
        ({"whiten": True}, QUERY[:1], ValueError, "n_samples=1 of positive weight whose covariance has rank 0"),
        ({"whiten": True}, QUERY[:3], ValueError, "covariance has rank 2"),
        ({"bandwidth": "entropy"}, QUERY[:1], ValueError, "needs 2 samples of positive weight or more"),
        ({"bandwidth": "entropy"}, DUPLICATES, ValueError, "rows of X must not all have an exact duplicate.*got 100"),
        ({"whiten": "no"}, QUERY, TypeError, "whiten must be True or False, got 'no'"),
        ({"debias": 1}, QUERY, TypeError, "debias must be True or False, got 1"),
        ({}, QUERY[0], ValueError, "Expected 2D array"),
        ({}, np.where(QUERY > 5, np.nan, QUERY), ValueError, "Input X contains NaN"),
        ({}, np.where(QUERY > 5, np.inf, QUERY), ValueError, "Input X contains infinity"),
        ({}, torch.full((3, 2), torch.nan), ValueError, "X must be finite, got 6"),
        ({}, torch.zeros(3), ValueError, r"X must have shape \[n, l\] with n and l at least 1, got \[3\]"),
        ({}, torch.zeros(3, 2, dtype=torch.int64), TypeError, "X must be float32, float64, float16 or bfloat16"),
    ],
)
def test_errors_of_fit(settings, x, error, said):
    with pytest.raises(error, match=said):
        KernelDensity(**settings).fit(x)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (-np.ones(50), "sample_weight must not be negative, and not 0 for all samples, got -1 to -1"),
        (np.zeros(50), "sample_weight must not be negative|zero"),
        (np.full(50, np.nan), "sample_weight contains NaN"),
        (np.ones(49), "sample_weight.shape"),
    ],
)
def test_errors_of_weights(weights, said):
    with pytest.raises(ValueError, match=said):
        KernelDensity().fit(QUERY, sample_weight=weights)


def test_errors_of_a_fitted_one():
    density = KernelDensity().fit(torch.from_numpy(QUERY))
    with pytest.raises(ValueError, match="cdf needs data of one dimension, got 3"):
        density.cdf(QUERY)
    for wrong in (QUERY[:, :2], torch.from_numpy(QUERY[:, :2])):
        with pytest.raises(ValueError, match="X has 2 features, but KernelDensity is expecting 3"):
            density.score_samples(wrong)
    with pytest.raises(ValueError, match="n_samples must be at least 1, got 0"):
        density.sample(0)
    for call in (lambda d: d.sample(), lambda d: d.cdf(QUERY), lambda d: d.score_samples(QUERY)):
        with pytest.raises(NotFittedError):
            call(KernelDensity())


@pytest.mark.skipif(not cuda_problem(), reason="CUDA is usable")
def test_a_device_that_cannot_be_used():
    with pytest.raises(RuntimeError, match=re.escape(f"device 'cuda' cannot be used: {cuda_problem()}")):
        KernelDensity(device="cuda").fit(QUERY)


@pytest.mark.skipif(bool(cuda_problem()), reason=cuda_problem() or "")
def test_arrays_on_cuda():
    host, device = (KernelDensity("scott", device=name, debias=True).fit(QUERY) for name in (None, "cuda"))
    assert device.score_samples(torch.from_numpy(QUERY)).device.type == "cpu"
    for name in ("score_samples", "sample"):
        found = getattr(device, name)(*([QUERY] if name == "score_samples" else [7, 0]))
        expected = getattr(host, name)(*([QUERY] if name == "score_samples" else [7, 0]))
        np.testing.assert_allclose(found, expected, rtol=1e-9)


def test_without_scikit_learn():
    code = "import sys, kdejsd; sys.modules['sklearn'] = None\nimport kdejsd.sklearn"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = 'kdejsd needs the package "sklearn[.a-z]*" for this, and it is not installed: '
    assert re.search(said + r'pip install "kdejsd\[sklearn\]"', done.stderr), done.stderr
    assert "sklearn" in dir(kdejsd) and kdejsd.sklearn.KernelDensity is KernelDensity
