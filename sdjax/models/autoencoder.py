"""The autoencoders of latent diffusion (LDM, section 3.1): images to latents and back.

`Autoencoder` is regularised by a KL term: its latents are Gaussians. `VQAutoencoder`'s are rounded to a codebook by its
decoder; between the two a diffusion model works on latents that are not rounded (CompVis/latent-diffusion,
ldm/models/autoencoder.py VQModelInterface).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PRNGKeyArray

from sdjax.models.attention import SelfAttention
from sdjax.models.layers import Conv, Downsample, GroupNorm, ResBlock, Upsample

EPS = 1e-6
BETA = 0.25


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of an autoencoder; each level but the last halves height and width.

    Attributes:
        attention_levels: levels, 0 the finest, whose every block is followed by self-attention.
        mid_attention: whether the middle has self-attention; all published autoencoders but one do.
        scaling_factor: what makes latents of unit variance; 1 where they are diffused as they are.
    """

    channels: tuple[int, ...] = (128, 256, 512, 512)
    latent_channels: int = 4
    layers_per_block: int = 2
    groups: int = 32
    scaling_factor: float = 0.18215
    attention_levels: tuple[int, ...] = ()
    mid_attention: bool = True

    @property
    def blocks(self) -> int:
        """Residual blocks, each of which has parameters of its own."""
        return (2 * self.layers_per_block + 1) * len(self.channels) + 4

    @property
    def factor(self) -> int:
        """Downsampling factor: pixels along each side of a latent."""
        return 2 ** (len(self.channels) - 1)


def has_same_scale(one: float, other: float) -> bool:
    """Tell whether latents of two scaling factors may be of one family: those of Stable Diffusion 1 and XL are not.

    Scales that were measured on other images differ in the third digit.
    """
    return math.isclose(one, other, rel_tol=0.05)


@dataclass(frozen=True)
class VQConfig(AutoencoderConfig):
    """Sizes of an autoencoder with a codebook.

    Attributes:
        codes: vectors in the codebook.
    """

    scaling_factor: float = 1.0
    codes: int = 8192


# f, the number in their names, is how many pixels a latent stands for along each side (LDM, table 8 and configs/).
VARIANTS = {
    "sd": AutoencoderConfig(),  # 83,653,863 parameters; SD 1 and SD 2
    "sdxl": AutoencoderConfig(scaling_factor=0.13025),
    "x4_upscaler": AutoencoderConfig(channels=(128, 256, 512), scaling_factor=0.08333),  # 55,325,927
    "kl_f2": AutoencoderConfig(channels=(128, 256), latent_channels=2, scaling_factor=1.0),
    "kl_f4": AutoencoderConfig(channels=(128, 256, 512), latent_channels=3, scaling_factor=1.0),  # 55,312,063
    "kl_f8": AutoencoderConfig(scaling_factor=1.0),  # 83,653,863
    "kl_f16": AutoencoderConfig(  # 69,610,963
        channels=(128, 128, 256, 256, 512), latent_channels=16, scaling_factor=1.0, attention_levels=(4,)
    ),
    "kl_f32": AutoencoderConfig(  # 103,880,131
        channels=(128, 128, 256, 256, 512, 512), latent_channels=64, scaling_factor=1.0, attention_levels=(4, 5)
    ),
    "vq_f2": VQConfig(channels=(128, 256), latent_channels=2, codes=2048),
    "vq_f4": VQConfig(channels=(128, 256, 512), latent_channels=3),  # 55,322,782
    "vq_f4_noattn": VQConfig(channels=(128, 256, 512), latent_channels=3, mid_attention=False),  # 53,219,486
    "vq_f8": VQConfig(channels=(128, 256, 256, 512), attention_levels=(3,), codes=16384),  # 67,717,295
    "vq_f8_n256": VQConfig(channels=(128, 256, 256, 512), attention_levels=(3,), codes=256),  # 67,652,783
    "vq_f16": VQConfig(  # 69,593,371
        channels=(128, 128, 256, 256, 512), latent_channels=8, attention_levels=(4,), codes=16384
    ),
}


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents."""

    mean: Float[Array, "b h w z"]
    logvar: Float[Array, "b h w z"]

    @property
    def std(self) -> Float[Array, "b h w z"]:
        """Standard deviation."""
        return jnp.exp(0.5 * self.logvar)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "b h w z"]:
        """One draw; with the key of a batch all images draw together."""
        noise = jax.random.normal(key, self.mean.shape, self.mean.dtype)
        return self.mean + self.std * noise

    def kl(self) -> Float[Array, " b"]:
        """KL to a standard normal in nats, summed over an image (LDM, appendix G)."""
        terms = jnp.square(self.mean) + jnp.exp(self.logvar) - 1.0 - self.logvar
        return 0.5 * terms.sum(axis=(1, 2, 3))


def posterior(moments: Float[Array, "b h w 2*z"]) -> Posterior:
    """Splits the encoder's output into mean and log-variance, the latter clamped to [-30, 20]."""
    mean, logvar = jnp.split(moments.astype(jnp.float32), 2, axis=-1)
    return Posterior(mean, jnp.clip(logvar, -30.0, 20.0))


