"""The refresh of lagged codes in a training loop of one's own, on one process and on several."""

import pytest
import torch
from helpers import points, results_of_ranks
from torch import nn
from torch.utils.data import ConcatDataset, Dataset, IterableDataset, TensorDataset

from kdejsd import LaggedKDE, LaggedRefresh

M, DIM, WIDTH = 50, 3, 5
EXAMPLES = points(80, WIDTH, dtype=torch.float32, seed=1)


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
