"""The suite for a GPU machine, without one: its stages with stand-ins for what needs a device, and a dry run."""

from __future__ import annotations

import ast
import csv
import importlib
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SUITE = ROOT / "bench" / "gpu_suite.sh"
COMMAND = (str(SUITE), "--wheels", "/nowhere")  # whatever lies in this checkout
RECORD = {"environment.txt", "first_light.txt", "bench.txt", "bench.csv", "tests.txt", "summary.txt", "logs.tar.gz"}

# Stand-ins for the programs of a GPU machine. gpu_suite_tools.py answers itself, but for whether kdejsd is usable, and
# scikit-learn is here. With a file `hold` beside them the checks of first light take a minute, with `wrong` they fail,
# with `bare` scikit-learn is missing. In `asked` is how the benchmarks were called.
PROGRAMS = {
    "nvidia-smi": 'case "$*" in *compute_cap*) echo 9.0 ;; *) echo Test GPU ;; esac',
    "ncu": "echo '    Duration    us    12.3'",
    "compute-sanitizer": 'echo "$*"; echo ========= ERROR SUMMARY: 0 errors',
    "python": """
here=$(dirname "$0")
case "$*" in
  *gpu_suite_tools.py\\ module*) echo "$PYTHONPATH"; echo kdejsd is usable on cuda ;;
  *gpu_suite_tools.py\\ lacking\\ density) [[ ! -e $here/bare ]] || echo 'scikit-learn: none is here' ;;
  *gpu_suite_tools.py*) exec REAL_PYTHON "$@" ;;
  *cuda_first_light.py*)
    echo 'ok   the first check: value 1e-7 (1e-7)'
    [[ ! -e $here/hold ]] || { touch "$here/held" && sleep 60; }
    [[ ! -e $here/wrong ]] || { echo 'FAIL the second check: value nan' && exit 1; }
    echo first light: 2 of 2 ok ;;
  *-m\\ pytest*) echo '3 of 3 tests ran: 3 passed, 0 failed' ;;
  *bench_*)
    (printf '%q ' "$@"; echo) >>"$here/asked"
    while [[ $1 != --csv ]]; do shift; done
    echo provider,value >"$2"
    echo '  kdejsd     1.0' ;;
  *) exit 1 ;;
esac
""",
}


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    return importlib.import_module("gpu_suite_tools")


@pytest.fixture
def programs(tmp_path):
    folder = tmp_path / "programs"
    folder.mkdir()
    for name, text in PROGRAMS.items():
        (folder / name).write_text("#!/usr/bin/env bash\n" + text.replace("REAL_PYTHON", sys.executable) + "\n")
        (folder / name).chmod(0o755)
    return folder


@pytest.fixture
def prebuilt(tmp_path, tools):
    """A module for this Python, these sources and the device of the stand-ins, as far as can be told from outside."""
    folder = tmp_path / "prebuilt"
    (folder / "kdejsd").mkdir(parents=True)
    (folder / "kdejsd" / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").write_text("a module")
    assert tools.seal(folder, "90-real", tools.sources()) == 0
    return folder


def environment(programs: Path | None) -> dict[str, str]:
    python = programs / "python" if programs else sys.executable
    path = [*([str(programs)] if programs else []), os.environ["PATH"]]
    packages = os.pathsep.join(p for p in sys.path if p)
    return {**os.environ, "PYTHON": str(python), "PATH": os.pathsep.join(path), "PYTHONPATH": packages}


def run(*arguments: object, programs: Path | None = None, timeout: float = 50) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=environment(programs), timeout=timeout)


def summary(out: Path) -> dict[str, tuple[str, str]]:
    """State and text of each step, by its name."""
    lines = (out / "summary.txt").read_text().splitlines()[1:]
    return {line[5:29].strip(): (line[:5].strip(), line[29:]) for line in lines}


