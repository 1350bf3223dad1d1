"""From training to files to pictures, on a tiny model: what was trained is what others load and what pictures show."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.families import create_family, family_options
from library.families.sd3.family import Sd3Family
from library.families.sd3.mmdit import MMDiT
from library.io.safetensors import save_tensors
from library.records import NoisedLatents
from library.sampling.generate_command import main as generate_main
from library.sampling.pictures import encode_prompts, generate
from library.sampling.prompts import PromptRequest
from library.training import setup
from networks.loading import load_adapter
from tests.tiny import TINY_SD3
from tools.miniature_sd3 import make_sd3

ROOT = Path(__file__).resolve().parents[1]
CPU = {"device": "cpu", "dtype": torch.float32}
UNET_ONLY = {"network_train_unet_only": True, "max_train_steps": 3}
CACHED = {**UNET_ONLY, "cache_latents": True, "cache_text_encoder_outputs": True}
WITH_ENCODERS = {"max_train_steps": 3, "cache_latents": True}
CAPTIONS = ["a red cat", "", "a cup of coffee on a table"]
PREFIXES = {
    "denoiser": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "clip_l": "text_encoders.clip_l.transformer.",
    "clip_g": "text_encoders.clip_g.transformer.",
    "t5xxl": "text_encoders.t5xxl.transformer.",
}


class Model:
    """The tiny model as it lies on disk, freshly loaded."""

    def __init__(self, path):
        options = family_options("sd3")
        groups = {group: kind() for group, kind in options.OBJECTIVE_GROUPS.items()}
        model = ModelConfig(pretrained_model_name_or_path=str(path))
        self.family = create_family(
            "sd3", SimpleNamespace(model=model, family=options.OPTIONS(), memory=MemoryConfig(), **groups)
        )
        self.strategy = self.family.text_strategy()
        self.roots = {"denoiser": self.family.load_denoiser(**CPU), **self.family.load_text_encoders(**CPU)}

    def with_adapter(self, path, strength=1.0):
        load_adapter(str(path), self.roots, self.family.adapter_targets, strength)
        return self

    def merged_by_hand(self, path):
        """With a file in kohya's spelling, from its definition: W + alpha / rank * up @ down."""
        tensors = load_file(path)
        weights = {
            prefix + name.removesuffix(".weight").replace(".", "_"): parameter
            for prefix, component in {"lora_unet_": "denoiser", "lora_te1_": "clip_l", "lora_te2_": "clip_g"}.items()
            for name, parameter in self.roots[component].named_parameters()
            if name.endswith(".weight")
        }
        with torch.no_grad():
            for key in [key for key in tensors if key.endswith(".lora_down.weight")]:
                name = key.removesuffix(".lora_down.weight")
                down, up = tensors.pop(key), tensors.pop(f"{name}.lora_up.weight")
                product = up.flatten(1) @ down.flatten(1)  # a convolution's too
                weights[name] += tensors.pop(f"{name}.alpha") / len(down) * product.view_as(weights[name])
        assert not tensors
        return self

    def text(self):
        return answered_text(self.strategy, self.roots)

    def velocity(self, text):
        return answered_velocity(self.family, self.roots["denoiser"], text)


@torch.no_grad()
def answered_text(strategy, encoders):
    return strategy.encode(encoders, strategy.tokenize(CAPTIONS))


@torch.no_grad()
def answered_velocity(family, denoiser, text):
    return family.predict(denoiser, noised(), text)


def noised() -> NoisedLatents:
    x_t = torch.randn(len(CAPTIONS), 16, 8, 12, generator=torch.Generator().manual_seed(1))
    return NoisedLatents(x_t=x_t, sigma=torch.tensor([0.9, 0.5, 0.1]))


def assert_close(actual, expected, tolerance=1e-4):
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max()


def equal(first: dict, second: dict) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def log_of(trainer, output) -> list[dict]:
    lines = (trainer.folder / output / "run-log.jsonl").read_text().splitlines()
    return [entry for entry in map(json.loads, lines) if "loss/current" in entry]


