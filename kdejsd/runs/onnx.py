"""Writes a model's encoder and decoder as ONNX, for runtimes other than PyTorch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from .._extras import extra
from .._modes import evaluating
from ..models import Autoencoder, GenerativeModel

OPSET = 18  # what torch's exporter writes without a conversion, and runtimes since 2023 read
_BATCHES = (1, 7)  # sizes of the comparison with the model, both other than that of the tracing
_TOLERANCE = 1e-4  # of the greatest value


def write_onnx(
    model: GenerativeModel, folder: str | os.PathLike[str], example_shape: Sequence[int] | None = None
) -> list[Path]:
    """Writes decoder.onnx, and for an autoencoder encoder.onnx, into a folder, and returns their paths.

    The encoder computes `model.encode`, with the normalisation of the codes or the flow, from "examples" [n, ...] to
    "codes" [n, l]. The decoder computes `model.decode`, from "codes" to "examples". Both are float32, for batches of
    any size n, and of opset 18. Before they are written, ONNX Runtime compares them with the model.

    Args:
        model: a model in float32, exported as it is in evaluation mode.
        folder: an existing folder.
        example_shape: the shape of one example; None takes the shape that the model has built its networks for.

    Raises:
        ValueError: if the model is of another dtype, the shape is not known, or a network cannot be exported or
            computes something else as ONNX.
        ModuleNotFoundError: if a package of the extra `onnx` is missing.

    Example:
        >>> import onnxruntime, tempfile, torch
        >>> from kdejsd.models import built
        >>> from kdejsd.runs.onnx import write_onnx
        >>> model = built.GAN((1, 8, 8))
        >>> with tempfile.TemporaryDirectory() as folder:  # doctest: +SKIP
        ...     [path] = write_onnx(model, folder)
        ...     decoder = onnxruntime.InferenceSession(path)
        ...     [examples] = decoder.run(["examples"], {"codes": torch.randn(5, 2).numpy()})
    """
    with extra("onnx"):
        import onnx  # noqa: F401  # torch asks for them later, and less clearly
        import onnxruntime
        import onnxscript  # noqa: F401
    if model.dtype != torch.float32:
        raise ValueError(
            f"a model must be in float32 to be exported to ONNX, got {str(model.dtype).removeprefix('torch.')}: "
            "model.float() converts it"
        )
    parts: dict[str, tuple[nn.Module, str, str, Sequence[int]]] = {
        "decoder": (_Decoder(model), "codes", "examples", [model.latent_dim])
    }
    if isinstance(model, Autoencoder):
        shape = example_shape or model.hparams.get("example_shape")
        if shape is None:
            raise ValueError("example_shape must be given for a model with networks of your own, got None")
        parts = {"encoder": (_Encoder(model), "examples", "codes", shape), **parts}
    written = {}
    with torch.no_grad(), evaluating(model):
        for name, (part, source, result, sizes) in parts.items():
            content = _exported(name, part.eval(), source, result, torch.rand(3, *sizes, device=model.device))
            session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
            for count in _BATCHES:
                given = torch.rand(count, *sizes)
                expected = part(given.to(model.device)).cpu()
                try:
                    [got] = session.run([result], {source: given.numpy()})
                except Exception as error:
                    raise ValueError(f"the {name} as ONNX takes no batch of {count}: {_cause(error)}") from error
                difference = float((torch.from_numpy(got) - expected).abs().max() / expected.abs().max().clamp_min(1))
                if not difference <= _TOLERANCE:
                    raise ValueError(
                        f"the {name} as ONNX must give what the model gives, and differs by {difference:.2g} of the "
                        "greatest value"
                    )
            written[Path(folder, f"{name}.onnx")] = content
    for path, content in written.items():
        path.write_bytes(content)
    return list(written)


class _Encoder(nn.Module):
    """Makes a module of `encode`."""

    def __init__(self, model: Autoencoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, examples: Tensor) -> Tensor:
        return self.model.encode(examples)


class _Decoder(nn.Module):
    """Makes a module of `decode`."""

    def __init__(self, model: GenerativeModel) -> None:
        super().__init__()
        self.model = model

    def forward(self, codes: Tensor) -> Tensor:
        return self.model.decode(codes)


def _exported(name: str, part: nn.Module, source: str, result: str, batch: Tensor) -> bytes:
    try:
        program = torch.onnx.export(
            part,
            (batch,),
            dynamo=True,
            opset_version=OPSET,
            input_names=[source],
            output_names=[result],
            dynamic_shapes=({0: torch.export.Dim("n")},),
            verbose=False,
        )
    except Exception as error:
        raise ValueError(f"the {name} cannot be exported to ONNX: {_cause(error)}") from error
    assert program is not None
    content: bytes = program.model_proto.SerializeToString()
    return content


def _cause(error: BaseException) -> str:
    """Returns the first line of the error that began it: torch's exporter wraps it in pages of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    return next(filter(None, str(error).splitlines()), type(error).__name__)
