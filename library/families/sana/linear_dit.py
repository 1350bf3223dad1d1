"""The denoiser of Sana and Sana-1.5 (Xie et al. 2024, arXiv:2410.10629; 2025, arXiv:2501.18427).

A transformer whose self-attention has linear cost, over latents that are compressed 32 times on each side. Unusual: no
positional embedding at 512 and 1024 px, where the convolutions of the feed-forward are the only sense of position; one
modulation for all blocks, to which each adds a small table; cross-attention to the text without norm and without gate.
Parameter names are those of the published NVlabs files.

Shapes:
    B batch, C latent channels, h and w sides of the latents, p patch size
    N = (h / p) (w / p) image tokens, T text tokens, D width
"""

import dataclasses
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from library.families.sana.blocks import FinalLayer, RMSNorm, SanaBlock
from library.nn.attention import AttentionFunction
from library.nn.embeddings import MLPEmbedder, sincos_1d, timestep_sinusoid

TIMESTEP_CHANNELS = 256
CONTEXT_NORM_EPS = 1e-5


@dataclass(frozen=True)
class LinearDiTConfig:
    """The sizes of a Sana denoiser.

    Attributes:
        depth: Number of blocks.
        width: D.
        head_dim: Width of a self-attention head.
        num_cross_heads: Heads of the cross-attention.
        mlp_ratio: Inner channels of the feed-forward, of D; the gate doubles them.
        patch_size: p.
        in_channels: C.
        context_width: Width of the text features.
        qk_norm: Whether queries and keys are normalised, over all heads together.
        position_base: Tokens per side of the grid that positions are measured on; None: there are no positions.
        position_scale: Positions are divided by it.
    """

    depth: int
    width: int
    head_dim: int
    num_cross_heads: int
    mlp_ratio: float
    patch_size: int
    in_channels: int
    context_width: int
    qk_norm: bool
    position_base: int | None
    position_scale: float

    @property
    def num_heads(self) -> int:
        """Heads of the self-attention."""
        return self.width // self.head_dim

    @property
    def inner(self) -> int:
        """Inner channels of the feed-forward."""
        return int(self.mlp_ratio * self.width)

    def at(self, image_size: int) -> "LinearDiTConfig":
        """The same model as it was trained for pictures of ``image_size`` pixels a side: positions from 2048 px on."""
        if image_size <= 1024:
            return dataclasses.replace(self, position_base=None, position_scale=1.0)
        return dataclasses.replace(
            self, position_base=image_size // 32, position_scale=2.0 if image_size > 2048 else 1.0
        )


def _published(depth: int, width: int, num_cross_heads: int, *, qk_norm: bool) -> LinearDiTConfig:
    return LinearDiTConfig(
        depth=depth,
        width=width,
        head_dim=32,
        num_cross_heads=num_cross_heads,
        mlp_ratio=2.5,
        patch_size=1,
        in_channels=32,
        context_width=2304,
        qk_norm=qk_norm,
        position_base=None,
        position_scale=1.0,
    )


CONFIGS = {
    "sana-600m": _published(28, 1152, 16, qk_norm=False),
    "sana-1600m": _published(20, 2240, 20, qk_norm=False),
    "sana-1.5-1600m": _published(20, 2240, 20, qk_norm=True),
    "sana-1.5-4800m": _published(60, 2240, 20, qk_norm=True),
}


class PatchEmbed(nn.Module):
    """From latents to one token per patch."""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, D)."""
        # Contiguous, so that the sums of the residual stream are: norms and linear layers would copy it each time.
        return rearrange(self.proj(x), "b d h w -> b (h w) d").contiguous()


class ContextProjection(nn.Module):
    """Two layers that bring text features to the model's width."""

    def __init__(self, context_width: int, width: int):
        super().__init__()
        self.fc1 = nn.Linear(context_width, width)
        self.fc2 = nn.Linear(width, width)

    def forward(self, context: Tensor) -> Tensor:
        """(B, T, context_width) -> (B, T, D)."""
        return self.fc2(F.gelu(self.fc1(context), approximate="tanh"))


class ContextEmbed(nn.Module):
    """The projection of the text under the name that the published files have."""

    def __init__(self, context_width: int, width: int):
        super().__init__()
        self.y_proj = ContextProjection(context_width, width)

    def forward(self, context: Tensor) -> Tensor:
        """(B, T, context_width) -> (B, T, D)."""
        return self.y_proj(context)


class LinearDiT(nn.Module):
    """The denoiser: predicts the velocity of noised latents."""

    def __init__(self, config: LinearDiTConfig, *, attention: AttentionFunction):
        super().__init__()
        self.config = config
        width = config.width
        self.x_embedder = PatchEmbed(config.in_channels, width, config.patch_size)
        self.t_embedder = MLPEmbedder(TIMESTEP_CHANNELS, width)
        self.t_block = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.y_embedder = ContextEmbed(config.context_width, width)
        self.attention_y_norm = RMSNorm(width, CONTEXT_NORM_EPS)
        self.blocks = nn.ModuleList(
            SanaBlock(
                width,
                num_heads=config.num_heads,
                num_cross_heads=config.num_cross_heads,
                inner=config.inner,
                qk_norm=config.qk_norm,
                attention=attention,
            )
            for _ in range(config.depth)
        )
        self.final_layer = FinalLayer(width, config.patch_size**2 * config.in_channels)

    def forward(self, x_t: Tensor, timestep: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """This predicts the velocity, noise minus clean latents.

        Args:
            x_t: Noised latents (B, C, h, w).
            timestep: 1000 times the noise level (B,), fp32.
            context: Text features (B, T, context_width).
            mask: Which text tokens count (B, T), bool; None: all.

        Returns:
            (B, C, h, w).

        Raises:
            ValueError: A side of the latents isn't a multiple of the patch size.
        """
        p = self.config.patch_size
        rows, columns = x_t.shape[2] // p, x_t.shape[3] // p
        if x_t.shape[2:] != (rows * p, columns * p):
            raise ValueError(
                f"latents of {x_t.shape[2]}x{x_t.shape[3]} don't divide into patches of {p}x{p}; resize them"
            )
        x = self.x_embedder(x_t)
        if self.config.position_base is not None:
            x = (x + position_table(self.config, rows, columns, x.device)).to(x.dtype)
        embedded = self.t_embedder(timestep_sinusoid(timestep, TIMESTEP_CHANNELS).to(x_t.dtype))  # (B, D)
        modulation = rearrange(self.t_block(embedded), "b (six d) -> b six d", six=6)
        context = self.attention_y_norm(self.y_embedder(context))
        for block in self.blocks:
            x = block(x, context, mask, modulation, rows, columns)
        x = self.final_layer(x, embedded)
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)


def position_table(config: LinearDiTConfig, rows: int, columns: int, device: torch.device | str) -> Tensor:
    """This makes the positions of the tokens, stretched to the range of the grid that the model was trained on.

    Args:
        config: With ``position_base``.
        rows: Of the tokens.
        columns: Of the tokens.
        device: Where it is made.

    Returns:
        (1, N, D), fp32: half for the column, half for the row, each sines and then cosines.
    """
    base = config.position_base
    assert base is not None

    def axis(count: int) -> Tensor:
        position = torch.arange(count, dtype=torch.float64, device=device)
        return sincos_1d(position * base / count / config.position_scale, config.width // 2)

    across, down = axis(columns), axis(rows)
    half = config.width // 2
    table = torch.cat(
        [across[None].expand(rows, columns, half), down[:, None].expand(rows, columns, half)], dim=-1
    )  # (rows, columns, D)
    return rearrange(table, "h w d -> 1 (h w) d")
