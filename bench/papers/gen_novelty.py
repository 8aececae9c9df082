"""Novelty detection by the density of a GEN (section 5.5, eqs. 10-11, Figure 4 of the GENs paper).

    python bench/papers/gen_novelty.py --data DIR      # MNIST and Fashion-MNIST, about 13 minutes on one core
    python bench/papers/gen_novelty.py --quick         # under a minute: scikit-learn's digits
    ... --out STEM                                     # leave a record; run again with it, it goes on from there

Paper: S. Saha, S. Elhabian, R. T. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283. A GEN is trained
on images that count as normal: one digit of MNIST, or all of them. Held-out images of the same and of other classes, or
of Fashion-MNIST, are scored by `kdejsd.novelty_score` and by its parts alone; a good score puts the novel ones above
the normal ones. The paper sorts the held-out images of a single digit by their score, and shows the 100 of the lowest
and the 100 of the highest. It prints no numbers and says neither which images its models were trained on nor how large
sigma^2 is; here that is `kdejsd.residual_variance`. Such pictures are drawn too, of the first experiment (the digit 0)
and of all digits.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import lightning.pytorch as pl
import torch
from quiet import quiet_trainer
from record import Record, Row
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor

from kdejsd import NoveltyScore, novelty_score, plots, residual_variance
from kdejsd._modes import evaluating
from kdejsd.data import MNIST, BatchLoader, BatchOrder, Digits, ExampleSet, FashionMNIST
from kdejsd.models import built

SCORES = {
    "density": "all three parts: the negative log-density of eq. 10",
    "reconstruction": "the reconstruction error alone",
    "latent": "the log-density of the code under the target alone",
    "latent KDE": "the same under the kernel density of the training codes",
    "log|det|": "the decoder's log-determinant alone",
    "surface": "latent and log-determinant, without the residual",
}
KINDS = {"data": str, "latent_dim": int, "seed": int, "experiment": str, "score": str}
KINDS |= {"auroc": float, "average_precision": float, "novel_share": float}


@dataclass(frozen=True)
class Experiment:
    """Returns what counts as normal, and held-out images of both kinds."""

    name: str
    training: ExampleSet
    normal: ExampleSet
    novel: ExampleSet


@dataclass(frozen=True)
class Setting:
    """How a model is trained."""

    latent_dim: int
    num_lagged: int
    batch_size: int
    steps: int
    seed: int


def images_of(data: ExampleSet) -> Tensor:
    return data[torch.arange(len(data))][0]


def of_classes(data: ExampleSet, classes: Sequence[int]) -> ExampleSet:
    return data.subset(torch.isin(data.labels, torch.tensor(classes)).nonzero().flatten())


def class_experiment(training: ExampleSet, held_out: ExampleSet, classes: Sequence[int], name: str) -> Experiment:
    """The given classes are normal, and all others novel."""
    others = sorted(set(held_out.labels.tolist()) - set(classes))
    return Experiment(name, of_classes(training, classes), of_classes(held_out, classes), of_classes(held_out, others))


def trained(experiment: Experiment, setting: Setting) -> built.GEN:
    """A GEN of the normal training images."""
    pl.seed_everything(setting.seed, verbose=False)
    shape = images_of(experiment.training.subset(torch.arange(1)))[0].shape
    count = len(experiment.training)
    num_lagged = min(setting.num_lagged, count)
    training_settings = {"weight": 0.1, "learning_rate": 2e-4, "decay": False}
    model = built.GEN(shape, setting.latent_dim, num_lagged=num_lagged, **training_settings)
    trainer = quiet_trainer(max_steps=setting.steps, accelerator="cpu")
    training = BatchLoader(experiment.training, BatchOrder(count, min(setting.batch_size, count), setting.seed))
    trainer.fit(model, training)
    model.refresh()  # the statistics of the codes' normalisation are then those of the last step
    return model


def scores_of(model: built.GEN, images: Tensor, variance: float) -> tuple[NoveltyScore, dict[str, Tensor]]:
    """The score of each image, and every score that is compared, higher for what is more novel."""
    found = novelty_score(model.encode, model.decode, images, variance=variance, target=model.lagged.target)
    with torch.no_grad(), evaluating(model):
        kde = torch.cat([model.lagged.log_prob(model.encode(part)) for part in images.split(1000)])
    compared = (
        found.score,
        found.reconstruction_error,
        -found.latent,
        -kde,
        found.log_det,
        found.log_det - found.latent,
    )
    return found, dict(zip(SCORES, compared, strict=True))


def run(experiment: Experiment, setting: Setting, pictures: Path | None) -> list[Row]:
    """Trains, scores, and draws the 100 most and least likely of the normal held-out images: of each score the columns
    from "score" to "novel_share"."""
    model = trained(experiment, setting)
    variance = residual_variance(model.encode, model.decode, images_of(experiment.training))
    normal = images_of(experiment.normal)
    found, of_normal = scores_of(model, normal, variance)
    beyond, of_novel = scores_of(model, images_of(experiment.novel), variance)
    without = sum(int((~part.score.isfinite()).sum()) for part in (found, beyond))
    if without:
        raise RuntimeError(f"{without} images have no finite density: the decoder has collapsed around their codes")
    labels = torch.cat([torch.zeros(len(normal)), torch.ones(len(experiment.novel))]).numpy()
    rows = []
    for name in SCORES:
        values = torch.cat([of_normal[name], of_novel[name]]).double().numpy()
        auroc, precision = roc_auc_score(labels, values), average_precision_score(labels, values)
        measures = {"auroc": auroc, "average_precision": precision, "novel_share": labels.mean()}
        rows.append({"score": name} | {k: round(float(v), 6) for k, v in measures.items()})
    print(
        f"  residual's standard deviation {variance**0.5:.4f}; means of normal and novel images, nats: "
        f"latent {found.latent.mean():.1f} and {beyond.latent.mean():.1f}, log|det| {found.log_det.mean():.1f} and "
        f"{beyond.log_det.mean():.1f}, residual {found.residual.mean():.0f} and {beyond.residual.mean():.0f}",
        flush=True,
    )
    if pictures is not None:
        order = found.score.argsort()
        for name, chosen in (("most", order[:100]), ("least", order.flip(0)[:100])):
            file = pictures.with_name(f"{pictures.name}_{name}_likely.png")
            plots.grid(normal[chosen]).savefig(file)
    return rows


def table(rows: list[Row]) -> str:
    """AUROC and average precision in percent, an experiment a line, and the mean of those with one class normal."""
    experiments = list(dict.fromkeys(row["experiment"] for row in rows))
    single = [name for name in experiments if name.startswith("only")]
    groups = {name: [name] for name in experiments} | ({f"mean of {len(single)}": single} if len(single) > 1 else {})
    lines = []
    for title, field in (("AUROC, %", "auroc"), ("Average precision of the novel, %", "average_precision")):
        lines += [title, f"{'normal':22}" + "".join(f"{name:>15}" for name in SCORES) + f"{'novel':>9}"]
        for group, names in groups.items():
            members = [row for row in rows if row["experiment"] in names]
            cells = []
            for score in SCORES:
                values = [row[field] for row in members if row["score"] == score]
                cells.append(f"{100 * sum(values) / len(values):15.1f}")
            share = sum(row["novel_share"] for row in members) / len(members)
            lines.append(f"{group:22}" + "".join(cells) + f"{100 * share:8.0f}%")
        lines.append("")
    return "\n".join(lines + [f"{name:15} {meaning}" for name, meaning in SCORES.items()])


def experiments_of(options: argparse.Namespace) -> list[Experiment]:
    if options.quick:
        digits = Digits()
        training, held_out = digits.training, digits.held_out
        return [
            class_experiment(training, held_out, [0], "only 0"),
            class_experiment(training, held_out, range(5), "0 to 4"),
        ]
    mnist, fashion = MNIST(options.data), FashionMNIST(options.data)
    found = [class_experiment(mnist.training, mnist.held_out, [d], f"only {d}") for d in options.digits]
    return [*found, Experiment("MNIST (not Fashion)", mnist.training, mnist.held_out, fashion.held_out)]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Novelty detection with GENs (arXiv 2010.15283, section 5.5).")
    parser.add_argument("--quick", action="store_true", help="scikit-learn's digits, two small models")
    parser.add_argument("--data", default=os.environ.get("KDEJSD_DATA"), metavar="DIR", help="of the idx files")
    parser.add_argument("--digits", type=int, nargs="*", default=range(10), help="each normal once (default: all)")
    parser.add_argument("--latent_dim", type=int, default=8, help="default 8")
    parser.add_argument("--seed", type=int, default=0, help="of weights and batches (default 0)")
    parser.add_argument(
        "--out", type=Path, metavar="STEM", help="keep results in STEM.csv, from where a run goes on; draw STEM_*.png"
    )
    options = parser.parse_args(arguments)
    if not options.quick and options.data is None:
        parser.error("--data names the folder of the idx files of MNIST and Fashion-MNIST (or set KDEJSD_DATA)")
    if options.quick:
        few = many = Setting(options.latent_dim, num_lagged=500, batch_size=50, steps=300, seed=options.seed)
    else:
        few = Setting(options.latent_dim, num_lagged=5000, batch_size=100, steps=2000, seed=options.seed)
        many = Setting(options.latent_dim, num_lagged=10_000, batch_size=100, steps=8000, seed=options.seed)
    record = Record(options.out and options.out.with_name(f"{options.out.name}.csv"), KINDS)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)

    rows: list[Row] = []
    experiments = experiments_of(options)
    start = time.perf_counter()
    for number, experiment in enumerate(experiments, 1):
        single = experiment.name.startswith("only")
        setting = few if single else many
        print(
            f"[{number:2}/{len(experiments)}] {experiment.name}: {len(experiment.training)} training images, "
            f"{setting.steps} steps, l = {setting.latent_dim}; {len(experiment.normal)} normal and "
            f"{len(experiment.novel)} novel images held out",
            flush=True,
        )
        key = {"experiment": experiment.name, "data": "Digits" if options.quick else "MNIST"}
        key |= {"latent_dim": options.latent_dim, "seed": options.seed}
        done = record.find(**key)
        if not done:
            drawn = options.out and (not single or number == 1)
            stem = experiment.name.partition(" (")[0].replace(" ", "_").lower()
            found = run(experiment, setting, options.out.with_name(f"{options.out.name}_{stem}") if drawn else None)
            record.add(*(key | row for row in found))
        rows += record.find(**key)
        print(
            f"  AUROC of the density {100 * rows[-len(SCORES)]['auroc']:.1f} %   "
            f"({'from the record' if done else f'{time.perf_counter() - start:.0f} s'})",
            flush=True,
        )
    print(f"\n{table(rows)}\nThe paper shows pictures and prints no numbers. One model each, seed {options.seed}.")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
