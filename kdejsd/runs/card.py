"""Writes the card of a run's model for the Hugging Face hub: what it is, how it was made and what was measured."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._extras import extra, train_extra
from ..models import GenerativeModel
from ..models.pretrained import CARD, card
from .columns import COLUMNS, code, columns_of, described
from .measures import explained
from .page import Table, shown, tables_of
from .pictures import CAPTIONS

with train_extra():
    import yaml  # type: ignore[import-untyped]
with extra("hub"):
    from huggingface_hub import EvalResult

# Of held-out examples: what stands first, and what the hub lists.
_MAIN = (
    "count",
    "reconstruction_error",
    "jsd",
    "jsd_of_target",
    "posterior.jsd",
    "posterior.jsd_of_target",
    "divergence",
)
_RESULTS = ("reconstruction_error", "jsd", "divergence")


def write_card(
    folder: Path, model: GenerativeModel, checkpoint: Mapping[str, Any], run: Path, repository: str = "."
) -> None:
    """Writes README.md for a run's model into a folder, with columns.json, the run's pictures and its config.yaml.

    The card leaves out whatever the run does not have, such as its measures, and there is no columns.json for examples
    without columns or a scale. The card also leaves absolute paths of this machine out of the settings.

    Args:
        folder: where the model is, as `save_pretrained` and `write_onnx` write it.
        model: the model.
        checkpoint: the content of the run's checkpoint.
        run: the folder of the run.
        repository: from which the card's code loads the model; "." is the folder itself.
    """
    data, columns = checkpoint["datamodule_hyper_parameters"], columns_of(checkpoint)
    name = data["_class_path"].rpartition(".")[2]
    settings = {key: value for key, value in data.items() if not key.startswith("_")}
    public = _without_paths(settings)
    sections, lines = {}, None
    if columns:
        (folder / COLUMNS).write_text(json.dumps(columns, indent=2) + "\n")
        lines = code(model, repository, columns, str(data.get("path")))
        sections["Columns and units"] = _markdown(described(columns, onnx=any(folder.glob("*.onnx"))))
    sections["The examples"] = f"`{name}`, with {', '.join(f'{key} = {shown(public[key])}' for key in public)}."
    pictures = [picture for picture in CAPTIONS if (run / f"{picture}.png").is_file()]
    for picture in pictures:
        shutil.copy(run / f"{picture}.png", folder)
        sections[picture.capitalize()] = f"![{picture}]({picture}.png)\n\n{CAPTIONS[picture]}"
    metrics, config = run / "metrics.json", run / "config.yaml"
    results = None
    if metrics.is_file():
        numbers = json.loads(metrics.read_text())
        results = _results(numbers.get("held_out", {}), name, model)
        tables = tables_of(numbers, explained, _MAIN)
        sections |= {title or "What was measured": _markdown(table) for title, table in tables.items()}
    if config.is_file():
        content = _without_paths(yaml.safe_load(config.read_text(encoding="utf-8")))
        (folder / "config.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        paths = "".join(f" --data.{key} PATH" for key in settings if key not in public)
        sections["The command that made it"] = f"```sh\nkdejsd fit --config config.yaml{paths}\n```"
    card(model, repository, name, results, sections, code=lines).save(folder / CARD)


def _results(held_out: Mapping[str, Any], data: str, model: GenerativeModel) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="unconditional-image-generation" if len(model.hparams["example_shape"]) == 3 else "other",
            dataset_type=data.lower(),
            dataset_name=data,
            dataset_split="held_out",
            metric_type=key,
            metric_name=explained(key).label,
            metric_value=held_out[key],
        )
        for key in _RESULTS
        if held_out.get(key) is not None
    ]


def _markdown(table: Table) -> str:
    rows = [["", *table.columns, "what it is"], ["---"] * (len(table.columns) + 2)]
    rows += [[measure.label.strip(), *values, f"{measure.meaning} {measure.aim}"] for measure, values in table.rows]
    if not any(measure.meaning for measure, _ in table.rows):  # of columns, whose names say what they are
        rows = [row[:-1] for row in rows]
    cells = [[cell.replace("|", "\\|") for cell in row] for row in rows]  # as names of columns may have it
    grid = "\n".join(f"| {' | '.join(row)} |" for row in cells) if table.rows else ""
    return "\n\n".join(filter(None, (table.words, grid)))


def _without_paths(value: Any) -> Any:
    """Returns settings without those that are absolute paths, such as the place of the data."""
    if isinstance(value, Mapping):
        return {key: _without_paths(item) for key, item in value.items() if not _is_path(item)}
    return [_without_paths(item) for item in value if not _is_path(item)] if isinstance(value, list) else value


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and os.path.isabs(os.path.expanduser(value))
