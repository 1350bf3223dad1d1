"""generate.py finds the family of a base model in every layout."""

import pytest
import torch

from library.config.command_line import read_command_line
from library.config.generate import GenerateConfig
from library.config.model import ModelConfig
from library.io.safetensors import save_tensors
from library.sampling.generate_command import _family_name

UNET = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
UNET_DIFFUSERS = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"


@pytest.mark.parametrize(
    ("name", "width", "file", "family"),
    [
        (UNET, 768, "sd1.safetensors", "sd"),
        (UNET, 1024, "sd2.safetensors", "sd"),
        (UNET_DIFFUSERS, 768, "unet/diffusion_pytorch_model.safetensors", "sd"),
        ("transformer_blocks.0.ff.conv_inverted.weight", 4, "transformer/diffusion_pytorch_model.safetensors", "sana"),
        ("joint_blocks.0.x", 4, "sd3.safetensors", "sd3"),
        ("double_blocks.0.x", 4, "flux.safetensors", "sd3"),  # whose checks say what it is
    ],
)
def test_the_family_is_found(tmp_path, name, width, file, family):
    save_tensors({name: torch.zeros(2, width)}, tmp_path / file, {})
    base = str(tmp_path if "/" in file else tmp_path / file)
    groups = {"model": ModelConfig, "generate": GenerateConfig}
    assert _family_name(read_command_line(groups, ["--pretrained_model_name_or_path", base])) == family


def test_a_miniature_of_no_published_size_is_found(tiny_sd_file):
    groups = {"model": ModelConfig, "generate": GenerateConfig}
    assert _family_name(read_command_line(groups, ["--pretrained_model_name_or_path", str(tiny_sd_file)])) == "sd"
