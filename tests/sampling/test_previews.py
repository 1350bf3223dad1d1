import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

import tests.tiny
from library.families.sana.latents import SanaLatentStrategy
from library.records import LatentFormat
from library.sampling.previews import Previews, drawn_picture, fit_latent_colours, preview_path
from library.sampling.prompts import PromptRequest
from tools.miniature_sana import sana_weights

PHOTOS = sorted((Path(__file__).resolve().parents[2] / "examples" / "data" / "photos").glob("*.png"))
LATENTS = LatentFormat(channels=12, stride=4, patch=2, scale=3.0, shift=-0.2)


class MixingVae(nn.Module):
    """Mixes the pixels of a square, bent by ``bend``: 48 numbers to 12, as a trained VAE keeps some of each square."""

    def __init__(self, bend: float):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.bend, self.mix = bend, nn.Parameter(torch.randn(12, 48, generator=generator) / 7)
        flat = torch.zeros(3, 48)
        for channel in range(3):
            flat[channel, channel * 16 : channel * 16 + 16] = 1 / 4
        kept = torch.cat([flat, torch.randn(9, 48, generator=generator) / 7])  # mean colours, and some detail
        mixing = torch.linalg.qr(torch.randn(12, 12, generator=generator))[0]
        self.mix.data = mixing @ kept


class MixingLatents:
    format = LATENTS

    def encode(self, vae, pixels):
        assert pixels.dtype == vae.mix.dtype and not torch.is_autocast_enabled("cpu")
        squares = functional.pixel_unshuffle(pixels, 4)  # (1, 48, h, w)
        mixed = torch.einsum("bchw,dc->bdhw", squares, vae.mix)
        return mixed + vae.bend * torch.tanh(mixed)


