import dataclasses
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.config.errors import ConfigError
from library.config.model import ModelConfig
from library.families.sd.checkpoint import (
    check_weights,
    load_text_encoder,
    load_unet,
    load_vae,
    read_unet_config,
    read_vae_config,
)
from library.families.sd.files import describe, locate, problems
from library.families.sd.options import SdOptions
from library.families.sd.sizes import used_layers
from library.io.part_shapes import names_in_layout
from library.nn.attention import sdpa
from library.text_encoders.open_clip import open_clip_key_maps
from tests.families.sd.conftest import TINY_VAE

FP32 = {"device": "cpu", "dtype": torch.float32}


def located(path, **options):
    return locate(ModelConfig(pretrained_model_name_or_path=str(path)), SdOptions(**options))


def wrong(path, vae=None, **options):
    return problems(ModelConfig(pretrained_model_name_or_path=str(path), vae=vae), SdOptions(**options))


@pytest.fixture(params=["single", "folder", "checkpoint"])
def model_path(request, tiny_sd, tmp_path):
    if request.param == "folder":
        return tiny_sd.folder(tmp_path / "model")
    path = tiny_sd.single_file(tmp_path / "model.safetensors")
    if request.param == "checkpoint":
        checkpoint = tmp_path / "model.ckpt"
        torch.save({"state_dict": load_file(path), "global_step": 7}, checkpoint)
        return checkpoint
    return path


def test_every_layout_gives_the_same_model(tiny_sd, model_path):
    files = located(model_path)
    assert files.is_v2 == tiny_sd.is_v2
    assert read_unet_config(files) == tiny_sd.config and read_vae_config(files) == TINY_VAE
    assert check_weights(files) == []
    unet, vae = load_unet(files, attention=sdpa, **FP32), load_vae(files, **FP32)
    for loaded, own in ((unet, tiny_sd.denoiser), (vae, tiny_sd.vae)):
        weights = loaded.state_dict()
        assert weights.keys() == own.keys() and all(torch.equal(weights[name], own[name]) for name in own)
    clip = load_text_encoder(files.clip, is_v2=files.is_v2, **FP32).state_dict()
    assert all(torch.equal(clip[name], own) for name, own in tiny_sd.clip.items())


def test_the_description_names_the_generation(tiny_sd, model_path):
    description = describe(located(model_path))
    assert description.title == f"Stable Diffusion {2 if tiny_sd.is_v2 else 1}.x"
    assert description.base_model_version == f"sd_v{2 if tiny_sd.is_v2 else 1}"
    assert description.parameters == sum(tensor.numel() for tensor in tiny_sd.denoiser.values())
    assert description.text_numbers == 77 * 64 and description.blocks == 16
    assert description.native_resolution.width == 512
    assert describe(located(model_path), SdOptions(max_token_length="150")).text_numbers == 152 * 64


def test_a_folder_says_what_the_model_predicts(tiny_sd, tmp_path):
    folder, single = tmp_path / "v", tmp_path / "file.safetensors"
    files = located(tiny_sd.folder(folder, prediction="v_prediction"))
    described = describe(files)
    assert files.v_prediction is True and described.native_resolution.width == 768
    assert described.defaults["v_parameterization"] is True and not described.unsure
    told = described.stated["v_parameterization"]
    assert str(folder) in told and told.endswith("say that it predicts velocities (v_prediction)")
    assert located(tiny_sd.folder(tmp_path / "noise")).v_prediction is False
    silent = describe(located(tiny_sd.single_file(single)))
    assert located(single).v_prediction is None and not silent.stated
    assert silent.defaults["v_parameterization"] is False
    guessed = silent.unsure.get("v_parameterization", "")
    assert guessed.startswith(f"{single} is Stable Diffusion 2.x and does not say what it predicts") is tiny_sd.is_v2
    assert "add --v_parameterization, else --no-v_parameterization" in guessed or not tiny_sd.is_v2


def test_saved_files_name_the_generation_and_what_it_predicts(tiny_sd, tmp_path):
    files = located(tiny_sd.single_file(tmp_path / "model.safetensors"))
    said = {}
    for velocity in (None, True):
        made = describe(files, SdOptions(clip_skip=2), v_prediction=velocity)
        said[velocity] = (made.base_model_version, made.architecture, made.specification["prediction_type"])
        assert made.specification["encoder_layer"] == "2"
    first = {None: ("sd_v1", "stable-diffusion-v1", "epsilon"), True: ("sd_v1_v", "stable-diffusion-v1", "v")}
    second = {
        None: ("sd_v2", "stable-diffusion-v2-512", "epsilon"),
        True: ("sd_v2_v", "stable-diffusion-v2-768-v", "v"),
    }
    assert said == (second if tiny_sd.is_v2 else first)
    assert describe(files).specification == {"prediction_type": "epsilon"}