def test_it_is_a_script_and_says_how_it_is_used():
    subprocess.run(["bash", "-n", SUITE], check=True)
    assert os.access(SUITE, os.X_OK)
    done = run("--help")
    assert done.returncode == 0
    for word in ("--out", "--until", "--only", "--seconds", "--prebuilt", "--prebuild", "--dry-run", "sanitizers"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["record"], "unknown argument record"),
        (["--until", "lunch"], "there is no stage lunch; they are environment first-light bench"),
        (["--only", "bench,lunch"], "there is no stage lunch"),
        (["--seconds", "ten"], "--seconds must be a whole number from 1 to 99999, got ten"),
        (["--out"], "--out needs a value"),
    ],
)
def test_arguments_that_are_wrong(arguments, text):
    done = run(*arguments)
    assert done.returncode == 2 and text in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The stages, with stand-ins


def test_all_stages_leave_seven_files(tmp_path, programs, prebuilt):
    done = run("--out", tmp_path / "out", "--prebuilt", prebuilt, programs=programs)
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    assert {file.name for file in out.iterdir()} == RECORD
    found = summary(out)
    assert {state for state, _ in found.values()} == {"pass"}, found
    steps = [name for name in found if not name.startswith(("ncu", "tuning", "bench "))]
    assert steps == [
        *("environment", "prebuilt module", "first light", "bench", "tests", "memcheck", "racecheck"),
        *("first light, no tensor", "initcheck", "synccheck"),
    ]
    assert [name for name in found if name.startswith("ncu")] == [f"ncu, l = {dim}" for dim in (40, 256, 8, 64, 2)]
    assert {"bench omega", "bench radius", "bench nearest", "bench density", "bench compiled peers"} <= found.keys()
    assert "first light: 2 of 2 ok" in found["first light"][1]
    assert "--tool memcheck --kernel-name kns=kdejsd" in (out / "tests.txt").read_text()
    # The Python files are the checkout's, the compiled module that of the folder that was brought along.
    path = next(line for line in (out / "environment.txt").read_text().splitlines() if line.startswith(f"{ROOT}:"))
    assert re.match(rf"{ROOT}:[^:]+/site:", path)
    with tarfile.open(out / "logs.tar.gz") as archive:
        csvs = {f"logs/{name}.csv" for name in ("tuning_splits", "bench_omega", "bench_density")}
        assert {"logs/profile.txt", *csvs} <= set(archive.getnames())
    assert str(out) in done.stdout and "kdejsd on Test GPU" in done.stdout


def test_the_benchmarks_take_what_they_are_asked(tmp_path, programs, prebuilt, tools, monkeypatch):
    """Names of options, providers and tunings, which otherwise a device alone would show to be wrong."""
    only = ("--only", "bench,tuning,density,compiled")
    run("--out", tmp_path / "out", "--prebuilt", prebuilt, *only, programs=programs)
    bench_kde, bench_density = map(importlib.import_module, ("bench_kde", "bench_density"))
    harness, peers = map(importlib.import_module, ("harness", "peers"))
    monkeypatch.setattr(bench_density, "cuda_problem", lambda: "")
    monkeypatch.setattr(harness, "cuda_problem", lambda: "")
    monkeypatch.setattr(harness, "tuning_problem", lambda tunings: "")
    tuned = []
    asked = (programs / "asked").read_text().splitlines()
    for line in asked:
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        if "bench_density" in line:
            found = bench_density.arguments_of(None)
            harness.chosen(bench_density.providers(found.device), found.providers)
            assert found.device == "cuda" and any(dim == 16 for _, dim in found.sizes)  # that of flash-sd-kde
            continue
        found = bench_kde.parse_arguments()
        harness.chosen(peers.providers("cuda", ["base"], found.tune), found.providers)
        tuned += [name for name, _ in found.tune]
    assert len(asked) == 6 and tuned
    tuned += [name.lower() for name in re.findall(r"KDEJSD_CUDA_(\w+)=", SUITE.read_text())]
    kernels = "".join(file.read_text() for file in (ROOT / "csrc" / "cuda").glob("*.*"))
    assert all(f'"{name}"' in kernels for name in tuned)


def test_until_and_only(tmp_path, programs, prebuilt):
    shared = ("--prebuilt", prebuilt)
    done = run("--out", tmp_path / "a", "--until", "first-light", *shared, programs=programs)
    assert done.returncode == 0
    assert list(summary(tmp_path / "a")) == ["environment", "prebuilt module", "first light"]
    done = run("--out", tmp_path / "b", "--only", "tests,ops", *shared, programs=programs)
    assert done.returncode == 0
    assert list(summary(tmp_path / "b"))[2:] == ["tests", "bench omega", "bench radius", "bench nearest"]


