"""Defines `kdejsd export`, which writes a run's model into a folder to share."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from tempfile import TemporaryDirectory

from .._extras import extra, train_extra
from .card import write_card
from .folders import fresh_folder, run_folder
from .onnx import write_onnx
from .saved import loaded_model, opened

with train_extra():
    from jsonargparse import ArgumentParser
with extra("hub"):
    from huggingface_hub import HfApi


def export(args: list[str]) -> int:
    """Writes a run's model into a folder and prints where it is; returns the exit code."""
    parser = ArgumentParser(
        prog="kdejsd export",
        description="Writes a run's model into a folder to share. Model.from_pretrained loads the folder, and the "
        "Hugging Face hub takes it. It holds model.safetensors, config.json, and a card, README.md, with the run's "
        "measures and pictures. For a run on a table, columns.json has the names and the scale of the columns.",
        exit_on_error=False,
    )
    parser.add_argument(
        "run", type=str, metavar="RUN", help="The folder of a run of kdejsd fit, or the file of its checkpoint."
    )
    parser.add_argument("--out", type=str, metavar="DIR", help="The folder; default: a fresh one in that of the run.")
    parser.add_argument(
        "--onnx", action="store_true", help="Add encoder.onnx and decoder.onnx, for runtimes other than PyTorch."
    )
    parser.add_argument(
        "--push",
        type=str,
        metavar="OWNER/NAME",
        help="Upload the folder to this repository of the Hugging Face hub, too, from which the card's code then loads "
        "the model. It is made if it is not there, private or public as the account has it by default.",
    )
    config = parser.parse_args(args)
    if config.push is not None and not re.fullmatch(r"[^\s/]+/[^\s/]+", config.push):
        raise ValueError(f"push must be a repository with its owner, such as user/digits, got {config.push}")
    file, checkpoint = opened(config.run)
    model = loaded_model(file, "cpu")
    run = run_folder(file)
    with TemporaryDirectory() as made:  # so that an export that fails leaves no folder
        model.save_pretrained(made)
        if config.onnx:
            write_onnx(model, made)
        write_card(Path(made), model, checkpoint, run, config.push or ".")
        folder = fresh_folder(config.out, run / "export")
        shutil.copytree(made, folder, dirs_exist_ok=True)
    print(f"exported: {folder}")
    if config.push is not None:
        hub = HfApi()
        hub.create_repo(config.push, exist_ok=True)
        print(f"pushed: {hub.upload_folder(repo_id=config.push, folder_path=folder)}")
    return 0
