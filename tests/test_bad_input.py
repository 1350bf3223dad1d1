"""The careless user: every wrong input ends with exit code 2 and one line per mistake, before any weight is read."""

import base64
import dataclasses
import os
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import library.io.safetensors
from library.io.header import read_header
from library.sampling import generate_command
from tests.bad_input.dataset_cases import DATA, NOTED
from tests.bad_input.late_cases import GENERATE, LATE
from tests.bad_input.model_cases import FILES
from tests.bad_input.option_cases import DATASETS, OPTIONS, PROMPTS
from tests.bad_input.sana_cases import FILES as SANA_FILES
from tests.bad_input.sana_cases import LATE as SANA_LATE
from tests.bad_input.sd_cases import FILES as SD_FILES
from tests.bad_input.workshop import BASE, FLUX, UNET_ONLY, Workshop

ADAPTERS = ("network_weights", "base_weights")


@pytest.fixture
def workshop(trainer, tmp_path) -> Workshop:
    folder = tmp_path / "workshop"
    folder.mkdir()
    return Workshop(trainer, folder)


@pytest.fixture
def files_read(monkeypatch) -> list[str]:
    """The weights files whose data was read; headers don't count."""
    read: list[str] = []

    def watch(module, name, path_of):
        own = getattr(module, name)

        def watched(*arguments, **options):
            read.append(str(path_of(arguments)))
            return own(*arguments, **options)

        monkeypatch.setattr(module, name, watched)

    watch(library.io.safetensors, "_read", lambda arguments: arguments[1].path)
    watch(library.io.safetensors, "load_pickle", lambda arguments: arguments[0].path)
    watch(torch, "load", lambda arguments: arguments[0])
    return read


@pytest.fixture
def refused(trainer, files_read, capfd):
    """Runs the trainer with wrong options; returns the errors, after checking how it ended."""
    return refusing(trainer, files_read, capfd)


def refusing(trainer, files_read, capfd):
    def run(**options) -> list[str]:
        adapters = {str(path) for name in ADAPTERS for path in _several(options.get(name))}
        capfd.readouterr()
        assert trainer("output", console_log_level="ERROR", **options) == 2
        lines = capfd.readouterr().err.splitlines()
        assert lines and all(line.startswith("error: ") for line in lines), lines
        assert len(set(lines)) == len(lines), "a problem is told twice"
        assert set(files_read) <= adapters, "weights were read"
        assert not list(trainer.folder.glob("output/*.safetensors"))
        return [line.removeprefix("error: ") for line in lines]

    return run


@pytest.fixture
def sana(trainer, tiny_sana_file):
    """Trains adapters on a tiny Sana, over the same photographs."""
    return dataclasses.replace(trainer, checkpoint=tiny_sana_file, family="sana")


@pytest.fixture
def sana_refused(sana, files_read, capfd):
    return refusing(sana, files_read, capfd)


@pytest.fixture
def sana_workshop(sana, workshop) -> Workshop:
    return dataclasses.replace(workshop, trainer=sana)


def _several(value) -> list:
    if value is None:
        return []
    return list(value) if isinstance(value, (list, tuple)) else [value]


def check(errors: list[str], *expected: str) -> None:
    """One line per expected text, and no others."""
    assert len(errors) == len(expected), errors
    for text in expected:
        assert sum(text in error for error in errors) == 1, (text, errors)


def cases(table):
    return [pytest.param(case[0], case[1:], id=name) for name, case in table.items()]


@pytest.fixture
def torch_stays_out(monkeypatch):
    """Fails the test where training, and so torch, would be imported."""
    monkeypatch.setitem(sys.modules, "library.training.setup", None)


@pytest.mark.usefixtures("torch_stays_out")
class TestBeforeTorchIsLoaded:
    @pytest.mark.parametrize(("options", "expected"), cases(OPTIONS))
    def test_options(self, refused, options, expected):
        check(refused(**options), *expected)

    @pytest.mark.parametrize(("make", "expected"), cases(FILES))
    def test_files(self, refused, workshop, monkeypatch, make, expected):
        monkeypatch.chdir(workshop.folder)
        check(refused(**make(workshop)), *expected)
        assert not Path("sprung").exists(), "code in a file was run"

    @pytest.mark.parametrize(("make", "expected"), cases(DATASETS))
    def test_datasets(self, refused, workshop, make, expected):
        check(refused(dataset_config=make(workshop)), *expected)

    @pytest.mark.parametrize(("make", "expected"), cases(DATA))
    def test_data(self, refused, workshop, make, expected):
        check(refused(dataset_config=make(workshop), dry_run=True), *expected)

    @pytest.mark.parametrize(("content", "expected"), cases(PROMPTS))
    def test_sample_prompts(self, refused, workshop, content, expected):
        path = workshop.file(content, "prompts.txt")
        check(refused(sample_prompts=path, sample_at_first=True), *expected)

    def test_an_output_folder_without_permission(self, refused, workshop, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: not (mode & os.W_OK))
        check(refused(output_dir=workshop.folder / "out"), f"{workshop.folder} can't be written to: permission denied")

    def test_everything_at_once(self, refused, workshop):
        wrong = {
            BASE: workshop.sparse(FLUX),
            "clip_l": "no.safetensors",
            "dataset_config": workshop.dataset(("batch_size = 2", "batch_size = 0"), append="num_repeat = 1"),
            "network_dim": 0,
            "network_dimm": 4,
            "cache_text_encoder_outputs": True,
            "vae_batch_size": 4,
            "lr_warmup_steps": 10,
            "max_train_epochs": 3,
            "output_dir": workshop.file("x"),
        }
        names = (
            "datasets[0].batch_size",
            "num_repeat",
            "--network_dim:",
            "--network_dimm",
            "--network_train_unet_only",
        )
        more = ("--vae_batch_size", "--lr_warmup_steps", "--max_train_epochs", "--output_dir", "--clip_l", "FLUX")
        check(refused(**wrong), *names, *more)