def test_a_stage_that_fails_does_not_keep_later_ones_from_running(tmp_path, programs, prebuilt):
    (programs / "wrong").touch()
    done = run("--out", tmp_path / "out", "--prebuilt", prebuilt, "--until", "bench", programs=programs)
    assert done.returncode == 1
    found = summary(tmp_path / "out")
    assert found["first light"][0] == "FAIL" and found["bench"][0] == "pass"
    assert "FAIL the second check: value nan" in done.stdout


def test_without_a_profiler_and_a_sanitizer(tmp_path, programs, prebuilt):
    for name in ("ncu", "compute-sanitizer"):
        (programs / name).unlink()
        if shutil.which(name, path=os.environ["PATH"] + ":/usr/local/cuda/bin"):
            pytest.skip("they are here")
    only = ("--only", "profile,sanitizers")
    done = run("--out", tmp_path / "out", "--prebuilt", prebuilt, *only, programs=programs)
    assert done.returncode == 0
    found = summary(tmp_path / "out")
    assert found["profile"] == ("skip", "ncu is not here")
    assert found["memcheck"] == found["racecheck"] == ("skip", "compute-sanitizer is not here")


def test_without_scikit_learn(tmp_path, programs, prebuilt):
    (programs / "bare").touch()
    done = run("--out", tmp_path / "out", "--prebuilt", prebuilt, "--only", "density", programs=programs)
    assert done.returncode == 0
    assert summary(tmp_path / "out")["density"] == ("skip", "scikit-learn: none is here")


def test_the_time_is_kept(tmp_path, programs, prebuilt):
    (programs / "hold").touch()
    begun = time.monotonic()
    done = run("--out", tmp_path / "out", "--prebuilt", prebuilt, "--seconds", 5, programs=programs)
    assert done.returncode == 1 and time.monotonic() - begun < 20
    found = summary(tmp_path / "out")
    assert re.match(r"stopped after \d s, see first_light.txt|no time left", found["first light"][1])
    assert found["bench"] == found["synccheck"] == ("FAIL", "no time left")


def begin_and_hold(out: Path, programs: Path, prebuilt: Path) -> subprocess.Popen[str]:
    """The suite in a session of its own, amid the checks of first light."""
    (programs / "hold").touch()
    suite = subprocess.Popen(
        [*COMMAND, "--out", str(out), "--prebuilt", str(prebuilt)],
        **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True},
        env=environment(programs),
    )
    for _ in range(300):
        if (programs / "held").exists():
            return suite
        time.sleep(0.1)
    kill_session(suite)
    raise AssertionError(suite.communicate()[0])


def kill_session(suite: subprocess.Popen[str]) -> None:
    """All processes that the suite has begun: `timeout` makes groups of its own, but no sessions."""
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and os.getsid(int(entry.name)) == suite.pid:
                os.kill(int(entry.name), signal.SIGKILL)
        except ProcessLookupError:
            pass
    suite.wait()


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the suite's processes in /proc")
def test_killed_at_any_moment_it_leaves_what_was_found(tmp_path, programs, prebuilt):
    suite = begin_and_hold(out := tmp_path / "out", programs, prebuilt)
    kill_session(suite)
    assert suite.returncode == -signal.SIGKILL
    assert {file.name for file in out.iterdir()} == {"environment.txt", "first_light.txt", "summary.txt", "logs.tar.gz"}
    assert list(summary(out)) == ["environment", "prebuilt module"]
    assert "ok   the first check: value 1e-7" in (out / "first_light.txt").read_text()
    with tarfile.open(out / "logs.tar.gz") as archive:
        assert archive.getnames() == ["logs"]


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="finds the suite's processes in /proc")
def test_asked_to_stop_it_says_where_it_was(tmp_path, programs, prebuilt):
    suite = begin_and_hold(out := tmp_path / "out", programs, prebuilt)
    try:
        suite.terminate()
        printed = suite.communicate(timeout=20)[0]
    finally:
        kill_session(suite)
    assert suite.returncode == 1
    assert summary(out)["first light"] == ("FAIL", "stopped from outside")
    assert f"record: {out}" in printed


