"""The study of what a match costs: its flows on data whose answer is known, its rising weight, and a quick run."""

import csv
import sys
from pathlib import Path

import pytest
import torch

import kdejsd

PAPERS = Path(__file__).resolve().parent.parent / "bench" / "papers"

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*GPU")


@pytest.fixture(scope="module")
def gen_price():
    sys.path.insert(0, str(PAPERS))
    import gen_price

    return gen_price


def bent(count, seed):
    """Points of a normal bent to a banana, each dimension of mean 0 and variance 1."""
    u = torch.randn(count, 2, generator=torch.Generator().manual_seed(seed))
    z = torch.stack([u[:, 0], 0.3 * u[:, 1] + u[:, 0].square()], 1)
    return (z - z.mean(0)) / z.std(0)


@pytest.mark.parametrize(("way", "steps"), [("train_by_likelihood", 300), ("train_by_kde", 1000)])
def test_a_flow_brings_bent_codes_nearer_to_the_normal(gen_price, monkeypatch, way, steps):
    monkeypatch.setattr(gen_price, "LAYERS", 4)
    monkeypatch.setattr(gen_price, "HIDDEN", 32)
    torch.manual_seed(0)
    z, others = bent(1000, 0), bent(1000, 1)
    flow = gen_price.Flow(5 * z + 3)
    getattr(gen_price, way)(flow, 5 * z + 3, steps)
    with torch.no_grad():
        codes = flow(5 * others + 3)
        torch.testing.assert_close(flow.inverse(codes), 5 * others + 3, rtol=1e-3, atol=1e-3)  # nothing is lost
    normal = kdejsd.kde_entropy(torch.randn(1000, 2, generator=torch.Generator().manual_seed(2)))
    before, after = (float(kdejsd.kde_entropy(x) - normal) for x in (others, codes))
    assert before < -1
    assert -0.35 < after < 0.1


def test_the_weight_rises_over_the_run(gen_price):
    weights = []

    class Watched(gen_price.RisingGEN):
        def training_step(self, batch, batch_idx):
            weights.append(self.weight)
            return super().training_step(batch, batch_idx)

    data = gen_price.Digits(batch_size=100, train_size=400)
    gen_price.fitted(Watched(data.example_shape, 2, num_lagged=100, weight=2.0), data, 8)
    assert weights == [2.0 * step / 8 for step in range(8)]


def test_the_faster_encoder_has_three_times_the_rate(gen_price):
    model = gen_price.FastEncoderGEN((1, 8, 8), 2, num_lagged=10, learning_rate=0.01)
    (optimizer,), _ = model.configure_optimizers()
    rates = {parameter: group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    assert {rates.pop(parameter) for parameter in model.encoder.parameters()} == {0.03}
    assert {rates.pop(parameter) for parameter in model.decoder.parameters()} == {0.01} and not rates


def test_errors_are_those_of_the_codes_that_are_measured(gen_price):
    data = gen_price.Digits(batch_size=100, train_size=400)
    model = gen_price.fitted(gen_price.built.VAE(data.example_shape, 2), data, 4)
    found = gen_price.encoded(model, data.held_out)
    images = data.held_out[torch.arange(len(data.held_out))][0]
    with torch.no_grad():
        assert found.error == pytest.approx(float((model.decode(found.codes) - images).square().mean()), rel=1e-5)
        assert not torch.equal(found.codes, model.encode(images))  # samples, no means


def test_unseen_images_are_those_of_the_file_that_are_not_trained_on(gen_price):
    data = gen_price.Digits(batch_size=100, train_size=1000)
    whole = data.load()[0]
    sets = [data.training, gen_price.not_trained_on(data, 300), gen_price.not_trained_on(data, 300, skipped=300)]
    assert [len(images) for images in sets] == [1000, 300, len(whole) - 1300]  # those that are left
    images = torch.cat([part.examples for part in sets])
    assert torch.equal(images.flatten(1).double().sum(0), whole.examples.flatten(1).double().sum(0))


def test_another_flow_leaves_the_encoder_and_the_error(gen_price):
    data = gen_price.Digits(batch_size=100, train_size=300)
    torch.manual_seed(0)
    plain = gen_price.with_flow(0.1)(data, 2, 3)(data.held_out)
    torch.manual_seed(0)
    other = gen_price.with_another_flow(0.1)(data, 2, 3)(data.held_out)
    assert other.error == pytest.approx(plain.error, rel=1e-4)
    assert not torch.allclose(other.codes, plain.codes)
    few = gen_price.Digits(batch_size=100, train_size=1000)
    with pytest.raises(ValueError, match=r"another flow needs 1000 more images, got 79"):
        gen_price.with_another_flow(0.1)(few, 2, 3)


@pytest.mark.pictures
def test_quick_run_and_its_record(gen_price, tmp_path, capsys):
    record, picture = tmp_path / "quick.csv", tmp_path / "quick.png"
    rows = ["AE", "GEN, weight 1", "AE, then a flow", "VAE, flow, s^2 = 0.1"]
    command = ["--quick", "--csv", str(record), "--figure", str(picture), "--rows", *rows]
    assert gen_price.main(command) == 0
    out = capsys.readouterr().out
    with record.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["row"], row["codes"]) for row in found] == [(r, part) for r in rows for part in gen_price.PARTS]
    bar, flow = found[0], found[6]
    assert float(flow["error"]) == pytest.approx(float(bar["error"]), rel=1e-3)  # the same AE, and nothing is lost
    assert "100% / 100% / 100%" in out.split("AE, then a flow")[-1].splitlines()[0]
    assert picture.stat().st_size > 10_000

    # A second call takes its rows from the record, and another seed is added to it.
    kept = record.read_text()
    assert gen_price.main(command) == 0 and record.read_text() == kept
    assert capsys.readouterr().out.splitlines() == out.splitlines()[4:]
    assert gen_price.main(["--quick", "--csv", str(record), "--rows", "AE", "--seeds", "0", "1"]) == 0
    assert record.read_text().startswith(kept) and len(record.read_text().splitlines()) == 1 + 5 * 3
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("AE  "))
    assert line.split()[1] == "2"


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (["--rows", "AAE"], "got AAE"),
        ([], "--data DIR is needed"),
        (["--data", "DIR", "--steps", "200", "250"], "multiples of an epoch's 100, got 250"),
    ],
)
def test_bad_options(gen_price, monkeypatch, capsys, command, text):
    monkeypatch.delenv("KDEJSD_DATA", raising=False)
    with pytest.raises(SystemExit):
        gen_price.main(command)
    assert text in capsys.readouterr().err
