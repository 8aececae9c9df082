"""Reports: every measure is explained, the page stands alone; pictures and results on boards."""

import base64
import itertools
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from helpers import generator, points
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
from test_gen import assert_same_state

from kdejsd.data import Digits, ExampleData, ExampleSet, Grid2D, Table
from kdejsd.models import built
from kdejsd.runs import boards, pictures, rows
from kdejsd.runs.boards import RunPictures
from kdejsd.runs.measures import MEASURES, explained
from kdejsd.runs.report import AutoencoderReport, write_report

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec", "ignore:.*GPU available but not used"
)

GEN = {"num_lagged": 100, "bandwidth": 0.4}


class Rows(ExampleData):
    """Examples that are no images: 240 of them, correlated, in units of their own; the last value never changes."""

    example_shape = (13,)
    factor, shift = 1000.0, 5.0

    def load(self):
        size = math.prod(self.example_shape)
        values = points(240, 1, dtype=torch.float32) + points(240, size, dtype=torch.float32, seed=1)
        if size > 1:
            values[:, -1] = 0.5
        return self._split(ExampleSet(values.reshape(240, *self.example_shape), torch.arange(240) % 2), 0.25)

    @property
    def columns(self):
        return [f"column {number}" for number in super().columns]

    def restored(self, examples):
        return self.factor * examples + self.shift


class OneColumn(Rows):
    example_shape = (1,)


class Matrices(Rows):
    example_shape = (7, 5)


class TwoChannels(Rows):
    """Of as many dimensions as images, and none that a picture shows as such."""

    example_shape = (2, 8, 8)


def data(kind: type) -> ExampleData:
    return Grid2D(num_samples=500) if kind is Grid2D else kind(train_size=100 if issubclass(kind, Rows) else 200)


def make(kind: str, of: type = Digits, **options):
    pl.seed_everything(0, verbose=False)
    return getattr(built, kind)(of.example_shape, **(GEN if "GEN" in kind else {}) | options)


def train(model, *, of: type = Digits, epochs: int = 1, logger: object = False, callbacks=()) -> pl.Trainer:
    trainer = pl.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=logger,
        callbacks=list(callbacks),
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    )
    trainer.fit(model, datamodule=data(of))
    return trainer


def flat(values: dict, prefix: str = "") -> dict:
    found = {}
    for key, value in values.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found