def saved(trainer, output, suffix="") -> Path:
    return trainer.folder / output / f"run{suffix}.safetensors"


def first_loss(trainer, output) -> float:
    return trainer.losses(output)[1]


def other_checkpoint(trainer, path: Path):
    """The same trainer with another model."""
    return type(trainer)(path, trainer.photos, trainer.folder)


def updates(weights: dict) -> dict[str, torch.Tensor]:
    """The change of every layer's weight, from the file's definition."""
    names = [key.removesuffix(".alpha") for key in weights if key.endswith(".alpha")]
    return {
        name: weights[f"{name}.alpha"]
        / len(weights[f"{name}.lora_down.weight"])
        * (weights[f"{name}.lora_up.weight"] @ weights[f"{name}.lora_down.weight"])
        for name in names
    }


@pytest.fixture
def runs(monkeypatch) -> list:
    """The runs that the trainer has finished, with the models that they trained."""
    finished, train = [], setup.train

    def kept(run):
        finished.append(run)
        train(run)

    monkeypatch.setattr(setup, "train", kept)
    return finished


@pytest.fixture(scope="module")
def tiny_folder(tmp_path_factory) -> Path:
    """The tiny model in diffusers' layout."""
    return make_sd3(tmp_path_factory.mktemp("folder"), sizes=TINY_SD3, layout="diffusers")


@pytest.fixture(scope="module")
def tiny_tensors(tiny_file) -> dict[str, torch.Tensor]:
    return load_file(tiny_file)


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")


# What was trained is what is loaded


@pytest.mark.parametrize("options", [CACHED, WITH_ENCODERS], ids=["denoiser", "denoiser and encoders"])
def test_a_loaded_file_is_the_model_that_was_trained(trainer, runs, options):
    assert trainer("out", **options, network_alpha=1, network_args=["emb_dims=[3,3,3,3,3,3]"]) == 0
    (run,) = runs
    run.trainable.eval()
    loaded = Model(trainer.checkpoint).with_adapter(saved(trainer, "out"))
    merged = Model(trainer.checkpoint).merged_by_hand(saved(trainer, "out"))
    base = Model(trainer.checkpoint)
    text = loaded.text()
    if run.text_encoders:
        of_run = answered_text(run.text, run.text_encoders)
        assert equal(of_run.tensors(), text.tensors())
        assert not torch.allclose(text.pooled, base.text().pooled, atol=1e-3)
    else:
        assert equal(text.tensors(), base.text().tensors())
    velocity = loaded.velocity(text)
    assert torch.equal(velocity, answered_velocity(run.family, run.denoiser, text))
    assert_close(merged.velocity(merged.text()), velocity)
    assert not torch.allclose(velocity, base.velocity(text), atol=1e-2)
    assert not torch.allclose(velocity, base.with_adapter(saved(trainer, "out"), 0.5).velocity(text), atol=1e-3)


@pytest.mark.reference
@pytest.mark.parametrize("options", [CACHED, WITH_ENCODERS], ids=["denoiser", "denoiser and encoders"])
def test_diffusers_loads_what_was_trained(trainer, tiny_folder, options):
    diffusers = pytest.importorskip("diffusers")
    args = ["emb_dims=[0,3,3,3,3,3]", "x_mlp_dim=5"]
    assert trainer("out", **options, save_format="both", network_alpha=1, network_args=args) == 0
    file = saved(trainer, "out", "_diffusers")
    with_kohya = Model(trainer.checkpoint).with_adapter(saved(trainer, "out"))
    with_theirs = Model(trainer.checkpoint).with_adapter(file)
    text = with_kohya.text()
    velocity = with_kohya.velocity(text)
    assert_close(with_theirs.velocity(with_theirs.text()), velocity)

    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    before = their_velocity(pipe, text)
    pipe.load_lora_weights(str(file.parent), weight_name=file.name)
    with torch.no_grad():
        context, _, pooled, _ = pipe.encode_prompt(CAPTIONS, CAPTIONS, CAPTIONS, do_classifier_free_guidance=False)
    assert_close(pooled, text.pooled)
    assert_close(context, text.context(TINY_SD3.t5_width))
    assert_close(their_velocity(pipe, text), velocity)
    assert not torch.allclose(before, velocity, atol=1e-2)


