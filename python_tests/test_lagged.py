"""LaggedKDE: refresh, a query's own copy, its losses, its state."""

import copy
import io
import math
import pickle

import numpy as np
import pytest
import torch
from helpers import operators
from torch import nn
from torch.distributions import Independent, Normal, Uniform
from torch.nn.functional import logsigmoid
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from kdejsd import GaussianMixture, StandardNormal
from kdejsd.bandwidth import optimal_bandwidth
from kdejsd.divergence import DIVERGENCES
from kdejsd.lagged import LaggedKDE
from kdejsd.reference import jsd_loss, kde_log_prob

M, DIM, H = 40, 3, 0.7


def make(seed: int = 0, **options) -> tuple[LaggedKDE, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lagged = LaggedKDE(M, DIM, H, **options)
    codes = torch.randn(M, DIM, generator=generator)
    indices = torch.randperm(1000, generator=generator)[:M]
    lagged.refresh(codes, indices)
    return lagged, codes, indices


def test_own_copy_is_left_out_as_by_brute_force():
    lagged, codes, indices = make(smoothed=False)
    z = torch.randn(60, DIM, generator=torch.Generator().manual_seed(1))
    index = torch.cat([indices[:25].flip(0), torch.arange(2000, 2030), torch.full((5,), -1)])
    got = lagged.loss(z, index, reduction="none")
    for i in range(60):
        others = codes[indices != index[i]]
        assert len(others) == (M - 1 if i < 25 else M)
        expected = jsd_loss(z[i : i + 1].double(), others.double(), H)
        assert got[i].item() == pytest.approx(expected.item(), abs=2e-6)
    torch.testing.assert_close(lagged.loss(z, index), got.mean())


def test_without_index_nothing_is_left_out():
    lagged, codes, indices = make()
    z = codes[:10]
    torch.testing.assert_close(lagged.log_prob(z), kde_log_prob(z, codes, H))
    assert (lagged.log_prob(z, indices[:10]) < lagged.log_prob(z)).all()
    lagged.refresh(codes)  # without indices no query has a copy, whatever index it has
    torch.testing.assert_close(lagged.log_prob(z, indices[:10]), kde_log_prob(z, codes, H))


def test_update_replaces_a_part():
    lagged, codes, indices = make()
    newer = torch.randn(7, DIM, generator=torch.Generator().manual_seed(2))
    lagged.update(newer, 30)
    expected = codes.clone()
    expected[30:37] = newer
    assert torch.equal(lagged.codes, expected) and torch.equal(lagged.indices, indices)
    assert torch.equal(lagged.own_copy(indices), torch.arange(M))


def test_push_keeps_the_newest_and_knows_the_newest_copy():
    """Against a list of what was pushed, over three rounds of the queue, examples coming again and some unknown."""
    lagged, codes, indices = make()
    generator = torch.Generator().manual_seed(2)
    history = list(zip(indices.tolist(), codes, strict=True))
    for size in (7, 1, 0, 25, 40, 13, 55, 30):
        new = torch.randn(size, DIM, generator=generator)
        examples = torch.randperm(60, generator=generator)[:size]
        examples[:2] = -1
        lagged.push(new, examples)
        history += zip(examples.tolist(), new, strict=True)
        kept = history[-M:]
        assert sorted(lagged.indices.tolist()) == sorted(example for example, _ in kept)
        wanted = torch.arange(-1, 1100)
        for example, place in zip(wanted.tolist(), lagged.own_copy(wanted).tolist(), strict=True):
            newest = [code for other, code in kept if other == example >= 0][-1:]
            assert (place >= 0) == bool(newest)
            if newest:
                assert torch.equal(lagged.codes[place], newest[0])


@pytest.mark.parametrize("k", [1, 3, 13, 200])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_follow_is_least_squares_with_one_more_code_that_moves_by_the_mean(k, scale):
    """Against torch's least squares with the ridge as further rows, in float64; codes far from 0, not contiguous."""
    lagged, codes, _ = make()
    generator = torch.Generator().manual_seed(k)
    before = scale * (3 + torch.randn(DIM, k, generator=generator, dtype=torch.float64)).T
    after = before @ torch.randn(DIM, DIM, generator=generator, dtype=torch.float64) + scale
    lagged.refresh(scale * codes)
    lagged.follow(before, after)
    x, moved = before - before.mean(0), after - before
    ridge = x.square().mean().sqrt() * torch.eye(DIM, dtype=torch.float64)
    change = torch.linalg.lstsq(torch.cat([x, ridge]), torch.cat([moved - moved.mean(0), 0 * ridge])).solution
    expected = scale * codes.double()
    expected = expected + moved.mean(0) + (expected - before.mean(0)) @ change if k > 1 else expected + moved[0]
    torch.testing.assert_close(lagged.codes.double(), expected, rtol=1e-5, atol=1e-4 * scale)


def test_follow_recovers_an_affine_map_and_leaves_codes_that_do_not_move():
    lagged, codes, indices = make()
    torch.manual_seed(0)
    matrix, shift, before = torch.randn(DIM, DIM), torch.randn(DIM), torch.randn(10_000, DIM)
    lagged.follow(before, before @ matrix + shift)
    assert (lagged.codes - (codes @ matrix + shift)).abs().max() < 0.01
    assert torch.equal(lagged.indices, indices) and torch.equal(lagged.own_copy(indices), torch.arange(M))
    lagged.refresh(codes)
    with torch.autocast("cpu", torch.bfloat16):  # which would round the codes
        lagged.follow(before[:5], before[:5])
    assert torch.equal(lagged.codes, codes)
    lagged.follow(before[:0], before[:0])
    assert torch.equal(lagged.codes, codes)
    same = torch.ones(7, DIM)  # of which no matrix can be found
    lagged.follow(same, same + 0.5)
    torch.testing.assert_close(lagged.codes, codes + 0.5)


@pytest.mark.parametrize("sizes", [[4], [3, 0, 5], [20, 40, 13, 30], [M, M]])
def test_follow_moves_the_codes_of_the_last_pushes_by_their_share_of_the_way(sizes):
    lagged, codes, _ = make()
    generator = torch.Generator().manual_seed(3)
    history = [(code, 1.0) for code in codes]
    for done, size in enumerate(sizes):
        new = torch.randn(size, DIM, generator=generator)
        lagged.push(new, torch.arange(size))
        history += [(code, 1 - done / len(sizes)) for code in new]
    codes, shares = (
        torch.stack([torch.as_tensor(part) for part in parts]) for parts in zip(*history[-M:], strict=True)
    )
    before = torch.randn(500, DIM, generator=generator)
    matrix, shift = torch.randn(DIM, DIM, generator=generator), torch.randn(DIM, generator=generator)
    lagged.follow(before, before @ matrix + shift, sizes)
    expected = torch.lerp(codes, codes @ matrix + shift, shares[:, None])
    torch.testing.assert_close(lagged.codes.roll(-int(lagged.oldest), 0), expected, rtol=0.02, atol=0.02)


def test_follow_tells_what_it_cannot_take():
    lagged, codes, _ = make()
    with pytest.raises(ValueError, match=rf"codes must have shape \[5, {DIM}\], got \[4, {DIM}\]"):
        lagged.follow(codes[:5], codes[:4])
    with pytest.raises(TypeError, match=r"codes must be floating-point, got torch\.int64"):
        lagged.follow(codes[:5], codes[:5].long())
    with pytest.raises(ValueError, match="codes must be finite, got NaN or infinity in 1 of 5 codes"):
        lagged.follow(codes[:5], codes[:5].clone().index_fill_(0, torch.tensor([2]), torch.nan))
    with pytest.raises(ValueError, match="pushed must be at least 0, got -1"):
        lagged.follow(codes[:5], codes[:5], [3, -1])
    assert torch.equal(lagged.codes, codes)
    with pytest.raises(RuntimeError, match=r"call refresh\(codes\) before follow"):
        LaggedKDE(M, DIM, 0.1).follow(codes[:5], codes[:5])
    rounded = LaggedKDE(M, DIM, 0.1, storage_dtype=torch.bfloat16)
    rounded.refresh(codes)
    with pytest.raises(ValueError, match=r"must be in float32 or float64 for follow, got torch\.bfloat16"):
        rounded.follow(codes[:5], codes[:5])


def test_places_are_the_same_with_room_reserved():
    (one, *_), (other, _, indices) = make(), make()
    other.reserve(1000)
    for lagged in (one, other):
        lagged.push(torch.ones(5, DIM), torch.arange(995, 1000))
    everyone = torch.cat([indices, torch.arange(990, 1000)])
    assert torch.equal(one.own_copy(everyone), other.own_copy(everyone))


def test_an_index_beyond_what_is_reserved_is_refused():
    lagged, codes, indices = make()
    lagged.reserve(1000)
    with pytest.raises(ValueError, match="indices must be below 1000, which is reserved, got 1000"):
        lagged.push(codes[:1], torch.tensor([1000]))
    assert torch.equal(lagged.codes, codes) and torch.equal(lagged.indices, indices)


def test_a_restored_queue_goes_on():
    lagged, _, _ = make()
    lagged.push(torch.ones(7, DIM), torch.arange(7))
    other = LaggedKDE(M, DIM, 0.1)
    other.load_state_dict(lagged.state_dict())
    for queue in (lagged, other):
        queue.push(torch.zeros(5, DIM), torch.arange(5, 10))
    assert torch.equal(lagged.codes, other.codes) and torch.equal(lagged.indices, other.indices)
    assert torch.equal(lagged.own_copy(torch.arange(1000)), other.own_copy(torch.arange(1000)))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("target", [None, GaussianMixture([[-2.0, 0, 0], [2.0, 0, 0]], 0.5, [0.3, 0.7])])
def test_loss_and_gradient_agree_with_the_reference(divergence, smoothed, target):
    lagged, codes, _indices = make(divergence=divergence, smoothed=smoothed, target=target)
    law = StandardNormal(DIM) if target is None else target
    z = torch.randn(30, DIM, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    expected = jsd_loss(z, codes.double(), H, target=law.smoothed(H) if smoothed else law, divergence=divergence)
    (expected_gradient,) = torch.autograd.grad(expected, z)
    query = z.detach().float().requires_grad_()
    loss = lagged.loss(query, torch.full((30,), -1))
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(query.grad.double(), expected_gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_noise_puts_the_current_kernel_in_place_of_the_lagged_copy(divergence):
    lagged, codes, indices = make(divergence=divergence, target=GaussianMixture([[0.0, 0, 0]], 1.2))
    generator = torch.Generator().manual_seed(1)
    z, noise = torch.randn(2, 12, DIM, generator=generator, dtype=torch.float64)
    index = torch.cat([indices[:6], torch.full((6,), -1)])
    z.requires_grad_()
    terms = []
    for i in range(12):
        centers = torch.cat([codes[indices != index[i]].double(), z[i : i + 1].detach()])
        query = z[i : i + 1] + H * noise[i : i + 1]
        terms.append(jsd_loss(query, centers, H, target=lagged.law, divergence=divergence))
    expected = torch.stack(terms)
    (expected_gradient,) = torch.autograd.grad(expected.sum(), z)
    z = z.detach().float().requires_grad_()
    got = lagged.loss(z, index, noise=noise, reduction="none")
    (gradient,) = torch.autograd.grad(got.sum(), z)
    torch.testing.assert_close(got.double(), expected.double(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), expected_gradient, rtol=1e-4, atol=1e-5)
    assert lagged.loss(z, index, noise=noise).item() == pytest.approx(got.mean().item(), abs=1e-8)


@pytest.mark.parametrize("storage_dtype", [torch.float32, torch.bfloat16], ids=["one pass", "streamed"])
@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("smoothed", [False, True])
@pytest.mark.parametrize("target", [None, GaussianMixture([[-2.0, 0, 0], [2.0, 0, 0]], 0.5, [0.3, 0.7])])
def test_loss_with_noise_is_its_formula(target, smoothed, divergence, indexed, storage_dtype):
    """The term composed of its parts, in float64."""
    lagged, _, indices = make(target=target, smoothed=smoothed, divergence=divergence, storage_dtype=storage_dtype)
    generator = torch.Generator().manual_seed(1)
    z, noise = torch.randn(2, 31, DIM, generator=generator).unbind()
    index = torch.cat([indices[:20], torch.full((11,), -1)]) if indexed else None
    found = lagged.loss(z.requires_grad_(), index, noise=noise, reduction="none")
    (gradient,) = torch.autograd.grad(found.sum(), z)

    z = z.detach().double().requires_grad_()
    query = z + H * noise.double()
    copy = lagged.own_copy(torch.full((31,), -1) if index is None else index)
    log_density = kde_log_prob(query, lagged.codes.double(), H, exclude_self=copy)
    count = M - (copy >= 0).double()
    kernel = -(query - z.detach()).square().sum(-1) / (2 * H * H) - DIM * math.log(H * math.sqrt(2 * math.pi))
    log_density = torch.logaddexp(count.log() + log_density, kernel) - (count + 1).log()
    log_ratio = log_density - lagged.law.log_prob(query)
    expected = log_ratio if divergence == "kl" else math.log(2) + logsigmoid(log_ratio)
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=3e-6)
    torch.testing.assert_close(gradient.double(), torch.autograd.grad(expected.sum(), z)[0], rtol=1e-5, atol=5e-6)


def count_operators(call) -> int:
    call()  # what is done once is over
    return len(operators(call))


def test_loss_with_noise_is_one_pass():
    """The noise costs no more than its addition and the detached codes, forward and backward."""
    lagged, codes, indices = make()
    z, noise = codes.clone().requires_grad_(), torch.ones_like(codes)
    without, with_noise = (
        count_operators(lambda n=n: lagged.loss(z, indices, noise=n).backward()) for n in (None, noise)
    )
    assert with_noise <= without + 3  # with the check of its dtype
    assert count_operators(lambda: lagged.loss(z, noise=noise).backward()) <= 20


def test_with_noise_the_term_is_the_mean_over_the_kernel_density():
    lagged, codes, indices = make()
    generator = torch.Generator().manual_seed(1)
    draws = [torch.randn(M, DIM, generator=generator) for _ in range(2000)]
    terms = torch.stack([lagged.loss(codes, indices, noise=noise) for noise in draws])
    line = torch.linspace(-6, 6, 81)
    grid = torch.cartesian_prod(line, line, line)
    density = lagged.log_prob(grid).exp() * (line[1] - line[0]) ** 3
    expected = (density * lagged.loss(grid, reduction="none")).sum()
    assert density.sum().item() == pytest.approx(1, abs=1e-4)
    assert terms.mean().item() == pytest.approx(expected.item(), abs=4 * terms.std().item() / math.sqrt(2000))
    assert expected > 0


def test_without_noise_codes_are_pushed_apart_without_bound_and_with_it_they_are_not():
    lagged, codes, indices = make()
    noise = torch.randn(M, DIM, generator=torch.Generator().manual_seed(1))
    terms = [
        [lagged.loss(scale * codes, indices, noise=n).item() for scale in (1.0, 10.0, 100.0)] for n in (None, noise)
    ]
    assert terms[0][2] < terms[0][1] < terms[0][0] and terms[0][2] < -1000
    assert terms[1][0] < terms[1][1] <= terms[1][2] and terms[1][2] == pytest.approx(math.log(2), abs=1e-3)


def test_a_torch_distribution_is_a_target():
    target = Independent(Normal(torch.zeros(DIM), torch.ones(DIM)), 1)
    lagged, codes, _ = make(target=target, smoothed=False)
    ours, _, _ = make(smoothed=False)
    torch.testing.assert_close(lagged.loss(codes), ours.loss(codes))
    torch.testing.assert_close(make(target=target, smoothed=True)[0].loss(codes), make(smoothed=True)[0].loss(codes))
    uniform = Independent(Uniform(-torch.ones(DIM), torch.ones(DIM)), 1)
    with pytest.raises(ValueError, match=r"smoothed=True needs a target that can be convolved.*got Independent"):
        LaggedKDE(M, DIM, H, uniform, smoothed=True)


@pytest.mark.parametrize("smoothed", [False, True])
def test_jsd_is_small_at_the_target_and_grows_towards_log_2(smoothed):
    lagged = LaggedKDE(M, 2, 0.25, smoothed=smoothed)
    z = torch.randn(4000, 2, generator=torch.Generator().manual_seed(1))
    values = [lagged.jsd(z + shift, torch.Generator().manual_seed(2)).item() for shift in (0.0, 0.5, 1.0, 3.0, 30.0)]
    assert 0 < values[0] < 0.02
    assert values == sorted(values)
    assert values[-1] == pytest.approx(math.log(2), abs=1e-3)


def test_default_bandwidth_is_the_optimal_one():
    assert LaggedKDE(50, 2).bandwidth == optimal_bandwidth(2, 50).value
    mixture = GaussianMixture([[-4.0, 0.0], [4.0, 0.0]], 0.3)
    assert LaggedKDE(50, 2, target=mixture).bandwidth == optimal_bandwidth(2, 50, target=mixture).value


@pytest.mark.parametrize("noise", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("smoothed", [False, True])
def test_matched_loss_is_that_of_codes_which_follow_the_target(smoothed, divergence, noise):
    target = StandardNormal(2).smoothed(1.0)
    rng = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(50):
        lagged = LaggedKDE(100, 2, 0.6, target, smoothed=smoothed, divergence=divergence)
        lagged.refresh(target.sample(100, rng))
        noises = torch.randn(100, 2, generator=rng) if noise else None
        losses.append(lagged.loss(target.sample(100, rng), noise=noises))
    mean, error = torch.stack(losses).mean(), torch.stack(losses).std() / 50**0.5
    assert abs(lagged.matched_loss(noise=noise) - mean) < 4 * error


def test_state_is_restored_whole():
    lagged, codes, indices = make(smoothed=True)
    other = LaggedKDE(M, DIM, 0.1, smoothed=True)
    assert not other.refreshed
    other.load_state_dict(lagged.state_dict())
    assert (other.bandwidth, other.refreshed) == (H, True)
    assert torch.equal(other.loss(codes, indices), lagged.loss(codes, indices))


class Holder(nn.Module):
    """A module of a user's that holds lagged codes."""

    def __init__(self, lagged: LaggedKDE) -> None:
        super().__init__()
        self.linear, self.lagged = nn.Linear(2, 2), lagged


def assert_same_codes(lagged: LaggedKDE, expected: LaggedKDE) -> None:
    """Also for what is read off the state: the bandwidth, the law, each example's place, the next place of a queue."""
    wanted = torch.arange(-1, 1000)
    for _ in range(2):
        assert (lagged.bandwidth, lagged.refreshed) == (expected.bandwidth, expected.refreshed) == (H, True)
        assert torch.equal(lagged.codes, expected.codes) and torch.equal(lagged.indices, expected.indices)
        assert torch.equal(lagged.own_copy(wanted), expected.own_copy(wanted))
        assert torch.equal(lagged.loss(expected.codes, wanted[:M]), expected.loss(expected.codes, wanted[:M]))
        for module in (lagged, expected):
            module.push(torch.zeros(5, DIM), torch.arange(5, 10))


def through_torch_save(holder: Holder, other: Holder, folder) -> Holder:
    torch.save(holder.state_dict(), folder / "state.pt")
    other.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    return other


def through_the_meta_device(holder: Holder, other: Holder, folder) -> Holder:
    with torch.device("meta"):
        other = Holder(LaggedKDE(M, DIM, target=GaussianMixture([[-2.0, 0, 0], [2.0, 0, 0]], 0.5)))
    other.load_state_dict(copy.deepcopy(holder.state_dict()), assign=True)
    return other


def through_empty_memory(holder: Holder, other: Holder, folder) -> Holder:
    other.to_empty(device="cpu")
    other.load_state_dict(holder.state_dict())
    return other


def through_pickle(holder: Holder, other: Holder, folder) -> Holder:
    return pickle.loads(pickle.dumps(holder))


def through_deepcopy(holder: Holder, other: Holder, folder) -> Holder:
    return copy.deepcopy(holder)


def through_safetensors(holder: Holder, other: Holder, folder) -> Holder:
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_model(holder, folder / "model.safetensors")
    safetensors.load_model(other, folder / "model.safetensors")
    safetensors.save_file(holder.state_dict(), folder / "state.safetensors")
    other.load_state_dict(safetensors.load_file(folder / "state.safetensors"))
    return other


def through_accelerate(holder: Holder, other: Holder, folder) -> Holder:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    for module, step in ((holder, "save_state"), (other, "load_state")):
        accelerator = accelerate.Accelerator(cpu=True)
        accelerator.prepare(module)
        getattr(accelerator, step)(folder)
    return other


def through_the_hub(holder: Holder, other: Holder, folder) -> Holder:
    hub = pytest.importorskip(
        "huggingface_hub.hub_mixin", reason="huggingface_hub is not installed", exc_type=ImportError
    )

    class Shared(Holder, hub.PyTorchModelHubMixin):
        def __init__(self, bandwidth: float = 0.1) -> None:
            super().__init__(LaggedKDE(M, DIM, bandwidth, holder.lagged.target))

    shared = Shared()
    shared.load_state_dict(holder.state_dict())
    shared.save_pretrained(folder)
    return Shared.from_pretrained(folder)


@pytest.mark.parametrize(
    "through",
    [
        *(through_torch_save, through_the_meta_device, through_empty_memory, through_pickle, through_deepcopy),
        *(through_safetensors, through_accelerate, through_the_hub),
    ],
)
def test_the_usual_tools_carry_the_state(tmp_path, through):
    target = GaussianMixture([[-2.0, 0, 0], [2.0, 0, 0]], 0.5)
    lagged, codes, _ = make(target=target)
    lagged.push(codes[:7].flip(0), torch.arange(7))
    carried = through(Holder(lagged), Holder(LaggedKDE(M, DIM, 0.1, target)), tmp_path).lagged
    assert_same_codes(carried, lagged)


def test_every_part_of_the_state_is_a_tensor_of_its_own():
    state = make()[0].state_dict()
    assert state.keys() == {"codes", "examples", "oldest", "stamp", "bandwidth", "shard"}
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert len({value.untyped_storage().data_ptr() for value in state.values()}) == len(state)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda state: state | LaggedKDE(M + 1, DIM, H).state_dict(), "size mismatch for codes"),
        (lambda state: {name: t for name, t in state.items() if name != "bandwidth"}, 'Missing.*"bandwidth"'),
        (lambda state: state | {"shard": torch.tensor([1, 3])}, "codes are the share of rank 1 of 3, which no other"),
        (lambda state: state | {"other": torch.zeros(2)}, 'Unexpected.*"other"'),
    ],
)
def test_a_state_that_does_not_fit_is_refused(change, text):
    lagged = LaggedKDE(M, DIM, H)
    with pytest.raises(RuntimeError, match=text):
        lagged.load_state_dict(change(make()[0].state_dict()))


