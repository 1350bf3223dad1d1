"""``--text_encoder_1_precision`` and its siblings: frozen text encoders in fewer bits."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.families import create_family, family_options
from library.families.stored_fp8 import stored_codes
from library.io.header import read_header
from library.io.safetensors import save_tensors
from library.memory.quantization import FORMATS, quantized_layers
from library.text_encoders.few_bits import encoder_formats, quantize_encoder
from library.training.encoder_precision import precision_signature
from tests.conftest import Trainer
from tests.fp8_files import as_scaled_fp8

CPU = torch.device("cpu")
CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
# Root mean square error of the features of random encoders, relative to the features
ERRORS = {"int8": 0.02, "fp8": 0.07, "int4": 0.25, "nf4": 0.22}


def family_of(path, name="sd3"):
    options = family_options(name)
    groups = {attribute: group() for attribute, group in options.OBJECTIVE_GROUPS.items()}
    model = ModelConfig(pretrained_model_name_or_path=str(path))
    return create_family(name, SimpleNamespace(model=model, family=options.OPTIONS(), memory=MemoryConfig(), **groups))


@pytest.fixture(scope="module", params=["sd3", "sana"])
def family(request, tiny_file, tiny_sana_file):
    return family_of(tiny_file if request.param == "sd3" else tiny_sana_file, request.param)


def features(family, encoders):
    strategy = family.text_strategy()
    with torch.no_grad():
        return strategy.encode(encoders, strategy.tokenize(["a red circle by night", "two dogs"])).tensors()


@pytest.mark.parametrize("name", FORMATS)
def test_features_are_as_near_as_the_format_allows(family, name):
    encoders = family.load_text_encoders(device=CPU, dtype=torch.float32)
    exact = features(family, encoders)
    for component, encoder in encoders.items():
        plain = {key for key, _ in encoder.named_parameters()}
        told = quantize_encoder(component, encoder, FORMATS[name], None, CPU, via="cpu")
        layers = quantized_layers(encoder)
        assert told.startswith(f"{component} in {name}: {len(layers)} layers, ") and len(layers) >= 6
        gone = plain - {key for key, _ in encoder.named_parameters()}
        assert gone == {f"{layer}.weight" for layer in layers}  # norms, biases, embeddings, projections stay
        assert not any(word in key for key in gone for word in ("norm", "embed", "text_projection", "shared"))
    near = features(family, encoders)
    for key, value in exact.items():
        if value.is_floating_point():
            error = (near[key] - value).square().mean().sqrt() / value.square().mean().sqrt()
            assert 0 < error < ERRORS[name], (key, error)


def test_what_t5_computes_in_fp32_it_does_in_fewer_bits_too(tiny_file):
    encoder = family_of(tiny_file).load_text_encoders(device=CPU, dtype=torch.float16, names=["t5xxl"])["t5xxl"]
    quantize_encoder("t5xxl", encoder, FORMATS["int8"], None, CPU, via="cpu")
    layer = encoder.encoder.block[0].layer[1].DenseReluDense.wo
    x = torch.full((2, layer.in_features), 6e4, dtype=torch.float16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = layer(x)
    assert answer.dtype == torch.float32 and answer.isfinite().all()


def test_an_encoder_in_fp8_keeps_its_codes(tiny_file, tmp_path):
    prefix = "text_encoders.t5xxl.transformer."
    tensors = as_scaled_fp8(load_file(tiny_file), lambda name: name.startswith(f"{prefix}encoder.block."))
    save_tensors(tensors, tmp_path / "model.safetensors", {})
    family = family_of(tmp_path / "model.safetensors")
    encoder = family.load_text_encoders(device=CPU, dtype=torch.bfloat16, names=["t5xxl"])["t5xxl"]
    told = quantize_encoder(
        "t5xxl", encoder, FORMATS["fp8"], stored_codes(family, "t5xxl", encoder), CPU, via="accelerator"
    )
    layers = quantized_layers(encoder)
    assert told.endswith(f"; {len(layers)} layers are as the file has them")
    for name, layer in layers.items():
        assert torch.equal(layer.weight_codes.float(), tensors[f"{prefix}{name}.weight"].float())


def test_options_number_the_encoders_that_there_are(family):
    memory = MemoryConfig(text_encoder_1_precision="int8-quanto")
    first = family.description.text_encoders[0]
    assert encoder_formats(memory, family.description.text_encoders) == {first: FORMATS["int8"]}
    assert precision_signature(memory) == {"text_encoder_1_precision": "int8"}
    assert precision_signature(MemoryConfig()) == {}
    named = {"sd3": ("clip_l", "clip_g", "t5xxl"), "sana": ("gemma",)}
    assert (
        family.description.text_encoders
        == named[family.name]
        == tuple(family.load_text_encoders(device="meta", dtype=torch.float32))
    )


def test_features_in_another_precision_are_encoded_anew(trainer, capsys):
    on_disk = {**CACHED, "cache_text_encoder_outputs_to_disk": True, "cache_dir": trainer.folder / "cache"}
    said = {}
    for output, options in {
        "plain": {},
        "int8": {"text_encoder_3_precision": "int8"},
        "int8 again": {"text_encoder_3_precision": "int8-quanto", "quantize_via": "cpu"},
        "plain again": {},
    }.items():
        capsys.readouterr()
        assert trainer(output, **on_disk, **options, max_train_steps=1) == 0
        said[output] = capsys.readouterr().err
    loading = "loading the text encoders"
    assert [output for output, told in said.items() if loading in told] == ["plain", "int8"]
    assert "t5xxl in int8: 7 layers" in said["int8"]
    metadata = [read_header(trainer.folder / name / "run.safetensors").metadata for name in ("plain", "int8")]
    kept = [{key: value for key, value in one.items() if "_precision" in key} for one in metadata]
    assert kept[1] == {**kept[0], "ss_text_encoder_3_precision": "int8"} != kept[0]
    losses = {output: trainer.losses(output)[1] for output in said}
    assert losses["plain"] == losses["plain again"] != losses["int8"] == losses["int8 again"]
    assert losses["int8"] == pytest.approx(losses["plain"], rel=0.01)


def test_without_a_cache_the_step_encodes_with_them(trainer):
    options = {"cache_latents": True, "network_train_unet_only": True, "max_train_steps": 1}
    precisions = {f"text_encoder_{number}_precision": "int8" for number in (1, 2, 3)}
    for output, more in {"plain": {}, "int8": precisions}.items():
        assert trainer(output, **options, **more) == 0
    assert trainer.losses("int8") != trainer.losses("plain")
    assert trainer.losses("int8") == pytest.approx(trainer.losses("plain"), rel=0.01)


def test_what_can_not_be_is_said_before_anything_is_loaded(trainer, tiny_sana_file, photos, tmp_path, capsys):
    (tmp_path / "sana").mkdir()
    sana = Trainer(tiny_sana_file, photos, tmp_path / "sana", "sana")
    assert trainer("out", text_encoder_1_precision="int8", text_encoder_3_precision="int8") == 2
    error = capsys.readouterr().err
    assert "error: --text_encoder_1_precision int8 is for a text encoder that stays as it is, and clip_l is tr" in error
    assert "text_encoder_3_precision" not in error.split("error: ", 1)[1]
    assert sana("out", **CACHED, text_encoder_2_precision="nf4") == 2
    assert "--text_encoder_2_precision does nothing: this model's text encoders are gemma" in capsys.readouterr().err
