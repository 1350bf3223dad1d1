"""Models in fp8 files, with and without scales: loaded, kept in fp8, and trained on."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.families import create_family, family_options
from library.families.stored_fp8 import stored_codes
from library.io.safetensors import save_tensors
from library.memory.quantization import FORMATS, quantize_blocks
from library.training.placing import place
from tests.conftest import Trainer
from tests.fp8_files import FP8, as_scaled_fp8, without_scales

CPU = torch.device("cpu")
BLOCKS = ("model.diffusion_model.joint_blocks.", "text_encoders.t5xxl.transformer.encoder.block.")
SPELLINGS = ["scale_weight", "weight_scale", "none"]


def in_blocks(name):
    return name.startswith(BLOCKS)


def in_sana_blocks(name):
    return name.startswith("model.diffusion_model.blocks.") and "depth_conv" not in name


def narrowed(tensors, spelling, chosen=in_blocks):
    if spelling == "none":
        return {
            name: tensor.to(FP8) if chosen(name) and tensor.ndim == 2 else tensor for name, tensor in tensors.items()
        }
    return as_scaled_fp8(tensors, chosen, spelling=spelling)


def family_of(path, name="sd3"):
    options = family_options(name)
    groups = {attribute: group() for attribute, group in options.OBJECTIVE_GROUPS.items()}
    model = ModelConfig(pretrained_model_name_or_path=str(path))
    return create_family(name, SimpleNamespace(model=model, family=options.OPTIONS(), memory=MemoryConfig(), **groups))


def placed(family, precision, dtype, change=None):
    """The denoiser as a run with this precision has it, and what the log says."""
    denoiser = family.load_denoiser(device=CPU, dtype=dtype)
    if change is not None:
        change(denoiser)
    memory = MemoryConfig(base_model_precision=precision)
    return denoiser, place(memory, family, denoiser, CPU, stored=stored_codes(family, "denoiser", denoiser))


def quantised(denoiser):
    return {name: layer for name, layer in denoiser.named_modules() if hasattr(layer, "weight_codes")}


@pytest.fixture(scope="module")
def tiny_tensors(tiny_file):
    return load_file(tiny_file)


@pytest.fixture(scope="module", params=SPELLINGS)
def stored(request, tiny_tensors, tmp_path_factory):
    """A file in fp8, and its tensors."""
    path, tensors = tmp_path_factory.mktemp("fp8") / "model.safetensors", narrowed(tiny_tensors, request.param)
    save_tensors(tensors, path, {})
    return path, tensors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_in_fp8_has_the_numbers_that_it_stands_for(stored, dtype):
    path, tensors = stored
    exact, family = without_scales(tensors), family_of(path)
    modules = {"model.diffusion_model.": family.load_denoiser(device=CPU, dtype=dtype)}
    encoders = family.load_text_encoders(device=CPU, dtype=dtype, names=["t5xxl"])
    modules["text_encoders.t5xxl.transformer."] = encoders["t5xxl"]
    for prefix, module in modules.items():
        state = module.state_dict()
        assert all(
            torch.equal(tensor, exact[prefix + name].to(dtype))
            for name, tensor in state.items()
            if "embed_tok" not in name
        )
    assert len(family.stored_fp8("denoiser")) == sum(
        tensor.dtype == FP8 and "joint" in name for name, tensor in tensors.items()
    )
    assert family.stored_fp8("t5xxl") and not family.stored_fp8("clip_l")


def test_fp8_keeps_the_codes_and_scales_of_the_file(stored):
    path, tensors = stored
    denoiser, (note,) = placed(family_of(path), "fp8", torch.bfloat16)
    layers = quantised(denoiser)
    assert len(layers) > 20 and note.endswith(f"; {len(layers)} layers are as the file has them")
    for name, layer in layers.items():
        layer_name = f"model.diffusion_model.{name}"
        scale = tensors.get(f"{layer_name}.scale_weight", tensors.get(f"{layer_name}.weight_scale", torch.ones(())))
        assert torch.equal(layer.weight_codes.float(), tensors[f"{layer_name}.weight"].float())
        assert set(layer.weight_scales.flatten().tolist()) == {scale.item()}


def test_other_formats_are_made_from_the_exact_numbers(stored):
    path, tensors = stored
    exact = without_scales(tensors)
    denoiser, (note,) = placed(family_of(path), "int8", torch.bfloat16)
    assert "as the file has them" not in note
    for name, layer in quantised(denoiser).items():
        weight = exact[f"model.diffusion_model.{name}.weight"]
        scales = weight.abs().amax(dim=1, keepdim=True) / 127  # those of the weight in bf16 are others
        assert torch.equal(layer.weight_scales, scales)
        assert torch.equal(layer.weight_codes, (weight / scales).round().to(torch.int8))


def test_what_was_merged_into_a_layer_is_kept(stored):
    path, tensors = stored

    def change(denoiser):
        denoiser.joint_blocks[1].x_block.mlp.fc1.weight += 0.5

    denoiser, (note,) = placed(family_of(path), "fp8", torch.float32, change)
    layers = quantised(denoiser)
    assert note.endswith(f"; {len(layers) - 1} layers are as the file has them")
    layer = layers["joint_blocks.1.x_block.mlp.fc1"]
    changed = without_scales(tensors)["model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight"] + 0.5
    assert torch.allclose(layer.weight_codes.float() * layer.weight_scales, changed, rtol=0.07)


def test_shapes_alone_are_enough(stored):
    family = family_of(stored[0])
    denoiser = family.load_denoiser(device="meta", dtype=torch.bfloat16)
    codes = stored_codes(family, "denoiser", denoiser)
    assert quantize_blocks([denoiser.joint_blocks], FORMATS["fp8"], codes).layers > 20


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_sana_and_its_convolutions_too(tiny_sana_file, tmp_path, spelling):
    tensors = narrowed(load_file(tiny_sana_file), spelling, in_sana_blocks)
    save_tensors(tensors, tmp_path / "model.safetensors", {})
    exact = without_scales(tensors)
    denoiser, (note,) = placed(family_of(tmp_path / "model.safetensors", "sana"), "fp8", torch.float32)
    layers = {f"model.diffusion_model.{name}.weight": layer for name, layer in quantised(denoiser).items()}
    kept = [name for name in layers if tensors[name].dtype == FP8]
    assert kept and note.endswith(f"; {len(kept)} layers are as the file has them")
    for name, layer in layers.items():
        numbers = layer.weight_codes.float() * layer.weight_scales
        same = torch.equal if name in kept else lambda a, b: (a - b).norm() < 0.03 * b.norm()
        assert same(numbers, exact[name].flatten(1))


def test_training_from_codes_and_from_what_they_stand_for_is_the_same(tiny_tensors, trainer, capsys):
    path = trainer.folder / "model.safetensors"
    save_tensors(narrowed(tiny_tensors, "scale_weight"), path, {})
    own = Trainer(path, trainer.photos, trainer.folder)
    cached = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
    options = {**cached, "tokenizer_dir": trainer.checkpoint.parent, "mixed_precision": "bf16", "max_train_steps": 2}
    told = {}
    for output, more in {"kept": {"base_model_precision": "fp8"}, "wide": {}}.items():
        assert own(output, **options, **more) == 0
        told[output] = capsys.readouterr().err
    assert trainer.losses("kept") == trainer.losses("wide")
    assert "scales of activations are left out). They become bfloat16; --base_model_precision fp8" in told["wide"]
    assert "are left out). Those of the blocks stay as they are, others become bfloat16" in told["kept"]
    assert "t5xxl: " in told["wide"] and "clip_l: " not in told["wide"]


def test_a_full_fine_tune_from_fp8_is_warned_of_and_writes_whole_weights(tiny_tensors, full_trainer, capsys):
    path, tensors = full_trainer.folder / "model.safetensors", narrowed(tiny_tensors, "scale_weight")
    save_tensors(tensors, path, {})
    own = Trainer(path, full_trainer.photos, full_trainer.folder, job="full")
    options = {"tokenizer_dir": full_trainer.checkpoint.parent, "cache_latents": True, "save_parts": ["text_encoders"]}
    assert own("full", **options, cache_text_encoder_outputs=True, max_train_steps=1) == 0
    told = capsys.readouterr().err
    assert "They are trained from there in float32: what fp8 rounded away" in told
    saved = own.weights("full")
    assert not any("scale" in name for name in saved)
    name = BLOCKS[1] + "0.layer.0.SelfAttention.q.weight"
    assert torch.equal(saved[name], without_scales(tensors)[name].bfloat16())
