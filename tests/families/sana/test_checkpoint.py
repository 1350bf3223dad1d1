import json

import pytest
import torch
from safetensors.torch import load_file

from library.config.errors import ConfigError
from library.config.model import ModelConfig
from library.families.sana.checkpoint import check_weights, load_dit, load_vae, read_dit_config
from library.families.sana.export import EMPTY_CAPTION, diffusers_config, save_folder, save_single
from library.families.sana.files import locate
from library.families.sana.options import SanaOptions
from library.families.sana.sizes import image_size
from library.io.header import read_header
from library.io.safetensors import save_tensors
from library.nn.attention import sdpa
from tests.tiny import TINY_SANA
from tools.miniature_sana import sana_weights

OPTIONS = SanaOptions()


def files_of(path, gemma=None, vae=None, **options):
    model = ModelConfig(pretrained_model_name_or_path=str(path), vae=vae and str(vae))
    return locate(model, SanaOptions(gemma=gemma and str(gemma), **options))


def load(files, options=OPTIONS, dtype=torch.float32, mmap=True):
    config = read_dit_config(files, options)
    return load_dit(files, config, attention=sdpa, device="cpu", dtype=dtype, mmap=mmap)


@pytest.fixture(scope="module")
def weights():
    return sana_weights(0, TINY_SANA)


def assert_same(module, expected):
    state_dict = module.state_dict()
    assert state_dict.keys() == expected.keys()
    assert all(torch.equal(state_dict[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("mmap", [True, False])
def test_both_layouts_hold_the_same_weights(sana_file, sana_folder, weights, mmap):
    for path in (sana_file, sana_folder):
        files = files_of(path)
        dit = load(files, mmap=mmap)
        assert_same(dit, weights["denoiser"])
        assert_same(load_vae(files, device="cpu", dtype=torch.float32, mmap=mmap), weights["vae"])
        assert not dit.training and not any(parameter.requires_grad for parameter in dit.parameters())
        assert check_weights(files, dit.config) == []


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
@pytest.mark.parametrize("empty", [True, False])
def test_a_saved_file_is_read_back(tmp_path, sana_file, weights, suffix, empty):
    path = tmp_path / f"trained{suffix}"
    empty_caption = torch.randn(300, 64) if empty else None
    save_single(weights["denoiser"], path, {"modelspec.title": "x"}, empty_caption=empty_caption)
    files = files_of(path, gemma=sana_file, vae=sana_file)
    assert_same(load(files), weights["denoiser"])
    if suffix == ".pth":
        stored = torch.load(path, weights_only=True)["state_dict"]
    else:
        stored = load_file(path)
        assert read_header(path).metadata == {"modelspec.title": "x"}
    assert (EMPTY_CAPTION in stored) == empty


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_what_is_not_finite_is_not_written(tmp_path, weights, suffix):
    broken = weights["denoiser"] | {"final_layer.linear.bias": torch.tensor([float("nan")])}
    with pytest.raises(ValueError, match=r"final_layer.linear.bias .* not finite"):
        save_single(broken, tmp_path / f"trained{suffix}", {})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("side", [1024, 2048, 4096])
def test_a_saved_folder_is_read_back(tmp_path, sana_file, weights, dtype, side):
    config = TINY_SANA.denoiser().at(side)
    save_folder(weights["denoiser"], config, tmp_path / "m" / "transformer", {}, image_size=side, dtype=dtype)
    files = files_of(tmp_path / "m", gemma=sana_file, vae=sana_file)
    assert image_size(files.denoiser, OPTIONS) == side and read_dit_config(files, OPTIONS) == config
    assert_same(load(files, dtype=dtype), {name: tensor.to(dtype) for name, tensor in weights["denoiser"].items()})


@pytest.mark.reference
@pytest.mark.parametrize("side", [1024, 2048, 4096])
@torch.no_grad()
def test_diffusers_loads_what_is_saved(tmp_path, weights, side):
    diffusers = pytest.importorskip("diffusers")
    config = TINY_SANA.denoiser().at(side)
    save_folder(weights["denoiser"], config, tmp_path / "transformer", {}, image_size=side)
    theirs, loading = diffusers.SanaTransformer2DModel.from_pretrained(
        tmp_path / "transformer", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
    assert dict(theirs.config) | diffusers_config(config, side) == dict(theirs.config) | {
        "_class_name": "SanaTransformer2DModel"
    }
    dit = load_dit_of(weights["denoiser"], config)
    across = side // 32 if side > 1024 else 4  # diffusers has positions for one size
    x_t = torch.randn(1, 32, across, across, generator=torch.Generator().manual_seed(0))
    context = torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(1))
    timestep = torch.tensor([314.0])
    expected = theirs(x_t, encoder_hidden_states=context, timestep=timestep).sample
    assert (dit(x_t, timestep, context) - expected).abs().max() < 2e-5 * expected.abs().max()


def load_dit_of(tensors, config):
    from library.families.sana.linear_dit import LinearDiT

    dit = LinearDiT(config, attention=sdpa)
    dit.load_state_dict(tensors)
    return dit.eval()


@pytest.mark.reference
@torch.no_grad()
def test_diffusers_loads_the_miniature(sana_folder, sana_file):
    diffusers = pytest.importorskip("diffusers")
    transformers = pytest.importorskip("transformers")
    vae, loading = diffusers.AutoencoderDC.from_pretrained(sana_folder / "vae", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    pixels = torch.rand(1, 3, 64, 96) * 2 - 1
    ours = load_vae(files_of(sana_file), device="cpu", dtype=torch.float32)
    expected = vae.encode(pixels).latent
    assert (ours.encode(pixels) - expected).abs().max() < 1e-4 * expected.abs().max()
    transformers.Gemma2Model.from_pretrained(sana_folder / "text_encoder")
    assert json.loads((sana_folder / "model_index.json").read_text())["_class_name"] == "SanaPipeline"


def test_fp16_is_refused_for_the_autoencoder(sana_file):
    with pytest.raises(ConfigError, match="DC-AE overflows in fp16"):
        load_vae(files_of(sana_file), device="cpu", dtype=torch.float16)


def test_shapes_that_do_not_fit_are_refused_before_anything_is_read(tmp_path, sana_file, weights):
    broken = weights["denoiser"] | {"blocks.1.attn.proj.bias": torch.zeros(63)}
    save_tensors(broken, tmp_path / "broken.safetensors", {})
    files = files_of(tmp_path / "broken.safetensors", gemma=sana_file, vae=sana_file)
    (problem,) = check_weights(files, read_dit_config(files, OPTIONS))
    assert "blocks.1.attn.proj.bias is 63, not 64" in problem
