"""The latents of Stable Diffusion 3."""

from library.families.sd3.options import LATENTS
from library.nn.autoencoder_latents import AutoencoderLatents


def sd3_latents(vae: str) -> AutoencoderLatents:
    """Pictures to latents and back.

    Args:
        vae: Identity of the VAE's weights.
    """
    return AutoencoderLatents("sd3 latents 1", vae, LATENTS)
