"""SimpleTuner's ``lycoris_config.json``, translated to the adapter's options."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from library.config.network import LYCORIS

_TYPES: Mapping[str, Mapping[str, tuple[str, ...]]] = {
    "sd3": {
        "Attention": ("x_attn", "context_attn"),
        "FeedForward": ("x_mlp", "context_mlp"),
        "AdaLayerNormZero": ("x_mod", "context_mod"),
        "JointTransformerBlock": ("x_attn", "context_attn", "x_mlp", "context_mlp", "x_mod", "context_mod"),
    },
    "sana": {
        "Attention": ("attn", "cross_attn"),
        "FeedForward": ("mlp",),
        "GLUMBConv": ("mlp",),
        "SanaTransformerBlock": ("attn", "cross_attn", "mlp"),
    },
}
"""Family -> diffusers' class of modules -> our types of layers."""

_AS_THEY_ARE = ("factor", "decompose_both", "full_matrix", "rank_dropout", "module_dropout")
_NOTHING = (None, False, 0, 0.0, "")


@dataclass
class Lycoris:
    """What became of a ``lycoris_config.json``.

    Attributes:
        values: Options of the run.
        left_out: What has no counterpart, a line each.
    """

    values: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)


def translate_lycoris(config: Mapping[str, Any], family: str) -> Lycoris:
    """This turns the file's settings into ours.

    Args:
        config: The file.
        family: The family's name; its layers decide what the preset's classes mean.
    """
    result = Lycoris({"network_module": LYCORIS})
    arguments = [f"algo={config.get('algo', 'lora')}"]
    whole = bool(config.get("full_matrix"))
    for key, value in config.items():
        if key in ("algo", "apply_preset") or (key == "multiplier" and value == 1):
            continue
        if key in ("linear_dim", "linear_alpha"):
            if not whole:  # without ranks neither acts
                name = key.replace("linear", "network")
                result.values[name] = int(value) if key == "linear_dim" else float(value)
        elif key in _AS_THEY_ARE and value not in _NOTHING:
            arguments.append(f"{key}={_text(value)}")
        elif key not in _AS_THEY_ARE and value not in _NOTHING:
            result.left_out.append(f"lycoris_config {key} {value!r}: there is no such setting")
    arguments += _preset(config.get("apply_preset") or {}, family, whole, result)
    result.values["network_args"] = arguments
    return result


def _preset(preset: Mapping[str, Any], family: str, whole: bool, result: Lycoris) -> Iterator[str]:
    classes = _TYPES.get(family, {})
    for key, value in preset.items():
        if key not in ("target_module", "module_algo_map") and value:
            result.left_out.append(f"lycoris_config apply_preset.{key}: layers are chosen by type, and by block")
    targets: Sequence[str] = preset.get("target_module") or list(classes)
    for name in targets:
        if name not in classes:
            result.left_out.append(f"lycoris_config target_module {name}: known here are {', '.join(classes)}")
    every = dict.fromkeys(kind for kinds in classes.values() for kind in kinds)
    chosen = {kind for name in targets for kind in classes.get(name, ())}
    if chosen:
        yield from (f"{kind}_dim=0" for kind in every if kind not in chosen)
    for name, settings in (preset.get("module_algo_map") or {}).items():
        for key, value in settings.items():
            kinds = [kind for kind in classes.get(name, ()) if kind in chosen]
            if key == "factor" and kinds:
                yield from (f"{kind}_factor={value}" for kind in kinds)
            elif key == "linear_dim" and kinds and not whole:
                yield from (f"{kind}_dim={value}" for kind in kinds)
            else:
                result.left_out.append(
                    f"lycoris_config module_algo_map {name}.{key} {value!r}: no such setting by type"
                )


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
