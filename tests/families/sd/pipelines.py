"""diffusers' pipeline with the weights of a miniature, made without its loaders."""

from pathlib import Path

import torch
from torch import nn

from library.families.sd.key_maps import unet_key_maps
from library.io.key_maps import to_diffusers
from library.nn.autoencoder_sizes import autoencoder_key_maps
from tools.miniature_sd import SdSizes, sd_weights


def pipeline(folder: Path, sizes: SdSizes, scheduler, seed: int = 0):
    """``StableDiffusionPipeline`` with what ``make_sd(folder, sizes=sizes, seed=seed)`` wrote."""
    import diffusers
    from transformers import CLIPTokenizer

    weights = sd_weights(seed, sizes)
    pipe = diffusers.StableDiffusionPipeline(
        vae=_vae(diffusers, weights["vae"], sizes),
        text_encoder=_clip(weights["clip"], sizes),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=_unet(diffusers, weights["denoiser"], sizes),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _unet(diffusers, weights, sizes: SdSizes) -> nn.Module:
    config = sizes.denoiser()
    widths = [config.width * multiplier for multiplier in config.multipliers]
    looks = [level < config.attention_levels for level in range(len(widths))]
    unet = diffusers.UNet2DConditionModel(
        in_channels=config.in_channels,
        out_channels=config.out_channels,
        down_block_types=tuple("CrossAttnDownBlock2D" if look else "DownBlock2D" for look in looks),
        up_block_types=tuple("CrossAttnUpBlock2D" if look else "UpBlock2D" for look in reversed(looks)),
        block_out_channels=tuple(widths),
        layers_per_block=config.blocks_per_level,
        cross_attention_dim=config.context_width,
        attention_head_dim=tuple(config.heads(width) for width in widths),  # their name for the number of heads
        use_linear_projection=config.linear_projections,
    )
    maps = unet_key_maps(
        multipliers=config.multipliers,
        attention_levels=config.attention_levels,
        blocks_per_level=config.blocks_per_level,
    )
    unet.load_state_dict(dict(to_diffusers(weights, maps)))
    return unet.eval()


def _vae(diffusers, weights, sizes: SdSizes) -> nn.Module:
    levels = len(sizes.vae_widths)
    vae = diffusers.AutoencoderKL(
        latent_channels=4,
        block_out_channels=sizes.vae_widths,
        layers_per_block=sizes.vae_blocks,
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
    )
    maps = autoencoder_key_maps(
        level_widths=sizes.vae_widths, blocks_per_level=sizes.vae_blocks, quant_convolutions=True
    )
    vae.load_state_dict(dict(to_diffusers(weights, maps)))
    return vae.eval()


def _clip(weights, sizes: SdSizes) -> nn.Module:
    """As it lies in a diffusers folder: that of 2.x without its last layer."""
    from transformers import CLIPTextModel

    config = sizes.clip()
    config.num_hidden_layers = sizes.clip_depth - sizes.is_v2
    encoder = CLIPTextModel(config)
    own = encoder.state_dict()
    named = {name if name in own else name.removeprefix("text_model."): tensor for name, tensor in weights.items()}
    with torch.no_grad():
        encoder.load_state_dict({name: named[name] for name in own})
    return encoder.eval()
