"""Writes the report of a trained model: a folder with its measures and pictures."""

from __future__ import annotations

import json
import math
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch

from .. import plots
from .._extras import train_extra
from .._modes import Map, evaluating
from .._version import __version__
from ..data import ImageData
from ..diversity.report import diversity_report
from ..drawing import draw, draw_reconstructions
from ..metrics import Encoded, code_measures, divergence_measures, encode_set
from ..models import GAN, Autoencoder, GenerativeModel

with train_extra():
    from matplotlib.figure import Figure

__all__ = ["write_report"]

Model = TypeVar("Model", bound=GenerativeModel)
Measures = dict[str, Any]


def write_report(
    folder: Path, model: GenerativeModel, data: ImageData, run: Mapping[str, Any], classifier: Map | None = None
) -> str:
    """Measures the model on the held-out images and on those it was trained on, and draws its pictures.

    It writes metrics.json, in which numbers that are not finite are null, and samples.png into the folder; for
    autoencoders also latent.png and reconstructions.png, and with a classifier and 2-D latents classes.png.

    Args:
        folder: an existing folder.
        model: the trained model.
        data: its images.
        run: further facts about the run, which are written down with the measures.
        classifier: images [n, C, H, W] -> logits [n, K], for the diversity of the images that the model makes; None
            takes the images' own classifier, if there is one.

    Returns:
        The main numbers as a table.

    Example:
        >>> import os, tempfile
        >>> from pathlib import Path
        >>> from kdejsd.data import Digits
        >>> from kdejsd.models import FC
        >>> from kdejsd.models.images import GAN
        >>> from kdejsd.runs.report import write_report
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     model = GAN((1, 8, 8), network=lambda shape, dim: FC(shape, dim, hidden=[16]))
        ...     table = write_report(Path(folder), model, Digits(train_size=200), run={"epochs": 0})
        ...     sorted(os.listdir(folder))
        ['metrics.json', 'samples.png']
        >>> print(table.splitlines()[1])
        images                                                           359                     200
    """
    report: Report[Any]
    if isinstance(model, Autoencoder):
        report = AutoencoderReport(model, data)
    elif isinstance(model, GAN):
        report = GANReport(model, data)
    else:
        report = Report(model, data)
    numbers = {**report.measures, "model": model.settings(), "run": {**run, "versions": _versions()}}
    text, pictures = report.table(), report.pictures()

    classifier = data.classifier() if classifier is None else classifier
    strange = int((~report.samples.isfinite()).flatten(1).any(1).sum())
    if classifier is not None and strange:
        text += f"\n\nno diversity: {strange} of {len(report.samples)} samples are not finite"
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
        text += f"\n\n{diversity}"
        if model.latent_dim == 2:
            pictures["classes"] = report.classes(classifier)

    (folder / "metrics.json").write_text(json.dumps(_finite(numbers), indent=2) + "\n")
    for name, figure in pictures.items():
        figure.savefig(folder / f"{name}.png")
    return text


