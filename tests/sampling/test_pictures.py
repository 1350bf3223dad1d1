import contextlib
import json
from dataclasses import dataclass, field

import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from library.config.sampling import SkipLayerGuidance
from library.diffusion.flow_path import FlowPath
from library.diffusion.samplers import SAMPLERS
from library.records import LatentFormat, NoisedLatents, TensorRecord
from library.sampling.pictures import encode_prompts, generate, parameters_text, save_picture
from library.sampling.prompts import PromptRequest


@dataclass(frozen=True)
class Text(TensorRecord):
    features: Tensor


class Strategy:
    """Every text becomes its length; the dropped one becomes -1."""

    def __init__(self):
        self.encoded = []

    def tokenize(self, captions):
        self.encoded += captions
        return Text(torch.tensor([[float(len(caption))] for caption in captions]))

    def encode(self, encoders, tokens):
        return Text(encoders["one"](tokens.features))

    def drop(self, text, dropped):
        return Text(torch.where(dropped[:, None], -1.0, text.features))

    def for_negatives(self):
        return self


class Latents:
    format = LatentFormat(channels=3, stride=2, patch=2, scale=2.0, shift=0.5)

    def decode(self, vae, latents):
        assert latents.dtype == next(vae.parameters()).dtype
        assert not torch.is_autocast_enabled("cpu")
        return vae(latents.repeat_interleave(2, -1).repeat_interleave(2, -2))


@dataclass
class Family:
    """Its denoiser pulls every latent to ``features / 10``, or to ``features / 5`` with blocks left out."""

    latents: Latents = field(default_factory=Latents)
    asked: list = field(default_factory=list)
    skipped: tuple = ()

    def sampling_path(self, sampler, steps, resolution):
        t = torch.linspace(1, 0, steps + 1)
        return FlowPath(SAMPLERS[sampler], 3 * t / (1 + 2 * t))

    def predict(self, denoiser, noised: NoisedLatents, text: Text):
        self.asked.append((len(noised.x_t), self.skipped, noised.x_t.dtype, torch.is_autocast_enabled("cpu")))
        target = text.features[:, :, None, None] / (5 if self.skipped else 10)
        return denoiser((noised.x_t - target) / noised.sigma.view(-1, 1, 1, 1))

    @contextlib.contextmanager
    def skipping(self, denoiser, layers):
        self.skipped = tuple(layers)
        yield
        self.skipped = ()


def request(**changes) -> PromptRequest:
    return PromptRequest(
        **{"prompt": "12345", "negative_prompt": "ab", "width": 24, "height": 16, "seed": 3, "steps": 10, **changes}
    )


def texts_for(*requests) -> dict[str, Text]:
    return encode_prompts(Strategy(), {"one": nn.Identity()}, requests)


def make(asked: PromptRequest, *, family=None, **changes):
    family = family or Family()
    options = {"sampler": "euler", "device": "cpu", "dtype": torch.float32, **changes}
    vae = options.pop("vae", Identity())
    return generate(family, nn.Identity(), vae, texts_for(asked), asked, **options)


class Identity(nn.Module):
    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.nothing = nn.Parameter(torch.zeros((), dtype=dtype))
        self.seen = []

    def forward(self, x):
        self.seen.append(x)
        return x


def test_texts_are_encoded_once_and_the_empty_one_is_unconditional():
    strategy = Strategy()
    encoders = {"one": nn.Identity()}
    requests = [request(negative_prompt=""), request(), request(prompt="x", scale=1.0, negative_prompt="unused")]
    texts = encode_prompts(strategy, encoders, requests)
    assert strategy.encoded == ["12345", "", "ab", "x"]
    assert {prompt.text: record.features.tolist() for prompt, record in texts.items()} == {
        "12345": [[5.0]],
        "": [[-1.0]],
        "ab": [[2.0]],
        "x": [[1.0]],
    }


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_guidance_leads_away_from_the_negative_prompt(sampler, scale):
    vae = Identity()
    image, settings = make(request(scale=scale), sampler=sampler, vae=vae)
    assert image.size == (24, 16)
    assert image.mode == "RGB"
    wanted = 0.5 if scale == 1 else 0.2 + scale * 0.3
    assert torch.allclose(vae.seen[0], torch.full((1, 3, 16, 24), wanted), atol=1e-4)
    assert image.getpixel((3, 3)) == (min(255, round((wanted + 1) * 127.5)),) * 3
    assert settings["sampler"] == sampler


