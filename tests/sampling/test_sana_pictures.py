"""Sana's pictures, and the whole way to them, against diffusers' pipeline on the miniature."""

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

import tests.tiny
from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.diffusion.samplers import dpmpp_2m, euler
from library.families import create_family, family_options
from library.families.sana.tokenizers import INSTRUCTION
from library.records import Resolution
from library.sampling import previews
from library.sampling.generate_command import main
from library.sampling.pictures import encode_prompts, generate
from library.sampling.prompts import PromptRequest
from tools.miniature_sana import make_sana

CPU = {"device": "cpu", "dtype": torch.float32}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The miniature as diffusers keeps it."""
    return make_sana(tmp_path_factory.mktemp("sana"), layout="diffusers", sizes=tests.tiny.TINY_SANA)


@pytest.fixture(scope="module")
def family(folder):
    options = family_options("sana")
    groups = {name: group() for name, group in options.OBJECTIVE_GROUPS.items()}
    model = ModelConfig(pretrained_model_name_or_path=str(folder))
    return create_family(
        "sana", SimpleNamespace(model=model, family=options.OPTIONS(), memory=MemoryConfig(), **groups)
    )


@pytest.fixture(scope="module")
def parts(family):
    return SimpleNamespace(
        strategy=family.text_strategy(),
        encoders=family.load_text_encoders(**CPU),
        denoiser=family.load_denoiser(**CPU),
        vae=family.load_vae(**CPU),
    )


def toy_velocity(x: torch.Tensor, sigma: float) -> torch.Tensor:
    """The velocity where the estimate of x_0 is a smooth function of the noised latents."""
    return (x - torch.tanh(0.7 * x + sigma)) / sigma


def theirs(scheduler, x: torch.Tensor) -> torch.Tensor:
    for sigma, timestep in zip(scheduler.sigmas, scheduler.timesteps):
        x = scheduler.step(toy_velocity(x, float(sigma)), timestep, x, return_dict=False)[0]
    return x


@pytest.mark.reference
@pytest.mark.parametrize("steps", [1, 2, 4, 14, 20, 28])
def test_levels_and_samplers_are_those_of_the_published_schedule(family, steps):
    diffusers = pytest.importorskip("diffusers")
    published = diffusers.DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    published.set_timesteps(steps)
    sigmas = family.sampling_sigmas(steps, Resolution(1024, 1024))
    torch.testing.assert_close(sigmas, published.sigmas, atol=1e-6, rtol=0)
    assert (sigmas[:-1] * 1000).floor().tolist() == published.timesteps.tolist()

    x = torch.randn(1, 32, 4, 4, generator=torch.Generator().manual_seed(1))

    def denoise(x_t, sigma):
        return x_t - sigma * toy_velocity(x_t, sigma)

    torch.testing.assert_close(dpmpp_2m(denoise, x, sigmas), theirs(published, x), atol=1e-5, rtol=0)
    first_order = diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0)
    first_order.set_timesteps(sigmas=sigmas[:-1].tolist())
    torch.testing.assert_close(euler(denoise, x, sigmas), theirs(first_order, x), atol=1e-5, rtol=0)


@pytest.mark.reference
@pytest.mark.parametrize(
    ("options", "size", "computed_at"),
    [
        ({"scale": 4.5}, (96, 64), None),
        ({"scale": 1.0}, (64, 64), None),
        ({"scale": 3.0, "negative_prompt": "a dog"}, (64, 96), None),
        ({"scale": 4.5}, (300, 200), (1216, 832)),
    ],
    ids=["guidance", "no guidance", "negative prompt", "binning"],
)
def test_pictures_are_those_of_diffusers(folder, family, parts, options, size, computed_at):
    diffusers = pytest.importorskip("diffusers")
    request = PromptRequest(prompt="a cup of coffee", width=size[0], height=size[1], seed=5, steps=5, **options)
    request = PromptRequest(**{**vars(request), "computed_at": computed_at and Resolution(*computed_at)})
    estimates = []
    picture, settings = generate(
        family,
        parts.denoiser,
        parts.vae,
        encode_prompts(parts.strategy, parts.encoders, [request]),
        request,
        callback=lambda step, x_0: estimates.append(x_0),
        **CPU,
    )
    assert settings["sampler"] == "dpmpp_2m"
    width, height = computed_at or size
    noise = torch.randn(1, 32, height // 32, width // 32, generator=torch.Generator().manual_seed(request.seed))
    pipe = diffusers.SanaPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)

    def ask(**how):
        return pipe(
            request.prompt,
            negative_prompt=request.negative_prompt,
            guidance_scale=request.scale,
            num_inference_steps=5,
            width=size[0],
            height=size[1],
            latents=noise,
            use_resolution_binning=computed_at is not None,
            complex_human_instruction=INSTRUCTION.split("\n"),  # their own has other quotes than the training's
            **how,
        ).images

    torch.testing.assert_close(estimates[-1], ask(output_type="latent"), atol=1e-4, rtol=1e-4)
    (their_picture,) = ask()
    assert picture.size == their_picture.size == size
    difference = (levels(picture) - levels(their_picture)).abs()
    if computed_at is None:
        assert difference.max() <= 1
    else:  # their resize takes single pixels where ours takes means, and random weights give noise
        assert difference.mean() < 40
        assert settings["computed_at"] == "1216x832"


def levels(image: Image.Image) -> torch.Tensor:
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).float()


# Training and generate.py


@pytest.fixture
def train(trainer, folder):
    """Trains Sana for two steps with these options; returns the exit code."""
    from accelerate.state import AcceleratorState, PartialState

    from library.cli import main as cli_main

    def trained(output: str, **options) -> int:
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        settings = {"pretrained_model_name_or_path": folder, "max_train_steps": 2, "network_dim": 4, **options}
        try:
            return cli_main("sana", job="adapter", argv=trainer.arguments(output, **settings))
        finally:
            logging.getLogger().handlers.clear()

    return trained


def pictures(folder) -> dict[str, Image.Image]:
    return {path.name: Image.open(path) for path in sorted(folder.iterdir())}


def settings_of(image: Image.Image) -> dict:
    return json.loads(image.text["atelier"])


@pytest.mark.parametrize("cached", [False, True], ids=["encoders", "cached"])
def test_a_sample_in_training_is_the_picture_that_generate_makes(train, folder, tmp_path, monkeypatch, cached):
    shown, save = [], previews.save_picture

    def watched(image, path, settings):
        save(image, path, settings)
        shown.append((path.name, image.size, settings["steps_done"]))

    monkeypatch.setattr(previews, "save_picture", watched)
    library = tmp_path / "library.json"
    library.write_text(json.dumps({"cat": "a cat --d 5 --n a dog", "dog": "a dog --d 6 --w 100 --h 60 --l 1"}))
    sampling = {
        "sample_prompts": library,
        "sample_every_n_steps": 2,
        "validation_resolution": "160x96,96",
        "validation_num_inference_steps": 4,
        "preview_every": 3,
        "sana_image_size": 512,
    }
    caches = {"cache_latents": True, "cache_text_encoder_outputs": True} if cached else {}
    assert train("out", **sampling, **caches, network_train_unet_only=True) == 0
    assert shown == [
        ("run_000002_00_cat_5_preview.png", (160, 96), 3),
        ("run_000002_01_cat_5_preview.png", (96, 96), 3),
        ("run_000002_02_dog_6_preview.png", (100, 60), 3),
    ]
    samples = pictures(tmp_path / "out" / "sample")
    assert list(samples) == ["run_000002_00_cat_5.png", "run_000002_01_cat_5.png", "run_000002_02_dog_6.png"]
    assert [image.size for image in samples.values()] == [(160, 96), (96, 96), (100, 60)]
    found = [settings_of(image) for image in samples.values()]
    assert [entry["computed_at"] for entry in found] == ["640x384", "512x512", "640x384"]
    assert {entry["sampler"] for entry in found} == {"dpmpp_2m"} and {entry["steps"] for entry in found} == {4}
    assert [entry["scale"] for entry in found] == [4.5, 4.5, 1.0]

    words = ["--pretrained_model_name_or_path", str(folder), "--mixed_precision", "no", "--device", "cpu"]
    words += ["--sana_image_size", "512", "--steps", "4", "--width", "160", "--height", "96", "--output_name", "x"]
    words += ["--sample_prompts", str(library), "--preview_every", "2"]
    adapter = ["--network_weights", str(tmp_path / "out" / "run.safetensors")]
    assert main([*words, *adapter, "--output_dir", str(tmp_path / "made")]) == 0
    made = pictures(tmp_path / "made")
    assert list(made) == ["x_000_cat_5.png", "x_001_dog_6.png"]
    most = 1 if cached else 0  # caches encode prompts in batches, whose company moves the last bits
    for one, other in (("x_000_cat_5.png", "run_000002_00_cat_5.png"), ("x_001_dog_6.png", "run_000002_02_dog_6.png")):
        assert (levels(made[one]) - levels(samples[other])).abs().max() <= most
    assert main([*words, "--output_dir", str(tmp_path / "base")]) == 0
    assert pictures(tmp_path / "base")["x_000_cat_5.png"].tobytes() != made["x_000_cat_5.png"].tobytes()


def test_generate_knows_sana_and_its_defaults(folder, tmp_path, capsys):
    words = ["--pretrained_model_name_or_path", str(folder), "--prompt", "a cat", "--dry_run"]
    assert main([*words, "--width", "500", "--height", "333"]) == 0
    said = capsys.readouterr().out
    for part in ("model: Sana-1.5", "'steps': 20", "'scale': 4.5", "'sampler': 'dpmpp_2m'", "(width=1216, height=832)"):
        assert part in said
    assert main([*words, "--width", "500", "--no-use_resolution_binning"]) == 2
    assert "error: --width 500 isn't a multiple of 32" in capsys.readouterr().err
    assert main([*words, "--preview_every", "20"]) == 2
    assert "error: --preview_every 20 does nothing: no picture has more than 20 steps" in capsys.readouterr().err


def test_the_derived_settings_are_said(train, tmp_path, capsys):
    given = {"validation_prompt": "a cat", "sample_every_n_steps": 2, "dry_run": True}
    assert train("out", **given, validation_guidance=3) == 0
    said = capsys.readouterr().out
    for line in (
        'sample_sampler = "dpmpp_2m"  # derived: Sana',
        "validation_num_inference_steps = 20  # derived: Sana",
        "validation_guidance = 3.0  # typed",
        "use_resolution_binning = true  # derived: Sana",
    ):
        assert line in said
