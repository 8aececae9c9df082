"""Autoencoders with a shaped latent space, and GANs, as LightningModules; their networks are arguments.

`kdejsd.models.images` has each of them in a form that builds its networks for images of a given shape.
"""

from .aae import AAE
from .ae import AE
from .autoencoder import Autoencoder
from .base import GenerativeModel
from .classifier import ImageClassifier
from .flows import RealNVP
from .gan import GAN
from .gen import GEN
from .images import GEN as ImageGEN
from .images import ImageModel, for_images
from .lcvae import LCVAE
from .networks import FC, AutoencoderNetworks, Conv, DeepConv, HalfDeepConv
from .semi import SemiSupervisedGEN
from .stochastic import StochasticGEN
from .vae import VAE
from .wae import WAE

__all__ = [
    "AAE",
    "AE",
    "FC",
    "GAN",
    "GEN",
    "LCVAE",
    "VAE",
    "WAE",
    "Autoencoder",
    "AutoencoderNetworks",
    "Conv",
    "DeepConv",
    "GenerativeModel",
    "HalfDeepConv",
    "ImageClassifier",
    "ImageGEN",
    "ImageModel",
    "RealNVP",
    "SemiSupervisedGEN",
    "StochasticGEN",
    "for_images",
]
