"""The pieces of the U-Net: residual convolutions, transformers over the positions, changes of resolution.

Parameter names are those of the published LDM files. Every piece that stands in a stage takes the same three inputs, so
that a stage is a plain sequence.

Shapes:
    B batch, C features, h and w sides of the feature map, N = h w positions, T text tokens
    E width of the embedded timestep, K width of the text features, H heads
"""

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.nn.attention import AttentionFunction

NORM_GROUPS = 32
NORM_EPS = 1e-5
TRANSFORMER_NORM_EPS = 1e-6
FEED_FORWARD_RATIO = 4


class ResBlock(nn.Module):
    """Two convolutions beside a shortcut; the embedded timestep is added between them."""

    def __init__(self, in_channels: int, out_channels: int, embedding: int):
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, in_channels, eps=NORM_EPS),
            nn.SiLU(),
            nn.Conv2d(in_channels, out_channels, 3, padding=1),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, out_channels, eps=NORM_EPS),
            nn.SiLU(),
            nn.Identity(),  # dropout in the published code, at 0; it keeps the convolution's number
            nn.Conv2d(out_channels, out_channels, 3, padding=1),
        )
        if in_channels != out_channels:
            self.skip_connection = nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, embedded: Tensor, context: Tensor) -> Tensor:
        """(B, C_in, h, w), (B, E), text that it doesn't look at -> (B, C_out, h, w)."""
        inner = self.in_layers(x) + self.emb_layers(embedded)[:, :, None, None]
        shortcut = self.skip_connection(x) if hasattr(self, "skip_connection") else x
        return shortcut + self.out_layers(inner)


class Attention(nn.Module):
    """Attention of positions to positions, or to the text."""

    def __init__(self, width: int, context_width: int, num_heads: int, attention: AttentionFunction):
        super().__init__()
        self.num_heads, self.attention = num_heads, attention
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, N, C), (B, M, K) -> (B, N, C)."""
        q, k, v = (
            rearrange(tensor, "b n (h d) -> b h n d", h=self.num_heads)
            for tensor in (self.to_q(x), self.to_k(context), self.to_v(context))
        )
        return self.to_out(rearrange(self.attention(q, k, v), "b h n d -> b n (h d)"))


class GEGLU(nn.Module):
    """A linear layer whose second half gates the first (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, inner)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * F.gelu(gate)


class FeedForward(nn.Module):
    """Two layers with a gate between them."""

    def __init__(self, width: int):
        super().__init__()
        inner = FEED_FORWARD_RATIO * width
        self.net = nn.Sequential(GEGLU(width, inner), nn.Identity(), nn.Linear(inner, width))

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, N, C)."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the text, feed-forward."""

    def __init__(self, width: int, context_width: int, num_heads: int, attention: AttentionFunction):
        super().__init__()
        self.attn1 = Attention(width, width, num_heads, attention)
        self.ff = FeedForward(width)
        self.attn2 = Attention(width, context_width, num_heads, attention)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(width), nn.LayerNorm(width), nn.LayerNorm(width)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """(B, N, C), (B, T, K) -> (B, N, C)."""
        normed = self.norm1(x)
        x = x + self.attn1(normed, normed)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """A transformer over the positions of a feature map, beside a shortcut."""

    def __init__(
        self,
        channels: int,
        context_width: int,
        num_heads: int,
        *,
        linear_projections: bool,
        attention: AttentionFunction,
    ):
        super().__init__()
        self.linear_projections = linear_projections
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=TRANSFORMER_NORM_EPS)
        self.proj_in = _projection(channels, linear=linear_projections)
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, context_width, num_heads, attention)])
        self.proj_out = _projection(channels, linear=linear_projections)

    def forward(self, x: Tensor, embedded: Tensor, context: Tensor) -> Tensor:
        """(B, C, h, w), a timestep that it doesn't look at, (B, T, K) -> (B, C, h, w)."""
        inner, height = self.norm(x), x.shape[2]
        inner = self.proj_in(_positions(inner)) if self.linear_projections else _positions(self.proj_in(inner))
        for block in self.transformer_blocks:
            inner = block(inner, context)
        if self.linear_projections:
            return x + _feature_map(self.proj_out(inner), height)
        return x + self.proj_out(_feature_map(inner, height))


def _projection(channels: int, *, linear: bool) -> nn.Linear | nn.Conv2d:
    return nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)


def _positions(x: Tensor) -> Tensor:
    return rearrange(x, "b c h w -> b (h w) c")


def _feature_map(x: Tensor, height: int) -> Tensor:
    return rearrange(x, "b (h w) c -> b c h w", h=height)


class Downsample(nn.Module):
    """Halves the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor, embedded: Tensor, context: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, h / 2, w / 2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Doubles the resolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor, embedded: Tensor, context: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, 2 h, 2 w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