# ----------------------------------------------------------------------------------------------------------------------
# A module that was built before, and what a build takes


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, ""),
        ({"suffix": ".cpython-39-x86_64-linux-gnu.so"}, "it is for .cpython-39-x86_64-linux-gnu.so, this Python takes"),
        ({"architectures": [80, 86]}, "it is for sm_80, sm_86, the device is of compute capability 9.0"),
        ({"version": "0.0.1"}, "it is of version 0.0.1, the Python files are of"),
        ({"sources": "0123456789abcdef"}, "it was built from other sources: 0123456789abcdef, these are"),
        ({"module": "0123456789abcdef"}, "is not the file that was built"),
    ],
)
def test_when_a_prebuilt_module_is_taken(change, reason, prebuilt, tools):
    sealed = json.loads((prebuilt / "prebuilt.json").read_text())
    (prebuilt / "prebuilt.json").write_text(json.dumps(sealed | change))
    found = tools.refusal(prebuilt, "9.0")
    assert reason in found if reason else found == ""
    assert "there is none" in tools.refusal(prebuilt / "kdejsd", "9.0")


def test_the_hash_is_of_all_that_is_compiled(tmp_path, tools, monkeypatch):
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    for name in ("CMakeLists.txt", "csrc/bindings.cpp", "csrc/cuda/kde.cu", "csrc/cuda/warp.cuh", "csrc/kernels.h"):
        (tmp_path / name).write_text(name)
    monkeypatch.setattr(tools, "ROOT", tmp_path)
    before = tools.sources()
    assert tools.sources() == before
    hashes = {before}
    for file in sorted(tmp_path.rglob("*.*")):
        file.write_text(file.read_text() + " ")
        hashes.add(tools.sources())
    (tmp_path / "csrc/cuda/kde.cu").rename(tmp_path / "csrc/cuda/kde2.cu")
    assert len(hashes | {tools.sources()}) == 7
    assert tools.seal(tmp_path, "90", before) == 1  # the sources changed while it was built


def test_a_stale_module_is_not_used(tmp_path, programs, prebuilt):
    sealed = json.loads((prebuilt / "prebuilt.json").read_text())
    (prebuilt / "prebuilt.json").write_text(json.dumps(sealed | {"sources": "0123456789abcdef"}))
    done = run("--out", tmp_path / "out", "--prebuilt", prebuilt, programs=programs)
    assert done.returncode == 1
    found = summary(tmp_path / "out")
    assert found["prebuilt module"][1].startswith("not taken: it was built from other sources")
    assert found["build"][0] == "FAIL"  # the stand-in for Python builds nothing, and nothing else can be done
    assert list(found) == ["environment", "prebuilt module", "build"]


def test_versions_of_what_a_build_takes(tools, monkeypatch):
    versions = {"pybind11": "2.13.6", "scikit-build-core": "0.9.10", "cmake": ""}
    monkeypatch.setattr(tools, "version", versions.get)
    assert tools.lacking("build") == [
        "pybind11: 3.0 or later is needed, 2.13.6 is here",
        "scikit-build-core: 0.11 or later is needed, 0.9.10 is here",
        "cmake: 3.24 or later is needed, none is here",
    ]
    versions |= {"pybind11": "3.0.0rc1", "scikit-build-core": "0.11", "cmake": "4.1.0"}
    assert tools.lacking("build") == []


def test_versions_are_those_of_the_build(tools):
    pyproject, cmake = ((ROOT / name).read_text() for name in ("pyproject.toml", "CMakeLists.txt"))
    needed = {name: least for kind in tools.NEEDED.values() for name, least in kind.items()}
    for name in ("scikit-build-core", "pybind11", "cmake", "torch", "pytest", "hypothesis"):
        assert f'"{name}>={needed[name]}' in pyproject
    assert f"cmake_minimum_required(VERSION {needed['cmake']}..." in cmake


def test_prebuilding_needs_its_python():
    done = subprocess.run(
        [SUITE, "--prebuild"], capture_output=True, text=True, env={**os.environ, "PYTHON312": "/nowhere/python3.12"}
    )
    assert done.returncode == 2
    assert "--prebuild needs Python 3.12, /nowhere/python3.12 is not here; PYTHON312 names its" in done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# Which tests are run


