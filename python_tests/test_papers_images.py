"""The scripts and configurations of the papers' image experiments run."""

import csv
import json
from pathlib import Path

import matplotlib.image
import pytest
import torch
from helpers import run_here
from test_data import write_celeba, write_mnist, write_svhn

from kdejsd.cli import main

PAPERS = Path(__file__).resolve().parent.parent / "bench" / "papers"


@pytest.mark.parametrize(
    ("name", "write", "latent_dim", "shape"),
    [
        ("mnist", lambda folder: write_mnist(folder, compressed=True), 8, (512, 784)),
        ("svhn", write_svhn, 25, (32, 3, 4, 4)),
        ("celeba", write_celeba, 40, (32, 3, 4, 4)),
    ],
)
def test_configurations(tmp_path, monkeypatch, undrawn, name, write, latent_dim, shape):
    write(tmp_path / "files")
    small = ["--data.batch_size=5", "--model.num_lagged=6", "--model.bandwidth=0.9", "--trainer.max_steps=3"]
    size = ["--data.train_size=20"] if name == "mnist" else []
    config = PAPERS / "configs" / f"{name}.yaml"
    monkeypatch.chdir(tmp_path)
    fit = ["fit", f"--config={config}", "--data.root=files", "--trainer.accelerator=cpu", *small, *size, "--out=run"]
    assert main(fit) == 0
    report = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert report["run"]["steps"] == 3 and report["model"]["latent_dim"] == latent_dim
    state = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    first = next(value for key, value in state["state_dict"].items() if key.startswith("encoder"))
    assert first.shape == shape
    settings = state["hyper_parameters"]
    assert (settings["learning_rate"], tuple(settings["betas"]), settings["refresh_every"]) == (2e-4, (0.5, 0.999), 10)


def test_frechet_table(tmp_path):
    done = run_here(PAPERS / "gen_table3.py", "GEN", "--quick", "--out", tmp_path, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Frechet distance (features: Digits classifier" in done.stdout and "FID" not in done.stdout
    with (tmp_path / "gen_table3.csv").open(newline="") as file:
        floor, *rows = csv.DictReader(file)
    assert floor["model"] == "training images" and 0 < float(floor["distance"]) < 10
    tuning, models = rows[:2], rows[2:]
    assert [(row["part"], row["seed"], row["factor"]) for row in tuning] == [
        ("tuning", "100", "1.0"),
        ("tuning", "100", "0.1"),
    ]
    chosen = min(tuning, key=lambda row: float(row["distance"]))["factor"]
    assert [(row["part"], row["seed"], row["factor"]) for row in models] == [
        ("test", "0", chosen),
        ("test", "1", chosen),
    ]
    assert all(float(row["distance"]) > 3 * float(floor["distance"]) for row in rows)
    near = ("precision", "recall", "density", "coverage")
    assert [float(floor[name]) > 0.85 for name in near] == [True] * 4
    for row in models:
        assert 0 <= float(row["coverage"]) < float(floor["coverage"])
        assert all(0 <= float(row[name]) <= 1 for name in ("precision", "recall"))
    lines = (tmp_path / "gen_table3.csv").read_text()
    again = run_here(PAPERS / "gen_table3.py", "GEN", "--quick", "--out", tmp_path, cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "gen_table3.csv").read_text() == lines  # nothing is trained twice
    assert again.stdout.splitlines()[-1].split("   (")[0] == done.stdout.splitlines()[-1].split("   (")[0]
    assert matplotlib.image.imread(tmp_path / "digits_gen.png").std() > 0.05
    for wrong, text in (
        (["NONE"], "models must be of GEN, StochasticGEN, AAE, VAE, VAE-flow, WAE, got NONE"),
        (["GEN"], "MNIST needs --root"),
    ):
        refused = run_here(PAPERS / "gen_table3.py", *wrong, cwd=tmp_path)
        assert refused.returncode == 2 and text in refused.stderr


def test_semi_supervised(tmp_path, monkeypatch):
    def run():
        done = run_here(PAPERS / "gen_semisupervised.py", "--quick", "--out", tmp_path, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed, record = run(), (tmp_path / "gen_semisupervised.csv").read_text()
    rows = list(csv.DictReader(record.splitlines()))
    apart, own = "other images", "images trained on"
    assert [(row["images"], row["labels"], row["lagged"]) for row in rows] == [
        ("1250", "150", apart),
        ("150", "150", apart),
        ("1250", "0", apart),
        ("1250", "150", own),
    ]
    labelled, alone, unlabelled, of_own = (float(row["accuracy"]) for row in rows)
    assert labelled > 0.55 and labelled > unlabelled > 0.15 and alone > 0.3 and of_own > 0.55
    for row in rows:
        assert 0 < float(row["jsd_of_target"]) < float(row["jsd"]) < 0.69
        name = f"gen_semisupervised_{row['images']}_{row['labels']}{'_own' if row['lagged'] == own else ''}.png"
        assert matplotlib.image.imread(tmp_path / name).std() > 0.05
    again = run()
    assert "epoch" in printed and "epoch" not in again and printed.endswith(again)  # nothing was trained again
    assert (tmp_path / "gen_semisupervised.csv").read_text() == record
    monkeypatch.delenv("KDEJSD_DATA", raising=False)
    refused = run_here(PAPERS / "gen_semisupervised.py", cwd=tmp_path)
    assert refused.returncode == 2 and "--data DIR is needed" in refused.stderr
