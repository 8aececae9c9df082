"""Tables and tensors of one's own: what is read of a file, what is refused, and sets that stay in their files."""

import csv
import gzip
import json
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_wine

import kdejsd
from kdejsd.cli import main
from kdejsd.data import CelebA, ExampleSet, ImageFolder, StoredExamples, Table, Tensors, columns
from kdejsd.models import FC, AutoencoderNetworks, built
from kdejsd.runs.checkpoints import RunCheckpoint, WholeCheckpointIO

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:.*LeafSpec")


def rows_of(data, restored: bool = True) -> torch.Tensor:
    """All rows of a set, those trained on before those held out, each in the order of the file."""
    found = torch.cat([part[torch.arange(len(part))][0] for part in (data.training, data.held_out)])
    return data.restored(found) if restored else found


def write(path: Path, content) -> Path:
    """Writes text, bytes, a pyarrow.Table, an array, or a dict of arrays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, (str, bytes)):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    elif isinstance(content, pa.Table):
        pq.write_table(content, path, row_group_size=7)
    elif isinstance(content, dict):
        np.savez(path, **content)
    else:
        np.save(path, content)
    return path


def numbers(count: int = 40) -> pa.Table:
    """Columns of several kinds, and a label."""
    random = np.random.default_rng(0)
    return pa.table(
        {
            "height": random.normal(170, 10, count),
            "born": random.integers(1_600_000_000, 1_700_000_000, count),
            "member": random.random(count) < 0.5,
            "town": pa.array(random.choice(["Ulm", "Bonn", "Köln"], count)),
        }
    )


def as_csv(table: pa.Table, delimiter: str = ",") -> str:
    lines = [table.schema.names, *zip(*(column.to_pylist() for column in table.columns), strict=True)]
    return "".join(delimiter.join(map(str, line)) + "\n" for line in lines)


def matrix(table: pa.Table) -> np.ndarray:
    return np.column_stack([column.to_numpy().astype(float) for column in table.drop(["town"]).columns])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("x.csv", as_csv),
        ("X.CSV", lambda table: "\ufeff" + as_csv(table).replace("\n", "\r\n")),
        ("x.csv.gz", lambda table: gzip.compress(as_csv(table).encode())),
        ("x.csv", lambda table: as_csv(table, ";")),
        ("x.tsv", lambda table: as_csv(table, "\t")),
        ("x.parquet", lambda table: table),
        ("x.parquet", lambda table: table.set_column(3, "town", table["town"].dictionary_encode())),
        ("x.npz", lambda table: {name: table[name].to_numpy() for name in table.schema.names if name != "town"}
         | {"town": np.array(table["town"].to_pylist())}),
    ],
)  # fmt: skip
def test_the_same_table_from_every_file(tmp_path, capsys, name, content):
    table = numbers()
    data = Table(write(tmp_path / name, content(table)), label="town", batch_size=10)
    assert data.columns == ["height", "born", "member"] and data.example_shape == (3,)
    assert data.class_names == ["Bonn", "Köln", "Ulm"] and len(data.held_out) == 4
    training, held_out = data._parts(40, 0.1)
    order = torch.cat([training, held_out])
    torch.testing.assert_close(rows_of(data), torch.from_numpy(matrix(table))[order], rtol=1e-6, atol=8)
    expected = [data.class_names.index(table["town"][row].as_py()) for row in order.tolist()]
    assert torch.cat([data.training.labels, data.held_out.labels]).tolist() == expected
    counts = [table["town"].to_pylist().count(town) for town in data.class_names]
    assert capsys.readouterr().err == (
        f"Table: 40 rows of 3 columns in {tmp_path / name}, 4 of them held out; classes of town: Bonn {counts[0]}, "
        f"Köln {counts[1]}, Ulm {counts[2]}\n"
    )


def test_a_folder_of_parquet_files_is_one_table(tmp_path, capsys):
    table = numbers()
    whole = Table(write(tmp_path / "x.parquet", table), label="town")
    for start, name in ((0, "a/1.parquet"), (13, "a/2.parquet"), (20, "b.parquet")):
        end = {0: 13, 13: 20, 20: 40}[start]
        write(tmp_path / "parts" / name, table.slice(start, end - start).select(["town", "member", "born", "height"]))
    parts = Table(tmp_path / "parts", label="town", columns=whole.columns)
    assert torch.equal(rows_of(parts, False), rows_of(whole, False))
    numbered = table.drop(["born"]).set_column(2, "town", pa.array(range(40)))
    write(tmp_path / "parts" / "c.parquet", numbered)
    with pytest.raises(ValueError, match=r"c\.parquet must have the columns of .*a/1\.parquet, .* lacks town, born"):
        Table(tmp_path / "parts").setup()
    for year in (2025, 2026):
        write(tmp_path / "years" / f"year={year}" / "0.parquet", table)
    Table(tmp_path / "years", label="town").setup()
    assert capsys.readouterr().err.endswith("; left out: year (in the names of folders alone)\n")
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"must be a file or a folder of \.parquet files, and holds none"):
        Table(empty).setup()


def test_columns_of_an_array_have_numbers(tmp_path):
    values = np.arange(60.0).reshape(20, 3)
    path = write(tmp_path / "x.npy", values)
    assert Table(path).columns == ["1", "2", "3"]
    assert torch.equal(rows_of(Table(path, columns=[3, 1], standardize=False, held_out_path=path))[:20, 0],
                       torch.arange(2.0, 60, 3))  # fmt: skip
    data = Table(write(tmp_path / "y.npz", {"x": values, "y": np.arange(20) % 2}), label="y", without=2)
    assert data.columns == ["1", "3"] and data.held_out.labels.tolist() == [
        int(row) % 2 for row in data._parts(20, 0.1)[1]
    ]


def test_rows_are_standardised_by_those_trained_on(tmp_path):
    table = numbers(400)
    data = Table(write(tmp_path / "x.parquet", table), label="town", held_out=0.25)
    held_out = data._parts(400, 0.25)[1].numpy()
    trained_on = np.delete(matrix(table), held_out, axis=0)
    expected = (matrix(table)[held_out] - trained_on.mean(0)) / trained_on.std(0)
    np.testing.assert_allclose(data.held_out.examples.numpy(), expected, rtol=1e-5, atol=1e-6)
    examples = data.training.examples.double()
    torch.testing.assert_close(examples.mean(0), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(examples.std(0, correction=0), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    plain = Table(tmp_path / "x.parquet", label="town", held_out=0.25, standardize=False)
    assert plain.standardization is None
    assert torch.equal(plain.held_out.examples, torch.from_numpy(matrix(table)[held_out]).float())


def test_large_integers_keep_their_digits(tmp_path):
    path = write(tmp_path / "x.parquet", pa.table({"time": [2**40 + second for second in range(50)]}))
    data = Table(path, held_out_path=path)
    assert data.restored(data.training.examples).round().flatten().tolist() == [2**40 + second for second in range(50)]


def test_a_file_of_its_own_is_held_out(tmp_path, capsys):
    train, test = numbers(40), numbers(30).slice(0, 20)
    test = test.set_column(3, "town", pa.array(["Rom", None, *test["town"].to_pylist()[2:]]))
    data = Table(
        write(tmp_path / "train.parquet", train),
        label="town",
        held_out_path=write(tmp_path / "test.csv", as_csv(test).replace("None", "")),
        without=["member"],
        train_size=30,
    )
    assert len(data.training) == 30 and data.batch_size == 30 and len(data.held_out) == 20
    assert data.class_names == ["Bonn", "Köln", "Rom", "Ulm"] and data.held_out.labels[:2].tolist() == [2, -1]
    np.testing.assert_allclose(data.restored(data.held_out.examples).numpy(), matrix(test)[:, :2], rtol=1e-6, atol=8)
    said = capsys.readouterr().err
    assert f"40 rows of 2 columns in {tmp_path}/train.parquet, 20 held out in {tmp_path}/test.csv; classes" in said
    assert said.endswith("; without a class: 1; left out: member\n")


@pytest.mark.parametrize("train, other", [([0, 1, 2], ["1", "x", "2"]), (["0", "1", "x"], [1, 1, 0])])
def test_classes_are_the_same_as_numbers_and_as_text(tmp_path, train, other):
    files = {
        name: pa.table({"a": [1.0, 2.0, 4.0], "class": values}) for name, values in (("train", train), ("other", other))
    }
    paths = {name: write(tmp_path / f"{name}.parquet", table) for name, table in files.items()}
    data = Table(paths["train"], held_out_path=paths["other"], label="class")
    assert data.class_names == sorted({str(value) for value in [*train, *other]})
    for part, values in ((data.training, train), (data.held_out, other)):
        assert [data.class_names[label] for label in part.labels.tolist()] == [str(value) for value in values]


def test_rows_to_hold_out_need_no_classes(tmp_path):
    train = write(tmp_path / "train.csv", as_csv(numbers()))
    other = write(tmp_path / "other.csv", as_csv(numbers().drop_columns("town")))
    data = Table(train, held_out_path=other, label="town")
    assert len(data.class_names) == 3 and data.held_out.labels.unique().tolist() == [-1]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ('"weight, dry, kg";b\n', ["weight, dry, kg", "b"]),
        ("a, b\n", ["a", "b"]),
    ],
)
def test_names_in_a_first_line(tmp_path, text, names):
    delimiter = ";" if ";" in text else ", "
    path = write(tmp_path / "x.csv", text + "".join(f"{n}.5{delimiter}{n % 3}\n" for n in range(9)))
    assert Table(path).columns == names and len(Table(path).training) == 8


def test_a_line_may_be_longer_than_what_is_read_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr("kdejsd.data.columns._LINE", 2**6)
    lines = [[f"column {number}" for number in range(40)], *np.random.default_rng(0).random((5, 40)).tolist()]
    path = write(tmp_path / "x.csv", "".join(",".join(map(str, line)) + "\n" for line in lines))
    assert Table(path).columns == lines[0] and len(Table(path).training) == 4


@pytest.mark.parametrize("scale", [1e-300, 1e-170, 1e-160, 1.0, 1e160, 1e300])
def test_columns_of_any_scale_are_standardised(tmp_path, scale):
    values = np.random.default_rng(0).normal(3, 1, (50, 2))
    data = Table(write(tmp_path / "x.npy", values * scale), held_out_path=write(tmp_path / "same.npy", values * scale))
    expected = (values - values.mean(0)) / values.std(0)
    np.testing.assert_allclose(data.training.examples.numpy(), expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(data.restored(data.held_out.examples).numpy(), values * scale, rtol=1e-5)


def test_the_index_that_pandas_writes_is_left_out(tmp_path, capsys):
    data = Table(write(tmp_path / "x.csv", ",a,b\n" + "".join(f"{n},{n % 5},{n % 3}\n" for n in range(20))))
    assert data.columns == ["a", "b"] and len(data.training) == 18
    assert capsys.readouterr().err.endswith("; left out: 1 without a name\n")


@pytest.mark.parametrize(
    ("content", "settings", "text"),
    [
        ("", {}, "must have the names of the columns in its first line, which is empty"),
        ("1,2\n3,4\n5,6\n", {}, r"must have the names .* has numbers there \(1, 2\): write the names above them"),
        ("a,b\n", {}, "must have at least 3 rows below the names, got 0"),
        ("a,b\n1,2\n3,4\n", {}, "must have at least 3 rows below the names, got 2"),
        ("a,b,a\n1,2,3\n4,5,6\n", {}, "must have a name of its own for every column, and a stands more than once"),
        ("a,b\n1,2\n3\n5,6\n", {}, "cannot be read as a CSV file: .*Row #3: Expected 2 columns, got 1"),
        ("a,b\n1,2\n3,x\n5,y\n", {}, "b holds text, such as 'x' in row 2 of b: leave it out with --data.without=b"),
        ("a,b c,c\n1,u,2\n3,v,w\n5,w,6\n", {}, """b c, c hold text, .* with '--data.without=\\["b c", "c"\\]'"""),
        ("a,b\n1,2020-01-02\n3,2020-01-03\n5,2020-01-04\n", {}, "b holds dates or times, such as 2020-01-02 in row 1"),
        ("a,b\n1,2\n3,\nNA,6\n5,NaN\n", {}, r"in 3 of its 4 rows, the first of them row 2, values are missing, by "
         r"columns: a \(1\), b \(2\); fill them in"),
        ("a,b\n1,2\n3,4\n5,-inf\n", {}, r"in 1 of its 3 rows, .* row 3, values are infinite, by columns: b \(1\)"),
        ("a,b\n1,7\n3,7\n5,7\n", {}, "the same number stands in all 2 training rows of b, .* with --data.without=b"),
        ("height,b\n1,2\n3,4\n5,6\n", {"columns": "hieght"}, "has no column hieght; did you mean height?"),
        ("height,b\n1,2\n3,4\n5,6\n", {"label": "Height"}, "label must name .* no column Height; did you mean height?"),
        ("height,b\n1,2\n3,4\n5,6\n", {"without": "zzz"}, "without must name .* no column zzz, only height, b"),
        ("a,b\n1,2\n3,4\n5,6\n", {"without": "a, b"}, """several names are a list: --data.without='\\["a", "b"\\]'"""),
        ("a,b\n1,2\n3,4\n5,6\n", {"columns": "a", "label": "a"}, "columns must leave a column .* got none of a, b"),
        ("a,b\n1,2\n3,4.5\n5,6\n", {"label": "b"}, "label must name a column of classes, .* whole numbers, .* has 4.5"),
        ("a,b\n1,2\n3,4\n5,6\n", {"keep_in_memory": False}, r"keep_in_memory must be True for .*x\.csv, of which"),
        ("a,b\n1,2\n3,4\n5,6\n", {"batch_size": 3}, "batch_size must be at most 2, the number of training examples"),
        ("a,b\n1,2\n3,4\n5,6\n", {"columns": ["b", "b"]}, "columns must name each column once, got b more than once"),
        ("a,b\n1,2\n3,4\n5,6\n", {"label": "town"}, "only a, b; for rows without classes: --data.label null"),
        ("a;b\n1,5;2\n3,5;4\n5,5;6\n", {}, "'1,5' in row 1 of a: write numbers with a decimal point and without"),
        ("a\n1\n\n3\n4\n", {}, r"in 1 of its 4 rows, the first of them row 2, values are missing, by columns: a"),
        ("a,b\n1,2\n3,4\n5,6\n", {"held_out": 1}, "held_out must be above 0 and below 1, got 1"),
    ],
)  # fmt: skip
def test_tables_that_are_refused(tmp_path, content, settings, text):
    path = write(tmp_path / "x.csv", content)
    with pytest.raises(ValueError, match=text) as error:
        Table(path, **settings).setup()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "error", "text"),
    [
        ("x.csv.gz", gzip.compress(b"a,b\n" + b"1,2\n" * 99, mtime=0)[:-9], ValueError, "cannot be read as a CSV file"),
        ("x.parquet", b"PAR1 and nothing", ValueError, "cannot be read as a Parquet file: "),
        ("x.parquet", b"", ValueError, "cannot be read as a Parquet file: "),
        ("x.parquet", pa.table({"a": [1, 2, 3], "b": [[1], [2], [3]]}), ValueError, r"b holds other .* as \[1\]"),
        ("x.parquet", pa.table({"a": [1, 2, 3], "b": pa.array(["u", "v", "u"]).dictionary_encode()}), ValueError,
         "b holds text, such as 'u' in row 1 of b"),
        ("x.parquet", pa.table({"a": [1, 2, 3], "b": [None, True, False]}), ValueError, "row 1, values are missing"),
        ("x.npy", np.array([[1, "x"], [2, "y"], [3, None]], object), ValueError, "Python objects, which are not"),
        ("x.npy", b"rubbish", ValueError, "cannot be read as an .npy file: "),
        ("x.npy", np.zeros((4, 1, 8, 8)), ValueError, r"shape \[4, 1, 8, 8\]: .* --data Tensors"),
        ("x.csv", "Größe,b\n1,2\n3,4\n5,7\n".encode("latin-1"), ValueError, "must be text in UTF-8, and its first"),
        ("x.npy", np.zeros((4, 2), complex), ValueError, "must hold numbers .* and holds values of type complex128"),
        ("x.npy", np.zeros((4, 2), np.longdouble), ValueError, "must hold numbers of at most 64 bits, and"),
        ("x.npz", {"1": np.zeros(4), "x": np.zeros((4, 2))}, ValueError, "a name of its own .*, and 1 stands more"),
        ("x.npz", b"rubbish", ValueError, "cannot be read as an .npz file: it is something else"),
        ("x.npz", {"x": np.array([{}, 1], object)}, ValueError, "Python objects, which are not"),
        ("x.npz", {"x": np.zeros((4, 2)), "z": np.zeros((4, 2))}, ValueError, "must hold one array .*; it holds x, z"),
        ("x.npz", {"x": np.zeros(4), "z": np.zeros(5)}, ValueError, "must hold one array .*; it holds x, z"),
        ("x.xlsx", b"", ValueError, r"path must end in one of \.csv, .*, got .*x\.xlsx"),
        (None, None, FileNotFoundError, "path must be the file of a table, and there is no /.*nowhere.csv"),
    ],
)  # fmt: skip
def test_files_that_are_refused(tmp_path, name, content, error, text):
    path = tmp_path / "nowhere.csv" if name is None else write(tmp_path / name, content)
    with pytest.raises(error, match=text) as raised:
        Table(path).setup()
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("cut", [0.3, 0.6, 0.9])
def test_a_parquet_file_that_is_damaged_inside(tmp_path, cut):
    path = write(tmp_path / "x.parquet", pa.table({"a": np.random.default_rng(0).normal(size=5000)}))
    content = bytearray(path.read_bytes())
    place = int(cut * 40_000)
    content[place : place + 2000] = bytes(2000)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.parquet (cannot be read as|must have a finite|must have columns)"):
        Table(path).setup()


# Tensors


@pytest.mark.parametrize("how", ["alone", "pair", "dict"])
@pytest.mark.parametrize(
    ("examples", "dtype"),
    [
        (torch.randn(30, 4), torch.float32),
        (torch.randn(30, 4, 5, dtype=torch.float64), torch.float32),
        (torch.randn(30, 2, 3, 4, 5).bfloat16(), torch.float32),
        (torch.rand(30, 3, 8, 8), torch.float32),
        (torch.randint(256, (30, 1, 8, 8), dtype=torch.uint8), torch.uint8),
    ],
)
def test_tensors(tmp_path, how, examples, dtype):
    labels = torch.arange(30) % 3 - int(how == "dict")
    torch.save(
        {"alone": examples, "pair": (examples, labels), "dict": {"examples": examples, "labels": labels}}[how],
        tmp_path / "x.pt",
    )
    data = Tensors(tmp_path / "x.pt", held_out=0.2)
    assert data.example_shape == examples.shape[1:] and data.training.examples.dtype == dtype
    order = torch.cat(data._parts(30, 0.2))
    expected = examples[order].float() / (255 if dtype == torch.uint8 else 1)
    assert torch.equal(rows_of(data, False), expected)
    found = torch.cat([data.training.labels, data.held_out.labels])
    assert torch.equal(found, torch.full((30,), -1) if how == "alone" else labels[order])


def test_parameters_are_examples_without_gradients(tmp_path):
    torch.save(torch.nn.Parameter(torch.rand(20, 3)), tmp_path / "x.pt")
    assert not Tensors(tmp_path / "x.pt", standardize=True).training.examples.requires_grad
    assert not Tensors(tmp_path / "x.pt").training.examples.requires_grad


def test_tensors_are_standardised_where_it_is_asked_for(tmp_path):
    examples = 3 + 5 * torch.randn(200, 4, 2)
    torch.save(examples, tmp_path / "x.pt")
    data = Tensors(tmp_path / "x.pt", standardize=True, held_out_path=tmp_path / "x.pt")
    torch.testing.assert_close(data.training.examples.mean(0), torch.zeros(4, 2))
    torch.testing.assert_close(data.restored(data.held_out.examples).float(), examples)


@pytest.mark.parametrize(
    ("content", "settings", "text"),
    [
        (torch.zeros(5), {}, r"must hold examples \[n, ...\] in bytes or .*, got torch.float32 of shape \[5\]"),
        (torch.zeros(5, 2, dtype=torch.int64), {}, "must hold examples .* got torch.int64"),
        (torch.zeros(1, 2), {}, "must have at least 2 examples, got 1"),
        (torch.zeros(5, 0), {}, r"must hold examples of at least one value, got shape \[5, 0\]"),
        (torch.eye(5).to_sparse(), {}, "must hold a dense tensor, got one of layout torch.sparse_coo"),
        ({"x": torch.zeros(5, 2)}, {}, "must hold a tensor .* got a dict of x"),
        ([torch.zeros(5, 2)], {}, "must hold a tensor .* got a list"),
        ((torch.zeros(5, 2), torch.zeros(4).long()), {}, r"must hold labels as integers \[5\] .* got torch.int64"),
        ((torch.zeros(5, 2), torch.full((5,), -2)), {}, "of at least 0, or -1 for none"),
        ((torch.zeros(5, 2), torch.zeros(5)), {}, "must hold labels as integers .* got torch.float32"),
        (5 * torch.rand(5, 1, 4, 4), {}, r"must have values from 0 to 1, as examples of shape \[1, 4, 4\] are images"),
        (torch.full((5, 2), torch.inf), {}, "Tensors must have finite examples, and 4 of its 4 training"),
        (torch.zeros(5, 2), {"standardize": True}, "the same number stands in all training examples at 2 places"),
        (torch.zeros(5, 1, 4, 4), {"standardize": True}, "standardize must be False for images"),
        (Path("x"), {}, "it holds other objects than tensors, which are not unpickled"),
        (b"rubbish", {}, "cannot be read as a file of torch.save: it is something else"),
    ],
)
def test_tensors_that_are_refused(tmp_path, content, settings, text):
    if isinstance(content, bytes):
        (tmp_path / "x.pt").write_bytes(content)
    else:
        torch.save(content, tmp_path / "x.pt")
    with pytest.raises(ValueError, match=text) as error:
        Tensors(tmp_path / "x.pt", **settings).setup()
    assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match=r"path must be a file of torch\.save, and there is no /"):
        Tensors("nowhere.pt").setup()


# Sets that stay in their files


def pictures(root: Path) -> Path:
    random = np.random.default_rng(0)
    for name in (f"{folder}/{number}.png" for folder in "ab" for number in range(20)):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(random.integers(0, 256, (12, 9, 3), dtype=np.uint8)).save(root / name)
    return root


def celeba(root: Path) -> Path:
    (root / "img_align_celeba").mkdir(parents=True, exist_ok=True)
    for number in range(30):
        Image.new("RGB", (178, 218), (8 * number, 0, 255)).save(root / "img_align_celeba" / f"{number:06}.jpg")
    return root


def tensors(path: Path, examples: torch.Tensor) -> Path:
    torch.save((examples, torch.arange(len(examples)) % 4), path)
    return path


def half(table: pa.Table) -> np.ndarray:
    return matrix(table).astype(np.float32)


STORED = {
    "parquet": lambda at, **settings: Table(write(at / "x.parquet", numbers(90)), label="town", **settings),
    "as it is": lambda at, **settings: Table(write(at / "x.parquet", numbers(90)), label="town", standardize=False,
                                             **settings),
    "npy": lambda at, **settings: Table(write(at / "x.npy", half(numbers(90))), label=3, columns=[2, 1], **settings),
    "tensors": lambda at, **settings: Tensors(tensors(at / "x.pt", torch.randn(90, 5).double()), standardize=True,
                                              **settings),
    "bytes": lambda at, **settings: Tensors(tensors(at / "x.pt", (255 * torch.rand(90, 1, 8, 8)).byte()), **settings),
    "pictures": lambda at, **settings: ImageFolder(pictures(at / "x"), size=8, channels=1, **settings),
    "faces": lambda at, **settings: CelebA(celeba(at / "x"), **settings),
}  # fmt: skip


@pytest.fixture(autouse=True)
def _in_parts(monkeypatch):
    """Tables are read in several parts."""
    monkeypatch.setattr(columns, "_VALUES", 51)


@pytest.mark.parametrize("kind", STORED)
@pytest.mark.parametrize("settings", [{}, {"train_size": 8, "labelled_size": 3, "seed": 4}])
def test_examples_that_stay_in_their_files_are_the_same(tmp_path, monkeypatch, kind, settings):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    torch.manual_seed(0)
    if kind == "faces":
        settings = {name: value for name, value in settings.items() if name != "labelled_size"}
    here = STORED[kind](tmp_path, **settings)
    torch.manual_seed(0)
    there = STORED[kind](tmp_path, keep_in_memory=False, **settings)
    for one, other in ((here.training, there.training), (here.held_out, there.held_out)):
        assert isinstance(one.examples, torch.Tensor) and isinstance(other.examples, StoredExamples)
        assert len(one) == len(other) and torch.equal(one.labels, other.labels)
        for index in (torch.arange(len(one)), torch.tensor([1, 0]), torch.tensor(0), one.labels == one.labels[0]):
            for a, b in zip(one[index], other[index], strict=True):
                assert a.dtype == b.dtype and torch.equal(a, b)
        assert torch.equal(other.subset(torch.tensor([0])).read().examples, one.examples[:1])
    for a, b in zip(here.train_dataloader(), there.train_dataloader(), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert list((tmp_path / "cache").rglob("*.*")) == []  # of a copy nothing has a name


def test_values_that_are_not_finite_are_found_in_files(tmp_path):
    class Spoiled(StoredExamples):
        def read(self, rows):
            return torch.where(rows[:, None] % 7 == 3, torch.nan, 1.0)

    class Data(Tensors):
        def load(self):
            return self._split(ExampleSet(Spoiled(30), torch.zeros(30, dtype=torch.int64)), 0.5)

    for keep in (True, False):
        with pytest.raises(ValueError, match=r"Data must have finite examples, and \d of its 15 training"):
            Data(tmp_path, keep_in_memory=keep).setup()


def test_of_parquet_a_part_is_in_memory_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "_VALUES", 2**14)
    path = tmp_path / "x.parquet"
    values = np.random.default_rng(0).normal(size=400_000)
    pq.write_table(pa.table({"a": values}), path, row_group_size=20_000, use_dictionary=False)
    before, most, count = pa.total_allocated_bytes(), 0, 0
    for rows, batch in columns.open_columns(path).parts(["a"]):
        most = max(most, pa.total_allocated_bytes() - before)
        assert batch.column("a").to_numpy().tolist() == values[rows].tolist()
        count += len(batch)
    assert count == len(values) and most < values.nbytes / 2


def test_a_copy_needs_room(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": 1000}))
    data = Table(write(tmp_path / "x.parquet", numbers(90)), label="town", keep_in_memory=False)
    with pytest.raises(OSError, match=r"needs 1\.08 kB in .*/cache/kdejsd .* and 1 kB are free: set XDG_CACHE_HOME"):
        data.setup()


def trained(data, folder: Path, steps: int, ckpt_path: Path | None = None) -> dict[str, torch.Tensor]:
    pl.seed_everything(0, verbose=False)
    shape = data.example_shape
    model = built.GEN(shape, 2, lambda shape, dim: FC(shape, dim, hidden=[8]), num_lagged=20, bandwidth=0.5,
                      keep_examples=False, decay=False)  # fmt: skip
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RunCheckpoint(folder / "last.ckpt")],
        plugins=[WholeCheckpointIO()],
    )
    trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("kind", ["parquet", "npy", "tensors", "pictures"])
def test_training_from_files_is_the_same_and_goes_on_within_an_epoch(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def make(keep_in_memory: bool):
        torch.manual_seed(0)
        return STORED[kind](tmp_path, batch_size=10, keep_in_memory=keep_in_memory)

    expected = trained(make(True), tmp_path / "here", 11)
    assert 5 % (len(make(False).training) // 10) != 0  # so that the stop is within an epoch
    trained(make(False), tmp_path / "there", 5)
    found = trained(make(False), tmp_path / "again", 11, tmp_path / "there" / "last.ckpt")
    assert found.keys() == expected.keys()
    assert [name for name, value in expected.items() if not torch.equal(found[name], value)] == []


# The command

MODELS = {
    "GEN": ["--model.bandwidth=0.4"],
    "StochasticGEN": ["--model.bandwidth=1"],
    "VAE": [],
    "AE": [],
    "WAE": [],
    "AAE": ["--model.discriminator_hidden=[8]"],
    "GAN": [],
}


class Narrow(AutoencoderNetworks):
    """A network of one's own."""

    def __init__(self, example_shape, latent_dim):
        super().__init__()
        (width,) = example_shape
        self.encoder = torch.nn.Linear(width, latent_dim)
        self.decoder = torch.nn.Linear(latent_dim, width)