class Point(NamedTuple):
    """A latent that is known: what a `Posterior` without variance would be."""

    mean: Float[Array, "b h w z"]

    @property
    def std(self) -> Float[Array, "b h w z"]:
        """Zeros."""
        return jnp.zeros_like(self.mean)

    def sample(self, key: PRNGKeyArray) -> Float[Array, "b h w z"]:
        """The latent itself."""
        return self.mean


class MidBlock(nn.Module):
    """Residual block, attention where there is one, residual block at the lowest resolution."""

    groups: int
    attends: bool = True
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b h w c"]) -> Float[Array, "b h w c"]:
        def res(name: str, x: Array) -> Array:
            return ResBlock(x.shape[-1], self.groups, EPS, dtype=self.dtype, name=name)(x)

        x = res("resnets_0", x)
        x = SelfAttention(1, self.groups, EPS, self.dtype, name="attentions_0")(x) if self.attends else x
        return res("resnets_1", x)


class Encoder(nn.Module):
    """Images to what says their latents.

    Attributes:
        config: the sizes.
        features: of what comes out: twice the latent's for the moments of a Gaussian.
        dtype: the type of the arithmetic.
    """

    config: AutoencoderConfig
    features: int
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, x: Float[Array, "b H W 3"]) -> Float[Array, "b h w f"]:
        c, dtype = self.config, self.dtype
        x = Conv(c.channels[0], dtype=dtype, name="conv_in")(x)
        for i, features in enumerate(c.channels):
            for j in range(c.layers_per_block):
                x = ResBlock(features, c.groups, EPS, dtype=dtype, name=f"down_blocks_{i}_resnets_{j}")(x)
                if i in c.attention_levels:
                    x = SelfAttention(1, c.groups, EPS, dtype, name=f"down_blocks_{i}_attentions_{j}")(x)
            if i < len(c.channels) - 1:
                x = Downsample("SAME", dtype, name=f"down_blocks_{i}_downsamplers_0")(x)
        x = MidBlock(c.groups, c.mid_attention, dtype, name="mid_block")(x)
        x = nn.silu(GroupNorm(c.groups, EPS, dtype, name="conv_norm_out")(x))
        return Conv(self.features, dtype=dtype, name="conv_out")(x)