def has_device_tests(file: Path) -> bool:
    """By its syntax: it takes the devices of helpers.py, or marks a test with a device of its own."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "helpers":
            if {"DEVICES", "CUDA"} & {name.name for name in node.names}:
                return True
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            for decorator in node.decorator_list:
                if any(isinstance(part, ast.Constant) and part.value == "cuda" for part in ast.walk(decorator)):
                    return True
    return False


def test_every_file_with_tests_for_a_device_is_run(tools):
    files = {file for file in Path(__file__).parent.glob("test_*.py") if has_device_tests(file)}
    files -= {file for file in files if "on_host" in file.name}
    assert {"test_divergence.py", "test_kde.py", "test_targets.py"} <= {file.name for file in files}
    assert files <= set(tools.test_files())


TESTS = """
import pytest

@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("i", range(4))
def test_a(device, i):
    assert i != FAILING
"""
# One test is taken for done, without having been run.
LOSES_ONE = "def pytest_runtest_protocol(item): return item.name == 'test_a[2-cuda]' or None"


@pytest.mark.parametrize(
    ("failing", "conftest", "code", "said"),
    [
        (-1, "", 0, "4 of 4 tests ran: 4 passed, 0 failed, 0 error, 0 skipped"),
        (1, "", 1, "4 of 4 tests ran: 3 passed, 1 failed, 0 error, 0 skipped"),
        (-1, LOSES_ONE, 1, "3 of 4 tests ran: 3 passed, 0 failed, 0 error, 0 skipped"),
    ],
    ids=["all pass", "one fails", "one is lost"],
)
def test_tests_are_counted_and_failures_told_at_once(failing, conftest, code, said, tmp_path):
    (tmp_path / "test_it.py").write_text(TESTS.replace("FAILING", str(failing)))
    (tmp_path / "conftest.py").write_text(conftest)
    options = ("-q", "-k", "cuda", "-p", "no:cacheprovider", "-p", "gpu_suite_pytest", "--rootdir", tmp_path)
    # As the suite, where it can; without plugins that take longer to import than this test takes.
    parallel = ("-p", "xdist", "-n", "2") if failing >= 0 and importlib.util.find_spec("xdist") else ()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *parallel, "-c", "/dev/null", "test_it.py"],
        **{"capture_output": True, "text": True, "cwd": tmp_path},
        env={**os.environ, "PYTHONPATH": str(ROOT / "bench"), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert said in done.stdout
    if failing >= 0:
        before, _, after = done.stdout.partition("FAILED at once: test_it.py::test_a[1-cuda]")
        assert "assert 1 != 1" in after and "= FAILURES =" not in before


# ----------------------------------------------------------------------------------------------------------------------
# The stages that a CPU can do, in earnest


def test_a_dry_run_of_the_cpu(tmp_path):
    done = run("--dry-run", "--only", "first-light,bench,density", "--out", tmp_path / "out", timeout=170)
    out = tmp_path / "out"
    assert done.returncode == 0, done.stdout + done.stderr
    assert {file.name for file in out.iterdir()} == RECORD - {"tests.txt"}
    found = summary(out)
    assert list(found) == ["environment", "module", "first light", "bench", "bench density"]
    assert re.search(r"first light: (\d+) of \1 ok", found["first light"][1])
    lines = (out / "first_light.txt").read_text().splitlines()
    names = {line.partition(": ")[0] for line in lines if line.startswith("ok   ")}
    assert {"ok   kde l=257 float32", "ok   kde l=40 reduced, high", "ok   kde l=8 float32, all gradients"} <= names
    for op in ("jsd_loss kl", "omega all", "class_radius_bound log_p", "nearest_other_class"):
        assert any(name.startswith(f"ok   {op}") for name in names)
    with (out / "bench.csv").open(newline="") as file:
        assert {row["l"] for row in csv.DictReader(file) if row["provider"] == "kdejsd"} == {"3", "40"}
    with tarfile.open(out / "logs.tar.gz") as archive:
        lines = archive.extractfile("logs/bench_density.csv").read().decode().splitlines()
    assert {row["provider"] for row in csv.DictReader(lines)} == {"kdejsd", "kdejsd float32", "sklearn", "scipy"}
