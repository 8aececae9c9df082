"""Trains an autoencoder whose codes follow the standard normal, as a LightningModule of one's own.

The picture shows the codes of held-out digits beside the normal. On several devices each keeps and encodes its part of
the lagged codes. `kdejsd.models.GEN` is a finished module of this kind, with more settings.

python lightning_loop.py
python lightning_loop.py --devices 2
"""

import argparse

import lightning.pytorch as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdejsd
from kdejsd import plots
from kdejsd.data import Digits

LATENT_DIM, NUM_LAGGED = 8, 1000


class Autoencoder(pl.LightningModule):
    def __init__(self, images):
        super().__init__()
        # Batch normalisation without learnt scales keeps the codes where the loss has a gradient.
        self.encoder = nn.Sequential(
            *(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, LATENT_DIM)), nn.BatchNorm1d(LATENT_DIM, affine=False)
        )
        self.decoder = nn.Sequential(nn.Linear(LATENT_DIM, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
        self.lagged = kdejsd.LaggedKDE(NUM_LAGGED, LATENT_DIM)  # a module: checkpoints hold the lagged codes
        self.refresh = kdejsd.LaggedRefresh(self.lagged, self.encoder, images, every=10)

    def setup(self, stage):
        if stage == "fit":
            self.lagged.shard()  # of several processes each keeps its part; on one nothing changes

    def on_fit_end(self):
        self.lagged.gather()

    def on_train_start(self):
        torch.manual_seed(self.global_rank)  # from here on each process draws its own noise

    def on_train_batch_start(self, batch, batch_idx):
        self.refresh.step()  # every 10 steps: encodes the lagged examples anew

    def training_step(self, batch, batch_idx):
        images, index = batch  # the loss leaves out the lagged copy of each image by its index in the training set
        codes = self.encoder(images)
        error = nn.functional.mse_loss(self.decoder(codes), images)
        latent = self.lagged.loss(codes, index, noise=torch.randn_like(codes))
        self.log_dict({"loss/reconstruction": error, "loss/latent": latent}, prog_bar=True)
        return error + latent

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3, betas=(0.5, 0.999))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--devices", type=int, default=1)
    parser.add_argument("--steps", type=int, default=560)
    parser.add_argument("--figure", default="lightning_loop.png")
    options = parser.parse_args()

    digits = Digits()
    images, held_out = (part.examples.flatten(1) for part in (digits.training, digits.held_out))
    pl.seed_everything(0, verbose=False)
    model = Autoencoder(images)
    examples = TensorDataset(images, torch.arange(len(images)))
    loader = DataLoader(examples, batch_size=100 // options.devices, shuffle=True, drop_last=True)
    trainer = pl.Trainer(devices=options.devices, max_steps=options.steps, logger=False, enable_checkpointing=False)
    trainer.fit(model, loader)

    model.eval()
    with torch.no_grad():
        codes = model.encoder(held_out)
        error = nn.functional.mse_loss(model.decoder(codes), held_out)
    of_codes, of_normal = (kdejsd.kde_entropy(z) for z in (codes, torch.randn_like(codes)))
    if trainer.is_global_zero:
        print(f"held-out images: reconstruction error {error:.4f}")
        print(f"entropy of their whitened codes {of_codes:.2f} nats, of as many normal samples {of_normal:.2f}")
        plots.latent(codes, digits.held_out.labels, kdejsd.StandardNormal(LATENT_DIM)).savefig(options.figure)


if __name__ == "__main__":
    main()