def test_a_shard_loads_the_whole_state(monkeypatch):
    lagged, codes, _ = make()
    lagged.push(codes[:7], torch.arange(7))
    monkeypatch.setattr("kdejsd.lagged.rank_and_size", lambda: (1, 3))
    shard = LaggedKDE(M, DIM, 0.1)
    shard.shard()
    assert not {"codes", "examples"} & {name for name, _ in shard.named_buffers()}
    shard.load_state_dict(lagged.state_dict())
    assert shard.refreshed and shard.bandwidth == H
    # By age, for the oldest of all ranks to stand at the same place.
    assert torch.equal(shard.codes, lagged.codes.roll(-7, 0)[1::3]) and int(shard.oldest) == 0
    assert torch.equal(shard.indices, lagged.indices.roll(-7)[1::3])
    other = LaggedKDE(M, DIM, 0.1)
    other.shard()
    other.load_state_dict(shard.state_dict())
    assert torch.equal(other.codes, shard.codes)
    assert torch.equal(other.own_copy(torch.arange(1000)), shard.own_copy(torch.arange(1000)))
    with pytest.raises(RuntimeError, match=r"the state's codes must have shape \[40, 3\], got \[41, 3\]"):
        other.load_state_dict(LaggedKDE(M + 1, DIM, H).state_dict())