@pytest.mark.usefixtures("torch_stays_out")
@pytest.mark.parametrize(("make", "expected"), cases(SANA_FILES))
def test_sana(sana_refused, sana_workshop, make, expected):
    check(sana_refused(**make(sana_workshop)), *expected)


@pytest.mark.parametrize(("make", "expected"), cases(SD_FILES))
def test_sd(sd_trainer, files_read, capfd, workshop, make, expected):
    check(refusing(sd_trainer, files_read, capfd)(**make(workshop)), *expected)


@pytest.mark.parametrize(("make", "expected"), cases(SANA_LATE))
def test_what_only_torch_can_see_of_sana(sana_refused, sana_workshop, make, expected):
    check(sana_refused(**make(sana_workshop)), *expected)


def test_a_caption_beyond_sanas_window_is_told(sana, capsys):
    (sana.photos / "camera.txt").write_text("a red circle on a blue table " * 100)
    for options, length in (({}, 300), ({"sana_max_token_length": 30}, 30)):
        assert sana("output", dry_run=True, **options) == 0
        assert f"longer than the {length} tokens that Gemma reads" in capsys.readouterr().out


def test_sana_weights_that_were_trained_in_fp16(sana, tmp_path):
    """As the first Sana: without norms of queries and keys, stored in fp16."""
    tensors = {k: v for k, v in load_file(sana.checkpoint).items() if "q_norm" not in k and "k_norm" not in k}
    old = sana.checkpoint.with_name("old.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, old)
    options = {BASE: old, "max_train_steps": 1, "cache_latents": True, "cache_text_encoder_outputs": True, **UNET_ONLY}
    for precision, warned in (("bf16", True), ("no", False)):
        log = tmp_path / f"{precision}.log"
        assert sana(precision, **options, mixed_precision=precision, console_log_file=log) == 0
        assert ("loses quality in bf16: use weights" in log.read_text()) == warned


def test_a_dc_ae_stored_in_fp16_is_computed_in_fp32(sana, workshop):
    vae = {k: v.half() for k, v in load_file(sana.checkpoint).items() if k.startswith("first_stage_model.")}
    save_file(vae, workshop.folder / "dc-ae.safetensors")
    options = {"max_train_steps": 1, "cache_latents": True, "cache_text_encoder_outputs": True, **UNET_ONLY}
    assert sana("narrow", vae=workshop.folder / "dc-ae.safetensors", **options) == 0
    assert sana("whole", **options) == 0
    assert sana.losses("narrow") == pytest.approx(sana.losses("whole"), rel=0.05)


@pytest.mark.parametrize(("make", "expected"), cases(LATE))
def test_what_only_torch_can_see(refused, workshop, make, expected):
    check(refused(**make(workshop)), *expected)


@pytest.mark.parametrize("package", ["xformers", "wandb"])
def test_packages_that_are_not_installed(refused, monkeypatch, package):
    for name in [*(name for name in sys.modules if name.startswith(f"{package}.")), package]:
        monkeypatch.setitem(sys.modules, name, None)
    options = {"xformers": {"xformers": True}, "wandb": {"log_with": "wandb"}}[package]
    (error,) = refused(**options)
    assert f"pip install {package}" in error


def test_wandb_without_a_key(refused, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def login(**options):
        raise wandb.errors.UsageError("No API key configured. Use `wandb login` to log in.")

    monkeypatch.setattr(wandb, "login", login)
    check(refused(log_with="wandb"), "--log_with wandb: wandb can't log in (No API key configured")


def test_everything_that_only_torch_can_see_at_once(refused, monkeypatch):
    for name in ("xformers", "xformers.ops"):
        monkeypatch.setitem(sys.modules, name, None)
    wrong = {"optimizer_args": "bogus=1", "network_args": ["bogus=1", "nonsense=2"], "xformers": True}
    check(refused(**wrong), "--optimizer_args", "unknown name bogus", "unknown name nonsense", "--xformers")


def test_a_state_of_another_adapter(trainer, refused, files_read):
    trained = {"cache_latents": True, "max_train_steps": 1, "save_state": True, **UNET_ONLY}
    assert trainer("trained", **trained) == 0
    files_read.clear()
    state = trainer.folder / "trained" / "run-state"
    (error,) = refused(resume=state, max_train_steps=2, network_args=["x_attn_dim=3"], **UNET_ONLY)
    assert error.startswith(f"--resume {state}: ")


def picture(workshop, name, content) -> None:
    (workshop.trainer.photos / name).write_bytes(content)
    (workshop.trainer.photos / name).with_suffix(".txt").write_text("a caption")


def test_unreadable_pictures_are_named_and_counted(refused, workshop):
    whole = (workshop.trainer.photos / "coffee.png").read_bytes()
    picture(workshop, "cut.png", whole[:2000])
    picture(workshop, "nothing.png", b"")
    picture(workshop, "words.jpg", b"no picture")
    check(
        refused(),
        "3 pictures can't be read; repair or remove, or start with --skip_bad_images:",
        "cut.png: the file ends too early",
        "nothing.png: the file is empty",
        "words.jpg: not a picture, or of an unknown kind",
    )


def test_unreadable_pictures_are_left_out_when_asked(trainer, workshop, capsys):
    picture(workshop, "nothing.png", b"")
    assert trainer("output", skip_bad_images=True, dry_run=True) == 0
    printed = capsys.readouterr().out
    assert "datasets[0]: 1 picture left out: " in printed
    assert "nothing.png: the file is empty" in printed
    assert "datasets[0]: 4 pictures" in printed


@pytest.mark.parametrize(("make", "expected"), cases(NOTED))
def test_data_that_is_odd_and_can_be_used(trainer, workshop, capsys, make, expected):
    assert trainer("output", dataset_config=make(workshop), dry_run=True) == 0
    assert expected[0] in capsys.readouterr().out


def test_a_folder_without_pictures(refused, workshop):
    dataset = workshop.dataset((str(workshop.trainer.photos), str(workshop.empty())))
    check(refused(dataset_config=dataset), "empty: no pictures (png")


def test_only_unreadable_pictures(refused, workshop):
    for path in workshop.trainer.photos.glob("*.png"):
        path.write_bytes(b"")
    check(refused(skip_bad_images=True), "photos: no picture can be read")


def test_no_caption(refused, workshop):
    (workshop.trainer.photos / "camera.txt").unlink()
    check(refused(), "no caption (.txt) and no class_tokens for 1 of 4 pictures: camera.png")


def test_a_caption_in_another_encoding(refused, workshop):
    (workshop.trainer.photos / "camera.txt").write_bytes("un café".encode("latin-1"))
    check(refused(), "camera.txt: byte 7 is not UTF-8")


def test_nothing_left_to_train_on(refused, workshop):
    dataset = workshop.dataset(("[general]", "[general]\nvalidation_split = 1.0"))
    check(refused(dataset_config=dataset), "validation_split leaves no picture to train on")


@pytest.mark.parametrize("dry_run", [True, False])
def test_pictures_whose_bucket_is_longer_than_the_position_table(refused, workshop, dry_run):
    from PIL import Image

    Image.new("RGB", (400, 100)).save(workshop.trainer.photos / "wide.png")
    (workshop.trainer.photos / "wide.txt").write_text("a wide picture")
    dataset = workshop.dataset(("resolution = 64", "resolution = 192"))
    errors = refused(dataset_config=dataset, dry_run=dry_run or None)
    check(errors, "datasets[0]: the model's table of positions ends at 256 pixels per side, and 1 of its pictures")
    assert "wide.png (384x96); set max_bucket_reso = 256" in errors[0]
    dataset = workshop.dataset(("resolution = 64", "resolution = 192\nmax_bucket_reso = 256"))
    assert workshop.trainer("dry", dataset_config=dataset, dry_run=True) == 0


def test_a_computed_position_table_has_no_end(workshop):
    dataset = workshop.dataset(("resolution = 64", "resolution = 512"))
    assert workshop.trainer("dry", dataset_config=dataset, dry_run=True, enable_scaled_pos_embed=True) == 0


def test_a_thumbnail_is_stored_whole(trainer):
    picture = trainer.photos / "camera.png"
    assert trainer("output", max_train_steps=1, cache_latents=True, metadata_thumbnail=picture, **UNET_ONLY) == 0
    metadata = read_header(trainer.folder / "output" / "run.safetensors").metadata
    kind, content = metadata["modelspec.thumbnail"].split(",")
    assert kind == "data:image/png;base64"
    assert base64.b64decode(content) == picture.read_bytes()


@pytest.mark.parametrize(("make", "expected"), cases(GENERATE))
def test_generate(workshop, files_read, capfd, make, expected):
    words = [str(word) for word in make(workshop)]
    start = [f"--{BASE}", str(workshop.trainer.checkpoint), "--output_dir", str(workshop.folder / "pictures")]
    assert generate_command.main([*start, "--device", "cpu", *words]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert all(line.startswith("error: ") for line in lines)
    check(lines, *expected)
    assert set(files_read) <= set(words)
    assert not (workshop.folder / "pictures").exists()
