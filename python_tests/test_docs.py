"""Tests the documentation: its pages' and the README's blocks of code, the docstrings' examples, and the reference."""

from __future__ import annotations

import ast
import contextlib
import doctest
import importlib.util
import inspect
import io
import os
import pkgutil
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import kdejsd
from kdejsd.cli import main

ROOT = Path(__file__).parents[1]
PAGES = {str(page.relative_to(ROOT)): page for page in (ROOT / "README.md", *sorted((ROOT / ".docs").rglob("*.md")))}
PRINTED = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE

# The commands run as they are written, but a training is cut short.
STEPS, STEPS_OF_RESUMED = 2, 4
# What is not run, and how it is looked at instead.
LOOKED_AT = ("pip", "python", "sphinx-build")


@dataclass
class Block:
    info: str
    text: str
    line: int  # of its first line, from 0
    printed: str | None = None


def blocks(page: Path) -> Iterator[Block]:
    """The fenced blocks of a page; a `text` block is what the one before it prints."""
    block: Block | None = None
    text = page.read_text()
    for fence in re.finditer(r"^( *)(`{3,}|~{3,})(.*)\n((?s:.*?))^\1\2 *$", text, re.M):
        info, line = fence[3].strip(), text.count("\n", 0, fence.start(4))
        if info.startswith("{"):  # a directive of Sphinx
            continue
        if info == "text":
            assert block is not None, f"{page}:{line}: what is this the output of?"
            block.printed, block = fence[4], None
            continue
        assert info in RUN, f"{page}:{line}: a block must be one of {', '.join(RUN)} or text, got {info!r}"
        block = Block(info, fence[4], line)
        yield block


class Run:
    """A page's blocks, in their order, with one set of names and in one folder."""

    def __init__(self, page: Path) -> None:
        self.page = page
        self.names: dict[str, Any] = {"__name__": "__main__"}
        self.left_out: list[str] = []

    def python(self, block: Block) -> None:
        exec(compile("\n" * block.line + block.text, self.page, "exec"), self.names)

    def sh(self, block: Block) -> None:
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words:
                end = words.index("&&") if "&&" in words else len(words)
                command, words = words[:end], words[end + 1 :]
                while "=" in command[0]:  # a variable of the environment
                    command = command[1:]
                self.command(*command)

    def command(self, name: str, *args: str) -> None:
        if name in LOOKED_AT:
            return look_at(name, *args)
        assert name == "kdejsd", f"{self.page}: {name} is not run"
        if "DIR" in args:
            if "KDEJSD_DATA" not in os.environ:
                return self.left_out.append(" ".join(args))
            args = tuple(os.environ["KDEJSD_DATA"] if arg == "DIR" else arg for arg in args)
        if "FILE.csv" in args:
            rows = (f"{i},{i % 7},{'ab'[i % 2]}\n" for i in range(40))
            Path("FILE.csv").write_text("".join(("x,y,NAME\n", *rows)))
        if args[0] == "fit" and "--help" not in args:
            args = (*args, f"--trainer.max_steps={STEPS_OF_RESUMED if '--ckpt_path' in args else STEPS}")
        try:
            status = main(list(args))
        except SystemExit as end:  # after --help
            status = end.code
        assert not status, f"{self.page}: kdejsd {shlex.join(args)}"

    def yaml(self, block: Block) -> None:
        """A file whose first line is its name."""
        Path(block.text.splitlines()[0].removeprefix("# ")).write_text(block.text)


RUN = {"python": Run.python, "sh": Run.sh, "yaml": Run.yaml}


def look_at(name: str, *args: str) -> None:
    """That the extras, the script or the folder of a command that is not run exist."""
    if name == "pip":
        for extra in re.findall(r"\.\[(\w+)\]", " ".join(args)):
            assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.M), f"no extra {extra}"
    elif name == "sphinx-build":
        assert (ROOT / args[1] / "conf.py").is_file()
    elif args[0] != "-m":
        assert (ROOT / args[0]).is_file()


@pytest.mark.parametrize("name", PAGES)
def test_blocks_run(name, tmp_path, monkeypatch, undrawn):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KDEJSD_CHECK", "0")  # as it is again after a page that sets it
    (tmp_path / "bench").symlink_to(ROOT / "bench")
    run = Run(PAGES[name])
    for block in list(blocks(run.page)):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            RUN[block.info](run, block)
        if block.printed is not None:
            example = doctest.Example(block.text, block.printed)
            checker = doctest.OutputChecker()
            assert checker.check_output(block.printed, out.getvalue(), PRINTED), (
                f"{name}:{block.line}\n{checker.output_difference(example, out.getvalue(), PRINTED)}"
            )
    if run.left_out:
        pytest.skip(f"KDEJSD_DATA is not set, without which these did not run: {'; '.join(run.left_out)}")


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    page = PAGES[name]
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


