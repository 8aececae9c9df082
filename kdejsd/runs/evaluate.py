"""Defines `kdejsd evaluate`, which writes the report of a run again."""

from __future__ import annotations

from .._extras import train_extra
from .exported_classifier import load_classifier
from .folders import fresh_folder, run_folder
from .report import write_report
from .saved import open_checkpoint

with train_extra():
    from jsonargparse import ArgumentParser


def evaluate(args: list[str]) -> int:
    """Writes the report of a run again and prints where it is; returns the exit code."""
    parser = ArgumentParser(
        prog="kdejsd evaluate", description="Writes the report of a run again.", exit_on_error=False
    )
    parser.add_argument("--out", type=str, help="The report's folder; default: a fresh folder of the run.")
    parser.add_argument(
        "--classifier",
        type=str,
        metavar="FILE",
        help="A classifier of the examples, saved by torch.export.save with a batch of any size. It adds the diversity "
        "of the generated examples. Loading a file can run code that is in it; use none that you do not trust.",
    )
    config, checkpoint, model, data_module, path = open_checkpoint(parser, args)
    classifier = None if config.classifier is None else load_classifier(config.classifier, data_module.example_shape)
    folder = fresh_folder(config.out, run_folder(path) / "evaluation")
    begun = checkpoint["loops"]["fit_loop"]["epoch_progress"]["current"]["started"]  # "epoch" may be the one before
    run = {"checkpoint": str(path), "epochs": begun, "steps": checkpoint["global_step"]}
    print(write_report(folder, model, data_module, run, classifier))
    (folder / "config.yaml").write_text(parser.dump(config))
    print(f"report: {folder / 'report.html'}")
    return 0
