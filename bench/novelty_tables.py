"""Finds rows of other classes by the densities of kdejsd, beside scikit-learn's detectors.

    python bench/novelty_tables.py --csv novelty_tables.csv    # some five minutes on two cores
    python bench/novelty_tables.py --quick                     # one split, two classes: some seconds

One class of scikit-learn's breast cancer (benign), wine (each in turn) or digits (each in turn) counts as normal.
Each detector is fitted to 60 % of its rows, and scores the other 40 % and all rows of the other classes. The AUROC is
the probability that a novel row has the higher score than a normal one: 50 % is chance. Tables are standardised by the
rows that are trained on; digits are pixels from 0 to 1. Nothing is tuned on scored rows, and no setting differs between
classes. What varies over the seeds is the split, and the training of the GEN and the forest.
"""

from __future__ import annotations

import argparse
import math
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import harness
import lightning.pytorch as pl
import machine
import numpy as np
import torch
from papers.quiet import quiet_trainer
from sklearn import neighbors
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.ensemble import IsolationForest
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.preprocessing import StandardScaler
from sklearn.svm import OneClassSVM

import kdejsd
from kdejsd.data import BatchLoader, BatchOrder, ExampleSet
from kdejsd.models import built
from kdejsd.sklearn import KernelDensity

Rows = np.ndarray
Scores = dict[str, Rows]  # of each detector, for the rows that are scored; higher is more novel


class Task(NamedTuple):
    """Describes rows of which one class is normal."""

    data: str
    normal: str
    rows: Rows
    is_normal: Rows


class Found(NamedTuple):
    data: str
    normal: str
    seed: int
    detector: str
    auroc: float


def tasks() -> Iterator[Task]:
    for name, load in (("cancer", load_breast_cancer), ("wine", load_wine), ("digits", load_digits)):
        loaded = load()
        rows = loaded.data / 16 if name == "digits" else loaded.data
        for number, label in enumerate(loaded.target_names):
            if name != "cancer" or label == "benign":
                yield Task(name, str(label), rows, loaded.target == number)


def gen(training: Rows, scored: Rows, seed: int, steps: int) -> Scores:
    """Scores by a GEN: its density of a row, and its reconstruction error alone."""
    pl.seed_everything(seed, verbose=False)
    count, dim = training.shape
    model = built.GEN((dim,), 8 if dim >= 30 else 3, num_lagged=count, input_dropout=0.2)
    examples = ExampleSet(torch.tensor(training).float(), torch.full((count,), -1))
    loader = BatchLoader(examples, BatchOrder(count, min(count, 50), seed))
    quiet_trainer(max_steps=steps, accelerator="cpu").fit(model, loader)
    model.refresh()  # the statistics of the codes' normalisation are then those of the last step
    variance = kdejsd.residual_variance(model.encode, model.decode, examples.examples)
    rows = torch.tensor(scored).float()
    found = kdejsd.novelty_score(model.encode, model.decode, rows, variance=variance, target=model.target)
    return {"GEN, density": found.score.numpy(), "GEN, error": found.reconstruction_error.numpy()}


def kernel_densities(training: Rows, scored: Rows) -> Scores:
    """Scores by kernel densities, of a kernel as wide in every direction or as wide as the rows are spread."""
    found = {"KDE": -KernelDensity("entropy").fit(training).score_samples(scored)}
    if np.linalg.matrix_rank(np.cov(training.T)) == training.shape[1]:  # not of digits, with corners that stay white
        found["KDE, whitened"] = -KernelDensity("entropy", whiten=True).fit(training).score_samples(scored)
    return found


def scikit_learn(training: Rows, scored: Rows, seed: int) -> Scores:
    # One leaf: with smaller ones its densities are wrong from about 20 dimensions on.
    density = neighbors.KernelDensity(leaf_size=len(training))
    search = GridSearchCV(density, {"bandwidth": np.geomspace(0.05, 5, 25)}, cv=5).fit(training)
    detectors: dict[str, Callable[[Rows], Rows]] = {
        "sklearn KDE": search.best_estimator_.score_samples,
        "forest": IsolationForest(random_state=seed).fit(training).score_samples,
        "SVM": OneClassSVM().fit(training).score_samples,
    }
    return {name: -score(scored) for name, score in detectors.items()}


def run(task: Task, seed: int, steps: int) -> list[Found]:
    normal, novel = task.rows[task.is_normal], task.rows[~task.is_normal]
    training, held_out = train_test_split(normal, train_size=0.6, random_state=seed)
    scored = np.concatenate([held_out, novel])
    if task.data != "digits":
        scaler = StandardScaler().fit(training)
        training, scored = scaler.transform(training), scaler.transform(scored)
    is_novel = np.arange(len(scored)) >= len(held_out)
    scores = gen(training, scored, seed, steps) | kernel_densities(training, scored)
    scores |= scikit_learn(training, scored, seed)
    found = []
    for name, values in scores.items():
        if not np.isfinite(values).all():
            warnings.warn(f"{name} gives scores that are not finite, which count as most novel", stacklevel=1)
        auroc = float(roc_auc_score(is_novel, np.where(np.isfinite(values), values, np.finfo(values.dtype).max)))
        found.append(Found(task.data, task.normal, seed, name, auroc))
    return found


def table(found: list[Found]) -> str:
    """Returns the mean over the seeds and its standard error in percent, of each class and of the classes' mean."""
    detectors = list(dict.fromkeys(row.detector for row in found))
    classes = list(dict.fromkeys((row.data, row.normal) for row in found))
    groups = {f"{data}: {normal}": [(data, normal)] for data, normal in classes}
    for data in dict.fromkeys(data for data, _ in classes):
        members = [pair for pair in classes if pair[0] == data]
        if len(members) > 1:
            groups[f"{data}: mean of {len(members)}"] = members
    lines = [f"{'normal':20}" + "".join(f"{name:>16}" for name in detectors)]
    for title, members in groups.items():
        cells = []
        for detector in detectors:
            rows = [row for row in found if (row.data, row.normal) in members and row.detector == detector]
            means = [float(np.mean([r.auroc for r in rows if r.seed == seed])) for seed in {r.seed for r in rows}]
            error = np.std(means, ddof=1) / math.sqrt(len(means)) if len(means) > 1 else math.nan
            cells.append(f"{100 * np.mean(means):9.1f} +- {100 * error:3.1f}" if rows else f"{'-':>16}")
        lines.append(f"{title:20}" + "".join(cells))
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one split of two classes, short training")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write every AUROC as well")
    options = parser.parse_args(arguments)
    seeds, steps = (1, 100) if options.quick else (5, 500)
    chosen = [task for task in tasks() if not options.quick or (task.data, task.normal) in QUICK]
    facts = machine.facts("cpu")
    harness.print_facts(facts)
    found: list[Found] = []
    shared: harness.Row = {key: facts[key] for key in harness.FACTS}
    with harness.csv_table(options.csv, (*Found._fields, *harness.FACTS), shared) as write:
        for task in chosen:
            rows = [row for seed in range(seeds) for row in run(task, seed, steps)]
            write({**row._asdict(), "auroc": f"{row.auroc:.6f}"} for row in rows)
            found += rows
            print(f"{task.data}: {task.normal} done", file=sys.stderr)
    print(f"\nAUROC, %; mean and standard error over {seeds} splits; GENs of {steps} steps")
    print(table(found))
    return 0


QUICK = (("cancer", "benign"), ("digits", "0"))

if __name__ == "__main__":
    raise SystemExit(main())
