"""ControlNet for Stable Diffusion 1.x and 2.x (Zhang et al. 2023, arXiv:2302.05543).

A copy of the U-Net's way down and middle that also sees a picture. What each of its stages makes goes through a 1x1
convolution that starts at zero and is added to what the U-Net's own stage made, so before training it changes nothing.
Parameter names are those of the published LDM files, without their prefix ``control_model.``.

Shapes:
    B batch, h and w sides of the latents, C features of a stage, E width of the embedded timestep
"""

from itertools import pairwise
from typing import Any

from torch import Tensor, nn

from library.families.sd.unet import UNetConfig, middle, way_down, widths_down
from library.nn.attention import AttentionFunction
from library.nn.embeddings import timestep_sinusoid

HINT_CHANNELS = 3
HINT_WIDTHS = (16, 32, 96, 256)
"""Features of the picture's encoder at each of its resolutions, from that of the picture to that of the latents."""


class ControlNet(nn.Module):
    """What steers a U-Net by a picture."""

    def __init__(self, config: UNetConfig, *, attention: AttentionFunction):
        super().__init__()
        self.config = config
        widths = widths_down(config)
        self.time_embed = nn.Sequential(
            nn.Linear(config.width, config.embedding), nn.SiLU(), nn.Linear(config.embedding, config.embedding)
        )
        self.input_blocks = nn.ModuleList([nn.Sequential(nn.Conv2d(config.in_channels, config.width, 3, padding=1))])
        self.input_blocks.extend(way_down(config, attention))
        self.input_hint_block = _hint_encoder(config.width)
        self.zero_convs = nn.ModuleList([nn.Sequential(nn.Conv2d(width, width, 1)) for width in widths])
        self.middle_block = middle(config, attention)
        self.middle_block_out = nn.Sequential(nn.Conv2d(widths[-1], widths[-1], 1))

    @property
    def stages(self) -> list[nn.Module]:
        """Everything after the first convolution and the picture's encoder, in forward order."""
        return [*self.input_blocks[1:], self.middle_block]

    def forward(self, x_t: Tensor, timestep: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        """This says what is added to the U-Net's features.

        Args:
            x_t: Noised latents (B, in_channels, h, w).
            timestep: 0 to 999 (B,).
            context: Text features (B, T, K).
            hint: The picture (B, 3, 8 h, 8 w) in 0..1.

        Returns:
            One (B, C, h', w') for each of the U-Net's input blocks, and then for its middle.
        """
        embedded = self.time_embed(timestep_sinusoid(timestep, self.config.width).to(x_t.dtype))
        x = self.input_blocks[0](x_t) + self.input_hint_block(hint)
        control = [self.zero_convs[0](x)]
        for stage, zero_conv in zip(self.input_blocks[1:], self.zero_convs[1:], strict=True):
            x = stage(x, embedded, context)
            control.append(zero_conv(x))
        return [*control, self.middle_block_out(self.middle_block(x, embedded, context))]


def _hint_encoder(width: int) -> nn.Sequential:
    """The picture's encoder: (B, 3, 8 h, 8 w) -> (B, width, h, w)."""
    layers: list[nn.Module] = [nn.Conv2d(HINT_CHANNELS, HINT_WIDTHS[0], 3, padding=1), nn.SiLU()]
    for narrow, wide in pairwise(HINT_WIDTHS):
        layers += [nn.Conv2d(narrow, narrow, 3, padding=1), nn.SiLU()]
        layers += [nn.Conv2d(narrow, wide, 3, stride=2, padding=1), nn.SiLU()]
    return nn.Sequential(*layers, nn.Conv2d(HINT_WIDTHS[-1], width, 3, padding=1))


def steer(unet: nn.Module, control_net: nn.Module) -> None:
    """From now on the U-Net takes the picture as ``hint``, and adds what the ControlNet makes of it.

    The U-Net stays the same module: its weights keep their names, its stages their places.
    """

    def with_control(_: nn.Module, asked: tuple[Any, ...], named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        rest = {name: value for name, value in named.items() if name != "hint"}
        return asked, {**rest, "control": control_net(*asked, named["hint"])}

    unet.register_forward_pre_hook(with_control, with_kwargs=True)
