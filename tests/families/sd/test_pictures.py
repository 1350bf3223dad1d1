"""Whole pictures of Stable Diffusion 1.x and 2.x against diffusers' pipeline, and what a seed means."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from library.config.ddpm import DdpmConfig
from library.config.loss import LossConfig
from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.config.samplers import DDPM_SAMPLERS
from library.families.sd.family import create
from library.families.sd.options import SdOptions
from library.randomness import torch_generator
from library.sampling.pictures import encode_prompts, generate
from library.sampling.prompts import PromptRequest
from tests.tiny import TINY_SD, TINY_SD2
from tools.miniature_sd import make_sd

CPU = {"device": "cpu", "dtype": torch.float32}
STEPS = 8
SIZES = {"sd1": TINY_SD, "sd2-v": TINY_SD2}
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
KARRAS = {"use_karras_sigmas": True}
THEIRS = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", KARRAS),
    "unipc": ("UniPCMultistepScheduler", KARRAS),
}


@pytest.fixture(scope="module", params=SIZES)
def tiny(request, tmp_path_factory):
    """A miniature: 1.x predicts the noise, 2.x the velocity."""
    folder, how = tmp_path_factory.mktemp(request.param), {"sizes": SIZES[request.param], "variant": request.param}
    return SimpleNamespace(
        file=make_sd(folder / "single", **how),
        folder=make_sd(folder / "diffusers", layout="diffusers", **how),
        is_v2=request.param != "sd1",
    )


@pytest.fixture(scope="module")
def pipe(tiny):
    """diffusers' pipeline with the same weights."""
    diffusers = pytest.importorskip("diffusers")
    made = diffusers.StableDiffusionPipeline.from_pretrained(tiny.folder)
    made.set_progress_bar_config(disable=True)
    return made


def family_of(tiny, *, zero_terminal_snr=False, **options):
    return create(
        SimpleNamespace(
            model=ModelConfig(pretrained_model_name_or_path=str(tiny.file)),
            family=SdOptions(**options),
            ddpm=DdpmConfig(v_parameterization=tiny.is_v2, zero_terminal_snr=zero_terminal_snr),
            loss=LossConfig(),
            memory=MemoryConfig(),
        )
    )


class Watched(nn.Module):
    """A VAE that keeps the latents that it decodes."""

    def __init__(self, vae):
        super().__init__()
        self.vae = vae
        self.seen = []

    def decode(self, raw):
        self.seen.append(raw)
        return self.vae.decode(raw)


def draw(family, request, **changes):
    """The normalised latents, the picture, and the estimates on the way."""
    estimates, vae = [], Watched(family.load_vae(**CPU))
    texts = encode_prompts(family.text_strategy(), family.load_text_encoders(**CPU), [request])
    image, settings = generate(
        family,
        family.load_denoiser(**CPU),
        vae,
        texts,
        request,
        callback=lambda step, x_0: estimates.append(x_0),
        **{**CPU, **changes},
    )
    return SimpleNamespace(
        latents=family.latents.format.normalise(vae.seen[0]), image=image, settings=settings, estimates=estimates
    )


def request(**changes):
    defaults = {"width": 128, "height": 64, "seed": 5, "steps": STEPS, "scale": 7.5, "sampler": "ddim"}
    return PromptRequest(**{"prompt": "a cup of coffee", **defaults, **changes})


def scheduler_of(sampler, tiny, **changes):
    diffusers = pytest.importorskip("diffusers")
    name, own = THEIRS[sampler]
    kind = getattr(diffusers, name)
    prediction = "v_prediction" if tiny.is_v2 else "epsilon"
    settings = {"timestep_spacing": "leading", **SCHEDULE, **own, "prediction_type": prediction, **changes}
    return kind(**settings)


