"""Defines a classifier of images whose last hidden layer serves as features."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from .._extras import train_extra
from .._plain import plain
from ..data import Batch, ExampleData

with train_extra():
    import lightning.pytorch as pl
    from lightning.pytorch.callbacks import LambdaCallback
    from torchmetrics.classification import MulticlassAccuracy


class ImageClassifier(pl.LightningModule):
    """Classifies images of any size by two convolutions and a hidden layer, whose outputs serve as features.

    Use it to measure generated images: their classes for the diversity, their features for `frechet_distance`. Each
    convolution halves the side and is followed by batch normalisation. A checkpoint says which images it was trained
    on, and its accuracy on held-out ones; `ImageClassifier.load_from_checkpoint(path, weights_only=True)` reads it.

    Args:
        example_shape: (C, H, W).
        num_classes: K, the number of classes.
        data: the name of the set of images.
        num_features: the width of the hidden layer.
        learning_rate: the learning rate of Adam.

    Attributes:
        features: the module images [n, C, H, W] -> [n, num_features].
        accuracy: the share of the held-out images that it gets right, 0-dim; NaN before it is trained.

    Example:
        >>> import torch
        >>> from kdejsd.models import ImageClassifier
        >>> classifier = ImageClassifier((1, 8, 8), num_classes=10, data="Digits").eval()
        >>> images = torch.rand(5, 1, 8, 8)
        >>> classifier(images).shape, classifier.features(images).shape
        (torch.Size([5, 10]), torch.Size([5, 128]))
    """

    accuracy: Tensor

    def __init__(
        self,
        example_shape: Sequence[int],
        num_classes: int,
        data: str,
        num_features: int = 128,
        learning_rate: float = 1e-3,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.hparams.update({name: plain(value, name) for name, value in self.hparams.items()})
        channels, height, width = example_shape
        self.features = nn.Sequential(
            *(nn.Conv2d(channels, 32, 3, stride=2, padding=1), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.BatchNorm2d(64), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(64 * -(-height // 4) * -(-width // 4), num_features), nn.ReLU()),
        )
        self.head = nn.Linear(num_features, num_classes)
        self.data = data
        self.learning_rate: float = self.hparams["learning_rate"]
        self.register_buffer("accuracy", torch.tensor(torch.nan))
        self._counted = MulticlassAccuracy(num_classes, average="micro")

    def forward(self, images: Tensor) -> Tensor:
        """Returns logits [n, K] of images [n, C, H, W]."""
        logits: Tensor = self.head(self.features(images))
        return logits

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.learning_rate)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        images, labels, _ = batch
        return cross_entropy(self(images), labels)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        images, labels, _ = batch
        self._counted.update(self(images), labels)

    def on_validation_epoch_end(self) -> None:
        self.accuracy.copy_(self._counted.compute())
        self._counted.reset()
        self.log("val/accuracy", self.accuracy, prog_bar=True)

    def __str__(self) -> str:
        return f"{self.data} classifier, {100 * float(self.accuracy):.1f} % of held-out images right"


def classifier_for(data: ExampleData, path: Path, epochs: int = 5, seed: int = 0) -> ImageClassifier:
    """Returns the classifier in a file, in evaluation mode; if there is none, trains one and stores it there.

    Args:
        data: labelled images.
        path: the path of the file.
        epochs: passes through the training images, in the order of `data`; each is reported on stderr.
        seed: the seed of the initial weights.

    Raises:
        ValueError: if images have no labels, or the file has the classifier of other images.
    """
    name = type(data).__name__
    if path.exists():
        classifier = ImageClassifier.load_from_checkpoint(path, map_location="cpu", weights_only=True)
        if classifier.data != name:
            raise ValueError(f"{path} must hold a classifier of {name}, got one of {classifier.data}")
        return classifier.eval()
    labels = torch.cat([data.training.labels, data.held_out.labels])
    if int(labels.min()) < 0:
        raise ValueError(f"a classifier needs a label for every image, and {int((labels < 0).sum())} have none")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        classifier = ImageClassifier(data.example_shape, int(labels.max()) + 1, name)
        trainer = pl.Trainer(
            max_epochs=epochs,
            logger=False,
            callbacks=LambdaCallback(on_validation_end=_tell_progress),
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
        )
        trainer.fit(classifier, datamodule=data)
    path.parent.mkdir(parents=True, exist_ok=True)
    trainer.save_checkpoint(path, weights_only=True)
    return classifier.eval()


def _tell_progress(trainer: pl.Trainer, classifier: pl.LightningModule) -> None:
    print(f"epoch {trainer.current_epoch + 1} of {trainer.max_epochs}: {classifier}", file=sys.stderr)
