"""Rewrite a LoRA for Stable Diffusion 1.x to 3.5 or Sana in the other spelling: kohya's (ComfyUI) or diffusers'.

A LoKr or LoHa becomes, for diffusers, the LoRA that it equals.

python tools/convert_lora.py my_lora.safetensors my_lora_diffusers.safetensors --to diffusers
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence, Set
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from library.config.errors import ConfigError
from library.families.sana.adapter_targets import adapter_targets as sana_targets
from library.families.sana.linear_dit import CONFIGS as SANA
from library.families.sd.adapter_targets import CLIP_H_LAYERS, CLIP_L_LAYERS
from library.families.sd.adapter_targets import adapter_targets as sd_targets
from library.families.sd.unet import CONFIGS as SD
from library.families.sd3.adapter_targets import adapter_targets as sd3_targets
from library.families.sd3.mmdit import CONFIGS as SD3
from library.io.header import read_header
from library.io.safetensors import load_tensors, save_tensors
from library.records import AdapterTargets
from networks.key_formats import DIFFUSERS, KOHYA, PEFT_METADATA, detect_format, read_weights, to_diffusers, to_kohya
from networks.lora import size_metadata
from networks.lora_layer import LoraWeights
from networks.methods import UpdateWeights
from networks.targeting import DENOISER, kohya_name


class _Model(NamedTuple):
    """What a file can be for.

    Attributes:
        width: Of the denoiser, or of the text that a U-Net looks at; no two models of a kind have the same.
        targets: Where its adapters are, by component.
        kernels: Its convolutions: pattern of the paths in the denoiser that keys are made of -> the kernel's side.
    """

    width: int
    targets: Mapping[str, AdapterTargets]
    kernels: Mapping[str, int]


def _models() -> list[_Model]:
    """The published sizes. A model whose layers are among those of another, under the same names, is left out."""
    models = []
    for config in (SD3["sd3.5-medium"], SD3["sd3.5-large"]):
        targets = sd3_targets(depth=config.depth, dual_attention_blocks=config.dual_attention_blocks)
        models.append(_Model(config.width, targets, {"x_embedder.proj": config.patch_size}))
    for sana in (SANA["sana-600m"], SANA["sana-1.5-4800m"]):
        kernels = {"x_embedder.proj": sana.patch_size, "blocks.*.mlp.*": 1}
        models.append(_Model(sana.width, sana_targets(depth=sana.depth), kernels))
    return models


_OF_UNETS = ("down_blocks", "mid_block", "up_blocks", "lora_te_")
"""What names of layers contain in adapters of Stable Diffusion 1.x and 2.x, and in no other's."""


def _unets() -> list[_Model]:
    """Stable Diffusion 1.x and 2.x, whose layers have the same names."""
    models = []
    for name, clip_layers in (("sd1", CLIP_L_LAYERS), ("sd2", CLIP_H_LAYERS)):
        config = SD[name]
        targets = sd_targets(
            multipliers=config.multipliers,
            attention_levels=config.attention_levels,
            blocks_per_level=config.blocks_per_level,
            clip_layers=clip_layers,
        )
        kernels = {"*.conv_shortcut": 1, "*.conv[12]": 3, "*samplers.*.conv": 3, "conv_in": 3, "conv_out": 3}
        if not config.linear_projections:
            kernels |= {"*.proj_in": 1, "*.proj_out": 1}
        models.append(_Model(config.context_width, targets, kernels))
    return models


def main(argv: Sequence[str] | None = None) -> int:
    """This runs the tool and returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("input", help="the adapter file")
    parser.add_argument("output", help="the file to write")
    parser.add_argument("--to", choices=(KOHYA, DIFFUSERS), required=True, help="the spelling to write")
    arguments = parser.parse_args(argv)
    try:
        print(convert(arguments.input, arguments.output, arguments.to))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def convert(source: str, target: str, spelling: str) -> str:
    """This rewrites one file and says what it did.

    Args:
        source: The adapter file.
        target: The file to write.
        spelling: ``kohya`` or ``diffusers``.

    Raises:
        ConfigError: The file can't be read as an adapter for these models, is in that spelling already, or has no place
            in it.
    """
    header = read_header(source)
    tensors = dict(load_tensors(header))
    # Its components are enough to read a file; which layers there are depends on the model.
    models = _candidates(tensors, header.metadata)
    targets = _model(models, {size for tensor in tensors.values() for size in tensor.shape}, source).targets
    if detect_format(tensors, targets, source) == spelling:
        raise ConfigError(f"{source} is spelled for {spelling} already; nothing was written")
    weights = read_weights(tensors, header.metadata, targets, source)
    # Hashes of the old file's contents would be wrong.
    kept = {k: v for k, v in header.metadata.items() if k != PEFT_METADATA and not k.startswith("sshs_")}
    if spelling == KOHYA:
        save_tensors(to_kohya(weights), target, {**kept, **size_metadata(list(weights.values()))})
    else:
        # A LoKr's tensors are factors: only together do they show the model's width.
        model = _model(models, {size for layer in weights.values() for size in layer.shape}, source)
        converted, metadata = to_diffusers(_as_lora(weights, model, source), model.targets)
        save_tensors(converted, target, {**kept, **metadata})
    return f"{target}: {len(weights)} layers, spelled for {spelling}"


def _candidates(names: Iterable[str], metadata: Mapping[str, str]) -> list[_Model]:
    """The models that a file can be for, by what it says of itself and by the names of its layers."""
    unets = _unets()
    architecture = metadata.get("modelspec.architecture", "")
    for beginning, model in zip(("stable-diffusion-v1", "stable-diffusion-v2"), unets):
        if architecture.startswith(beginning):
            return [model]
    return unets if any(part in name for name in names for part in _OF_UNETS) else _models()


def _model(models: Sequence[_Model], sizes: Set[int], source: str) -> _Model:
    """The model is the one whose width is among the sizes; SD3's text encoders are the same in all of its models."""
    fitting = [model for model in models if model.width in sizes] or models[:1]
    if len(fitting) > 1:
        raise ConfigError(f"{source} has layers of several models; it can't be converted")
    return fitting[0]


def _as_lora(weights: Mapping[str, UpdateWeights], model: _Model, source: str) -> dict[str, LoraWeights]:
    if whole := sorted(name for name, layer in weights.items() if layer.lora_rank is None):
        raise ConfigError(
            f"{source} is a LoKr, and {len(whole)} of its layers, such as {whole[0]}, have a whole second factor, so "
            "their rank is that of the layer: diffusers reads only LoRA, which would be larger than the model. Use the "
            "file as it is (ComfyUI, generate.py, --base_weights)"
        )
    prefix = model.targets[DENOISER].prefix

    def kernel(name: str) -> tuple[int, ...]:
        sides = (side for path, side in model.kernels.items() if fnmatchcase(name, kohya_name(prefix, path)))
        return next(((side, side) for side in sides), ())

    return {name: layer.as_lora(kernel(name)) for name, layer in weights.items()}


if __name__ == "__main__":
    sys.exit(main())
