import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tools.convert_lora import main

LAST = {"sd3.5-medium": (1536, 23), "sd3.5-large": (2432, 37)}


def kohya_file(path, width, block, extra=None):
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer, rows in (("attn_qkv", 3), ("adaLN_modulation_1", 2)):
        name = f"lora_unet_joint_blocks_{block}_context_block_{layer}"
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(rows * width, 2, generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(1.0)
    save_file(
        tensors | (extra or {}), path, {"ss_network_dim": "2", "ss_network_alpha": "1.0", "sshs_model_hash": "old"}
    )
    return tensors


@pytest.mark.parametrize(("width", "block"), LAST.values(), ids=LAST)
def test_there_and_back(tmp_path, width, block, capsys):
    original = kohya_file(tmp_path / "a.safetensors", width, block)
    there, back = tmp_path / "b.safetensors", tmp_path / "c.safetensors"
    assert main([str(tmp_path / "a.safetensors"), str(there), "--to", "diffusers"]) == 0
    assert "2 layers, spelled for diffusers" in capsys.readouterr().out
    theirs = load_file(there)
    # The last block's modulation of the text stream: halves swapped, and no attention output.
    up = theirs[f"transformer.transformer_blocks.{block}.norm1_context.linear.lora_B.weight"]
    own = original[f"lora_unet_joint_blocks_{block}_context_block_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(up[:width], own[width:])

    assert main([str(there), str(back), "--to", "kohya"]) == 0
    restored = load_file(back)
    assert restored.keys() == original.keys()
    for name in (key.removesuffix(".alpha") for key in original if key.endswith(".alpha")):
        deltas = [
            tensors[f"{name}.alpha"] / 2 * tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
            for tensors in (original, restored)
        ]
        torch.testing.assert_close(*deltas)
    with safe_open(back, "pt") as file:
        assert file.metadata() == {"format": "pt", "ss_network_dim": "2", "ss_network_alpha": "2.0"}


def test_what_can_not_be_converted(tmp_path, capsys):
    source, target = str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors")
    kohya_file(source, 1536, 0)
    assert main([source, target, "--to", "kohya"]) == 2
    assert "is spelled for kohya already" in capsys.readouterr().err
    t5 = {
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight": torch.zeros(2, 4096),
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_up.weight": torch.zeros(4096, 2),
    }
    kohya_file(source, 1536, 0, t5)
    assert main([source, target, "--to", "diffusers"]) == 2
    assert "no place for 1 layers, such as lora_te3" in capsys.readouterr().err
    assert main([str(tmp_path / "none"), target, "--to", "kohya"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert not (tmp_path / "b.safetensors").exists()


def lokr_file(path, width, block, *, whole=False):
    generator = torch.Generator().manual_seed(0)
    name = f"lora_unet_joint_blocks_{block}_x_block_attn_qkv"
    tensors = {
        f"{name}.lokr_w1": torch.randn(16, 16, generator=generator),
        f"{name}.lokr_w2_a": torch.randn(3 * width // 16, 2, generator=generator),
        f"{name}.lokr_w2_b": torch.randn(2, width // 16, generator=generator),
        f"{name}.alpha": torch.tensor(1.0),
    }
    if whole:
        tensors = {f"{name}.lokr_w1": torch.randn(16, 16), f"{name}.lokr_w2": torch.randn(3 * width // 16, width // 16)}
    patch = "lora_unet_x_embedder_proj"
    for part, shape in (("w1_a", (width, 2)), ("w1_b", (2, 64)), ("w2_a", (width, 2)), ("w2_b", (2, 64))):
        tensors[f"{patch}.hada_{part}"] = torch.randn(shape, generator=generator)
    save_file(tensors, path)
    return tensors, name


@pytest.mark.parametrize(("width", "block"), LAST.values(), ids=LAST)
def test_lokr_and_loha_become_the_lora_that_they_equal(tmp_path, width, block):
    tensors, name = lokr_file(tmp_path / "a.safetensors", width, block)
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "diffusers"]) == 0
    theirs = load_file(tmp_path / "b.safetensors")
    delta = torch.kron(tensors[f"{name}.lokr_w1"], tensors[f"{name}.lokr_w2_a"] @ tensors[f"{name}.lokr_w2_b"]) / 2
    for part, rows in zip(("to_q", "to_k", "to_v"), delta.chunk(3)):
        key = f"transformer.transformer_blocks.{block}.attn.{part}"
        product = theirs[f"{key}.lora_B.weight"] @ theirs[f"{key}.lora_A.weight"]
        torch.testing.assert_close(product, rows, atol=1e-4, rtol=1e-4)
    patch = theirs["transformer.pos_embed.proj.lora_A.weight"]
    assert patch.shape == (4, 16, 2, 2)


def test_whole_factors_are_refused_with_what_to_do(tmp_path, capsys):
    lokr_file(tmp_path / "a.safetensors", 1536, 0, whole=True)
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "diffusers"]) == 2
    message = capsys.readouterr().err
    assert "1 of its layers, such as lora_unet_joint_blocks_0_x_block_attn_qkv, have a whole second factor" in message
    assert "ComfyUI" in message
    assert not (tmp_path / "b.safetensors").exists()


@pytest.mark.parametrize(("width", "hidden", "block"), [(1152, 2880, 27), (2240, 5600, 59)])
def test_sana_there_and_back(tmp_path, width, hidden, block):
    name = f"lora_unet_blocks_{block}"
    shapes = {"attn_qkv": (3 * width, width), "mlp_inverted_conv_conv": (2 * hidden, width, 1, 1)}
    original = {}
    for layer, (rows, columns, *kernel) in shapes.items():
        original[f"{name}_{layer}.lora_down.weight"] = torch.randn(2, columns, *kernel)
        original[f"{name}_{layer}.lora_up.weight"] = torch.randn(rows, 2, *kernel)
        original[f"{name}_{layer}.alpha"] = torch.tensor(2.0)
    save_file(original, tmp_path / "a.safetensors", {"ss_network_dim": "2", "ss_network_alpha": "2.0"})
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "diffusers"]) == 0
    theirs = load_file(tmp_path / "b.safetensors")
    place = f"transformer.transformer_blocks.{block}"
    own = original[f"{name}_mlp_inverted_conv_conv.lora_up.weight"]
    assert torch.equal(theirs[f"{place}.ff.conv_inverted.lora_B.weight"], own)
    assert torch.equal(
        torch.cat([theirs[f"{place}.attn1.to_{part}.lora_B.weight"] for part in "qkv"]),
        original[f"{name}_attn_qkv.lora_up.weight"],
    )
    assert main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.safetensors"), "--to", "kohya"]) == 0
    restored = load_file(tmp_path / "c.safetensors")
    assert restored.keys() == original.keys()


def test_a_lokr_on_sanas_convolution_keeps_its_kernel(tmp_path):
    name = "lora_unet_blocks_0_mlp_point_conv_conv"
    tensors = {
        f"{name}.lokr_w1": torch.randn(8, 8),
        f"{name}.lokr_w2_a": torch.randn(1152 // 8, 2),
        f"{name}.lokr_w2_b": torch.randn(2, 2880 // 8),
        f"{name}.alpha": torch.tensor(2.0),
    }
    save_file(tensors, tmp_path / "a.safetensors")
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "diffusers"]) == 0
    place = "transformer.transformer_blocks.0.ff.conv_point"
    theirs = load_file(tmp_path / "b.safetensors")
    down, up = theirs[f"{place}.lora_A.weight"], theirs[f"{place}.lora_B.weight"]
    assert down.shape[1:] == (2880, 1, 1) and up.shape[0] == 1152
    expected = torch.kron(tensors[f"{name}.lokr_w1"], tensors[f"{name}.lokr_w2_a"] @ tensors[f"{name}.lokr_w2_b"])
    torch.testing.assert_close(up[:, :, 0, 0] @ down[:, :, 0, 0], expected, atol=1e-4, rtol=1e-4)


def sd_file(path, context_width, kernel, metadata=None):
    """An adapter of Stable Diffusion, as kohya's scripts name its layers; two are convolutions in 1.x."""
    generator = torch.Generator().manual_seed(0)
    block = "lora_unet_down_blocks_0_attentions_0"
    shapes = {
        f"{block}_transformer_blocks_0_attn2_to_k": (320, context_width, ()),
        f"{block}_proj_in": (320, 320, kernel),
        "lora_unet_up_blocks_1_upsamplers_0_conv": (1280, 1280, (3, 3)),
        "lora_te_text_model_encoder_layers_1_mlp_fc1": (4 * context_width, context_width, ()),
    }
    tensors = {}
    for name, (outputs, inputs, size) in shapes.items():
        tensors[f"{name}.lora_down.weight"] = torch.randn(2, inputs, *size, generator=generator)
        tensors[f"{name}.lora_up.weight"] = torch.randn(outputs, 2, *(1 for _ in size), generator=generator)
        tensors[f"{name}.alpha"] = torch.tensor(2.0)
    save_file(tensors, path, {"ss_network_dim": "2", "ss_network_alpha": "2.0", **(metadata or {})})
    return tensors


@pytest.mark.parametrize(("context_width", "kernel"), [(768, (1, 1)), (1024, ())], ids=["sd1", "sd2"])
def test_stable_diffusion_there_and_back(tmp_path, context_width, kernel):
    original = sd_file(tmp_path / "a.safetensors", context_width, kernel)
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "diffusers"]) == 0
    theirs = load_file(tmp_path / "b.safetensors")
    place = "unet.up_blocks.1.upsamplers.0.conv"
    assert torch.equal(
        theirs[f"{place}.lora_B.weight"], original["lora_unet_up_blocks_1_upsamplers_0_conv.lora_up.weight"]
    )
    assert "text_encoder.text_model.encoder.layers.1.mlp.fc1.lora_A.weight" in theirs
    assert main([str(tmp_path / "b.safetensors"), str(tmp_path / "c.safetensors"), "--to", "kohya"]) == 0
    restored = load_file(tmp_path / "c.safetensors")
    assert restored.keys() == original.keys()
    assert all(torch.equal(restored[name], original[name]) for name in original)


