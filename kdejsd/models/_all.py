"""All public names of the models, which `kdejsd.models` has from here."""

from .aae import AAE
from .ae import AE
from .autoencoder import Autoencoder
from .base import GenerativeModel
from .flows import RealNVP
from .gan import GAN
from .gen import GEN
from .image_classifier import ImageClassifier
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
