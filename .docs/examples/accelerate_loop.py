"""Trains an autoencoder whose codes follow the standard normal, by Accelerate, on one or several processes.

python accelerate_loop.py
accelerate launch --num_processes 2 accelerate_loop.py
ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 accelerate_loop.py   # where there are no GPUs
"""

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import kdejsd
from kdejsd.data import Digits


def train(epochs=40):
    accelerator = Accelerator()
    digits = Digits()
    images, held_out = digits.training.examples.flatten(1), digits.held_out.examples.flatten(1)

    set_seed(0)
    encoder = nn.Sequential(*(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8)), nn.BatchNorm1d(8, affine=False))
    decoder = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64), nn.Sigmoid())
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], 1e-3, betas=(0.5, 0.999))
    examples = TensorDataset(images, torch.arange(len(images)))
    loader = DataLoader(examples, batch_size=100 // accelerator.num_processes, shuffle=True, drop_last=True)
    encoder, decoder, optimizer, loader = accelerator.prepare(encoder, decoder, optimizer, loader)

    lagged = kdejsd.LaggedKDE(1000, 8).to(accelerator.device)
    lagged.shard()  # of several processes each keeps and encodes its part of the lagged codes
    refresh = kdejsd.LaggedRefresh(lagged, encoder, examples, every=10)
    # save_state takes the number of its steps along; after load_state, refresh.refresh() encodes the lagged examples.
    accelerator.register_for_checkpointing(refresh)

    set_seed(0, device_specific=True)  # from here on each process draws its own noise
    for _ in range(epochs):
        for batch, index in loader:
            refresh.step()  # every 10 steps: encodes the lagged examples anew
            codes = encoder(batch)
            error = nn.functional.mse_loss(decoder(codes), batch)
            loss = error + lagged.loss(codes, index, noise=torch.randn_like(codes))
            optimizer.zero_grad()
            accelerator.backward(loss)
            optimizer.step()

    encoder, decoder = (accelerator.unwrap_model(network).eval() for network in (encoder, decoder))
    held_out = held_out.to(accelerator.device)
    with torch.no_grad():
        codes = encoder(held_out)
        error = nn.functional.mse_loss(decoder(codes), held_out)
    of_codes, of_normal = (kdejsd.kde_entropy(z) for z in (codes, torch.randn_like(codes)))
    accelerator.print(f"held-out images: reconstruction error {error:.4f}")
    accelerator.print(f"entropy of their whitened codes {of_codes:.2f} nats, of as many normal samples {of_normal:.2f}")


if __name__ == "__main__":
    train()
