"""A ControlNet's files: begun from a base model, read in every spelling, written for other programs."""

import dataclasses

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.config.errors import ConfigError
from library.config.model import ModelConfig
from library.families.sd.checkpoint import load_unet, read_unet_config
from library.families.sd.control_net import steer
from library.families.sd.control_net_files import keys_of
from library.families.sd.control_net_weights import diffusers_config, load_control_net, save_control_net
from library.families.sd.files import locate
from library.families.sd.options import SdOptions
from library.families.sd.sizes import unet_sizes
from library.families.sd.unet import CONFIGS
from library.io.key_maps import to_diffusers
from library.nn.attention import sdpa
from tests.families.sd.test_control_net import hint, random_control_net
from tests.families.sd.test_unet import assert_close, inputs

SETTINGS = {"attention": sdpa, "device": "cpu", "dtype": torch.float32}


@pytest.fixture(params=["file", "folder"])
def base(request, tiny_sd, tmp_path):
    """The base model's files."""
    path = tmp_path / "base"
    if request.param == "file":
        path = tiny_sd.single_file(tmp_path / "base.safetensors")
    else:
        tiny_sd.folder(path)
    return locate(ModelConfig(pretrained_model_name_or_path=str(path)), SdOptions())


@pytest.fixture
def base_file(tiny_sd, tmp_path):
    path = tiny_sd.single_file(tmp_path / "base.safetensors")
    return locate(ModelConfig(pretrained_model_name_or_path=str(path)), SdOptions())


def begun(base, seed=1, **settings):
    return load_control_net(None, base.denoiser, seed=seed, **{**SETTINGS, **settings})


def read(path, base, **settings):
    return load_control_net(str(path), base.denoiser, seed=1, **{**SETTINGS, **settings})


def residuals(control_net):
    batch = inputs(control_net.config)
    with torch.no_grad():
        return control_net(**batch, hint=hint(batch))


def equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_it_begins_as_a_copy(base, tiny_sd):
    own, keys = begun(base).state_dict(), keys_of(unet_sizes(base.denoiser))
    assert all(torch.equal(own[entry.ours], tiny_sd.denoiser[entry.ours]) for entry in keys.copied)
    assert not any(own[entry.ours].any() for entry in keys.zeros)
    assert all(own[entry.ours].std() > 0.01 for entry in keys.encoder)
    assert len(own) == len(keys.copied) + len(keys.zeros) + len(keys.encoder)


def test_at_first_it_changes_nothing(base_file):
    unet = load_unet(base_file, **SETTINGS)
    batch = inputs(unet.config)
    with torch.no_grad():
        plain = unet(**batch)
        steer(unet, begun(base_file))
        steered = unet(batch["x_t"], batch["timestep"], batch["context"], hint=hint(batch))
    assert torch.equal(steered, plain)


def test_what_is_drawn_follows_the_seed(base_file):
    assert equal(begun(base_file), begun(base_file)) and not equal(begun(base_file), begun(base_file, seed=2))


def test_its_encoder_is_drawn_as_torch_draws_convolutions(base_file):
    torch.manual_seed(0)
    reference = torch.nn.Conv2d(96, 96, 3)
    drawn = begun(base_file).input_hint_block[10]
    for own, other in ((drawn.weight, reference.weight), (drawn.bias, reference.bias)):
        assert own.std().item() == pytest.approx(other.std().item(), rel=0.2)
        assert own.abs().max().item() == pytest.approx(1 / (96 * 9) ** 0.5, rel=0.05)


@pytest.mark.parametrize("layout", ["safetensors", "diffusers"])
def test_what_is_written_is_read_again(base, tmp_path, layout):
    control_net, path = random_control_net(read_unet_config(base)), tmp_path / "own.safetensors"
    save_control_net(control_net.state_dict(), base.denoiser, path, {}, layout=layout, dtype=None)
    assert equal(read(path, base), control_net)


@pytest.mark.parametrize("prefix", ["control_model.", ""])
def test_published_spellings_are_read(base_file, tmp_path, prefix):
    control_net, path = random_control_net(read_unet_config(base_file)), tmp_path / "ldm.safetensors"
    beside = {"model.diffusion_model.out.2.bias": torch.zeros(4)} if prefix else {}
    save_file({**{f"{prefix}{name}": tensor for name, tensor in control_net.state_dict().items()}, **beside}, path)
    assert equal(read(path, base_file), control_net)


