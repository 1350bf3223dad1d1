"""Rewrite a Stable Diffusion 3 / 3.5 LoRA in the other spelling: kohya's (ComfyUI) or diffusers'.

python tools/convert_lora.py my_lora.safetensors my_lora_diffusers.safetensors --to diffusers
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # run as a file, from anywhere

from torch import Tensor

from library.config.errors import ConfigError
from library.families.sd3.adapter_targets import adapter_targets
from library.families.sd3.mmdit import CONFIGS
from library.io.header import read_header
from library.io.safetensors import load_tensors, save_tensors
from library.records import AdapterTargets
from networks.key_formats import DIFFUSERS, KOHYA, PEFT_METADATA, detect_format, read_weights, to_diffusers, to_kohya
from networks.lora import size_metadata

# SD3 medium's layers are among SD3.5 medium's, and are called the same.
_MODELS = ("sd3.5-medium", "sd3.5-large")


def main(argv: Sequence[str] | None = None) -> int:
    """This runs the tool and returns its exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("input", help="the LoRA file")
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
        source: The LoRA file.
        target: The file to write.
        spelling: ``kohya`` or ``diffusers``.

    Raises:
        ConfigError: The file can't be read as a LoRA for SD3, is in that spelling already, or has no place in it.
    """
    header = read_header(source)
    tensors = dict(load_tensors(header))
    targets = _targets(tensors, source)
    if detect_format(tensors, targets, source) == spelling:
        raise ConfigError(f"{source} is spelled for {spelling} already; nothing was written")
    weights = read_weights(tensors, header.metadata, targets, source)
    # Hashes of the old file's contents would be wrong.
    kept = {k: v for k, v in header.metadata.items() if k != PEFT_METADATA and not k.startswith("sshs_")}
    if spelling == KOHYA:
        save_tensors(to_kohya(weights), target, {**kept, **size_metadata(list(weights.values()))})
    else:
        converted, metadata = to_diffusers(weights, targets)
        save_tensors(converted, target, {**kept, **metadata})
    return f"{target}: {len(weights)} layers, spelled for {spelling}"


def _targets(tensors: Mapping[str, Tensor], source: str) -> Mapping[str, AdapterTargets]:
    """The model is the one whose width is among the sizes in the file; text encoders' layers are the same in all."""
    sizes = {size for tensor in tensors.values() for size in tensor.shape}
    configs = [CONFIGS[model] for model in _MODELS]
    fitting = [config for config in configs if config.width in sizes] or configs[:1]
    if len(fitting) > 1:
        raise ConfigError(f"{source} has layers of several models; it can't be converted")
    return adapter_targets(depth=fitting[0].depth, dual_attention_blocks=fitting[0].dual_attention_blocks)


if __name__ == "__main__":
    sys.exit(main())