AVERAGES = {
    "copied": {},
    "equal weights": {"use_buffers": True},
    "exponential": {"use_buffers": True, "avg_fn": get_ema_avg_fn(0.9)},
    "exponential, all at once": {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.9)},
}


@pytest.mark.parametrize("early", [True, False])
@pytest.mark.parametrize("name", AVERAGES)
def test_an_averaged_model_has_the_codes_or_their_average(name, early):
    _, codes, indices = make()
    model = Holder(LaggedKDE(M, DIM, H))
    if early:
        average = AveragedModel(model, **AVERAGES[name])
    model.lagged.refresh(codes, indices)
    if not early:
        average = AveragedModel(model, **AVERAGES[name])
    for step in range(4):
        model.lagged.refresh(codes + step, indices)
        average.update_parameters(model)
    lagged = average.module.lagged
    shift = {"copied": 3, "equal weights": 1.5}.get(name, 0.9 * (0.9 * 0.1 + 0.2) + 0.3)
    torch.testing.assert_close(lagged.codes, codes + shift)
    assert lagged.refreshed and torch.equal(lagged.indices, indices)
    expected = LaggedKDE(M, DIM, H)
    expected.refresh(lagged.codes, indices)
    assert torch.equal(lagged.loss(codes, indices), expected.loss(codes, indices))


