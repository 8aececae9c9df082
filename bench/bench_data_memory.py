"""The memory of a process that trains on a large table, with the rows in memory and in their files.

    python bench/bench_data_memory.py            # some minutes on two cores, 1 GB of disk twice over
    python bench/bench_data_memory.py --quick    # 2000 rows

Each process reads the table, trains an autoencoder for 200 steps and goes through the held-out rows. `extra` is the
peak of its memory beyond what it held after its imports, seen every five milliseconds. Pages of files are not counted:
the system drops them when it needs the memory.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from harness import print_facts
from papers.quiet import quiet_trainer

from kdejsd.data import Table, Tensors
from kdejsd.models import built

COLUMNS, PART = 50, 100_000  # of the table, and how many of its rows are made at a time


def held() -> float:
    """The memory of this process that is no page of a file, in GB (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return 1024 * float(line.split()[1]) / 1e9


@contextlib.contextmanager
def peak_of_held() -> Iterator[list[float]]:
    """Collects what the process holds beyond what it held before; the largest is the peak."""
    before, done, extra = held(), threading.Event(), [0.0]

    def watch() -> None:
        while not done.wait(0.005):
            extra[0] = max(extra[0], held() - before)

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield extra
    finally:
        done.set()
        watching.join()


def parts(rows: int) -> Iterator[np.ndarray]:
    rng = np.random.default_rng(0)
    for start in range(0, rows, PART):
        yield rng.standard_normal((min(PART, rows - start), COLUMNS), np.float32)


def write_parquet(path: Path, rows: int) -> None:
    names = [f"column {i}" for i in range(COLUMNS)]
    with pyarrow.parquet.ParquetWriter(path, pa.schema([(name, pa.float32()) for name in names])) as file:
        for part in parts(rows):
            file.write_table(pa.table(dict(zip(names, part.T, strict=True))))


def write_npy(path: Path, rows: int) -> None:
    np.save(path, np.concatenate(list(parts(rows))))


def write_pt(path: Path, rows: int) -> None:
    torch.save(torch.from_numpy(np.concatenate(list(parts(rows)))), path)


LARGE: dict[str, Callable[[Path, int], None]] = {".parquet": write_parquet, ".npy": write_npy, ".pt": write_pt}


def trained(path: Path, keep_in_memory: bool) -> float:
    """Trains on the rows of a file, and returns the extra memory in GB."""
    kind = Tensors if path.suffix == ".pt" else Table
    with contextlib.redirect_stderr(io.StringIO()), peak_of_held() as extra:
        data = kind(str(path), keep_in_memory=keep_in_memory)
        trainer = quiet_trainer(max_steps=200, accelerator="cpu")
        model = built.AE((COLUMNS,), 8)
        trainer.fit(model, datamodule=data)
        trainer.validate(model, datamodule=data, verbose=False)
    return extra[0]


def in_own_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function where it finds no memory that an earlier call has left."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def run(folder: Path, rows: int) -> None:
    print(f"\n{rows} rows of {COLUMNS} columns, {4 * rows * COLUMNS / 1e9:.3g} GB   extra in memory, GB   in files, GB")
    for suffix, write in LARGE.items():
        path = folder / f"large{suffix}"
        in_own_process(write, path, rows)
        in_memory, in_files = (in_own_process(trained, path, keep_in_memory) for keep_in_memory in (True, False))
        print(f"{suffix:42} {in_memory:22.2f} {in_files:14.2f}", flush=True)
        path.unlink()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    print_facts(machine.facts("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), 2000 if options.quick else 5_000_000)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
