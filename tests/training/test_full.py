"""Full fine-tuning: the same loop, with the model itself as what is trained."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.training.gradients import bundles
from tests.training.ranks import in_processes

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
JOBS = ("full_trainer", "sana_trainer")


@pytest.fixture(params=JOBS)
def job(request):
    return request.getfixturevalue(request.param)


def base(trainer, prefix="model.diffusion_model."):
    tensors = load_file(trainer.checkpoint)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def own(trainer, output, stem="run"):
    """The denoiser's tensors of a saved file, without prefix."""
    return {name.removeprefix("model.diffusion_model."): t for name, t in trainer.weights(output, stem).items()}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_every_weight_learns_and_the_file_is_the_next_base(job):
    assert job("out", **CACHED) == 0
    before, after = base(job), own(job, "out")
    assert after.keys() == before.keys() and all(t.dtype == torch.float32 for t in after.values())
    frozen = {name for name in before if torch.equal(before[name], after[name])}
    assert frozen <= {"pos_embed"}  # a table, not a parameter
    with safe_open(job.folder / "out" / "run.safetensors", "pt") as file:
        metadata = file.metadata()
    assert not metadata["modelspec.architecture"].endswith("/lora")
    assert metadata["ss_steps"] == "4" and "ss_network_module" not in metadata and "sshs_model_hash" not in metadata
    again = {"pretrained_model_name_or_path": job.folder / "out" / "run.safetensors", "vae": job.checkpoint}
    encoders = ("clip_l", "clip_g", "t5xxl") if job.family == "sd3" else ("gemma",)
    again |= {name: job.checkpoint for name in encoders} | {"tokenizer_dir": job.checkpoint.parent}
    assert job("next", **CACHED, **again, max_train_steps=1, learning_rate=0) == 0
    assert equal(own(job, "next"), after)


def test_a_resumed_run_under_autocast_ends_with_the_same_bytes(job):
    options = {**CACHED, "gradient_accumulation_steps": 2, "mixed_precision": "bf16", "max_train_steps": 4}
    assert job("whole", **options) == 0
    assert job("parts", **options, save_every_n_steps=3, save_state=True) == 0
    state = job.folder / "parts" / "run-step00000003-state"
    assert equal(job.weights("whole"), job.weights("parts"))
    assert job("resumed", **options, resume=state, max_data_loader_n_workers=1) == 0
    assert equal(job.weights("whole"), job.weights("resumed"))
    assert job.losses("resumed") == {4: job.losses("whole")[4]}


def test_what_is_computed_again_changes_nothing(job):
    again = {"gradient_checkpointing": True, "gradient_checkpointing_keep_attention": True}
    assert job("plain", **CACHED) == 0
    assert job("again", **CACHED, **again) == 0
    assert equal(job.weights("plain"), job.weights("again")) and job.losses("plain") == job.losses("again")


def test_pure_bf16_keeps_and_writes_bf16(job):
    assert job("out", **CACHED, mixed_precision="bf16", full_bf16=True) == 0
    assert all(tensor.dtype == torch.bfloat16 for tensor in job.weights("out").values())


