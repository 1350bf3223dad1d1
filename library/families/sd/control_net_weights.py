"""A ControlNet's weights: streamed from its own file or begun from the base model's, and written."""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.config.control_net import OPTION
from library.config.errors import ConfigError
from library.families.sd.blocks import NORM_EPS, NORM_GROUPS
from library.families.sd.control_net import HINT_WIDTHS, ControlNet
from library.families.sd.control_net_files import keys_of, locate_control_net
from library.families.sd.control_net_keys import ControlNetKeys
from library.families.sd.sizes import unet_sizes
from library.families.sd.unet import UNetConfig
from library.io.diffusers_folder import MODEL_STEM, save_component
from library.io.key_maps import KeyMap, from_diffusers, to_diffusers
from library.io.part_loading import fill
from library.io.part_shapes import names_in_layout
from library.io.parts import Part
from library.io.safetensors import LazyTensors, save_tensors
from library.io.state_dict import load_strict
from library.nn.attention import AttentionFunction
from library.randomness import torch_generator


def load_control_net(
    path: str | None,
    base: Part,
    *,
    attention: AttentionFunction,
    seed: int,
    device: torch.device | str,
    dtype: torch.dtype,
    mmap: bool = True,
) -> ControlNet:
    """This builds the ControlNet of a base model and streams its weights in.

    Args:
        path: Its own file or folder; None: it begins as a copy of the base model's way down and middle, with an encoder
            of pictures that is drawn at random, and changes nothing.
        base: The base model's U-Net.
        attention: From ``nn.attention.attention_function``.
        seed: Of the run, for what is drawn.
        device: Where it goes; on ``meta`` no weight is read.
        dtype: Of its weights.
        mmap: Map the files rather than reading them.

    Raises:
        ConfigError: The file holds something else, or is for another base model. Nothing was read then.
    """
    sizes = unet_sizes(base)
    with torch.device("meta"):
        control_net = ControlNet(UNetConfig(**dataclasses.asdict(sizes)), attention=attention)
    if path is not None:
        own = locate_control_net(path, sizes)
        try:
            fill(control_net, own, keys_of(sizes).all, device=device, dtype=dtype, mmap=mmap)
        except ConfigError as error:
            raise ConfigError(f"--{OPTION}: {error}") from error
        return control_net
    shapes = {name: tensor.shape for name, tensor in control_net.state_dict().items()}
    on_meta = torch.device(device).type == "meta"
    begun = _begun(keys_of(sizes), base, shapes, seed=seed, device="meta" if on_meta else "cpu", mmap=mmap)
    load_strict(control_net, begun, device=device, dtype=dtype, source=base.title)
    return control_net


def _begun(
    keys: ControlNetKeys, base: Part, shapes: Mapping[str, torch.Size], *, seed: int, device: str, mmap: bool
) -> Iterator[tuple[str, Tensor]]:
    """The weights before training, one at a time."""
    tensors = LazyTensors(_only(base, keys.copied), device=device, mmap=mmap)
    yield from tensors.items() if base.layout == "single" else from_diffusers(tensors, keys.copied)
    generator = torch_generator(seed, "control_net")
    for entry in keys.encoder:
        weights = shapes[f"{entry.ours.rpartition('.')[0]}.weight"]
        bound = 1 / math.sqrt(weights[1:].numel())  # what torch draws a convolution from
        drawn = torch.rand(shapes[entry.ours], generator=generator) * (2 * bound) - bound
        yield entry.ours, drawn.to(device)
    for entry in keys.zeros:
        yield entry.ours, torch.zeros(shapes[entry.ours], device=device)


def _only(part: Part, maps: tuple[KeyMap, ...]) -> Part:
    """The part with these of its tensors alone."""
    wanted = set(names_in_layout(maps, part.layout))
    return dataclasses.replace(
        part,
        names={name: stored for name, stored in part.names.items() if name in wanted},
        scales={name: stored for name, stored in part.scales.items() if name in wanted},
    )


def save_control_net(
    weights: Mapping[str, Tensor],
    base: Part,
    path: Path,
    metadata: Mapping[str, str],
    *,
    layout: str,
    dtype: torch.dtype | None,
) -> None:
    """This writes a ControlNet in diffusers' spelling, which ComfyUI reads too.

    Args:
        weights: Its tensors.
        base: The base model's U-Net.
        path: The file; for ``diffusers`` the folder.
        metadata: Of the safetensors file.
        layout: ``safetensors`` or ``diffusers``.
        dtype: Type to convert to; None: each tensor keeps its own.

    Raises:
        ValueError: A number isn't finite.
    """
    sizes = unet_sizes(base)
    spelled = {name: tensor.contiguous() for name, tensor in to_diffusers(weights, keys_of(sizes).all)}
    if layout == "diffusers":
        config = diffusers_config(UNetConfig(**dataclasses.asdict(sizes)))
        save_component(path, MODEL_STEM, spelled, config, metadata=metadata, dtype=dtype)
    else:
        save_tensors(spelled, path, metadata, dtype=dtype)


def diffusers_config(config: UNetConfig) -> dict[str, Any]:
    """What ``config.json`` says for diffusers' ``ControlNetModel``."""
    widths = [config.width * multiplier for multiplier in config.multipliers]
    kinds = [level < config.attention_levels for level in range(len(widths))]
    heads = [config.heads(width) for width in widths]
    return {
        "_class_name": "ControlNetModel",
        "act_fn": "silu",
        # diffusers' name for the number of heads
        "attention_head_dim": heads[0] if len(set(heads)) == 1 else heads,
        "block_out_channels": widths,
        "conditioning_embedding_out_channels": list(HINT_WIDTHS),
        "controlnet_conditioning_channel_order": "rgb",
        "cross_attention_dim": config.context_width,
        "down_block_types": ["CrossAttnDownBlock2D" if kind else "DownBlock2D" for kind in kinds],
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": config.in_channels,
        "layers_per_block": config.blocks_per_level,
        "norm_eps": NORM_EPS,
        "norm_num_groups": NORM_GROUPS,
        "use_linear_projection": config.linear_projections,
    }
