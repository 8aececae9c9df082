"""Stores the lagged codes and measures how far their kernel density is from a target: the latent term of a GEN."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ._numbers import integer, positive
from ._own_copies import OwnCopies, looks_at
from ._ranks import gathered, rank_and_size
from ._tensors import cache_parts, check_int64, check_tensor
from .bandwidth import optimal_bandwidth
from .divergence import check_divergence, codes_jsd, divergence_terms, jsd_loss, matched_loss
from .ops.kde import kde_log_prob
from .ops.streamed import streamed_log_prob
from .reference.kde import with_own_center
from .targets import Law, Target, checked_smoothable, checked_target

_PART = 2**17  # codes of a rank that are gathered at a time
_SHARED_OUT = ("codes", "examples")  # of all that is in the buffers: each rank has others
_BUFFERS = (*_SHARED_OUT, "oldest", "stamp")
_GOLDEN = (math.sqrt(5) - 1) / 2  # multiples of it lie apart from each other, modulo 1
_NO_CODES = "no codes yet"
_MIXED = "averages over the codes of different examples, which are no codes"


class LaggedKDE(nn.Module):
    """Stores lagged codes and returns the latent loss of a GEN: how far their density is from a target.

    Use it in a training loop of your own: call `refresh` before the first step, and `loss` in every step. It holds the
    codes of m training examples from some steps ago. They are the centers of a kernel density estimate p_e, and
    constants of the loss. There are three ways to keep them up to date:

    * Every few minibatches, encode the examples again and pass all codes to `refresh`. This is the paper's way, and
      `LaggedRefresh` does it for you.
    * Encode only a part of the examples again, and pass their codes to `update`.
    * Pass the codes of each minibatch to `push`, which puts them in the places of the oldest ones. After every few
      training steps, pass the codes of some examples before and after them to `follow`. It moves all lagged codes along
      with the encoder, so that none is encoded again.

    The state_dict holds the lagged codes, their examples and the bandwidth, all as tensors. A module that loads it
    continues where the saved one stood. The codes and examples are buffers, so averages of models have them too
    (`torch.optim.swa_utils.AveragedModel`). An average of codes of the same examples serves as their codes. If the
    examples differ, as those of a queue do from step to step, the average has no codes until the next `refresh`. torch
    keeps no count of values that are written through a buffer's `.data`; such values take effect when the state is next
    loaded.

    On several ranks of torch.distributed, each rank can keep a share of the codes (`shard`). The densities and their
    gradients are still those of all codes together. A share is no buffer, because DistributedDataParallel would replace
    it by the first rank's.

    Millions of codes can be kept in bfloat16, on the host, or both. They are then streamed: while the loss is computed,
    parts of them are converted and moved into a few MiB. A streamed loss has no second derivatives. It is computed in
    float32 from the rounded codes. A coordinate in bfloat16 has 8 bits, so rounding moves it by at most 2^-8 of itself.
    It moves a code by d <= 2^-8 |z_i|, and log p_e at z' by at most the largest d (2 |z' - z_i| + d) / (2 h^2). In
    practice the change is far smaller, since the errors have both signs.

    Args:
        num_centers: m, the number of lagged codes.
        latent_dim: l, their dimension.
        bandwidth: h, the kernel's standard deviation; None takes `kdejsd.optimal_bandwidth` for (l, m, target).
        target: p_t as StandardNormal, GaussianMixture, a torch Distribution over vectors, or an object with the methods
            of `kdejsd.targets.Law`; None is the standard normal.
        smoothed: compare p_e with the target convolved with the same kernel. Codes that follow the target are then the
            optimum at any bandwidth. With the target itself (False, as in the paper) the optimal codes have a variance
            that is smaller by h^2, and for a standard normal there is no optimum from h = 1 on.
        divergence: "js", the paper's loss, or "kl", the log-ratio, whose gradient does not vanish where p_e is much
            larger than p_t.
        storage_dtype: torch.float32 or torch.bfloat16, in which the codes are kept.
        storage_device: "cpu" keeps the codes on the host wherever the module goes. Once the module is on a CUDA device
            they are copied into pinned memory, and `push`, `update` and `follow` of codes from there wait for the
            device. None keeps them on the module's device.

    Attributes:
        num_centers: m.
        codes: [m, l], the lagged codes, of storage_dtype unless the module was cast to another one; only this rank's
            share where they are sharded.
        examples: [m] float64, the training example of each code, -1 where it is not known. They are floating-point
            numbers so that the average of equal ones is the number itself.
        oldest: 0-dim float64, the place of the oldest code.
        stamp: [2] float64: a number s in [0, 1), which changes whenever the examples do, and s^2. In an average over
            different examples the second exceeds the square of the first, which shows that they differ. The same holds
            before the first refresh.
        bandwidth: h as a float.
        law: the target or the smoothed target, with which p_e is compared.

    Raises:
        ValueError: if a size is below 1, the target has another dimension, the bandwidth is not positive and finite,
            the divergence or storage_device is unknown, or `smoothed` meets a target that has no `smoothed(h)`.
        TypeError: if a size is no integer, or storage_dtype is another dtype.

    Source: Saha, Elhabian, Whitaker, "GENs: Generative Encoding Networks", https://arxiv.org/abs/2010.15283, section 3
    and Algorithm 1.

    Example:
        >>> import torch
        >>> from kdejsd import LaggedKDE
        >>> rng = torch.Generator().manual_seed(0)
        >>> lagged = LaggedKDE(num_centers=500, latent_dim=2)
        >>> lagged.refresh(torch.randn(500, 2, generator=rng))  # codes that follow the target
        >>> z, noise = torch.randn(2, 1000, 2, generator=rng)
        >>> good, shifted = lagged.loss(z, noise=noise), lagged.loss(z + 2, noise=noise)
        >>> print(f"{good.abs():.1f} for codes that follow it, {shifted:.1f} for shifted ones")
        0.0 for codes that follow it, 0.2 for shifted ones
    """

    codes: Tensor
    examples: Tensor
    oldest: Tensor
    stamp: Tensor

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
        num_centers = integer("num_centers", num_centers, 1)
        latent_dim = integer("latent_dim", latent_dim, 1)
        check_divergence(divergence)
        if storage_dtype not in (torch.float32, torch.bfloat16):
            raise TypeError(f"storage_dtype must be torch.float32 or torch.bfloat16, got {storage_dtype}")
        if storage_device not in (None, "cpu"):
            raise ValueError(f'storage_device must be "cpu" or None, got {storage_device!r}')
        law = checked_target(target, latent_dim)
        if smoothed:
            checked_smoothable(law)
        if bandwidth is None:
            with torch.device("cpu"):  # there are no numbers on the meta device, where a module may be built
                bandwidth = optimal_bandwidth(latent_dim, num_centers, target=law).value
        self.target = law
        self.smoothed = smoothed
        self.divergence = divergence
        self._set_bandwidth(positive("bandwidth", bandwidth))
        self.num_centers = num_centers
        self.rank, self.ranks = 0, 1
        self.storage_device = storage_device
        codes = torch.zeros(num_centers, latent_dim, dtype=storage_dtype, device=storage_device)
        self.register_buffer("codes", codes)
        self.register_buffer("examples", torch.full((num_centers,), -1.0, dtype=torch.float64))
        self.register_buffer("oldest", torch.tensor(0.0, dtype=torch.float64))
        self.register_buffer("stamp", torch.tensor([0.0, 1.0], dtype=torch.float64))
        # What is read off the buffers: where each example's newest code stands, and what is wrong with the codes, if
        # anything is. `_seen` tells which buffer was read.
        self.own_copies = OwnCopies()
        self._fault: str | None = _NO_CODES
        self._seen: tuple[Tensor, int] | None = None

    def _set_bandwidth(self, bandwidth: float) -> None:
        self.bandwidth = float(bandwidth)
        self.law: Law = self.target
        if self.smoothed:
            self.law = checked_smoothable(self.target).smoothed(self.bandwidth)

    @property
    def indices(self) -> Tensor:
        """Returns a copy of `examples` as [m] int64."""
        return self.examples.round().long()

    @property
    def refreshed(self) -> bool:
        """Tells whether there are codes; on a GPU this waits for the device."""
        self._read()
        return self._fault is None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LaggedKDE:
        """Moves or casts the tensors, for `to`, `cuda` and similar methods.

        Codes that are to stay on the host stay there, and the examples' numbers keep their dtype.
        """
        codes, numbers = self.codes, {id(getattr(self, name)) for name in _BUFFERS[1:]}

        def applied(t: Tensor) -> Tensor:
            if t is codes and self.storage_device is not None:
                return t
            result = fn(t)
            return t.to(result.device) if id(t) in numbers and result.dtype != t.dtype else result

        super()._apply(applied, recurse)  # type: ignore[no-untyped-call]
        if self.ranks > 1:
            for name in _SHARED_OUT:
                setattr(self, name, applied(getattr(self, name)))
        self.own_copies.apply(applied)
        self._seen = None
        self._keep(self.codes)
        return self

    def _keep(self, codes: Tensor) -> None:
        self.codes = codes.pin_memory() if self.storage_device == "cpu" and self.examples.is_cuda else codes

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for a copy or a pickle, which has no count of writes and so reads its buffers again."""
        return self.__dict__ | {"_seen": None}

    def _look(self) -> None:
        """Reads the buffers again if they have changed since they were read.

        Optimisers that average models write into them, and so does whoever loads a state. Nothing waits for a GPU to
        find out.
        """
        if torch.compiler.is_compiling():
            return
        examples, version = self._now()
        if self._seen is None or self._seen[0] is not examples or self._seen[1] != version:
            self._read()

    def _now(self) -> tuple[Tensor, int]:
        examples = self.examples
        return examples, -1 if examples.is_inference() else examples._version

    @torch.no_grad()
    def _read(self) -> None:
        with torch.inference_mode(False):  # the index is written into later, in any mode
            indices = self.indices
            spread = 1.0 if indices.is_meta else float(self.stamp[1] - self.stamp[0].square())
            self._fault = None if spread < 1e-9 else _NO_CODES if spread == 1 else _MIXED
            self.own_copies.read(None if self._fault else indices, self.oldest.round().long())
        self._seen = self._now()

    @torch.no_grad()
    def refresh(self, codes: Tensor | Iterable[Tensor], indices: Tensor | None = None) -> None:
        """Replaces all lagged codes.

        Args:
            codes: [m, l] in any floating dtype, or an iterable of parts [k, l] in their order, which need not exist at
                the same time. No gradient is kept.
            indices: [m] int64, the training example that each code belongs to, all different. With None they are not
                known, and `loss` cannot leave out a code's own lagged copy.

        Raises:
            ValueError: if a shape is wrong, if the codes contain NaN or infinity, or if an index is 2^28 or more
                without a `reserve` for it. (On a GPU the values are not checked, as this would wait for the device:
                there NaN codes give a NaN loss, unless KDEJSD_CHECK=1 is in the environment.)
            TypeError: if the codes are no floating-point tensor, or the indices no int64 tensor.
        """
        m = len(self.codes)
        self._look()
        if indices is not None:
            self.own_copies.check(indices, m)
        if isinstance(codes, Tensor):
            self._check(codes, m)
            self.codes.copy_(codes)
        elif not isinstance(codes, Iterable):
            raise TypeError(f"codes must be a tensor or an iterable of tensors, got {type(codes).__name__}")
        else:
            start = 0
            for part in codes:
                self._check(part)
                if start + len(part) > m:
                    raise ValueError(f"codes must be {m} in all their parts, got at least {start + len(part)}")
                self.codes[start : start + len(part)] = part.to(self.codes)
                start += len(part)
            if start < m:
                raise ValueError(f"codes must be {m} in all their parts, got {start}")
        before = None if self._fault else self.indices
        if indices is None:
            self.examples.fill_(-1)
        else:
            self.examples.copy_(indices)
        self.oldest.zero_()
        if before is None:
            self.stamp.zero_()
        else:
            self._stamp((before != self.examples).any())
        self._fault = None
        self._remember(self.indices, torch.arange(m, device=self.examples.device))

    @torch.no_grad()
    def update(self, codes: Tensor, start: int) -> None:
        """Replaces the lagged codes from place `start` on by newer codes of the same examples.

        Args:
            codes: [k, l] with start + k at most m; otherwise as in `refresh`.
            start: the first place, at least 0.

        Raises:
            ValueError, TypeError: as in `refresh`, and if a place does not exist or `start` is no integer.
            RuntimeError: if there was no refresh yet.
        """
        self._check(codes)
        start, last = integer("start", start, 0), len(self.codes) - len(codes)
        if start > last:
            raise ValueError(f"start must be between 0 and {last} for {len(codes)} codes, got {start}")
        self._check_refreshed("update")
        self.codes[start : start + len(codes)] = codes.to(self.codes)

    @torch.no_grad()
    def push(self, codes: Tensor, indices: Tensor) -> None:
        """Puts codes in the places of the oldest lagged codes.

        If an example comes again while its last code is still stored, its newest code counts as its own copy. No code
        meets an older copy of itself, as long as each epoch goes through the training set once and m is at most its
        size.

        Args:
            codes: [k, l], otherwise as in `refresh`; only the last m are kept.
            indices: [k] int64, the training examples.

        Raises:
            ValueError, TypeError: as in `refresh`. Values are not checked while torch.compile traces, which needs a
                `reserve` before.
            RuntimeError: if there was no refresh yet.
        """
        self._check(codes)
        self._check_refreshed("push")
        self.own_copies.check(indices, len(codes))
        if self.num_centers % self.ranks:
            raise ValueError(
                f"num_centers must be a multiple of {self.ranks}, the number of ranks, for push, got {self.num_centers}"
            )
        m = len(self.codes)
        codes, indices = codes[-m:], indices[-m:].to(self.examples.device)
        places = (self.oldest.round().long() + torch.arange(len(codes), device=self.examples.device)) % m
        self.codes[places.to(self.codes.device)] = codes.to(self.codes)
        self.examples[places] = indices.double()
        self.oldest.add_(len(codes)).remainder_(m)
        self._stamp(1)
        self._remember(indices, places)

    @torch.no_grad()
    def follow(self, before: Tensor, after: Tensor, pushed: Sequence[int] = ()) -> None:
        """Moves all lagged codes by the affine map that carries codes `before` to `after`.

        Call it after every few training steps, with the codes that some examples had before them and have now. Most of
        what a few steps do to the codes is one affine map for all of them. This map is found by least squares, with a
        ridge that weighs as much as one code more, which moves by the mean of the others. Take 4 (l + 1) pairs; with
        fewer than half as many the map is uncertain. What remains of the drift grows with a code's age: use it with
        `push`.

        Args:
            before: [k, l] in any floating dtype, the codes before the steps; k = 0 moves nothing.
            after: [k, l], the codes of the same examples now. Both are of the same mode, so that dropout or batch
                statistics are no part of the difference. After `shard`, each rank brings as many pairs of its own.
            pushed: the number of codes in each `push` since `before`, in their order, if there was one in every step.
                Of K pushes the codes of the last have seen one of K steps, and are moved by a K-th of the way; those of
                the first are moved all of it.

        Raises:
            ValueError: if a shape is wrong, if the codes contain NaN or infinity (on a GPU as in `refresh`), if the
                lagged codes are in bfloat16 or float16, whose rounding is larger than most steps, or if a number of
                codes is negative.
            TypeError: if the codes are no floating-point tensor, or a number of codes is no integer.
            RuntimeError: if there was no refresh yet.

        Example:
            >>> import torch
            >>> from kdejsd import LaggedKDE
            >>> _ = torch.manual_seed(0)
            >>> encoder = torch.nn.Linear(64, 2)
            >>> examples = torch.rand(500, 64)
            >>> lagged = LaggedKDE(num_centers=500, latent_dim=2)
            >>> lagged.refresh(encoder(examples))
            >>> before = encoder(examples[:20]).detach()
            >>> _ = encoder.weight.data.mul_(1.1)  # in place of training steps
            >>> lagged.follow(before, encoder(examples[:20]))
            >>> bool((lagged.codes - encoder(examples)).abs().max() < 0.05)
            True
        """
        self._check(before)
        self._check(after, len(before))
        self._check_refreshed("follow")
        if self.codes.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the lagged codes must be in float32 or float64 for follow, got {self.codes.dtype}")
        if self.ranks > 1:
            before, after = gathered(before, "codes"), gathered(after, "codes")
        if len(before) == 0:
            return
        drift = _affine_drift(before.double(), after.double())
        origin, shift, change = (part.to(self.codes) for part in drift)
        newest, share = self._newest(pushed)
        with torch.autocast(self.codes.device.type, enabled=False):
            young = self.codes[newest]
            for part in cache_parts(self.codes):
                part.add_(torch.addmm(shift, part - origin, change))
            self.codes[newest] = torch.lerp(young, self.codes[newest], share.to(self.codes))

    def _newest(self, pushed: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Returns the places [n] of the codes in the last pushes, and the share [n, 1] of the steps that each has seen.

        For the codes of the k-th of K pushes the share is (K + 1 - k) / K.
        """
        counts = torch.tensor([integer("pushed", n, 0) for n in pushed], dtype=torch.int64, device="cpu")
        shares = torch.arange(len(pushed), 0, -1, device="cpu") / max(1, len(pushed))
        m, share = len(self.codes), shares.repeat_interleave(counts)[-len(self.codes) :]
        back = torch.arange(len(share), 0, -1, device=self.examples.device)
        places = (self.oldest.round().long() - back) % m
        return places.to(self.codes.device), share.unsqueeze(1)

    def _stamp(self, changed: Tensor | int) -> None:
        """Notes that the examples have changed, if they have."""
        number = self.stamp[0].add_(changed * _GOLDEN).remainder_(1)
        torch.mul(number, number, out=self.stamp[1])

    @torch.no_grad()
    def shard(self) -> None:
        """Divides the codes among the ranks of torch.distributed's default group, so that each keeps only a share.

        Of R ranks, rank r keeps the places r, r + R, r + 2 R and so on. On one process nothing changes.

        Afterwards `refresh` and `update` take this rank's share, `push` takes the codes of its minibatch, and
        `log_prob` and `loss` its queries. All ranks call the last two together, with the same number of queries on
        each. In a step each rank does 1 / R of the work for the queries of all ranks. The amount of data it sends does
        not depend on m. There are no second derivatives. The loss of a rank is the mean over its own queries:
        DistributedDataParallel averages the gradients.

        `state_dict` holds this rank's share and asks no other rank. `gathered_state` can be loaded on any number of
        ranks.

        Raises:
            ValueError: if there are fewer codes than ranks.
            RuntimeError: if the module is sharded already.
        """
        if self.ranks > 1:
            raise RuntimeError("the codes are sharded already")
        rank, ranks = rank_and_size()
        if self.num_centers < ranks:
            raise ValueError(f"num_centers must be at least {ranks}, the number of ranks, got {self.num_centers}")
        if ranks > 1:
            self.rank, self.ranks = rank, ranks
            self._take_share(*(getattr(self, name) for name in _BUFFERS))

    @torch.no_grad()
    def gather(self) -> None:
        """Gives all codes back to every rank; all ranks call it together. On one process nothing changes."""
        if self.ranks > 1:
            state = self.gathered_state()
            self.rank, self.ranks = 0, 1
            self._take_share(*(state[name].to(getattr(self, name).device) for name in _BUFFERS))

    @torch.no_grad()
    def gathered_state(self, prefix: str = "") -> dict[str, Tensor]:
        """Returns the sharded part of `state_dict` with the codes of all ranks; all ranks call it together.

        It can be loaded on any number of ranks.

        Args:
            prefix: text put before the names: `model.state_dict() | model.lagged.gathered_state("lagged.")`.

        Returns:
            The tensors by their names; those that were gathered are on the host.
        """
        state = {
            "codes": self._whole(self.codes),
            "examples": self._whole(self.examples),
            "oldest": self.oldest * self.ranks,
            "stamp": self.stamp,
        }
        return {prefix + name: t for name, t in (state | self._numbers(0, 1)).items()}

    def _numbers(self, rank: int, ranks: int) -> dict[str, Tensor]:
        """Returns the entries of the state that are no buffers."""
        return {
            "bandwidth": torch.tensor(self.bandwidth, dtype=torch.float64, device="cpu"),
            "shard": torch.tensor([rank, ranks], device="cpu"),
        }

    def share(self, whole: Tensor) -> Tensor:
        """Returns this rank's entries of a tensor with an entry for each of the m places."""
        return whole[self.rank :: self.ranks]

    def _take_share(self, codes: Tensor, examples: Tensor, oldest: Tensor, stamp: Tensor) -> None:
        """Keeps this rank's share of all codes; `oldest` is the place of the oldest of all."""
        start = int(oldest)
        if start % self.ranks:  # the oldest codes of all ranks have to stand at the same place
            codes, examples, start = codes.roll(-start, 0), examples.roll(-start), 0
        with torch.inference_mode(False):
            kept = (self.share(codes).clone(), self.share(examples).clone())
        self.oldest.fill_(start // self.ranks)
        self.stamp.copy_(stamp)
        for name, value in zip(_SHARED_OUT, kept, strict=True):
            delattr(self, name)
            if self.ranks == 1:
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)
        self._keep(self.codes)
        self._read()

    def _whole(self, own: Tensor) -> Tensor:
        """Returns all ranks' entries at their places, on the host; they are gathered in parts that fit the device.

        On one process it returns this rank's own.
        """
        if self.ranks == 1:
            return own
        whole = torch.empty(self.num_centers, *own.shape[1:], dtype=own.dtype)
        least = self.num_centers // self.ranks
        device = self.examples.device
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
        """Makes room to remember the places of examples 0 to num_examples - 1.

        Without it, room is made as indices come, for which a GPU has to wait. After it, a larger index is out of
        bounds.

        Raises:
            ValueError: if num_examples is below 0.
            TypeError: if num_examples is no integer.
        """
        self.own_copies.reserve(integer("num_examples", num_examples, 0))
        self._read()  # now: a compiled `push` or `loss` does not look

    def own_copy(self, index: Tensor) -> Tensor:
        """Returns the places [n] int64 of the newest lagged codes of examples [n] int64, -1 where there is none.

        Raises:
            TypeError: if the index is no int64 tensor.
        """
        check_int64("index", index)
        self._look()
        return self.own_copies.find(index, self.examples)

    def _remember(self, indices: Tensor, places: Tensor) -> None:
        """Notes the places of codes that have just been put there."""
        self.own_copies.note(indices, places)
        if not torch.compiler.is_compiling():
            self._seen = self._now()

    def _check(self, codes: Tensor, count: int | None = None) -> None:
        """Checks the shape, the dtype and, if `looks_at` them, the values of codes."""
        if count is None:
            count = len(codes) if check_tensor("codes", codes).ndim else 1
        expected = [count, self.codes.shape[1]]
        if list(codes.shape) != expected:
            raise ValueError(f"codes must have shape {expected}, got {list(codes.shape)}")
        if not codes.is_floating_point():
            raise TypeError(f"codes must be floating-point, got {codes.dtype}")
        if looks_at(codes) and not bool(codes.isfinite().all()):
            bad = int((~codes.isfinite()).any(-1).sum())
            raise ValueError(f"codes must be finite, got NaN or infinity in {bad} of {len(codes)} codes")

    def _check_refreshed(self, name: str) -> None:
        self._look()
        if self._fault is not None:
            raise RuntimeError(f"LaggedKDE holds {self._fault}: call refresh(codes) before {name}")

    def log_prob(self, z: Tensor, index: Tensor | None = None) -> Tensor:
        """Returns log p_e, the log-density of the lagged codes, in nats at z [n, l], as [n].

        `index` is as in `loss`.

        Raises:
            RuntimeError: if there was no refresh yet.
        """
        query = self._query(z)
        if self._is_streamed():
            return self._streamed(query, index)[0].to(query.dtype)
        exclude_self = False if index is None else self.own_copy(index)
        return kde_log_prob(query, self.codes, self.bandwidth, exclude_self=exclude_self)

    def _streamed(self, query: Tensor, index: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns log p_e [n] without each query's own lagged copy, and how many codes it is of, [n], in float64."""
        copy = None
        if index is not None:
            copy = self.own_copy(index if self.ranks == 1 else gathered(index, "indices"))
        log_prob, count = streamed_log_prob(query, self.codes, self.bandwidth, copy, sharded=self.ranks > 1)
        return log_prob, count

    def _is_streamed(self) -> bool:
        """Tells whether the codes lie in another dtype or memory than they are computed with, or on other ranks."""
        return self.ranks > 1 or self.codes.dtype != self._dtype or self.codes.device != self.examples.device

    def loss(
        self,
        z: Tensor,
        index: Tensor | None = None,
        *,
        noise: Tensor | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> Tensor:
        """Returns the latent term of the training loss at the codes of a minibatch, in nats.

        For "js" it is the term of `kdejsd.jsd_loss`, equation 3 of the paper; for "kl" the mean of log p_e - log p_t.

        Equation 3 is a mean over samples of p_e. The paper takes the codes as they are for such samples (no noise).
        Each code then lies where the density of the other codes happens to be low. With few lagged codes this effect is
        strong, and pushes codes apart without bound. With `noise`, the codes are samples of p_e: each gets the kernel's
        noise, and a center of its own among those of p_e. The term is then at least 0 on average, and its gradient is
        that of the divergence between p_e and the distribution it is compared with.

        Args:
            z: [n, l], the codes.
            index: [n] int64, the training example of each code, -1 where there is none. The lagged copy of the same
                example is left out of the density, since it would be almost at the code itself. None leaves nothing
                out.
            noise: [n, l], samples of the standard normal. The term is taken at z + bandwidth noise, and for each code
                p_e has a kernel at its present place z instead of its lagged copy. None takes the codes as they are.
            reduction: "mean", "sum" or "none".

        Returns:
            The term, differentiable in z: 0-dim, or [n] for "none".

        Raises:
            RuntimeError: if there was no refresh yet.
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

    def matched_loss(self, *, noise: bool = False) -> float:
        """Returns the mean that `loss` has for codes that follow the target, by `kdejsd.matched_loss`.

        Subtract it from a loss to see how far the codes are from the target.

        Args:
            noise: whether the loss is taken with noise.

        Example:
            >>> import kdejsd
            >>> lagged = kdejsd.LaggedKDE(num_centers=1000, latent_dim=8)
            >>> print(f"{lagged.matched_loss():.2f} without noise, {lagged.matched_loss(noise=True):.2f} with it")
            -0.09 without noise, 0.06 with it
        """
        return matched_loss(
            self.codes.shape[1],
            self.num_centers,
            self.bandwidth,
            target=self.target,
            smoothed=self.smoothed,
            kernel_noise=noise,
            divergence=self.divergence,
        )

    def jsd(self, z: Tensor, rng: torch.Generator) -> Tensor:
        """Measures how far codes z [n, l] are from the distribution that the loss compares with, in nats, 0-dim.

        It is the Jensen-Shannon divergence of the KDE of these codes with this bandwidth. The lagged codes play no
        part. The random number generator must be on the device of z.
        """
        return codes_jsd(z.to(self._dtype), self.bandwidth, self.law, rng)

    def _query(self, z: Tensor) -> Tensor:
        self._check_refreshed("log_prob or loss")
        return z.to(self._dtype)

    @property
    def _dtype(self) -> torch.dtype:
        """Returns the dtype in which everything is computed."""
        return torch.promote_types(self.codes.dtype, torch.float32)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        shares = {name: getattr(self, name) for name in _SHARED_OUT} if self.ranks > 1 else {}
        for name, value in (shares | self._numbers(self.rank, self.ranks)).items():
            destination[prefix + name] = value

    @torch.no_grad()
    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        bandwidth, shard = (_popped(state_dict, prefix + name, missing_keys) for name in ("bandwidth", "shard"))
        if bandwidth is not None and not bandwidth.is_meta:
            self._set_bandwidth(float(bandwidth))
        rank, ranks = (0, 1) if shard is None or shard.is_meta else shard.tolist()
        if ranks > 1 and (rank, ranks) != (self.rank, self.ranks):
            error_msgs.append(
                f"{prefix}codes are the share of rank {rank} of {ranks}, which no other rank can load. "
                "LaggedKDE.gathered_state is what all of them can."
            )
            for name in _BUFFERS:
                state_dict.pop(prefix + name, None)
            return
        if self.ranks > 1:  # what is no buffer is not known to Module
            self._load_share([_popped(state_dict, prefix + name, missing_keys) for name in _BUFFERS], ranks, error_msgs)
            state_dict |= {prefix + name: getattr(self, name) for name in _BUFFERS[len(_SHARED_OUT) :]}
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        self._read()

    def _load_share(self, state: list[Tensor | None], ranks: int, error_msgs: list[str]) -> None:
        """Takes the buffers from the state of one process, or of this very rank."""
        found = [value for value in state if value is not None]
        if len(found) < len(_BUFFERS):
            return
        expected = [self.num_centers if ranks == 1 else len(self.codes), self.codes.shape[1]]
        if list(found[0].shape) != expected:
            error_msgs.append(f"the state's codes must have shape {expected}, got {list(found[0].shape)}")
        elif ranks == 1:
            self._take_share(*(t.to(getattr(self, name)) for name, t in zip(_BUFFERS, found, strict=True)))
        else:
            for name, value in zip(_BUFFERS, found, strict=True):
                getattr(self, name).copy_(value)

    def extra_repr(self) -> str:
        m, dim = self.num_centers, self.codes.shape[1]
        storage = f"{self.codes.dtype} on {self.codes.device}"
        return (
            f"{m}, {dim}, bandwidth={self.bandwidth:.4g}, smoothed={self.smoothed}, divergence={self.divergence!r}, "
            f"codes in {storage}"
        )


def _affine_drift(before: Tensor, after: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns origin [l], shift [l] and change [l, l]: codes x `before` have moved by shift + (x - origin) change.

    The ridge is the mean variance of a dimension, which is what one code more adds that moves by the shift alone.
    """
    origin, moved = before.mean(0), after - before
    x, mean = before - origin, moved.mean(0)
    gram = x.T @ x
    ridge = gram.diagonal().mean() / len(x)
    ridge = ridge.where(ridge > 0, 1)  # of codes that are all the same; NaN stays in `gram`
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return origin, mean, torch.linalg.solve_ex(gram + ridge * eye, x.T @ (moved - mean))[0]


def _popped(state_dict: dict[str, Any], key: str, missing_keys: list[str]) -> Tensor | None:
    """Removes a key and returns its value; notes the key as missing if it is not there."""
    value: Tensor | None = state_dict.pop(key, None)
    if value is None:
        missing_keys.append(key)
    return value