def test_one_batch_of_two_and_none_at_scale_one():
    family = Family()
    make(request(), family=family)
    assert family.asked == [(2, (), torch.float32, False)] * 10
    family = Family()
    make(request(scale=1.0), family=family)
    assert family.asked == [(1, (), torch.float32, False)] * 10


def test_skip_layer_guidance_acts_inside_its_window_alone():
    family, skip = Family(), SkipLayerGuidance(layers=(7, 8), scale=2.0, start=0.1, stop=0.4)
    make(request(), family=family, skip=skip)
    assert [(rows, layers) for rows, layers, *_ in family.asked] == [
        *[(2, ())] * 2,
        *[(2, ()), (1, (7, 8))] * 2,
        *[(2, ())] * 6,
    ]


def test_skip_layer_guidance_adds_the_difference():
    skip = SkipLayerGuidance(layers=(7,), scale=2.0, start=0.0, stop=1.0)
    vae = Identity()
    make(request(scale=1.0, steps=2), skip=skip, vae=vae)
    # In the last of two steps, the only one that acts: x_0 = 0.5 + 2 (0.5 - 1.0)
    assert torch.allclose(vae.seen[0], torch.full((1, 3, 16, 24), -0.5), atol=1e-4)


def test_the_seed_is_the_noise():
    seen = []
    make(request(seed=11, steps=1, scale=1.0), callback=lambda step, x_0: seen.append(x_0))

    class Keep(Family):
        def predict(self, denoiser, noised, text):
            seen.append(noised.x_t)
            return super().predict(denoiser, noised, text)

    make(request(seed=11, scale=1.0), family=Keep())
    expected = torch.randn(1, 3, 8, 12, generator=torch.Generator().manual_seed(11))
    assert torch.equal(seen[1], expected)
    make(request(seed=12, scale=1.0), family=Keep())
    assert not torch.equal(seen[-10], expected)


def test_global_random_state_is_left_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    make(request())
    assert torch.equal(before, torch.get_rng_state())


def test_half_precision_computes_in_autocast_but_keeps_fp32_between_steps_and_in_the_vae():
    family, vae = Family(), Identity()
    make(request(), family=family, dtype=torch.bfloat16, vae=vae)
    assert set(family.asked) == {(2, (), torch.float32, True)}
    assert vae.seen[0].dtype == torch.float32
    vae = Identity(torch.bfloat16)
    make(request(), dtype=torch.bfloat16, vae=vae)
    assert vae.seen[0].dtype == torch.bfloat16


def test_latents_that_are_no_numbers_are_refused():
    class Broken(Family):
        def predict(self, denoiser, noised, text):
            return noised.x_t * torch.nan

    with pytest.raises(ValueError, match="not finite"):
        make(request(), family=Broken())


def test_settings_hold_what_acted():
    _, settings = make(request(scale=1.0))
    assert "negative_prompt" not in settings
    _, settings = make(request(), skip=SkipLayerGuidance((7, 8), 2.8, 0.01, 0.2))
    assert settings["negative_prompt"] == "ab"
    assert settings["skip_layers"] == "7 8"


def test_png_holds_its_settings(tmp_path):
    settings = {"prompt": "ein Käse 🧀", "negative_prompt": "x, y", "width": 8, "height": 6, "steps": 4, "seed": 2**40}
    settings |= {"sampler": "euler", "scale": 4.5, "model": "a, b.safetensors"}
    path = tmp_path / "new folder" / "a.png"
    save_picture(Image.new("RGB", (8, 6), (1, 2, 3)), path, settings)
    assert [file.name for file in path.parent.iterdir()] == ["a.png"]
    with Image.open(path) as image:
        assert image.getpixel((0, 0)) == (1, 2, 3)
        assert json.loads(image.text["atelier"]) == settings
        assert image.text["parameters"] == (
            "ein Käse 🧀\nNegative prompt: x, y\n"
            'Steps: 4, Sampler: euler, CFG scale: 4.5, Seed: 1099511627776, Size: 8x6, Model: "a, b.safetensors"'
        )


def test_parameters_without_negative_prompt():
    assert parameters_text({"prompt": "a", "steps": 3}) == "a\nSteps: 3"
