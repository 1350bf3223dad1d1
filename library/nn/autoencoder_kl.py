"""The convolutional autoencoder of latent diffusion (Rombach et al. 2022, arXiv:2112.10752).

Residual convolutions that halve the resolution between levels, with one attention in the middle; the encoder gives
mean and log-variance of a Gaussian. Older ones have 4 latent channels, and a convolution between the Gaussian and
either half; SD3's has 16 and none. Parameter names are those of the published single file, without its prefix.

Shapes: B batch, H and W sides of the picture in pixels, h and w of the latents, Z latent channels, C features.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.nn.attention import sdpa

NORM_GROUPS = 32
NORM_EPS = 1e-6
MIN_LOG_VARIANCE, MAX_LOG_VARIANCE = -30.0, 20.0


@dataclass(frozen=True)
class AutoencoderKLConfig:
    """The sizes of an autoencoder.

    Attributes:
        pixel_channels: Channels of a picture.
        latent_channels: Z.
        level_widths: Features per level, from full resolution to latent resolution.
        blocks_per_level: Residual blocks per level of the encoder; the decoder has one more.
        quant_convolutions: Whether there are 1x1 convolutions between the Gaussian and either half.
    """

    pixel_channels: int
    latent_channels: int
    level_widths: tuple[int, ...]
    blocks_per_level: int
    quant_convolutions: bool

    @property
    def stride(self) -> int:
        """Pixels per latent position, on each side."""
        return 2 ** (len(self.level_widths) - 1)


def _published(latent_channels: int, *, quant_convolutions: bool) -> AutoencoderKLConfig:
    return AutoencoderKLConfig(
        pixel_channels=3,
        latent_channels=latent_channels,
        level_widths=(128, 256, 512, 512),
        blocks_per_level=2,
        quant_convolutions=quant_convolutions,
    )


SD_VAE = _published(4, quant_convolutions=True)
SD3_VAE = _published(16, quant_convolutions=False)


def group_norm(channels: int) -> nn.GroupNorm:
    """This makes the normalisation that all parts use."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = group_norm(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        inner = self.conv1(F.silu(self.norm1(x)))
        inner = self.conv2(F.silu(self.norm2(inner)))
        return inner + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttentionBlock(nn.Module):
    """Attention of one head over all positions."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm = group_norm(channels)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        normed = self.norm(x)
        q, k, v = (rearrange(layer(normed), "b c h w -> b 1 (h w) c") for layer in (self.q, self.k, self.v))
        attended = rearrange(sdpa(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        return x + self.proj_out(attended)


class Middle(nn.Module):
    """The part at latent resolution, the same in both halves."""

    def __init__(self, channels: int):
        super().__init__()
        self.block_1 = ResidualBlock(channels, channels)
        self.attn_1 = AttentionBlock(channels)
        self.block_2 = ResidualBlock(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    """Halves the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h / 2, w / 2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # on the right and below only, as the weights were trained


class Upsample(nn.Module):
    """Doubles the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2 h, 2 w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def residual_blocks(in_channels: int, out_channels: int, count: int) -> nn.ModuleList:
    """This makes the residual blocks of one level; the first changes the number of channels."""
    return nn.ModuleList(ResidualBlock(in_channels if i == 0 else out_channels, out_channels) for i in range(count))


class DownLevel(nn.Module):
    """One resolution of the encoder."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, *, downsample: bool):
        super().__init__()
        self.block = residual_blocks(in_channels, out_channels, blocks)
        self.downsample = Downsample(out_channels) if downsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w), or half of it where the level downsamples."""
        for block in self.block:
            x = block(x)
        return self.downsample(x)


class UpLevel(nn.Module):
    """One resolution of the decoder."""

    def __init__(self, in_channels: int, out_channels: int, blocks: int, *, upsample: bool):
        super().__init__()
        self.block = residual_blocks(in_channels, out_channels, blocks)
        self.upsample = Upsample(out_channels) if upsample else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w), or twice of it where the level upsamples."""
        for block in self.block:
            x = block(x)
        return self.upsample(x)


class Encoder(nn.Module):
    """From pictures to mean and log-variance, one after the other in the channels."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths = config.level_widths
        self.conv_in = nn.Conv2d(config.pixel_channels, widths[0], 3, padding=1)
        self.down = nn.ModuleList(
            DownLevel(widths[max(i - 1, 0)], width, config.blocks_per_level, downsample=i < len(widths) - 1)
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1])
        self.norm_out = group_norm(widths[-1])
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, 2 Z, h, w)."""
        x = self.conv_in(pixels)
        for level in self.down:
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(self.mid(x))))


class Decoder(nn.Module):
    """From latents to pictures. Level 0 is full resolution, so the levels run backwards."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        widths = config.level_widths
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(config.latent_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1])
        self.up = nn.ModuleList(
            UpLevel(widths[min(i + 1, last)], width, config.blocks_per_level + 1, upsample=i > 0)
            for i, width in enumerate(widths)
        )
        self.norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], config.pixel_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        """(B, Z, h, w) -> (B, 3, H, W)."""
        x = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            x = level(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class AutoencoderKL(nn.Module):
    """Pictures to latents and back. Latents here are raw: a family's ``LatentFormat`` normalises them."""

    def __init__(self, config: AutoencoderKLConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.quant_convolutions:
            self.quant_conv = nn.Conv2d(2 * config.latent_channels, 2 * config.latent_channels, 1)
            self.post_quant_conv = nn.Conv2d(config.latent_channels, config.latent_channels, 1)

    def encode(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """This gives the Gaussian over latents.

        Args:
            pixels: (B, 3, H, W) in -1..1.

        Returns:
            Mean and log-variance, (B, Z, h, w) each; the latter is limited, so that its exponential is finite.

        Raises:
            ValueError: A side of the picture isn't a multiple of the stride.
        """
        height, width = pixels.shape[2:]
        stride = self.config.stride
        if height % stride or width % stride:
            raise ValueError(f"pictures of {width}x{height} pixels don't divide by {stride}; resize or crop them")
        gaussian = self.encoder(pixels)
        if self.config.quant_convolutions:
            gaussian = self.quant_conv(gaussian)
        mean, log_variance = gaussian.chunk(2, dim=1)
        return mean, log_variance.clamp(MIN_LOG_VARIANCE, MAX_LOG_VARIANCE)

    def decode(self, z: Tensor) -> Tensor:
        """This gives the pictures (B, 3, H, W), about -1..1, of raw latents (B, Z, h, w)."""
        return self.decoder(self.post_quant_conv(z) if self.config.quant_convolutions else z)
