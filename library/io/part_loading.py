"""A part's weights, streamed from its files into a module whose names are those of the single file."""

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.io.key_maps import KeyMap, from_diffusers
from library.io.parts import Part
from library.io.safetensors import LazyTensors
from library.io.state_dict import check_strict, load_strict


def fill(
    module: nn.Module,
    part: Part,
    maps: Sequence[KeyMap],
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    mmap: bool = True,
) -> None:
    """This fills a module; no more than one tensor is ever held twice.

    Args:
        module: What to fill, best on the meta device.
        part: Where its weights lie, in either layout.
        maps: All its tensors in both spellings.
        device: Where the weights go; on ``meta`` nothing is read.
        dtype: Of floating-point weights.
        mmap: Map the files rather than reading them.

    Raises:
        ConfigError: The files don't have exactly the tensors that the module asks for. Nothing was read then.
    """
    planned = {
        name: tuple(tensor.shape) for name, tensor in _in_our_layout(part, maps, LazyTensors(part, device="meta"))
    }
    check_strict(module, planned, source=part.title)
    tensors = LazyTensors(part, device="meta" if torch.device(device).type == "meta" else "cpu", mmap=mmap)
    load_strict(module, _in_our_layout(part, maps, tensors), device=device, dtype=dtype, source=part.title)


def _in_our_layout(part: Part, maps: Sequence[KeyMap], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    if part.layout == "single":
        yield from tensors.items()
        return
    try:
        yield from from_diffusers(tensors, maps)
    except ValueError as error:
        raise ConfigError(f"{part.title}: {error}") from error
