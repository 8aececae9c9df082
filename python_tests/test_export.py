"""Models in a form that can be handed on: folders and the hub, cards, ONNX, and the command that writes them."""

import base64
import hashlib
import json
import re
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import onnx
import onnxruntime
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from torch import nn
from torch.distributions import Independent, Normal

import kdejsd
from kdejsd import GaussianMixture, StandardNormal
from kdejsd.cli import main
from kdejsd.data import Table, Tensors
from kdejsd.models import AE, FC, GAN, VAE, Conv, GenerativeModel, built
from kdejsd.runs.card import write_card
from kdejsd.runs.onnx import OPSET, write_onnx

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec", "ignore:.*does not have many workers")

MIXTURE = GaussianMixture([[-1.0, 0.1], [1.0, 0.3]], [0.5, 0.3], [0.3, 0.7])
LAGGED = {"num_lagged": 50, "bandwidth": 0.4}
IMAGES = (1, 8, 8)


def same_state(model: GenerativeModel, other: GenerativeModel) -> None:
    """Holds two models to the same class, dtypes and bits."""
    assert type(model) is type(other) and model.dtype == other.dtype
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for name, value in state.items():
        assert value.dtype == others[name].dtype and torch.equal(value, others[name]), name


def half_encoder(model: AE) -> AE:
    model.encoder.bfloat16()
    return model


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: built.GEN(IMAGES, network=partial(FC, hidden=(16,)), target=MIXTURE, **LAGGED), id="GEN"),
        pytest.param(lambda: built.GEN(IMAGES, target=MIXTURE, smoothed=False, num_lagged=50), id="GEN-searched"),
        pytest.param(lambda: built.GEN(IMAGES, lagged_dtype="bfloat16", **LAGGED).double(), id="GEN-dtypes"),
        pytest.param(lambda: built.StochasticGEN((1, 28, 28), network=Conv, **LAGGED), id="StochasticGEN"),
        pytest.param(lambda: built.SemiSupervisedGEN(IMAGES, target=MIXTURE, **LAGGED), id="SemiSupervisedGEN"),
        pytest.param(lambda: built.VAE(IMAGES, prior="flow", flow_layers=2), id="VAE-flow"),
        pytest.param(lambda: built.VAE((5,)).to(torch.bfloat16), id="VAE-bfloat16"),
        pytest.param(lambda: half_encoder(built.AE(IMAGES)), id="AE-half-bfloat16"),
        pytest.param(lambda: built.AE(IMAGES, target=MIXTURE, normalize_codes=True), id="AE"),
        pytest.param(lambda: built.AAE(IMAGES, target=StandardNormal(2)), id="AAE"),
        pytest.param(lambda: built.WAE(IMAGES), id="WAE"),
        pytest.param(lambda: built.LCVAE(IMAGES, constraint="spectral"), id="LCVAE"),
        pytest.param(lambda: built.GAN(IMAGES, packing=2, objective="wgan"), id="GAN"),
    ],
)
def test_a_model_comes_back_bit_for_bit(make, tmp_path):
    torch.manual_seed(0)
    model = make()
    if hasattr(model, "lagged"):
        model.lagged.refresh(model.target_samples(50), torch.arange(50))
    model.save_pretrained(tmp_path / "first")
    again = GenerativeModel.from_pretrained(tmp_path / "first")
    same_state(model, again)
    assert not again.training and str(again.target) == str(model.target)
    latents = torch.randn(3, 2, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    assert torch.equal(model.eval().decode(latents), again.decode(latents))
    if hasattr(model, "lagged"):
        assert again.lagged.bandwidth == model.lagged.bandwidth
        assert torch.equal(again.lagged.log_prob(latents), model.lagged.log_prob(latents))
    again.save_pretrained(tmp_path / "second")
    same_state(model, type(model).from_pretrained(tmp_path / "second"))
    card = huggingface_hub.ModelCard.load(tmp_path / "second" / "README.md")
    assert card.data.library_name == "kdejsd" and type(model).__name__.lower() in card.data.tags


def test_networks_of_ones_own_are_given_again(tmp_path):
    networks = FC(IMAGES, 2)
    law = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
    model = AE(networks.encoder, networks.decoder, 2, target=law)
    model.save_pretrained(tmp_path)
    new = FC(IMAGES, 2)
    again = AE.from_pretrained(tmp_path, encoder=new.encoder, decoder=new.decoder, target=law)
    same_state(model, again)
    assert again.encoder is new.encoder and again.decoder is new.decoder
    own = built.VAE(IMAGES, network=lambda shape, dim: FC(shape, dim, hidden=[3]))
    own.save_pretrained(tmp_path / "built")
    with pytest.raises(ValueError, match="from_pretrained must be given network: this VAE was made with objects"):
        VAE.from_pretrained(tmp_path / "built")
    same_state(own, VAE.from_pretrained(tmp_path / "built", network=partial(FC, hidden=[3])))
    for missing, given in (
        ("decoder, encoder, target", {}),
        ("target", {"encoder": new.encoder, "decoder": new.decoder}),
    ):
        with pytest.raises(ValueError, match=f"from_pretrained must be given {missing}: this AE"):
            AE.from_pretrained(tmp_path, **given)
    wrong = FC(IMAGES, 2, hidden=[3])
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit the networks .*size mismatch"):
        AE.from_pretrained(tmp_path, encoder=wrong.encoder, decoder=wrong.decoder, target=law)


def test_what_is_no_model_is_refused(tmp_path, monkeypatch):
    model = built.VAE(IMAGES)
    model.save_pretrained(tmp_path)
    with pytest.raises(TypeError, match=r"config\.json must be of a GAN, got one of a VAE"):
        GAN.from_pretrained(tmp_path)
    with pytest.raises(FileNotFoundError, match="holds no model that save_pretrained or kdejsd export has written"):
        VAE.from_pretrained(tmp_path.parent)
    with pytest.raises(FileNotFoundError, match="nobody/none is neither a folder nor a repository"):
        VAE.from_pretrained("nobody/none", local_files_only=True, cache_dir=tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for changed, text in (
        ({"class_path": "nowhere.Model"}, "is of a nowhere.Model, which cannot be imported here"),
        ({"class_path": "subprocess.Popen"}, "must name a model of kdejsd, got subprocess.Popen"),
        ({"init_args": config["init_args"] | {"flow_layers": "two"}}, "no VAE can be made as .* says: .*flow_layers"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config | changed))
        with pytest.raises(ValueError, match=text):
            VAE.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is not of a model of kdejsd"):
        VAE.from_pretrained(tmp_path)
    with torch.no_grad():
        model.decoder[0].bias[0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"its weights decoder\.0\.bias are not finite"):
        model.save_pretrained(tmp_path / "spoiled")
    monkeypatch.setitem(sys.modules, "safetensors.torch", None)
    with pytest.raises(ModuleNotFoundError, match=r'"safetensors".*pip install "kdejsd\[hub\]"'):
        VAE.from_pretrained(tmp_path)


def test_models_do_not_import_the_hub():
    code = (
        "import sys, kdejsd.models; kdejsd.models.GEN; "
        "assert not {'huggingface_hub', 'safetensors', 'onnxruntime'} & sys.modules.keys()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


# ----------------------------------------------------------------------------------------------------------------------
# The hub


class Hub(BaseHTTPRequestHandler):
    """Answers as the hub does to the few requests that uploads and downloads make, and keeps the files in memory."""

    files: dict[str, bytes]
    tokens: set[str]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.tokens.add(self.headers["Authorization"])
        base = f"http://{self.headers['Host']}/user/digits"
        if self.path == "/api/repos/create":
            self.answer({"url": base})
        elif "/preupload/" in self.path:
            names = [file["path"] for file in json.loads(body)["files"]]
            self.answer({"files": [{"path": name, "uploadMode": "regular", "shouldIgnore": False} for name in names]})
        elif "/commit/" in self.path:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    self.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.answer({"commitUrl": f"{base}/commit/{'1' * 40}", "commitOid": "1" * 40})
        else:
            self.answer({})  # such as whether the card's header is right

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        if re.match(r"/user/digits/resolve/(v1|main)/", self.path) and name in self.files:
            self.answer(self.files[name])
        else:
            self.send_error(404)

    do_HEAD = do_GET

    def answer(self, content: object) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{hashlib.sha1(data).hexdigest()}"')
        self.send_header("X-Repo-Commit", "1" * 40)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub of this machine, which huggingface_hub itself talks to: nothing is uploaded to the real one."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    handler = type("ThisHub", (Hub,), {"files": {}, "tokens": set()})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    place = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", place)
    addresses = f"{place}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", addresses)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    yield handler
    server.shutdown()
    server.server_close()


def test_a_model_goes_to_the_hub_and_back(hub, tmp_path):
    model = built.VAE(IMAGES)
    address = model.push_to_hub("user/digits", token="hf_given", commit_message="A model")
    assert address.endswith(f"/user/digits/commit/{'1' * 40}") and hub.tokens == {"Bearer hf_given"}
    assert hub.files.keys() == {"README.md", "config.json", "model.safetensors"}
    assert 'from_pretrained("user/digits")' in hub.files["README.md"].decode()
    options = {"revision": "v1", "token": "hf_given", "cache_dir": tmp_path}
    same_state(model, VAE.from_pretrained("user/digits", **options))
    hub.files.clear()
    same_state(model, VAE.from_pretrained("user/digits", **options, local_files_only=True))
    with pytest.raises(FileNotFoundError, match=r"user/none is neither a folder nor a repository .* from the hub"):
        VAE.from_pretrained("user/none", **options)


# ----------------------------------------------------------------------------------------------------------------------
# ONNX


@pytest.mark.parametrize(
    ("make", "shape"),
    [
        pytest.param(lambda s: built.GEN(s, target=MIXTURE, **LAGGED), IMAGES, id="GEN"),
        pytest.param(lambda s: built.StochasticGEN(s, network=Conv, **LAGGED), (1, 28, 28), id="StochasticGEN-Conv"),
        pytest.param(lambda s: built.VAE(s, prior="flow", flow_layers=2, flow_hidden=8), (5,), id="VAE-flow"),
        pytest.param(lambda s: built.LCVAE(s, constraint="spectral"), IMAGES, id="LCVAE-spectral"),
        pytest.param(lambda s: built.GAN(s, network=partial(Conv, channels=4)), (3, 32, 32), id="GAN-Conv"),
    ],
)
def test_onnx_computes_what_the_model_computes(make, shape, tmp_path):
    torch.manual_seed(0)
    model = make(shape)
    for part in model.modules():  # statistics as after a training
        if hasattr(part, "running_var"):
            part.running_mean.normal_(generator=torch.Generator().manual_seed(1))
            part.running_var.uniform_(0.5, 2, generator=torch.Generator().manual_seed(2))
    paths = write_onnx(model, tmp_path)
    assert model.training
    names = ["decoder"] if isinstance(model, GAN) else ["encoder", "decoder"]
    assert [path.name for path in paths] == [f"{name}.onnx" for name in names]
    model.eval()
    for path, name in zip(paths, names, strict=True):
        assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[""] == OPSET
        session = onnxruntime.InferenceSession(path)
        source, result = ("examples", "codes") if name == "encoder" else ("codes", "examples")
        compute = model.encode if name == "encoder" else model.decode
        for count, scale in ((1, 1.0), (7, 1.0), (7, 30.0)):
            given = scale * torch.randn(count, *(shape if name == "encoder" else (2,)))
            with torch.no_grad():
                expected = compute(given)
            [got] = session.run([result], {source: given.numpy()})
            torch.testing.assert_close(torch.from_numpy(got), expected, rtol=1e-4, atol=1e-4 * float(scale))


class Fixed(nn.Module):
    """Knows the size of the batch by `len`, which tracing turns into a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(64, 2)

    def forward(self, examples):
        return self.linear(examples.reshape(len(examples), 64))


class Branching(Fixed):
    """Decides by values, which no graph holds."""

    def forward(self, examples):
        codes = self.linear(examples.flatten(1))
        return codes if codes.sum() > 0 else -codes


@pytest.mark.parametrize(
    ("make", "options", "text"),
    [
        (lambda: built.VAE(IMAGES).double(), {}, r"must be in float32 .*, got float64: model\.float\(\) converts it"),
        (lambda: AE(Fixed(), FC(IMAGES, 2).decoder, 2), {}, "example_shape must be given for a model with networks of"),
        (lambda: AE(Fixed(), FC(IMAGES, 2).decoder, 2), {"example_shape": IMAGES}, "takes no batch of 1: "),
        (
            lambda: AE(Branching(), FC(IMAGES, 2).decoder, 2),
            {"example_shape": IMAGES},
            "the encoder cannot be exported",
        ),
    ],
)
def test_what_is_not_exported_to_onnx_says_so(make, options, text, tmp_path):
    with pytest.raises(ValueError, match=text):
        write_onnx(make(), tmp_path, **options)
    assert not list(tmp_path.iterdir())


def test_onnx_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ModuleNotFoundError, match=r'"onnxscript".*pip install "kdejsd\[onnx\]"'):
        write_onnx(built.VAE(IMAGES), tmp_path)


# ----------------------------------------------------------------------------------------------------------------------
# The command

FIT = ["fit", "--model.network.hidden=[16]", "--model.num_lagged=50", "--model.bandwidth=0.4", "--trainer.max_steps=2"]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("run") / "first"
    assert main([*FIT, "--trainer.accelerator=cpu", f"--out={folder}"]) == 0
    return folder


def code_of(card: huggingface_hub.ModelCard) -> str:
    [code] = re.findall(r"```python\n(.*?)```", card.text, re.S)
    return code


def test_export_writes_a_run_with_its_card(run, tmp_path, monkeypatch, capsys):
    assert main(["export", str(run)]) == 0
    out = run / "export-1"
    assert capsys.readouterr().out == f"exported: {out}\n"
    pictures = {"samples.png", "latent.png", "reconstructions.png"}
    assert {path.name for path in out.iterdir()} == pictures | {
        *("README.md", "config.json", "config.yaml", "model.safetensors")
    }
    same_state(kdejsd.load(run, "cpu"), GenerativeModel.from_pretrained(out))
    card = huggingface_hub.ModelCard.load(out / "README.md")
    numbers = json.loads((run / "metrics.json").read_text())["held_out"]
    assert card.data.model_name == "GEN on Digits"
    for result in card.data.eval_results:
        assert result.metric_value == numbers[result.metric_type] and result.dataset_name == "Digits"
    assert {result.metric_type for result in card.data.eval_results} == {"reconstruction_error", "jsd"}
    assert f"{numbers['jsd']:.4g} |" in card.text and "The Jensen-Shannon divergence between" in card.text
    for picture in re.findall(r"!\[.*?\]\((.*?)\)", card.text):
        assert picture in pictures and (out / picture).stat().st_size > 1000
    monkeypatch.chdir(out)
    names = {}
    exec(code_of(card), names)
    assert names["decoded"].shape == (10, 1, 8, 8) and names["samples"].shape == (100, 1, 8, 8)
    [again] = re.findall(r"```sh\nkdejsd (.*?)\n```", card.text)
    assert main([*again.split(), f"--out={tmp_path / 'again'}", "--trainer.accelerator=cpu"]) == 0
    same_state(kdejsd.load(run, "cpu"), kdejsd.load(tmp_path / "again", "cpu"))


def test_a_card_tells_no_paths(tmp_path):
    root = tmp_path / "secret"
    data = {"_class_path": "kdejsd.data.MNIST", "_instantiator": "x", "root": str(root), "batch_size": 50}
    (tmp_path / "config.yaml").write_text(
        f"data: {{class_path: kdejsd.data.MNIST, init_args: {{root: {root}, batch_size: 50}}}}\nlogs: [{root}, b]\n"
    )
    out = tmp_path / "out"
    model = built.VAE((1, 28, 28))
    model.save_pretrained(out)
    write_card(out, model, {"datamodule_hyper_parameters": data}, tmp_path)
    card, config = (out / "README.md").read_text(), (out / "config.yaml").read_text()
    assert "`MNIST`, with batch_size = 50." in card and "batch_size: 50" in config
    assert "kdejsd fit --config config.yaml --data.root PATH" in card
    assert "secret" not in card + config


def test_export_with_onnx_and_what_it_refuses(run, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["export", str(run), "--onnx", f"--out={out}"]) == 0
    codes = torch.randn(4, 2)
    [examples] = onnxruntime.InferenceSession(out / "decoder.onnx").run(["examples"], {"codes": codes.numpy()})
    with torch.no_grad():
        torch.testing.assert_close(torch.from_numpy(examples), kdejsd.load(run, "cpu").decode(codes))
    capsys.readouterr()
    for args, status, text in (
        ([str(run), f"--out={out}"], 1, f"out must be a new or empty folder, and {out} is not"),
        ([str(tmp_path / "none")], 1, f"the checkpoint {tmp_path / 'none'} does not exist"),
        ([], 2, "run must be given"),
        ([str(run), "--onx"], 2, "there is no setting --onx"),
        ([str(run), "--push=digits"], 1, "push must be a repository with its owner, such as user/digits, got digits"),
    ):
        assert main(["export", *args]) == status
        assert capsys.readouterr().err.startswith(f"kdejsd export: error: {text}")


def people(count: int, seed: int = 0) -> pa.Table:
    """Columns of very different scales, which float32 would round, and a label."""
    random = np.random.default_rng(seed)
    return pa.table(
        {
            "height": random.normal(170, 10, count),
            "born": random.integers(1_600_000_000, 1_700_000_000, count),
            "member": random.random(count) < 0.5,
            "town": pa.array(random.choice(["Ulm", "Köln"], count)),
        }
    )


@pytest.fixture(scope="module")
def run_on_table(tmp_path_factory) -> tuple[Path, Table]:
    """A run and its data, whose held-out rows are those of a file of their own."""
    folder = tmp_path_factory.mktemp("table")
    paths = {"path": folder / "people.csv", "held_out_path": folder / "later.csv"}
    for seed, path in enumerate(paths.values()):
        pa.csv.write_csv(people(80, seed), path)
    settings = ["--data=Table", "--data.label=town", *(f"--data.{name}={path}" for name, path in paths.items())]
    assert main([*FIT, *settings, "--trainer.accelerator=cpu", f"--out={folder / 'run'}"]) == 0
    return folder / "run", Table(**paths, label="town")


def decoded_by_run(run: Path, data: Table) -> np.ndarray:
    """What the run's model decodes of the held-out rows, in the units of their file."""
    model = kdejsd.load(run, "cpu")
    with torch.no_grad():
        return data.restored(model.decode(model.encode(data.held_out.examples))).numpy()


def test_whoever_gets_a_run_on_a_table_can_use_its_columns(run_on_table, tmp_path, monkeypatch):
    run, data = run_on_table
    out = tmp_path / "out"
    assert main(["export", str(run), "--onnx", f"--out={out}"]) == 0
    expected = decoded_by_run(run, data)
    columns = json.loads((out / "columns.json").read_text())
    mean, scale = data.standardization.mean.tolist(), data.standardization.scale.tolist()
    names = ["height", "born", "member"]
    assert columns == {"names": names, "mean": mean, "scale": scale, "classes": ["Köln", "Ulm"]}
    card = huggingface_hub.ModelCard.load(out / "README.md")
    assert f"| born | {mean[1]:.4g} | {scale[1]:.4g} |" in card.text and "Köln, Ulm." in card.text
    assert "The ONNX files, too, work with standardised rows" in card.text

    rows = people(80, seed=1).select(["member", "born", "height"])
    pa.csv.write_csv(rows, out / "rows.csv")  # without classes, in another order
    monkeypatch.chdir(out)
    found = {}
    exec(code_of(card), found)
    assert np.array_equal(found["decoded"], expected)
    assert found["samples"].shape == (100, 3) and found["samples"][:, 1].min() > 1_000_000_000

    prepared = ((np.column_stack([rows[name] for name in names]) - mean) / scale).astype(np.float32)
    [codes] = onnxruntime.InferenceSession("encoder.onnx").run(["codes"], {"examples": prepared})
    np.testing.assert_allclose(codes, found["codes"], rtol=1e-4, atol=1e-4)


def test_export_puts_a_run_on_the_hub(run_on_table, hub, tmp_path, monkeypatch, capsys):
    run, data = run_on_table
    out = tmp_path / "out"
    assert main(["export", str(run), f"--out={out}", "--push=user/digits"]) == 0
    assert capsys.readouterr().out.endswith(f"/user/digits/commit/{'1' * 40}\n")
    assert hub.files == {path.name: path.read_bytes() for path in out.iterdir()}
    assert hub.tokens == {"Bearer hf_of_a_test"}
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    pa.csv.write_csv(people(80, seed=1), "rows.csv")
    found = {}
    exec(code_of(huggingface_hub.ModelCard.load(out / "README.md")), found)
    assert np.array_equal(found["decoded"], decoded_by_run(run, data))


@pytest.mark.parametrize(
    ("make", "kind", "places"),
    [
        pytest.param(lambda path: Table(path / "rows.csv", label="town"), built.GAN, None, id="GAN"),
        pytest.param(lambda path: Tensors(path / "rows.pt", standardize=True), built.AE, None, id="tensors"),
        pytest.param(lambda path: Table(path / "rows.npy", columns=[3, 1]), built.AE, [2, 0], id="array"),
        pytest.param(
            lambda path: Table(path / "rows.parquet", columns=["born", "height"]), built.AE, [1, 0], id="parquet"
        ),
        pytest.param(
            lambda path: Table(path / "rows.csv", standardize=False, label="town"), built.AE, [0, 1, 2], id="as it is"
        ),
    ],
)
def test_the_code_of_a_card_fits_the_data(make, kind, places, tmp_path, monkeypatch):
    rows = people(20)
    pa.csv.write_csv(rows, tmp_path / "rows.csv")
    pa.parquet.write_table(rows, tmp_path / "rows.parquet")
    matrix = np.column_stack(rows.drop(["town"]).columns)
    np.save(tmp_path / "rows.npy", matrix)
    torch.save(torch.randn(20, 2, 3) * 7 + 1000, tmp_path / "rows.pt")
    data = make(tmp_path)
    data.setup()
    settings = {"_class_path": f"kdejsd.data.{type(data).__name__}", **data.hparams}
    model = kind(data.example_shape, network=partial(FC, hidden=(8,))).eval()
    model.save_pretrained(tmp_path)
    checkpoint = {"datamodule_hyper_parameters": settings, type(data).__name__: data.state_dict()}
    write_card(tmp_path, model, checkpoint, tmp_path)
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code_of(huggingface_hub.ModelCard.load("README.md")), found)
    assert found["samples"].shape == (100, *data.example_shape)
    if kind is built.GAN:
        assert found["samples"][:, 1].min() > 1_000_000_000
        return
    if places is not None:
        assert np.array_equal(found["rows"], matrix[:, places])
    given = torch.from_numpy(found["rows"])
    examples = given.float() if data.standardization is None else data.standardization.done(given)
    with torch.no_grad():
        expected = data.restored(model.decode(model.encode(examples)))
    assert np.array_equal(found["decoded"], expected.double().numpy())


@pytest.mark.parametrize(
    ("options", "files"),
    [
        pytest.param(
            ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=logs"], {"metrics.csv": 1, "events*": 0}, id="one"
        ),
        pytest.param(
            [
                *("--trainer.logger+=CSVLogger", "--trainer.logger.save_dir=logs"),
                *("--trainer.logger+=TensorBoardLogger", "--trainer.logger.save_dir=logs"),
            ],
            {"metrics.csv": 1, "events*": 1},
            id="list",
        ),
        pytest.param(["--trainer.logger=false"], {"metrics.csv": 0, "events*": 0}, id="none"),
    ],
)
def test_a_run_logs_where_it_is_told_to(options, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main([*FIT, "--trainer.log_every_n_steps=1", "--trainer.accelerator=cpu", "--out=run", *options]) == 0
    for name, count in files.items():
        found = list(tmp_path.rglob(name))
        assert len(found) == count and not any(tmp_path / "run" in path.parents for path in found)
        if name == "metrics.csv" and count:
            text = found[0].read_text()
            assert "loss/latent" in text.splitlines()[0] and len(text.splitlines()) > 2
