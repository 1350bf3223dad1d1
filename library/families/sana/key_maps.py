"""How NVlabs' tensors are named and laid out in diffusers' folders, for the denoiser and the VAE.

Diffusers keeps separate layers where NVlabs has fused ``qkv`` and ``kv``, and linear layers where the VAE's attention
has 1x1 convolutions. Everything else is a matter of names.
"""

from collections.abc import Iterator, Sequence

from library.io.key_maps import KeyMap, LayerMap, Operation, tensor_maps
from library.records import FusedLinear

_EMBEDDERS = (
    LayerMap("x_embedder.proj", ("patch_embed.proj",)),
    LayerMap("t_embedder.mlp.0", ("time_embed.emb.timestep_embedder.linear_1",)),
    LayerMap("t_embedder.mlp.2", ("time_embed.emb.timestep_embedder.linear_2",)),
    LayerMap("t_block.1", ("time_embed.linear",)),
    LayerMap("y_embedder.y_proj.fc1", ("caption_projection.linear_1",)),
    LayerMap("y_embedder.y_proj.fc2", ("caption_projection.linear_2",)),
)
_FINAL_LAYER = LayerMap("final_layer.linear", ("proj_out",))
_BLOCK = (
    LayerMap("attn.proj", ("attn1.to_out.0",)),
    LayerMap("cross_attn.q_linear", ("attn2.to_q",)),
    LayerMap("cross_attn.kv_linear", ("attn2.to_k", "attn2.to_v"), "split"),
    LayerMap("cross_attn.proj", ("attn2.to_out.0",)),
    LayerMap("mlp.inverted_conv.conv", ("ff.conv_inverted",)),
    LayerMap("mlp.depth_conv.conv", ("ff.conv_depth",)),
)
_BLOCK_WEIGHTS: tuple[tuple[str, tuple[str, ...], Operation], ...] = (
    ("attn.qkv", ("attn1.to_q", "attn1.to_k", "attn1.to_v"), "split"),
    ("mlp.point_conv.conv", ("ff.conv_point",), "copy"),
)
_QK_NORMS: tuple[tuple[str, tuple[str, ...], Operation], ...] = (
    ("attn.q_norm", ("attn1.norm_q",), "copy"),
    ("attn.k_norm", ("attn1.norm_k",), "copy"),
    ("cross_attn.q_norm", ("attn2.norm_q",), "copy"),
    ("cross_attn.k_norm", ("attn2.norm_k",), "copy"),
)


def denoiser_key_maps(*, depth: int, qk_norm: bool) -> tuple[KeyMap, ...]:
    """This lists every tensor of the denoiser in both spellings.

    Args:
        depth: Number of blocks.
        qk_norm: Whether queries and keys are normalised.
    """
    maps = list(tensor_maps([*_EMBEDDERS, _FINAL_LAYER]))
    maps.append(KeyMap("attention_y_norm.weight", ("caption_norm.weight",), "copy"))
    maps.append(KeyMap("final_layer.scale_shift_table", ("scale_shift_table",), "copy"))
    for i in range(depth):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        maps.append(KeyMap(f"{ours}.scale_shift_table", (f"{theirs}.scale_shift_table",), "copy"))
        maps += tensor_maps(_inside(ours, theirs, _BLOCK))
        for name, names, operation in _BLOCK_WEIGHTS + (_QK_NORMS if qk_norm else ()):
            weights = tuple(f"{theirs}.{their_name}.weight" for their_name in names)
            maps.append(KeyMap(f"{ours}.{name}.weight", weights, operation))
    return tuple(maps)


def fused_layers(*, depth: int) -> dict[str, FusedLinear]:
    """This maps the denoiser's layers, by our module path, to what diffusers has in their place: what adapters need.

    The depthwise convolution is left out, which no adapter can change.

    Args:
        depth: Number of blocks.
    """
    layers = [*_EMBEDDERS, _FINAL_LAYER]
    for i in range(depth):
        inside = [*_BLOCK, *(LayerMap(*names) for names in _BLOCK_WEIGHTS)]
        layers += _inside(f"blocks.{i}", f"transformer_blocks.{i}", inside)
    return {layer.ours: FusedLinear(layer.theirs) for layer in layers if "depth_conv" not in layer.ours}