@torch.no_grad()
def their_velocity(pipe, text):
    asked = noised()
    return pipe.transformer(asked.x_t, text.context(TINY_SD3.t5_width), text.pooled, asked.sigma * 1000).sample


# Pictures


@pytest.mark.reference
@pytest.mark.parametrize(
    ("options", "theirs"),
    [
        ({"scale": 1.0}, {}),
        ({"scale": 4.0}, {}),
        ({"scale": 2.5, "negative_prompt": "a dog"}, {}),
        (
            {"scale": 4.0},
            {"skip_guidance_layers": [1], "skip_layer_guidance_scale": 2.0}
            | {"skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.8},
        ),
    ],
    ids=["no guidance", "guidance", "negative prompt", "skip-layer guidance"],
)
def test_pictures_are_those_of_diffusers(tiny_file, tiny_folder, options, theirs):
    diffusers = pytest.importorskip("diffusers")
    from library.config.sampling import SkipLayerGuidance

    skip = SkipLayerGuidance((1,), 2.0, 0.2, 0.8) if theirs else None
    model = Model(tiny_file)
    request = PromptRequest(prompt="a cup of coffee", width=96, height=64, seed=5, steps=5, **options)
    texts = encode_prompts(model.strategy, model.roots, [request])
    estimates = []
    picture, _ = generate(
        model.family,
        model.roots["denoiser"],
        model.family.load_vae(**CPU),
        texts,
        request,
        sampler="euler",
        skip=skip,
        callback=lambda step, x_0: estimates.append(x_0),
        **CPU,
    )
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(tiny_folder)
    pipe.set_progress_bar_config(disable=True)
    noise = torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(request.seed))

    def ask(**how):
        return pipe(
            request.prompt,
            negative_prompt=options.get("negative_prompt"),
            guidance_scale=request.scale,
            width=request.width,
            height=request.height,
            latents=noise,
            **theirs,
            **how,
        ).images

    latents = ask(num_inference_steps=5, output_type="latent")
    assert_close(estimates[-1], latents)
    levels = torch.linspace(1, 3 / 1002, 5).tolist()  # the same levels, given: their scheduler shifts them
    assert_close(ask(sigmas=levels, num_inference_steps=5, output_type="latent"), latents)
    (their_picture,) = ask(num_inference_steps=5)
    assert picture.size == their_picture.size
    assert largest_difference(picture, their_picture) <= 1


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    first, second = (torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).int() for image in (one, other))
    return int((first - second).abs().max())


def picture_words(checkpoint, folder, *words) -> list[str]:
    return [
        *("--pretrained_model_name_or_path", str(checkpoint), "--prompt", "a cat", "--seed", "5", "--steps", "3"),
        *("--width", "64", "--height", "32", "--mixed_precision", "no", "--device", "cpu"),
        *("--output_dir", str(folder), *map(str, words)),
    ]


