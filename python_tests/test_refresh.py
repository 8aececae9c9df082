"""The refresh of lagged codes in a training loop of one's own, on one process and on several, and the examples."""

import functools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import points, results_of_ranks, run_here
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, TensorDataset

from kdejsd import LaggedKDE, LaggedRefresh

M, DIM, WIDTH = 50, 3, 5
EXAMPLES = points(80, WIDTH, dtype=torch.float32, seed=1)
SCRIPTS = Path(__file__).parent.parent / ".docs" / "examples"


def make(encoder=None, examples=EXAMPLES, **options) -> LaggedRefresh:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(WIDTH, DIM), nn.Dropout(0.5)) if encoder is None else encoder
    return LaggedRefresh(LaggedKDE(M, DIM, 0.5), encoder, examples, **options)


class Single(Dataset):
    """Examples alone, without anything beside them."""

    def __len__(self):
        return len(EXAMPLES)

    def __getitem__(self, index):
        return EXAMPLES[index]


SETS = {
    "tensor": EXAMPLES,
    "items": Single(),
    "items with labels": TensorDataset(EXAMPLES, torch.zeros(80)),
    "list of sets": ConcatDataset([TensorDataset(EXAMPLES[:33]), TensorDataset(EXAMPLES[33:])]),
}


@pytest.mark.parametrize("keep_examples", [True, False])
@pytest.mark.parametrize("kind", SETS)
def test_the_codes_are_those_of_the_drawn_examples_in_evaluation_mode(kind, keep_examples):
    refresh = make(examples=SETS[kind], keep_examples=keep_examples)
    encoder, state = refresh.encoder, torch.get_rng_state()
    encoder[0].eval()
    assert refresh.step()
    assert encoder.training and encoder[1].training and not encoder[0].training
    assert torch.equal(torch.get_rng_state(), state)
    assert len(refresh.indices.unique()) == M and torch.equal(refresh.indices, refresh.lagged.indices)
    expected = encoder[0](EXAMPLES[refresh.indices])
    assert torch.equal(refresh.lagged.codes, expected) and not refresh.lagged.codes.requires_grad


def test_every_so_many_steps_and_on_from_a_checkpoint():
    refresh = make(every=3)
    assert [refresh.step() for _ in range(5)] == [True, False, False, True, False]
    again = make(every=3)
    again.load_state_dict(refresh.state_dict())
    assert [again.step() for _ in range(3)] == [False, True, False] and again.steps == 8
    refresh.encoder[0].bias.data += 1
    before = refresh.lagged.codes.clone()
    refresh.refresh()
    torch.testing.assert_close(refresh.lagged.codes, before + 1)


def test_the_seed_decides_the_examples():
    first, same, other = (make(seed=seed).indices for seed in (0, 0, 1))
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_a_function_a_method_and_a_wrapped_module_encode():
    class Owner(nn.Linear):
        def codes(self, examples):
            assert not self.training
            return self(examples)

    owner = Owner(WIDTH, DIM)
    for encoder in (owner.codes, nn.DataParallel(owner), lambda examples: owner(examples)):
        refresh = make(encoder)
        refresh.step()
        torch.testing.assert_close(refresh.lagged.codes, owner(EXAMPLES[refresh.indices]).detach())
        assert owner.training


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: make(examples=EXAMPLES[:49]), ValueError, "examples must be at least num_centers = 50, got 49"),
        (
            lambda: make(examples=[1] * 80),
            TypeError,
            "examples must be a tensor or a Dataset with indices and a length, got list",
        ),
        (lambda: make(examples=Stream()), TypeError, "a Dataset with indices and a length, got Stream"),
        (lambda: make(every=0), ValueError, "every must be at least 1, got 0"),
        (lambda: make(every=1.5), TypeError, r"every must be an integer, got 1\.5"),
        (lambda: make(seed=-1), ValueError, "seed must be at least 0, got -1"),
        (
            lambda: make(nn.Linear(WIDTH, 4)).step(),
            ValueError,
            r"codes must have shape \[50, 3\], got \[50, 4\]",
        ),
        (
            lambda: make(examples=TensorDataset(EXAMPLES.clone().fill_diagonal_(torch.nan))).step(),
            ValueError,
            "codes must be finite, got NaN",
        ),
        (
            lambda: make(examples=Named()).step(),
            TypeError,
            "items of examples must be tensors or begin with one, got dict",
        ),
    ],
)
def test_refusals(call, error, text):
    with pytest.raises(error, match=text):
        call()


class Stream(IterableDataset):
    def __iter__(self):
        return iter(EXAMPLES)

    def __len__(self):
        return len(EXAMPLES)


class Named(Single):
    def __getitem__(self, index):
        return {"image": EXAMPLES[index]}


def trained(rank: int, ranks: int) -> dict[str, torch.Tensor]:
    """Trains a linear encoder for some steps, each rank on its part of the same minibatches."""
    torch.manual_seed(0)
    encoder = nn.Linear(WIDTH, DIM)
    model = nn.parallel.DistributedDataParallel(encoder) if ranks > 1 else encoder
    lagged = LaggedKDE(M, DIM, 0.5)
    refresh = LaggedRefresh(lagged, model, EXAMPLES, every=2)
    lagged.shard()
    optimizer = torch.optim.SGD(encoder.parameters(), 0.5)
    for step in range(7):
        refresh.step()
        index = torch.randperm(len(EXAMPLES), generator=torch.Generator().manual_seed(step))[:20][rank::ranks]
        loss = lagged.loss(model(EXAMPLES[index]), index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert len(refresh.indices) == M // ranks
    lagged.gather()
    return {"weight": encoder.weight.detach(), "codes": lagged.codes, "examples": lagged.examples}


def test_two_ranks_train_as_one_does(tmp_path):
    alone = trained(0, 1)
    for found in results_of_ranks(2, tmp_path / "ranks", trained):
        for name, value in alone.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-5)


# ---- The scripts that the guides show


ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
ENVIRONMENT["ACCELERATE_USE_CPU"] = "true"  # else it would let each process train by itself


def run(script: str, *arguments: str) -> str:
    """Runs an example as a user does, and returns what it prints."""
    command = [sys.executable, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_script(rank: int, ranks: int, script: str) -> str:
    os.environ |= ENVIRONMENT
    done = run_here(SCRIPTS / script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_two_ranks(script: str, folder: Path) -> str:
    """Runs an example as torchrun does, and returns what its processes print."""
    return "".join(results_of_ranks(2, folder, functools.partial(of_script, script=script), joined=False))


EXAMPLES_OF_GUIDES = {
    "plain": lambda folder: on_two_ranks("plain_loop.py", folder),
    "accelerate": lambda folder: on_two_ranks("accelerate_loop.py", folder),
    "fabric": lambda folder: run("fabric_loop.py", "2"),
    "pythae": lambda folder: run("pythae_gen.py"),
}


@pytest.mark.parametrize("name", EXAMPLES_OF_GUIDES)
def test_an_example_trains_codes_that_follow_the_normal(name, tmp_path):
    if name in ("accelerate", "pythae"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    entropies = r"entropy of their whitened codes ([\d.]+) nats, of as many normal samples ([\d.]+)"
    printed = EXAMPLES_OF_GUIDES[name](tmp_path / "ranks")
    numbers = re.findall(rf"reconstruction error ([\d.]+)\n{entropies}", printed)
    assert len(numbers) == 1, printed  # and not one of every process
    error, of_codes, of_normal = map(float, numbers[0])
    assert error < 0.06 and of_codes > of_normal - 1  # 0.18 before training, and 2.4 less without the latent term
