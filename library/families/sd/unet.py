"""The denoiser of Stable Diffusion 1.x and 2.x (Rombach et al. 2022, arXiv:2112.10752).

A convolutional U-Net: stages that go down in resolution hand what they made to the stages that come up again, and
transformers at all but the lowest resolution look at the text. Parameter names are those of the published LDM files,
where ``input_blocks`` and ``output_blocks`` are numbered through all resolutions.

Shapes:
    B batch, h and w sides of the latents, T text tokens, K width of the text features, C features of a stage
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.families.sd.blocks import NORM_EPS, NORM_GROUPS, Downsample, ResBlock, SpatialTransformer, Upsample
from library.nn.attention import AttentionFunction
from library.nn.embeddings import timestep_sinusoid


@dataclass(frozen=True)
class UNetConfig:
    """The sizes of a U-Net.

    Attributes:
        in_channels: Channels of the latents; 9 in models for inpainting.
        out_channels: Channels of the answer.
        width: Features of the first level.
        multipliers: Features of each level, of ``width``.
        attention_levels: How many levels, from the first, look at the text.
        blocks_per_level: Residual blocks of a level on the way down; one more on the way up.
        context_width: K.
        num_heads: Heads of every attention; None: as many as ``head_dim`` gives.
        head_dim: Width of a head where ``num_heads`` is None.
        linear_projections: Whether transformers begin and end with linear layers; else with 1x1 convolutions.
    """

    in_channels: int
    out_channels: int
    width: int
    multipliers: tuple[int, ...]
    attention_levels: int
    blocks_per_level: int
    context_width: int
    num_heads: int | None
    head_dim: int | None
    linear_projections: bool

    @property
    def embedding(self) -> int:
        """Width of the embedded timestep."""
        return 4 * self.width

    @property
    def stride(self) -> int:
        """Latent positions per position of the lowest level, on each side."""
        return 2 ** (len(self.multipliers) - 1)

    def heads(self, channels: int) -> int:
        """Heads of an attention over so many features."""
        if self.num_heads is not None:
            return self.num_heads
        assert self.head_dim is not None
        return channels // self.head_dim


def _published(context_width: int, *, num_heads: int | None, head_dim: int | None, linear: bool) -> UNetConfig:
    return UNetConfig(
        in_channels=4,
        out_channels=4,
        width=320,
        multipliers=(1, 2, 4, 4),
        attention_levels=3,
        blocks_per_level=2,
        context_width=context_width,
        num_heads=num_heads,
        head_dim=head_dim,
        linear_projections=linear,
    )


CONFIGS = {
    "sd1": _published(768, num_heads=8, head_dim=None, linear=False),
    "sd2": _published(1024, num_heads=None, head_dim=64, linear=True),
}


class Stage(nn.ModuleList):
    """Pieces that follow each other, all with the same three inputs."""

    def forward(self, x: Tensor, embedded: Tensor, context: Tensor) -> Tensor:
        """(B, C_in, h, w), (B, E), (B, T, K) -> (B, C_out, h', w')."""
        for piece in self:
            x = piece(x, embedded, context)
        return x


class UNet(nn.Module):
    """The denoiser: predicts the noise, or the velocity, of noised latents."""

    def __init__(self, config: UNetConfig, *, attention: AttentionFunction):
        super().__init__()
        self.config = config
        widths = [config.width * multiplier for multiplier in config.multipliers]
        self.time_embed = nn.Sequential(
            nn.Linear(config.width, config.embedding), nn.SiLU(), nn.Linear(config.embedding, config.embedding)
        )
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(config.in_channels, config.width, 3, padding=1))])
        self.input_blocks.extend(way_down(config, attention))
        self.middle_block = middle(config, attention)
        self.output_blocks = nn.ModuleList(_way_up(config, widths, attention))
        self.out = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, config.width, eps=NORM_EPS),
            nn.SiLU(),
            nn.Conv2d(config.width, config.out_channels, 3, padding=1),
        )

    @property
    def stages(self) -> list[nn.Module]:
        """Everything between the first convolution and the last, in forward order."""
        return [*self.input_blocks[1:], self.middle_block, *self.output_blocks]

    def forward(
        self, x_t: Tensor, timestep: Tensor, context: Tensor, control: Sequence[Tensor] | None = None
    ) -> Tensor:
        """This predicts what the model was trained to: the noise, or the velocity.

        Args:
            x_t: Noised latents (B, in_channels, h, w).
            timestep: 0 to 999 (B,).
            context: Text features (B, T, K).
            control: What a ControlNet adds to the outputs of the stages on the way down, the first convolution
                included, and then to that of the middle; None: nothing.

        Returns:
            (B, out_channels, h, w).

        Raises:
            ValueError: A side of the latents doesn't halve as often as the model halves it.
        """
        stride = self.config.stride
        if x_t.shape[2] % stride or x_t.shape[3] % stride:
            raise ValueError(
                f"latents of {x_t.shape[2]}x{x_t.shape[3]} can't be halved to a {stride}th; use pictures whose sides "
                f"are multiples of {8 * stride}"
            )
        embedded = self.time_embed(timestep_sinusoid(timestep, self.config.width).to(x_t.dtype))
        x = self.input_blocks[0](x_t)
        made = [x]
        for stage in self.input_blocks[1:]:
            x = stage(x, embedded, context)
            made.append(x)
        x = self.middle_block(x, embedded, context)
        if control is not None:
            *added, to_middle = control
            made = [one + other for one, other in zip(made, added, strict=True)]
            x = x + to_middle
        for stage in self.output_blocks:
            x = stage(torch.cat([x, made.pop()], dim=1), embedded, context)
        return self.out(x)


def _transformer(config: UNetConfig, channels: int, attention: AttentionFunction) -> SpatialTransformer:
    return SpatialTransformer(
        channels,
        config.context_width,
        config.heads(channels),
        linear_projections=config.linear_projections,
        attention=attention,
    )


def way_down(config: UNetConfig, attention: AttentionFunction) -> Iterator[Stage]:
    """The input blocks after the first convolution."""
    channels, widths = config.width, [config.width * multiplier for multiplier in config.multipliers]
    for level, width in enumerate(widths):
        for _ in range(config.blocks_per_level):
            pieces: list[nn.Module] = [ResBlock(channels, width, config.embedding)]
            if level < config.attention_levels:
                pieces.append(_transformer(config, width, attention))
            channels = width
            yield Stage(pieces)
        if level + 1 < len(widths):
            yield Stage([Downsample(channels)])


def middle(config: UNetConfig, attention: AttentionFunction) -> Stage:
    """What stands between the way down and the way up."""
    width = config.width * config.multipliers[-1]
    return Stage(
        [
            ResBlock(width, width, config.embedding),
            _transformer(config, width, attention),
            ResBlock(width, width, config.embedding),
        ]
    )


def _way_up(config: UNetConfig, widths: Sequence[int], attention: AttentionFunction) -> Iterator[Stage]:
    channels, made = widths[-1], widths_down(config)
    for level in reversed(range(len(widths))):
        for number in range(config.blocks_per_level + 1):
            pieces: list[nn.Module] = [ResBlock(channels + made.pop(), widths[level], config.embedding)]
            channels = widths[level]
            if level < config.attention_levels:
                pieces.append(_transformer(config, channels, attention))
            if level and number == config.blocks_per_level:
                pieces.append(Upsample(channels))
            yield Stage(pieces)


def widths_down(config: UNetConfig) -> list[int]:
    """The features of what each input block makes, in forward order."""
    widths = [config.width]
    for level, multiplier in enumerate(config.multipliers):
        widths += [config.width * multiplier] * config.blocks_per_level
        if level + 1 < len(config.multipliers):
            widths.append(config.width * multiplier)
    return widths
