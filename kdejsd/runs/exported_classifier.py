"""Loads a classifier of examples from a file, for the command."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_HOW = (
    "torch.export.save(torch.export.export(net.eval(), (examples,), "
    'dynamic_shapes=({0: torch.export.Dim("n")},)), FILE) writes one'
)


def load_classifier(path: str, example_shape: Sequence[int]) -> Callable[[Tensor], Tensor]:
    """Loads a classifier written by `torch.export.save`, examples [n, ...] -> logits [n, K], for any n.

    The examples are float32, images in [0, 1]. It runs on the device it was exported on; the examples are brought there
    and the logits back. The file may contain pickles, which run code when they are loaded: load none that you do not
    trust.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged or of another kind, or the classifier takes examples of another shape or
            batches of a fixed size, has one class, or was exported in training mode, where its logits depend on chance
            or on the batch.
    """
    try:
        # Programs have no eval mode to be put into: what they do was decided when they were exported.
        program = torch.export.load(path).module()
    except FileNotFoundError:
        raise FileNotFoundError(f"classifier {path} does not exist") from None
    except Exception as error:
        raise ValueError(
            f"classifier {path} is damaged or not a program exported by torch.export.save ({error}); {_HOW}"
        ) from error
    device = next((value.device for value in program.state_dict().values()), torch.device("cpu"))

    def classify(examples: Tensor) -> Tensor:
        logits: Tensor = program(examples.to(device)).to(examples.device)
        return logits

    examples = torch.rand(5, *example_shape, generator=torch.Generator().manual_seed(0))
    try:
        with torch.no_grad():
            logits, first, again = classify(examples), classify(examples[:3]), classify(examples[:3])
    except Exception as error:
        raise ValueError(
            f"classifier {path} must take float32 examples [n, {', '.join(map(str, example_shape))}] for any n, and "
            f"gave an error ({error}); {_HOW}"
        ) from error
    if logits.ndim != 2 or len(logits) != len(examples) or logits.shape[1] < 2:
        raise ValueError(
            f"classifier {path} must return logits [n, classes] of at least 2 classes, "
            f"got {list(logits.shape)} for {len(examples)} examples"
        )
    if not torch.allclose(first, again) or not torch.allclose(first, logits[:3], rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"classifier {path} must give an example the same logits every time and in any batch; was it exported in "
            f"training mode? {_HOW}"
        )
    return classify
