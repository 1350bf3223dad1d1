"""Pictures to the latents of Stable Diffusion 1.x and 2.x and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from library.families.sd.options import LATENTS
from library.records import LatentFormat


@dataclass(frozen=True)
class SdLatentStrategy:
    """The mean of the VAE's Gaussian as latents, so that a picture has the same latents, cached or not.

    Attributes:
        vae: Identity of the VAE's weights.
        format: Geometry and scale.
    """

    vae: str
    format: LatentFormat = LATENTS

    def signature(self) -> Mapping[str, str]:
        """Every setting that changes the raw latents, save the type that the VAE computes in."""
        return {"features": "sd latents 1", "vae": self.vae, "posterior": "mean"}

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        """Raw latents (B, 4, h, w), not normalised, of pictures (B, 3, H, W) in -1..1."""
        mean, _ = vae.encode(pixels)
        return mean

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about -1..1, of normalised latents (B, 4, h, w)."""
        raw = self.format.denormalise(latents)
        return vae.decode(raw.to(next(vae.parameters()).dtype))