@pytest.mark.parametrize("name", AVERAGES)
def test_an_average_over_a_queue_is_a_queue_or_refused(name):
    lagged, codes, _ = make()
    model = Holder(lagged)
    average = AveragedModel(model, **AVERAGES[name])
    for step in range(4):
        lagged.push(codes[:M], torch.arange(M * step, M * step + M))  # which leaves the oldest at its place
        average.update_parameters(model)
    if name == "copied":
        assert_same_codes(average.module.lagged, lagged)
        return
    with pytest.raises(RuntimeError, match=r"holds averages over the codes of different examples.*call refresh"):
        average.module.lagged.loss(codes)
    assert not average.module.lagged.refreshed
    average.module.lagged.refresh(codes)
    assert average.module.lagged.refreshed


def test_inference_mode_leaves_nothing_that_cannot_be_written_later():
    lagged, codes, indices = make()
    expected, _, _ = make()
    fresh = LaggedKDE(M, DIM, H)
    with torch.inference_mode():
        for module in (lagged, fresh):
            module.refresh(codes * 1, indices)
            module.push(codes[:3] * 1, torch.arange(5000, 5003))
            module.reserve(6000)
            module.loss(codes, indices)
    expected.push(codes[:3], torch.arange(5000, 5003))
    for module in (lagged, fresh, expected):
        module.push(codes[:5], torch.arange(5003, 5008))
        module.update(codes[:5], 2)
    for module in (lagged, fresh):
        assert torch.equal(module.codes, expected.codes)
        assert torch.equal(module.own_copy(torch.arange(5010)), expected.own_copy(torch.arange(5010)))
        module.refresh(codes, indices)
        assert torch.equal(module.own_copy(indices), torch.arange(M))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_another_dtype_is_that_of_the_codes_alone(dtype):
    lagged, codes, _ = make()
    indices = 2**20 + torch.arange(M)  # which no half type holds
    lagged.refresh(codes, indices)
    lagged.to(dtype)
    assert torch.equal(lagged.codes, codes.to(dtype)) and lagged.bandwidth == H
    assert torch.equal(lagged.indices, indices) and torch.equal(lagged.own_copy(indices), torch.arange(M))