def test_a_text_encoders_adapter_says_which_model_it_is_for(tmp_path):
    name = "text_encoder.text_model.encoder.layers.1.mlp.fc1"
    tensors = {f"{name}.lora_A.weight": torch.randn(2, 768), f"{name}.lora_B.weight": torch.randn(3072, 2)}
    for architecture, prefix in (
        ("stable-diffusion-v1/lora", "lora_te"),
        ("stable-diffusion-3-medium/lora", "lora_te1"),
    ):
        save_file(tensors, tmp_path / "a.safetensors", {"modelspec.architecture": architecture})
        assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "kohya"]) == 0
        assert f"{prefix}_text_model_encoder_layers_1_mlp_fc1.alpha" in load_file(tmp_path / "b.safetensors")


@pytest.mark.parametrize(("generation", "kernel"), [("v1", (1, 1)), ("v2-768-v", ())])
def test_a_loha_on_a_projection_has_the_kernel_of_its_generation(tmp_path, generation, kernel):
    """Its tensors are matrices in both, and it looks at no text, so only the metadata tells."""
    name = "lora_unet_mid_block_attentions_0_proj_in"
    shapes = {"hada_w1_a": (1280, 2), "hada_w1_b": (2, 1280), "hada_w2_a": (1280, 2), "hada_w2_b": (2, 1280)}
    tensors = {f"{name}.{part}": torch.randn(shape) for part, shape in shapes.items()}
    architecture = {"modelspec.architecture": f"stable-diffusion-{generation}/lora"}
    save_file(tensors, tmp_path / "a.safetensors", architecture)
    assert main([str(tmp_path / "a.safetensors"), str(tmp_path / "b.safetensors"), "--to", "diffusers"]) == 0
    theirs = load_file(tmp_path / "b.safetensors")
    assert theirs["unet.mid_block.attentions.0.proj_in.lora_A.weight"].shape == (4, 1280, *kernel)
