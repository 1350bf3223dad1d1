import json
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModelWithProjection

from library.config.errors import ConfigError
from library.text_encoders.clip import PROJECTION, clip_config, encode_clip, load_clip

KEYS = Path(__file__).parents[1] / "data" / "keys"
END = 99  # the highest id of a vocabulary of 100


def published_shapes(name):
    lines = (KEYS / f"keys_{name}.txt").read_text().splitlines()
    return {key: tuple(json.loads(shape)) for key, shape in (line.split("\t") for line in lines)}


@pytest.fixture
def weights():
    torch.manual_seed(0)
    config = CLIPTextConfig(
        vocab_size=100, hidden_size=128, intermediate_size=200, projection_dim=48, num_hidden_layers=3,
        num_attention_heads=2, bos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    return {
        name: torch.randn_like(value) * 0.2 for name, value in CLIPTextModelWithProjection(config).state_dict().items()
    }


def load(weights, activation="quick_gelu", dtype=torch.float32):
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    return load_clip(
        iter(weights.items()), shapes, activation=activation, device="cpu", dtype=dtype, source="clip.safetensors"
    )


def ids(*captions, pad):
    rows = torch.full((len(captions), 77), pad)
    for row, caption in zip(rows, captions):
        row[: len(caption) + 2] = torch.tensor([98, *caption, END])
    return rows


def test_weights_and_sizes_come_from_the_file(weights):
    encoder = load(weights)
    assert encoder.config.num_hidden_layers == 3 and encoder.config.num_attention_heads == 2
    assert all(torch.equal(value, weights[name]) for name, value in encoder.state_dict().items())
    tensors = [*encoder.parameters(), *encoder.buffers()]
    assert not any(tensor.is_meta or tensor.requires_grad for tensor in tensors) and not encoder.training


@pytest.mark.parametrize(
    ("name", "activation", "width", "depth", "hidden"),
    [("clip_l", "quick_gelu", 768, 12, 3072), ("clip_g", "gelu", 1280, 32, 5120)],
)
def test_published_files_fit(name, activation, width, depth, hidden):
    shapes = published_shapes(name)
    config = clip_config(shapes, activation=activation, source=name)
    sizes = (config.hidden_size, config.num_hidden_layers, config.intermediate_size, config.num_attention_heads)
    assert sizes == (width, depth, hidden, width // 64)
    tensors = ((key, torch.empty(shape, device="meta")) for key, shape in shapes.items())
    load_clip(tensors, shapes, activation=activation, device="meta", dtype=torch.float16, source=name)


def test_the_activation_acts(weights):
    tokens = ids([3, 4], pad=END)
    quick, exact = (encode_clip(load(weights, kind), tokens, None)[0] for kind in ("quick_gelu", "gelu"))
    assert not torch.allclose(quick, exact, atol=1e-3)


def test_features_are_what_the_last_layer_is_given(weights):
    encoder = load(weights)
    given = []
    encoder.text_model.encoder.layers[-1].register_forward_pre_hook(
        lambda module, args, kwargs: given.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    features, _ = encode_clip(encoder, ids([3, 4], [5], pad=END), None)
    assert features.shape == (2, 77, 128)
    assert torch.equal(features, given[0])


@pytest.mark.parametrize("pad", [END, 0])
def test_pooled_at_the_first_end_token(weights, pad):
    encoder = load(weights)
    normed = []
    encoder.text_model.final_layer_norm.register_forward_hook(lambda module, args, output: normed.append(output))
    _, pooled = encode_clip(encoder, ids([3, 4, 7], [5], pad=pad), None)
    expected = torch.stack([normed[0][0, 4], normed[0][1, 2]]) @ weights[PROJECTION].T
    assert pooled.shape == (2, 48)
    torch.testing.assert_close(pooled, expected)


def test_without_a_projection_the_pooled_output_is_not_projected(weights):
    encoder = load({name: value for name, value in weights.items() if name != PROJECTION})
    normed = []
    encoder.text_model.final_layer_norm.register_forward_hook(lambda module, args, output: normed.append(output))
    _, pooled = encode_clip(encoder, ids([3], pad=0), None)
    torch.testing.assert_close(pooled, normed[0][:, 2])


def test_the_mask_hides_padding_and_nothing_else(weights):
    encoder, tokens = load(weights), ids([3, 4], [5, 6, 7], pad=0)
    mask = torch.arange(77) < torch.tensor([[4], [5]])
    (plain, plain_pooled), (masked, masked_pooled) = (encode_clip(encoder, tokens, m) for m in (None, mask))
    # Attention is causal, so a caption never sees the padding after it.
    torch.testing.assert_close(masked[mask], plain[mask])
    torch.testing.assert_close(masked_pooled, plain_pooled)
    changed = (masked - plain).abs().amax(dim=-1) > 1e-3
    assert changed[:, 10:].all()


def test_counting_numbers_of_older_files_are_left_out(weights):
    load(weights | {"text_model.embeddings.position_ids": torch.arange(77)[None]})


def test_another_file_is_an_error():
    with pytest.raises(ConfigError, match=r"t5\.safetensors holds no CLIP text encoder"):
        clip_config({"shared.weight": (10, 10)}, activation="gelu", source="t5.safetensors")


def test_a_missing_tensor_is_an_error(weights):
    del weights["text_model.encoder.layers.1.mlp.fc2.bias"]
    with pytest.raises(ConfigError, match=r"clip\.safetensors .*layers\.1\.mlp\.fc2\.bias"):
        load(weights)
