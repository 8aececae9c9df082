"""Saves a model in a folder to share: its weights as safetensors, its arguments as JSON, and a model card."""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch

from .._extras import extra, train_extra
from .._version import __version__
from .autoencoder import Autoencoder
from .base import GenerativeModel
from .built import BuiltModel, with_built_networks
from .descriptions import import_path

if TYPE_CHECKING:
    from huggingface_hub import EvalResult, ModelCard

WEIGHTS, ARGUMENTS, CARD = "model.safetensors", "config.json", "README.md"
_LONGEST = 300  # characters of another library's message
Model = TypeVar("Model", bound=GenerativeModel)


def save(model: GenerativeModel, folder: str | os.PathLike[str], name: str = ".") -> None:
    """Writes a model into a folder, for `GenerativeModel.save_pretrained`; `name` is by which its card loads it."""
    with extra("hub"):
        from safetensors.torch import save_file
    strange = model.strange_weights()
    if strange:
        raise FloatingPointError(f"the model cannot be handed on: its weights {', '.join(strange)} are not finite")
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    (path / ARGUMENTS).write_text(json.dumps(_arguments(model), indent=2) + "\n")
    # Copies, since safetensors takes no two tensors that share memory, as those of a target and of its law may.
    copies = {key: value.clone(memory_format=torch.contiguous_format) for key, value in model.state_dict().items()}
    save_file(copies, path / WEIGHTS, metadata={"format": "pt"})
    if not (path / CARD).exists():
        card(model, name).save(path / CARD)


def _arguments(model: GenerativeModel) -> dict[str, Any]:
    """Returns the content of config.json. Its `class_path` and `init_args` are those of a run's config.yaml."""
    arguments = {name: value for name, value in model.hparams.items() if not name.startswith("_")}
    arguments |= {name: value for name, value in model.descriptions.items() if value is not None}
    if "bandwidth" in arguments:
        arguments["bandwidth"] = model.settings()["bandwidth"]  # None would search for it again
    return {
        "kdejsd_version": __version__,
        "class_path": import_path(type(model)) or type(model).__qualname__,
        "init_args": arguments,
        "to_be_given": [name for name, value in model.descriptions.items() if value is None],
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def load(kind: type[Model], name: str | os.PathLike[str], given: Mapping[str, Any], **hub: Any) -> Model:
    """Loads a model from a folder or from the hub, for `GenerativeModel.from_pretrained`."""
    with extra("hub"):
        from safetensors.torch import load_file
    folder = Path(name) if Path(name).is_dir() else _downloaded(os.fspath(name), hub)
    for file in (ARGUMENTS, WEIGHTS):
        if not (folder / file).is_file():
            raise FileNotFoundError(
                f"{name} holds no model that save_pretrained or kdejsd export has written: there is no {file}"
            )
    config = json.loads((folder / ARGUMENTS).read_text())
    if not {"class_path", "init_args", "dtype"} <= config.keys():
        raise ValueError(f"{folder / ARGUMENTS} is not of a model of kdejsd: it names no class with its arguments")
    model = _made(kind, config, given, folder / ARGUMENTS)
    state = load_file(folder / WEIGHTS)
    model.to(getattr(torch, config["dtype"]))
    for key, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if key in state:
            tensor.data = tensor.data.to(state[key].dtype)  # a part of the model may have a dtype of its own
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise ValueError(
            f"{folder / WEIGHTS} does not fit the networks that were built or given: {_shortened(error)}"
        ) from error
    return model.eval()


def _downloaded(name: str, hub: Mapping[str, Any]) -> Path:
    with extra("hub"):
        from huggingface_hub import hf_hub_download
    try:
        hf_hub_download(name, ARGUMENTS, **hub)
        return Path(hf_hub_download(name, WEIGHTS, **hub)).parent
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name} is neither a folder nor a repository that can be read from the hub: {_shortened(error)}"
        ) from error


