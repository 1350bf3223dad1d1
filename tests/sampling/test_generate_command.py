import json
import subprocess
import sys
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from library.config.flow import FlowConfig
from library.config.generate import GenerateConfig
from library.config.loss import LossConfig
from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.families.sd3.family import Sd3Family, create
from library.families.sd3.options import Sd3Options
from library.io.safetensors import save_tensors
from library.records import ModelDescription, Resolution
from library.sampling import previews
from library.sampling.generate_command import main, picture_requests
from networks.lora import inject
from networks.settings import AdapterSettings
from tools.miniature_sd3 import make_sd3

ROOT = Path(__file__).resolve().parents[2]
DESCRIPTION = ModelDescription("SD3", "sd3", "3", 1, {}, Resolution(1024, 512))
SMALL = ["--width", "48", "--height", "32", "--steps", "3", "--mixed_precision", "no", "--device", "cpu"]


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return str(make_sd3(tmp_path_factory.mktemp("model"), seed=0, dtype="fp32", layout="single"))


@pytest.fixture(scope="module")
def adapter(model, tmp_path_factory) -> str:
    """An adapter of the denoiser and of CLIP-L that changes a lot."""
    config = SimpleNamespace(
        model=ModelConfig(pretrained_model_name_or_path=model),
        family=Sd3Options(),
        flow=FlowConfig(),
        loss=LossConfig(),
        memory=MemoryConfig(),
    )
    family = create(config)
    options = {"device": "cpu", "dtype": torch.float32}
    roots = {"denoiser": family.load_denoiser(**options), "clip_l": family.load_text_encoders(**options)["clip_l"]}
    network = inject(roots, family.adapter_targets, AdapterSettings(rank=2, alpha=2.0))
    generator = torch.Generator().manual_seed(0)
    for layer in network.modules_by_name.values():
        layer.lora_up.weight.data.normal_(std=0.3, generator=generator)
    path = tmp_path_factory.mktemp("adapter") / "adapter.safetensors"
    save_tensors(network.state_dict_kohya(), path, {})
    return str(path)


def run(tmp_path, *arguments: str) -> list[Image.Image]:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    assert main([*SMALL, "--output_dir", str(folder), *arguments]) == 0
    return [Image.open(path) for path in sorted(folder.iterdir())]


def test_pictures_depend_on_seed_and_prompt_alone(tmp_path, model):
    base = ["--pretrained_model_name_or_path", model, "--seed", "5", "--output_name", "x"]
    pictures = run(tmp_path, *base, "--prompt", "a cat", "a dog", "--images_per_prompt", "2")
    names = [Path(picture.filename).name for picture in pictures]
    assert names == ["x_000_5.png", "x_001_6.png", "x_002_5.png", "x_003_6.png"]
    assert all(picture.size == (48, 32) for picture in pictures)
    assert len({picture.tobytes() for picture in pictures}) == 4
    (again,) = run(tmp_path, *base[:2], "--prompt", "a dog", "--seed", "6")
    assert again.tobytes() == pictures[3].tobytes()


def test_a_prompt_file_and_its_settings(tmp_path, model):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 32 --d 9 --s 2 --ss dpmpp_2m --n a dog\na bird --l 1\n")
    cat, bird = run(tmp_path, "--pretrained_model_name_or_path", model, "--sample_prompts", str(prompts), "--seed", "4")
    settings = json.loads(cat.text["atelier"])
    assert cat.size == (32, 32)
    assert {"prompt": "a cat", "negative_prompt": "a dog", "seed": 9, "steps": 2, "sampler": "dpmpp_2m"}.items() <= (
        settings.items()
    )
    assert settings["model"] == Path(model).name
    assert json.loads(bird.text["atelier"])["seed"] == 4
    assert bird.size == (48, 32)


