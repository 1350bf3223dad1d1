"""How the single file's tensors are named and laid out in diffusers' folders, for the denoiser.

Diffusers keeps three layers where the single file has one fused ``qkv``, and wants (scale, shift) where the single file
stores (shift, scale) in the two layers that have no gate. Everything else is a matter of names.
"""

from collections.abc import Sequence

from library.io.key_maps import KeyMap, LayerMap, tensor_maps
from library.records import FusedLinear

_EMBEDDERS = (
    LayerMap("x_embedder.proj", ("pos_embed.proj",)),
    LayerMap("t_embedder.mlp.0", ("time_text_embed.timestep_embedder.linear_1",)),
    LayerMap("t_embedder.mlp.2", ("time_text_embed.timestep_embedder.linear_2",)),
    LayerMap("y_embedder.mlp.0", ("time_text_embed.text_embedder.linear_1",)),
    LayerMap("y_embedder.mlp.2", ("time_text_embed.text_embedder.linear_2",)),
    LayerMap("context_embedder", ("context_embedder",)),
)

_FINAL_LAYER = (
    LayerMap("final_layer.linear", ("proj_out",)),
    LayerMap("final_layer.adaLN_modulation.1", ("norm_out.linear",), "swap"),
)

_EVERY_BLOCK = (
    LayerMap("x_block.adaLN_modulation.1", ("norm1.linear",)),
    LayerMap("x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v"), "split"),
    LayerMap("x_block.attn.proj", ("attn.to_out.0",)),
    LayerMap("x_block.mlp.fc1", ("ff.net.0.proj",)),
    LayerMap("x_block.mlp.fc2", ("ff.net.2",)),
    LayerMap("context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"), "split"),
)

_DUAL_BLOCK = (
    LayerMap("x_block.attn2.qkv", ("attn2.to_q", "attn2.to_k", "attn2.to_v"), "split"),
    LayerMap("x_block.attn2.proj", ("attn2.to_out.0",)),
)

_ALL_BUT_LAST_BLOCK = (
    LayerMap("context_block.adaLN_modulation.1", ("norm1_context.linear",)),
    LayerMap("context_block.attn.proj", ("attn.to_add_out",)),
    LayerMap("context_block.mlp.fc1", ("ff_context.net.0.proj",)),
    LayerMap("context_block.mlp.fc2", ("ff_context.net.2",)),
)

_LAST_BLOCK = (LayerMap("context_block.adaLN_modulation.1", ("norm1_context.linear",), "swap"),)

_QK_NORMS = {
    "x_block.attn.ln_q": "attn.norm_q",
    "x_block.attn.ln_k": "attn.norm_k",
    "context_block.attn.ln_q": "attn.norm_added_q",
    "context_block.attn.ln_k": "attn.norm_added_k",
}
_DUAL_QK_NORMS = {"x_block.attn2.ln_q": "attn2.norm_q", "x_block.attn2.ln_k": "attn2.norm_k"}


def denoiser_layers(*, depth: int, dual_attention_blocks: Sequence[int]) -> tuple[LayerMap, ...]:
    """This lists the denoiser's layers that have a weight and a bias, in both spellings.

    Args:
        depth: Number of joint blocks.
        dual_attention_blocks: Blocks with a second attention.
    """
    layers = list(_EMBEDDERS)
    for i in range(depth):
        dual = _DUAL_BLOCK if i in dual_attention_blocks else ()
        for layer in _EVERY_BLOCK + dual + (_LAST_BLOCK if i == depth - 1 else _ALL_BUT_LAST_BLOCK):
            theirs = tuple(f"transformer_blocks.{i}.{name}" for name in layer.theirs)
            layers.append(LayerMap(f"joint_blocks.{i}.{layer.ours}", theirs, layer.operation))
    return (*layers, *_FINAL_LAYER)


def denoiser_key_maps(*, depth: int, qk_norm: bool, dual_attention_blocks: Sequence[int]) -> tuple[KeyMap, ...]:
    """This lists every tensor of the denoiser in both spellings.

    Args:
        depth: Number of joint blocks.
        qk_norm: Whether queries and keys are normalised.
        dual_attention_blocks: Blocks with a second attention.
    """
    maps = [KeyMap("pos_embed", ("pos_embed.pos_embed",), "copy")]
    maps += tensor_maps(denoiser_layers(depth=depth, dual_attention_blocks=dual_attention_blocks))
    for i in range(depth if qk_norm else 0):
        norms = _QK_NORMS | (_DUAL_QK_NORMS if i in dual_attention_blocks else {})
        for ours, theirs in norms.items():
            names = f"joint_blocks.{i}.{ours}.weight", (f"transformer_blocks.{i}.{theirs}.weight",)
            maps.append(KeyMap(*names, "copy"))
    return tuple(maps)


def fused_linears(*, depth: int, dual_attention_blocks: Sequence[int]) -> dict[str, FusedLinear]:
    """This maps the denoiser's layers, by our module path, to what diffusers has in their place: what adapters need.

    Args:
        depth: Number of joint blocks.
        dual_attention_blocks: Blocks with a second attention.
    """
    layers = denoiser_layers(depth=depth, dual_attention_blocks=dual_attention_blocks)
    return {layer.ours: FusedLinear(layer.theirs, swap_halves=layer.operation == "swap") for layer in layers}