def test_the_newest_of_an_examples_codes_is_its_own_copy_after_loading():
    lagged, codes, _ = make()
    for step in range(3):
        lagged.push(codes[:15] + step, torch.arange(15) % 4)
    other = LaggedKDE(M, DIM, 0.1)
    other.load_state_dict(lagged.state_dict())
    assert torch.equal(other.own_copy(torch.arange(4)), lagged.own_copy(torch.arange(4)))


def test_shared_memory_is_shared():
    lagged, codes, _ = make()
    lagged.share_memory()
    assert lagged.codes.is_shared() and lagged.examples.is_shared()
    lagged.refresh(codes)
    assert lagged.refreshed


def test_a_compiled_push_is_compiled_once():
    (lagged, codes, indices), (expected, *_) = make(), make()
    for module in (lagged, expected):
        module.reserve(1000)
        module.own_copy(indices)
    graphs = []
    push = torch.compile(lagged.push, backend=lambda graph, inputs: graphs.append(graph) or graph)
    counts = []
    for step in range(4):
        push(codes[:7] + step, indices[:7] + step)
        expected.push(codes[:7] + step, indices[:7] + step)
        counts.append(len(graphs))
    assert counts == counts[:1] * 4
    assert torch.equal(lagged.codes, expected.codes)
    assert torch.equal(lagged.own_copy(torch.arange(1000)), expected.own_copy(torch.arange(1000)))


