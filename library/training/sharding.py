"""A model whose weights, gradients and optimizer state are spread over processes, by torch's ``fully_shard``.

Each block is gathered when it computes, and its gradient goes to the process that keeps that part of the weight (Zhao
et al. 2023, arXiv:2304.11277; stages 2 and 3 of Rajbhandari et al. 2020, arXiv:1910.02054). Weights are gathered in the
type they are kept in, and autocast casts them where it does in an unsharded run, so that the numbers are the same.

Every forward and backward pass takes all processes. So they do equally many of them, whatever their shares of the data.
"""

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from accelerate.utils import AutocastKwargs
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, OffloadPolicy, fully_shard

from library.families.protocols import ModelFamily
from library.training.full_model import DENOISER, FullModel
from library.training.sharding_settings import ShardingSettings

Piece = TypeVar("Piece")


def shard(family: ModelFamily, model: FullModel, settings: ShardingSettings, device: torch.device) -> None:
    """Spread the trained weights over all processes, in place. What isn't trained stays whole.

    The weights may be on the host: they come to the device block by block.

    Args:
        family: Knows the denoiser's blocks.
        model: What is trained; a text encoder of it is one piece.
        settings: How.
        device: Where this process computes.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    offload: OffloadPolicy = CPUOffloadPolicy() if offloads(settings, device) else OffloadPolicy()
    for name, component in model.components.items():
        blocks = family.blocks(component) if name == DENOISER else ()
        for module in (*blocks, component):
            fully_shard(module, mesh=mesh, reshard_after_forward=settings.reshard_after_forward, offload_policy=offload)


def offloads(settings: ShardingSettings, device: torch.device) -> bool:
    """Whether the parts wait in host memory; on a CPU they are there already."""
    return settings.offload and device.type != "cpu"


def uncached_autocast() -> AutocastKwargs:
    """What keeps autocast from holding a second copy of every weight until the end of the forward pass."""
    return AutocastKwargs(cache_enabled=False)


def to_propagate(loss: Tensor, processes: int, *, counts: bool) -> Tensor:
    """What a process's loss must be for the backward pass, so that gradients come out summed over processes.

    ``fully_shard`` averages gradients. Its switches for the factor differ between versions of torch and kinds of
    processes; a loss that is larger by the number of processes does it everywhere, and for a power of two exactly.

    Args:
        loss: A share of the whole step's mean.
        processes: How many there are.
        counts: Whether it is one of the step's; otherwise the process only takes part.
    """
    return loss * (processes if counts else 0)


def padded(own: Sequence[Piece], everyones: Sequence[Piece], count: int) -> list[Piece]:
    """A process's pieces of work, made up to ``count`` by others' that are only done along.

    They are taken from the same step: a result that isn't finite there isn't here, and none that is.
    """
    return [*own, *everyones[: count - len(own)]]


@contextlib.contextmanager
def looking(model: nn.Module, weights: AbstractContextManager[None]) -> Iterator[None]:
    """Inside, the weights are those of ``weights``; afterwards no gathered copy of them is left.

    Without a backward pass weights that are kept for it would stay, and the next step would compute with them.
    """
    with weights:
        try:
            yield
        finally:
            for module in model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()
