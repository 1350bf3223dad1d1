"""Pictures to the latents of a convolutional autoencoder (``autoencoder_kl``) and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from library.records import LatentFormat


@dataclass(frozen=True)
class AutoencoderLatents:
    """The VAE's mean as latents (``library.families.protocols.LatentCachingStrategy``).

    The VAE answers with a Gaussian per position. Its mean is taken, not a draw from it: the same picture has the same
    latents, cached or not, and its standard deviation is far below that of the noise that training adds.

    Attributes:
        features: Names in the signature what is stored, and in which version of its making.
        vae: Identity of the VAE's weights.
        format: Geometry and scale.
    """

    features: str
    vae: str
    format: LatentFormat

    def signature(self) -> Mapping[str, str]:
        """Every setting that changes the raw latents, save the type that the VAE computes in."""
        return {"features": self.features, "vae": self.vae, "posterior": "mean"}

    def encode(self, vae: Any, pixels: Tensor) -> Tensor:
        """Raw latents (B, C, h, w), not normalised, of pictures (B, 3, H, W) in -1..1."""
        mean, _ = vae.encode(pixels)
        return mean

    def decode(self, vae: Any, latents: Tensor) -> Tensor:
        """Pictures (B, 3, H, W), about -1..1, of normalised latents (B, C, h, w)."""
        raw = self.format.denormalise(latents)
        return vae.decode(raw.to(next(vae.parameters()).dtype))
