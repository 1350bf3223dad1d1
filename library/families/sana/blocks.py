"""The pieces and the block of Sana's denoiser, see ``linear_dit.py``.

Shapes: B batch, N image tokens, T text tokens, D width, H heads, K head_dim, E inner channels of the feed-forward.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.nn.attention import AttentionFunction
from library.nn.modulated_norm import gated_residual, modulated_norm

NORM_EPS = 1e-6
QK_NORM_EPS = 1e-5
LINEAR_ATTENTION_EPS = 1e-15
FP16_LARGEST = 65504.0


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """This is attention with ReLU in place of softmax (Katharopoulos et al. 2020, arXiv:2006.16236, eq. 5).

    Its cost grows with the number of tokens, not with its square: keys and values are summed into a matrix first. The
    sums run in fp32 even under autocast. There a half-precision product of them loses digits, and in fp16 the epsilon
    below becomes zero, so that a head whose queries are all negative divides zero by zero.

    Args:
        q: Queries (B, H, N, K).
        k: Keys (B, H, N, K).
        v: Values (B, H, N, K).

    Returns:
        (B, H, N, K), in the type of ``q``.
    """
    with torch.autocast(q.device.type, enabled=False):
        queries, keys, values = F.relu(q).float(), F.relu(k).float(), v.float()
        weighted = queries @ (keys.transpose(-1, -2) @ values)  # (B, H, N, K)
        total = queries @ keys.sum(dim=2).unsqueeze(-1)  # (B, H, N, 1)
        return (weighted / (total + LINEAR_ATTENTION_EPS)).to(q.dtype)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last dimension, with a gain."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D); computed in fp32, in the type of ``x``."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class LinearAttention(nn.Module):
    """Self-attention of the image tokens at linear cost."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.q_norm = RMSNorm(width, QK_NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, QK_NORM_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k = self.q_norm(q), self.k_norm(k)  # over all heads together
        q, k, v = (rearrange(part, "b n (h k) -> b h n k", h=self.num_heads) for part in (q, k, v))
        x = self.proj(rearrange(linear_attention(q, k, v), "b h n k -> b n (h k)"))
        return x.clamp(-FP16_LARGEST, FP16_LARGEST) if x.dtype == torch.float16 else x


class CrossAttention(nn.Module):
    """Attention of the image tokens to the text tokens."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, attention: AttentionFunction):
        super().__init__()
        self.num_heads = num_heads
        self.attention = attention
        self.q_linear = nn.Linear(width, width)
        self.kv_linear = nn.Linear(width, 2 * width)
        self.q_norm = RMSNorm(width, QK_NORM_EPS) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(width, QK_NORM_EPS) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor, mask: Tensor | None) -> Tensor:
        """This lets images look at text.

        Args:
            x: (B, N, D).
            context: (B, T, D).
            mask: Which text tokens count (B, T), bool; None: all.

        Returns:
            (B, N, D).
        """
        k, v = self.kv_linear(context).chunk(2, dim=-1)
        q, k = self.q_norm(self.q_linear(x)), self.k_norm(k)
        q, k, v = (rearrange(part, "b n (h k) -> b h n k", h=self.num_heads) for part in (q, k, v))
        attended = self.attention(q, k, v, None if mask is None else mask[:, None, None, :])
        return self.proj(rearrange(attended, "b h n k -> b n (h k)"))


class Convolution(nn.Module):
    """A convolution under the name ``conv``, as the published files have it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, groups: int = 1, bias: bool = True):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels, out_channels, kernel_size, padding=kernel_size // 2, groups=groups, bias=bias
        )

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C', h, w)."""
        return self.conv(x)


class GLUMBConv(nn.Module):
    """The feed-forward: an inverted bottleneck with a gate, whose 3x3 convolution is the only sense of position."""

    def __init__(self, width: int, inner: int):
        super().__init__()
        self.inverted_conv = Convolution(width, 2 * inner, 1)
        self.depth_conv = Convolution(2 * inner, 2 * inner, 3, groups=2 * inner)
        self.point_conv = Convolution(inner, width, 1, bias=False)

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """(B, N, D) -> (B, N, D), where the tokens are ``rows`` times ``columns``, row by row."""
        x = rearrange(x, "b (h w) d -> b d h w", h=rows, w=columns)
        if torch.compiler.is_compiling():  # inductor can't order the strides of a view whose sides are variables
            x = x.contiguous()
        x = self.depth_conv(F.silu(self.inverted_conv(x)))  # (B, 2E, h, w)
        value, gate = x.chunk(2, dim=1)
        return rearrange(self.point_conv(value * F.silu(gate)), "b d h w -> b (h w) d")


class SanaBlock(nn.Module):
    """One block: linear self-attention, cross-attention, convolutional feed-forward."""

    def __init__(
        self,
        width: int,
        *,
        num_heads: int,
        num_cross_heads: int,
        inner: int,
        qk_norm: bool,
        attention: AttentionFunction,
    ):
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.randn(6, width) / math.sqrt(width))
        self.attn = LinearAttention(width, num_heads, qk_norm=qk_norm)
        self.cross_attn = CrossAttention(width, num_cross_heads, qk_norm=qk_norm, attention=attention)
        self.mlp = GLUMBConv(width, inner)

    def forward(
        self, x: Tensor, context: Tensor, mask: Tensor | None, modulation: Tensor, rows: int, columns: int
    ) -> Tensor:
        """This moves the image tokens one block on.

        Args:
            x: Image tokens (B, N, D).
            context: Text tokens (B, T, D).
            mask: Which text tokens count (B, T), bool; None: all.
            modulation: Six vectors per sample (B, 6, D), of the noise level alone; the block adds its own table.
            rows: Of the tokens.
            columns: Of the tokens.

        Returns:
            (B, N, D).
        """
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (self.scale_shift_table + modulation).chunk(6, dim=1)
        x = gated_residual(x, gate, self.attn(modulated_norm(x, shift, scale, NORM_EPS)))
        x = x + self.cross_attn(x, context, mask)
        normed = modulated_norm(x, mlp_shift, mlp_scale, NORM_EPS)
        return gated_residual(x, mlp_gate, self.mlp(normed, rows, columns))


class FinalLayer(nn.Module):
    """From tokens to the values of their patches."""

    def __init__(self, width: int, values: int):
        super().__init__()
        self.linear = nn.Linear(width, values)
        self.scale_shift_table = nn.Parameter(torch.randn(2, width) / math.sqrt(width))

    def forward(self, x: Tensor, embedded: Tensor) -> Tensor:
        """(B, N, D) and the embedded noise level (B, D) -> (B, N, values)."""
        shift, scale = (self.scale_shift_table + embedded[:, None]).chunk(2, dim=1)
        return self.linear(modulated_norm(x, shift, scale, NORM_EPS))
