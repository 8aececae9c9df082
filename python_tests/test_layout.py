"""The package's rooms, which are its folders and the modules beside them, import each other in one direction only."""

from __future__ import annotations

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import kdejsd

PACKAGE = Path(kdejsd.__file__).parent


def room(path: Path) -> str:
    """Returns the name of the folder or the module, directly in the package, that a path is in."""
    inside = path.relative_to(PACKAGE)
    return inside.with_suffix("").parts[0] if inside.name else "kdejsd"


def imported(file: Path) -> set[str]:
    """Returns the rooms that a file imports from, whether at once or later."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            folder = file.parents[node.level - 1].joinpath(*filter(None, (node.module or "").split(".")))
            for path in (folder / alias.name for alias in node.names):
                is_module = path.is_dir() or path.with_name(f"{path.name}.py").exists()
                found.add(room(path if is_module else folder))
    return found


def test_no_import_runs_up():
    graph: dict[str, set[str]] = {}
    for file in PACKAGE.rglob("*.py"):
        here = room(file.parent if file.name == "__init__.py" else file)
        graph.setdefault(here, set()).update(imported(file) - {here})
    assert {"ops", "models", "runs"} <= graph.keys() and "lagged" in graph["models"]
    list(TopologicalSorter(graph).static_order())  # raises CycleError, which names the rooms of a circle


def test_what_needs_no_lightning_does_not_import_it():
    needing = {"models", "data", "runs", "drawing"}  # f_divergences alone is read before a model is
    for file in PACKAGE.rglob("*.py"):
        if room(file) not in needing and file.stem != "_former_names":
            assert "import lightning" not in file.read_text() and "from lightning" not in file.read_text(), file
