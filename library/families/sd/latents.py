"""The latents of Stable Diffusion 1.x and 2.x."""

from library.families.sd.options import LATENTS
from library.nn.autoencoder_latents import AutoencoderLatents


def sd_latents(vae: str) -> AutoencoderLatents:
    """Pictures to latents and back.

    Args:
        vae: Identity of the VAE's weights.
    """
    return AutoencoderLatents("sd latents 1", vae, LATENTS)
