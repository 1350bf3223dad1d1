import pytest
import torch

from library.config.errors import ConfigError
from library.io.components import Component, find_part, require_part
from library.io.fp8_matrices import Fp8Matrices
from library.io.header import read_header
from library.io.key_maps import KeyMap
from library.io.parts import part_identity
from library.io.safetensors import LazyTensors, save_tensors
from tests.fp8_files import as_scaled_fp8

PART = Component("denoiser", "--base", "folder", "a model", {"single": (r"block\.0\.weight",)}, keep=r"(?!other\.)")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def stored(tmp_path, tensors, name="model"):
    save_tensors(tensors, tmp_path / f"{name}.safetensors", {})
    return find_part(PART, (read_header(tmp_path / f"{name}.safetensors"),), "the file")


def tensors_of(spelling, prefix="model.diffusion_model."):
    plain = {"block.0.weight": normal(6, 4), "block.0.bias": normal(6), "block.1.weight": normal(5, 6, 1, 1, seed=1)}
    return as_scaled_fp8({prefix + name: value for name, value in plain.items()}, lambda name: True, spelling=spelling)


@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("spelling", ["scale_weight", "weight_scale"])
def test_weights_are_their_fp8_numbers_times_their_scale(tmp_path, spelling, prefix, suffix):
    from library.io.parts import read_weights

    tensors = tensors_of(spelling, prefix)
    path = tmp_path / f"model.{suffix}"
    save_tensors(tensors, path, {}) if suffix == "safetensors" else torch.save(tensors, path)
    part = require_part(PART, read_weights(path), "the file")
    assert set(part.names) == {"block.0.weight", "block.0.bias", "block.1.weight"}
    assert set(part.scales) == {"block.0.weight", "block.1.weight"} and len(part.unused) == 2
    read = LazyTensors(part)
    for name in part.scales:
        layer = prefix + name.removesuffix(".weight")
        expected = tensors[f"{layer}.weight"].float() * tensors[f"{layer}.{spelling}"]
        assert read[name].dtype == torch.float32 and torch.equal(read[name], expected)
        matrix = Fp8Matrices(part)[name]
        assert matrix.codes.dtype == torch.float8_e4m3fn
        assert torch.equal(matrix.codes.float(), tensors[f"{layer}.weight"].flatten(1).float())
        assert torch.equal(matrix.codes.float() * matrix.scales, expected.flatten(1))
    assert torch.equal(read["block.0.bias"], tensors[f"{prefix}block.0.bias"])
    meta = LazyTensors(part, device="meta")["block.0.weight"]
    assert meta.is_meta and meta.shape == (6, 4)


def test_plain_fp8_has_scales_of_one(tmp_path):
    part = stored(tmp_path, {"block.0.weight": normal(6, 4).to(torch.float8_e4m3fn), "block.1.weight": normal(6, 4)})
    assert dict(part.scales) == {} and set(Fp8Matrices(part)) == {"block.0.weight"}
    assert torch.equal(Fp8Matrices(part)["block.0.weight"].scales, torch.ones(6, 1))


@pytest.mark.parametrize(
    ("operation", "count"), [("split", 3), ("swap", 1), ("squeeze", 1), ("split and squeeze", 2), ("copy", 1)]
)
def test_rows_keep_their_scales_where_a_layout_joins_or_moves_them(tmp_path, operation, count):
    names = [f"block.{i}.weight" for i in range(count)]
    plain = {name: normal(4, 6, seed=i) * 10**i for i, name in enumerate(names)}
    part = stored(tmp_path, as_scaled_fp8(plain, lambda name: True))
    object.__setattr__(part, "layout", "diffusers")
    maps = [KeyMap("ours.weight", tuple(names), operation), KeyMap("bias", ("nothing",), "copy")]
    (name,) = matrices = Fp8Matrices(part, maps)
    from library.io.key_maps import from_diffusers

    ((_, joined),) = from_diffusers(dict(LazyTensors(part)), maps[:1])
    assert name == "ours.weight"
    assert torch.equal(matrices[name].codes.float() * matrices[name].scales, joined.flatten(1))


def test_a_matrix_that_is_fp8_in_part_is_none(tmp_path):
    part = stored(tmp_path, {"block.0.weight": normal(6, 4).to(torch.float8_e4m3fn), "block.1.weight": normal(6, 4)})
    object.__setattr__(part, "layout", "diffusers")
    assert not Fp8Matrices(part, [KeyMap("ours", ("block.0.weight", "block.1.weight"), "split")])


def test_another_scale_is_another_identity_and_no_scale_leaves_it_as_it_was(tmp_path):
    tensors = tensors_of("scale_weight")
    first = part_identity(stored(tmp_path, tensors))
    scale = "model.diffusion_model.block.0.scale_weight"
    assert part_identity(stored(tmp_path, tensors | {scale: tensors[scale] * 2}, "other")) != first
    assert part_identity(stored(tmp_path, tensors, "same")) == first
    bare = {name: tensor for name, tensor in tensors.items() if "scale" not in name}
    assert part_identity(stored(tmp_path, bare, "bare")) != first
    marked = bare | {"model.diffusion_model.scaled_fp8": torch.zeros(0)}
    assert part_identity(stored(tmp_path, marked, "marked")) == part_identity(stored(tmp_path, bare, "bare again"))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"block.0.weight": normal(6, 4).bfloat16()}, "has a scale for block.0.weight, which is no fp8 but BF16; use"),
        ({"block.0.scale_weight": torch.ones(6, 1)}, "block.0.scale_weight is 6x1 of F32, and only one number in fp32"),
        ({"block.0.scale_weight": torch.ones((), dtype=torch.uint8)}, "block.0.scale_weight is one number of U8"),
        ({"block.7.scale_weight": torch.ones(())}, "has the scale block.7.scale_weight of a weight that is not there"),
        ({"block.0.weight_scale_2": torch.ones(())}, "in a format that is not known here (block.0.weight_scale_2)"),
        ({"block.0.pre_quant_scale": torch.ones(4)}, "in a format that is not known here (block.0.pre_quant_scale)"),
        ({"block.0.weight": torch.ones(6, 4, dtype=torch.int8)}, "stores block.0.weight as I8"),
        ({"block.0.weight": torch.ones(6, 4).to(torch.float8_e5m2)}, "stores block.0.weight as fp8 e5m2"),
    ],
)
def test_other_formats_are_refused_by_name(tmp_path, changes, expected):
    prefix = "model.diffusion_model."
    tensors = tensors_of("scale_weight") | {prefix + name: value for name, value in changes.items()}
    with pytest.raises(ConfigError) as error:
        stored(tmp_path, tensors)
    assert expected in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("scale", [-1.0, float("inf")])
def test_a_scale_that_can_not_be_is_a_damaged_file(tmp_path, scale):
    tensors = tensors_of("scale_weight", "")
    save = {**tensors, "block.0.scale_weight": torch.tensor(scale)}
    from library.io.safetensors import save_as_it_is

    save_as_it_is(save, tmp_path / "model.safetensors")
    part = find_part(PART, (read_header(tmp_path / "model.safetensors"),), "the file")
    with pytest.raises(ConfigError, match=f"the file: the scale block.0.scale_weight is {scale}"):
        LazyTensors(part)["block.0.weight"]