def test_adapters_act_at_their_strength(tmp_path, model, adapter):
    base = ["--pretrained_model_name_or_path", model, "--prompt", "a cat", "--seed", "5"]
    (plain,) = run(tmp_path, *base)
    (changed,) = run(tmp_path, *base, "--network_weights", adapter)
    (silent,) = run(tmp_path, *base, "--network_weights", adapter, "--network_mul", "0")
    (halves,) = run(tmp_path, *base, "--network_weights", adapter, adapter, "--network_mul", "0.5", "0.5")
    (text_only,) = run(tmp_path, *base, "--network_weights", part_of(adapter, "lora_te1", tmp_path))
    assert silent.tobytes() == plain.tobytes()
    assert changed.tobytes() != plain.tobytes()
    assert largest_difference(halves, changed) <= 1
    assert text_only.tobytes() not in (plain.tobytes(), changed.tobytes())
    assert json.loads(changed.text["atelier"])["network"] == "adapter.safetensors x 1"


def part_of(adapter: str, prefix: str, folder: Path) -> str:
    from safetensors.torch import load_file

    path = folder / f"{prefix}.safetensors"
    save_tensors({key: value for key, value in load_file(adapter).items() if key.startswith(prefix)}, path, {})
    return str(path)


def test_previews_are_written_and_replaced(tmp_path, model, monkeypatch):
    written, save = [], previews.save_picture

    def watched(image, path, settings):
        save(image, path, settings)
        written.append((Path(path).name, image.size, settings["steps_done"], settings["model"]))

    monkeypatch.setattr(previews, "save_picture", watched)
    words = ["--pretrained_model_name_or_path", model, "--prompt", "a cat", "--seed", "5", "--output_name", "x"]
    (plain,) = run(tmp_path, *words)
    (picture,) = run(tmp_path, *words, "--preview_every", "1")
    assert picture.tobytes() == plain.tobytes()
    name = "x_000_5_preview.png"
    assert written == [(name, (48, 32), 1, Path(model).name), (name, (48, 32), 2, Path(model).name)]


def test_a_library_of_prompts(tmp_path, model):
    library = tmp_path / "library.json"
    library.write_text('{"the cat": "a cat", "dog": "a dog --d 9"}')
    words = ["--pretrained_model_name_or_path", model, "--output_name", "x", "--seed", "5"]
    cat, dog = run(tmp_path, *words, "--user_prompt_library", str(library))
    assert Path(cat.filename).name == "x_000_the cat_5.png" and Path(dog.filename).name == "x_001_dog_9.png"
    assert json.loads(cat.text["atelier"])["name"] == "the cat"


def largest_difference(one: Image.Image, other: Image.Image) -> int:
    pixels = (torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).int() for picture in (one, other))
    first, second = pixels
    return int((first - second).abs().max())


def test_skip_layer_guidance_changes_the_picture(tmp_path, model):
    base = ["--pretrained_model_name_or_path", model, "--prompt", "a cat", "--seed", "5"]
    (plain,) = run(tmp_path, *base)
    skip = ["--validation_guidance_skip_layers", "1", "--validation_guidance_skip_layers_stop", "0.9"]
    (guided,) = run(tmp_path, *base, *skip)
    assert guided.tobytes() != plain.tobytes()