@pytest.fixture(scope="module")
def wine(tmp_path_factory) -> Path:
    found = load_wine()
    chosen = {name: found.data[:, found.feature_names.index(name)] for name in ("ash", "magnesium", "hue", "proline")}
    table = pa.table(chosen | {"cultivar": [f"class {number}" for number in found.target]})
    path = tmp_path_factory.mktemp("wine") / "wine.csv"
    pacsv.write_csv(table, path)
    return path


@pytest.fixture
def fit(tmp_path, monkeypatch, capsys, wine, undrawn):
    monkeypatch.chdir(tmp_path)

    def fit(*args: str, command: str = "fit") -> tuple[int, str]:
        if command == "fit" and not any("ckpt_path" in arg for arg in args):
            args = ("--data=Table", f"--data.path={wine}", "--data.label=cultivar", "--trainer.accelerator=cpu", *args)
        return main([command, *args]), capsys.readouterr().err

    return fit


@pytest.mark.parametrize("model", MODELS)
def test_every_model_trains_on_a_table(fit, model):
    args = [f"--model={model}", *MODELS[model], "--trainer.max_steps=3", "--out=run"]
    code, said = fit(*args)
    assert (
        code == 0
        and "178 rows of 4 columns" in said
        and "classes of cultivar: class 0 59, class 1 71, class 2 48" in said
    )
    assert kdejsd.load("run").sample(5).shape == (5, 4)
    assert json.loads(Path("run/metrics.json").read_text())["run"]["steps"] == 3


