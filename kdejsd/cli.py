"""Defines the command `kdejsd`."""

# It imports nothing that takes long: what a command needs is imported when it runs, so that help comes at once.

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NoReturn

from ._version import __version__
from .runs.errors import did_you_mean, sentence

# The commands that have a module of their name in kdejsd/runs, with a function of that name; they read their arguments
# themselves.
_ON_RUNS = {
    "fit": "train a model on examples; write a report",
    "evaluate": "write the report of a run again",
    "score": "score how novel each example is to a run's model",
    "export": "write a run's model into a folder to share, for Python, the Hugging Face hub or ONNX",
}


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser, commands = _parsers()
    argv = sys.argv[1:] if argv is None else argv
    named = next((arg for arg in argv if not arg.startswith("-")), None)
    if named is not None and named not in commands:
        parser.error(f"there is no command {named}{did_you_mean(named, commands) or '; --help lists them'}")
    if named not in _ON_RUNS:
        reader = parser if named is None else commands[named]
        known = re.findall(r"--[\w-]+", parser.format_help() + reader.format_help())
        for option in (arg.partition("=")[0] for arg in argv if arg.startswith("--")):
            if option not in known:
                reader.error(f"there is no option {option}{did_you_mean(option, known)}")
    args, rest = parser.parse_known_args(argv)
    if args.command == "bandwidth" and args.smoothed and args.method != "root":
        commands["bandwidth"].error(f"--smoothed needs --method root, got {args.method}")
    if rest and args.command not in _ON_RUNS:
        commands[args.command].error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command == "info":
            return _info()
        if args.command == "bandwidth":
            with _telling():
                return _bandwidth(args)
        if sys.stderr.isatty() and not any(arg == "-h" or "help" in arg for arg in rest):
            print(f"kdejsd {args.command}: loading PyTorch and Lightning", file=sys.stderr)
        with _no_display():
            module = importlib.import_module(f".runs.{args.command}", __package__)  # needs the extra `train`
        _quiet()
        command: Callable[[list[str]], int] = getattr(module, args.command)
        with _telling():
            return command(rest)
    except KeyboardInterrupt:
        if args.debug:
            raise
        print(f"\nkdejsd {args.command}: stopped", file=sys.stderr)
        return 130
    except Exception as error:
        if args.debug:
            raise
        print(f"kdejsd {args.command}: error: {sentence(error)}", file=sys.stderr)
        return 2 if isinstance(error, argparse.ArgumentError) else 1


@contextmanager
def _no_display() -> Iterator[None]:
    """Selects a matplotlib backend that draws into files, around the first import of matplotlib.

    The command needs no window or notebook. The environment may name a backend for one that this process does not have.
    """
    named = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    try:
        yield
    finally:
        if named is None:
            del os.environ["MPLBACKEND"]
        else:
            os.environ["MPLBACKEND"] = named


@contextmanager
def _telling() -> Iterator[None]:
    """Lets the logger of kdejsd, which tells of long searches, write to stderr."""
    logger, handler = logging.getLogger("kdejsd"), logging.StreamHandler()
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _quiet() -> None:
    """Silences messages that tell a user nothing, and shows warnings as the sentences that they are.

    Silenced are Lightning's tips, its device list, its advice on workers and on short epochs and its use of old torch
    names, torch.export's traceback, and what torch's exporter to ONNX finds not installed.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it logs a traceback beside the error that it raises
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*is smaller than the logging interval.*")  # which spans epochs
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"


class _Parser(argparse.ArgumentParser):
    """Ends with an error of one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def _parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """Returns the parser of the whole command, and those of its commands by name."""
    parser = _Parser(prog="kdejsd", description=sys.modules[__package__].__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"kdejsd {__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    adding = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    shared = _Parser(add_help=False)  # of what may stand before the command's name and after it
    shared.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    for name, does in _ON_RUNS.items():
        adding.add_parser(name, add_help=False, help=does, parents=[shared], allow_abbrev=False)
    bandwidth = adding.add_parser(
        "bandwidth",
        help="the optimal kernel bandwidth for a latent space",
        description="Finds the bandwidth at which a KDE of m standard normal samples is most like the standard normal.",
        parents=[shared],
        allow_abbrev=False,
    )
    bandwidth.add_argument("--latent_dim", type=_count(1), required=True, help="l, the dimension of the codes")
    bandwidth.add_argument("--num_centers", type=_count(1), required=True, help="m, the number of lagged codes")
    bandwidth.add_argument("--smoothed", action="store_true", help="for a KDE compared with the smoothed target")
    bandwidth.add_argument("--method", choices=["root", "fixed-point"], default="root", help="the method of the search")
    bandwidth.add_argument(
        "--trials",
        type=_count(1),
        help="search with this many sets of samples; default: average over all sets",
    )
    bandwidth.add_argument("--seed", type=_count(0), default=0, help="the seed of the samples (default: 0)")
    adding.add_parser("info", help="what was built and what can be used on this machine", parents=[shared])
    return parser, dict(adding.choices)


def _count(least: int) -> Callable[[str], int]:
    """Returns what reads an integer of at least `least` from an argument."""

    def count(text: str) -> int:
        if not text.isascii() or not text.lstrip("-").isdigit() or int(text) < least:
            raise argparse.ArgumentTypeError(f"expected an integer of at least {least}, got {text}")
        return int(text)

    return count


def _bandwidth(args: argparse.Namespace) -> int:
    from .bandwidth import optimal_bandwidth

    found = optimal_bandwidth(
        args.latent_dim,
        args.num_centers,
        smoothed=args.smoothed,
        method=args.method,
        trials=args.trials,
        seed=args.seed,
    )
    print(f"bandwidth           {found.value:.4g}")
    if found.trials:
        print(f"standard deviation  {found.std:.2g} between {len(found.trials)} trials")
    return 0


def _info() -> int:
    from ._native import build_info

    info = build_info()
    width = max(len(name) for name in info)
    for name, value in info.items():
        print(f"{name:{width}}  {value}")
    return 0