@pytest.mark.reference
def test_diffusers_reads_what_is_written(base_file, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    control_net = random_control_net(read_unet_config(base_file))
    folder, file = tmp_path / "folder", tmp_path / "own.safetensors"
    for path, layout in ((folder, "diffusers"), (file, "safetensors")):
        save_control_net(control_net.state_dict(), base_file.denoiser, path, {}, layout=layout, dtype=None)
    batch = inputs(control_net.config)
    for theirs in (
        diffusers.ControlNetModel.from_pretrained(folder, local_files_only=True),
        diffusers.ControlNetModel.from_single_file(str(file), config=str(folder), local_files_only=True),
    ):
        with torch.no_grad():
            down, mid = theirs(
                batch["x_t"], batch["timestep"], batch["context"], controlnet_cond=hint(batch), return_dict=False
            )
        for own, other in zip(residuals(control_net), [*down, mid], strict=True):
            assert_close(own, other)


@pytest.mark.reference
@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_of_the_published_sizes(name):
    """Against diffusers' own defaults, which are those of 1.x."""
    diffusers = pytest.importorskip("diffusers")
    with torch.device("meta"):
        theirs, published = diffusers.ControlNetModel(**diffusers_config(CONFIGS[name])), diffusers.ControlNetModel()
    own = {key: value for key, value in diffusers_config(CONFIGS[name]).items() if not key.startswith("_")}
    for key, default in published.config.items() if name == "sd1" else ():
        if key in own and key not in ("cross_attention_dim", "attention_head_dim"):
            assert own[key] == (list(default) if isinstance(default, tuple) else default), key
    assert theirs.config.cross_attention_dim == CONFIGS[name].context_width
    assert own["attention_head_dim"] == (8 if name == "sd1" else [5, 10, 20, 20])


def written(config, path, **changes):
    tensors = {**random_control_net(config).state_dict(), **changes}
    save_file({f"control_model.{name}": tensor for name, tensor in tensors.items() if tensor is not None}, path)
    return path


def test_what_does_not_fit_is_refused_by_its_name(base_file, tiny_sd, tmp_path):
    config = read_unet_config(base_file)
    wide = written(dataclasses.replace(config, context_width=96), tmp_path / "wide.safetensors")
    twice = written(dataclasses.replace(config, width=128), tmp_path / "twice.safetensors")
    cut = written(config, tmp_path / "cut.safetensors", **{"zero_convs.1.0.bias": None})
    more = written(config, tmp_path / "more.safetensors", **{"label_emb.0.0.weight": torch.zeros(2, 2)})
    shape = written(config, tmp_path / "shape.safetensors", **{"input_hint_block.0.weight": torch.zeros(16, 1, 3, 3)})
    plain = tiny_sd.single_file(tmp_path / "plain.safetensors")
    for path, told in (
        (wide, "wide.safetensors is for a base model whose text features have a width of 96; this one has 64"),
        (twice, "twice.safetensors is for a base model of width 128; this one has 64"),
        (cut, r"cut.safetensors is incomplete: 1 of \d+ tensors are missing \(zero_convs.1.0.bias\)"),
        (more, r"more.safetensors holds 1 unknown tensors \(label_emb.0.0.weight\)"),
        (plain, "plain.safetensors looks like SD .*, expected a ControlNet"),
        (tmp_path / "none.safetensors", "none.safetensors"),
        (shape, "shape.safetensors does not fit ControlNet: 1 of another shape"),
    ):
        with pytest.raises(ConfigError, match=told) as caught:
            read(path, base_file, device="meta")
        assert str(caught.value).startswith("--controlnet_model_name_or_path: ")


def test_numbers_in_fp16_overflow_aloud(base_file, tmp_path):
    control_net = random_control_net(read_unet_config(base_file))
    with torch.no_grad():
        control_net.middle_block_out[0].bias[0] = 1e5
    with pytest.raises(ValueError, match=r"controlnet_mid_block\.bias has numbers that are not finite"):
        save_control_net(
            control_net.state_dict(),
            base_file.denoiser,
            tmp_path / "own.safetensors",
            {},
            layout="safetensors",
            dtype=torch.float16,
        )


def test_the_type_is_as_asked_for(base_file, tmp_path):
    control_net, path = random_control_net(read_unet_config(base_file)), tmp_path / "own.safetensors"
    save_control_net(
        control_net.state_dict(), base_file.denoiser, path, {"a": "b"}, layout="safetensors", dtype=torch.bfloat16
    )
    spelled = dict(to_diffusers(control_net.state_dict(), keys_of(unet_sizes(base_file.denoiser)).all))
    assert {name: tensor.to(torch.bfloat16).shape for name, tensor in spelled.items()} == {
        name: tensor.shape for name, tensor in load_file(path).items()
    }
    assert {tensor.dtype for tensor in load_file(path).values()} == {torch.bfloat16}