def vae_key_maps(
    *, encoder_depths: Sequence[int], decoder_depths: Sequence[int], attention_from: int
) -> tuple[KeyMap, ...]:
    """This lists every tensor of the DC-AE in both spellings.

    Args:
        encoder_depths: Blocks per stage of the encoder, from full resolution down.
        decoder_depths: Blocks per stage of the decoder, in the same order.
        attention_from: The first stage whose blocks have attention.
    """
    last = len(encoder_depths) - 1
    maps = list(
        tensor_maps(
            (
                LayerMap("encoder.project_in.conv", ("encoder.conv_in",)),
                LayerMap("encoder.project_out.0.conv", ("encoder.conv_out",)),
                LayerMap("decoder.project_in.conv", ("decoder.conv_in",)),
                LayerMap("decoder.project_out.0", ("decoder.norm_out",)),
                LayerMap("decoder.project_out.2.conv", ("decoder.conv_out",)),
            )
        )
    )
    for stage in range(last + 1):
        ours, theirs = f"encoder.stages.{stage}.op_list", f"encoder.down_blocks.{stage}"
        for i in range(encoder_depths[stage]):
            maps += _vae_block(f"{ours}.{i}", f"{theirs}.{i}", attention=stage >= attention_from)
        if stage < last:
            down = encoder_depths[stage]
            maps += tensor_maps([LayerMap(f"{ours}.{down}.main.conv", (f"{theirs}.{down}.conv",))])
        ours, theirs = f"decoder.stages.{stage}.op_list", f"decoder.up_blocks.{stage}"
        first = 1 if stage < last else 0  # the upsampling comes first
        if first:
            maps += tensor_maps([LayerMap(f"{ours}.0.main.conv.conv", (f"{theirs}.0.conv",))])
        for i in range(first, first + decoder_depths[stage]):
            maps += _vae_block(f"{ours}.{i}", f"{theirs}.{i}", attention=stage >= attention_from)
    return tuple(maps)


def _vae_block(ours: str, theirs: str, *, attention: bool) -> Iterator[KeyMap]:
    if not attention:
        yield from tensor_maps(_inside(f"{ours}.main", theirs, (LayerMap("conv1.conv", ("conv1",)),)))
        yield KeyMap(f"{ours}.main.conv2.conv.weight", (f"{theirs}.conv2.weight",), "copy")
        yield from tensor_maps(_inside(f"{ours}.main", theirs, (LayerMap("conv2.norm", ("norm",)),)))
        return
    context, attn = f"{ours}.context_module.main", f"{theirs}.attn"
    parts = tuple(f"{attn}.{name}.weight" for name in ("to_q", "to_k", "to_v"))
    yield KeyMap(f"{context}.qkv.conv.weight", parts, "split and squeeze")
    multiscale = f"{attn}.to_qkv_multiscale.0"
    yield KeyMap(f"{context}.aggreg.0.0.weight", (f"{multiscale}.proj_in.weight",), "copy")
    yield KeyMap(f"{context}.aggreg.0.1.weight", (f"{multiscale}.proj_out.weight",), "copy")
    yield KeyMap(f"{context}.proj.conv.weight", (f"{attn}.to_out.weight",), "squeeze")
    yield from tensor_maps([LayerMap(f"{context}.proj.norm", (f"{attn}.norm_out",))])
    local, feed_forward = f"{ours}.local_module.main", f"{theirs}.conv_out"
    layers = (
        LayerMap("inverted_conv.conv", ("conv_inverted",)),
        LayerMap("depth_conv.conv", ("conv_depth",)),
        LayerMap("point_conv.norm", ("norm",)),
    )
    yield from tensor_maps(_inside(local, feed_forward, layers))
    yield KeyMap(f"{local}.point_conv.conv.weight", (f"{feed_forward}.conv_point.weight",), "copy")


def _inside(ours: str, theirs: str, layers: Sequence[LayerMap]) -> Iterator[LayerMap]:
    for layer in layers:
        yield LayerMap(f"{ours}.{layer.ours}", tuple(f"{theirs}.{name}" for name in layer.theirs), layer.operation)
