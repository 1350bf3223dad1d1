"""Tiny models of both generations, in every layout."""

import dataclasses
import json
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from library.families.sd.key_maps import unet_key_maps
from library.families.sd.unet import UNet, UNetConfig
from library.io.key_maps import from_diffusers, to_diffusers
from library.nn.attention import sdpa
from library.nn.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig
from library.nn.autoencoder_sizes import autoencoder_key_maps
from library.text_encoders.open_clip import open_clip_key_maps

TINY_VAE = AutoencoderKLConfig(3, 4, (32, 32, 32, 32), 1, True)
DEPTH, VOCABULARY = 3, 64
PREFIXES = {"denoiser": "model.diffusion_model.", "vae": "first_stage_model."}


class TinyModel(NamedTuple):
    """Weights of each part under the single file's names; the text encoder's under transformers'."""

    is_v2: bool
    config: UNetConfig
    denoiser: dict
    vae: dict
    clip: dict

    def single_file(self, path, **more):
        tensors = {PREFIXES[name] + key: value for name in PREFIXES for key, value in getattr(self, name).items()}
        if self.is_v2:
            maps = open_clip_key_maps(depth=DEPTH)
            stored = {f"cond_stage_model.model.{key}": value for key, value in from_diffusers(self.clip, maps)}
            stored["cond_stage_model.model.logit_scale"] = torch.tensor(1.0)
            stored["cond_stage_model.model.text_projection"] = torch.zeros(64, 64)
        else:
            stored = {f"cond_stage_model.transformer.{key}": value for key, value in self.clip.items()}
            stored["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
        schedule = {"betas": torch.zeros(1000), "alphas_cumprod": torch.zeros(1000), "sqrt_one_minus_x": torch.zeros(9)}
        tensors = {**tensors, **stored, **schedule, **more}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
        return path

    def folder(self, path, *, prediction="epsilon"):
        maps = {
            "denoiser": unet_key_maps(
                multipliers=self.config.multipliers,
                attention_levels=self.config.attention_levels,
                blocks_per_level=self.config.blocks_per_level,
            ),
            "vae": autoencoder_key_maps(level_widths=(32,) * 4, blocks_per_level=1, quant_convolutions=True),
        }
        for name, folder in (("denoiser", "unet"), ("vae", "vae")):
            (path / folder).mkdir(parents=True)
            tensors = dict(to_diffusers(getattr(self, name), maps[name]))
            tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
            save_file(tensors, path / folder / "diffusion_pytorch_model.safetensors")
        (path / "text_encoder").mkdir()
        save_file(self.clip, path / "text_encoder" / "model.safetensors")
        (path / "scheduler").mkdir()
        (path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"prediction_type": prediction}))
        (path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
        return path


def clip_weights(width, generator):
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=DEPTH,
        num_attention_heads=1,
        bos_token_id=0,
        eos_token_id=2,
    )
    names = {name: tensor.shape for name, tensor in CLIPTextModel(config).state_dict().items()}
    prefixed = {
        name if name.startswith("text_model.") else f"text_model.{name}": shape for name, shape in names.items()
    }
    return {
        name: torch.randn(shape, generator=generator) * 0.1
        for name, shape in prefixed.items()
        if not name.endswith("position_ids")
    }


@pytest.fixture(scope="session", params=[False, True], ids=["sd1", "sd2"])
def tiny_sd(request):
    config = UNetConfig(
        in_channels=4,
        out_channels=4,
        width=64,
        multipliers=(1, 1, 2, 2),
        attention_levels=3,
        blocks_per_level=1,
        context_width=64,
        num_heads=8,
        head_dim=None,
        linear_projections=False,
    )
    if request.param:
        config = dataclasses.replace(config, num_heads=None, head_dim=64, linear_projections=True)
    torch.manual_seed(0)
    unet, vae = UNet(config, attention=sdpa), AutoencoderKL(TINY_VAE)
    for parameter in (*unet.parameters(), *vae.parameters()):
        nn.init.normal_(parameter, std=0.05)
    clip = clip_weights(64, torch.Generator().manual_seed(1))
    return TinyModel(request.param, config, unet.state_dict(), vae.state_dict(), clip)
