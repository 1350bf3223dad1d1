"""MMDiT, the denoiser of Stable Diffusion 3 and 3.5 (Esser et al. 2024, arXiv:2403.03206).

A transformer over image and text tokens together: each kind has its own weights, and they meet in every attention.
Noise level and pooled text act through adaptive layer norm. Unusual: positions come from a window of a large stored
table; 3.5 medium has a second, image-only attention in its first blocks; the text stream ends before the last
block's feed-forward half. Parameter names are those of the published single file, without its prefix.

Shapes:
    B batch, C latent channels, h and w sides of the latents, p patch size
    N = (h / p) (w / p) image tokens, T text tokens, D width
"""

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn

from library.families.sd3.blocks import FinalLayer, JointBlock
from library.families.sd3.position_table import crop
from library.nn.attention import AttentionFunction
from library.nn.embeddings import MLPEmbedder, timestep_sinusoid

TIMESTEP_CHANNELS = 256


@dataclass(frozen=True)
class MMDiTConfig:
    """The sizes of an MMDiT.

    Attributes:
        depth: Number of joint blocks.
        width: D.
        num_heads: Heads of every attention.
        patch_size: p.
        in_channels: C.
        context_width: Width of the text features.
        pooled_width: Width of the pooled text features.
        pos_embed_max_size: Rows and columns of the stored position table. It is part of the weights: a new model has
            zeros, and ``position_table.sincos_table`` makes the published values.
        qk_norm: Whether queries and keys are normalised per head.
        dual_attention_blocks: Blocks with a second, image-only attention.
    """

    depth: int
    width: int
    num_heads: int
    patch_size: int
    in_channels: int
    context_width: int
    pooled_width: int
    pos_embed_max_size: int
    qk_norm: bool
    dual_attention_blocks: tuple[int, ...]

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.width // self.num_heads


def _published(
    depth: int, *, pos_embed_max_size: int, qk_norm: bool, dual_attention_blocks: tuple[int, ...]
) -> MMDiTConfig:
    return MMDiTConfig(
        depth=depth,
        width=64 * depth,
        num_heads=depth,
        patch_size=2,
        in_channels=16,
        context_width=4096,
        pooled_width=2048,
        pos_embed_max_size=pos_embed_max_size,
        qk_norm=qk_norm,
        dual_attention_blocks=dual_attention_blocks,
    )


CONFIGS = {
    "sd3-medium": _published(24, pos_embed_max_size=192, qk_norm=False, dual_attention_blocks=()),
    "sd3.5-medium": _published(24, pos_embed_max_size=384, qk_norm=True, dual_attention_blocks=tuple(range(13))),
    "sd3.5-large": _published(38, pos_embed_max_size=192, qk_norm=True, dual_attention_blocks=()),
}


class PatchEmbed(nn.Module):
    """From latents to one token per patch."""

    def __init__(self, in_channels: int, width: int, patch_size: int):
        super().__init__()
        self.proj = nn.Conv2d(in_channels, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, N, D)."""
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class MMDiT(nn.Module):
    """The denoiser: predicts the velocity of noised latents."""

    pos_embed: Tensor

    def __init__(self, config: MMDiTConfig, *, attention: AttentionFunction):
        super().__init__()
        self.config = config
        width, num_heads = config.width, config.num_heads
        self.x_embedder = PatchEmbed(config.in_channels, width, config.patch_size)
        self.t_embedder = MLPEmbedder(TIMESTEP_CHANNELS, width)
        self.y_embedder = MLPEmbedder(config.pooled_width, width)
        self.context_embedder = nn.Linear(config.context_width, width)
        self.register_buffer("pos_embed", torch.zeros(1, config.pos_embed_max_size**2, width))
        self.joint_blocks = nn.ModuleList(
            JointBlock(
                width,
                num_heads,
                qk_norm=config.qk_norm,
                dual=i in config.dual_attention_blocks,
                pre_only=i == config.depth - 1,
                attention=attention,
            )
            for i in range(config.depth)
        )
        self.final_layer = FinalLayer(width, config.patch_size**2 * config.in_channels)

    def forward(
        self, x_t: Tensor, timestep: Tensor, context: Tensor, pooled: Tensor, *, position_table: Tensor | None = None
    ) -> Tensor:
        """This predicts the velocity, noise minus clean latents.

        Args:
            x_t: Noised latents (B, C, h, w).
            timestep: 1000 times the noise level (B,), fp32.
            context: Text features (B, T, context_width).
            pooled: Pooled text features (B, pooled_width).
            position_table: Added to the image tokens, (1, N, D) or (B, N, D); None: the middle of ``pos_embed``.

        Returns:
            (B, C, h, w).

        Raises:
            ValueError: A side of the latents isn't a multiple of the patch size, or exceeds the position table.
        """
        p = self.config.patch_size
        rows, columns = x_t.shape[2] // p, x_t.shape[3] // p
        if x_t.shape[2:] != (rows * p, columns * p):
            raise ValueError(
                f"latents of {x_t.shape[2]}x{x_t.shape[3]} don't divide into patches of {p}x{p}; resize them"
            )
        if position_table is None:
            position_table = crop(self.pos_embed, rows, columns)

        x = self.x_embedder(x_t)
        x = (x + position_table).to(x.dtype)
        context = self.context_embedder(context)
        c = self.t_embedder(timestep_sinusoid(timestep, TIMESTEP_CHANNELS).to(x_t.dtype)) + self.y_embedder(pooled)
        for block in self.joint_blocks:
            context, x = block(context, x, c)
        x = self.final_layer(x, c)
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=columns, p=p, q=p)
