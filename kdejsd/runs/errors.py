"""Says in one sentence what went wrong, and names what may have been meant."""

from __future__ import annotations

import argparse
import re
import traceback
from collections.abc import Collection, Iterable, Mapping
from difflib import get_close_matches
from pathlib import Path

_LIKE = 0.7  # difflib's measure of how alike two names are, from which on one may be meant for the other
_LONGEST = 400  # characters of a message that is not kdejsd's own
# How lines of jsonargparse begin that stand around a cause.
_AROUND = r"Does not validate against|Subtypes: |Errors:$|Problem with given class_path|Given value"
_NESTED = '^Parser key "|Given value type: '  # in a message of theirs
_UNKNOWN = r"""(?:Option|Key|Group '(?P<group>[^']*)' does not accept option) ['"](?P<name>[^'"]*)['"]"""
_KINDS = {"int": "an integer", "float": "a number", "bool": "true or false", "str": "text"}


def sentence(error: Exception) -> str:
    """Returns one line that says what went wrong.

    Example:
        >>> from kdejsd.runs.errors import sentence
        >>> sentence(RuntimeError("of another library,\\nin two lines"))
        'RuntimeError: of another library, in two lines (--debug shows where)'
    """
    text = str(error)
    if isinstance(error, argparse.ArgumentError) or re.search(_NESTED, text):
        return setting_error(text)
    raised_in = Path(traceback.extract_tb(error.__traceback__)[-1].filename) if error.__traceback__ else Path()
    if Path(__file__).parents[1] in raised_in.parents:  # it says all that a user needs
        return text
    return f"{type(error).__name__}: {_shortened(text)} (--debug shows where)"


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of a sentence about an unknown name: the known one that is most like it, or nothing.

    A name with dots is that of a setting in a group, and is looked for in its group first.

    Example:
        >>> from kdejsd.runs.errors import did_you_mean
        >>> did_you_mean("fitt", ["fit", "evaluate"])
        '; did you mean fit?'
        >>> did_you_mean("--latent-dim", ["--data.seed", "--model.latent_dim"])
        '; did you mean --model.latent_dim?'
    """
    known = list(known)
    if name.startswith("--"):
        name = "--" + name[2:].replace("-", "_")
    group, _, last = name.rpartition(".")
    ends = {setting: setting.rpartition(".")[2].lstrip("-") for setting in known}
    last = last.lstrip("-")
    same = [setting for setting, end in ends.items() if end == last]
    inside = [setting for setting in known if setting.rpartition(".")[0] == group]
    by_end = {ends[setting].lower(): setting for setting in inside}
    found = sorted(same, key=lambda setting: setting not in inside)
    found += [by_end[end] for end in get_close_matches(last.lower(), by_end, cutoff=_LIKE)]
    if not group:
        found += get_close_matches(name, known, cutoff=_LIKE)
    return f"; did you mean {found[0]}?" if found else ""


def setting_error(message: str, known: Collection[str] = (), owners: Mapping[str, str] | None = None) -> str:
    """Returns jsonargparse's message about a setting as one sentence.

    Args:
        message: jsonargparse's, which may have many lines.
        known: the names of all settings, each with its group, such as "--model.latent_dim".
        owners: for a group such as "model" the name of the class that has its settings.
    """
    setting, text = _innermost(message)
    unknown = re.match(_UNKNOWN, text)
    strange = re.match(r"unrecognized arguments: (--[^\s=]+)", text, re.IGNORECASE)
    missing = re.match(r"the following arguments are required: (.*)", text)
    if unknown:
        name = ".".join(filter(None, (setting, unknown["group"], unknown["name"])))
        groups = {setting.partition(".")[0] for setting in known}
        if known and f"--{name.partition('.')[0]}" not in groups:
            name, known = name.partition(".")[0], groups
        owner = (owners or {}).get(name.rpartition(".")[0])
        meant = did_you_mean(f"--{name}", known)
        return f"{owner} has no setting --{name}{meant}" if owner else f"there is no setting --{name}{meant}"
    if strange:
        return f"there is no setting {strange[1]}{did_you_mean(strange[1], known) or '; --help lists them'}"
    if missing:
        names = " and ".join(f"--{setting}.{name}" if setting else name for name in re.split(r",\s*", missing[1]))
        owner = (owners or {}).get(setting)
        return f"{owner} needs {names}" if owner else f"{names} must be given"
    text = _in_words(_shortened(text))
    return f"--{setting}: {text}" if setting else text


def _in_words(text: str) -> str:
    """Returns what jsonargparse says of a value with plain words for types, and with the choice that may be meant."""
    text = re.sub(r"Expected a (?:typing\.)?Literal\[(.*?)\]", r"expected one of \1", text)
    text = re.sub(
        r"Expected a <class '(.*?)'>", lambda found: f"expected {_KINDS.get(found[1], found[1])}", text
    ).replace(". Got value: ", ", got ")
    path = r"Expected a path but (.*?) either not accessible or invalid(?:; or Expected a dot import path string: .*?)?"
    text = re.sub(rf"{path}(?=;|$)", r"expected the name or the import path of a class, got \1", text)
    text = re.sub(r"\bExpected ", "expected ", text)
    choices = re.findall(r"'([^']*)'", text)
    got = re.search(r", got (\S+)$", text)
    return text + (did_you_mean(got[1], choices) if got and got[1] not in choices else "")


def _innermost(message: str) -> tuple[str, str]:
    """Returns the name of the setting and the cause in jsonargparse's nested messages."""
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
    if not re.search(_NESTED, message):
        return "", " ".join(message.split())
    # What one kind of value does not fit is of no interest where another kind has a complaint of its own.
    complaints = [cause for cause in causes if not re.match("Expected a|Import path", cause[1])]
    setting, text = complaints[0] if complaints else causes[0]
    if not complaints:
        text = "; or ".join(
            dict.fromkeys(cause for name, cause in causes if name == setting and "NoneType" not in cause)
        )
    nested = re.search(rf"expects a function or a callable class: ({_UNKNOWN})", text)
    return setting, nested[1] if nested else text


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return f"{text[:_LONGEST]} ..." if len(text) > _LONGEST else text
