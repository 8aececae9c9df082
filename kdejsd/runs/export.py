"""Defines `kdejsd export`, which writes a run's model into a folder to share."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from .._extras import train_extra
from .card import write_card
from .folders import fresh_folder, run_folder
from .onnx import write_onnx
from .saved import loaded_model, opened

with train_extra():
    from jsonargparse import ArgumentParser


def export(args: list[str]) -> int:
    """Writes a run's model into a folder and prints where it is; returns the exit code."""
    parser = ArgumentParser(
        prog="kdejsd export",
        description="Writes a run's model into a folder to share. Model.from_pretrained loads the folder, and the "
        "Hugging Face hub takes it. It holds model.safetensors, config.json, and a card, README.md, with the run's "
        "measures and pictures.",
        exit_on_error=False,
    )
    parser.add_argument(
        "run", type=str, metavar="RUN", help="The folder of a run of kdejsd fit, or the file of its checkpoint."
    )
    parser.add_argument("--out", type=str, metavar="DIR", help="The folder; default: a fresh one in that of the run.")
    parser.add_argument(
        "--onnx", action="store_true", help="Add encoder.onnx and decoder.onnx, for runtimes other than PyTorch."
    )
    config = parser.parse_args(args)
    file, checkpoint = opened(config.run)
    model = loaded_model(file, "cpu")
    run = run_folder(file)
    with TemporaryDirectory() as made:  # so that an export that fails leaves no folder
        model.save_pretrained(made)
        write_card(Path(made), model, checkpoint["datamodule_hyper_parameters"], run)
        if config.onnx:
            write_onnx(model, made)
        folder = fresh_folder(config.out, run / "export")
        shutil.copytree(made, folder, dirs_exist_ok=True)
    print(f"exported: {folder}")
    return 0