def photo(path: Path, stride: int) -> torch.Tensor:
    image = Image.open(path).convert("RGB")
    image = image.resize((image.width // stride * stride, image.height // stride * stride))
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()[None] / 127.5 - 1


@torch.no_grad()
def unexplained(strategy, vae, colours) -> float:
    """What the map leaves of the photographs' variation around their mean colours."""
    wrong = around = 0.0
    for path in PHOTOS:
        pixels = photo(path, strategy.format.stride)
        seen = functional.avg_pool2d(pixels, strategy.format.stride)
        latents = strategy.format.normalise(strategy.encode(vae, pixels))
        wrong += float((colours(latents) - seen).square().sum())
        around += float((seen - seen.mean((2, 3), keepdim=True)).square().sum())
    return wrong / around


@pytest.mark.parametrize(("bend", "most"), [(0.0, 1e-6), (1.0, 0.05)])
def test_it_finds_the_colours_in_latents_that_tell_them(bend, most):
    vae = MixingVae(bend)
    with torch.autocast("cpu", torch.bfloat16):
        colours = fit_latent_colours(MixingLatents(), vae)
    assert colours.weights.shape == (12, 3) and colours.weights.dtype == torch.float32
    assert unexplained(MixingLatents(), vae, colours) < most


def test_it_finds_something_even_in_the_latents_of_a_random_dc_ae():
    from library.families.sana.dc_ae import DCAE

    vae = DCAE(tests.tiny.TINY_SANA.vae()).eval()
    vae.load_state_dict(sana_weights(0, tests.tiny.TINY_SANA)["vae"])
    strategy = SanaLatentStrategy("x")
    colours = fit_latent_colours(strategy, vae)
    assert colours.weights.shape == (32, 3)
    assert unexplained(strategy, vae, colours) < 0.9
    again = fit_latent_colours(strategy, vae)
    assert torch.equal(again.weights, colours.weights) and torch.equal(again.offset, colours.offset)


def test_it_is_fitted_in_the_type_of_the_vae():
    vae = MixingVae(0.0).bfloat16()
    assert unexplained(MixingLatents(), MixingVae(0.0), fit_latent_colours(MixingLatents(), vae)) < 0.01


def test_a_vae_that_overflows_is_refused():
    vae = MixingVae(0.0)
    vae.mix.data *= torch.inf
    with pytest.raises(ValueError, match=r"not finite in torch.float32; use --no_half_vae"):
        fit_latent_colours(MixingLatents(), vae)


def test_fitting_leaves_no_gradient_and_no_random_state_behind():
    torch.manual_seed(0)
    before, vae = torch.get_rng_state(), MixingVae(0.0)
    colours = fit_latent_colours(MixingLatents(), vae)
    assert torch.equal(before, torch.get_rng_state())
    assert not colours.weights.requires_grad and vae.mix.grad is None


def test_drawn_pictures_are_many_and_always_the_same():
    first, again, other = drawn_picture(64, 0), drawn_picture(64, 0), drawn_picture(64, 1)
    assert first.shape == (1, 3, 64, 64) and first.min() >= -1 and first.max() <= 1
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert len(first.flatten(2).unique(dim=2)[0, 0]) > 50


def test_previews_come_every_so_many_steps_and_not_at_the_last(tmp_path):
    colours = fit_latent_colours(MixingLatents(), MixingVae(0.0))
    request = PromptRequest(prompt="a", width=40, height=24, seed=1, steps=6)
    path = tmp_path / "new" / "run_000006_00_1.png"
    write = Previews(colours, 2).writer(request, path, {"prompt": "a", "seed": 1})
    assert preview_path(path).name == "run_000006_00_1_preview.png"
    shown = []
    for step in range(6):
        target = torch.zeros(1, 3, 24, 40)
        target[:, step % 3] = 0.5
        latents = LATENTS.normalise(MixingLatents().encode(MixingVae(0.0), target))
        write(step, latents.detach())
        if preview_path(path).exists():
            with Image.open(preview_path(path)) as image:
                shown.append((step, json.loads(image.text["atelier"])["steps_done"], image.size))
                last = image.convert("RGB").getpixel((20, 12))
    assert shown == [(1, 2, (40, 24)), (2, 2, (40, 24)), (3, 4, (40, 24)), (4, 4, (40, 24)), (5, 4, (40, 24))]
    assert last == pytest.approx((191, 128, 128), abs=1)  # of the fourth step
    assert [file.name for file in path.parent.iterdir()] == ["run_000006_00_1_preview.png"]


def test_the_finished_picture_takes_the_previews_place(tmp_path):
    from library.sampling.drawing import draw
    from library.sampling.pictures import encode_prompts
    from tests.sampling.test_pictures import Family, Identity, Strategy

    seen = []

    class Watched(Family):
        description = SimpleNamespace(sampling=SimpleNamespace(sampler="euler"))

        def predict(self, denoiser, noised, text):
            seen.append(sorted(file.name for file in tmp_path.iterdir()))
            return super().predict(denoiser, noised, text)

    family, request = Watched(), PromptRequest(prompt="a", width=24, height=16, seed=3, steps=4)
    family.latents.encode = lambda vae, pixels: functional.avg_pool2d(pixels, 2)
    vae = Identity()
    texts = encode_prompts(Strategy(), {"one": nn.Identity()}, [request])
    previews = Previews(fit_latent_colours(family.latents, vae), 1)
    options = {"device": "cpu", "dtype": torch.float32, "skip": None, "previews": previews, "facts": {"model": "m"}}
    draw(family, nn.Identity(), vae, texts, request, tmp_path / "x.png", **options)
    assert seen == [[], ["x_preview.png"], ["x_preview.png"], ["x_preview.png"]]
    assert [file.name for file in tmp_path.iterdir()] == ["x.png"]
    with Image.open(tmp_path / "x.png") as image:
        settings = json.loads(image.text["atelier"])
    assert settings["model"] == "m" and settings["sampler"] == "euler" and "steps_done" not in settings
