"""Training a ControlNet: what is learnt, saved and refused."""

import functools
import json
import re

import pytest
import torch
from PIL import Image, ImageFilter
from safetensors import safe_open

from library.records import NoisedLatents
from tests.conftest import Trainer

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}


@pytest.fixture
def edges(photos, tmp_path):
    """The photographs' edges."""
    folder = tmp_path / "edges"
    folder.mkdir()
    for path in photos.glob("*.png"):
        picture = Image.open(path).convert("RGB")
        picture.filter(ImageFilter.FIND_EDGES).save(folder / path.name)
    return folder


@pytest.fixture
def trainer(tiny_sd_file, photos, tmp_path):
    return Trainer(tiny_sd_file, photos, tmp_path, "sd", "control_net")


@pytest.fixture
def dataset(trainer, edges):
    """Writes a dataset TOML with control pictures."""

    def write(subset=""):
        return trainer.dataset(subset=f"conditioning_data_dir = {json.dumps(str(edges))}\n{subset}")

    return write


@pytest.fixture
def run(trainer, dataset):
    return lambda output, **options: trainer(output, **{"dataset_config": dataset(), **options})


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def errors(capsys):
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]


def test_the_control_net_alone_learns_and_others_read_it(run, trainer, monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    from library.training import setup

    runs, train = [], setup.train

    def watched(made):
        before = {name: tensor.clone() for name, tensor in made.denoiser.state_dict().items()}
        train(made)
        runs.append((made, before))

    monkeypatch.setattr(setup, "train", watched)
    options = {**CACHED, "max_train_steps": 10}
    assert run("out", **options, learning_rate=3e-3, save_model_as="diffusers", save_every_n_steps=5) == 0
    assert run("still", **options, learning_rate=1e-12) == 0  # the same noise at the same levels
    learnt, still = (list(trainer.losses(output).values()) for output in ("out", "still"))
    assert learnt[0] == still[0] and sum(learnt[-4:]) < sum(still[-4:])
    made, before = runs[0]
    assert equal(made.denoiser.state_dict(), before)
    own = made.trainable.control_net
    assert own.zero_convs[0][0].weight.any() and own.input_hint_block[14].weight.any()
    saved = trainer.folder / "out" / "run"
    theirs = diffusers.ControlNetModel.from_pretrained(saved, local_files_only=True)
    generator = torch.Generator().manual_seed(0)
    question = torch.randn(1, 4, 8, 8, generator=generator)
    text, picture = torch.randn(1, 77, 64, generator=generator), torch.rand(1, 3, 64, 64, generator=generator)
    with torch.no_grad():
        down, mid = theirs(question, torch.tensor([600]), text, controlnet_cond=picture, return_dict=False)
        for one, other in zip(own(question, torch.tensor([600]), text, picture), [*down, mid], strict=True):
            assert torch.allclose(one, other, atol=1e-5 * other.abs().max())
    with safe_open(saved / "diffusion_pytorch_model.safetensors", "pt") as file:
        metadata = file.metadata()
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/controlnet"
    assert metadata["ss_steps"] == "10" and "ss_network_module" not in metadata
    again = trainer.folder / "out" / "run-step00000005"
    assert run("next", **CACHED, controlnet_model_name_or_path=again, max_train_steps=1, learning_rate=1e-9) == 0
    with safe_open(again / "diffusion_pytorch_model.safetensors", "pt") as file:
        for name, tensor in trainer.weights("next").items():
            assert torch.allclose(tensor, file.get_tensor(name), atol=1e-7), name


def test_a_resumed_run_with_everything_ends_with_the_same_bytes(run, trainer, dataset):
    options = {
        "dataset_config": dataset("flip_aug = true\nrandom_crop = true"),
        "cache_text_encoder_outputs": True,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": True,
        "mixed_precision": "bf16",
        "use_ema": True,
        "validation_split": 0.25,
        "max_train_steps": 3,
    }
    assert run("whole", **options, save_every_n_steps=2, save_state=True) == 0
    state = trainer.folder / "whole" / "run-step00000002-state"
    assert run("resumed", **options, resume=state, max_data_loader_n_workers=1) == 0
    assert equal(trainer.weights("whole"), trainer.weights("resumed"))
    assert trainer.losses("resumed") == {3: trainer.losses("whole")[3]}


def test_what_saves_memory_changes_nothing_and_the_control_pictures_do(run, trainer, edges):
    same = {**CACHED, "max_train_steps": 3, "max_grad_norm": 0}
    assert run("plain", **same) == 0
    assert run("lean", **same, gradient_checkpointing=True, fused_backward_pass=True) == 0
    assert equal(trainer.weights("plain"), trainer.weights("lean"))
    assert trainer.losses("plain") == trainer.losses("lean")
    for path in edges.iterdir():
        Image.new("RGB", Image.open(path).size, "red").save(path)
    assert run("red", **same) == 0
    first, second = trainer.losses("plain"), trainer.losses("red")
    # the first loss is the base model's; the picture's encoder ends in a layer of zeros, too, which learns in step 2
    assert first[1] == second[1] and first[3] != second[3]


def test_the_first_answer_is_the_base_models(run, trainer, dataset):
    from library.families.sd.checkpoint import load_unet
    from library.nn.attention import sdpa

    def act(made):
        batch = next(made.batches)
        assert batch.control.shape == (2, 3, 64, 64) and 0 <= batch.control.min() < batch.control.max() <= 1
        text = made.text.drop(batch.text, batch.dropped)
        noised = NoisedLatents(x_t=batch.noise, sigma=torch.tensor([0.2, 0.9]), control=batch.control)
        unet = load_unet(made.family.files, attention=sdpa, device="cpu", dtype=torch.float32)
        plain = NoisedLatents(x_t=batch.noise, sigma=noised.sigma)
        with torch.no_grad():
            steered, base = made.family.predict(made.denoiser, noised, text), made.family.predict(unet, plain, text)
        return torch.equal(steered, base)

    assert trainer.with_run("out", act, **CACHED, dataset_config=dataset())


def test_samples_follow_their_control_pictures(run, trainer, edges):
    Image.new("RGB", (64, 64), "red").save(trainer.folder / "red.png")
    prompts = trainer.folder / "prompts.txt"
    same = "a cat --w 64 --h 64 --s 1 --l 1 --d 5 --cn"
    prompts.write_text(f"{same} {edges / 'coffee.png'}\n{same} {trainer.folder / 'red.png'}\n")
    options = {"sample_prompts": prompts, "sample_at_first": True, "sample_every_n_steps": 2}
    assert run("out", **CACHED, **options, max_train_steps=2, learning_rate=0.05) == 0
    pictures = {path.name[:-6]: Image.open(path) for path in (trainer.folder / "out" / "sample").iterdir()}
    coffee, red, first, second = (pictures[name].tobytes() for name in sorted(pictures))
    assert coffee != red and first == second  # before the first step it changes nothing
    assert json.loads(pictures["run_000002_01"].text["atelier"])["control"].endswith("red.png")


def test_its_forecast_counts_it(run, capsys):
    assert run("out", **CACHED, dry_run=True) == 0
    (told,) = [line for line in capsys.readouterr().out.splitlines() if "the step's peak" in line]
    assert re.search(r"trained weights 4\.\d MiB", told), told


@pytest.mark.slow
def test_two_processes_learn_what_one_does(run, trainer, dataset):
    same = {**CACHED, "dataset_config": dataset(), "max_train_steps": 2, "optimizer_type": "SGDNesterov"}
    assert run("one", **same, gradient_accumulation_steps=2) == 0
    trainer.launch(2, "two", **same)
    one, two = trainer.weights("one"), trainer.weights("two")
    assert all(torch.allclose(one[name], two[name], rtol=1e-4, atol=1e-6) for name in one)


def test_control_pictures_that_are_missing_or_of_another_shape_are_named(run, edges, capsys):
    (edges / "coffee.png").unlink()
    assert run("out", **CACHED) == 2
    (line,) = errors(capsys)
    assert "no control picture for 1 of 4 pictures: coffee.png. A control picture is named like its picture" in line
    Image.new("RGB", (100, 300)).save(edges / "coffee.png")
    assert run("out", **CACHED) == 2
    (line,) = errors(capsys)
    assert "1 control picture of another shape than the picture: coffee.png is 100x300, its picture 600x400" in line
    (edges / "coffee.png").write_bytes((edges / "clock_motion.png").read_bytes()[:3000])
    assert run("out", **CACHED) == 2
    assert "1 control picture can't be read" in errors(capsys)[0]


def test_what_can_not_be_is_said_before_anything_is_loaded(run, trainer, dataset, capsys, monkeypatch):
    refused = functools.partial(run, "out", **CACHED)
    for options, told in (
        ({"learning_rate": None}, "--learning_rate is missing: a ControlNet has no safe default"),
        ({"unet_lr": 1e-4}, "--unet_lr is for adapters"),
        ({"text_encoder_lr": 1e-4}, "--text_encoder_lr does nothing"),
        ({"save_model_as": "pth"}, "--save_model_as pth: a ControlNet is written as safetensors or diffusers"),
        ({"masked_loss": True}, "--masked_loss does nothing without masks (alpha_mask; conditioning_data_dir has"),
        ({"network_dim": 4}, "unknown option --network_dim"),
        ({"stream_modulation": True}, "--stream_modulation does nothing for Stable Diffusion 1.x"),
        ({"blocks_to_swap": 99}, "--blocks_to_swap 99: the model has"),
        (
            {"controlnet_model_name_or_path": trainer.checkpoint},
            "--controlnet_model_name_or_path: " + str(trainer.checkpoint) + " looks like",
        ),
        ({"dataset_config": trainer.dataset()}, "conditioning_data_dir is missing: a ControlNet learns from"),
        ({"dataset_config": dataset("is_regularisation_data = true")}, "is_regularisation_data needs an adapter"),
        ({"dataset_config": dataset("unmasked_weight = 0.5")}, "unmasked_weight does nothing without masks"),
    ):
        assert refused(**options) == 2
        assert any(told in line for line in errors(capsys)), told
    prompts = trainer.folder / "prompts.txt"
    for line, told in (
        ("a cat", "prompts.txt, line 1: the control picture is missing, by which the ControlNet steers; add --cn"),
        ("a cat --cn no.png", "prompts.txt, line 1: the control picture 'no.png' can't be read: No such file"),
    ):
        prompts.write_text(line)
        assert refused(sample_prompts=prompts, sample_at_first=True) == 2
        assert any(told in line for line in errors(capsys)), told
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert refused() == 2
    assert "a ControlNet is half a model and its base model isn't trained" in errors(capsys)[0]