def _made(kind: type[Model], config: Mapping[str, Any], given: Mapping[str, Any], file: Path) -> Model:
    """Returns the model that config.json describes, with new weights."""
    path = config["class_path"]
    own = kind if path == import_path(kind) else _imported(path, file)
    if not issubclass(own, kind):
        raise TypeError(f"{file} must be of a {kind.__name__}, got one of a {own.__name__}")
    form: type[GenerativeModel] = own
    if "example_shape" in config["init_args"] and not issubclass(own, BuiltModel):
        form = with_built_networks(own)
    with train_extra():
        from jsonargparse import ArgumentParser
    parser = ArgumentParser(exit_on_error=False)
    known = parser.add_class_arguments(form, "model", skip=set(given), instantiate=False, fail_untyped=False)
    # What a class hands on to the one it is derived from is no argument of its own.
    saved = {key: value for key, value in config["init_args"].items() if f"model.{key}" in known}
    required = {item.name for item in inspect.signature(form).parameters.values() if item.default is item.empty}
    needed = {*config["to_be_given"], *(key for key in required if f"model.{key}" in known)}
    missing = sorted(needed - saved.keys() - given.keys())
    if missing:
        raise ValueError(
            f"from_pretrained must be given {', '.join(missing)}: this {own.__name__} was made with objects that no "
            "file can hold"
        )
    try:
        # It builds networks and targets by what describes them, as for the command.
        made = parser.instantiate_classes(parser.parse_object({"model": saved}))
        model = form(**vars(made.model), **given)
    except Exception as error:
        raise ValueError(f"no {own.__name__} can be made as {file} says: {_shortened(error)}") from error
    for described in model.descriptions.keys() - given.keys():
        model.descriptions[described] = config["init_args"][described]
    return cast("Model", model)


def _imported(path: str, file: Path) -> type[GenerativeModel]:
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{file} is of a {path}, which cannot be imported here ({error}): call from_pretrained where it can"
        ) from error
    if not (isinstance(found, type) and issubclass(found, GenerativeModel)):
        raise ValueError(f"{file} must name a model of kdejsd, got {path}")
    return found


def push(model: GenerativeModel, repo_id: str, private: bool | None, token: str | bool | None, **commit: Any) -> str:
    """Uploads a model, for `GenerativeModel.push_to_hub`."""
    with extra("hub"):
        from huggingface_hub import HfApi
    api = HfApi(token=token)
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    with TemporaryDirectory() as folder:
        save(model, folder, repo_id)
        return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **commit))


def card(
    model: GenerativeModel,
    name: str = ".",
    data: str | None = None,
    results: list[EvalResult] | None = None,
    sections: Mapping[str, str] | None = None,
    code: str | None = None,
) -> ModelCard:
    """Returns the model card for the hub: which model this is, how to load it, and what is known of its training.

    Args:
        model: the model.
        name: the folder or the repository that the card's code loads it from.
        data: the name of the examples that it was trained on.
        results: measures for the hub.
        sections: further sections by their titles, as Markdown.
        code: lines of Python that load the model and use it; None takes examples of random values.

    Example:
        >>> from kdejsd.models import built
        >>> from kdejsd.models.pretrained import card
        >>> print(card(built.VAE((1, 8, 8))).text.split()[:2])
        ['#', 'VAE']
    """
    with extra("hub"):
        from huggingface_hub import ModelCard, ModelCardData
    kind = type(model).__name__
    title = kind if data is None else f"{kind} on {data}"
    header = ModelCardData(
        library_name="kdejsd",
        tags=["kdejsd", "latent-space", "generative-model", kind.lower()],
        model_name=title if results else None,
        eval_results=results,
    )
    does = (inspect.getdoc(type(model)) or "Decodes latents.").splitlines()[0]
    about = (
        f"The class of this model is `{kind}` of kdejsd {__version__}, which {does[0].lower()}{does[1:]} "
        f"Its {'codes' if isinstance(model, Autoencoder) else 'latents'} are to follow {model.target}."
    )
    parts = {"How to load it": _how_to_load(name, code or _code(model, name)), **(sections or {})}
    text = "\n\n".join([f"# {title}", about, *(f"## {heading}\n\n{part}" for heading, part in parts.items())])
    return ModelCard(f"---\n{header}\n---\n\n{text}\n")


def _how_to_load(name: str, code: str) -> str:
    here = (
        "; `.` is the folder of this file, and the name of a repository on the hub loads as well" if name == "." else ""
    )
    return f"`pip install kdejsd[train,hub]` installs what it needs{here}.\n\n```python\n{code}\n```"


def _code(model: GenerativeModel, name: str) -> str:
    """Returns lines of Python that load the model and use it on examples of random values."""
    shape = model.hparams.get("example_shape")
    needs = "" if shape is not None else ", ...)  # with its networks, which are no part of the folder"
    lines = ["import torch", "from kdejsd.models import GenerativeModel", ""]
    lines += [f"model = GenerativeModel.from_pretrained({json.dumps(name)}{needs or ')'}", "with torch.no_grad():"]
    if isinstance(model, Autoencoder):
        sizes = "..." if shape is None else ", ".join(map(str, shape))
        lines += [
            f"    examples = torch.rand(10, {sizes})  # yours go here",
            f"    codes = model.encode(examples)  # [10, {model.latent_dim}]",
            "    decoded = model.decode(codes)  # the shape of the examples",
        ]
    return "\n".join([*lines, "    samples = model.sample(100)  # new examples"])


def _shortened(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{text[:_LONGEST]} ..." if len(text) > _LONGEST else text
