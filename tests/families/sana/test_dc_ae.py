from pathlib import Path

import pytest
import torch
from torch import nn

from library.families.sana.dc_ae import DCAE, F32C32_SANA, DCAEConfig
from library.families.sana.key_maps import vae_key_maps
from library.io.key_maps import to_diffusers

KEYS = Path(__file__).parents[2] / "data" / "keys"

TINY = DCAEConfig(
    widths=(32, 64, 64, 128),
    encoder_depths=(1, 2, 1, 2),
    decoder_depths=(2, 1, 1, 1),
    attention_from=2,
    latent_channels=16,
)


def key_maps(config):
    return vae_key_maps(
        encoder_depths=config.encoder_depths,
        decoder_depths=config.decoder_depths,
        attention_from=config.attention_from,
    )


def random_vae(config):
    torch.manual_seed(0)
    vae = DCAE(config)
    for name, parameter in vae.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
        nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=fan_in**-0.5)
    return vae


def diffusers_twin(vae):
    diffusers = pytest.importorskip("diffusers")
    config = vae.config
    count = len(config.widths)
    kinds = tuple("EfficientViTBlock" if i >= config.attention_from else "ResBlock" for i in range(count))
    scales = tuple((5,) if i >= config.attention_from else () for i in range(count))
    twin = diffusers.AutoencoderDC(
        in_channels=3,
        latent_channels=config.latent_channels,
        attention_head_dim=32,
        encoder_block_types=kinds,
        decoder_block_types=kinds,
        encoder_block_out_channels=config.widths,
        decoder_block_out_channels=config.widths,
        encoder_layers_per_block=config.encoder_depths,
        decoder_layers_per_block=config.decoder_depths,
        encoder_qkv_multiscales=scales,
        decoder_qkv_multiscales=scales,
        upsample_block_type="interpolate",
        downsample_block_type="conv",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
    )
    twin.load_state_dict(dict(to_diffusers(vae.state_dict(), key_maps(config))), strict=True)
    return twin


def assert_close(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.reference
@pytest.mark.parametrize("size", [(64, 96), (32, 32)], ids=["linear attention", "attention by pairs"])
def test_both_halves_equal_those_of_diffusers(size):
    """The smaller picture has at most 32 positions in its deepest stages, where attention goes by pairs."""
    vae = random_vae(TINY)
    twin = diffusers_twin(vae)
    pixels = torch.rand(2, 3, *size) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pixels)
        assert latents.shape == (2, 16, size[0] // 8, size[1] // 8)
        assert_close(latents, twin.encode(pixels).latent)
        assert_close(vae.decode(latents), twin.decode(latents).sample)


def test_keys_and_shapes_equal_those_of_the_published_files():
    with torch.device("meta"):
        vae = DCAE(F32C32_SANA)
    published = dict(line.split("\t") for line in (KEYS / "keys_dcae_f32c32_sana.txt").read_text().splitlines())
    assert {key: str(list(tensor.shape)) for key, tensor in vae.state_dict().items()} == published
    published = dict(
        line.split("\t") for line in (KEYS / "keys_dcae_f32c32_sana_diffusers.txt").read_text().splitlines()
    )
    theirs = to_diffusers(vae.state_dict(), key_maps(F32C32_SANA))
    assert {key: str(list(tensor.shape)) for key, tensor in theirs} == published
    assert sum(parameter.numel() for parameter in vae.parameters()) == 312_250_275


def test_bf16_is_near_fp32():
    vae = random_vae(TINY)
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        exact = vae.encode(pixels)
        assert_close(vae.bfloat16().encode(pixels.bfloat16()).float(), exact, 0.1)
