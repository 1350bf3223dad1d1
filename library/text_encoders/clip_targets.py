"""Which layers of a CLIP text encoder an adapter changes."""

from library.records import AdapterTargets, FusedLinear

_LAYERS = "text_model.encoder.layers"
_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.out_proj",
    "mlp.fc1",
    "mlp.fc2",
)


def clip_targets(prefix: str, diffusers_prefix: str, *, layers: int, read: int | None = None) -> AdapterTargets:
    """This describes an adapter's place in a CLIP: every linear layer of its transformer.

    Args:
        prefix: Of the adapter's keys.
        diffusers_prefix: Of the encoder's keys in a diffusers adapter file.
        layers: How many layers the encoder has.
        read: How many of them, from the first, anything looks at: others would learn nothing. None: all.
    """
    paths = [f"{_LAYERS}.{number}.{linear}" for number in range(layers) for linear in _LINEARS]
    return AdapterTargets(
        prefix=prefix,
        include=(f"{_LAYERS}.*.self_attn.*", f"{_LAYERS}.*.mlp.*"),
        exclude=tuple(f"{_LAYERS}.{number}.*" for number in range(layers if read is None else read, layers)),
        fused={path: FusedLinear((path,)) for path in paths},
        diffusers_prefix=diffusers_prefix,
    )
