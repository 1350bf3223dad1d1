"""Rewrite a Stable Diffusion 3 / 3.5 LoRA in the other spelling: kohya's (ComfyUI) or diffusers'.

A LoKr or LoHa becomes, for diffusers, the LoRA that it equals.

python tools/convert_lora.py my_lora.safetensors my_lora_diffusers.safetensors --to diffusers
"""

import argparse
import sys
from collections.abc import Mapping, Sequence, Set
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from library.config.errors import ConfigError
from library.families.sd3.adapter_targets import adapter_targets
from library.families.sd3.mmdit import CONFIGS
from library.io.header import read_header
from library.io.safetensors import load_tensors, save_tensors
from library.records import AdapterTargets
from networks.key_formats import DIFFUSERS, KOHYA, PEFT_METADATA, detect_format, read_weights, to_diffusers, to_kohya
from networks.lora import size_metadata
from networks.lora_layer import LoraWeights
from networks.methods import UpdateWeights
from networks.targeting import DENOISER, kohya_name

# SD3 medium's layers are among SD3.5 medium's, and are called the same.
_MODELS = ("sd3.5-medium", "sd3.5-large")


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
        ConfigError: The file can't be read as an adapter for SD3, is in that spelling already, or has no place in it.
    """
    header = read_header(source)
    tensors = dict(load_tensors(header))
    # Their components are enough to read a file; which layers there are depends on the model.
    targets = _targets({size for tensor in tensors.values() for size in tensor.shape}, source)
    if detect_format(tensors, targets, source) == spelling:
        raise ConfigError(f"{source} is spelled for {spelling} already; nothing was written")
    weights = read_weights(tensors, header.metadata, targets, source)
    # Hashes of the old file's contents would be wrong.
    kept = {k: v for k, v in header.metadata.items() if k != PEFT_METADATA and not k.startswith("sshs_")}
    if spelling == KOHYA:
        save_tensors(to_kohya(weights), target, {**kept, **size_metadata(list(weights.values()))})
    else:
        # A LoKr's tensors are factors: only together do they show the model's width.
        targets = _targets({size for layer in weights.values() for size in layer.shape}, source)
        converted, metadata = to_diffusers(_as_lora(weights, targets, source), targets)
        save_tensors(converted, target, {**kept, **metadata})
    return f"{target}: {len(weights)} layers, spelled for {spelling}"


def _targets(sizes: Set[int], source: str) -> Mapping[str, AdapterTargets]:
    """The model is the one whose width is among the sizes; text encoders' layers are the same in all."""
    configs = [CONFIGS[model] for model in _MODELS]
    fitting = [config for config in configs if config.width in sizes] or configs[:1]
    if len(fitting) > 1:
        raise ConfigError(f"{source} has layers of several models; it can't be converted")
    return adapter_targets(depth=fitting[0].depth, dual_attention_blocks=fitting[0].dual_attention_blocks)


def _as_lora(
    weights: Mapping[str, UpdateWeights], targets: Mapping[str, AdapterTargets], source: str
) -> dict[str, LoraWeights]:
    if whole := sorted(name for name, layer in weights.items() if layer.lora_rank is None):
        raise ConfigError(
            f"{source} is a LoKr, and {len(whole)} of its layers, such as {whole[0]}, have a whole second factor, so "
            "their rank is that of the layer: diffusers reads only LoRA, which would be larger than the model. Use the "
            "file as it is (ComfyUI, generate.py, --base_weights)"
        )
    # The only convolution among the layers: a patch per token.
    patch = kohya_name(targets[DENOISER].prefix, "x_embedder.proj")
    side = CONFIGS[_MODELS[0]].patch_size
    return {name: layer.as_lora((side, side) if name == patch else ()) for name, layer in weights.items()}


if __name__ == "__main__":
    sys.exit(main())