@pytest.mark.parametrize("model", MODELS)
def test_networks_of_ones_own_train_on_a_table(fit, model):
    code, _ = fit(f"--model={model}", *MODELS[model], "--model.network=test_tables.Narrow", "--trainer.max_steps=1",
                  "--out=run")  # fmt: skip
    assert code == 0
    trained = kdejsd.load("run")
    assert trained.sample(2).shape == (2, 4)
    own = trained.discriminator if model == "GAN" else trained.encoder
    # l = 2. A random encoder gives two numbers for each dimension, and a discriminator one in all.
    assert own.out_features == {"GAN": 1, "StochasticGEN": 4, "VAE": 4}.get(model, 2)


def test_convolutions_are_refused_for_rows(fit):
    code, said = fit("--model.network=Conv", "--trainer.max_steps=2", "--out=run")
    assert code == 1 and "example_shape must be (channels, height, width), each at least 1, got [4]" in said
    assert not Path("run").exists()


def test_a_run_on_a_table_goes_on_and_is_measured_on_other_rows(fit, wine, tmp_path):
    code, _ = fit("--model.bandwidth=0.4", "--trainer.max_steps=2", "--out=run")
    settings = torch.load("run/checkpoints/last.ckpt", weights_only=True)
    assert code == 0 and settings["hyper_parameters"]["num_lagged"] == 160  # the whole training set
    assert settings["Table"]["classes"] == ["class 0", "class 1", "class 2"] and len(settings["Table"]["columns"]) == 4
    assert fit("--ckpt_path=run", "--trainer.max_steps=4")[0] == 0
    assert torch.load("run/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    assert fit("run", command="evaluate")[0] == 0
    before = json.loads(Path("run/metrics.json").read_text())["held_out"]
    assert json.loads(Path("run/evaluation-1/metrics.json").read_text())["held_out"] == before

    # Of other rows, in other columns, each is scored as it is among those of the run: nothing is measured anew.
    assert fit("run", "--out=all.csv", "--split=training", "--variance=1", command="score")[0] == 0
    header, *lines = wine.read_text().splitlines()
    training = Table(wine, label="cultivar")._parts(len(lines), 0.1)[0].tolist()
    order = [3, 4, 0, 2, 1]
    some = [lines[row].split(",") for row in training[:9]]
    text = "\n".join(",".join(line[place] for place in order) for line in [header.split(","), *some])
    (tmp_path / "other.csv").write_text(text + "\n")
    other = ["--data.path=other.csv", f"--data.held_out_path={wine}"]
    assert fit("run", *other, "--out=some.csv", "--split=training", "--variance=1", command="score")[0] == 0
    rows = [line.split(",")[-1] for line in Path("all.csv").read_text().splitlines()]
    assert rows == ["row", *map(str, training)]
    scores = [Path(name).read_text().splitlines()[1:10] for name in ("all.csv", "some.csv")]
    assert [line.split(",")[:2] for line in scores[0]] == [line.split(",")[:2] for line in scores[1]]
    found = [[float(line.split(",")[2]) for line in part] for part in scores]
    assert found[0] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.parametrize("count", [1, 5])
def test_rows_of_a_small_file_are_scored_in_their_order_without_classes(fit, wine, capsys, count):
    assert fit("--model.bandwidth=0.4", "--trainer.max_steps=2", "--out=run")[0] == 0
    header, *lines = wine.read_text().splitlines()
    unlabelled = [",".join(line.split(",")[:-1]) for line in [header, *lines[:count]]]
    Path("later.csv").write_text("\n".join(unlabelled) + "\n")
    assert main(["score", "run", "--data.held_out_path=later.csv", "--out=later_scores.csv"]) == 0
    said = capsys.readouterr().out
    scores = list(csv.DictReader(Path("later_scores.csv").read_text().splitlines()))
    assert [(int(row["index"]), int(row["row"])) for row in scores] == [(place, place) for place in range(count)]
    most, least = (line.partition(": ")[2].split(", ") for line in said.splitlines() if "likely, by row: " in line)
    assert most[0] == min(scores, key=lambda row: float(row["score"]))["row"]
    assert len(most) == len(least) == max(1, count // 2) and (count == 1 or not {*most} & {*least})
