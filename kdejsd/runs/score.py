"""Defines `kdejsd score`, which writes how novel each example of a set is."""

from __future__ import annotations

import csv
import sys
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .._extras import train_extra
from ..data import ExampleData, ExampleSet
from ..drawing import draw
from ..models import Autoencoder
from ..novelty import NoveltyScore, novelty_score, residual_variance
from .folders import fresh_folder, run_folder
from .progress import batches
from .saved import data_as_trained, open_checkpoint

with train_extra():
    from jsonargparse import ArgumentParser
    from jsonargparse.typing import PositiveFloat


def score(args: list[str]) -> int:
    """Writes the novelty of each example of a set and prints the most and least likely ones; returns the exit code."""
    parser = ArgumentParser(
        prog="kdejsd score",
        description="Scores how novel each example is to a run's model. Writes a CSV with kdejsd.novelty_score (nats, "
        "higher is more novel), its three parts, the reconstruction error, and the file or the row that the example "
        "comes from. Also writes pictures of the 100 most and the 100 least likely examples, or of the two halves of "
        "fewer.",
        exit_on_error=False,
    )
    parser.add_argument(
        "--split", type=Literal["held_out", "training"], default="held_out", help="The examples to score."
    )
    parser.add_argument(
        "--variance",
        type=PositiveFloat | None,
        help="The residual's variance in each dimension; default: measured on the examples that the run was trained "
        "on. If these have moved, name their new place with --data.",
    )
    parser.add_argument(
        "--out", type=str, metavar="FILE.csv", help="The file; default: scores.csv in a fresh folder of the run."
    )
    config, content, model, data_module, checkpoint = open_checkpoint(parser, args)
    if not isinstance(model, Autoencoder):
        raise ValueError(
            f"RUN must have a model with an encoder, which the density of an example needs, and {config.run} has a "
            f"{type(model).__name__}"
        )
    examples = data_module.held_out if config.split == "held_out" else data_module.training
    variance = config.variance
    if variance is None:
        own = parser.get_defaults()
        trained_on = data_module if own.data == config.data else data_as_trained(parser, own, content)
        moved_to = data_module if own.data.class_path == config.data.class_path else None
        variance = _training_variance(model, trained_on, moved_to)
    if config.out is None:
        path = fresh_folder(None, run_folder(checkpoint) / "score") / "scores.csv"
    else:
        path = Path(config.out)
        if path.exists():
            raise ValueError(f"out must be a new file, and {path} exists")
        path.parent.mkdir(parents=True, exist_ok=True)
    scores = _write_scores(path, model, examples, variance)
    print(f"{len(scores)} examples, mean score {scores.mean():.5g} nats; the residual's variance is {variance:.4g}")
    known = scores.isfinite().nonzero().flatten()
    if len(known) < len(scores):
        print(f"{len(scores) - len(known)} examples have no finite score, and are not among the following")
    order = known[scores[known].argsort()]
    drawn = min(100, max(1, len(order) // 2))  # so that none is among both, unless it is the only one
    for name, chosen in (("most", order[:drawn]), ("least", order.flip(0)[:drawn])):
        first = ", ".join(map(str, examples.sources[chosen[:10].numpy()]))
        encoding = sys.stdout.encoding or "utf-8"
        first = first.encode(encoding, "backslashreplace").decode(encoding)  # the names of files may be in any script
        print(f"{name} likely, by {_source_column(examples)}: {first}")
        if len(chosen):
            draw(data_module, examples[chosen][0], f"{name} likely").savefig(
                path.with_name(f"{path.stem}_{name}_likely.png")
            )
    print(f"scores: {path}")
    return 0


def _training_variance(model: Autoencoder, data: ExampleData, moved_to: ExampleData | None) -> float:
    try:
        examples = data.training
    except FileNotFoundError as error:
        if moved_to is None or moved_to is data:
            raise FileNotFoundError(
                f"the examples that the model was trained on are not there, and the residual's variance is measured on "
                f"them unless --variance gives it: {error}"
            ) from error
        examples = moved_to.training
        print("the run's own examples are gone: the residual's variance is that of --data's", file=sys.stderr)
    total = 0.0
    for batch, _ in batches(examples, "residuals"):
        total += len(batch) * residual_variance(model.encode, model.decode, batch.to(model.device))
    return total / len(examples)


def _source_column(examples: ExampleSet) -> str:
    """Returns the name of the column that says where an example comes from."""
    return "row" if np.issubdtype(examples.sources.dtype, np.integer) else "file"


def _write_scores(path: Path, model: Autoencoder, examples: ExampleSet, variance: float) -> Tensor:
    """Writes one line for each example, and returns the scores [n]."""
    scores: list[Tensor] = []
    sources = enumerate(examples.sources.tolist())
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(("index", "label", *NoveltyScore._fields, _source_column(examples)))
        for batch, labels in batches(examples, "scores"):
            batch = batch.to(model.device)
            found = novelty_score(model.encode, model.decode, batch, variance=variance, target=model.target)
            for label, row in zip(labels.tolist(), torch.stack(found, 1).tolist(), strict=True):
                index, source = next(sources)
                writer.writerow((index, label, *(f"{number:.9g}" for number in row), source))
            scores.append(found.score.cpu())
    return torch.cat(scores)
