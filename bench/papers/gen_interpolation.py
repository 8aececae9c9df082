"""Interpolation in the latent space of a trained GEN (supplement 2.4 of the GENs paper).

    python bench/papers/gen_interpolation.py CKPT --out STEM     # CKPT as `kdejsd fit` writes it
    python bench/papers/gen_interpolation.py --quick --out STEM  # trains one on scikit-learn's digits first

Paper: S. Saha, S. Elhabian, R. T. Whitaker, "GENs: Generative Encoding Networks", arXiv 2010.15283. Each row of a
picture leads from the code of one held-out image to that of another (of another class, where there are classes) in
equal steps, along a line in STEM_line.png and along an arc in STEM_arc.png. Printed is where the ways lead: the mean
length of the latents, that of the codes being 1, and their mean log-density under the target. The middle of a line
between two normal codes is shorter than codes are, the more so the more dimensions there are, and likelier than any; on
an arc it is neither. The paper shows faces, between test images and between random samples, along the line.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch
from jsonargparse import ArgumentParser
from torch import Tensor

from kdejsd import plots
from kdejsd._modes import evaluating
from kdejsd.data import ExampleSet
from kdejsd.runs.fit import fit
from kdejsd.runs.saved import open_checkpoint

QUICK = [
    "--model.latent_dim=8",
    "--model.num_lagged=500",
    "--trainer.max_steps=500",
    "--trainer.enable_progress_bar=false",
]


def pairs(images: ExampleSet, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices [count] of images, and of as many others, none of the class of its partner."""
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = images.labels.tolist()
    starts, ends = order[:count], []
    for start in starts:
        free = (i for i in reversed(order) if i not in (start, *ends))
        end = next((i for i in free if labels[i] != labels[start] or labels[i] < 0), None)
        if end is None:
            raise ValueError(f"no image of another class than {labels[start]} is left for {count} pairs")
        ends.append(end)
    return torch.tensor(starts), torch.tensor(ends)


def draw(arguments: list[str]) -> int:
    """Writes the pictures and prints where the ways lead."""
    parser = ArgumentParser(
        prog="gen_interpolation.py", description="Images decoded on the way between codes of held-out images."
    )
    parser.add_argument(
        "--out", type=str, required=True, metavar="STEM", help="Pictures are STEM_line.png, STEM_arc.png."
    )
    parser.add_argument("--rows", type=int, default=10, help="Pairs of images.")
    parser.add_argument("--steps", type=int, default=11, help="Images in a row, with both ends; odd, to have a middle.")
    parser.add_argument("--seed", type=int, default=0, help="Of the pairs.")
    config, _, model, data, _ = open_checkpoint(parser, arguments)
    stem = Path(config.out)
    stem.parent.mkdir(parents=True, exist_ok=True)
    start, end = (data.held_out[index][0].to(model.device) for index in pairs(data.held_out, config.rows, config.seed))
    with torch.no_grad(), evaluating(model):
        start, end = model.encode(start), model.encode(end)
    target = getattr(model, "lagged", model).target
    unit = torch.cat([start, end]).norm(dim=1).mean()
    print(f"{type(model).__name__}, l = {start.shape[1]}: {config.rows} pairs of held-out images, from end to end")
    for path in ("line", "arc"):
        latents = plots.between(start, end, steps=config.steps, path=path)
        lengths = latents.norm(dim=2).mean(0) / unit
        density = target.log_prob(latents).mean(0)
        print(f"{path:5} length {' '.join(f'{x:7.2f}' for x in lengths.tolist())}")
        print(f"{'':5} log p  {' '.join(f'{x:7.2f}' for x in density.tolist())}")
        file = stem.with_name(f"{stem.name}_{path}.png")
        plots.interpolation(model.decode, start, end, steps=config.steps, path=path).savefig(file)
    return 0


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if "--quick" not in arguments:
        return draw(arguments)
    with tempfile.TemporaryDirectory() as folder:
        fit([*QUICK, f"--out={folder}/run"])
        rest = [argument for argument in arguments if argument != "--quick"]
        return draw([f"{folder}/run/checkpoints/last.ckpt", *rest])


if __name__ == "__main__":
    raise SystemExit(main())