def test_numbers_of_numpy_become_plain():
    lagged = LaggedKDE(np.int64(M), np.int32(DIM), np.float64(H))
    assert type(lagged.num_centers) is int and type(lagged.bandwidth) is float
    lagged.refresh(make()[1])
    file = io.BytesIO()
    torch.save(lagged.state_dict(), file)
    file.seek(0)
    LaggedKDE(M, DIM, 0.1).load_state_dict(torch.load(file, weights_only=True))
    with pytest.raises(TypeError):
        LaggedKDE(40.5, DIM, H)


def test_half_precision_codes_are_taken():
    lagged, codes, _ = make()
    assert lagged.loss(codes.bfloat16()).dtype == torch.float32
    lagged.refresh(codes.bfloat16())
    assert lagged.codes.dtype == torch.float32


def test_before_the_first_refresh():
    lagged = LaggedKDE(M, DIM, H)
    for use in (lagged.loss, lagged.log_prob):
        with pytest.raises(RuntimeError, match="holds no codes yet: call refresh"):
            use(torch.zeros(2, DIM))


@pytest.mark.parametrize(
    ("codes", "indices", "error", "text"),
    [
        (torch.zeros(M, DIM + 1), None, ValueError, r"codes must have shape \[40, 3\], got \[40, 4\]"),
        (torch.zeros(M - 1, DIM), None, ValueError, r"codes must have shape \[40, 3\], got \[39, 3\]"),
        (torch.zeros(M, DIM, dtype=torch.int64), None, TypeError, "codes must be floating-point, got torch.int64"),
        (
            torch.zeros(M, DIM).fill_(math.nan),
            None,
            ValueError,
            "codes must be finite, got NaN or infinity in 40 of 40",
        ),
        (torch.zeros(M, DIM), torch.arange(M - 1), ValueError, r"indices must have shape \[40\], got \[39\]"),
        (torch.zeros(M, DIM), torch.arange(M).float(), TypeError, "indices must be int64, got torch.float32"),
        (torch.zeros(M, DIM), torch.arange(M) == 0, TypeError, "indices must be int64, got torch.bool"),
        (torch.zeros(M, DIM), list(range(M)), TypeError, "indices must be a tensor, got list"),
        (torch.zeros(M, DIM), torch.arange(M) + 2**40, ValueError, r"indices must be below 268435456 unless .*reserve"),
        ([torch.zeros(M, DIM)], torch.arange(M).float(), TypeError, "indices must be int64, got torch.float32"),
        ([torch.zeros(M, DIM)], torch.arange(1), ValueError, r"indices must have shape \[40\], got \[1\]"),
        ([[[0.0] * DIM] * M], None, TypeError, "codes must be a tensor, got list"),
        ([torch.zeros(M + 1, DIM)], None, ValueError, "codes must be 40 in all their parts, got at least 41"),
        (True, None, TypeError, "codes must be a tensor or an iterable of tensors, got bool"),
        (torch.tensor(0.0), None, ValueError, r"codes must have shape \[40, 3\], got \[\]"),
    ],
)
def test_refresh_refuses(codes, indices, error, text):
    lagged, kept, known = make()
    with pytest.raises(error, match=text):
        lagged.refresh(codes, indices)
    assert torch.equal(lagged.codes, kept) and torch.equal(lagged.indices, known)


