"""The study of the ways to keep lagged codes up to date: a quick run that goes on, and the encoder of slow weights."""

import csv
import sys
from pathlib import Path

import pytest
import torch

PAPERS = Path(__file__).resolve().parent.parent / "bench" / "papers"

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*GPU")


@pytest.fixture(scope="module")
def gen_refresh():
    sys.path.insert(0, str(PAPERS))
    import gen_refresh

    return gen_refresh


def test_a_quick_run_goes_on_and_shows_the_lag_of_each_way(gen_refresh, tmp_path, capsys):
    table, picture = tmp_path / "refresh.csv", tmp_path / "lag.png"
    options = ["--quick", "--steps", "30", "--csv", str(table), "--rows"]
    assert gen_refresh.main([*options, "full", "queue"]) == 0
    first = table.read_text()
    assert gen_refresh.main([*options, "full", "queue", "tracked", "--figure", str(picture)]) == 0
    assert table.read_text().startswith(first)
    out = capsys.readouterr().out
    assert out.count("'full', 0): ") == 1 and out.count("'tracked', 0): ") == 1
    assert picture.stat().st_size > 5000
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["row"], row["codes"]) for row in rows] == [
        (name, part) for name in ("full", "queue", "tracked") for part in ("training", "held-out")
    ]
    assert all(0 < float(row["error"]) < 0.2 and float(row["jsd"]) < 0.7 for row in rows)
    with (tmp_path / "refresh_lag.csv").open(newline="") as file:
        lags = list(csv.DictReader(file))
    assert {int(row["step"]) for row in lags} == {5, 15, 25}
    last = {row["row"]: float(row["lag"]) for row in lags if row["step"] == "25"}
    assert 0 < last["tracked"] < last["queue"]


def test_the_momentum_encoder_fills_the_queue_with_its_own_codes(gen_refresh):
    model = gen_refresh.MomentumGEN((1, 8, 8), 2, num_lagged=50, refresh="queue")
    data = gen_refresh.Digits(batch_size=25, train_size=50)
    gen_refresh.quiet_trainer(max_epochs=3).fit(model, datamodule=data)
    slow, fast = (torch.cat([p.flatten() for p in net.parameters()]) for net in (model.slow, model.encoder))
    assert 0 < (slow - fast).norm() < 0.5 * fast.norm()
    assert not [name for name in model.state_dict() if name.startswith("slow")]
    with torch.no_grad(), gen_refresh.evaluating(model.encoder, model.norm):
        examples = data.training[model.lagged.indices][0]
        far = [(model.norm(net(examples)) - model.lagged.codes).norm() for net in (model.slow, model.encoder)]
    assert far[0] < far[1]
