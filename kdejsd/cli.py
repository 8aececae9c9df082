"""Defines the command `kdejsd`."""

from __future__ import annotations

import argparse
import importlib
import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import kdejsd

from .bandwidth import optimal_bandwidth

# The commands that have a module of their name in kdejsd/runs, with a function of that name; they read their arguments
# themselves.
_ON_RUNS = {
    "fit": "train a model on images; write a report",
    "evaluate": "write the report of a checkpoint anew",
    "score": "write how novel each image is to a checkpoint's model",
}

_LONGEST = 400  # characters of a message that is not kdejsd's own
# How lines of jsonargparse begin that stand around a cause.
_AROUND = r"Does not validate against|Subtypes: |Errors:$|Problem with given class_path|Given value"


def main(argv: list[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = _parser()
    args, rest = parser.parse_known_args(argv)
    if rest and args.command not in _ON_RUNS:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    try:
        if args.command == "info":
            return _info()
        if args.command == "bandwidth":
            return _bandwidth(args)
        with _no_display():
            module = importlib.import_module(f".runs.{args.command}", __package__)  # needs the extra `train`
        _quiet()
        command: Callable[[list[str]], int] = getattr(module, args.command)
        return command(rest)
    except Exception as error:
        if os.environ.get("KDEJSD_DEBUG") == "1":
            raise
        print(f"kdejsd {args.command}: error: {_sentence(error)}", file=sys.stderr)
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


def _quiet() -> None:
    """Silences messages that tell a user nothing.

    These are Lightning's tips, its device list, its advice on workers and its use of old torch names, and
    torch.export's traceback.
    """
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("torch.export").setLevel(logging.ERROR)  # it logs a traceback beside the error that it raises
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    warnings.filterwarnings("ignore", message=".*isinstance\\(treespec, LeafSpec\\).*")


def _sentence(error: Exception) -> str:
    """Returns one line that says what went wrong."""
    text = str(error)
    if re.search('^Parser key "|Given value type: ', text):
        return _innermost(text)
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
    if Path(__file__).parent in raised_in.parents:  # it says all that a user needs
        return text
    text = " ".join(text.split())
    if isinstance(error, argparse.ArgumentError):
        return text
    text = f"{text[:_LONGEST]} ..." if len(text) > _LONGEST else text
    return f"{type(error).__name__}: {text} (KDEJSD_DEBUG=1 in the environment shows where)"


def _innermost(message: str) -> str:
    """Returns the cause in jsonargparse's nested messages, with the name of the setting."""
    keys: list[tuple[int, str]] = []
    causes: list[tuple[str, str]] = []
    for line in filter(str.strip, message.splitlines()):
        text = line.strip()
        indent = len(line) - len(line.lstrip())
        keys = [(outer, key) for outer, key in keys if outer < indent]
        while match := re.match(r'(?:- )?Parser key "([^"]*)":\s*', text):
            keys.append((indent, match[1]))
            text = text[match.end() :]
        text = text.removeprefix("- ")
        if text and not re.match(_AROUND, text):
            causes.append((".".join(key for _, key in keys), text))
    # What one kind of value does not fit is of no interest where another kind has a complaint of its own.
    complaints = [cause for cause in causes if not re.match("Expected a|Import path", cause[1])]
    setting, text = complaints[0] if complaints else causes[0]
    if not complaints:
        text = "; or ".join(
            dict.fromkeys(cause for name, cause in causes if name == setting and "NoneType" not in cause)
        )
    text = re.sub(r"Expected a (?:typing\.)?Literal\[(.*?)\]", r"expected one of \1", text)
    text = re.sub(r"Expected a <class '(.*?)'>", r"expected \1", text).replace(". Got value: ", ", got ")
    return f"--{setting}: {text}" if setting else text


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="kdejsd", description=kdejsd.__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, does in _ON_RUNS.items():
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
    print(
        f"searching the bandwidth for {args.num_centers} centers in {args.latent_dim} dimensions, the mean of "
        f"{args.trials} trials",
        file=sys.stderr,
        flush=True,
    )
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
