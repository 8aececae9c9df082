"""What the guide on one's own data says of few rows and of more rows than memory holds.

    python bench/own_data.py            # about eight minutes on two cores, and 4 GB of disk
    python bench/own_data.py --quick    # small sizes, under a minute

First `kdejsd fit` on a table of few rows, scikit-learn's breast cancer with three rows in ten held out, once for each
choice of settings. The columns are of the run's metrics.json.

Then the memory of a process that reads a large table, trains an autoencoder on it and goes through the held-out rows,
with the rows in memory and in their files. `extra` is the peak beyond what the process held after its imports.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path

import machine
import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet
import torch
from harness import print_facts
from papers.quiet import quiet_trainer
from sklearn.datasets import load_breast_cancer

from kdejsd.cli import main as kdejsd
from kdejsd.data import Table, Tensors
from kdejsd.models import built

COLUMNS, PART = 50, 100_000  # of the large table, and how many of its rows are made at a time
MAX_STEPS = "--trainer.max_steps"
FEW = [
    [],
    [MAX_STEPS, "1000"],
    ["--model.latent_dim", "8"],
    ["--model.latent_dim", "8", "--model.input_dropout", "0.3"],
    ["--model.latent_dim", "8", "--model.input_dropout", "0.3", MAX_STEPS, "1000"],
]


def few_rows(folder: Path, quick: bool) -> None:
    found = load_breast_cancer()
    columns = dict(zip(found.feature_names.tolist(), found.data.T, strict=True))
    pa.csv.write_csv(pa.table(columns | {"diagnosis": found.target_names[found.target]}), folder / "cells.csv")
    data = ["--data", "Table", "--data.path", str(folder / "cells.csv"), "--data.label", "diagnosis"]
    print(f"\n{'few rows':58} held-out JSD   target's JSD   held-out error   error")
    for number, settings in enumerate(FEW[:1] if quick else FEW):
        run = folder / str(number)
        options = [*data, "--data.held_out", "0.3", "--out", str(run), *settings]
        with contextlib.redirect_stdout(io.StringIO()):
            failed = kdejsd(["fit", *options, *([MAX_STEPS, "20"] if quick else [])])
        if failed:
            raise SystemExit(f"kdejsd fit {' '.join(options)} failed")
        measures = json.loads((run / "metrics.json").read_text())
        held_out, training = measures["held_out"], measures["training"]
        print(
            f"{' '.join(settings) or 'no setting':58} {held_out['jsd']:12.3f} {held_out['jsd_of_target']:14.3f}"
            f" {held_out['reconstruction_error']:16.3f} {training['reconstruction_error']:7.3f}",
            flush=True,
        )


def parts(rows: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.standard_normal((min(PART, rows - start), COLUMNS), np.float32) for start in range(0, rows, PART)]


def write_parquet(path: Path, rows: int) -> None:
    names = [f"column {i}" for i in range(COLUMNS)]
    with pyarrow.parquet.ParquetWriter(path, pa.schema([(name, pa.float32()) for name in names])) as file:
        for part in parts(rows):
            file.write_table(pa.table(dict(zip(names, part.T, strict=True))))


def write_npy(path: Path, rows: int) -> None:
    np.save(path, np.concatenate(parts(rows)))


def write_pt(path: Path, rows: int) -> None:
    torch.save(torch.from_numpy(np.concatenate(parts(rows))), path)


LARGE: dict[str, Callable[[Path, int], None]] = {".parquet": write_parquet, ".npy": write_npy, ".pt": write_pt}


def trained(path: Path, keep_in_memory: bool) -> float:
    """Trains on the rows of a file, and returns the peak of memory in GB beyond what is held before."""
    kind = Tensors if path.suffix == ".pt" else Table
    with contextlib.redirect_stdout(io.StringIO()), machine.peak_memory("cpu") as peak:
        data = kind(str(path), keep_in_memory=keep_in_memory)
        trainer = quiet_trainer(max_steps=200, accelerator="cpu")
        model = built.AE((COLUMNS,), 8)
        trainer.fit(model, datamodule=data)
        trainer.validate(model, datamodule=data, verbose=False)
    return peak.mib * 2**20 / 1e9


def large(folder: Path, rows: int) -> None:
    print(f"\n{rows} rows of {COLUMNS} columns, {4 * rows * COLUMNS / 1e9:.3g} GB   extra in memory, GB   in files, GB")
    for suffix, write in LARGE.items():
        path = folder / f"large{suffix}"
        writer = multiprocessing.get_context("spawn").Process(target=write, args=(path, rows))
        writer.start()
        writer.join()
        peaks = []
        for keep_in_memory in (True, False):
            # A process of its own for each, so that none finds memory that another one has left.
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                peaks.append(pool.apply(trained, (path, keep_in_memory)))
        print(f"{suffix:42} {peaks[0]:22.2f} {peaks[1]:14.2f}", flush=True)
        path.unlink()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    print_facts(machine.facts("cpu"))
    with tempfile.TemporaryDirectory() as name:
        few_rows(Path(name), options.quick)
        large(Path(name), 20_000 if options.quick else 5_000_000)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
