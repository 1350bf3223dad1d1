"""DC-AE, the deep-compression autoencoder of Sana (Chen et al. 2024, arXiv:2410.10733).

It compresses 32 times on each side. Unusual: no posterior, the encoder is deterministic; every change of resolution has
a shortcut without weights that moves pixels into channels and back; the deep stages mix linear attention at two scales
with convolutions. Parameter names are those of the original files.

Shapes:
    B batch, H and W sides of the picture, h and w sides at a stage, C width of a stage
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

NORM_EPS = 1e-5
ATTENTION_EPS = 1e-15
_HEAD_DIM = 32
_SCALE_KERNEL = 5
_EXPANSION = 4


@dataclass(frozen=True)
class DCAEConfig:
    """The sizes of a DC-AE; stages are listed from full resolution down.

    Attributes:
        widths: C per stage.
        encoder_depths: Blocks per stage of the encoder.
        decoder_depths: Blocks per stage of the decoder.
        attention_from: The first stage whose blocks have attention.
        latent_channels: Channels of the latents.
    """

    widths: tuple[int, ...]
    encoder_depths: tuple[int, ...]
    decoder_depths: tuple[int, ...]
    attention_from: int
    latent_channels: int

    @property
    def stride(self) -> int:
        """Pixels per latent position, on each side."""
        return 2 ** (len(self.widths) - 1)


F32C32_SANA = DCAEConfig(
    widths=(128, 256, 512, 512, 1024, 1024),
    encoder_depths=(2, 2, 2, 3, 3, 3),
    decoder_depths=(3, 3, 3, 3, 3, 3),
    attention_from=3,
    latent_channels=32,
)


class ChannelNorm(nn.Module):
    """Root-mean-square normalisation over the channels of each pixel, with gain and bias."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w); statistics in fp32."""
        pixels = x.movedim(1, -1)
        normed = F.rms_norm(pixels.float(), self.weight.shape, eps=NORM_EPS).to(x.dtype)
        return (normed * self.weight + self.bias).movedim(-1, 1)


