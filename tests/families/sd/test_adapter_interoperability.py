"""Adapters that we save, in diffusers' own pipeline and in LyCORIS's own loader; and those that they save, here."""

import json

import pytest
import torch

from library.io.safetensors import save_tensors
from networks.loading import adapter_components, load_adapter
from tests.families.sd.adapter_models import (
    EVERYTHING,
    KINDS,
    adapter,
    assert_same,
    differences,
    models,
    our_answers,
    pipeline,
    targets_for,
    their_answers,
    tiny_clip,
)
from tests.families.sd.test_unet import diffusers_twin, random_unet
from tests.networks.adapter_fixtures import randomise

pytestmark = pytest.mark.reference


SAVED = {
    "sd1-lierla": ("sd1", (), "kohya"),
    "sd2-lierla": ("sd2", (), "kohya"),
    "sd1-everything": ("sd1", EVERYTHING, "kohya"),
    "sd2-everything": ("sd2", EVERYTHING, "kohya"),
    "sd1-diffusers": ("sd1", EVERYTHING, "diffusers"),
    "sd2-diffusers": ("sd2", EVERYTHING, "diffusers"),
}


@pytest.mark.parametrize(("kind", "arguments", "save_format"), SAVED.values(), ids=SAVED)
def test_diffusers_loads_what_we_save(tmp_path, kind, arguments, save_format):
    """kohya's spelling directly, as in its users' notebooks."""
    pytest.importorskip("peft")
    roots = models(kind)
    plain = our_answers(roots)
    network = randomise(adapter(roots, *arguments))
    ((tensors, metadata),) = network.files(save_format).values()
    save_tensors(tensors, tmp_path / "adapter.safetensors", metadata)
    pipe = pipeline(kind)
    assert_same(their_answers(pipe.unet, pipe.text_encoder, kind), plain)
    pipe.load_lora_weights(tmp_path, weight_name="adapter.safetensors")
    assert_same(their_answers(pipe.unet, pipe.text_encoder, kind), our_answers(roots))
    assert min(differences(our_answers(roots), plain)) > 1e-2


def test_diffusers_spelling_is_read_back_exactly(tmp_path):
    roots = models("sd1")
    network = randomise(adapter(roots, *EVERYTHING, network_alpha=4.0))
    ((tensors, metadata),) = network.files("diffusers").values()
    assert "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.lora_A.weight" in tensors
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight" in tensors
    path = tmp_path / "adapter.safetensors"
    save_tensors(tensors, path, metadata)
    targets = targets_for(KINDS["sd1"])
    assert adapter_components(path, targets) == {"denoiser", "clip"}
    again = models("sd1")
    load_adapter(path, again, targets)
    assert_same(our_answers(again), our_answers(roots))


@pytest.mark.parametrize("kind", KINDS)
def test_we_load_what_diffusers_saves(tmp_path, kind):
    """As diffusers' training script does it: PEFT on some layers, saved by the pipeline with its configuration."""
    diffusers, peft = pytest.importorskip("diffusers"), pytest.importorskip("peft")
    pipe = pipeline(kind)
    modules = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "conv1"]
    config = peft.LoraConfig(r=3, lora_alpha=7, init_lora_weights=False, target_modules=modules)
    torch.manual_seed(3)
    pipe.unet.add_adapter(config)
    diffusers.StableDiffusionPipeline.save_lora_weights(
        tmp_path,
        unet_lora_layers=peft.get_peft_model_state_dict(pipe.unet),
        unet_lora_adapter_metadata=json.loads(json.dumps(config.to_dict(), default=list)),
    )
    roots = models(kind)
    plain = our_answers(roots)
    load_adapter(tmp_path / "pytorch_lora_weights.safetensors", roots, targets_for(KINDS[kind]))
    assert_same(our_answers(roots), their_answers(pipe.unet, pipe.text_encoder, kind))
    assert differences(our_answers(roots), plain)[0] > 1e-2


# LyCORIS


def preset(path, *, convolutions):
    """LyCORIS's full and attn-mlp with the classes of these models; its own full names two layers twice in 4.1.3."""
    modules = ["Transformer2DModel", *(["ResnetBlock2D", "Downsample2D", "Upsample2D"] if convolutions else [])]
    names = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2"] if convolutions else []
    path.write_text(
        f"enable_conv = {json.dumps(convolutions)}\nunet_target_module = {json.dumps(modules)}\n"
        f"unet_target_name = {json.dumps(names)}\ntext_encoder_target_name = []\n"
        'text_encoder_target_module = ["CLIPAttention", "CLIPMLP"]\n'
    )
    return str(path)


ALGORITHMS = {
    "sd1-lora": ("sd1", ("algo=lora",), True),
    "sd1-locon": ("sd1", ("algo=locon", "conv_dim=2", "conv_alpha=1"), True),
    "sd2-transformers": ("sd2", ("algo=lora", "preset=attn-mlp"), False),
    "sd1-loha": ("sd1", ("algo=loha",), True),
    "sd2-lokr": ("sd2", ("algo=lokr", "factor=4", "conv_dim=2"), True),
}


@pytest.mark.parametrize(("kind", "arguments", "convolutions"), ALGORITHMS.values(), ids=ALGORITHMS)
def test_lycoris_names_the_same_layers_with_the_same_sizes_and_loads_the_file(tmp_path, kind, arguments, convolutions):
    kohya = pytest.importorskip("lycoris.kohya")
    roots = models(kind)
    settings = {"network_module": "lycoris.kohya"}
    # The four layers outside the blocks, which LyCORIS changes too, aren't changed here unless they are named.
    embedders = ("emb_dims=[4,4,4]",) if convolutions and "conv_dim=2" not in arguments else ()
    network = randomise(adapter(roots, *arguments, *embedders, **settings))
    theirs = dict(argument.split("=") for argument in arguments) | {
        "preset": preset(tmp_path / "preset.toml", convolutions=convolutions)
    }
    unet, clip = diffusers_twin(random_unet(KINDS[kind])).eval(), tiny_clip()
    created = kohya.create_network(1.0, 4, 3.0, None, clip, unet, **theirs)
    layers = [*created.text_encoder_loras, *created.unet_loras]
    expected = {
        f"{layer.lora_name}.{name}": tuple(tensor.shape)
        for layer in layers
        for name, tensor in layer.state_dict().items()
        if embedders or ("_conv_in" not in layer.lora_name and "_conv_out" not in layer.lora_name)
        if embedders or "time_embedding" not in layer.lora_name
    }
    tensors = network.state_dict_kohya()
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected

    path = tmp_path / "adapter.safetensors"
    save_tensors(tensors, path, {})
    unet, clip = diffusers_twin(random_unet(KINDS[kind])).eval(), tiny_clip()
    loaded, weights = kohya.create_network_from_weights(1.0, str(path), None, clip, unet)
    loaded.apply_to(clip, unet, True, True)
    assert not loaded.load_state_dict(weights, False).missing_keys
    loaded.eval()
    assert_same(their_answers(unet, clip, kind), our_answers(roots))
