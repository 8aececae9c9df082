"""The lagged kernel density of the codes: what Generative Encoding Networks compare with their target."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._ranks import gathered, rank_and_size
from .bandwidth import optimal_bandwidth
from .divergence import codes_jsd, divergence_terms, jsd_loss
from .ops._common import checks_values
from .ops.kde import kde_log_prob
from .ops.streamed import streamed_log_prob
from .reference.kde import with_own_center
from .targets import Target, checked_smoothable, checked_target

_PART = 2**17  # codes of a rank that are gathered at a time


class LaggedKDE(nn.Module):
    """The kernel density p_e of m codes that were computed some steps ago, and its divergence from a target p_t.

    GENs (Saha, Elhabian, Whitaker, arXiv 2010.15283), section 3 and Algorithm 1: the codes of m training examples serve
    as the centers of a kernel density estimate and are constants of the loss; every few minibatches the caller computes
    them anew and hands them to `refresh`, or a part of them to `update`; or `push` lets the codes of the minibatches
    themselves take the place of the oldest.

    The state_dict carries the lagged codes, the examples they belong to and the bandwidth: a module that is loaded goes
    on where the saved one stood. They are no buffers, which DistributedDataParallel would make those of the first rank.

    On several ranks of torch.distributed every rank may keep a share of the codes (`shard`): the densities and their
    gradients are those of all codes together.

    For millions of codes they may be kept in bfloat16, on the host, or both. They are then streamed: parts of them are
    converted and moved into a few MiB while the loss is computed, and the loss has no second derivatives. What is
    computed is the loss, in float32, of the codes as they were rounded. A coordinate in bfloat16 has 8 bits: it moves
    by at most 2^-8 of itself, a code by d <= 2^-8 |z_i|, and log p_e at z' by at most the largest
    d (2 |z' - z_i| + d) / (2 h^2). It moves far less, since the errors have both signs.

    Args:
        num_centers: m, the number of lagged codes.
        latent_dim: l, their dimension.
        bandwidth: h, the kernel's standard deviation; None takes `kdejsd.optimal_bandwidth` for (l, m, target).
        target: p_t as StandardNormal, GaussianMixture or a torch Distribution over vectors; None is the standard
            normal.
        smoothed: compare p_e with the target convolved with the same kernel. Codes that follow the target are then the
            optimum at any bandwidth. With the target itself (False, as in the paper) the optimum is narrower by h^2 in
            variance, and there is none from h = 1 on.
        divergence: "js", the paper's loss, or "kl", the log-ratio, whose gradient does not vanish where p_e >> p_t.
        storage_dtype: torch.float32 or torch.bfloat16, in which the codes are kept.
        storage_device: "cpu" keeps the codes on the host wherever the module goes: pinned, once it is on a CUDA device,
            for which they are copied once; `push` and `update` of codes from there then wait for the device. None: the
            module's device.

    Attributes:
        num_centers: m.
        codes: [m, l], the lagged codes, of storage_dtype unless the module was cast to another one; this rank's alone
            where they are sharded.
        indices: [m] int64, the training example of each code; -1 where it is not known.
        bandwidth: h as a float.
        law: what p_e is compared with: the target, or the smoothed target.

    Raises:
        ValueError: sizes below 1, a target of another dimension, a bandwidth that is not positive and finite, an
            unknown divergence or storage_device, or `smoothed` with a target that has no `smoothed(h)`.
        TypeError: another storage_dtype.
    """

    def __init__(
        self,
        num_centers: int,
        latent_dim: int,
        bandwidth: float | None = None,
        target: Target | None = None,
        *,
        smoothed: bool = True,
        divergence: Literal["js", "kl"] = "js",
        storage_dtype: torch.dtype = torch.float32,
        storage_device: Literal["cpu"] | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("num_centers", num_centers), ("latent_dim", latent_dim)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if divergence not in ("js", "kl"):
            raise ValueError(f'divergence must be "js" or "kl", got {divergence!r}')
        if storage_dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"storage_dtype must be torch.float32 or torch.bfloat16, got {storage_dtype}")
        if storage_device not in (None, "cpu"):
            raise ValueError(f'storage_device must be "cpu" or None, got {storage_device!r}')
        target = checked_target(target, latent_dim)
        if smoothed:
            checked_smoothable(target)
        if bandwidth is None:
            bandwidth = optimal_bandwidth(latent_dim, num_centers, target=target).value
        if not 0 < bandwidth < math.inf:
            raise ValueError(f"bandwidth must be positive and finite, got {bandwidth}")
        self.target = target
        self.smoothed = smoothed
        self.divergence = divergence
        self.refreshed = False
        self._set_bandwidth(bandwidth)
        self.num_centers = num_centers
        self.rank, self.ranks = 0, 1
        self.storage_device = storage_device
        self.codes = torch.zeros(num_centers, latent_dim, dtype=storage_dtype, device=storage_device)
        self.indices = torch.full((num_centers,), -1)
        # The place of each example's newest code, one entry more for codes whose example is not known, and the place
        # of the oldest code.
        self.places = torch.full((1,), -1)
        self.oldest = 0
        self._reserved = False

    def _set_bandwidth(self, bandwidth: float) -> None:
        self.bandwidth = float(bandwidth)
        self.law: Target = self.target
        if self.smoothed:
            self.law = checked_smoothable(self.target).smoothed(self.bandwidth)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LaggedKDE:
        """What `to`, `cuda` and their kin do to every tensor of a module: not to codes that are to stay on the host."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.indices, self.places = fn(self.indices), fn(self.places)
        self._keep(fn(self.codes) if self.storage_device is None else self.codes)
        return self

    def _keep(self, codes: Tensor) -> None:
        self.codes = codes.pin_memory() if self.storage_device == "cpu" and self.indices.is_cuda else codes

    @torch.no_grad()
    def refresh(self, codes: Tensor | Iterable[Tensor], indices: Tensor | None = None) -> None:
        """Replaces the lagged codes.

        Args:
            codes: [m, l], any floating dtype, or parts [k, l] of them in their order, which need not exist at once; no
                gradient is kept.
            indices: [m] int64, the training example that each code belongs to, all different; None when not known, in
                which case no query's own copy can be left out.

        Raises:
            ValueError: wrong shapes, or NaN or infinity among the codes (on a GPU this would wait for the device: there
                NaN codes give a NaN loss, and KDEJSD_CHECK=1 in the environment makes it an error).
            TypeError: codes that are not floating, indices that are not int64.
        """
        m = len(self.codes)
        if isinstance(codes, Tensor):
            self._check(codes, indices, m)
            self.codes.copy_(codes)
        else:
            start = 0
            for part in codes:
                self._check(part, None, min(len(part), m - start))
                self.codes[start : start + len(part)] = part.to(self.codes)
                start += len(part)
            if start < m:
                raise ValueError(f"codes must be {m} in all their parts, got {start}")
        if indices is None:
            self.indices.fill_(-1)
        else:
            self.indices.copy_(indices)
        self.oldest = 0
        self.refreshed = True
        self._remember(self.indices, torch.arange(len(self.indices), device=self.indices.device))

    @torch.no_grad()
    def update(self, codes: Tensor, start: int) -> None:
        """Replaces the lagged codes from place `start` on by newer ones of the same examples.

        Args:
            codes: [k, l], start + k at most m; otherwise as in `refresh`.
            start: at least 0.

        Raises:
            ValueError, TypeError: as in `refresh`, and for places that do not exist.
            RuntimeError: before the first refresh.
        """
        if not 0 <= start <= len(self.codes) - len(codes):
            raise ValueError(
                f"start must be between 0 and {len(self.codes) - len(codes)} for {len(codes)} codes, got {start}"
            )
        self._check(codes, None, len(codes))
        self._check_refreshed("update")
        self.codes[start : start + len(codes)] = codes.to(self.codes)

    @torch.no_grad()
    def push(self, codes: Tensor, indices: Tensor) -> None:
        """Puts codes in the places of the oldest ones.

        An example may come again while its last code is still there; the newest is its own copy. That leaves a code
        without an older copy of itself as long as each epoch goes through the training set once and m is at most its
        size.

        Args:
            codes: [k, l], otherwise as in `refresh`; only the last m are kept.
            indices: [k] int64, the training examples.

        Raises:
            ValueError, TypeError: as in `refresh`; values are not looked at while torch.compile traces, which takes a
                `reserve` before.
            RuntimeError: before the first refresh.
        """
        self._check(codes, indices, len(codes))
        self._check_refreshed("push")
        if self.num_centers % self.ranks:
            raise ValueError(
                f"num_centers must be a multiple of {self.ranks}, the number of ranks, for push, got {self.num_centers}"
            )
        m = len(self.codes)
        codes, indices = codes[-m:], indices[-m:].to(self.indices)
        places = (self.oldest + torch.arange(len(codes), device=self.indices.device)) % m
        self.codes[places.to(self.codes.device)] = codes.to(self.codes)
        self.indices[places] = indices
        self._remember(indices, places)
        self.oldest = (self.oldest + len(codes)) % m

    @torch.no_grad()
    def shard(self) -> None:
        """Lets every rank of torch.distributed's default group keep a share of the codes alone: of R ranks, rank r the
        places r, r + R, r + 2 R and so on. On one process nothing changes.

        From here on `refresh` and `update` are for this rank's share, `push` for the codes of its minibatch, and
        `log_prob` and `loss` for its queries. These two are called by all ranks together, with as many queries on each,
        and so is `state_dict`, which has the codes of all ranks and can be loaded on any number of them. In a step each
        rank does 1 / R of the work for the queries of all ranks, and what it sends does not depend on m. There are no
        second derivatives, and the loss of a rank is the mean over its own queries: DistributedDataParallel averages
        the gradients.

        Raises:
            ValueError: fewer codes than ranks.
            RuntimeError: a module that is sharded already.
        """
        if self.ranks > 1:
            raise RuntimeError("the codes are sharded already")
        rank, ranks = rank_and_size()
        if self.num_centers < ranks:
            raise ValueError(f"num_centers must be at least {ranks}, the number of ranks, got {self.num_centers}")
        codes, indices, oldest = self.codes, self.indices, self.oldest
        self.rank, self.ranks = rank, ranks
        self._take_share(codes, indices, oldest)

    @torch.no_grad()
    def gather(self) -> None:
        """Gives all codes back to every rank; called by all of them. On one process nothing changes."""
        state = self.get_extra_state()
        device = self.codes.device
        self.rank, self.ranks = 0, 1
        self._take_share(state["codes"].to(device), state["indices"].to(self.indices.device), state["oldest"])

    def share(self, whole: Tensor) -> Tensor:
        """Of a tensor with an entry for each of the m places the entries of this rank's."""
        return whole[self.rank :: self.ranks]

    def _take_share(self, codes: Tensor, indices: Tensor, oldest: int) -> None:
        """Keeps this rank's share of all codes, the oldest of which stands at a place."""
        if oldest % self.ranks:  # the oldest codes of all ranks have to stand at the same place
            codes, indices, oldest = codes.roll(-oldest, 0), indices.roll(-oldest), 0
        self._keep(self.share(codes).clone())
        self.indices = self.share(indices).clone()
        self.oldest = oldest // self.ranks
        self.places = self.places.new_full((len(self.places),), -1)
        order = (self.oldest + torch.arange(len(self.indices), device=self.indices.device)) % len(self.indices)
        self._remember(self.indices[order], order)

    def _whole(self, own: Tensor) -> Tensor:
        """All ranks' entries at their places, on the host; of this rank's, in parts that fit the device."""
        if self.ranks == 1:
            return own
        whole = torch.empty(self.num_centers, *own.shape[1:], dtype=own.dtype)
        least = self.num_centers // self.ranks
        device = self.indices.device
        for start in range(0, least, _PART):
            part = gathered(own[start : min(start + _PART, least)].to(device), "codes")
            places = torch.arange(self.ranks * start, self.ranks * start + len(part)).view(-1, self.ranks).T.flatten()
            whole[places] = part.cpu()
        rest = self.num_centers - least * self.ranks
        if rest:  # of the first ranks, one each
            last = own[-1:].to(device)  # of the others an entry again that is not used
            whole[least * self.ranks :] = gathered(last, "codes")[:rest].cpu()
        return whole

    def reserve(self, num_examples: int) -> None:
        """Makes room to remember the places of examples 0 to num_examples - 1. Without it room is made as indices come,
        which makes a GPU wait for them; after it an index beyond is out of bounds."""
        self._make_room(num_examples)
        self._reserved = True

    def own_copy(self, index: Tensor) -> Tensor:
        """Where the newest lagged code of each example stands: index [n] int64 -> places [n] int64, -1 for none."""
        place = self.places[index.clamp(-1, len(self.places) - 1)]
        return place.where((index >= 0) & (place >= 0) & (self.indices[place] == index), -1)

    def _remember(self, indices: Tensor, places: Tensor) -> None:
        if not self._reserved and len(indices) and (room := int(indices.max()) + 1) >= len(self.places):
            self._make_room(2 * room)
        self.places[indices.where(indices >= 0, len(self.places) - 1)] = places

    def _make_room(self, num_examples: int) -> None:
        places = self.places.new_full((num_examples + 1,), -1)
        kept = min(num_examples, len(self.places) - 1)
        places[:kept] = self.places[:kept]
        self.places = places

    def _check(self, codes: Tensor, indices: Tensor | None, count: int) -> None:
        expected = [count, self.codes.shape[1]]
        if list(codes.shape) != expected:
            raise ValueError(f"codes must have shape {expected}, got {list(codes.shape)}")
        if not codes.is_floating_point():
            raise TypeError(f"codes must be floating-point, got {codes.dtype}")
        looks = checks_values() or (codes.device.type == "cpu" and not torch.compiler.is_compiling())
        if looks and not bool(codes.isfinite().all()):
            bad = int((~codes.isfinite()).any(-1).sum())
            raise ValueError(f"codes must be finite, got NaN or infinity in {bad} of {len(codes)} codes")
        if indices is None:
            return
        if list(indices.shape) != [count]:
            raise ValueError(f"indices must have shape [{count}], got {list(indices.shape)}")
        if indices.dtype != torch.int64:
            raise TypeError(f"indices must be int64, got {indices.dtype}")

    def _check_refreshed(self, name: str) -> None:
        if not self.refreshed:
            raise RuntimeError(f"LaggedKDE holds no codes yet: call refresh(codes) before {name}")

    def log_prob(self, z: Tensor, index: Tensor | None = None) -> Tensor:
        """log p_e in nats at z [n, l], as [n]; `index` as in `loss`.

        Raises:
            RuntimeError: before the first refresh.
        """
        query = self._query(z)
        if self._is_streamed():
            return self._streamed(query, index)[0].to(query.dtype)
        exclude_self = False if index is None else self.own_copy(index)
        return kde_log_prob(query, self.codes, self.bandwidth, exclude_self=exclude_self)

    def _streamed(self, query: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """log p_e [n] without each query's own lagged copy, and of how many codes it is, [n]; both in float64."""
        copy = None
        if index is not None:
            copy = self.own_copy(index if self.ranks == 1 else gathered(index, "indices"))
        log_prob, count = streamed_log_prob(query, self.codes, self.bandwidth, copy, sharded=self.ranks > 1)
        return log_prob, count

    def _is_streamed(self) -> bool:
        """Whether the codes lie in another dtype or memory than they are computed with, or on other ranks."""
        return self.ranks > 1 or self.codes.dtype != self._dtype or self.codes.device != self.indices.device

    def loss(
        self,
        z: Tensor,
        index: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """The latent term of the training loss at the codes of a minibatch: GENs eq. 3 for "js", the mean of
        log p_e - log p_t for "kl".

        Eq. 3 is a mean over p_e. Codes as they are (no noise) stand for it in the paper; they lie where p_e of the
        other codes is low by chance, more so the fewer there are, and are pushed apart without bound. Codes with the
        kernel's noise, each with its own kernel among those of p_e, are samples of p_e: the term is then at least 0 in
        the mean, and its gradient is that of the divergence between p_e and what it is compared with.

        Args:
            z: codes [n, l].
            index: [n] int64, the training example of each code, -1 where there is none. The lagged copy of the same
                example is left out: it would be at distance almost zero. None leaves nothing out.
            noise: [n, l], samples of the standard normal: the term is taken at z + bandwidth noise, and p_e has for
                each code a kernel at z as it is now, in place of its lagged copy. None takes the codes as they are.
            reduction: "mean", "sum" or "none".

        Returns:
            The term in nats, differentiable in z: 0-dim, or [n] for "none".

        Raises:
            RuntimeError: before the first refresh.
        """
        query, own = self._query(z), None
        if noise is not None:
            query, own = torch.add(query, noise.to(query), alpha=self.bandwidth), query.detach()
        if self._is_streamed():
            log_density, count = self._streamed(query, index)
            if own is not None:
                log_density = with_own_center(log_density, count, query, own, self.bandwidth)
            return divergence_terms(log_density, query, self.law, self.divergence, reduction).to(query)
        return jsd_loss(
            query,
            self.codes,
            self.bandwidth,
            target=self.law,
            exclude_self=False if index is None else self.own_copy(index),
            own=own,
            divergence=self.divergence,
            reduction=reduction,
        )

    def jsd(self, z: Tensor, generator: torch.Generator) -> Tensor:
        """`codes_jsd` of codes z [n, l] by this kernel, from what the loss compares p_e with, the target or the
        smoothed target; in nats, 0-dim. It does not look at the lagged codes. The generator is on the device of z."""
        return codes_jsd(z.to(self._dtype), self.bandwidth, self.law, generator)

    def _query(self, z: Tensor) -> Tensor:
        self._check_refreshed("log_prob or loss")
        return z.to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """In which everything is computed."""
        return torch.promote_types(self.codes.dtype, torch.float32)

    def get_extra_state(self) -> dict[str, Any]:
        return {
            "bandwidth": self.bandwidth,
            "refreshed": self.refreshed,
            "oldest": self.oldest * self.ranks,
            "codes": self._whole(self.codes),
            "indices": self._whole(self.indices),
        }

    @torch.no_grad()
    def set_extra_state(self, state: dict[str, Any]) -> None:
        expected = [self.num_centers, self.codes.shape[1]]
        if list(state["codes"].shape) != expected:
            raise ValueError(f"the state's codes must have shape {expected}, got {list(state['codes'].shape)}")
        self._set_bandwidth(state["bandwidth"])
        self.refreshed = state["refreshed"]
        codes, indices = state["codes"].to(self.codes), state["indices"].to(self.indices)
        self._take_share(codes, indices, state["oldest"])

    def extra_repr(self) -> str:
        m, dim = self.num_centers, self.codes.shape[1]
        storage = f"{self.codes.dtype} on {self.codes.device}"
        return (
            f"{m}, {dim}, bandwidth={self.bandwidth:.4g}, smoothed={self.smoothed}, divergence={self.divergence!r}, "
            f"codes in {storage}"
        )
