"""The pieces and the block of the MMDiT, see ``mmdit.py``.

Shapes: B batch, N image tokens, T text tokens, D width, H heads, K head_dim.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.nn.attention import AttentionFunction
from library.nn.modulated_norm import gated_residual, modulated_norm, modulated_norms

MLP_RATIO = 4
NORM_EPS = 1e-6


def modulation_layer(width: int, chunks: int) -> nn.Sequential:
    """This makes the layers that turn the conditioning into ``chunks`` vectors per sample; (B, D) is all they see."""
    return nn.Sequential(nn.SiLU(), nn.Linear(width, chunks * width))


def modulation_vectors(layers: nn.Sequential, c: Tensor) -> tuple[Tensor, ...]:
    """This runs a modulation layer on the conditioning (B, D) and cuts its answer: vectors (B, 1, D)."""
    return layers(c).unsqueeze(1).split(c.shape[-1], dim=-1)


class HeadNorm(nn.Module):
    """Root-mean-square normalisation of each head's queries or keys."""

    def __init__(self, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(head_dim))

    def forward(self, heads: Tensor) -> Tensor:
        """(B, H, N, K) -> (B, H, N, K)."""
        # Under autocast the weight is in fp32, and on some devices the result too: torch's fused kernel wants one
        # dtype, and attention wants queries and keys in that of the values.
        return F.rms_norm(heads, self.weight.shape, self.weight.to(heads.dtype), NORM_EPS).to(heads.dtype)


class Mlp(nn.Module):
    """The feed-forward half of a stream."""

    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, MLP_RATIO * width)
        self.fc2 = nn.Linear(MLP_RATIO * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class AttentionLayers(nn.Module):
    """The layers around attention for one stream; attention itself happens where the streams meet."""

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, project: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width)
        self.ln_q = HeadNorm(width // num_heads) if qk_norm else nn.Identity()
        self.ln_k = HeadNorm(width // num_heads) if qk_norm else nn.Identity()
        if project:
            self.proj = nn.Linear(width, width)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(B, N, D) -> q, k, v, each (B, H, N, K)."""
        q, k, v = rearrange(self.qkv(x), "b n (three h k) -> three b h n k", three=3, h=self.num_heads)
        return self.ln_q(q), self.ln_k(k), v


class Stream(nn.Module):
    """The layers of one stream, image or text, in one block.

    Args:
        width: D.
        num_heads: H.
        qk_norm: Whether queries and keys are normalised per head.
        dual: Whether there is a second attention, among this stream's own tokens (images only).
        pre_only: Whether the stream is only looked at and ends here (the text in the last block).
    """

    def __init__(self, width: int, num_heads: int, *, qk_norm: bool, dual: bool = False, pre_only: bool = False):
        super().__init__()
        self.attn = AttentionLayers(width, num_heads, qk_norm=qk_norm, project=not pre_only)
        if dual:
            self.attn2 = AttentionLayers(width, num_heads, qk_norm=qk_norm, project=True)
        if not pre_only:
            self.mlp = Mlp(width)
        self.adaLN_modulation = modulation_layer(width, 2 if pre_only else 9 if dual else 6)

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        """(B, D) -> shift, scale[, gate, mlp_shift, mlp_scale, mlp_gate[, shift2, scale2, gate2]], each (B, 1, D)."""
        return modulation_vectors(self.adaLN_modulation, c)


class JointBlock(nn.Module):
    """One block: image and text have weights of their own and meet in one attention."""

    def __init__(
        self, width: int, num_heads: int, *, qk_norm: bool, dual: bool, pre_only: bool, attention: AttentionFunction
    ):
        super().__init__()
        self.attention = attention
        self.context_block = Stream(width, num_heads, qk_norm=qk_norm, pre_only=pre_only)
        self.x_block = Stream(width, num_heads, qk_norm=qk_norm, dual=dual)

    def forward(self, context: Tensor, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """This lets both streams attend to each other, then each think for itself.

        Args:
            context: Text tokens (B, T, D).
            x: Image tokens (B, N, D).
            c: Conditioning by noise level and pooled text (B, D).

        Returns:
            Both streams, context first. The last block leaves ``context`` as it was.
        """
        context_shift, context_scale, *context_rest = self.context_block.modulation(c)
        x_shift, x_scale, x_gate, x_mlp_shift, x_mlp_scale, x_mlp_gate, *x_dual = self.x_block.modulation(c)

        context_normed = modulated_norm(context, context_shift, context_scale, NORM_EPS)
        x_pairs = [(x_shift, x_scale)]
        if x_dual:
            shift2, scale2, gate2 = x_dual
            x_pairs.append((shift2, scale2))
        x_normed, *x_also_normed = modulated_norms(x, x_pairs, NORM_EPS)
        context_heads = self.context_block.attn.heads(context_normed)
        x_heads = self.x_block.attn.heads(x_normed)

        q, k, v = (torch.cat(both, dim=2) for both in zip(context_heads, x_heads))  # (B, H, T + N, K)
        attended = rearrange(self.attention(q, k, v), "b h n k -> b n (h k)")
        context_attended, x_attended = attended.split([context.shape[1], x.shape[1]], dim=1)

        x = gated_residual(x, x_gate, self.x_block.attn.proj(x_attended))
        if x_dual:
            (x_normed2,) = x_also_normed
            q, k, v = self.x_block.attn2.heads(x_normed2)
            x_attended = rearrange(self.attention(q, k, v), "b h n k -> b n (h k)")
            x = gated_residual(x, gate2, self.x_block.attn2.proj(x_attended))
        x_normed = modulated_norm(x, x_mlp_shift, x_mlp_scale, NORM_EPS)
        x = gated_residual(x, x_mlp_gate, self.x_block.mlp(x_normed))
        if not context_rest:
            return context, x

        context_gate, context_mlp_shift, context_mlp_scale, context_mlp_gate = context_rest
        context = gated_residual(context, context_gate, self.context_block.attn.proj(context_attended))
        context_normed = modulated_norm(context, context_mlp_shift, context_mlp_scale, NORM_EPS)
        context = gated_residual(context, context_mlp_gate, self.context_block.mlp(context_normed))
        return context, x


class FinalLayer(nn.Module):
    """From tokens to the values of their patches."""

    def __init__(self, width: int, values: int):
        super().__init__()
        self.linear = nn.Linear(width, values)
        self.adaLN_modulation = modulation_layer(width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """(B, N, D) and the conditioning (B, D) -> (B, N, values)."""
        shift, scale = modulation_vectors(self.adaLN_modulation, c)
        return self.linear(modulated_norm(x, shift, scale, NORM_EPS))
