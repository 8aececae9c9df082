"""Writes the report of a run as one page for a browser, which needs neither network nor scripts."""

from __future__ import annotations

import inspect
import shlex
from base64 import b64encode
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader

from .. import data as sets
from ..data import ExampleData
from ..drawing import are_images
from ..models import Autoencoder, GenerativeModel
from .measures import Measure
from .pictures import CAPTIONS

_LISTED = 8  # numbers of a list that are shown one by one


class Table(NamedTuple):
    """Holds measures with their values in each column, and a sentence about all of them."""

    columns: Sequence[str]
    rows: list[tuple[Measure, list[str]]]
    words: str = ""


def write_page(
    path: Path,
    model: GenerativeModel,
    data: ExampleData,
    numbers: Mapping[str, Any],
    explained: Callable[[str], Measure],
    main: Sequence[str],
    pictures: Mapping[str, bytes],
    notes: Sequence[str],
) -> None:
    """Writes the page of a report.

    Args:
        path: the file, which stands in the folder of the run or of the report.
        model: the trained model.
        data: its examples.
        numbers: the content of metrics.json.
        explained: gives the words for a measure.
        main: the measures of examples that stand first.
        pictures: the pictures as PNG files, by their names.
        notes: sentences that stand below the figures.
    """
    name = f"{numbers['model']['name']} on {type(data).__name__}"
    folder, run = path.parent, numbers["run"]
    tables = tables_of(numbers, explained, main)
    config = folder / "config.yaml"
    # What load and the commands take: the run's folder, or where the report is elsewhere, its checkpoint.
    named = str(folder) if (folder / "checkpoints" / "last.ckpt").exists() else run.get("checkpoint")
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    page = environment.get_template("report.html.jinja").render(
        title=name,
        subtitle=f"Report of {folder}, {datetime.now().astimezone():%Y-%m-%d %H:%M}",
        main=tables.pop("", None),
        others=tables,
        notes=notes,
        pictures=[
            {"name": name, "caption": CAPTIONS[name], "data": b64encode(picture).decode()}
            for name, picture in pictures.items()
        ],
        code=None if named is None else _code(model, data, named),
        commands=[] if named is None else _commands(model, folder, named),
        settings={
            "Model": _shown(_public(model.hparams) | numbers["model"]),  # in which None has become what it stands for
            "Data": _shown({"name": type(data).__name__, "example_shape": data.example_shape} | _public(data.hparams)),
            "Run": {
                explained(f"run.{key}").label: shown(value)
                for key, value in _flat(run).items()
                if "versions." not in key
            },
            "Versions": _shown(run["versions"]),
        },
        config=config.read_text(encoding="utf-8") if config.exists() else None,
    )
    path.write_text(page, encoding="utf-8")


def tables_of(numbers: Mapping[str, Any], explained: Callable[[str], Measure], main: Sequence[str]) -> dict[str, Table]:
    """Returns the tables by their titles; the one of the main measures has none, and comes first."""
    of_sets = {
        column: {key: value for key, value in _flat(numbers[part]).items() if not key.startswith("columns.")}
        for part, column in (("held_out", "held-out"), ("training", "training"))
        if part in numbers
    }
    of_columns = numbers.get("held_out", {}).get("columns", {})
    tables: dict[str, Table] = {}
    keys = next(iter(of_sets.values()), {})
    for key in sorted(keys, key=lambda key: main.index(key) if key in main else len(main)):
        further = "posterior" if key.startswith("posterior.") else "codes"
        table = tables.setdefault("" if key in main else f"Further measures of the {further}", Table(list(of_sets), []))
        table.rows.append((explained(key), [shown(values[key]) for values in of_sets.values()]))
    if of_columns:
        tables["Reconstruction of each column"] = Table(
            ["error", "explained"],
            [
                (Measure(name), [shown(values["error"]), shown(values["variance_explained"])])
                for name, values in of_columns.items()
            ],
            "Of held-out examples. The error is the root mean squared one, in the units of the data. Explained is the "
            "share of the column's variance that the reconstructions explain: 1 for no error, 0 for the error of the "
            "column's mean.",
        )
    for part, title in (("samples", "Generated samples"), ("diversity", "Diversity of what is generated")):
        flat = {key: value for key, value in _flat(numbers.get(part, {}), f"{part}.").items() if value is not None}
        if flat:
            tables[title] = Table(["value"], [(explained(key), [shown(value)]) for key, value in flat.items()])
    return tables


def shown(value: Any) -> str:
    """Returns a value of a report as it is shown; a long list of numbers by their range."""
    if value is None:
        return "none"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        if len(value) > _LISTED and all(isinstance(item, (int, float)) for item in value):
            return f"{len(value)} values from {shown(min(value))} to {shown(max(value))}"
        return ", ".join(shown(item) for item in value)
    return str(value)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns the values without mappings inside; a value's name then begins with those of its mappings."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def _shown(values: Mapping[str, Any]) -> dict[str, str]:
    return {key: shown(value) for key, value in _flat(values).items()}


def _public(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if not name.startswith("_")}


def _code(model: GenerativeModel, data: ExampleData, named: str) -> str:
    """Returns lines of Python that load the model and use it, with its data where those have been standardised."""
    made = _made(data) if data.standardization is not None else None
    examples, samples = "next(iter(data.val_dataloader()))[0]", "data.restored(model.sample(100))"
    of_examples, of_samples = "  # standardised, as the model takes them", "  # in the units of the file, new examples"
    if made is None:
        form = "with pixels from 0 to 1" if are_images(data) else f"in the units that {type(data).__name__} gives"
        examples, of_examples = f"torch.rand(10, {', '.join(map(str, data.example_shape))})", f"  # yours, {form}"
        samples, of_samples = "model.sample(100)", "  # new examples"
    lines = ["import torch", "import kdejsd", "", f"model = kdejsd.load({named!r})"]
    lines += [] if made is None else [f"data = {made}"]
    lines.append("with torch.no_grad():")
    if isinstance(model, Autoencoder):
        lines += [
            f"    examples = {examples}{of_examples}",
            f"    codes = model.encode(examples)  # [n, {model.latent_dim}]",
            "    decoded = model.decode(codes)  # the shape of the examples",
        ]
    return "\n".join([*lines, f"    samples = {samples}{of_samples}"])


def _made(data: ExampleData) -> str | None:
    """Returns the call that makes one of the package's own sets again, None for another."""
    name = type(data).__name__
    if getattr(sets, name, None) is not type(data):
        return None
    defaults = {
        key: parameter.default
        for kind in reversed(type(data).__mro__)
        for key, parameter in inspect.signature(kind.__init__).parameters.items()  # type: ignore[misc]
    }
    changed = [f"{key}={value!r}" for key, value in _public(data.hparams).items() if value != defaults.get(key)]
    return f"kdejsd.data.{name}({', '.join(changed)})"


def _commands(model: GenerativeModel, folder: Path, named: str) -> list[tuple[str, str]]:
    """Returns what one can do next, with the command that does it."""
    run = shlex.quote(named)
    commands = [
        ("Train on, to a later end:", f"kdejsd fit --ckpt_path {run} --trainer.max_steps STEPS"),
        (
            "Write the report anew, with the diversity that a classifier sees in what the model makes:",
            f"kdejsd evaluate {run} --classifier FILE",
        ),
    ]
    if isinstance(model, Autoencoder):
        commands.append(("Score how novel each example is:", f"kdejsd score {run}"))
    if any(folder.glob("events.out.tfevents*")):
        commands.append(("See how the training went:", f"tensorboard --logdir {shlex.quote(str(folder))}"))
    return commands