def test_encoders_are_gone_before_the_denoiser_comes(tmp_path, model, adapter, monkeypatch):
    load_encoders, load_denoiser, encoders, alive = Sd3Family.load_text_encoders, Sd3Family.load_denoiser, [], []

    def watched_encoders(self, **options):
        loaded = load_encoders(self, **options)
        if str(options["device"]) != "meta":  # there, only shapes are checked
            encoders.extend(weakref.ref(encoder) for encoder in loaded.values())
        return loaded

    def watched_denoiser(self, **options):
        if str(options["device"]) != "meta":
            alive.extend(reference() is not None for reference in encoders)
        return load_denoiser(self, **options)

    monkeypatch.setattr(Sd3Family, "load_text_encoders", watched_encoders)
    monkeypatch.setattr(Sd3Family, "load_denoiser", watched_denoiser)
    run(tmp_path, "--pretrained_model_name_or_path", model, "--prompt", "a cat", "--network_weights", adapter)
    assert alive == [False] * 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--prompt is missing"),
        (["--prompt", "x", "--width", "72"], "--width 72 isn't a multiple of 16; the nearest are 64 and 80"),
        (["--prompt", "x", "--clip_l_dropout_rate", "0.5"], "--clip_l_dropout_rate does nothing here"),
        (["--prompt", "x", "--stepz", "4"], "unknown option --stepz; did you mean --steps?"),
        (
            ["--prompt", "x", "--network_weights", "none.safetensors"],
            "--network_weights none.safetensors: no such file",
        ),
        (["--prompt", "x", "--network_mul", "2"], "--network_mul has 1 values for 0 files"),
        (["--prompt", "x", "--scale", "1", "--negative_prompt", "y"], "--negative_prompt does nothing at --scale 1"),
        (
            ["--prompt", "x", "--validation_guidance_skip_layers", "40"],
            "--validation_guidance_skip_layers 40: the denoiser",
        ),
        (["--prompt", "x", "--preview_every", "3"], "--preview_every 3 does nothing: no picture has more than 3 steps"),
        (
            ["--prompt", "x", "--use_resolution_binning"],
            "--use_resolution_binning does nothing for Stable Diffusion 3.5 medium: it has no table of sizes",
        ),
        (["--prompt", "x", "--no-use_resolution_binning"], "--no-use_resolution_binning does nothing for Stable"),
        (["--prompt", "x", "--mixed_precision", "fp16"], "--mixed_precision fp16: CPUs have no fast fp16"),
        (["--prompt", "x", "--device", "cuda:77"], "--device cuda:77 can't be used"),
        (["--prompt", "x", "--family", "sd4"], "--family: expected one of sd3"),
        (["--prompt", "x", "--output_name", "a/b"], "--output_name 'a/b' must be the start of a file name"),
        (["--sample_prompts", "none.txt"], "none.txt: no such file"),
    ],
)
def test_mistakes(tmp_path, model, capsys, arguments, message):
    folder = tmp_path / "output"
    start = ["--pretrained_model_name_or_path", model, "--output_dir", str(folder)]
    assert main([*start, *SMALL, *arguments]) == 2  # of an option typed twice, the later value counts
    errors = capsys.readouterr().err
    assert f"error: {message}" in errors
    assert not folder.exists()


def test_a_file_of_another_model_is_called_by_its_name(tmp_path, capsys):
    path = tmp_path / "flux.safetensors"
    save_tensors({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2, 2)}, path, {})
    assert main(["--pretrained_model_name_or_path", str(path), "--prompt", "x"]) == 2
    assert "looks like FLUX (double_blocks.*), expected SD3" in capsys.readouterr().err


def test_dry_run_names_every_picture(tmp_path, model, capsys):
    arguments = ["--pretrained_model_name_or_path", model, "--prompt", "a cat", "--images_per_prompt", "2", "--dry_run"]
    assert main([*arguments, "--output_dir", str(tmp_path / "none"), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("'a cat'") == 2
    assert "'seed': 4" in printed
    assert not (tmp_path / "none").exists()


def test_requests_are_drawn_once_and_shared():
    pictures = picture_requests(GenerateConfig(prompt=("a", "b"), images_per_prompt=2), DESCRIPTION, 16)
    seeds = [picture.seed for picture in pictures]
    assert seeds == [seeds[0], seeds[0] + 1] * 2
    assert {picture.resolution for picture in pictures} == {Resolution(1024, 512)}
    assert [picture.prompt for picture in pictures] == ["a", "a", "b", "b"]


def test_help_is_light():
    code = (
        "import sys\nfrom library.sampling.generate_command import main\nassert main(['--help']) == 0\n"
        "assert not {'torch', 'numpy', 'PIL', 'transformers', 'tqdm'} & set(sys.modules)"
    )
    printed = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True, cwd=ROOT).stdout
    for name in ("--prompt", "--clip_l", "--network_weights", "--validation_guidance_skip_layers", "--dry_run"):
        assert name in printed


def test_text_encoders_in_few_bits_give_nearly_the_same_picture(model, adapter, tmp_path):
    base = ["--pretrained_model_name_or_path", model, "--prompt", "a cat", "--seed", "3", "--network_weights", adapter]
    few = [word for number in (1, 2, 3) for word in (f"--text_encoder_{number}_precision", "int8-quanto")]
    (whole,), (near,) = (run(tmp_path, *base, *more) for more in ([], few))
    one, other = (
        torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8).float() for picture in (whole, near)
    )
    assert 0 < (one - other).abs().mean() < 4
