"""Trains a model of the pythae library whose codes follow the standard normal, by kdejsd's latent term.

pip install pythae
python pythae_gen.py
"""

import logging
import tempfile

import torch
from pythae.data.datasets import BaseDataset
from pythae.models import AE, AEConfig
from pythae.models.base.base_utils import ModelOutput
from pythae.models.nn import BaseDecoder, BaseEncoder
from pythae.trainers import BaseTrainer, BaseTrainerConfig
from pythae.trainers.training_callbacks import TrainingCallback
from torch import nn

import kdejsd
from kdejsd.data import Digits


class Encoder(BaseEncoder):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8)), nn.BatchNorm1d(8, affine=False)
        )

    def forward(self, images):
        return ModelOutput(embedding=self.layers(images))


class Decoder(BaseDecoder):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            *(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64)), nn.Sigmoid(), nn.Unflatten(1, (1, 8, 8))
        )

    def forward(self, codes):
        return ModelOutput(reconstruction=self.layers(codes))


class GEN(AE):
    """Adds the latent term to pythae's autoencoder."""

    def __init__(self, lagged, weight=1.0):
        super().__init__(AEConfig(input_dim=(1, 8, 8), latent_dim=8), Encoder(), Decoder())
        self.lagged = lagged
        self.weight = weight

    def codes(self, images):
        return self.encoder(images).embedding

    def forward(self, inputs, **kwargs):
        images = inputs["data"]
        codes = self.codes(images)
        decoded = self.decoder(codes).reconstruction
        error = nn.functional.mse_loss(decoded, images)
        latent = self.lagged.loss(codes, inputs["labels"].long(), noise=torch.randn_like(codes))
        return ModelOutput(loss=error + self.weight * latent, recon_loss=error, recon_x=decoded, z=codes)


class Refresh(TrainingCallback):
    """Encodes the lagged examples anew after every tenth step; pythae's event of that name comes after each step."""

    def __init__(self, refresh):
        self.refresh = refresh

    def on_train_step_end(self, training_config, **kwargs):
        self.refresh.step()


def train(epochs=40):
    logging.disable(logging.INFO)
    digits = Digits()
    images, held_out = digits.training.examples, digits.held_out.examples
    torch.manual_seed(0)
    lagged = kdejsd.LaggedKDE(1000, 8)
    model = GEN(lagged)
    refresh = kdejsd.LaggedRefresh(lagged, model.codes, images, every=10)
    refresh.refresh()  # the trainer calls the model before its first step
    with tempfile.TemporaryDirectory() as folder:
        trainer = BaseTrainer(
            model,
            BaseDataset(images, torch.arange(len(images))),  # so that the loss knows which example a code is of
            training_config=BaseTrainerConfig(
                folder,
                num_epochs=epochs,
                per_device_train_batch_size=100,
                learning_rate=1e-3,
                optimizer_params={"betas": (0.5, 0.999)},
                no_cuda=True,
            ),
            callbacks=[Refresh(refresh)],
        )
        trainer.train()

    model.eval()
    with torch.no_grad():
        codes = model.codes(held_out)
        error = nn.functional.mse_loss(model.decoder(codes).reconstruction, held_out)
    of_codes, of_normal = (kdejsd.kde_entropy(z) for z in (codes, torch.randn_like(codes)))
    print(f"held-out images: reconstruction error {error:.4f}")
    print(f"entropy of their whitened codes {of_codes:.2f} nats, of as many normal samples {of_normal:.2f}")


if __name__ == "__main__":
    train()