class Report(Generic[Model]):
    """Measures and draws the samples of a model, of any kind.

    Attributes:
        samples: [n, C, H, W], generated.
        measures: the measures by part: of the "held_out" and "training" images, and of the "samples", where there are
            any.
        training: the training images with their codes, None for a model without an encoder.
    """

    training: Encoded | None = None

    def __init__(self, model: Model, data: ImageData) -> None:
        self.model = model
        self.data = data
        self.samples = model.sample(data.report_samples, torch.Generator().manual_seed(0))
        self.measures: dict[str, Measures] = self.image_measures()
        of_samples = data.sample_measures(self.samples)
        if of_samples:
            self.measures["samples"] = {"count": len(self.samples), **of_samples}

    def image_measures(self) -> dict[str, Measures]:
        """Returns the measures of the "held_out" and the "training" images."""
        return {}

    def rows(self) -> list[tuple[str, tuple[str, ...]]]:
        """Returns for each row of the table its name and the measures of the images that it shows."""
        return []

    def table(self) -> str:
        """Returns the main numbers of held-out and training images, and those of the samples."""
        columns = [self.measures[part] for part in ("held_out", "training") if part in self.measures]
        lines = []
        if columns:
            lines += [
                " " * 44 + f"{'held-out':>24}{'training':>24}",
                f"{'images':44}" + "".join(f"{column['count']:>24}" for column in columns),
            ]
        for name, keys in self.rows():
            cells = [" / ".join(_shown(_looked_up(column, key)) for key in keys) for column in columns]
            lines.append(f"{name:44}" + "".join(f"{cell:>24}" for cell in cells))
        for key, value in self.measures.get("samples", {}).items():
            lines.append(f"{'samples: ' + key.replace('_', ' '):44}{_shown(value):>24}")
        return "\n".join(lines)

    def pictures(self) -> dict[str, Figure]:
        """Returns the pictures by the names of their files."""
        return {"samples": draw(self.data, self.samples)}

    def classes(self, classifier: Map) -> Figure:
        """Draws the regions of a 2-D latent space from which each class is made."""
        return plots.latent_classes(self.model.generator, classifier, target=self.model.target)


class AutoencoderReport(Report[Autoencoder]):
    """Adds the reconstructions, and measures of how well the codes follow the target."""

    def image_measures(self) -> dict[str, Measures]:
        self.held_out = encode_set(self.model, self.data.held_out)
        self.training = encode_set(self.model, self.data.training)
        return {
            "held_out": code_measures(self.model, self.held_out, training=False),
            "training": code_measures(self.model, self.training, training=True),
        }

    def rows(self) -> list[tuple[str, tuple[str, ...]]]:
        rows = [
            ("reconstruction error per pixel", ("reconstruction_error",)),
            ("JSD, nats / of the target's own samples", ("jsd", "jsd_of_target")),
            ("entropy of whitened codes / normal samples", ("entropy", "entropy_of_normal")),
        ]
        if "gradient_weight" in self.measures["held_out"]:
            rows.append(("1 - r (0.5 where the codes match)", ("gradient_weight",)))
        if "posterior" in self.measures["held_out"]:
            rows += [
                ("samples of the posterior: JSD / of target's", ("posterior.jsd", "posterior.jsd_of_target")),
                ("samples of the posterior: entropy / normal", ("posterior.entropy", "posterior.entropy_of_normal")),
            ]
        return rows

    def pictures(self) -> dict[str, Figure]:
        images = self.data.held_out[torch.arange(min(self.data.report_samples, len(self.data.held_out)))][0]
        with torch.no_grad(), evaluating(self.model):
            reconstructions = self.model.reconstruct(images.to(self.model.device)).cpu()
        return {
            "latent": plots.latent(self.held_out.codes, self.held_out.labels, self.model.target),
            "reconstructions": draw_reconstructions(self.data, images, reconstructions),
            **super().pictures(),
        }

    def classes(self, classifier: Map) -> Figure:
        codes, labels = self.held_out.codes, self.held_out.labels
        return plots.latent_classes(
            self.model.generator, classifier, codes=codes, labels=labels, target=self.model.target
        )


class GANReport(Report[GAN]):
    """Adds the divergence as the discriminator sees it.

    That of training images exceeds that of held-out ones by as much as the discriminator has learnt by heart.
    """

    def image_measures(self) -> dict[str, Measures]:
        return {
            "held_out": divergence_measures(self.model, self.data.held_out),
            "training": divergence_measures(self.model, self.data.training),
        }

    def rows(self) -> list[tuple[str, tuple[str, ...]]]:
        return [(self.model.divergence_name, ("divergence",))]


def _looked_up(measures: Measures, key: str) -> Any:
    for part in key.split("."):
        measures = measures[part]
    return measures


def _shown(value: float | None) -> str:
    return "none" if value is None else str(value) if isinstance(value, int) else f"{value:.4g}"


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