def test_diffusers_loads_the_folder_and_answers_the_same(job):
    from diffusers import SanaTransformer2DModel, SD3Transformer2DModel

    kind = SanaTransformer2DModel if job.family == "sana" else SD3Transformer2DModel
    assert job("single", **CACHED) == 0
    assert job("folder", **CACHED, save_model_as="diffusers", save_every_n_steps=2) == 0
    assert sorted(path.name for path in (job.folder / "folder" / "run").iterdir()) == ["transformer"]
    theirs = kind.from_pretrained(job.folder / "folder" / "run", subfolder="transformer")
    assert (job.folder / "folder" / "run-step00000002" / "transformer" / "config.json").is_file()

    latents = torch.randn(1, 32 if job.family == "sana" else 16, 4, 4, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([500.0])

    def answer(run):
        encoded = torch.randn(1, 7, theirs.config.get("caption_channels") or theirs.config.joint_attention_dim)
        with torch.no_grad():
            if job.family == "sana":
                mask = torch.ones(1, 7, dtype=torch.bool)
                ours = run.denoiser(latents, timestep, encoded, mask)
                return ours, theirs(latents, encoded, timestep, encoder_attention_mask=mask.float()).sample
            pooled = torch.randn(1, theirs.config.pooled_projection_dim)
            ours = run.denoiser(latents, timestep, encoded, pooled)
            return ours, theirs(latents, encoded, pooled, timestep).sample

    again = {"pretrained_model_name_or_path": job.folder / "single" / "run.safetensors", "vae": job.checkpoint}
    encoders = ("clip_l", "clip_g", "t5xxl") if job.family == "sd3" else ("gemma",)
    again |= {name: job.checkpoint for name in encoders} | {"tokenizer_dir": job.checkpoint.parent}
    ours, expected = job.with_run("again", answer, **CACHED, **again)
    torch.testing.assert_close(ours, expected, atol=2e-5, rtol=1e-4)


def test_a_whole_pipeline_is_written(job):
    from diffusers import DiffusionPipeline

    parts = {"save_model_as": "diffusers", "save_parts": ["vae", "text_encoders"], "max_train_steps": 1}
    assert job("out", **CACHED, **parts) == 0
    pipeline = DiffusionPipeline.from_pretrained(job.folder / "out" / "run")
    options = {"width": 64, "height": 64, "num_inference_steps": 1}
    if job.family == "sana":
        options |= {"use_resolution_binning": False, "complex_human_instruction": None}
    assert pipeline("a cat", **options).images[0].size == (64, 64)
    # and it is a base model like any other
    assert job("next", **CACHED, pretrained_model_name_or_path=job.folder / "out" / "run", max_train_steps=1) == 0


def test_a_single_file_carries_the_rest_over_as_it_was(full_trainer):
    options = {**CACHED, "max_train_steps": 1, "save_precision": "bf16"}
    assert full_trainer("out", **options, save_parts=["vae", "text_encoders"]) == 0
    saved, before = full_trainer.weights("out"), load_file(full_trainer.checkpoint)
    assert saved.keys() == before.keys()
    for name, tensor in saved.items():
        if name.startswith("model.diffusion_model."):
            assert tensor.dtype == torch.bfloat16
        else:
            assert torch.equal(tensor, before[name])


def test_nvlabs_checkpoint(sana_trainer):
    assert sana_trainer("out", **CACHED, max_train_steps=1) == 0
    assert sana_trainer("pth", **CACHED, max_train_steps=1, save_model_as="pth") == 0
    stored = torch.load(sana_trainer.folder / "pth" / "run.pth", weights_only=True)
    assert equal(stored["state_dict"], sana_trainer.weights("out"))


def test_clips_are_trained_and_written_only_when_asked_for(full_trainer):
    options = {"cache_latents": True, "max_train_steps": 2, "save_parts": ["text_encoders"]}
    assert full_trainer("none", **options) == 0
    assert full_trainer("one", **options, train_text_encoder=True, text_encoder_lr=[1e-3, 0]) == 0
    before = load_file(full_trainer.checkpoint)
    for output, trained in (("none", set()), ("one", {"clip_l"})):
        changed = set()
        for name, tensor in full_trainer.weights(output).items():
            if name.startswith("text_encoders.") and name in before and not torch.equal(tensor, before[name]):
                changed.add(name.split(".")[1])
        assert changed == trained
    assert {entry for line in full_trainer.log("one") for entry in line if entry.startswith("lr/")} == {
        "lr/unet",
        "lr/textencoder 1",
    }


def test_trained_clips_resume(full_trainer):
    options = {"train_text_encoder": True, "cache_latents": True, "max_train_steps": 3, "mixed_precision": "bf16"}
    assert full_trainer("whole", **options, save_every_n_steps=2, save_state=True) == 0
    state = full_trainer.folder / "whole" / "run-step00000002-state"
    assert full_trainer("resumed", **options, resume=state) == 0
    assert equal(full_trainer.weights("whole"), full_trainer.weights("resumed"))


def test_old_folders_go(job):
    options = {"save_model_as": "diffusers", "save_every_n_steps": 1, "save_last_n_steps": 2}
    assert job("out", **CACHED, **options) == 0
    names = sorted(path.name for path in (job.folder / "out").iterdir() if (path / "transformer").is_dir())
    assert names == ["run", "run-step00000002", "run-step00000003"] or names == ["run", "run-step00000003"]


def test_two_processes_equal_one_that_accumulates(sana_trainer):
    options = {**CACHED, "optimizer_type": "SGDNesterov", "learning_rate": 1e-3, "max_train_steps": 2}
    assert in_processes(2, lambda rank: sana_trainer("two", **options)) == [0, 0]
    assert sana_trainer("one", **options, gradient_accumulation_steps=2) == 0
    one, two = sana_trainer.weights("one"), sana_trainer.weights("two")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)