def test_generate_shows_the_trained_adapter_at_its_strength(trainer):
    assert trainer("out", **WITH_ENCODERS, save_format="both") == 0
    file, diffusers_file = saved(trainer, "out"), saved(trainer, "out", "_diffusers")

    def picture(name, *words) -> Image.Image:
        assert generate_main(picture_words(trainer.checkpoint, trainer.folder / name, *words)) == 0
        (path,) = (trainer.folder / name).iterdir()
        return Image.open(path)

    base = picture("base")
    trained = picture("trained", "--network_weights", file)
    assert picture("silent", "--network_weights", file, "--network_mul", 0).tobytes() == base.tobytes()
    assert trained.tobytes() != base.tobytes()
    assert largest_difference(picture("other", "--network_weights", diffusers_file), trained) <= 1
    settings = json.loads(trained.text["atelier"])
    assert settings["network"] == "run.safetensors x 1" and settings["prompt"] == "a cat" and settings["seed"] == 5
    assert "network" not in json.loads(base.text["atelier"])

    words = picture_words(trainer.checkpoint, trainer.folder / "typed", "--network_weights", file)
    subprocess.run([sys.executable, "generate.py", *words], cwd=ROOT, check=True, capture_output=True)
    (typed,) = (trainer.folder / "typed").iterdir()
    assert Image.open(typed).tobytes() == trained.tobytes()


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("trained", [CACHED, WITH_ENCODERS], ids=["denoiser", "denoiser and encoders"])
def test_a_sample_in_training_is_the_picture_that_generate_makes(trainer, trained, precision):
    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 32 --d 5 --s 3 --l 5\n")
    sampling = {"sample_prompts": prompts, "sample_every_n_steps": 3}
    options = {**trained, **sampling, "mixed_precision": precision, "network_dropout": 0.5}
    assert trainer("out", **options) == 0
    (sample,) = (trainer.folder / "out" / "sample").iterdir()
    adapter = ["--network_weights", saved(trainer, "out"), "--mixed_precision", precision]
    assert generate_main(picture_words(trainer.checkpoint, trainer.folder / "made", *adapter)) == 0
    (made,) = (trainer.folder / "made").iterdir()
    assert Image.open(sample).tobytes() == Image.open(made).tobytes()


# Where an adapter starts, where it goes, how large it gets


def test_training_goes_on_from_a_saved_adapter(trainer):
    still = {**CACHED, "learning_rate": 1e-12, "max_train_steps": 1}
    assert trainer("first", **CACHED, save_format="both") == 0
    before = trainer.weights("first")
    for suffix in ("", "_diffusers"):
        file = saved(trainer, "first", suffix)
        assert trainer(f"on{suffix}", **still, network_weights=file) == 0
        after = trainer.weights(f"on{suffix}")
        for name, update in updates(before).items():
            assert_close(updates(after)[name], update)
    assert trainer("fresh", **still) == 0
    assert first_loss(trainer, "on") == pytest.approx(first_loss(trainer, "on_diffusers"), rel=1e-5)
    assert abs(first_loss(trainer, "on") - first_loss(trainer, "fresh")) > 1e-3
    assert first_loss(trainer, "fresh") == first_loss(trainer, "first")


def test_ranks_come_from_the_file(trainer):
    args = ["x_mlp_dim=3", "train_block_indices=0,1"]
    assert trainer("first", **WITH_ENCODERS, network_args=args) == 0
    own = {"network_dim": None, "network_alpha": None, "network_weights": saved(trainer, "first")}
    assert trainer("second", **WITH_ENCODERS, **own, dim_from_weights=True) == 0
    first, second = trainer.weights("first"), trainer.weights("second")
    assert {name: tensor.shape for name, tensor in first.items()} == {
        name: tensor.shape for name, tensor in second.items()
    }
    assert {len(second[name]) for name in second if name.endswith("lora_down.weight")} == {2, 3}
    assert not equal(first, second)
    assert first_loss(trainer, "second") != first_loss(trainer, "first")
    with safe_open(saved(trainer, "second"), "pt") as file:
        assert file.metadata()["ss_network_dim"] == "Dynamic"
    groups = [list(entry) for entry in (log_of(trainer, "first")[0], log_of(trainer, "second")[0])]
    assert groups[0] == groups[1], "the parameter groups stand in another order"


def test_a_component_that_the_file_leaves_without_an_adapter_is_named(trainer, capsys):
    assert trainer("first", **CACHED) == 0
    own = {"network_dim": None, "network_alpha": None, "network_weights": saved(trainer, "first")}
    assert trainer("second", **WITH_ENCODERS, **own, dim_from_weights=True) == 0
    assert "has nothing for clip_l, clip_g, which get no adapter" in capsys.readouterr().err
    assert trainer.weights("first").keys() == trainer.weights("second").keys()


