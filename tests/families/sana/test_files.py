import json

import pytest
import torch

from library.config.model import ModelConfig
from library.families.sana.checkpoint import check_weights, read_dit_config, read_vae_config
from library.families.sana.dc_ae import F32C32_SANA
from library.families.sana.files import describe, locate, problems
from library.families.sana.linear_dit import CONFIGS
from library.families.sana.options import SanaOptions
from library.families.sana.sizes import denoiser_sizes, fp16_warning, image_size
from library.families.sd3.files import problems as sd3_problems
from library.families.sd3.options import Sd3Options
from library.io.header import read_header
from library.io.safetensors import load_tensors, save_tensors
from tests.families.sana.published_files import (
    KINDS,
    prefixed,
    published,
    write_parts,
    write_pth,
    write_sparse,
    write_sparse_folder,
)

NAMES = {"0.6b": "sana-600m", "1.5-1.6b": "sana-1.5-1600m"}


def found(base, parts, **options):
    model = ModelConfig(pretrained_model_name_or_path=str(base), vae=parts.get("vae"))
    options = SanaOptions(gemma=parts.get("gemma"), **options)
    return locate(model, options), options


def wrong(base, parts=None, **options):
    parts = parts or {}
    model = ModelConfig(pretrained_model_name_or_path=None if base is None else str(base), vae=parts.get("vae"))
    return problems(model, SanaOptions(gemma=parts.get("gemma"), **options))


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    return write_parts(tmp_path_factory.mktemp("parts"))


def assert_published(files, options, kind):
    config = read_dit_config(files, options)
    assert config == CONFIGS[NAMES[kind]].at(1024)
    assert read_vae_config(files) == F32C32_SANA
    assert check_weights(files, config) == []
    description = describe(files, options)
    assert description.parameters == {"0.6b": 591_747_872, "1.5-1.6b": 1_604_641_952}[kind]
    assert description.blocks == config.depth and description.text_numbers == 300 * 2305
    assert description.title == {"0.6b": "Sana 0.6B, 1024 px", "1.5-1.6b": "Sana-1.5 1.6B, 1024 px"}[kind]


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("kind", KINDS)
def test_the_published_files(tmp_path, parts, kind, prefix):
    path = write_sparse(tmp_path / "sana.safetensors", prefixed(prefix, published(kind)))
    assert_published(*found(path, parts), kind)


def test_the_published_checkpoint_in_torchs_format(tmp_path, parts):
    path = write_pth(tmp_path / "Sana_600M_1024px.pth", published("0.6b"))
    assert_published(*found(path, parts), "0.6b")


@pytest.mark.parametrize("kind", KINDS)
def test_diffusers_folder(tmp_path, kind):
    assert_published(*found(write_sparse_folder(tmp_path, kind), {}), kind)


def test_parts_that_are_named_win(tmp_path, parts):
    folder = write_sparse_folder(tmp_path, "0.6b")
    files, _ = found(folder, parts)
    assert files.vae.title == parts["vae"] and files.gemma.title == parts["gemma"]
    assert files.vae.layout == "single" and files.denoiser.layout == "diffusers"


def test_what_is_no_weight_is_left_out(tmp_path, parts):
    shapes = published("1.5-1.6b") | {"y_embedder.y_embedding": (300, 2304), "pos_embed": (1, 1024, 2240)}
    files, _ = found(write_sparse(tmp_path / "sana.safetensors", shapes), parts)
    assert not {"y_embedder.y_embedding", "pos_embed"} & set(files.denoiser.names)
    denoiser_sizes(files.denoiser)


