"""Where the denoiser's weights lie, and a frozen one's in how many bits: decided before anything is trained."""

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.config.memory import MemoryConfig
from library.families.protocols import ModelFamily
from library.memory.activation_offload import ActivationOffload, Stash
from library.memory.block_swap import BlockSwap
from library.memory.checkpointing import (
    Checkpoint,
    enable_checkpointing,
    recompute_all,
    recompute_all_but_attention,
)
from library.memory.modulation import StreamedModulation
from library.memory.quantization import FORMATS, Quantized, Stored, quantize_blocks
from library.memory.state_transfers import StateTransfers
from library.memory.transfers import CudaStash, CudaTransfers, Transfers
from library.training.precision import Precision

_MIB = 1 << 20


@dataclass(frozen=True)
class Carriers:
    """What moves tensors between host and device.

    Attributes:
        transfers: Makes what moves weights; None: nothing does.
        stash: Where activations may wait on the host; None: nowhere.
        states: Makes what moves the optimizer's state; None: nothing does.
    """

    transfers: Callable[[], Transfers] | None
    stash: Stash | None
    states: Callable[[], StateTransfers] | None


def load_device(memory: MemoryConfig, device: torch.device) -> torch.device:
    """Where the denoiser is loaded to: where it stays, or the host if ``place`` will not bring all of it as it is."""
    return torch.device("cpu") if memory.changes_placement else device


def place(
    memory: MemoryConfig,
    family: ModelFamily,
    denoiser: nn.Module,
    device: torch.device,
    carriers: Carriers | None = None,
    *,
    stored: Stored | None = None,
) -> list[str]:
    """Store a frozen denoiser as the options say, and bring to the device what belongs there.

    Args:
        memory: The options.
        family: The model's parts.
        denoiser: As ``load_device`` says. Everything that changes its weights is done.
        device: Where the step runs.
        carriers: Take the place of the device's own.
        stored: Tells what the files have of a layer in fp8.

    Returns:
        What was decided, one line each.

    Raises:
        ConfigError: More blocks should be swapped than there are.
    """
    if not memory.changes_placement:
        return []
    denoiser.requires_grad_(False)
    blocks, notes = list(family.blocks(denoiser)), []
    if memory.base_format is not None:
        notes.append(_quantize(memory, blocks, device, stored))
    on_device = list(_tensors(denoiser))
    transfers = transfers_to(device) if carriers is None else carriers.transfers
    if transfers is None:
        if memory.blocks_to_swap or memory.stream_modulation:
            notes.append("no accelerator: all weights are in host memory already, nothing is swapped or streamed")
    else:
        streamed = list(family.modulation(denoiser).layers) if memory.stream_modulation else []
        elsewhere = [tensor for layer in streamed for tensor in layer.parameters()]
        moved = {id(tensor) for tensor in elsewhere}
        if streamed:
            modulation = StreamedModulation(streamed, transfers())
            notes.append(
                f"modulation: {len(streamed)} layers, {modulation.host_bytes / _MIB:,.0f} MiB, are on the host and "
                f"stream through {modulation.device_bytes / _MIB:,.0f} MiB once a pass"
            )
        if memory.blocks_to_swap:
            swap = _swap(memory, blocks, transfers(), elsewhere)
            moved |= {id(tensor) for tensor in swap.tensors}
            notes.append(_swap_note(swap, len(blocks)))
        on_device = [tensor for tensor in on_device if id(tensor) not in moved]
    for tensor in on_device:
        tensor.data = tensor.data.to(device)
    return notes


def place_trained(
    memory: MemoryConfig,
    family: ModelFamily,
    denoiser: nn.Module,
    device: torch.device,
    precision: Precision,
    carriers: Carriers | None = None,
) -> tuple[BlockSwap | None, list[str]]:
    """Bring to the device what belongs there of a denoiser that is trained whole; ``place`` is for frozen ones.

    Args:
        memory: The options.
        family: The model's parts.
        denoiser: As ``load_device`` says. Its parameters ask for gradients already.
        device: Where the step runs.
        precision: Of the weights and of what is computed.
        carriers: Take the place of the device's own.

    Returns:
        What takes its weights to and fro, if anything does, and what was decided, one line each.

    Raises:
        ConfigError: More blocks should be swapped than there are.
    """
    if not memory.blocks_to_swap:
        return None, []
    blocks = list(family.blocks(denoiser))
    transfers = transfers_to(device) if carriers is None else carriers.transfers
    if transfers is None:
        return None, ["no accelerator: all weights are in host memory already, nothing is swapped"]
    swap = _swap(memory, blocks, transfers())
    notes = [f"{_swap_note(swap, len(blocks))}; they travel back when they have changed"]
    casts = precision.mixed != "no" and precision.trained == torch.float32
    if casts and len(checkpointed(memory, len(blocks))) < len(blocks):
        notes.append(
            f"block swap: {precision.mixed} copies of weights in blocks that aren't checkpointed stay on the device "
            "for the backward pass; --gradient_checkpointing drops them, --full_bf16 makes none"
        )
    swapped = {id(tensor) for tensor in swap.tensors}
    for tensor in _tensors(denoiser):
        if id(tensor) not in swapped:
            tensor.data = tensor.data.to(device)
    return swap, notes