def test_base_weights_change_the_start_and_stay_out_of_the_file(trainer):
    one = {**CACHED, "max_train_steps": 1, "network_alpha": 1}
    assert trainer("first", **CACHED, network_alpha=1) == 0
    file = saved(trainer, "first")
    assert trainer("plain", **one) == 0
    assert trainer("merged", **one, base_weights=[file]) == 0
    assert trainer("half", **one, base_weights=[file], base_weights_multiplier=[0.5]) == 0
    assert trainer("none", **one, base_weights=[file], base_weights_multiplier=[0]) == 0
    assert trainer("twice", **one, base_weights=[file, file], base_weights_multiplier=[0.25, 0.75]) == 0
    assert trainer("on", **one, network_weights=file) == 0
    losses = {name: first_loss(trainer, name) for name in ("plain", "merged", "half", "none", "twice", "on")}
    assert losses["none"] == losses["plain"]
    assert losses["merged"] == pytest.approx(losses["on"], rel=1e-5) == pytest.approx(losses["twice"], rel=1e-5)
    assert len({round(losses[name], 4) for name in ("plain", "half", "merged")}) == 3
    largest = max(update.norm() for update in updates(trainer.weights("merged")).values())
    assert largest < 0.8 * max(update.norm() for update in updates(trainer.weights("first")).values())


def test_base_weights_of_text_encoders_act_where_captions_are_cached(trainer):
    assert trainer("first", **WITH_ENCODERS, network_train_text_encoder_only=True) == 0
    merged = {**UNET_ONLY, "max_train_steps": 1, "base_weights": [saved(trainer, "first")]}
    cache = {"cache_text_encoder_outputs_to_disk": True, "cache_dir": trainer.folder / "cache"}
    assert trainer("plain", **UNET_ONLY, **cache) == 0  # leaves captions without the merged weights in the cache
    assert trainer("online", **merged) == 0
    assert trainer("cached", **merged, **cache) == 0
    assert trainer("half", **merged, **cache, base_weights_multiplier=[0.5]) == 0
    assert first_loss(trainer, "cached") == pytest.approx(first_loss(trainer, "online"), rel=1e-5)
    losses = [first_loss(trainer, name) for name in ("plain", "half", "cached")]
    assert min(abs(losses[0] - losses[1]), abs(losses[1] - losses[2])) > 1e-5 * losses[0]


def test_weight_norms_are_limited(trainer):
    assert trainer("free", **CACHED) == 0
    assert trainer("limited", **CACHED, scale_weight_norms=0.05) == 0
    free, limited = (
        [update.norm().item() for update in updates(trainer.weights(name)).values()] for name in ("free", "limited")
    )
    assert max(free) > 0.1 and max(limited) <= 0.05 * (1 + 1e-5)
    assert log_of(trainer, "limited")[-1]["max_norm/keys_scaled"] > 0
    assert log_of(trainer, "limited")[-1]["max_norm/max_key_norm"] == pytest.approx(max(limited), rel=1e-4)
    assert "max_norm/keys_scaled" not in log_of(trainer, "free")[-1]


@pytest.mark.parametrize(
    ("args", "kept"),
    [
        (["train_block_indices=1"], lambda name: "joint_blocks_1_" in name),
        (["train_block_indices=0,2"], lambda name: "joint_blocks_0_" in name or "joint_blocks_2_" in name),
        (["context_attn_dim=0", "context_mlp_dim=0", "context_mod_dim=0"], lambda name: "context_block" not in name),
    ],
)
def test_what_is_left_out_of_the_adapter_is_not_in_the_file(trainer, args, kept):
    assert trainer("all", **CACHED, max_train_epochs=None) == 0
    assert trainer("some", **CACHED, network_args=args) == 0
    everything, some = set(trainer.weights("all")), set(trainer.weights("some"))
    assert some == {name for name in everything if kept(name)} and some != everything
    with safe_open(saved(trainer, "some"), "pt") as file:
        assert json.loads(file.metadata()["ss_network_args"]) == dict(arg.split("=") for arg in args)


