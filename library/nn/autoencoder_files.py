"""A convolutional autoencoder's weights out of files, and what diffusers' folders say of its sizes."""

import dataclasses
from typing import Any

import torch

from library.io.part_loading import fill
from library.io.parts import Part
from library.nn.autoencoder_kl import NORM_GROUPS, AutoencoderKL, AutoencoderKLConfig
from library.nn.autoencoder_sizes import AutoencoderSizes
from library.records import LatentFormat


def autoencoder_config(sizes: AutoencoderSizes) -> AutoencoderKLConfig:
    """The sizes as the module takes them."""
    return AutoencoderKLConfig(**dataclasses.asdict(sizes))


def load_autoencoder(
    part: Part, sizes: AutoencoderSizes, *, device: torch.device | str, dtype: torch.dtype, mmap: bool = True
) -> AutoencoderKL:
    """This builds an autoencoder and streams its weights in; no more than one tensor is ever held twice.

    Args:
        part: Where its weights lie, in either layout.
        sizes: Read from the part.
        device: Where it goes.
        dtype: Of its weights.
        mmap: Map the files rather than reading them.

    Returns:
        The autoencoder, frozen, in eval mode.

    Raises:
        ConfigError: The files don't have exactly the tensors that the sizes ask for. Nothing was read then.
    """
    with torch.device("meta"):
        vae = AutoencoderKL(autoencoder_config(sizes))
    fill(vae, part, sizes.key_maps, device=device, dtype=dtype, mmap=mmap)
    return vae.eval().requires_grad_(False)


def diffusers_config(config: AutoencoderKLConfig, latents: LatentFormat) -> dict[str, Any]:
    """What diffusers' ``config.json`` says of an autoencoder.

    Args:
        config: Its sizes.
        latents: Scale and shift.
    """
    levels = len(config.level_widths)
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": config.pixel_channels,
        "out_channels": config.pixel_channels,
        "latent_channels": config.latent_channels,
        "block_out_channels": list(config.level_widths),
        "layers_per_block": config.blocks_per_level,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "norm_num_groups": NORM_GROUPS,
        "act_fn": "silu",
        "scaling_factor": latents.scale,
        "shift_factor": latents.shift or None,
        "use_quant_conv": config.quant_convolutions,
        "use_post_quant_conv": config.quant_convolutions,
        "force_upcast": True,
    }
