"""Writes the report of a trained model: a folder with a page, its measures and pictures."""

from __future__ import annotations

import io
import json
import math
import platform
import sys
import textwrap
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from .. import plots
from .._extras import train_extra
from .._modes import Map
from .._version import __version__
from ..data import ExampleData
from ..diversity.report import diversity_report
from ..drawing import are_images
from ..models import GAN, Autoencoder, GenerativeModel
from .measures import Measure, explained
from .measuring import Encoded, code_measures, divergence_measures, encode_set
from .page import shown, write_page
from .pictures import pictures, sample_count
from .rows import column_measures, two_sample_measures

with train_extra():
    from matplotlib.figure import Figure

__all__ = ["write_report"]

Model = TypeVar("Model", bound=GenerativeModel)
Measures = dict[str, Any]

_WIDTH = 80  # columns of a terminal


def write_report(
    folder: Path, model: GenerativeModel, data: ExampleData, run: Mapping[str, Any], classifier: Map | None = None
) -> str:
    """Writes the report of a trained model: measures of held-out and training examples, pictures, and a page of both.

    It writes into the folder metrics.json, in which numbers that are not finite are null, and samples.png. For
    autoencoders it also writes latent.png and reconstructions.png, and with a classifier and 2-D latents classes.png.
    The page report.html has all of them, explains each measure and the value it should have, and lists the settings and
    the next steps.

    Args:
        folder: an existing folder.
        model: the trained model.
        data: its examples.
        run: further facts about the run, which are written down with the measures.
        classifier: examples [n, ...] -> logits [n, K], for the diversity of the examples that the model makes; None
            takes the examples' own classifier, if there is one.

    Returns:
        The main numbers as a table of at most 80 columns.

    Example:
        >>> import os, tempfile
        >>> from pathlib import Path
        >>> from kdejsd.data import Digits
        >>> from kdejsd.models import FC
        >>> from kdejsd.models.built import GAN
        >>> from kdejsd.runs.report import write_report
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = GAN((1, 8, 8), network=lambda shape, dim: FC(shape, dim, hidden=[16]))
        ...     table = write_report(Path(folder), model, Digits(train_size=200), run={"epochs": 0})
        ...     sorted(os.listdir(folder))
        ['metrics.json', 'report.html', 'samples.png']
        >>> print(table.splitlines()[1])
        examples                                                       359             200
    """
    report: Report[Any]
    if isinstance(model, Autoencoder):
        report = AutoencoderReport(model, data)
    elif isinstance(model, GAN):
        report = GANReport(model, data)
    else:
        report = Report(model, data)
    numbers = {**report.measures, "model": model.settings(), "run": {**run, "versions": _versions()}}
    figures, text, notes = report.pictures(), report.table(), []

    classifier = data.classifier() if classifier is None else classifier
    strange = int((~report.samples.isfinite()).flatten(1).any(1).sum())
    if classifier is not None and strange:
        notes.append(f"no diversity: {strange} of {len(report.samples)} samples are not finite")
    elif classifier is not None:
        diversity = diversity_report(
            model.generator,
            classifier,
            model.latent_dim,
            codes=None if report.training is None else report.training.codes,
            target=model.target,
            progress=_tell_progress,
        )
        numbers["diversity"] = diversity.as_dict()
        text += f"\n\n{_wrapped(str(diversity))}"
        if model.latent_dim == 2:
            named = diversity.num_classes == len(data.class_names)  # otherwise it knows other classes
            figures["classes"] = report.classes(classifier, data.class_names if named else ())

    numbers = _finite(numbers)
    (folder / "metrics.json").write_text(json.dumps(numbers, indent=2) + "\n")
    drawn = {name: _png(figure) for name, figure in figures.items()}
    for name, picture in drawn.items():
        (folder / f"{name}.png").write_bytes(picture)
    write_page(folder / "report.html", model, data, numbers, report.explained, report.main, drawn, notes)
    return "\n\n".join([text, *notes])