# What captions do


def test_silenced_encoders_make_captions_irrelevant_in_training_but_not_in_samples(trainer):
    every = {"clip_l_dropout_rate": 1.0, "clip_g_dropout_rate": 1.0, "t5_dropout_rate": 1.0}
    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 32 --d 5 --s 2 --l 1\na dog --w 64 --h 32 --d 5 --s 2 --l 1\n")
    sampling = {"sample_prompts": prompts, "sample_every_n_steps": 3}
    assert trainer("one", **CACHED, **every, **sampling) == 0
    assert trainer("t5", **CACHED, t5_dropout_rate=1.0) == 0
    assert trainer("plain", **CACHED) == 0
    for caption in trainer.photos.glob("*.txt"):
        caption.write_text("something else")
    assert trainer("other", **CACHED, **every) == 0
    assert trainer("other t5", **CACHED, t5_dropout_rate=1.0) == 0
    assert trainer.losses("one") == trainer.losses("other")
    assert equal(trainer.weights("one"), trainer.weights("other"))
    assert first_loss(trainer, "t5") != first_loss(trainer, "other t5")
    assert first_loss(trainer, "plain") not in (first_loss(trainer, "one"), first_loss(trainer, "t5"))
    cat, dog = (Image.open(path) for path in sorted((trainer.folder / "one" / "sample").iterdir()))
    assert cat.tobytes() != dog.tobytes()


def test_validation_sees_whole_captions_and_pictures_as_they_are(trainer):
    every = {"clip_l_dropout_rate": 1.0, "clip_g_dropout_rate": 1.0, "t5_dropout_rate": 1.0}
    subset = "caption_dropout_rate = 1.0\nflip_aug = true"
    varied = {"dataset_config": trainer.dataset(subset=subset, general="validation_split = 0.5"), **every}
    plain = {"dataset_config": trainer.dataset(general="validation_split = 0.5")}
    still = {**CACHED, "learning_rate": 1e-12, "validate_every_n_steps": 3}
    measured = []
    for name, options in (("varied", varied), ("plain", plain)):
        assert trainer(name, **still, **options) == 0
        lines = (trainer.folder / name / "run-log.jsonl").read_text().splitlines()
        measured += [entry["loss/validation"] for entry in map(json.loads, lines) if "loss/validation" in entry]
    assert measured[0] == pytest.approx(measured[1], rel=1e-6)
    assert first_loss(trainer, "varied") != first_loss(trainer, "plain")


# Where the model lies and how it is stored


@pytest.mark.parametrize("kind", ["fp16", "bf16", "fp8"])
def test_a_checkpoint_in_few_bits_trains_as_its_numbers_do(trainer, tiny_tensors, kind):
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}[kind]
    narrow = {
        name: tensor.to(dtype if kind != "fp8" or (tensor.ndim == 2 and "text_encoders.clip" not in name) else None)
        for name, tensor in tiny_tensors.items()
    }
    tokenizers = {"tokenizer_dir": trainer.checkpoint.parent}
    save_tensors(narrow, trainer.folder / "narrow.safetensors", {})
    save_tensors(narrow, trainer.folder / "wide.safetensors", {}, dtype=torch.float32)
    for name in ("narrow", "wide"):
        assert other_checkpoint(trainer, trainer.folder / f"{name}.safetensors")(name, **CACHED, **tokenizers) == 0
    assert trainer("exact", **CACHED) == 0
    # not bit for bit: how tensors lie in memory decides which instructions multiply them
    assert trainer.losses("narrow") == pytest.approx(trainer.losses("wide"), rel=1e-6)
    assert trainer.losses("narrow") == pytest.approx(trainer.losses("exact"), rel=0.1)
    assert trainer.losses("narrow") != pytest.approx(trainer.losses("exact"), rel=1e-5)