def test_update_and_push_refuse():
    lagged, codes, _ = make()
    for call, error, text in (
        (lambda: lagged.update(codes[:7], 34), ValueError, "start must be between 0 and 33 for 7 codes, got 34"),
        (lambda: lagged.update(codes[:7, :2], 0), ValueError, r"codes must have shape \[7, 3\], got \[7, 2\]"),
        (lambda: lagged.push(codes[:7], torch.arange(6)), ValueError, r"indices must have shape \[7\], got \[6\]"),
        (lambda: lagged.push(codes[:2] / 0, torch.arange(2)), ValueError, "codes must be finite"),
        (lambda: lagged.push(codes[:2].tolist(), torch.arange(2)), TypeError, "codes must be a tensor, got list"),
        (lambda: lagged.push(codes[:2], torch.arange(2) + 2**40), ValueError, "indices must be below 268435456 unless"),
        (lambda: lagged.update(codes[:2].tolist(), 0), TypeError, "codes must be a tensor, got list"),
        (lambda: lagged.update(codes[0], 0), ValueError, r"codes must have shape \[3, 3\], got \[3\]"),
        (lambda: lagged.loss(codes, torch.arange(M) == 0), TypeError, "index must be int64, got torch.bool"),
        (lambda: lagged.loss(codes, list(range(M))), TypeError, "index must be a tensor, got list"),
        (lambda: LaggedKDE(M, DIM, H).push(codes, torch.arange(M)), RuntimeError, "call refresh.* before push"),
        (lambda: LaggedKDE(M, DIM, H).update(codes, 0), RuntimeError, "call refresh.* before update"),
    ):
        with pytest.raises(error, match=text):
            call()
    assert torch.equal(lagged.codes, codes)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"num_centers": 0, "latent_dim": 2, "bandwidth": 1.0}, "num_centers must be at least 1, got 0"),
        ({"num_centers": 5, "latent_dim": 0, "bandwidth": 1.0}, "latent_dim must be at least 1, got 0"),
        ({"num_centers": 5, "latent_dim": 2, "bandwidth": -0.3}, r"bandwidth must be positive and finite, got -0\.3"),
        ({"num_centers": 5, "latent_dim": 2, "bandwidth": 1.0, "divergence": "tv"}, "divergence must be .* got 'tv'"),
        (
            {"num_centers": 5, "latent_dim": 2, "bandwidth": 1.0, "target": StandardNormal(3)},
            "2 dimensions, as latent_dim has, got 3",
        ),
    ],
)
def test_constructor_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        LaggedKDE(**arguments)


@pytest.mark.parametrize("writes", range(1, 6))
def test_copies_see_what_is_written_into_them(writes):
    """However often it was written into what they were copied from."""
    lagged, codes, indices = make()
    for _ in range(writes):
        lagged.refresh(codes, indices)
    for other in (copy.deepcopy(lagged), pickle.loads(pickle.dumps(lagged))):
        examples = other.examples
        for _ in range(writes):
            examples.copy_(indices.flip(0))
        expected = M - 1 - torch.arange(M)
        assert torch.equal(other.own_copy(indices), expected)
