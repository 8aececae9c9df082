"""Workers of a parallel run (`-n`) take one thread each: two OpenMP teams on the same cores wait for each other.

Bandwidths that an earlier run has kept on disk are not read: they would be those of other code.

Property tests run the same examples every time; `--hypothesis-profile=search` looks for new ones, many more.
"""

import os
import tempfile

import pytest
from hypothesis import HealthCheck, settings

_cache = tempfile.TemporaryDirectory(prefix="kdejsd-tests-")
os.environ["XDG_CACHE_HOME"] = _cache.name

if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported, which comes later

# No deadline: the first call of an op takes longest. Hangs are the watchdog's, in test_properties.py.
settings.register_profile("ci", deadline=None, derandomize=True, database=None, max_examples=100)
settings.register_profile(
    "search", deadline=None, max_examples=20_000, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("ci")


@pytest.fixture
def undrawn(request, monkeypatch):
    """The pictures of runs are empty files, but in tests marked `pictures`: they take half of a short run's time."""
    if request.node.get_closest_marker("pictures") is None:
        monkeypatch.setattr("kdejsd.runs.report._png", lambda figure: b"")
        monkeypatch.setattr("kdejsd.runs.boards.pictures", lambda *_: {})
