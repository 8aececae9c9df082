"""All public names of the models, for `kdejsd.models`, which lists them."""

from .aae import AAE as AAE
from .ae import AE as AE
from .autoencoder import Autoencoder as Autoencoder
from .base import GenerativeModel as GenerativeModel
from .built import BuiltModel as BuiltModel
from .built import with_built_networks as with_built_networks
from .flows import RealNVP as RealNVP
from .gan import GAN as GAN
from .gen import GEN as GEN
from .image_classifier import ImageClassifier as ImageClassifier
from .lcvae import LCVAE as LCVAE
from .networks import FC as FC
from .networks import AutoencoderNetworks as AutoencoderNetworks
from .networks import Conv as Conv
from .networks import DeepConv as DeepConv
from .networks import HalfDeepConv as HalfDeepConv
from .semi import SemiSupervisedGEN as SemiSupervisedGEN
from .stochastic import StochasticGEN as StochasticGEN
from .vae import VAE as VAE
from .wae import WAE as WAE