class Layer(nn.Module):
    """A convolution with what follows it, under the names that the files have."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        groups: int = 1,
        bias: bool = True,
        norm: bool = False,
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=bias
        )
        if norm:
            self.norm = ChannelNorm(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h', w')."""
        x = self.conv(x)
        return self.norm(x) if hasattr(self, "norm") else x


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, channels: int):
        super().__init__()
        self.main = nn.ModuleDict(
            {"conv1": Layer(channels, channels, 3), "conv2": Layer(channels, channels, 3, bias=False, norm=True)}
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return x + self.main["conv2"](F.silu(self.main["conv1"](x)))


class MultiScaleAttention(nn.Module):
    """Linear attention among pixels and, as more heads, among their neighbourhoods.

    Queries, keys and values are interleaved: of each 96 channels the first 32 are a head's queries, the next its keys.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.qkv = Layer(channels, 3 * channels, 1, bias=False)
        grouped = nn.Sequential(
            nn.Conv2d(
                3 * channels,
                3 * channels,
                _SCALE_KERNEL,
                padding=_SCALE_KERNEL // 2,
                groups=3 * channels,
                bias=False,
            ),
            nn.Conv2d(3 * channels, 3 * channels, 1, groups=3 * channels // _HEAD_DIM, bias=False),
        )
        self.aggreg = nn.ModuleList([grouped])
        self.proj = Layer(2 * channels, channels, 1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        height, width = x.shape[2:]
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, *(scale(qkv) for scale in self.aggreg)], dim=1)  # (B, 6C, h, w)
        heads = rearrange(qkv, "b (g c) h w -> b g c (h w)", c=3 * _HEAD_DIM)
        q, k, v = heads.chunk(3, dim=2)  # (B, 6C / 96, 32, h w)
        q, k = F.relu(q), F.relu(k)
        attended = _linear(q, k, v) if height * width > _HEAD_DIM else _quadratic(q, k, v)
        return self.proj(rearrange(attended, "b g c (h w) -> b (g c) h w", h=height))


def _linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by sums over the pixels, in fp32 also under autocast: q, k, v (B, G, K, N) -> (B, G, K, N)."""
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = q.float(), k.float(), v.float()
        weighted = (values @ keys.transpose(-1, -2)) @ queries  # (B, G, K, N)
        total = keys.sum(dim=-1).unsqueeze(-2) @ queries  # (B, G, 1, N)
        return (weighted / (total + ATTENTION_EPS)).to(q.dtype)


def _quadratic(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same by pairs of pixels, which is cheaper for a few pixels."""
    scores = k.transpose(-1, -2) @ q  # (B, G, N keys, N queries)
    scores = scores.float()
    weights = scores / (scores.sum(dim=-2, keepdim=True) + ATTENTION_EPS)
    return v @ weights.to(v.dtype)


class GatedConvolution(nn.Module):
    """An inverted bottleneck with a gate."""

    def __init__(self, channels: int):
        super().__init__()
        inner = _EXPANSION * channels
        self.inverted_conv = Layer(channels, 2 * inner, 1)
        self.depth_conv = Layer(2 * inner, 2 * inner, 3, groups=2 * inner)
        self.point_conv = Layer(inner, channels, 1, bias=False, norm=True)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        value, gate = self.depth_conv(F.silu(self.inverted_conv(x))).chunk(2, dim=1)
        return self.point_conv(value * F.silu(gate))


class Residual(nn.Module):
    """A module beside a shortcut, under the name ``main``."""

    def __init__(self, main: nn.Module):
        super().__init__()
        self.main = main

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return x + self.main(x)


class EfficientViTBlock(nn.Module):
    """Attention, then the gated convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.context_module = Residual(MultiScaleAttention(channels))
        self.local_module = Residual(GatedConvolution(channels))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h, w)."""
        return self.local_module(self.context_module(x))


class Downsample(nn.Module):
    """Half the resolution; the shortcut moves 2x2 pixels into channels and averages groups of them."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.out_channels = out_channels
        self.main = Layer(in_channels, out_channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h / 2, w / 2)."""
        return self.main(x) + channel_mean(F.pixel_unshuffle(x, 2), self.out_channels)


class Upsample(nn.Module):
    """Twice the resolution; the shortcut repeats channels and moves them into 2x2 pixels."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.repeats = 4 * out_channels // in_channels
        self.main = nn.ModuleDict({"conv": Layer(in_channels, out_channels, 3)})

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', 2 h, 2 w)."""
        enlarged = self.main["conv"](F.interpolate(x, scale_factor=2, mode="nearest"))
        return enlarged + F.pixel_shuffle(x.repeat_interleave(self.repeats, dim=1), 2)


def channel_mean(x: Tensor, channels: int) -> Tensor:
    """This averages consecutive groups of channels: (B, n C', h, w) -> (B, C', h, w)."""
    return rearrange(x, "b (c n) h w -> b c n h w", c=channels).mean(dim=2)


class Stage(nn.Module):
    """The blocks of one resolution, under the name ``op_list``."""

    def __init__(self, blocks: Sequence[nn.Module]):
        super().__init__()
        self.op_list = nn.ModuleList(blocks)

    def forward(self, x: Tensor) -> Tensor:
        """One block after another."""
        for block in self.op_list:
            x = block(x)
        return x


def _blocks(config: DCAEConfig, stage: int, depth: int) -> list[nn.Module]:
    kind = EfficientViTBlock if stage >= config.attention_from else ResBlock
    return [kind(config.widths[stage]) for _ in range(depth)]


class Encoder(nn.Module):
    """From pictures to latents."""

    def __init__(self, config: DCAEConfig):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.latent_channels = config.latent_channels
        self.project_in = Layer(3, widths[0], 3)
        self.stages = nn.ModuleList(
            Stage(
                _blocks(config, stage, depth) + ([Downsample(widths[stage], widths[stage + 1])] if stage < last else [])
            )
            for stage, depth in enumerate(config.encoder_depths)
        )
        self.project_out = nn.ModuleList([Layer(widths[-1], config.latent_channels, 3)])

    def forward(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in -1..1 -> (B, latent channels, h, w)."""
        x = self.project_in(pixels)
        for stage in self.stages:
            x = stage(x)
        return self.project_out[0](x) + channel_mean(x, self.latent_channels)


class Decoder(nn.Module):
    """From latents to pictures. Stages are numbered from full resolution down and run the other way."""

    def __init__(self, config: DCAEConfig):
        super().__init__()
        widths, last = config.widths, len(config.widths) - 1
        self.repeats = widths[-1] // config.latent_channels
        self.project_in = Layer(config.latent_channels, widths[-1], 3)
        self.stages = nn.ModuleList(
            Stage(
                ([Upsample(widths[stage + 1], widths[stage])] if stage < last else []) + _blocks(config, stage, depth)
            )
            for stage, depth in enumerate(config.decoder_depths)
        )
        self.project_out = nn.Sequential(ChannelNorm(widths[0]), nn.ReLU(), Layer(widths[0], 3, 3))

    def forward(self, z: Tensor) -> Tensor:
        """(B, latent channels, h, w) -> (B, 3, H, W), about -1..1."""
        x = self.project_in(z) + z.repeat_interleave(self.repeats, dim=1)
        for stage in reversed(self.stages):
            x = stage(x)
        return self.project_out(x)


class DCAE(nn.Module):
    """The autoencoder."""

    def __init__(self, config: DCAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def encode(self, pixels: Tensor) -> Tensor:
        """Raw latents (B, latent channels, h, w) of pictures (B, 3, H, W) in -1..1."""
        return self.encoder(pixels)

    def decode(self, z: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about -1..1, of raw latents (B, latent channels, h, w)."""
        return self.decoder(z)