# ----------------------------------------------------------------------------------------------------------------------
# The docstrings

NOT_PYTHON, RUNS_WHEN_IMPORTED = "kdejsd._C", "kdejsd.__main__"
FOUND = [module.name for module in pkgutil.walk_packages(kdejsd.__path__[:1], "kdejsd.")]  # not an installed copy's
MODULES = ["kdejsd", *(name for name in FOUND if name not in (NOT_PYTHON, RUNS_WHEN_IMPORTED))]


@dataclass
class Docstring:
    place: str  # file:line
    text: str
    of_function: bool


def docstrings(module: ModuleType) -> list[Docstring]:
    """Returns all docstrings of a module's file: its own, and those of public and private names."""
    assert module.__file__ is not None
    found = []
    for node in ast.walk(ast.parse(Path(module.__file__).read_text())):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            text = ast.get_docstring(node, clean=False)
            if text is not None:
                place = f"{module.__file__}:{node.body[0].lineno}"
                found.append(Docstring(place, text, isinstance(node, ast.FunctionDef)))
    return found


def imported(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("kdejsd"):
            raise
        pytest.skip(f"{name}: {error}")


@pytest.mark.parametrize("name", MODULES)
def test_examples_of_docstrings(name):
    out, failed = io.StringIO(), 0
    for docstring in docstrings(imported(name)):
        names = {"__name__": "__main__"}  # no others, so that an example can be copied as it is
        test = doctest.DocTestParser().get_doctest(docstring.text, names, docstring.place, None, None)
        failed += doctest.DocTestRunner(verbose=False, optionflags=PRINTED).run(test, out=out.write).failed
    assert not failed, out.getvalue()


@pytest.mark.parametrize("name", MODULES)
def test_docstrings_begin_with_a_sentence(name):
    found = docstrings(imported(name))
    for docstring in found:
        first = docstring.text.strip().splitlines()[0]
        assert not re.match(r"(What|The same|As)\b", first), f"{docstring.place}: {first}"
        assert first.endswith("."), f"{docstring.place}: no full stop at the end of the first line: {first}"
        if docstring.of_function:
            assert re.match(r"[A-Z]\w*s\b", first), f"{docstring.place}: no verb in the third person: {first}"


def test_public_names_have_an_example():
    names = {name: value for name, value in entries().items() if inspect.isroutine(value) or inspect.isclass(value)}
    assert len(names) > 50
    without = [name for name, value in names.items() if not re.search(r"\n *Example:\n *>>> ", value.__doc__ or "")]
    assert not without, f"no example: {', '.join(without)}"


# ----------------------------------------------------------------------------------------------------------------------
# The reference


def public(module: Any) -> dict[str, object]:
    """Returns what a module's `__all__` lists, or what it defines without an underscore."""
    if hasattr(module, "__all__"):
        return {name: getattr(module, name) for name in module.__all__}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and getattr(value, "__module__", None) == module.__name__
    }


def entries() -> dict[str, object]:
    """Returns what the reference documents, by its full name."""
    found: dict[str, object] = {}
    for page in (ROOT / ".docs" / "reference").glob("*.rst"):
        for kind, name, options in re.findall(r"^\.\. ([\w:]+):: (kdejsd\S+)\n((?:   :.*\n)*)", page.read_text(), re.M):
            found[name] = pkgutil.resolve_name(name)
            if kind == "automodule" and ":no-members:" not in options:
                found |= {f"{name}.{member}": value for member, value in public(found[name]).items()}
    return found


def test_every_public_name_has_an_entry():
    documented = entries()
    for module in map(pkgutil.resolve_name, MODULES):
        if hasattr(module, "__all__") or module.__name__ in ("kdejsd.metrics", "kdejsd.plots"):
            for name, value in public(module).items():
                full = f"{module.__name__}.{name}"
                found = full in documented or any(value is entry for entry in documented.values())
                assert found, f"{full} has no entry in .docs"


def test_docstrings_as_rst():
    spec = importlib.util.spec_from_file_location("conf", ROOT / ".docs" / "conf.py")
    conf = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conf)
    lines = [
        "The sum a * b of |x| and `y * z`, for f* and p_e.",
        "",
        "    sum_i a_i * |b_i|",
        "",
        "* an item,",
        "  and the rest of it",
        "",
        "Args:",
        "    latent_dim: l.",
        "",
        "Example:",
        "    >>> a * b",
        "    |x|",
    ]
    conf.as_rst(None, None, None, None, None, lines)
    assert lines == [
        r"The sum a \* b of \|x\| and `y * z`, for f\* and p_e.",
        "",
        "::",
        "",
        "    sum_i a_i * |b_i|",
        "",
        "* an item,",
        "  and the rest of it",
        "",
        "Args:",
        r"    latent_dim: l\.",
        "",
        "Example:",
        "    >>> a * b",
        "    |x|",
    ]
