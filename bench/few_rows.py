"""What a GEN reaches on a table of few rows: scikit-learn's breast cancer, with three rows in ten held out.

    python bench/few_rows.py            # some five minutes on two cores
    python bench/few_rows.py --quick    # one training, cut short

`kdejsd fit` runs once for each choice of settings. The columns are of the run's metrics.json: the divergence of
held-out codes, in nats, beside that of as many samples of the target, and the mean squared error of held-out and
training rows.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
from pathlib import Path

import machine
import pyarrow as pa
import pyarrow.csv
from harness import print_facts
from sklearn.datasets import load_breast_cancer

from kdejsd.cli import main as kdejsd

MAX_STEPS = "--trainer.max_steps"
FEW = [
    [],
    [MAX_STEPS, "1000"],
    ["--model.latent_dim", "8"],
    ["--model.latent_dim", "8", "--model.input_dropout", "0.3"],
    ["--model.latent_dim", "8", "--model.input_dropout", "0.3", MAX_STEPS, "1000"],
]


def run(folder: Path, quick: bool) -> None:
    found = load_breast_cancer()
    columns = dict(zip(found.feature_names.tolist(), found.data.T, strict=True))
    pa.csv.write_csv(pa.table(columns | {"diagnosis": found.target_names[found.target]}), folder / "cells.csv")
    data = ["--data", "Table", "--data.path", str(folder / "cells.csv"), "--data.label", "diagnosis"]
    print(f"\n{'settings':78} held-out JSD   target's JSD   held-out error   error")
    for number, settings in enumerate(FEW[:1] if quick else FEW):
        out = folder / str(number)
        options = [*data, "--data.held_out", "0.3", "--out", str(out), *settings]
        with contextlib.redirect_stdout(io.StringIO()):
            failed = kdejsd(["fit", *options, *([MAX_STEPS, "20"] if quick else [])])
        if failed:
            raise SystemExit(f"kdejsd fit {' '.join(options)} failed")
        measures = json.loads((out / "metrics.json").read_text())
        held_out, training = measures["held_out"], measures["training"]
        print(
            f"{' '.join(settings) or 'none':78} {held_out['jsd']:12.3f} {held_out['jsd_of_target']:14.3f}"
            f" {held_out['reconstruction_error']:16.3f} {training['reconstruction_error']:7.3f}",
            flush=True,
        )


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    print_facts(machine.facts("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), options.quick)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