@pytest.mark.parametrize("kind", ["folder", "separate files", "denoiser and encoders in one file"])
def test_every_layout_trains_to_the_same_losses(trainer, tiny_folder, tiny_tensors, kind):
    assert trainer("single", **UNET_ONLY) == 0
    options: dict = {}
    if kind == "folder":
        other = other_checkpoint(trainer, tiny_folder)
    else:
        apart = PREFIXES if kind == "separate files" else {"vae": PREFIXES["vae"]}
        for part, prefix in apart.items():
            own = {k.removeprefix(prefix): v for k, v in tiny_tensors.items() if k.startswith(prefix)}
            save_tensors(own, trainer.folder / f"{part}.safetensors", {})
            options[part] = trainer.folder / f"{part}.safetensors"
        rest = {k: v for k, v in tiny_tensors.items() if not k.startswith(tuple(apart.values()))}
        path = options.pop("denoiser", trainer.folder / "rest.safetensors")
        if rest:
            save_tensors(rest, path, {})
        other = other_checkpoint(trainer, path)
        options["tokenizer_dir"] = trainer.checkpoint.parent
    assert other("apart", **UNET_ONLY, **options) == 0
    assert trainer.losses("apart") == pytest.approx(trainer.losses("single"), rel=1e-6)


@pytest.mark.parametrize("options", [CACHED, UNET_ONLY], ids=["cached", "not cached"])
@pytest.mark.usefixtures("unforeseen")
def test_without_a_t5_training_sees_154_tokens(trainer, tiny_tensors, monkeypatch, options):
    path = trainer.folder / "small.safetensors"
    save_tensors({k: v for k, v in tiny_tensors.items() if not k.startswith(PREFIXES["t5xxl"])}, path, {})
    forward, seen = MMDiT.forward, set()

    def watched(self, x_t, timestep, context, *args, **kwargs):
        seen.add((context.shape[1], bool(context[:, 77:].any())))
        return forward(self, x_t, timestep, context, *args, **kwargs)

    monkeypatch.setattr(MMDiT, "forward", watched)
    tokenizers = {"tokenizer_dir": trainer.checkpoint.parent}
    assert other_checkpoint(trainer, path)("small", **options, **tokenizers) == 0
    assert seen == {(154, False)}
    seen.clear()
    assert trainer("whole", **options, t5xxl_max_token_length=40) == 0
    assert seen == {(117, True)}
    assert trainer.losses("small") != trainer.losses("whole")


# What is written


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("float", None)])
def test_the_file_holds_the_weights_in_the_type_that_was_asked_for(trainer, runs, precision, dtype):
    dtype = dtype or torch.float32
    assert trainer("out", **CACHED, save_precision=precision, save_format="both", network_alpha=1) == 0
    exact, stored = runs[0].trainable.state_dict_kohya(), trainer.weights("out")
    assert exact.keys() == stored.keys()
    assert all(torch.equal(stored[name], tensor.to(dtype)) for name, tensor in exact.items())
    theirs = load_file(saved(trainer, "out", "_diffusers"))
    assert {tensor.dtype for tensor in theirs.values()} == {dtype}
    text = Model(trainer.checkpoint).text()
    answers = [
        Model(trainer.checkpoint).with_adapter(saved(trainer, "out", suffix)).velocity(text)
        for suffix in ("", "_diffusers")
    ]
    answers.append(answered_velocity(runs[0].family, runs[0].denoiser, text))
    assert_close(answers[0], answers[2], 1e-2)
    assert_close(answers[1], answers[2], 1e-2)


# How samples become steps


def test_mirrored_pictures_are_the_same_cached_or_not(trainer):
    mirrored = {"dataset_config": trainer.dataset(subset="flip_aug = true")}
    options = {**UNET_ONLY, "cache_text_encoder_outputs": True, "max_train_steps": 6}
    assert trainer("online", **options, **mirrored) == 0
    assert trainer("cached", **options, **mirrored, cache_latents=True) == 0
    assert trainer("disk", **options, **mirrored, cache_latents_to_disk=True) == 0
    assert trainer("plain", **options) == 0
    assert trainer.losses("cached") == pytest.approx(trainer.losses("online"), rel=1e-4)
    assert trainer.losses("disk") == trainer.losses("cached")
    different = [
        abs(trainer.losses("plain")[step] / loss - 1) > 1e-4 for step, loss in trainer.losses("online").items()
    ]
    assert any(different)


