"""Pictures to Sana's latents and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from library.families.sana.options import LATENTS
from library.nn.tiling import decode_in_tiles
from library.records import LatentFormat

TILED_ABOVE = 96
"""Latent positions per side, 3072 pixels: larger pictures are decoded in tiles."""
TILE, OVERLAP = 64, 16


@dataclass(frozen=True)
class SanaLatentStrategy:
    """DC-AE's code as latents. Its encoder draws nothing: a picture has one code.

    Attributes:
        vae: Identity of the DC-AE's weights.
        format: Geometry and scale.
    """

    vae: str
    format: LatentFormat = LATENTS

    def signature(self) -> Mapping[str, str]:
        """Every setting that changes the raw latents, save the type that the DC-AE computes in."""
        return {"features": "sana latents 1", "vae": self.vae}

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        """Raw latents (B, 32, h, w), not normalised, of pictures (B, 3, H, W) in -1..1."""
        return vae.encode(pixels)

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about -1..1, of normalised latents (B, 32, h, w); large ones in tiles."""
        raw = self.format.denormalise(latents).to(next(vae.parameters()).dtype)
        if max(raw.shape[2:]) <= TILED_ABOVE:
            return vae.decode(raw)
        return decode_in_tiles(vae.decode, raw, stride=self.format.stride, tile=TILE, overlap=OVERLAP)
