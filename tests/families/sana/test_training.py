"""Training adapters on Sana end to end: what the family brings along must survive the whole way."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from library.families.sana.linear_dit import LinearDiT
from library.io.safetensors import save_tensors
from networks.loading import load_adapter

ROOT = Path(__file__).resolve().parents[3]
EXAMPLE = ROOT / "examples" / "sana" / "resolutions_dataset.toml"
UNET_ONLY = {"network_train_unet_only": True, "max_train_steps": 3}
CACHED = {**UNET_ONLY, "cache_latents": True, "cache_text_encoder_outputs": True}


@pytest.fixture
def sana(trainer, sana_file):
    return dataclasses.replace(trainer, checkpoint=sana_file, family="sana")


def metadata_of(trainer, output):
    with safe_open(trainer.folder / output / "run.safetensors", "pt") as file:
        return file.metadata()


@pytest.fixture
def seen(monkeypatch):
    """The shapes of the latents that the denoiser was asked about."""
    forward, shapes = LinearDiT.forward, []

    def watched(self, x_t, *args, **kwargs):
        shapes.append(tuple(x_t.shape))
        return forward(self, x_t, *args, **kwargs)

    monkeypatch.setattr(LinearDiT, "forward", watched)
    return shapes


def small(path, photos, folder):
    """The example over a few photographs, at an eighth of its sizes."""
    text = path.read_text()
    for old, new in (("256", "32"), ("512", "64"), ("1024", "128"), ("2048", "256")):
        text = text.replace(f"= {old}\n", f"= {new}\n")
    text = text.replace('"examples/data/photos"', json.dumps(str(photos)))
    (folder / path.name).write_text(text)
    return folder / path.name


@pytest.mark.usefixtures("unforeseen")
def test_the_same_pictures_at_two_resolutions(sana, seen):
    dataset = small(EXAMPLE, sana.photos, sana.folder)
    options = {**CACHED, "dataset_config": dataset, "max_train_epochs": 1, "max_train_steps": None}
    assert sana("out", **options) == 0
    areas = [(rows, height * width) for rows, _, height, width in seen]
    assert {area for _, area in areas} == {4, 15, 16}, "latents of 64 px, and of 128 px in two shapes"
    assert sum(rows for rows, area in areas if area == 4) == sum(rows for rows, area in areas if area > 4) == 4
    assert max(rows for rows, area in areas if area > 4) == 2, "each has its own batch size"
    datasets = json.loads(metadata_of(sana, "out")["ss_datasets"])
    assert len(datasets) == 2
    online = {name: value for name, value in options.items() if not name.startswith("cache")}
    assert sana("online", **online) == 0
    assert sana.losses("online") == pytest.approx(sana.losses("out"), rel=1e-3)


def test_the_published_flow_is_the_default_and_is_written_down(sana):
    assert sana("out", **CACHED) == 0
    metadata = metadata_of(sana, "out")
    assert metadata["ss_training_shift"] == "3.0" and metadata["ss_weighting_scheme"] == "sigma_sqrt"
    assert "ss_logit_mean" in metadata and "ss_mode_scale" not in metadata
    assert metadata["modelspec.architecture"] == "sana-1.5/lora"


FLOWS = {
    "shift 0.1": ({"flow_schedule_shift": 0.1}, {"ss_training_shift": "0.1"}),
    "shift 4": ({"flow_schedule_shift": 4}, {"ss_training_shift": "4.0"}),
    "auto shift": ({"flow_schedule_auto_shift": True}, {"ss_flow_schedule_auto_shift": "True"}),
    "uniform": ({"flow_use_uniform_schedule": True}, {}),
}


def test_every_schedule_changes_the_run_and_is_written_down(sana):
    assert sana("plain", **CACHED) == 0
    for name, (options, expected) in FLOWS.items():
        assert sana(name, **CACHED, **options) == 0
        assert sana.losses(name) != sana.losses("plain"), name
        metadata = metadata_of(sana, name)
        assert {key: metadata[key] for key in expected} == expected
        assert ("ss_training_shift" in metadata) == ("flow_schedule_auto_shift" not in options)


def test_the_prefix_and_the_window_reach_the_features(sana):
    prefix = sana.folder / "prefix.txt"
    prefix.write_text("Draw: ")
    losses = []
    for name, options in {
        "own": {},
        "file": {"sana_prompt_prefix": prefix},
        "short": {"sana_max_token_length": 4},
    }.items():
        (sana.photos / "camera.txt").write_text("A RED Circle on a blue table")
        assert sana(name, **{**CACHED, "max_train_steps": 1}, **options) == 0
        losses.append(tuple(sana.losses(name).values()))
    assert len(set(losses)) == len(losses)


def test_the_saved_adapter_is_the_trained_one(sana):
    assert sana("out", **CACHED, save_format="both") == 0
    family = sana.with_run("again", lambda run: run.family, **CACHED)
    x_t, context = torch.randn(2, 32, 2, 3), torch.randn(2, 5, family.denoiser.context_width)
    answers = []
    with torch.no_grad():
        for stem in (None, "run", "run_diffusers"):
            denoiser = family.load_denoiser(device="cpu", dtype=torch.float32)
            if stem:
                load_adapter(
                    sana.folder / "out" / f"{stem}.safetensors", {"denoiser": denoiser}, family.adapter_targets
                )
            answers.append(denoiser(x_t, torch.tensor([900.0, 100.0]), context))
    base, kohya, diffusers = answers
    assert (kohya - base).abs().max() > 1e-3
    assert (kohya - diffusers).abs().max() < 1e-5


def test_a_stopped_run_goes_on_to_the_same_bytes(sana):
    assert sana("whole", **{**CACHED, "max_train_steps": 4}) == 0
    assert sana("first", **{**CACHED, "max_train_steps": 2}, save_state=True) == 0
    state = sana.folder / "first" / "run-state"
    assert sana("second", **{**CACHED, "max_train_steps": 4}, resume=state) == 0
    whole, again = sana.weights("whole"), sana.weights("second")
    assert whole.keys() == again.keys() and all(torch.equal(whole[name], again[name]) for name in whole)


def test_gemma_is_trained_when_asked(sana):
    options = {"max_train_steps": 2, "cache_latents": True, "network_args": ["train_gemma=true"]}
    assert sana("out", **options) == 0
    names = sana.weights("out")
    assert any(name.startswith("lora_te1_layers_0_self_attn") for name in names)
    assert any(name.startswith("lora_unet_") for name in names)


def test_samples_are_drawn_at_sizes_of_every_shape(sana):
    prompts = sana.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --l 4.5\na dog --w 128 --h 64 --s 2 --l 4.5 --n blurred\n")
    assert sana("out", **CACHED, sample_prompts=prompts, sample_at_first=True, sample_sampler="dpmpp_2m") == 0
    assert len(list((sana.folder / "out" / "sample").glob("*.png"))) == 2


def test_weights_of_the_first_sana_train(sana):
    """Without norms of queries and keys, in NVlabs' file beside the other parts."""
    from safetensors.torch import load_file

    prefix = "model.diffusion_model."
    tensors = load_file(sana.checkpoint)
    denoiser = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and "q_norm" not in name and "k_norm" not in name
    }
    torch.save({"state_dict": denoiser, "epoch": 3}, sana.folder / "sana.pth")
    save_tensors({k: v for k, v in tensors.items() if k.startswith("first_")}, sana.folder / "vae.safetensors", {})
    parts = {"vae": sana.folder / "vae.safetensors", "gemma": sana.checkpoint, "tokenizer_dir": sana.checkpoint.parent}
    assert sana("out", **CACHED, pretrained_model_name_or_path=sana.folder / "sana.pth", **parts) == 0
    assert metadata_of(sana, "out")["modelspec.architecture"] == "sana/lora"
