"""What the pages and settings around the code say: that it is true of the code, and that hosting sites can read it."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
from test_layout import PACKAGE, imported, room

import kdejsd

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).parents[1]
GITHUB = ROOT / ".github"
pytestmark = pytest.mark.skipif(not GITHUB.is_dir(), reason="a source distribution leaves .github out")

PAGES = {str(page.relative_to(ROOT)): page for page in (*sorted(GITHUB.rglob("*.md")), ROOT / "CHANGELOG.md")}
SETTINGS = [*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
CONTRIBUTING = GITHUB / "CONTRIBUTING.md"
CI = ROOT / ".ci" / "run"

# ----------------------------------------------------------------------------------------------------------------------
# Files that other programs read


@pytest.mark.parametrize("path", SETTINGS, ids=lambda path: path.name)
def test_it_is_yaml(path):
    assert isinstance(yaml.safe_load(path.read_text()), dict)


def test_workflows_are_bounded_and_run_what_is_there():
    for path in (GITHUB / "workflows").glob("*.yml"):
        workflow = yaml.safe_load(path.read_text())
        assert workflow["permissions"] == {"contents": "read"} and "concurrency" in workflow, path
        for name, job in workflow["jobs"].items():
            assert 0 < job["timeout-minutes"] <= 120, f"{path}: {name}"
            for step in job["steps"]:
                for program in re.findall(r"(?:^|python )(\.\w+/\S+)", step.get("run", ""), re.M):
                    assert (ROOT / program).is_file(), f"{path}: {program}"


def test_the_citation_and_the_changelog_are_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == kdejsd.__version__
    headings = re.findall(r"^## \[(\S+)\]", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert headings[0] == kdejsd.__version__ and len(headings) == len(set(headings))


def test_linters_before_a_commit_are_those_of_the_gate():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    before_commit = sorted(hook["entry"] for hook in repository["hooks"])
    gate = re.findall(r"^ *((?:ruff|mypy|clang-format)\b.*?)(?: csrc/.*)?$", CI.read_text(), re.M)
    assert before_commit == sorted(gate)
    kinds = set(re.findall(r"\w+", " ".join(re.findall(r"\{(\S+?)\}", CI.read_text().split("clang-format")[-1]))))
    for path in (ROOT / "csrc").rglob("*"):
        if path.suffix[1:] in kinds:
            assert any(re.search(hook.get("files", "$^"), str(path.relative_to(ROOT))) for hook in repository["hooks"])


def test_links_for_the_package_index_are_absolute():
    spec = importlib.util.spec_from_file_location("absolute_links", GITHUB / "absolute_links.py")
    links = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(links)
    page = '[a](b/c.md#d) [![p](./p.png)](#e) <img src="q.svg"> [f](https://g.h)\n```\n[a](b)\n```\n[i](j)\n'
    assert links.absolute(page, "https://r", "7") == (
        '[a](https://r/blob/7/b/c.md#d) [![p](https://r/raw/7/p.png)](#e) <img src="https://r/raw/7/q.svg"> '
        "[f](https://g.h)\n```\n[a](b)\n```\n[i](https://r/blob/7/j)\n"
    )
    readme = links.absolute((ROOT / "README.md").read_text(), "https://r", "7")
    for target in re.findall(r"https://r/(?:raw|blob)/7/([^)#\"]+)", readme):
        assert (ROOT / target).exists(), target


# ----------------------------------------------------------------------------------------------------------------------
# Pages


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", PAGES[name].read_text()):
        if "://" not in target:
            page = PAGES[name].parent / target if target else PAGES[name]
            assert page.exists(), target
            assert not anchor or anchor in anchors(page), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Returns the anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def spelled_out(code: str) -> str:
    """Returns a path of the page as one from the root, or nothing for what is no path of the repository."""
    path = code.split(" ")[0]
    if re.search(r"NAME|DATE|[*=:(]", path):  # a placeholder, a setting, an address
        return ""
    if re.fullmatch(r"_?\w+(\.py|/)", path) and not (ROOT / path).exists():  # a room
        return f"kdejsd/{path}"
    return path if "/" in path or re.search(r"\.(md|py|toml|txt|cff|h|cpp|cu|sh|yaml)$", path) else ""


def test_files_and_names_that_contributing_names_are_there():
    text = re.sub(r"^```.*?^```", "", CONTRIBUTING.read_text(), flags=re.M | re.S)
    files = [path for path in map(spelled_out, re.findall(r"`([^`]+)`", text)) if path]
    missing = [path for path in files if not (ROOT / path).exists() and path not in ("build/docs", "wheels.yml")]
    assert len(files) > 80 and not missing
    pairs = re.findall(r"`([\w-]+)`(?:, [^`]*?,)?\s+in\s+`([\w./]+\.\w+)`", text)
    assert len(pairs) > 15
    for word, path in pairs:
        assert word in (ROOT / path).read_text(), f"{word} in {path}"


def test_commands_of_contributing_name_files_that_are_there():
    for block in re.findall(r"^```sh\n(.*?)^```", CONTRIBUTING.read_text(), re.M | re.S):
        for path in re.findall(r"(?:^|\s)((?:python_tests|bench|\.ci)/\S+)", block):
            assert (ROOT / path).is_file(), path


def test_contributing_lists_the_rooms_from_the_ground_up():
    rows = re.findall(r"^\| (`\w+(?:\.py|/)`(?:, `\w+(?:\.py|/)`)*) \|", CONTRIBUTING.read_text(), re.M)
    order = [name.removesuffix(".py").rstrip("/") for row in rows for name in re.findall(r"`(.+?)`", row)]
    rooms = {room(file) for file in PACKAGE.rglob("*.py")}
    assert sorted(order) == sorted(rooms)
    for file in PACKAGE.rglob("*.py"):
        here = room(file)
        above = {*order[: order.index(here)], here, "kdejsd"}  # the last: `from . import name` of the package itself
        assert imported(file) <= above, f"{file} imports {imported(file) - above}, which stand below {here}"