def test_samples_and_validation_see_the_trained_model(job):
    prompts = job.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2 --d 1\n")
    options = {
        **CACHED,
        "sample_prompts": prompts,
        "sample_at_first": True,
        "sample_every_n_steps": 4,
        "validation_split": 0.3,
        "validate_every_n_steps": 2,
    }
    assert job("out", **options) == 0
    pictures = {path.read_bytes() for path in (job.folder / "out" / "sample").glob("*.png")}
    assert len(pictures) == 2
    losses = [line["loss/validation"] for line in job.log("out") if "loss/validation" in line]
    assert len(losses) == 2 and losses[0] != losses[1]


def test_a_state_of_an_adapter_is_refused(full_trainer, trainer, capsys):
    assert (
        trainer("adapter", **CACHED, network_train_unet_only=True, max_train_steps=1, save_state_on_train_end=True) == 0
    )
    capsys.readouterr()
    assert full_trainer("full", **CACHED, resume=trainer.folder / "adapter" / "run-state") == 2
    assert "what it trains is something else" in capsys.readouterr().err


def test_sana_has_a_learning_rate_of_its_own_and_no_clip(sana_trainer, full_trainer, capsys):
    assert full_trainer("out", **CACHED, learning_rate=None) == 2
    assert "--learning_rate is missing" in capsys.readouterr().err
    assert sana_trainer("out", **CACHED, train_text_encoder=True) == 2
    assert "--train_text_encoder does nothing" in capsys.readouterr().err


def test_too_large_for_fp16_is_told_in_one_line(full_trainer, capsys):
    with pytest.MonkeyPatch.context() as patch:
        from library.training import full_job

        original = full_job.FullModel.component_weights

        def with_a_giant(self):
            weights = original(self)
            weights["denoiser"]["final_layer.linear.bias"] = torch.full_like(
                weights["denoiser"]["final_layer.linear.bias"], 1e6
            )
            return weights

        patch.setattr(full_job.FullModel, "component_weights", with_a_giant)
        assert full_trainer("out", **CACHED, max_train_steps=1, save_precision="fp16") == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "can't be saved" in line and "--save_precision" in line
    assert not (full_trainer.folder / "out" / "run.safetensors").exists()


def test_the_resolved_configuration_runs_again(job):
    assert job("out", **CACHED, max_train_steps=2) == 0
    path = job.folder / "out" / "run-run.toml"
    assert job("out", config_file=path, **CACHED, max_train_steps=2) == 0
    assert json.loads((job.folder / "out" / "run-log.jsonl").read_text().splitlines()[-1])["step"] == 2
    assert Path(path).read_text().startswith(f"# What {job.script} does")


def test_bundles_hold_one_type_and_about_so_many_numbers():
    parameters = [
        torch.nn.Parameter(torch.zeros(size, dtype=dtype))
        for size, dtype in (
            (3, torch.float32),
            (3, torch.float32),
            (9, torch.float32),
            (1, torch.bfloat16),
            (1, torch.bfloat16),
        )
    ]
    sizes = [[parameter.numel() for parameter in bundle] for bundle in bundles(parameters, 6)]
    assert sizes == [[3, 3], [9], [1, 1]]
