import dataclasses

import pytest
import torch
from torch import nn

from library.families.sana import latents as latents_module
from library.families.sana.dc_ae import DCAE, DCAEConfig
from library.families.sana.latents import SanaLatentStrategy
from library.records import Resolution

TINY = DCAEConfig(
    widths=(8, 8, 16, 32, 32, 32),
    encoder_depths=(1, 1, 1, 1, 1, 1),
    decoder_depths=(1, 1, 1, 1, 1, 1),
    attention_from=3,
    latent_channels=32,
)
STRATEGY = SanaLatentStrategy("tiny")


def random_vae(config):
    torch.manual_seed(0)
    vae = DCAE(config).requires_grad_(False).eval()
    for name, parameter in vae.named_parameters():
        fan_in = parameter[0].numel() if parameter.dim() > 1 else 25
        nn.init.normal_(parameter, mean=1.0 if name.endswith("norm.weight") else 0.0, std=fan_in**-0.5)
    return vae


def test_geometry_and_scale():
    assert STRATEGY.format.latent_size(Resolution(1024, 768)) == (24, 32)
    assert STRATEGY.format.tokens(Resolution(1024, 1024)) == 1024 and STRATEGY.format.resolution_step == 32
    assert torch.equal(STRATEGY.format.normalise(torch.ones(1)), torch.tensor([0.41407]))


def test_encoding_draws_nothing_and_scales_nothing():
    vae = random_vae(TINY)
    pixels = torch.rand(2, 3, 64, 96) * 2 - 1
    raw = STRATEGY.encode(vae, pixels)
    assert raw.shape == (2, 32, 2, 3) and torch.equal(raw, vae.encode(pixels))
    decoded = STRATEGY.decode(vae, STRATEGY.format.normalise(raw))
    torch.testing.assert_close(decoded, vae.decode(raw))


def test_the_signature_is_that_of_the_weights():
    assert STRATEGY.signature() == SanaLatentStrategy("tiny").signature() != SanaLatentStrategy("other").signature()


def smooth(height, width):
    """Latents that change little from one position to the next, as those of a photograph."""
    coarse = torch.randn(1, 32, 3, 3, generator=torch.Generator().manual_seed(1))
    return nn.functional.interpolate(coarse, size=(height, width), mode="bicubic")


@pytest.fixture
def small_tiles(monkeypatch):
    """Tiles that a test can afford, in the proportions of the real ones."""
    for name, value in (("TILED_ABOVE", 30), ("TILE", 24), ("OVERLAP", 12)):
        monkeypatch.setattr(latents_module, name, value)


def assert_no_seam(tiled, whole, tile, overlap, stride=32):
    """Where tiles end, neighbouring columns differ no more than they do elsewhere."""
    steps, usual = tiled.diff(dim=3).abs().mean(dim=(0, 1, 2)), whole.diff(dim=3).abs().mean(dim=(0, 1, 2))
    width = tiled.shape[3] // stride
    ends = [tile * stride - 1, (width - tile) * stride - 1]
    for end in ends:
        for column in range(end - overlap * stride // 2, end + overlap * stride // 2, stride):
            assert steps[column] < 1.5 * usual[column] + 1e-3, column
    assert steps.max() < 1.2 * usual.max()


@torch.no_grad()
def test_large_pictures_are_decoded_in_tiles_without_a_seam(small_tiles):
    vae, latents = random_vae(TINY), smooth(24, 34)
    tiled = STRATEGY.decode(vae, latents)
    whole = vae.decode(STRATEGY.format.denormalise(latents))
    assert tiled.shape == whole.shape == (1, 3, 24 * 32, 34 * 32)
    assert not torch.equal(tiled, whole), "it was not tiled"
    # attention sees its own tile only, so that the two are near and not equal
    assert (tiled - whole).norm() < 0.2 * whole.norm()
    assert_no_seam(tiled, whole, latents_module.TILE, latents_module.OVERLAP)


@torch.no_grad()
def test_tiles_are_the_whole_where_the_decoder_sees_no_further(small_tiles):
    vae, latents = random_vae(dataclasses.replace(TINY, attention_from=6)), smooth(24, 34)
    whole = vae.decode(STRATEGY.format.denormalise(latents))
    assert (STRATEGY.decode(vae, latents) - whole).abs().max() < 0.02 * whole.abs().max()


@torch.no_grad()
def test_ordinary_pictures_are_decoded_at_once(small_tiles):
    vae, latents = random_vae(TINY), smooth(30, 26)
    assert torch.equal(STRATEGY.decode(vae, latents), vae.decode(STRATEGY.format.denormalise(latents)))
