"""A plugin of pytest for gpu_suite.sh: tells of failures as they come, and does not take fewer tests for all of them.

    python -m pytest -p gpu_suite_pytest ...

pytest shows failures in the end, which a run that is stopped does not reach; and it does not miss a test that was
collected and has not been run.
"""

from __future__ import annotations

from typing import Any

import pytest


class Count:
    """In the process that reports, which with pytest-xdist is not the one that collects."""

    def __init__(self, config: pytest.Config) -> None:
        self._reporter: Any = config.pluginmanager.get_plugin("terminalreporter")
        self._collected: set[str] = set()
        self._done: set[str] = set()

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        self._collected.update(item.nodeid for item in session.items)

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self._collected.update(ids)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" or (report.failed and report.when != "call"):
            self._done.add(report.nodeid)
        if report.failed:
            last = str(report.longrepr).strip().splitlines()[-12:]
            self._reporter.ensure_newline()
            self._reporter.write_line("\n".join([f"FAILED at once: {report.nodeid}", *last]))
            self._reporter.flush()

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        only_collected = session.config.getoption("collectonly")
        if self._done < self._collected and exitstatus == pytest.ExitCode.OK and not only_collected:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self) -> None:
        kinds = ("passed", "failed", "error", "skipped")
        counts = ", ".join(f"{len(self._reporter.stats.get(kind, ()))} {kind}" for kind in kinds)
        self._reporter.write_line(f"{len(self._done)} of {len(self._collected)} tests ran: {counts}")


@pytest.hookimpl(trylast=True)  # when the reporter is there
def pytest_configure(config: pytest.Config) -> None:
    if not hasattr(config, "workerinput"):  # which a worker of pytest-xdist has
        config.pluginmanager.register(Count(config))