def _swap(
    memory: MemoryConfig, blocks: list[nn.Module], transfers: Transfers, elsewhere: Sequence[Tensor] = ()
) -> BlockSwap:
    count, computed_again = swap_count(memory, len(blocks)), checkpointed(memory, len(blocks))
    return BlockSwap(blocks, count, transfers, checkpointed=computed_again, elsewhere=elsewhere)


def _swap_note(swap: BlockSwap, blocks: int) -> str:
    return (
        f"block swap: {len(swap.numbers)} of {blocks} blocks, {swap.host_bytes / _MIB:,.0f} MiB, are on the host and "
        f"take turns in {swap.device_bytes / _MIB:,.0f} MiB"
    )


def check_placement(memory: MemoryConfig, family: ModelFamily, denoiser: nn.Module) -> None:
    """Find out whether a denoiser can be placed as the options say, once an adapter is in it.

    Raises:
        ConfigError: It can't.
    """
    swap_count(memory, len(family.blocks(denoiser)))
    if not memory.stream_modulation:
        return
    modulation = family.modulation(denoiser)
    title = family.description.title
    if not modulation.layers:
        raise ConfigError(f"--stream_modulation does nothing for {title}: one layer serves all its blocks; remove it")
    for part in (*modulation.layers, *modulation.embedders):
        if any("forward" in layer.__dict__ for layer in part.modules()):
            raise ConfigError(
                "--stream_modulation: the adapter trains modulation layers or the embedders before them, so their "
                "answers change within a step. Leave them out of the adapter, or remove the option"
            )


def swap_count(memory: MemoryConfig, blocks: int) -> int:
    """How many blocks the device is relieved of.

    Raises:
        ConfigError: The model hasn't so many.
    """
    asked = memory.blocks_to_swap or 0
    if isinstance(asked, str):  # still to be found
        return 0
    if asked > blocks:
        raise ConfigError(f"--blocks_to_swap {asked}: the model has {blocks} blocks; lower it")
    return asked


def checkpointed(memory: MemoryConfig, blocks: int) -> range:
    """The numbers of the blocks that are checkpointed."""
    return range(0, blocks, memory.gradient_checkpointing_interval) if memory.gradient_checkpointing else range(0)


def save_activations(
    memory: MemoryConfig, blocks: list[nn.Module], device: torch.device, carriers: Carriers | None = None
) -> list[str]:
    """Let blocks forget activations, as the options say; returns what was decided, one line each."""
    if not memory.gradient_checkpointing:
        return []
    run: Checkpoint = recompute_all_but_attention if memory.gradient_checkpointing_keep_attention else recompute_all
    notes = []
    if memory.cpu_offload_checkpointing:
        stash = stash_for(device) if carriers is None else carriers.stash
        if stash is None:
            notes.append("no accelerator: checkpoints are in host memory already, none is moved")
        else:
            run = ActivationOffload(stash, run).run
    enable_checkpointing(blocks, memory.gradient_checkpointing_interval, run)
    return notes


def transfers_to(device: torch.device) -> Callable[[], Transfers] | None:
    """What makes copies from the host to a device; None if it is the host."""
    return None if device.type == "cpu" else functools.partial(CudaTransfers, device)


def stash_for(device: torch.device) -> Stash | None:
    """Where a device's tensors may wait; None if the device is the host."""
    return None if device.type == "cpu" else CudaStash(device)


def _quantize(memory: MemoryConfig, blocks: list[nn.Module], device: torch.device, stored: Stored | None) -> str:
    assert memory.base_format is not None
    chosen = FORMATS[memory.base_format]
    before = sum(tensor.nbytes for block in blocks for tensor in _tensors(block))
    done = Quantized(0, 0)
    for block in blocks:
        if memory.quantize_via == "accelerator":
            block.to(device)
        done = Quantized(*map(sum, zip(done, quantize_blocks([block], chosen, stored))))
        block.to("cpu")
    after = sum(tensor.nbytes for block in blocks for tensor in _tensors(block))
    return (
        f"base model in {chosen.name}: {done.layers} layers of {len(blocks)} blocks, {before / _MIB:,.0f} MiB, take "
        f"{after / _MIB:,.0f} MiB" + (f"; {done.kept} layers are as the file has them" if done.kept else "")
    )


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()