def test_v2_of_a_first_generation_model_is_refused(tiny_sd, tmp_path):
    path = tiny_sd.single_file(tmp_path / "model.safetensors")
    told = wrong(path, v2=True), wrong(path, v2=False), wrong(path)
    first, second = (
        [f"--v2: {path} is Stable Diffusion 1.x; remove it"],
        [f"--no-v2: {path} is Stable Diffusion 2.x; remove it"],
    )
    assert told == (([], second, []) if tiny_sd.is_v2 else (first, [], []))
    assert describe(located(path)).defaults.get("v2", False) is tiny_sd.is_v2


def test_the_layer_that_the_second_generation_was_trained_without_does_not_count(tiny_sd, tmp_path):
    """OpenCLIP's files have it, diffusers' folders don't."""
    single = located(tiny_sd.single_file(tmp_path / "model.safetensors"))
    assert used_layers(single.clip) == (2 if tiny_sd.is_v2 else 3)
    folder = located(tiny_sd.folder(tmp_path / "folder"))
    assert used_layers(folder.clip) == 3
    (told,) = wrong(tmp_path / "folder", clip_skip=4)
    assert told.startswith("--clip_skip 4: ") and told.endswith("has 3 layers; at most 3")
    assert wrong(tmp_path / "folder", clip_skip=3) == []


@pytest.mark.parametrize(("layout", "depth", "used"), [("single", 24, 23), ("single", 23, 23), ("diffusers", 23, 23)])
def test_published_encoders_of_the_second_generation_have_23_layers_in_use(layout, depth, used):
    shapes = {name: (8, 8) for name in names_in_layout(open_clip_key_maps(depth=depth), layout)}
    part = SimpleNamespace(layout=layout, shapes=shapes, names=shapes.keys(), title="clip")
    assert used_layers(part) == used


def test_other_unets_are_refused_by_their_task(tiny_sd, tmp_path):
    for channels, kind in ((9, "an inpainting U-Net"), (8, "an image-editing U-Net"), (5, "a depth-guided U-Net")):
        first = {"model.diffusion_model.input_blocks.0.0.weight": torch.zeros(64, channels, 3, 3)}
        (told,) = wrong(tiny_sd.single_file(tmp_path / f"{channels}.safetensors", **first))
        assert kind in told and "only those that make pictures from text" in told


def test_other_models_are_called_by_their_names(tmp_path):
    sdxl = {
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(4, 4, 3, 3),
        "model.diffusion_model.middle_block.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(4, 4),
        "model.diffusion_model.out.2.weight": torch.zeros(4, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": torch.zeros(4, 2816),
    }
    sd3 = {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": torch.zeros(4, 4)}
    for name, tensors in (("SDXL", sdxl), ("SD3", sd3)):
        path = tmp_path / f"{name}.safetensors"
        save_file(tensors, path)
        told = wrong(path)
        assert told[0].startswith(f"{path} looks like {name} (") and "expected Stable Diffusion 1.x or 2.x" in told[0]


def test_what_is_missing_or_unknown_is_named(tiny_sd, tmp_path):
    path = tiny_sd.single_file(tmp_path / "model.safetensors")
    tensors = load_file(path)
    del tensors["model.diffusion_model.out.0.bias"]
    save_file(tensors, path)
    assert any("1 of" in line and "out.0.bias" in line for line in wrong(path))
    strange = {"model.diffusion_model.strange.weight": torch.zeros(1)}
    assert any("1 unknown" in line for line in wrong(tiny_sd.single_file(path, **strange)))


def test_a_vae_with_other_channels_is_refused(tiny_sd, tmp_path):
    path, vae = tiny_sd.single_file(tmp_path / "model.safetensors"), tmp_path / "vae.safetensors"
    save_file({**tiny_sd.vae, "decoder.conv_in.weight": torch.zeros(32, 16, 3, 3)}, vae)
    (told,) = wrong(path, str(vae))
    assert told.startswith("--vae: ") and "16 channels" in told


def test_a_text_encoder_that_does_not_fit_is_refused(tiny_sd, tmp_path):
    narrow = dataclasses.replace(tiny_sd.config, context_width=48)
    denoiser = {
        name: tensor[:, :48] if "attn2.to_k" in name or "attn2.to_v" in name else tensor
        for name, tensor in tiny_sd.denoiser.items()
    }
    path = tiny_sd._replace(config=narrow, denoiser=denoiser).single_file(tmp_path / "model.safetensors")
    (told,) = wrong(path)
    assert "a text encoder of width 64; the U-Net takes 48" in told


def test_a_checkpoint_with_code_in_it_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "written"), "w"))

    path = tmp_path / "model.ckpt"
    torch.save({"state_dict": {"x": Evil()}}, path)
    (told,) = wrong(path)
    assert not (tmp_path / "written").exists() and str(path) in told


def test_located_without_a_model():
    with pytest.raises(ConfigError, match="--pretrained_model_name_or_path is missing"):
        locate(ModelConfig(), SdOptions())
