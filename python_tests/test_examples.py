"""Tests the example scripts of the documentation: the training loops as they are, the others in a short form."""

import functools
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import results_of_ranks, run_here
from PIL import Image

DOCS = Path(__file__).parents[1] / ".docs"
SCRIPTS = DOCS / "examples"
GALLERY = (DOCS / "gallery.md").read_text()


def numbers(pattern: str, text: str) -> list[float]:
    """Returns the numbers that the groups of the pattern match, which must be there once."""
    found = re.findall(pattern, text)
    assert len(found) == 1, text
    return [float(number) for number in ([found[0]] if isinstance(found[0], str) else found[0])]


# ----------------------------------------------------------------------------------------------------------------------
# Training loops, most of them on two processes

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"}
ENVIRONMENT["ACCELERATE_USE_CPU"] = "true"  # else it would let each process train by itself


def run_loop(script: str, *arguments: str, launcher: tuple[str, ...] = ()) -> str:
    """Runs an example as a user does, and returns what it prints."""
    command = [sys.executable, *launcher, str(SCRIPTS / script), *arguments]
    done = subprocess.run(command, env=os.environ | ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def of_rank(rank: int, ranks: int, script: str) -> str:
    os.environ |= ENVIRONMENT
    done = run_here(SCRIPTS / script)
    assert done.returncode == 0, done.stderr
    return done.stdout


def on_two_ranks(script: str, folder: Path) -> str:
    """Runs an example with the variables that torchrun sets, and returns what its processes print."""
    return "".join(results_of_ranks(2, folder, functools.partial(of_rank, script=script), joined=False))


TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node=2")
LOOPS = {
    "plain": lambda folder: run_loop("plain_loop.py", launcher=TORCHRUN),
    "accelerate": lambda folder: on_two_ranks("accelerate_loop.py", folder),
    "fabric": lambda folder: run_loop("fabric_loop.py", "2"),
    "lightning": lambda folder: run_loop("lightning_loop.py", "--devices=2"),
    "pythae": lambda folder: run_loop("pythae_gen.py"),
}


@pytest.mark.parametrize("name", LOOPS)
def test_a_loop_trains_codes_that_follow_the_normal(name, tmp_path, monkeypatch):
    if name in ("accelerate", "pythae"):
        pytest.importorskip(name, reason=f"{name} is not installed")
    monkeypatch.chdir(tmp_path)
    entropies = r"entropy of their whitened codes ([\d.]+) nats, of as many normal samples ([\d.]+)"
    printed = LOOPS[name](tmp_path / "ranks")
    error, of_codes, of_normal = numbers(rf"reconstruction error ([\d.]+)\n{entropies}", printed)  # once
    assert error < 0.06 and of_codes > of_normal - 1  # 0.18 before training, and 2.4 less without the latent term


# ----------------------------------------------------------------------------------------------------------------------
# Scripts that draw a picture, in this process


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Returns a function that runs a script with arguments, looks at its picture and returns what it prints."""

    def run(name: str, *arguments: str, size: tuple[int, int]) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments, "--figure=drawn.png"])
        runpy.run_path(str(SCRIPTS / f"{name}.py"), run_name="__main__")
        with Image.open("drawn.png") as picture:
            assert picture.size == size
            low, high = picture.convert("L").getextrema()
        assert low < 64 and high == 255
        return capsys.readouterr().out

    return run


def test_lightning_loop(run):
    out = run("lightning_loop", "--steps=200", size=(1020, 1020))
    of_codes, of_normal = numbers(r"codes ([\d.]+) nats, of as many normal samples ([\d.]+)", out)
    assert of_codes > of_normal - 1.2


def test_before_after(run):
    out = run("before_after", "--steps=200", size=(1200, 860))
    alone, _normalized, with_loss = map(float, re.findall(r"farthest code ([\d.]+) from 0", out))
    assert with_loss < 4 < alone
    of_codes = [float(entropy) for entropy in re.findall(r"entropy of their whitened codes ([\d.]+) nats", out)]
    (of_normal,) = numbers(r"entropy of as many normal samples ([\d.]+) nats", out)
    assert of_normal - 0.4 < of_codes[2] < of_normal + 0.1 and of_codes[2] > of_codes[1]
    assert max(map(float, re.findall(r"reconstruction error ([\d.]+)", out))) < 0.08  # 0.18 before training


def test_distribution_target(run):
    out = run("distribution_target", "--steps=150", size=(1200, 630))
    pairs = re.findall(r"divergence of their codes ([\d.]+) nats, of as many samples of the target ([\d.]+)", out)
    assert len(pairs) == 2 and all(float(target) < float(codes) < 0.15 for codes, target in pairs)


def test_mixture_with_labels(run):
    out = run("mixture_with_labels", "--steps=200", size=(1200, 630))
    (right,) = numbers(r"([\d.]+)% of the classes right", out)
    assert right > 30  # 10 by chance


def test_novelty(run):
    out = run("novelty", "--steps=150", size=(1200, 290))
    of_score, of_error = numbers(r"novelty score ([\d.]+), of the reconstruction error alone ([\d.]+)", out)
    assert of_score > 0.8 and of_error > 0.8


def test_novelty_of_folders(run, tmp_path):
    for kind, levels in (("normal", range(20, 100, 4)), ("novel", range(160, 200, 4))):
        (tmp_path / kind).mkdir()
        for level in levels:
            Image.new("RGB", (8, 8), (level, level, 255 - level)).save(tmp_path / kind / f"{level}.png")
    folders = ("--normal=normal", "--novel=novel", "--size=8", "--latent-dim=2")
    out = run("novelty", *folders, "--steps=100", size=(1200, 290))
    assert "2 normal and 10 novel images" in out


def test_diversity(run):
    out = run("diversity", "--steps=200", size=(1200, 650))
    assert len(re.findall(r"^collision entropy, nats", out, re.M)) == 2
    (right,) = numbers(r"Digits classifier, ([\d.]+) % of held-out images right", out)
    assert right > 70 and "b is more diverse" in out


# ----------------------------------------------------------------------------------------------------------------------
# The gallery


def test_the_gallery_shows_every_script():
    for script in SCRIPTS.glob("*.py"):
        assert f"examples/{script.name}" in GALLERY, script.name


def test_pictures_are_small():
    pictures = list((DOCS / "pictures").iterdir())
    assert all(picture.name in GALLERY for picture in pictures)
    sizes = [picture.stat().st_size for picture in pictures]
    assert max(sizes) < 130_000 and sum(sizes) < 1_000_000
