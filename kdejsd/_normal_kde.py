"""Averages functions of the KDE of normal samples over all possible sets of samples, by quadrature."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

Array = np.ndarray[Any, np.dtype[Any]]

_NODES = 40  # of the distance of a query from the middle
_REACH = 6.5  # standard deviations of that distance, beyond which nothing lies
_STEP = 0.25  # of the grid of log s, at most; see `_Grid`
_BELOW, _ABOVE = 40.0, 4.5  # how far exp(x - e^x) reaches to the left and to the right, to 1e-17 and less
_MOST = 1_000_000  # points of the grids for all distances together, some seconds
_NOTHING = 1e-12  # of what phi and e^-s begin with, 1; Fourier transforms are exact to less than that


class Means(NamedTuple):
    """Holds two averages over queries and sets of centers.

    Attributes:
        log_x: of log X = log p_e - log p_t.
        log_r: of log r = log p_e / (p_e + p_t).
    """

    log_x: float
    log_r: float


def log_ratio_means(
    dim: int,
    count: int,
    bandwidth: float,
    *,
    variance: float = 1.0,
    query_scale: float = 1.0,
    center_scale: float = 1.0,
    own: bool = False,
) -> Means:
    """Averages log X and log r, X = p_e / p_t, over normal queries z and over all sets of m normal centers.

    p_e is the KDE of the centers with the bandwidth h, p_t is N(0, v). Given |z| = rho, m X is a sum of m independent
    terms, one for each center:

        Y = h^-l v^(l/2) exp(rho^2 / 2v - D^2 / 2h^2),

    where D^2 / c^2 has the noncentral chi-square distribution with l degrees of freedom and noncentrality rho^2 / c^2.
    With phi(s) = E exp(-s X) = (E exp(-s Y / m))^m both averages are integrals (Frullani's):

        E log X = int (e^-s - phi(s)) ds / s,    E log(1 + X) = int e^-s (1 - phi(s)) ds / s.

    The integrals over log s are taken by the trapezoidal rule, which converges faster than any power there, those over
    rho by Gauss's. The results are right to about 1e-5.

    Args:
        dim: l.
        count: m. From 10^9 on no digits are left.
        bandwidth: h.
        variance: v, of the target.
        query_scale: the standard deviation of the queries.
        center_scale: c, that of the centers.
        own: whether each query x + h noise has a center of its own, x, in addition to the m others. The query's scale
            is then sqrt(1 + h^2), and the centers' is 1.

    Raises:
        OverflowError: if it would take long: the bandwidth is far from the queries' scale, or there are thousands of
            dimensions.
    """
    from scipy.special import gammaln  # its import takes longer than that of kdejsd

    spacing = min(_STEP, 0.25 * math.sqrt(2 * dim) * min(1.0, center_scale**2) / (bandwidth**2 + own))
    middle = math.sqrt(dim)
    least = max(0.0, middle - _REACH)
    nodes, weights = np.polynomial.legendre.leggauss(_NODES)
    radii = least + (middle + _REACH - least) * (nodes + 1) / 2
    log_density = (dim - 1) * np.log(radii) - radii**2 / 2 - (dim / 2 - 1) * math.log(2) - gammaln(dim / 2)
    weights = weights * (middle + _REACH - least) / 2 * np.exp(log_density)

    log_x = log_r = 0.0
    points = 0
    for radius, weight in zip((query_scale * radii).tolist(), weights.tolist(), strict=True):
        square = radius**2
        # log(Y / m) where D = 0, which log s is counted from: F then begins at a point of the grid, for every rho.
        shift = dim * (math.log(variance) / 2 - math.log(bandwidth)) + square / (2 * variance) - math.log(count + own)
        others = _Grid(dim, bandwidth**2 / center_scale**2, square / center_scale**2, spacing)
        if own:  # given z, (1 + h^2) D^2 / h^2 has the noncentral chi-square distribution of (l, h^2 rho^2 / (1 + h^2))
            itself = _Grid(dim, 1 + bandwidth**2, square * bandwidth**2 / (1 + bandwidth**2), spacing)
        # Y is at most what it is where D = 0, so from here on X and s are all that can tell phi and e^-s from 1.
        start = round((min(shift, -math.log(count + own)) - _BELOW) / spacing)
        while True:
            tau = spacing * np.arange(start, start + others.length)
            term = np.clip(others.transform(start), 0, 1 - 1e-16)
            log_phi = count * np.log1p(-term)
            if own:
                log_phi = log_phi + np.log1p(-np.clip(itself.transform(start), 0, 1 - 1e-16))
            phi = np.exp(log_phi)
            s = np.exp(np.minimum(tau - shift, 50))
            log_x += weight * spacing * float((np.exp(-s) - phi).sum())
            log_r += weight * spacing * float((phi * np.expm1(-s)).sum())
            start += others.length
            points += others.size
            if points > _MOST:
                raise OverflowError(f"a grid for {dim} dimensions and bandwidth {bandwidth} would have too many points")
            if phi[-1] < _NOTHING and math.exp(-s[-1]) < _NOTHING:
                break
    return Means(log_x, log_r)


class _Grid:
    """Computes 1 - E exp(-s Y / m) on a grid of tau = log s + log(Y / m where D = 0).

    It is the integral of F(2 g y) k(tau - y) over y > 0, where F is the distribution function of a noncentral
    chi-square law and k(x) = exp(x - e^x): a convolution. F begins like y^(l/2), for which the trapezoidal rule is
    corrected by the next three terms of its error, zeta(-l/2 - j) d^(l/2 + j + 1) f_j for f(y) = y^(l/2) sum f_j y^j.
    """

    def __init__(self, dim: int, g: float, noncentrality: float, spacing: float) -> None:
        self.dim, self.g, self.noncentrality, self.spacing = dim, g, noncentrality, spacing
        self.left, self.right = round(_BELOW / spacing), round(_ABOVE / spacing)
        self.length = max(256, self.left + self.right)  # points at a time
        self.size = 1 << (2 * self.length).bit_length()
        kernel = _gumbel(spacing * np.arange(-self.left, self.right + 1))
        self.kernel = np.fft.rfft(kernel / kernel.sum(), self.size)  # where F is 1 the integral is 1
        a, half = dim / 2, noncentrality / 2
        # F(2 g y) = b_0 y^a (1 + b_1 y + b_2 y^2 + ...)
        log_b0 = -half + a * math.log(g) - math.lgamma(a + 1)
        self.b1 = (-1 + (1 + half) / (a + 1)) * g
        self.b2 = (
            0.5 - 1 / (a + 1) + half / (a + 1) * (1 / (a + 2) - 1) + (1 + half**2 / 2) / ((a + 1) * (a + 2))
        ) * g**2
        self.corrections = [_zeta_term(a + j, log_b0 + (a + j + 1) * math.log(spacing)) for j in range(3)]

    def transform(self, start: int) -> Array:
        """Returns the values at the points start, start + 1, ... of the grid, as many as `length` says."""
        from scipy.special import chndtr

        points = np.arange(start - self.right, start + self.length + self.left)
        positive = points > 0
        distribution = np.zeros(len(points))
        distribution[positive] = chndtr(2 * self.g * self.spacing * points[positive], self.dim, self.noncentrality)
        reach = self.left + self.right
        values = np.fft.irfft(np.fft.rfft(distribution, self.size) * self.kernel)[reach : reach + self.length]
        tau = self.spacing * np.arange(start, start + self.length)
        k, power = _gumbel(tau), np.exp(np.minimum(tau, 50))
        first, second = k * (1 - power), k * ((1 - power) ** 2 - power)
        c0, c1, c2 = self.corrections
        error = c0 * k + c1 * (self.b1 * k - first) + c2 * (self.b2 * k - self.b1 * first + second / 2)
        corrected: Array = values - error
        return corrected


def _gumbel(x: Array) -> Array:
    values: Array = np.exp(x - np.exp(np.minimum(x, 50)))
    return values


def _zeta_term(a: float, log_factor: float) -> float:
    """Returns Riemann's zeta at -a, a > 0, by its functional equation, times a factor."""
    from scipy.special import zeta

    log_size = math.lgamma(a + 1) - (a + 1) * math.log(2 * math.pi) + log_factor
    return -2 * math.exp(log_size) * math.sin(math.pi * a / 2) * float(zeta(a + 1))