class Report(Generic[Model]):
    """Measures and draws the samples of a model, of any kind.

    Attributes:
        samples: [n, ...], generated.
        measures: the measures by part: of the "held_out" and "training" examples, and of the "samples", where there are
            any.
        training: the training examples with their codes, None for a model without an encoder.
    """

    training: Encoded | None = None

    def __init__(self, model: Model, data: ExampleData) -> None:
        self.model = model
        self.data = data
        self.samples = model.sample(sample_count(data), torch.Generator().manual_seed(0))
        self.measures: dict[str, Measures] = self.set_measures()
        of_samples = data.sample_measures(self.samples)
        if not are_images(data):
            of_samples |= two_sample_measures(data, self.samples)
        if of_samples:
            self.measures["samples"] = {"count": len(self.samples), **of_samples}

    def set_measures(self) -> dict[str, Measures]:
        """Returns the measures of the "held_out" and the "training" examples."""
        return {}

    @property
    def main(self) -> list[str]:
        """Returns the measures of examples that the table shows, by their places in `set_measures`."""
        return []

    def explained(self, key: str) -> Measure:
        """Returns the words for a measure by its place in metrics.json."""
        return explained(key)

    def table(self) -> str:
        """Returns the main numbers of held-out and training examples, and those of the samples."""
        columns = [self.measures[part] for part in ("held_out", "training") if part in self.measures]
        lines = [f"{'':48}{'held-out':>16}{'training':>16}"] if columns else []
        for key in self.main:
            cells = "".join(f"{shown(_looked_up(column, key)):>16}" for column in columns)
            lines.append(f"{self.explained(key).label:48}{cells}")
        for key, value in self.measures.get("samples", {}).items():
            label = self.explained(f"samples.{key}").label
            lines.append(f"{label if label.startswith(' ') else f'samples: {label}':48}{shown(value):>16}")
        return "\n".join(lines)

    def pictures(self) -> dict[str, Figure]:
        """Returns the pictures by the names of their files."""
        return pictures(self.model, self.data, self.samples)

    def classes(self, classifier: Map, names: Sequence[object]) -> Figure:
        """Draws the regions of a 2-D latent space from which each class is made."""
        return plots.latent_classes(self.model.generator, classifier, target=self.model.target, names=names)


class AutoencoderReport(Report[Autoencoder]):
    """Adds the reconstructions, and measures of how well the codes follow the target."""

    def set_measures(self) -> dict[str, Measures]:
        self.held_out = encode_set(self.model, self.data.held_out)
        self.training = encode_set(self.model, self.data.training)
        measures = {
            "held_out": code_measures(self.model, self.held_out, training=False),
            "training": code_measures(self.model, self.training, training=True),
        }
        if not are_images(self.data):
            for part, examples, encoded in (
                ("held_out", self.data.held_out, self.held_out),
                ("training", self.data.training, self.training),
            ):
                measures[part] |= column_measures(self.model, self.data, examples, encoded.codes)
        return measures

    @property
    def main(self) -> list[str]:
        main = ["count", "reconstruction_error"]
        if "columns" in self.measures["held_out"]:
            main += ["variance_explained", "variance_explained_least"]
        main += ["jsd", "jsd_of_target", "entropy", "entropy_of_normal"]
        if "gradient_weight" in self.measures["held_out"]:
            main += ["latent_term", "latent_term_of_target", "gradient_weight"]
        if "posterior" in self.measures["held_out"]:
            main += [f"posterior.{key}" for key in ("jsd", "jsd_of_target", "entropy", "entropy_of_normal")]
        return main

    def pictures(self) -> dict[str, Figure]:
        return pictures(self.model, self.data, self.samples, self.held_out)

    def classes(self, classifier: Map, names: Sequence[object]) -> Figure:
        codes, labels = self.held_out.codes, self.held_out.labels
        return plots.latent_classes(
            self.model.generator, classifier, codes=codes, labels=labels, target=self.model.target, names=names
        )


class GANReport(Report[GAN]):
    """Adds the divergence that the discriminator estimates.

    If it is larger for training examples than for held-out ones, the discriminator has learnt training examples by
    heart.
    """

    def set_measures(self) -> dict[str, Measures]:
        return {
            "held_out": divergence_measures(self.model, self.data.held_out),
            "training": divergence_measures(self.model, self.data.training),
        }

    @property
    def main(self) -> list[str]:
        return ["count", "divergence"]

    def explained(self, key: str) -> Measure:
        words = super().explained(key)
        return words._replace(label=self.model.divergence_name) if key == "divergence" else words


def _looked_up(measures: Measures, key: str) -> Any:
    for part in key.split("."):
        measures = measures[part]
    return measures


def _wrapped(text: str) -> str:
    """Returns the text in lines that a terminal holds; the rest of a long line stands indented below it."""
    lines = [
        textwrap.fill(line, _WIDTH, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False)
        for line in text.splitlines()
    ]
    return "\n".join(lines)


def _png(figure: Figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def _tell_progress(done: int, total: int) -> None:
    start, end = ("\r", "\n" if done == total else "") if sys.stderr.isatty() else ("", "\n")
    print(f"{start}class radius: {done} of {total} samples", end=end, file=sys.stderr, flush=True)


def _versions() -> dict[str, str]:
    return {
        "kdejsd": __version__,
        "torch": torch.__version__,
        "lightning": version("lightning"),
        "python": platform.python_version(),
    }


def _finite(value: Any) -> Any:
    """Returns the value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
