"""Files with the names and shapes of the published 1.x and 2.x, without their data: sparse, so they cost no disk.

OpenCLIP's names are written out here, and not taken from the code that is tested.
"""

import json

import torch

from library.families.sd.key_maps import unet_key_maps
from library.families.sd.unet import CONFIGS, UNet
from library.io.key_maps import to_diffusers
from library.nn.attention import sdpa
from library.nn.autoencoder_kl import SD_VAE, AutoencoderKL
from library.nn.autoencoder_sizes import autoencoder_key_maps
from tests.families.sd3.published_files import prefixed, write_sparse

KINDS = tuple(CONFIGS)
VOCABULARY, POSITIONS = 49408, 77
OPEN_CLIP_WIDTH, OPEN_CLIP_DEPTH = 1024, 24
SCHEDULE = ("betas", "alphas_cumprod", "alphas_cumprod_prev", "sqrt_recip_alphas_cumprod", "posterior_mean_coef1")


def shapes_of(tensors):
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def unet(kind):
    with torch.device("meta"):
        return UNet(CONFIGS[kind], attention=sdpa).state_dict()


def vae():
    with torch.device("meta"):
        return AutoencoderKL(SD_VAE).state_dict()


def clip_config(kind):
    """The text encoder of a folder in diffusers' layout."""
    from transformers import CLIPTextConfig

    if kind == "sd1":
        return CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
    return CLIPTextConfig(
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, hidden_act="gelu"
    )


def clip(kind):
    """Name -> shape in a folder."""
    from transformers import CLIPTextModelWithProjection

    with torch.device("meta"):
        tensors = CLIPTextModelWithProjection(clip_config(kind)).state_dict()
    return {name: shape for name, shape in shapes_of(tensors).items() if name != "text_projection.weight"}


def open_clip():
    """Name -> shape in a single file of 2.x: all layers, with what a picture doesn't depend on."""
    width = OPEN_CLIP_WIDTH
    shapes = {
        "token_embedding.weight": (VOCABULARY, width),
        "positional_embedding": (POSITIONS, width),
        "ln_final.weight": (width,),
        "ln_final.bias": (width,),
        "text_projection": (width, width),
        "logit_scale": (),
    }
    for number in range(OPEN_CLIP_DEPTH):
        layer = f"transformer.resblocks.{number}"
        for name, outputs, inputs in (("attn.out_proj", 1, 1), ("mlp.c_fc", 4, 1), ("mlp.c_proj", 1, 4)):
            shapes |= {f"{layer}.{name}.weight": (outputs * width, inputs * width)}
            shapes |= {f"{layer}.{name}.bias": (outputs * width,)}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"{layer}.{name}.weight": (width,), f"{layer}.{name}.bias": (width,)}
        shapes |= {f"{layer}.attn.in_proj_weight": (3 * width, width), f"{layer}.attn.in_proj_bias": (3 * width,)}
    return shapes


def everything(kind, *, ema=False):
    """One file with all parts inside, the schedule's tables, and perhaps the moving average of the U-Net."""
    denoiser = shapes_of(unet(kind))
    if kind == "sd1":
        positions = {"text_model.embeddings.position_ids": (1, POSITIONS)}
        encoder = prefixed("cond_stage_model.transformer.", clip(kind) | positions)
    else:
        encoder = prefixed("cond_stage_model.model.", open_clip())
    averages = {f"model_ema.diffusion_model{name.replace('.', '')}": shape for name, shape in denoiser.items()}
    return {
        **prefixed("model.diffusion_model.", denoiser),
        **prefixed("first_stage_model.", shapes_of(vae())),
        **encoder,
        **dict.fromkeys(SCHEDULE, (1000,)),
        **(averages | {"model_ema.decay": (), "model_ema.num_updates": ()} if ema else {}),
    }


def write_sparse_folder(folder, kind, *, prediction="epsilon"):
    """A folder in diffusers' layout, its text encoder in an fp16 variant alone."""
    config = CONFIGS[kind]
    maps = unet_key_maps(
        multipliers=config.multipliers,
        attention_levels=config.attention_levels,
        blocks_per_level=config.blocks_per_level,
    )
    vae_maps = autoencoder_key_maps(level_widths=(128, 256, 512, 512), blocks_per_level=2, quant_convolutions=True)
    for name, shapes in (
        ("unet/diffusion_pytorch_model.safetensors", shapes_of(dict(to_diffusers(unet(kind), maps)))),
        ("vae/diffusion_pytorch_model.safetensors", shapes_of(dict(to_diffusers(vae(), vae_maps)))),
        ("text_encoder/model.fp16.safetensors", clip(kind)),
    ):
        write_sparse(folder / name, shapes)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": prediction}))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return folder
