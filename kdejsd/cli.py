"""The command `kdejsd`."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import kdejsd

from .bandwidth import optimal_bandwidth

# The commands that training.py has functions for; they read their arguments themselves.
_TRAINING = {
    "fit": "train a model on images; write a report",
    "evaluate": "write the report of a checkpoint anew",
    "score": "write how novel each image is to a checkpoint's model",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in _TRAINING:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command == "info":
            return _info()
        if args.command == "bandwidth":
            return _bandwidth(args)
        from . import training  # needs the extra `train`

        command: Callable[[list[str]], int] = getattr(training, args.command)
        return command(rest)
    except Exception as error:
        # An error that kdejsd raises says all a user needs; anything else keeps its traceback.
        raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        if Path(__file__).parent not in raised_in.parents:
            raise
        print(f"kdejsd {args.command}: error: {error}", file=sys.stderr)
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdejsd", description=kdejsd.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, does in _TRAINING.items():
        commands.add_parser(name, add_help=False, help=does)
    bandwidth = commands.add_parser(
        "bandwidth",
        help="the optimal kernel bandwidth for a latent space",
        description="The bandwidth at which a KDE of m standard-normal samples looks most like the standard normal.",
    )
    bandwidth.add_argument("--latent_dim", type=int, required=True, help="l, the dimension of the codes")
    bandwidth.add_argument("--num_centers", type=int, required=True, help="m, the number of lagged codes")
    bandwidth.add_argument("--smoothed", action="store_true", help="for a KDE compared with the smoothed target")
    bandwidth.add_argument("--method", choices=["root", "fixed-point"], default="root", help="how to find it")
    bandwidth.add_argument("--trials", type=int, default=10, help="independent sample sets (default: 10)")
    bandwidth.add_argument("--seed", type=int, default=0, help="of the samples (default: 0)")
    commands.add_parser("info", help="what was built and what can be used on this machine")
    return parser


def _bandwidth(args: argparse.Namespace) -> int:
    found = optimal_bandwidth(
        args.latent_dim,
        args.num_centers,
        smoothed=args.smoothed,
        method=args.method,
        trials=args.trials,
        seed=args.seed,
    )
    print(f"bandwidth           {found.value:.6g}")
    print(f"standard deviation  {found.std:.2g} between {len(found.trials)} trials")
    return 0


def _info() -> int:
    info = kdejsd.build_info()
    width = max(len(name) for name in info)
    for name, value in info.items():
        print(f"{name:{width}}  {value}")
    return 0
