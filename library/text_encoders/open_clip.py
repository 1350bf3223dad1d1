"""How OpenCLIP names the tensors of its text encoders, and transformers does. It loads no torch.

Stable Diffusion 2.x's single files hold OpenCLIP's ViT-H so. OpenCLIP fuses ``q``, ``k`` and ``v`` into one layer.
"""

from library.io.key_maps import KeyMap, LayerMap, tensor_maps

_LAYER = {
    "ln_1": "layer_norm1",
    "attn.out_proj": "self_attn.out_proj",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def open_clip_key_maps(*, depth: int) -> tuple[KeyMap, ...]:
    """This lists the tensors of a text encoder in OpenCLIP's spelling and in transformers'.

    The projection is left out: transformers stores its transpose, and the features of single tokens don't need it.

    Args:
        depth: Number of layers.
    """
    maps = [
        KeyMap("token_embedding.weight", ("text_model.embeddings.token_embedding.weight",), "copy"),
        KeyMap("positional_embedding", ("text_model.embeddings.position_embedding.weight",), "copy"),
    ]
    for number in range(depth):
        ours, theirs = f"transformer.resblocks.{number}", f"text_model.encoder.layers.{number}"
        maps += tensor_maps(LayerMap(f"{ours}.{name}", (f"{theirs}.{to}",)) for name, to in _LAYER.items())
        for kind in ("weight", "bias"):
            parts = tuple(f"{theirs}.self_attn.{name}.{kind}" for name in ("q_proj", "k_proj", "v_proj"))
            maps.append(KeyMap(f"{ours}.attn.in_proj_{kind}", parts, "split"))
    return (*maps, *tensor_maps([LayerMap("ln_final", ("text_model.final_layer_norm",))]))
