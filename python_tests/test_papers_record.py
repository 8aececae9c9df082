"""The records of the papers' studies keep their rows, and refuse files of other studies."""

import sys
from pathlib import Path

import pytest

PAPERS = Path(__file__).resolve().parent.parent / "bench" / "papers"
KINDS = {"model": str, "seed": int, "error": float, "note": str}


@pytest.fixture(scope="module")
def record():
    sys.path.insert(0, str(PAPERS))
    import record

    return record


def test_rows_are_read_as_they_were_added(record, tmp_path):
    path = tmp_path / "new" / "rows.csv"
    first = record.Record(path, KINDS)
    assert first.rows == []
    first.add({"model": "GEN, weight 1", "seed": 0, "error": record.rounded(1 / 3)}, {"model": "AE", "seed": 1})
    assert path.read_text() == 'model,seed,error,note\n"GEN, weight 1",0,0.33333,\nAE,1,,\n'
    again = record.Record(path, KINDS)
    assert again.rows == first.rows
    assert again.find(seed=1) == [{"model": "AE", "seed": 1, "error": None, "note": None}]
    again.add({"model": "VAE", "seed": 2})
    assert [row["model"] for row in record.Record(path, KINDS).rows] == ["GEN, weight 1", "AE", "VAE"]
    assert list(path.parent.iterdir()) == [path]  # no part of a file stays behind


def test_without_a_file_rows_stay_in_memory(record):
    rows = record.Record(None, KINDS)
    rows.add({"model": "AE"})
    assert rows.find(model="AE", seed=None) and not rows.find(model="GEN")


def test_files_of_other_studies_are_refused(record, tmp_path):
    path = tmp_path / "rows.csv"
    for text, said in (
        ("model,seed\nAE,1\n", "expected the columns model, seed, error, note, got model, seed"),
        ("", "got none"),
        ("model,seed,error,note\nAE,0,1.5,\nAE,1,high,\n", "line 3: could not convert string to float: 'high'"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            record.Record(path, KINDS)
        assert path.read_text() == text
    with pytest.raises(ValueError, match="columns that the record lacks: loss"):
        record.Record(None, KINDS).add({"model": "AE", "loss": 1.0})
