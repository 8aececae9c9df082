"""Autoencoders with a shaped latent space, as LightningModules; encoder and decoder are arguments."""

from .gen import GEN, ImageGEN
from .networks import FC, AutoencoderNetworks, Conv

__all__ = ["FC", "GEN", "AutoencoderNetworks", "Conv", "ImageGEN"]
