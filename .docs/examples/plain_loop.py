"""Trains an autoencoder whose codes follow the standard normal, in a plain PyTorch loop on one or several processes.

python plain_loop.py
torchrun --nproc_per_node 2 plain_loop.py
"""

import os

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import kdejsd
from kdejsd.data import Digits

LATENT_DIM, NUM_LAGGED = 8, 1000


class Autoencoder(nn.Module):
    def __init__(self):
        super().__init__()
        # Batch normalisation without learnt scales keeps the codes where the loss has a gradient.
        self.encoder = nn.Sequential(
            *(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, LATENT_DIM)), nn.BatchNorm1d(LATENT_DIM, affine=False)
        )
        self.decoder = nn.Sequential(nn.Linear(LATENT_DIM, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())

    def forward(self, images):
        codes = self.encoder(images)
        return codes, self.decoder(codes)


def train(steps=560, ranks=1, rank=0):
    digits = Digits()
    images, held_out = digits.training.examples.flatten(1), digits.held_out.examples.flatten(1)

    torch.manual_seed(0)
    model = Autoencoder()
    lagged = kdejsd.LaggedKDE(NUM_LAGGED, LATENT_DIM)
    if ranks > 1:
        lagged.shard()  # each process keeps and encodes its part of the lagged codes
    refresh = kdejsd.LaggedRefresh(lagged, model.encoder, images, every=10)
    trained = DistributedDataParallel(model) if ranks > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), 1e-3, betas=(0.5, 0.999))

    torch.manual_seed(rank)  # from here on each process draws its own batches and noise
    for _ in range(steps):
        refresh.step()  # every 10 steps: encodes the lagged examples anew
        index = torch.randint(len(images), (100 // ranks,))
        codes, decoded = trained(images[index])
        error = nn.functional.mse_loss(decoded, images[index])
        loss = error + lagged.loss(codes, index, noise=torch.randn_like(codes))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model.eval()
    with torch.no_grad():
        codes, decoded = model(held_out)
    error = nn.functional.mse_loss(decoded, held_out)
    of_codes, of_normal = (kdejsd.kde_entropy(z) for z in (codes, torch.randn_like(codes)))
    if rank == 0:
        print(f"held-out images: reconstruction error {error:.4f}")
        print(f"entropy of their whitened codes {of_codes:.2f} nats, of as many normal samples {of_normal:.2f}")


if __name__ == "__main__":
    if "RANK" in os.environ:  # started by torchrun
        torch.distributed.init_process_group("gloo")
        train(ranks=torch.distributed.get_world_size(), rank=torch.distributed.get_rank())
        torch.distributed.destroy_process_group()
    else:
        train()
