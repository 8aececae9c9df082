"""Trains an autoencoder whose codes follow the standard normal, by Lightning Fabric, on one or several processes.

python fabric_loop.py
python fabric_loop.py 2
"""

import sys

import torch
from lightning.fabric import Fabric
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdejsd
from kdejsd.data import Digits


def train(devices, epochs=40):
    fabric = Fabric(devices=devices)
    fabric.launch()
    digits = Digits()
    images, held_out = digits.training.examples.flatten(1), digits.held_out.examples.flatten(1)

    fabric.seed_everything(0, verbose=False)
    encoder = nn.Sequential(*(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8)), nn.BatchNorm1d(8, affine=False))
    decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
    model = nn.ModuleDict({"encoder": encoder, "decoder": decoder})
    examples = TensorDataset(images, torch.arange(len(images)))
    loader = fabric.setup_dataloaders(
        DataLoader(examples, batch_size=100 // fabric.world_size, shuffle=True, drop_last=True)
    )
    encoder, decoder = fabric.setup_module(encoder), fabric.setup_module(decoder)
    optimizer = fabric.setup_optimizers(torch.optim.Adam(model.parameters(), 1e-3, betas=(0.5, 0.999)))

    lagged = kdejsd.LaggedKDE(1000, 8).to(fabric.device)
    lagged.shard()  # of several processes each keeps and encodes its part of the lagged codes
    refresh = kdejsd.LaggedRefresh(lagged, model["encoder"], examples, every=10)

    fabric.seed_everything(fabric.global_rank, verbose=False)  # from here on each process draws its own noise
    for _ in range(epochs):
        for batch, index in loader:
            refresh.step()  # every 10 steps: encodes the lagged examples anew
            codes = encoder(batch)
            error = nn.functional.mse_loss(decoder(codes), batch)
            loss = error + lagged.loss(codes, index, noise=torch.randn_like(codes))
            optimizer.zero_grad()
            fabric.backward(loss)
            optimizer.step()

    model.eval()
    held_out = held_out.to(fabric.device)
    with torch.no_grad():
        codes = model["encoder"](held_out)
        error = nn.functional.mse_loss(model["decoder"](codes), held_out)
    of_codes, of_normal = (kdejsd.kde_entropy(z) for z in (codes, torch.randn_like(codes)))
    fabric.print(f"held-out images: reconstruction error {error:.4f}")
    fabric.print(f"entropy of their whitened codes {of_codes:.2f} nats, of as many normal samples {of_normal:.2f}")


if __name__ == "__main__":
    train(devices=int(sys.argv[1]) if len(sys.argv) > 1 else 1)
