"""Estimates densities with scikit-learn's interface, for data in NumPy arrays, data frames and tensors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ._extras import extra
from ._native import cuda_problem
from ._numbers import integer, positive, reals
from ._tensors import check_finite, check_tensor, compute_dtype
from .bandwidth import named_entropy_bandwidth
from .entropy import covariance_rank
from .ops.kde import kde_log_prob

with extra("sklearn"):
    from sklearn.base import BaseEstimator
    from sklearn.utils import check_random_state
    from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

__all__ = ["KernelDensity"]

_PAIRS = 2**22  # of a query and a center that `cdf` looks at together, which bounds its memory
_NUMPY_DTYPE = {torch.float32: np.float32, torch.float64: np.float64}


@dataclass(frozen=True)
class _Frame:
    """Holds coordinates z in which the kernel is isotropic: x = origin + root z, or x = z where there is no root.

    Attributes:
        origin: [l] in float64.
        root: [l, l] in float64, lower triangular, or None.
    """

    origin: Tensor
    root: Tensor | None

    def into(self, x: Tensor) -> Tensor:
        """Returns the coordinates of points [n, l], in their dtype."""
        if self.root is None:
            return x
        centered = x.double() - self.origin
        z: Tensor = torch.linalg.solve_triangular(self.root, centered.mT, upper=False).mT
        return z.to(x.dtype)

    def out_of(self, z: Tensor) -> Tensor:
        """Returns the points [n, l] that have these coordinates, in their dtype."""
        return z if self.root is None else (self.origin + z.double() @ self.root.mT).to(z.dtype)

    @property
    def log_volume(self) -> float:
        """Returns the logarithm of the volume of the unit cube of these coordinates."""
        return 0.0 if self.root is None else float(self.root.diagonal().log().sum())


class KernelDensity(BaseEstimator):  # type: ignore[misc]
    """Estimates a density by normal kernels at the samples, as `sklearn.neighbors.KernelDensity` does, but exactly.

    Use it in place of scikit-learn's, whose own estimator walks a tree on one core and gives approximate answers from
    about 20 dimensions on. Here the log-density is that of `kdejsd.kde_log_prob`: exact in any number of dimensions, on
    the CPU and on CUDA, without an n x m matrix.

    `fit`, `score_samples`, `score` and `cdf` take NumPy arrays, data frames and whatever else scikit-learn takes, and
    return NumPy arrays. For floating-point tensors on any device they return tensors there; `score_samples` and `cdf`
    of a tensor are differentiable in it. The dtype is that of the data given to `fit`: float32 stays float32 and
    float64 float64 (half tensors become float32, everything else float64). Later data are converted to it.

    The bandwidth is the kernel's standard deviation h, or a rule to find it:

    * A positive number.
    * "scott" is n^(-1/(l+4)), and "silverman" (n (l+2)/4)^(-1/(l+4)). Both are meant for data of unit variance, and as
      in scikit-learn they do not adapt to the data unless `whiten` is True. With weights, n is the effective number
      (sum w)^2 / sum w^2, as in SciPy.
    * "entropy" is the bandwidth that maximises the leave-one-out likelihood, by `kdejsd.entropy_bandwidth`. With
      weights, the log-likelihoods are averaged by them, and a sample is left out with all its weight.
    * An array [l] has a standard deviation for each dimension.
    * A matrix [l, l] is the kernel's covariance, symmetric and positive definite.

    Args:
        bandwidth: h, one of these.
        whiten: whether the bandwidth is in units of the data: the kernel's covariance is then h^2 times the data's (n -
            1 in its denominator; with weights, 1 - sum w^2 for weights that sum to 1, as in SciPy).
            `KernelDensity("scott", whiten=True)` is `scipy.stats.gaussian_kde`. It goes with a number or a rule, not
            with an array, which has units of its own.
        debias: whether to take the score-debiased estimate. Each center is moved by h^2/2 times the gradient of the
            log-density there, computed with the same bandwidth and including the center's own kernel. This removes the
            estimate's leading bias. It is at its best with bandwidths wider than the usual ones.
        device: where to compute, such as "cuda"; None for the CPU, or the device of the tensors given to `fit`.

    Attributes:
        bandwidth_: the bandwidth in use: a number, or the array that was given.
        centers_: [m, l], the kernels' means: the samples of positive weight, moved if `debias`.
        weights_: [m] in float64, the kernels' weights, which sum to 1.
        n_features_in_: l.
        feature_names_in_: the names of the columns, where `fit` was given a data frame.

    Source of `debias`: Epstein, Dwaraknath, Sornwanee, Winnicki, Liu, "SD-KDE: Score-Debiased Kernel Density
    Estimation", https://arxiv.org/abs/2504.19084.

    Example:
        >>> import numpy as np
        >>> from kdejsd.sklearn import KernelDensity
        >>> x = np.random.default_rng(0).normal(size=(1000, 2)) * [1.0, 10.0]
        >>> density = KernelDensity("entropy", whiten=True).fit(x)
        >>> round(density.bandwidth_, 2)
        0.39
        >>> density.score_samples([[0.0, 0.0], [0.0, 20.0]]).round(1)  # the true values are -4.1 and -6.1
        array([-4.3, -6.1])
        >>> density.sample(3, random_state=0).shape
        (3, 2)
    """

    def __init__(
        self,
        bandwidth: Any = 1.0,
        *,
        whiten: bool = False,
        debias: bool = False,
        device: str | torch.device | None = None,
    ) -> None:
        self.bandwidth = bandwidth
        self.whiten = whiten
        self.debias = debias
        self.device = device

    @torch.inference_mode(False)
    @torch.enable_grad()
    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> KernelDensity:
        """Places the kernels, and finds the bandwidth where it is a rule.

        Args:
            X: [m, l], the samples.
            y: ignored.
            sample_weight: [m], not negative and not all 0; None for equal weights. Their sum does not matter.

        Returns:
            The estimator itself.

        Raises:
            ValueError: if the samples are no finite numbers in two dimensions or too few, a weight is negative, a
                setting is out of its range or does not go with another, or the data do not vary as it needs.
            TypeError: if a setting or a tensor has another type.
            RuntimeError: if the device is CUDA and cannot be used.

        Example:
            >>> import torch
            >>> from kdejsd.sklearn import KernelDensity
            >>> KernelDensity(0.5).fit(torch.zeros(1, 2), sample_weight=[3.0]).score_samples(torch.zeros(1, 2))
            tensor([-0.4516])
        """
        for name in ("whiten", "debias"):
            if not isinstance(getattr(self, name), (bool, np.bool_)):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        self._home = X.device if isinstance(X, Tensor) else None
        samples, weights = _weighted(self._checked(X).detach().clone(), sample_weight)
        log_weights = None if sample_weight is None else weights.log().to(samples.dtype)
        origin = weights @ samples.double()
        self._frame = _Frame(origin, self._root(samples, weights, origin))
        points = self._frame.into(samples)
        h = self._isotropic_bandwidth(points, weights, log_weights)
        if self.debias:
            query = points.clone().requires_grad_()
            (score,) = torch.autograd.grad(kde_log_prob(query, points, h, log_weights=log_weights).sum(), query)
            points = points + h**2 / 2 * score
        self._points, self._h, self._weights, self._log_weights = points, h, weights, log_weights
        self.bandwidth_ = self.bandwidth if self._is_array() else h
        return self

    def score_samples(self, X: Any) -> Any:
        """Returns the log-density at each point [n, l], in nats, as [n].

        Raises:
            ValueError: if the points are not finite or of another number of dimensions.
            NotFittedError: (scikit-learn's) before `fit`.

        Example:
            >>> from kdejsd.sklearn import KernelDensity
            >>> KernelDensity(1.0).fit([[0.0]]).score_samples([[0.0], [1.0]])
            array([-0.91893853, -1.41893853])
        """
        query = self._coordinates(X)
        found = kde_log_prob(query, self._points, self._h, log_weights=self._log_weights)
        return _like(X, found - self._frame.log_volume)

    @torch.no_grad()
    def score(self, X: Any, y: None = None) -> float:
        """Returns the total log-likelihood of the points [n, l], in nats, as scikit-learn does.

        Example:
            >>> from kdejsd.sklearn import KernelDensity
            >>> round(KernelDensity(1.0).fit([[0.0]]).score([[0.0], [1.0]]), 4)
            -2.3379
        """
        return float(self.score_samples(X).sum(dtype=torch.float64 if isinstance(X, Tensor) else np.float64))

    def sample(self, n_samples: int = 1, random_state: Any = None) -> Any:
        """Draws points from the estimated density.

        Args:
            n_samples: how many, at least 1.
            random_state: an int for the same points each time, a `numpy.random.RandomState`, or None for NumPy's global
                one.

        Returns:
            [n_samples, l]: an array, or a tensor on the device of the tensors given to `fit`.

        Example:
            >>> from kdejsd.sklearn import KernelDensity
            >>> density = KernelDensity(0.1).fit([[0.0], [5.0]], sample_weight=[0.0, 1.0])
            >>> density.sample(4, random_state=0).round(1).ravel()
            array([5.2, 4.9, 5.1, 5. ])
        """
        check_is_fitted(self, "bandwidth_")
        n_samples = integer("n_samples", n_samples, 1)
        random = check_random_state(random_state)
        kernels = random.choice(len(self._weights), size=n_samples, p=self._weights.numpy(force=True))
        noise = torch.from_numpy(random.normal(size=(n_samples, self.n_features_in_))).to(self._points)
        points = self._points[torch.from_numpy(kernels).to(noise.device)]
        return self._given(self._frame.out_of(points + self._h * noise))

    def cdf(self, X: Any) -> Any:
        """Returns the probability of a value below each point [n, 1], as [n]; for data of one dimension.

        It computes all n x m pairs, in parts, so that not all are in memory.

        Raises:
            ValueError: if the data have more than one dimension, and as in `score_samples`.

        Example:
            >>> from kdejsd.sklearn import KernelDensity
            >>> KernelDensity(1.0).fit([[-1.0], [1.0]]).cdf([[-9.0], [0.0], [9.0]]).round(6)
            array([0. , 0.5, 1. ])
        """
        check_is_fitted(self, "bandwidth_")
        if self.n_features_in_ != 1:
            raise ValueError(
                f"cdf needs data of one dimension, got {self.n_features_in_}; fit an estimator to a single column"
            )
        query = self._coordinates(X).double()
        centers = self._points.double().squeeze(1)
        parts = query.split(max(1, _PAIRS // len(centers)))
        # By erfc, since torch's ndtr gives 0 from 9 standard deviations below the center on.
        below = [
            (torch.special.erfc((centers - z) / (self._h * math.sqrt(2))) * self._weights).sum(1) / 2 for z in parts
        ]
        return _like(X, torch.cat(below).clamp(max=1).to(self._points.dtype))

    @property
    def centers_(self) -> Any:
        return self._given(self._frame.out_of(self._points))

    @property
    def weights_(self) -> Any:
        return self._given(self._weights)

    def _checked(self, X: Any, like: Tensor | None = None) -> Tensor:
        """Returns data as a finite tensor [n, l], with another's dtype and device or, in `fit`, with their own."""
        device = self._chosen_device(X) if like is None else like.device
        if not isinstance(X, Tensor):
            wanted = [np.float64, np.float32] if like is None else _NUMPY_DTYPE[like.dtype]
            return torch.tensor(validate_data(self, X, dtype=wanted, order="C", reset=like is None), device=device)
        dtype = compute_dtype("X", check_tensor("X", X))
        if X.ndim != 2 or 0 in X.shape:
            raise ValueError(f"X must have shape [n, l] with n and l at least 1, got {list(X.shape)}")
        validate_data(self, X, skip_check_array=True, reset=like is None)
        x = X.to(device, dtype if like is None else like.dtype)
        check_finite("X", x)
        return x

    def _chosen_device(self, X: Any) -> torch.device:
        usual = X.device if isinstance(X, Tensor) else torch.device("cpu")
        device = usual if self.device is None else torch.device(self.device)
        if device.type == "cuda" and (problem := cuda_problem()):
            raise RuntimeError(f"device {str(device)!r} cannot be used: {problem}")
        return device

    def _is_array(self) -> bool:
        """Tells whether the bandwidth is an array, which has the kernel's whole covariance in it."""
        return np.ndim(self.bandwidth) > 0

    def _root(self, samples: Tensor, weights: Tensor, mean: Tensor) -> Tensor | None:
        """Returns the root of the frame in which the kernel is isotropic."""
        if not self._is_array():
            return _root_of_covariance(samples, weights, mean) if self.whiten else None
        if self.whiten:
            raise ValueError(
                "whiten=True needs a bandwidth that is a number or a rule, got an array, which has units of its own; "
                "pass whiten=False"
            )
        return _root_of_kernel(self.bandwidth, mean)

    def _isotropic_bandwidth(self, points: Tensor, weights: Tensor, log_weights: Tensor | None) -> float:
        """Returns the bandwidth for samples in the frame's coordinates."""
        if self._is_array():
            return 1.0
        if not isinstance(self.bandwidth, str):
            return positive("bandwidth", self.bandwidth)
        if self.bandwidth == "entropy":
            if len(points) < 2:
                raise ValueError(
                    f'bandwidth="entropy" needs 2 samples of positive weight or more, got n_samples={len(points)}'
                )
            return named_entropy_bandwidth("rows of X", points, log_weights)
        count = len(points) if log_weights is None else float(1 / weights.square().sum())
        dim = points.shape[1]
        if self.bandwidth == "scott":
            return float(count ** (-1 / (dim + 4)))
        if self.bandwidth == "silverman":
            return float((count * (dim + 2) / 4) ** (-1 / (dim + 4)))
        raise ValueError(
            f'bandwidth must be a number, an array, "scott", "silverman" or "entropy", got {self.bandwidth!r}'
        )

    def _coordinates(self, X: Any) -> Tensor:
        """Returns points in the coordinates in which the kernel is isotropic, once there is one."""
        check_is_fitted(self, "bandwidth_")
        return self._frame.into(self._checked(X, self._points))

    def _given(self, values: Tensor) -> Any:
        """Returns a tensor where `fit` was given one, and an array otherwise."""
        return values.numpy(force=True) if self._home is None else values.to(self._home)


def _like(X: Any, values: Tensor) -> Any:
    """Returns a tensor on the device of X if X is one, and an array otherwise."""
    return values.to(X.device) if isinstance(X, Tensor) else values.numpy(force=True)


def _weighted(samples: Tensor, sample_weight: Any) -> tuple[Tensor, Tensor]:
    """Returns the samples of positive weight, and these weights in float64, with a sum of 1."""
    if sample_weight is None:
        return samples, samples.new_full((len(samples),), 1 / len(samples), dtype=torch.float64)
    if isinstance(sample_weight, Tensor):
        sample_weight = sample_weight.double().numpy(force=True)  # NumPy has no bfloat16
    values = _check_sample_weight(sample_weight, np.empty((len(samples), 0)), dtype=np.float64)
    if (values < 0).any() or not (values > 0).any():
        raise ValueError(
            f"sample_weight must not be negative, and not 0 for all samples, got {values.min():g} to {values.max():g}"
        )
    shares = values / values.max()
    weights = torch.from_numpy(shares / shares.sum()).to(samples.device)
    return samples[weights > 0], weights[weights > 0]


def _root_of_covariance(samples: Tensor, weights: Tensor, mean: Tensor) -> Tensor:
    """Returns the Cholesky factor of the samples' weighted covariance."""
    count, dim = samples.shape
    rank = 0
    if count > 1:
        centered = samples.double() - mean
        covariance = (weights * centered.mT) @ centered / (1 - weights.square().sum())
        rank = covariance_rank(samples, covariance)
    if rank < dim:
        raise ValueError(
            f"X must vary in all its {dim} dimensions to be whitened, got n_samples={count} of positive weight whose "
            f"covariance has rank {rank}; drop what is constant or repeated, or pass whiten=False"
        )
    root: Tensor = torch.linalg.cholesky(covariance)
    return root


def _root_of_kernel(bandwidth: Any, like: Tensor) -> Tensor:
    """Returns a root of the kernel's covariance, which is given as [l, l] or by standard deviations [l]."""
    if isinstance(bandwidth, np.ndarray):  # torch takes no negative strides, and warns of what is not to be written
        bandwidth = bandwidth.copy()
    kernel = torch.as_tensor(reals("bandwidth", bandwidth), dtype=like.dtype, device=like.device)
    dim = len(like)
    if kernel.shape == (dim,):
        if not bool(((kernel > 0) & kernel.isfinite()).all()):
            raise ValueError(f"bandwidth must be positive and finite in each dimension, got {kernel.tolist()}")
        return kernel.diag()
    if kernel.shape != (dim, dim):
        raise ValueError(
            f"bandwidth must be a number, or have shape [{dim}] or [{dim}, {dim}] for X with {dim} columns, "
            f"got {list(kernel.shape)}"
        )
    root: Tensor
    root, problem = torch.linalg.cholesky_ex(kernel)
    if bool(problem) or not bool(root.isfinite().all()) or not torch.allclose(kernel, kernel.mT, rtol=1e-6, atol=0):
        raise ValueError("bandwidth must be symmetric and positive definite where it is a matrix, a covariance")
    return root