class Page(HTMLParser):
    """The words of a page, its pictures, and whatever would be fetched."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.words, self.pictures, self.tags = "", [], set()
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        names = dict(attributes)
        assert not names.keys() & {"href", "onclick", "onload", "srcset"}
        if tag == "img":
            kind, _, content = names["src"].partition(",")
            assert kind == "data:image/png;base64"
            self.pictures.append(base64.b64decode(content))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.words += data


REPORTS = {
    "GEN": ("GEN", Digits, {}),
    "stochastic GEN": ("StochasticGEN", Digits, {"latent_dim": 3}),
    "VAE": ("VAE", Digits, {"latent_dim": 12}),
    "GAN": ("GAN", Digits, {}),
    "GAN of points": ("GAN", Grid2D, {}),
    "GEN of points": ("GEN", Grid2D, {}),
    "GEN of rows": ("GEN", Rows, {"latent_dim": 3}),
    "VAE of one column": ("VAE", OneColumn, {"latent_dim": 1}),
    "AE of matrices": ("AE", Matrices, {"latent_dim": 5}),
    "AE of two channels": ("AE", TwoChannels, {}),
}


@pytest.mark.parametrize("name", REPORTS)
def test_every_measure_of_a_report_is_explained_and_shown(tmp_path, name):
    kind, of, options = REPORTS[name]
    model = make(kind, of, **options)
    train(model, of=of)
    table = write_report(tmp_path, model, data(of), {"epochs": 1, "seed": 0, **model.run_measures()})
    assert max(map(len, table.splitlines())) <= 80
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert not page.open and not page.tags & {"script", "link", "iframe"}
    assert sorted(page.pictures) == sorted(path.read_bytes() for path in tmp_path.glob("*.png"))
    for part, prefix in (("held_out", ""), ("samples", "samples."), ("diversity", "diversity."), ("run", "run.")):
        measures = {key: value for key, value in numbers.get(part, {}).items() if key != "columns"}
        for key, value in flat(measures, prefix).items():
            if (value is None and part == "diversity") or ".versions." in key:
                continue
            assert key in MEASURES, key
            if part != "run":
                assert explained(key).meaning in page.words and explained(key).aim in page.words, key
    shown = numbers["held_out"]["divergence" if kind == "GAN" else "jsd"]
    assert f"{shown:.4g}" in page.words and f"{shown:.4g}" in table
    assert page.words.index("held-out") < page.words.index("training")
    assert f"{kind} on {of.__name__}" in page.words and numbers["run"]["versions"]["torch"] in page.words
    assert "kdejsd.load" not in page.words  # nothing was saved
    of_rows = len(of.example_shape) != 3 or of is TwoChannels
    assert ("sliced_wasserstein" in numbers.get("samples", {})) is of_rows
    assert ("columns" in numbers["held_out"]) is (of_rows and kind != "GAN")
    for column, values in numbers["held_out"].get("columns", {}).items():
        assert column in page.words and f"{values['error']:.4g}" in page.words


def test_columns_are_measured_in_the_units_of_the_data():
    held_out = Rows().held_out
    model = make("AE", Rows)
    noise = points(len(held_out), 13, dtype=torch.float32, seed=2) * torch.linspace(0, 1, 13)
    model.decode = lambda codes: held_out.examples + noise
    found = rows.column_measures(model, Rows(), held_out, torch.zeros(len(held_out), 2))
    values = list(found["columns"].values())
    errors = (Rows.factor * noise.double().square().mean(0).sqrt()).tolist()
    assert [value["error"] for value in values] == pytest.approx(errors, rel=1e-3)
    variance = held_out.examples.double().var(0, correction=0)
    shares = (1 - noise.double().square().mean(0) / variance)[:-1].tolist()
    assert [value["variance_explained"] for value in values[:-1]] == pytest.approx(shares, abs=1e-3)
    assert math.isnan(values[-1]["variance_explained"])  # which never changes
    assert found["variance_explained_least"] == pytest.approx(min(shares), abs=1e-3)
    together = 1 - noise.double().square().mean(0).sum() / variance.sum()
    assert found["variance_explained"] == pytest.approx(float(together), abs=1e-6)
    model.decode = lambda codes: torch.zeros(len(codes), 13)
    one = rows.column_measures(model, Rows(), held_out.subset(torch.tensor([0])), torch.zeros(1, 2))
    assert math.isnan(one["variance_explained"]) and math.isnan(one["variance_explained_least"])


def test_generated_rows_are_compared_with_held_out_ones():
    of, rng = Rows(), generator(3)
    own = points(1000, 1, dtype=torch.float32, seed=5) + torch.randn(1000, 13, generator=rng)
    own[:, -1] = 0.5  # the law of the rows
    found, far = (rows.two_sample_measures(of, samples) for samples in (own, own + 3))
    assert found["two_sample_count"] == len(of.held_out) == 60
    assert abs(found["two_sample_accuracy"] - 0.5) < 3 * found["two_sample_standard_error"]
    assert far["two_sample_accuracy"] > 0.9 and far["sliced_wasserstein"] > 2 > 2 * found["sliced_wasserstein"]
    assert far["sliced_wasserstein_of_training"] == found["sliced_wasserstein_of_training"] < 1
    own[0, 0] = math.nan
    strange = rows.two_sample_measures(of, own)
    assert math.isnan(strange["two_sample_accuracy"]) and math.isnan(strange["sliced_wasserstein"])
    assert strange["two_sample_accuracy_of_training"] == found["two_sample_accuracy_of_training"]
    assert rows.two_sample_measures(of, own[:4]) == {}


def test_a_report_of_a_broken_model_of_rows_is_written(tmp_path):
    model = make("GAN", Rows)
    model.sample = lambda n, rng=None: torch.full((n, 13), math.nan)
    write_report(tmp_path, model, Rows(), {})
    numbers = json.loads((tmp_path / "metrics.json").read_text())
    assert numbers["samples"]["sliced_wasserstein"] is None and (tmp_path / "samples.png").stat().st_size > 10_000
    assert (
        "1000 of the generated are not finite"
        in pictures.draw(Rows(), model.sample(1000)).legends[0].get_title().get_text()
    )


def test_words_for_measures_are_sentences_that_fit_the_table():
    for measure in MEASURES.values():
        assert len(measure.label) <= 48
        for sentence in (measure.meaning, measure.aim):
            assert re.fullmatch(r"([A-Z0-9].*[.])?", sentence)
    assert explained("some.new_thing").label == "new thing"


@pytest.mark.parametrize(
    ("of", "form"), [(Digits, "with pixels from 0 to 1"), (Rows, "in the units that <i>Data gives")]
)
def test_the_page_says_how_to_go_on_and_takes_nothing_for_html(tmp_path, of, form):
    folder = tmp_path / "a run <b>"
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "checkpoints/last.ckpt").touch()
    (folder / "config.yaml").write_text("note: </pre><script>alert(1)</script>\n")
    strange = type(
        "<i>Data", (of,), {"columns": property(lambda self: [f"<b>{name}" for name in Digits.columns.fget(self)])}
    )
    model = make("AE", of, learning_rate=0.125)
    write_report(folder, model, strange(train_size=100), {"note": "<u>&amp;"})
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    assert not page.tags & {"b", "i", "u", "script"} and "note: </pre><script>alert(1)</script>" in page.words
    assert "AE on <i>Data" in page.words and "<u>&amp;" in page.words and "0.125" in page.words
    assert f"kdejsd fit --ckpt_path '{folder}'" in page.words
    code = re.search(r"import torch\n.*?new examples", page.words, re.DOTALL)[0]
    load = f"kdejsd.load({str(folder)!r})"
    values = {"loaded": model}
    exec(code.replace(load, "loaded"), values)
    assert load in code and form in code
    assert values["codes"].shape == (10, 2) and values["samples"].shape == (100, *of.example_shape)


def test_the_page_brings_the_samples_of_a_table_into_their_units(tmp_path):
    table = 1000 + points(60, 3).numpy()
    np.savetxt(tmp_path / "table.csv", table, delimiter=",", header="a,b,c", comments="")
    model = built.AE((3,), latent_dim=2)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints/last.ckpt").touch()
    write_report(tmp_path, model, Table(str(tmp_path / "table.csv"), batch_size=10), {})
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    code = re.search(r"import torch\n.*?new examples", page.words, re.DOTALL)[0]
    assert f"data = kdejsd.data.Table(batch_size=10, path='{tmp_path / 'table.csv'}')\n" in code
    values = {"loaded": model}
    exec(code.replace(f"kdejsd.load({str(tmp_path)!r})", "loaded"), values)
    assert values["codes"].shape == (len(values["data"].held_out), 2)
    assert values["samples"].shape == (100, 3) and (values["samples"] - 1000).abs().max() < 10


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), {"images": 0, "scalars": 0}).Reload()


@pytest.mark.parametrize(
    ("kind", "of", "pictures"),
    [
        ("GEN", Digits, {"latent", "reconstructions", "samples"}),
        ("GAN", Grid2D, {"samples"}),
    ],
)
def test_a_board_has_pictures_while_they_cost_little_and_at_the_end(tmp_path, monkeypatch, kind, of, pictures):
    clock = itertools.count()  # a second passes at each look: every set of pictures takes one
    monkeypatch.setattr(boards, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    monkeypatch.setattr(boards, "_SHARE", 0.25)
    model, board = make(kind, of), TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    trainer = train(model, of=of, epochs=14, logger=board, callbacks=[RunPictures()])
    assert trainer.global_step == 28
    found = events(tmp_path)
    assert set(found.Tags()["images"]) == {f"pictures/{name}" for name in pictures}
    for name in pictures:
        # 2 steps are an epoch. The second look is the first that can pay; then each fourth second does, and a
        # picture of a step must be followed by a quarter more steps.
        assert [event.step for event in found.Images(f"pictures/{name}")] == [4, 12, 18, 26, 28]


def test_pictures_have_the_names_of_the_classes(tmp_path, monkeypatch):
    named = Rows()
    named.class_names = ["low", "high"]
    model = make("AE", Rows)
    latent = RunPictures._figures(model, named)["latent"]
    assert [text.get_text() for text in latent.axes[0].get_legend().get_texts()] == ["low", "high"]

    def names_of_regions(folder, count):
        """Of those that a classifier of so many classes sees."""
        regions = []
        monkeypatch.setattr(AutoencoderReport, "classes", lambda report, classifier, names: regions.append(names))
        monkeypatch.setattr("kdejsd.runs.report._png", lambda figure: b"")
        folder.mkdir()
        write_report(folder, model, named, {}, lambda rows: rows[:, :count])
        return regions

    assert names_of_regions(tmp_path / "own", 2) == [["low", "high"]]
    assert names_of_regions(tmp_path / "other", 3) == [()]  # which are not those of the data


def test_a_board_has_pictures_of_rows():
    drawn = RunPictures._figures(make("AE", Rows), Rows())
    assert list(drawn) == ["latent", "reconstructions", "samples"]
    assert drawn["samples"].legends[0].get_title().get_text() == "The 12 of 13 columns that differ the most"


def test_a_board_has_the_settings_with_the_results(tmp_path):
    board = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    trainer = train(make("GEN", weight=0.7), logger=board, callbacks=[RunPictures()])
    found = events(tmp_path)
    scalars = found.Tags()["scalars"]
    assert {"result/jsd", "result/reconstruction", "val/jsd"} <= set(scalars) and "hp_metric" not in scalars
    assert found.Scalars("result/jsd")[0].value == pytest.approx(float(trainer.callback_metrics["val/jsd"]))
    assert len(found.Scalars("val/jsd")) == 1  # the result is not a point of the curve
    content = found.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    settings = HParamsPluginData.FromString(content).session_start_info.hparams
    assert settings["weight"].number_value == 0.7 and settings["data/name"].string_value == "Digits"
    assert settings["data/train_size"].number_value == 200 and settings["model"].string_value == "GEN"


def test_pictures_change_nothing_of_the_run_and_need_no_board(tmp_path):
    models = [make("StochasticGEN") for _ in range(3)]
    loggers = (False, TensorBoardLogger(tmp_path / "board"), CSVLogger(tmp_path / "csv"))
    for model, logger in zip(models, loggers, strict=True):
        pl.seed_everything(0, verbose=False)
        train(model, epochs=2, logger=logger, callbacks=[EveryTime()] if logger else [])
    for model in models[1:]:
        assert_same_state(model, models[0])
    assert not list((tmp_path / "csv").rglob("*.png"))


class Undrawn(Digits):
    """A set that wants to draw its examples in a way that nobody asks for."""

    def draw(self, examples):
        raise AssertionError


def test_a_run_whose_examples_cannot_be_drawn_goes_on(tmp_path):
    board = TensorBoardLogger(tmp_path, name="", version="", default_hp_metric=False)
    model = make("AE", Undrawn)
    with pytest.warns(UserWarning, match=r"no pictures on its board: Undrawn.draw is not asked for pictures"):
        trainer = train(model, of=Undrawn, epochs=2, logger=board, callbacks=[EveryTime()])
    assert trainer.global_step == 4
    tags = events(tmp_path).Tags()
    assert not tags["images"] and "result/jsd" in tags["scalars"]


class EveryTime(RunPictures):
    """Draws after every validation."""

    def on_validation_end(self, trainer, pl_module):
        self._draw(trainer, pl_module)