@pytest.mark.usefixtures("unforeseen")
def test_datasets_of_different_resolutions_train_in_one_run(trainer, monkeypatch):
    forward, seen = MMDiT.forward, []

    def watched(self, x_t, *args, **kwargs):
        seen.append(tuple(x_t.shape))
        return forward(self, x_t, *args, **kwargs)

    monkeypatch.setattr(MMDiT, "forward", watched)
    path = trainer.folder / "two.toml"
    datasets = "".join(
        f"[[datasets]]\nresolution = [{width}, {height}]\nbatch_size = {size}\nenable_bucket = false\n"
        f"[[datasets.subsets]]\nimage_dir = {json.dumps(str(trainer.photos))}\nnum_repeats = {repeats}\n"
        for width, height, size, repeats in ((64, 64, 4, 1), (96, 32, 1, 2))
    )
    path.write_text(datasets)
    options = {**CACHED, "dataset_config": path, "max_train_epochs": 1, "max_train_steps": None}
    assert trainer("out", **options) == 0
    assert sorted(seen) == [(1, 16, 4, 12)] * 8 + [(4, 16, 8, 8)]
    online = {name: value for name, value in options.items() if not name.startswith("cache")}
    assert trainer("online", **online) == 0
    assert trainer.losses("online") == pytest.approx(trainer.losses("out"), rel=1e-4)
    with safe_open(saved(trainer, "out"), "pt") as file:
        metadata = file.metadata()
    assert metadata["ss_num_train_images"] == "12"
    assert len(json.loads(metadata["ss_datasets"])) == 2


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.usefixtures("unforeseen")
def test_the_logged_loss_is_the_mean_squared_error_of_the_steps_samples(trainer, monkeypatch, accumulation):
    predict, asked = Sd3Family.predict, []

    def watched(self, denoiser, noised, text):
        prediction = predict(self, denoiser, noised, text)
        asked.append((prediction.detach().clone(), noised))
        return prediction

    monkeypatch.setattr(Sd3Family, "predict", watched)
    options = {**CACHED, "gradient_accumulation_steps": accumulation, "weighting_scheme": "sigma_sqrt"}
    assert trainer("out", **options) == 0
    errors = [((answer - (noised.noise - noised.x_0)) ** 2).mean() for answer, noised in asked]
    means = [sum(errors[i : i + accumulation]) / accumulation for i in range(0, len(errors), accumulation)]
    assert list(trainer.losses("out").values()) == pytest.approx([mean.item() for mean in means], rel=1e-5)


def test_an_epochs_last_step_may_accumulate_fewer_micro_batches(trainer):
    single = trainer.folder / "single.toml"
    single.write_text(trainer.dataset().read_text().replace("batch_size = 2", "batch_size = 1"))
    still = {**CACHED, "dataset_config": single, "learning_rate": 1e-12, "max_train_epochs": 2, "max_train_steps": None}
    assert trainer("alone", **still) == 0
    assert trainer("three", **still, gradient_accumulation_steps=3) == 0
    alone, three = log_of(trainer, "alone"), log_of(trainer, "three")
    assert len(alone) == 8 and len(three) == 4
    for epoch in range(2):
        of_epoch = [entry["loss/current"] for entry in alone[4 * epoch : 4 * epoch + 4]]
        full, rest = three[2 * epoch : 2 * epoch + 2]
        assert full["loss/current"] == pytest.approx(sum(of_epoch[:3]) / 3, rel=1e-5)
        assert rest["loss/current"] == pytest.approx(of_epoch[3], rel=1e-5)
        assert rest["gradient_norm"] == pytest.approx(alone[4 * epoch + 3]["gradient_norm"], rel=1e-4)
        assert [entry["epoch"] for entry in (full, rest)] == [epoch + 1] * 2