@pytest.mark.parametrize(
    ("side", "positions", "scale"), [(512, None, 1.0), (1024, None, 1.0), (2048, 64, 1.0), (4096, 128, 2.0)]
)
@pytest.mark.parametrize("how", ["table", "folder", "option"])
def test_the_size_it_was_made_for(tmp_path, parts, how, side, positions, scale):
    options = {}
    if how == "table":
        if side < 2048:
            pytest.skip("small models have no table")
        shapes = published("1.5-1.6b") | {"pos_embed": (1, (side // 32) ** 2, 2240)}
        path = write_sparse(tmp_path / "sana.safetensors", prefixed("model.diffusion_model.", shapes))
    elif how == "folder":
        config = {"sample_size": side // 32, "interpolation_scale": scale if positions else None}
        path = write_sparse_folder(tmp_path, "1.5-1.6b", config)
    else:
        path = write_sparse(tmp_path / "sana.safetensors", published("1.5-1.6b"))
        options = {"sana_image_size": str(side)}
    files, options = found(path, parts, **options)
    assert image_size(files.denoiser, options) == side
    config = read_dit_config(files, options)
    assert (config.position_base, config.position_scale) == (positions, scale)
    assert describe(files, options).native_resolution == (side, side)


def test_the_option_goes_before_the_file(tmp_path, parts):
    shapes = published("1.5-1.6b") | {"pos_embed": (1, 64 * 64, 2240)}
    files, options = found(write_sparse(tmp_path / "sana.safetensors", shapes), parts, sana_image_size="1024")
    assert image_size(files.denoiser, options) == 1024


def test_a_damaged_configuration_says_nothing(tmp_path, parts):
    for text in ("{", "[]", '{"sample_size": "large"}', '{"sample_size": 33, "interpolation_scale": 1.0}'):
        folder = write_sparse_folder(tmp_path, "0.6b")
        (folder / "transformer" / "config.json").write_text(text)
        files, options = found(folder, parts)
        assert image_size(files.denoiser, options) == 1024


@pytest.mark.parametrize(
    ("kind", "size", "shift"),
    [
        ("0.6b", "1024", 4.0),
        ("0.6b", "512", 3.0),
        ("1.5-1.6b", "1024", 3.0),
        ("1.5-1.6b", "2048", 3.0),
        ("1.5-1.6b", "4096", 6.0),
    ],
)
def test_the_published_shift(tmp_path, parts, kind, size, shift):
    files, options = found(write_sparse(tmp_path / "s.safetensors", published(kind)), parts, sana_image_size=size)
    assert describe(files, options).defaults == {"training_shift": shift, "learning_rate": 1e-5}


@pytest.mark.parametrize(
    ("kind", "dtype", "says"),
    [
        ("0.6b", "F32", "is Sana 0.6B"),
        ("1.6b", "F16", "stored in fp16"),
        ("1.6b", "BF16", None),
        ("1.5-1.6b", "F16", None),
    ],
)
def test_weights_that_were_trained_in_fp16(tmp_path, parts, kind, dtype, says):
    shapes = published("1.5-1.6b" if kind == "1.6b" else kind)
    if kind == "1.6b":
        shapes = {name: shape for name, shape in shapes.items() if "_norm" not in name or name.startswith("attention")}
    files, _ = found(write_sparse(tmp_path / "s.safetensors", shapes, dtype), parts)
    warning = fp16_warning(files.denoiser, denoiser_sizes(files.denoiser))
    assert (warning is None) == (says is None)
    if says:
        assert says in warning and "Sana-1.5" in warning and "\n" not in warning
    assert describe(files).precision_warnings == ({"bf16": warning} if says else {})


def test_sprint_is_refused(tmp_path, parts):
    shapes = published("1.5-1.6b") | {"cfg_embedder.mlp.0.weight": (2240, 256), "logvar_linear.weight": (1, 2240)}
    (problem,) = wrong(write_sparse(tmp_path / "sprint.safetensors", shapes), parts)
    assert "Sana Sprint" in problem and "distilled" in problem and "Sana-1.5" in problem
    folder = write_sparse_folder(tmp_path / "folder", "1.5-1.6b")
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    shapes = {name: info.shape for name, info in read_header(path).tensors.items()}
    write_sparse(path, shapes | {"time_embed.guidance_embedder.linear_1.weight": (2240, 256)})
    (problem,) = wrong(folder)
    assert "Sana Sprint" in problem


def test_sd3_given_to_sana_and_the_other_way_round(tmp_path, parts, tiny_file, sana_file, sana_folder):
    (problem,) = wrong(tiny_file, parts)
    assert "looks like SD3 (joint_blocks.*), expected Sana" in problem
    for path in (sana_file, sana_folder):
        first = sd3_problems(ModelConfig(pretrained_model_name_or_path=str(path)), Sd3Options())[0]
        assert "looks like Sana" in first and "expected SD3" in first


def test_parts_of_others_are_called_by_their_names(tmp_path, parts, tiny_file):
    path = write_sparse(tmp_path / "sana.safetensors", published("0.6b"))
    swapped = {"vae": parts["gemma"], "gemma": parts["vae"]}
    vae, gemma = wrong(path, swapped)
    assert vae.startswith("--vae: ") and "looks like Gemma 2" in vae and "expected Sana's DC-AE" in vae
    assert gemma.startswith("--gemma: ") and "looks like DC-AE" in gemma and "expected Gemma 2" in gemma


def test_what_is_missing_is_named(tmp_path, parts):
    path = write_sparse(tmp_path / "sana.safetensors", published("0.6b"))
    vae, gemma = wrong(path)
    assert "no VAE" in vae and "add --vae" in vae
    assert "no Gemma 2" in gemma and "add --gemma" in gemma
    assert "--pretrained_model_name_or_path is missing" in wrong(None, parts)[0]
    assert "download it first" in wrong("Efficient-Large-Model/Sana_1600M_1024px", parts)[0]


@pytest.mark.parametrize("part", ["denoiser", "vae", "gemma"])
def test_incomplete_and_strange_files(tmp_path, parts, part):
    name = {"denoiser": "0.6b"}.get(part, part)
    last = {"denoiser": "blocks.27.attn.proj.bias", "vae": "decoder.stages.2.op_list.1.main.conv1.conv.bias"}
    shapes = published(name)
    del shapes[last.get(part, "model.layers.25.mlp.up_proj.weight")]
    short = write_sparse(tmp_path / "short.safetensors", shapes)
    prefix = "model." if part == "gemma" else ""
    inside = {"denoiser": "blocks.0.strange", "vae": "encoder.strange", "gemma": "model.layers.0.strange"}[part]
    strange = write_sparse(tmp_path / "strange.safetensors", published(name) | {inside: (3,)})
    base = write_sparse(tmp_path / "base.safetensors", published("0.6b"))
    for path, says in ((short, "1 of"), (strange, f"unknown tensors ({inside.removeprefix(prefix)})")):
        given = (path, parts) if part == "denoiser" else (base, {**parts, part: str(path)})
        (problem,) = wrong(*given)
        assert says in problem and str(path) in problem, problem


def test_other_autoencoders_of_the_same_kind(tmp_path, parts):
    shapes = published("vae")
    shapes["encoder.project_out.0.conv.weight"] = (128, 1024, 3, 3)
    base = write_sparse(tmp_path / "base.safetensors", published("0.6b"))
    other = write_sparse(tmp_path / "f32c128.safetensors", shapes)
    (problem,) = wrong(base, {**parts, "vae": str(other)})
    assert "128 channels" in problem and "takes 32 channels" in problem


def test_a_gemma_of_another_width(tmp_path, parts, sana_file):
    (problem,) = wrong(sana_file, {"gemma": parts["gemma"]})
    assert "width 2304; the denoiser takes 64" in problem


def test_a_prefix_that_cannot_be_read(tmp_path, sana_file):
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"\xe9t\xe9")
    for name, says in (("absent.txt", "can't be read"), ("empty.txt", "is empty"), ("latin.txt", "not UTF-8")):
        (problem,) = wrong(sana_file, sana_prompt_prefix=str(tmp_path / name))
        assert problem.startswith("--sana_prompt_prefix: ") and says in problem
    assert wrong(sana_file, sana_prompt_prefix="none") == []


def test_a_folder_without_a_denoiser(tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    assert "folder of FluxPipeline, expected one of SanaPipeline" in wrong(tmp_path)[0]


def test_gemma_with_its_output_layer_and_a_tokenizer_inside(tmp_path, sana_file):
    gemma = {
        name.removeprefix("text_encoders.gemma2_2b.transformer."): tensor
        for name, tensor in load_tensors(read_header(sana_file))
        if "gemma" in name
    }
    gemma |= {"lm_head.weight": torch.zeros(64, 64), "spiece_model": torch.zeros(9, dtype=torch.uint8)}
    save_tensors(gemma, tmp_path / "gemma.safetensors", {})
    files, _ = found(sana_file, {"gemma": str(tmp_path / "gemma.safetensors")})
    assert "lm_head.weight" not in files.gemma.names and "norm.weight" in files.gemma.names


def test_a_tokenizer_folder_that_is_none(tmp_path, sana_file):
    model = ModelConfig(pretrained_model_name_or_path=str(sana_file), tokenizer_dir=str(tmp_path / "none"))
    assert problems(model, SanaOptions()) == [f"--tokenizer_dir: {tmp_path / 'none'} is not a folder"]
