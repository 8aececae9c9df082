"""Hands on what a run knows of the columns of its examples, for those who use its model without the run."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..data.columns import shortened
from ..models import Autoencoder, GenerativeModel
from .classes import class_at
from .measures import Measure
from .page import Table, shown

COLUMNS = "columns.json"


def columns_of(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Returns what a checkpoint keeps of the columns of its run's examples, as the content of columns.json.

    Returns:
        Plain values; nothing for sets without columns or a scale, such as images.

        * names: of the columns, in order, if they have any.
        * mean, scale: by which the training examples were standardised, in the shape of one example and in the units of
          the file (`kdejsd.data.standardization.Standardization`); 0 and 1 where they were not.
        * classes: the values of the label, in the order of their numbers, if there are any.

    Example:
        >>> from kdejsd.runs.columns import columns_of
        >>> state = {"columns": ["height", "age"], "classes": ["x", "y"]}
        >>> columns_of({"datamodule_hyper_parameters": {"_class_path": "kdejsd.data.Table"}, "Table": state})
        {'names': ['height', 'age'], 'mean': [0.0, 0.0], 'scale': [1.0, 1.0], 'classes': ['x', 'y']}
    """
    kind = class_at(checkpoint["datamodule_hyper_parameters"]["_class_path"])
    state = checkpoint.get(kind.__qualname__, {})
    names = state.get("columns", [])
    scale = {"mean": [0.0] * len(names), "scale": [1.0] * len(names)}
    scale |= {key: value.tolist() for key, value in state.get("standardization", {}).items()}
    found = {"names": names, **scale, "classes": state.get("classes", [])}
    return {key: value for key, value in found.items() if value}


def code(model: GenerativeModel, repository: str, columns: Mapping[str, Any], path: str) -> str:
    """Returns lines of Python that load a model, bring rows into the form that it takes, and go back to their units.

    Args:
        model: the model.
        repository: the folder or the repository that it is loaded from.
        columns: the content of columns.json.
        path: the file of the examples. The columns of an array in a file of NumPy have numbers in place of names.
    """
    imports = ["import numpy as np", "from kdejsd.models import GenerativeModel"]
    named, file = json.dumps(repository), json.dumps(COLUMNS)
    if repository != ".":
        imports.insert(1, "from huggingface_hub import hf_hub_download")
        file = f"hf_hub_download({named}, {file})"
    names, encoding = columns.get("names", []), []
    if isinstance(model, Autoencoder):
        imports.insert(1, "import torch")
        if not names:
            sizes = ", ".join(map(str, model.hparams["example_shape"]))
            encoding = [f"rows = np.random.rand(10, {sizes})  # yours go here, in the units of the file"]
        elif path.lower().endswith((".npy", ".npz")) and all(name.isdecimal() for name in names):
            encoding = ['rows = np.load("rows.npy")[:, [int(name) - 1 for name in columns["names"]]]  # yours']
        else:
            parquet = path.lower().endswith(".parquet") or Path(path).is_dir()
            imports.insert(1, f"import pyarrow.{'parquet' if parquet else 'csv'}")
            read = 'parquet.read_table("rows.parquet")' if parquet else 'csv.read_csv("rows.csv")'
            encoding = [
                f"table = pyarrow.{read}  # yours, with columns of these names",
                'rows = np.column_stack(table.select(columns["names"]).columns)',
            ]
        encoding += [
            "examples = torch.from_numpy((rows - mean) / scale).float()",
            "with torch.no_grad():",
            f"    codes = model.encode(examples)  # [n, {model.latent_dim}]",
            "    decoded = model.decode(codes).numpy() * scale + mean  # in the units of the rows",
        ]
    lines = [
        *("import json", "from pathlib import Path", "", *imports, ""),
        f"model = GenerativeModel.from_pretrained({named})",
        f"columns = json.loads(Path({file}).read_text())",
        'mean, scale = np.array(columns["mean"]), np.array(columns["scale"])',
        *encoding,
        "samples = model.sample(100).numpy() * scale + mean  # new rows",
    ]
    return "\n".join(lines)


def described(columns: Mapping[str, Any], onnx: bool) -> Table:
    """Returns what a card says of columns.json: words, and mean and scale of the columns that have names.

    Args:
        columns: the content of columns.json.
        onnx: whether the model is there as ONNX too.
    """
    names, mean, scale = columns.get("names", []), columns["mean"], columns["scale"]
    said = [f"A row has the columns below, in this order. `{COLUMNS}` holds their `names`."] if names else []
    if any(mean) or scale != [1.0] * len(scale):
        said += [
            f"The `mean` and the `scale` in `{COLUMNS}` are the mean and the standard deviation of each value in the "
            "training rows, in the units of their file. The model works with standardised rows, `(rows - mean) / "
            "scale`. What it returns is in the units of the file after `* scale + mean`. Compute both in float64, as "
            "float32 rounds large numbers."
        ]
        said += ["The ONNX files, too, work with standardised rows, in float32."] if onnx else []
    else:
        said += ["The model works with the values as they are, so `mean` is 0 and `scale` is 1."]
    if "classes" in columns:
        classes = shortened([str(value) for value in columns["classes"]])
        said += [f"`classes` holds the names of the classes, in the order of their numbers from 0: {classes}."]
    rows = [
        (Measure(name), [shown(value) for value in values])
        for name, *values in (zip(names, mean, scale, strict=True) if names else ())
    ]
    return Table(["mean", "scale"], rows, " ".join(said))