def theirs(pipe, asked, scheduler, monkeypatch, **how):
    """What diffusers' pipeline makes of the request, with our noise."""
    noise = torch.randn(1, 4, asked.height // 8, asked.width // 8, generator=torch.Generator().manual_seed(asked.seed))
    fresh = (
        torch.randn(noise.shape, generator=torch_generator(asked.seed, "fresh noise", step)) for step in range(1000)
    )
    module = pytest.importorskip("diffusers.schedulers.scheduling_euler_ancestral_discrete")
    monkeypatch.setattr(module, "randn_tensor", lambda *_, **__: next(fresh))
    pipe.scheduler = scheduler
    return pipe(
        asked.prompt,
        negative_prompt=asked.negative_prompt,
        num_inference_steps=asked.steps,
        guidance_scale=asked.scale,
        width=asked.width,
        height=asked.height,
        latents=noise,
        **how,
    ).images


def assert_close(actual, expected, tolerance=1e-4):
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.reference
@pytest.mark.parametrize(
    ("sampler", "options"),
    [
        *((sampler, {}) for sampler in DDPM_SAMPLERS),
        ("ddim", {"negative_prompt": "a dog"}),
        ("dpmpp_2m", {"scale": 1.0, "steps": 20}),
    ],
)
def test_latents_are_those_of_diffusers(tiny, pipe, monkeypatch, sampler, options):
    asked = request(sampler=sampler, **options)
    drawn = draw(family_of(tiny), asked)
    expected = theirs(pipe, asked, scheduler_of(sampler, tiny), monkeypatch, output_type="latent")
    assert_close(drawn.latents, expected)


@pytest.mark.reference
@pytest.mark.parametrize("tiny", ["sd2-v"], indirect=True)
@pytest.mark.parametrize("sampler", DDPM_SAMPLERS)
def test_a_schedule_that_ends_in_noise_is_walked_from_its_end(tiny, pipe, monkeypatch, sampler):
    asked = request(sampler=sampler)
    drawn = draw(family_of(tiny, zero_terminal_snr=True), asked)
    ending = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    expected = theirs(pipe, asked, scheduler_of(sampler, tiny, **ending), monkeypatch, output_type="latent")
    # their DDIM has no signal at all in the last timestep, where the others, and we, have 2^-24 of its variance
    assert_close(drawn.latents, expected, 1e-3 if sampler == "ddim" else 1e-4)


@pytest.mark.reference
def test_pictures_are_those_of_diffusers(tiny, pipe, monkeypatch):
    asked = request(sampler="dpmpp_2m")
    drawn = draw(family_of(tiny), asked)
    (expected,) = theirs(pipe, asked, scheduler_of("dpmpp_2m", tiny), monkeypatch)
    assert drawn.image.size == expected.size == (128, 64)
    assert (levels(drawn.image) - levels(expected)).abs().max() <= 1
    assert drawn.settings["sampler"] == "dpmpp_2m"


def levels(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int()


def test_fresh_noise_is_a_function_of_seed_and_step(tiny):
    family, asked = family_of(tiny), request(sampler="euler_a", steps=3, width=64)
    first = draw(family, asked)
    torch.randn(100)
    assert torch.equal(draw(family, asked).latents, first.latents)
    other = draw(family, dataclasses.replace(asked, sampler="euler"))
    assert torch.equal(other.estimates[0], first.estimates[0])  # the first noise is the same
    assert not torch.allclose(other.estimates[1], first.estimates[1], atol=1e-2)


def test_prompts_are_read_as_captions_are(tiny):
    asked = request(steps=2, width=64, prompt="a (cup:1.5) of coffee", negative_prompt="a [dog]")
    plain = draw(family_of(tiny), asked).latents
    pictures = [
        draw(family_of(tiny, **options), asked).latents for options in ({"weighted_captions": True}, {"clip_skip": 2})
    ]
    assert all(not torch.allclose(made, plain, atol=1e-3) for made in pictures)
    long = dataclasses.replace(asked, prompt=" ".join(["a cup of coffee"] * 40))
    short, whole = (draw(family_of(tiny, max_token_length=length), long).latents for length in ("75", "150"))
    assert not torch.allclose(short, whole, atol=1e-3)