class Decoder(nn.Module):
    """Latents to images.

    What the last convolution is given is sown as "last/features": the adversarial loss is weighed by gradients there.
    """

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    @nn.compact
    def __call__(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
        c, dtype = self.config, self.dtype
        x = Conv(c.channels[-1], dtype=dtype, name="conv_in")(z)
        x = MidBlock(c.groups, c.mid_attention, dtype, name="mid_block")(x)
        for i, features in enumerate(reversed(c.channels)):
            for j in range(c.layers_per_block + 1):
                x = ResBlock(features, c.groups, EPS, dtype=dtype, name=f"up_blocks_{i}_resnets_{j}")(x)
                if len(c.channels) - 1 - i in c.attention_levels:
                    x = SelfAttention(1, c.groups, EPS, dtype, name=f"up_blocks_{i}_attentions_{j}")(x)
            if i < len(c.channels) - 1:
                x = Upsample(dtype, name=f"up_blocks_{i}_upsamplers_0")(x)
        x = nn.silu(GroupNorm(c.groups, EPS, dtype, name="conv_norm_out")(x))
        self.sow("last", "features", x)
        return Conv(3, dtype=dtype, name="conv_out")(x)


class Autoencoder(nn.Module):
    """The KL autoencoder: encoder, decoder and the 1x1 convolutions between them and the latents.

    Latents here are unscaled: multiplying by `config.scaling_factor` is the business of who diffuses them.
    """

    config: AutoencoderConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        self.encoder = Encoder(self.config, 2 * self.config.latent_channels, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant_conv = Conv(2 * self.config.latent_channels, kernel=1, dtype=self.dtype)
        self.post_quant_conv = Conv(self.config.latent_channels, kernel=1, dtype=self.dtype)

    def encode(self, x: Float[Array, "b H W 3"]) -> Posterior:
        """The posterior over latents of images in [-1, 1]; sides must be multiples of `config.factor`."""
        return posterior(self.quant_conv(self.encoder(x)))

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
        """Images, nominally in [-1, 1], of unscaled latents."""
        return self.decoder(self.post_quant_conv(z))

    def __call__(self, x: Float[Array, "b H W 3"], key: PRNGKeyArray) -> tuple[Float[Array, "b H W 3"], Posterior]:
        """A reconstruction through one sampled latent, and the posterior: what training needs."""
        latent = self.encode(x)
        return self.decode(latent.sample(key)), latent


class Quantized(NamedTuple):
    """Rounded latents.

    Attributes:
        z: vectors of the codebook; their gradient goes to the latents as if nothing had been rounded.
        codes: which vectors, [0, codes).
        loss: mean squared distance, whose gradient draws latents to their vectors and, `BETA` times as strongly,
            vectors to their latents. (The published models were trained so; their code's "legacy" form puts the weight
            on the codebook's term, not on the commitment.)
    """

    z: Float[Array, "b h w z"]
    codes: Int[Array, "b h w"]
    loss: Float[Array, ""]


class VectorQuantizer(nn.Module):
    """A learned codebook (van den Oord et al. 2017; taming-transformers).

    Attributes:
        codes: how many vectors it has.
        width: of each.
    """

    codes: int
    width: int

    def setup(self) -> None:
        def uniform(key: Array, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
            return jax.random.uniform(key, shape, dtype, -1.0 / self.codes, 1.0 / self.codes)

        self.embedding = nn.Embed(self.codes, self.width, embedding_init=uniform)

    def __call__(self, z: Float[Array, "b h w z"]) -> Quantized:
        """The nearest vectors in Euclidean distance, the first of equals."""
        z = z.astype(jnp.float32)
        vectors = self.embedding.embedding
        # |z|^2 is the same for all vectors, and so does not matter for the nearest.
        distances = jnp.square(vectors).sum(-1) - 2.0 * jnp.einsum("...z,nz->...n", z, vectors)
        codes = jnp.argmin(distances, axis=-1)
        nearest = self.embedding(codes)
        fixed, moved = jax.lax.stop_gradient((nearest, z))
        loss = jnp.square(fixed - z).mean() + BETA * jnp.square(nearest - moved).mean()
        return Quantized(z + jax.lax.stop_gradient(nearest - z), codes, loss)


class VQAutoencoder(nn.Module):
    """The autoencoder whose latents are rounded to the nearest vectors of a codebook when they are decoded."""

    config: VQConfig
    dtype: DTypeLike = jnp.float32

    def setup(self) -> None:
        width = self.config.latent_channels
        self.encoder = Encoder(self.config, width, self.dtype)
        self.decoder = Decoder(self.config, self.dtype)
        self.quant_conv = Conv(width, kernel=1, dtype=self.dtype)
        self.post_quant_conv = Conv(width, kernel=1, dtype=self.dtype)
        self.quantize = VectorQuantizer(self.config.codes, width)

    def encode(self, x: Float[Array, "b H W 3"]) -> Point:
        """Latents of images in [-1, 1], before rounding; sides must be multiples of `config.factor`."""
        return Point(self.quant_conv(self.encoder(x)).astype(jnp.float32))

    def decode(self, z: Float[Array, "b h w z"]) -> Float[Array, "b H W 3"]:
        """Images, nominally in [-1, 1], of latents that need not be in the codebook."""
        return self._decode(self.round(z).z)

    def round(self, z: Float[Array, "b h w z"]) -> Quantized:
        """Latents rounded to the codebook."""
        return self.quantize(z)

    def _decode(self, z: Array) -> Array:
        return self.decoder(self.post_quant_conv(z))

    def __call__(self, x: Float[Array, "b H W 3"], key: PRNGKeyArray) -> tuple[Float[Array, "b H W 3"], Quantized]:
        """A reconstruction, and what rounding did: what training needs. The key is not used."""
        quantized = self.round(self.encode(x).sample(key))
        return self._decode(quantized.z), quantized


AnyAutoencoder: TypeAlias = Autoencoder | VQAutoencoder


def autoencoder_of(config: AutoencoderConfig, dtype: DTypeLike = jnp.float32) -> AnyAutoencoder:
    """The module of these sizes."""
    return VQAutoencoder(config, dtype) if isinstance(config, VQConfig) else Autoencoder(config, dtype)
