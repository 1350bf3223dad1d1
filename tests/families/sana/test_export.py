"""Trained denoisers in the files of others: Sana with and without norms of queries and keys, in both layouts."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.config.model import ModelConfig
from library.families.sana.checkpoint import load_dit, read_dit_config
from library.families.sana.export import diffusers_config, save_folder, save_single
from library.families.sana.files import describe, locate
from library.families.sana.key_maps import denoiser_key_maps
from library.families.sana.linear_dit import CONFIGS, LinearDiT
from library.families.sana.options import SanaOptions
from library.io.key_maps import from_diffusers, to_diffusers
from library.nn.attention import sdpa
from tests.families.sana.published_files import KINDS, denoiser_in_diffusers_layout, published
from tests.tiny import TINY_SANA

CPU = {"device": "cpu", "dtype": torch.float32}
QK_NORM = pytest.mark.parametrize("qk_norm", [True, False], ids=["sana-1.5", "sana"])


def random_dit(qk_norm, image_size=1024):
    torch.manual_seed(0)
    dit = LinearDiT(dataclasses.replace(TINY_SANA.denoiser(), qk_norm=qk_norm).at(image_size), attention=sdpa)
    for name, parameter in dit.named_parameters():
        nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.15)
    return dit.requires_grad_(False).eval()


def read_back(path, sana_file):
    """The denoiser as the trainer loads it, with the other parts from the miniature."""
    model = ModelConfig(pretrained_model_name_or_path=str(path), vae=str(sana_file))
    options = SanaOptions(gemma=str(sana_file))
    files = locate(model, options)
    return load_dit(files, read_dit_config(files, options), attention=sdpa, **CPU), describe(files, options)


def same(dit, other):
    ours, theirs = dit.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@QK_NORM
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_nvlabs_layout_comes_back_bit_for_bit(tmp_path, sana_file, qk_norm, suffix):
    dit, path = random_dit(qk_norm), tmp_path / f"trained{suffix}"
    save_single(dit.state_dict(), path, {})
    again, description = read_back(path, sana_file)
    assert same(again, dit) and again.config == dit.config
    assert description.architecture == ("sana-1.5" if qk_norm else "sana")


@QK_NORM
@pytest.mark.parametrize("image_size", [512, 1024, 2048, 4096])
def test_diffusers_folder_comes_back_bit_for_bit(tmp_path, sana_file, qk_norm, image_size):
    dit = random_dit(qk_norm, image_size)
    save_folder(dit.state_dict(), dit.config, tmp_path / "m" / "transformer", {}, image_size=image_size)
    again, description = read_back(tmp_path / "m", sana_file)
    assert same(again, dit) and again.config == dit.config
    assert description.native_resolution == (image_size, image_size)


@QK_NORM
def test_one_layout_from_the_other(tmp_path, sana_file, qk_norm):
    dit = random_dit(qk_norm)
    save_folder(dit.state_dict(), dit.config, tmp_path / "m" / "transformer", {}, image_size=1024)
    loaded, _ = read_back(tmp_path / "m", sana_file)
    save_single(loaded.state_dict(), tmp_path / "again.safetensors", {})
    stored = load_file(tmp_path / "again.safetensors")
    assert stored.keys() == dit.state_dict().keys()
    assert all(torch.equal(stored[name], tensor) for name, tensor in dit.state_dict().items())


@pytest.mark.reference
@QK_NORM
@torch.no_grad()
def test_diffusers_answers_the_same_with_what_is_saved(tmp_path, qk_norm):
    diffusers = pytest.importorskip("diffusers")
    dit = random_dit(qk_norm)
    save_folder(dit.state_dict(), dit.config, tmp_path / "transformer", {}, image_size=1024)
    theirs, loading = diffusers.SanaTransformer2DModel.from_pretrained(
        tmp_path / "transformer", output_loading_info=True
    )
    assert not any(loading[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    generator = torch.Generator().manual_seed(1)
    x_t, context = torch.randn(2, 32, 5, 3, generator=generator), torch.randn(2, 7, 64, generator=generator)
    mask, timestep = torch.arange(7).expand(2, 7) < torch.tensor([[7], [3]]), torch.tensor([999.0, 31.0])
    expected = theirs(x_t, encoder_hidden_states=context, timestep=timestep, encoder_attention_mask=mask.float()).sample
    assert (dit(x_t, timestep, context, mask) - expected).abs().max() < 2e-5 * expected.abs().max()


@pytest.mark.reference
@pytest.mark.parametrize("image_size", [1024, 4096])
@pytest.mark.parametrize("kind", CONFIGS)
def test_the_published_sizes_have_exactly_the_tensors_that_diffusers_asks_for(kind, image_size):
    diffusers = pytest.importorskip("diffusers")
    config = CONFIGS[kind].at(image_size)
    maps = denoiser_key_maps(depth=config.depth, qk_norm=config.qk_norm)
    with torch.device("meta"):
        dit = LinearDiT(config, attention=sdpa)
        theirs = diffusers.SanaTransformer2DModel.from_config(diffusers_config(config, image_size))
    expected = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    written = {name: tensor.shape for name, tensor in to_diffusers(dit.state_dict(), maps)}
    assert written == expected
    back = {name: tensor.shape for name, tensor in from_diffusers(theirs.state_dict(), maps)}
    assert back == {name: tensor.shape for name, tensor in dit.state_dict().items()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_published_lists_in_both_layouts(kind):
    config = CONFIGS[{"0.6b": "sana-600m", "1.5-1.6b": "sana-1.5-1600m"}[kind]]
    with torch.device("meta"):
        tensors = LinearDiT(config, attention=sdpa).state_dict()
    ours = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    published_names = {name: shape for name, shape in published(kind).items() if name != "y_embedder.y_embedding"}
    assert ours == published_names
    maps = denoiser_key_maps(depth=config.depth, qk_norm=config.qk_norm)
    theirs = {name: tuple(tensor.shape) for name, tensor in to_diffusers(tensors, maps)}
    assert theirs == {
        name: shape for name, shape in denoiser_in_diffusers_layout(kind).items() if "y_embedding" not in name
    }


@pytest.mark.parametrize(("kind", "heads", "cross"), [("sana-600m", 36, 16), ("sana-1.5-4800m", 70, 20)])
def test_the_configuration_that_diffusers_reads(kind, heads, cross):
    config = CONFIGS[kind]
    written = json.loads(json.dumps(diffusers_config(config, 1024)))
    assert written["num_attention_heads"] == heads and written["num_cross_attention_heads"] == cross
    assert written["cross_attention_head_dim"] == config.width // cross and written["sample_size"] == 32
    assert written["num_layers"] == config.depth and written["interpolation_scale"] is None
    assert (diffusers_config(config.at(4096), 4096)["interpolation_scale"]) == 2.0
