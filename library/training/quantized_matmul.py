"""``--quantized_matmul``: how products with eight-bit matrices are computed in a run, from its first step to its last.

What was chosen by measuring is kept in states, so that a resumed run computes as it began, whatever a second
measurement would say.
"""

import dataclasses
from collections import Counter
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from accelerate.utils import broadcast_object_list
from torch import nn

from library.config.errors import ConfigError
from library.config.memory import MemoryConfig
from library.config.run import RunConfig
from library.families.protocols import ModelFamily
from library.memory.eight_bit import DEQUANTIZE, EIGHT_BIT, Matmul
from library.memory.matmul_choice import Timer, cuda_timer, describe, measure
from library.memory.quantization import FORMATS, WeightFormat, compute_by, quantized_layers

QUANTIZED_MATMUL = "quantized_matmul"
"""Its name in states and bundles."""

_MOST_SIZES = 4
_MOST_ROWS = 16384


class Decided(NamedTuple):
    """What was decided.

    Attributes:
        matmul: None: the run has no eight-bit matrices.
        notes: For the log.
    """

    matmul: Matmul | None
    notes: list[str]


def matmul_facts(matmul: Matmul | None) -> dict[str, Any]:
    """What states and bundles keep; nothing where there are no eight-bit matrices."""
    return {} if matmul is None else {QUANTIZED_MATMUL: dataclasses.asdict(matmul)}


def saved_matmul(facts: Mapping[str, Any]) -> Matmul:
    """How the run of a state or bundle computes; where it doesn't say, matrices are dequantised."""
    return Matmul(**facts.get(QUANTIZED_MATMUL, {}))


def gpu_capability() -> tuple[int, int]:
    """The compute capability of the GPU that trains."""
    return torch.cuda.get_device_capability()


def check_instruction(memory: MemoryConfig, capability: tuple[int, int] | None) -> None:
    """Find out whether the machine has the instruction for ``--quantized_matmul 8bit``.

    Args:
        memory: The options.
        capability: Of the GPU; None: training runs on the CPU, which needs none.

    Raises:
        ConfigError: It hasn't.
    """
    if memory.quantized_matmul == EIGHT_BIT and memory.base_format is not None and capability is not None:
        _refuse_missing(FORMATS[memory.base_format], capability, "--quantized_matmul 8bit")


def rows_of(config: RunConfig, family: ModelFamily) -> int:
    """Rows of the activations in the largest batches: their pictures' tokens together. 0 without any data."""
    tokens = family.latents.format.tokens
    return max((dataset.batch_size * tokens(dataset.resolution) for dataset in config.datasets), default=0)


def decide_matmul(
    memory: MemoryConfig,
    family: ModelFamily,
    denoiser: nn.Module,
    device: torch.device,
    *,
    rows: int,
    before: Matmul | None = None,
    timer: Timer | None = None,
) -> Decided:
    """Decide how products with the denoiser's eight-bit matrices are computed, and let its layers do so.

    Args:
        memory: The options.
        family: The model's parts.
        denoiser: Placed.
        device: Where the step runs.
        rows: Of the activations, for measuring.
        before: How the run that goes on computed; None: it begins.
        timer: Measures; by default CUDA events on a GPU, and nothing is measured on a CPU.

    Raises:
        ConfigError: The run that goes on computed as this GPU can't.
    """
    if memory.base_format is None or FORMATS[memory.base_format].arithmetic is None:
        return Decided(None, [])
    chosen, capability = FORMATS[memory.base_format], gpu_capability() if device.type == "cuda" else None
    if memory.quantized_matmul != "auto":
        decided = Decided(Matmul(memory.quantized_matmul, memory.quantized_matmul), [])
        if before is not None and before != decided.matmul:
            decided.notes.append(
                f"--quantized_matmul {memory.quantized_matmul}: from here on; before, {_words(before)}"
            )
    elif before is not None:
        if EIGHT_BIT in (before.forward, before.backward) and capability is not None:
            _refuse_missing(chosen, capability, "--resume: the state's run computed in 8 bits")
        decided = Decided(before, [f"matrix products with {chosen.name}: as the run began, {_words(before)}"])
    elif timer is None and capability is None:
        decided = Decided(Matmul(), [f"no GPU: matrices in {chosen.name} are dequantised for each product"])
    elif capability is not None and chosen.arithmetic is not None and capability < chosen.arithmetic.capability:
        note = f"this GPU has no {chosen.name} arithmetic: matrices are dequantised for each product, which takes time"
        decided = Decided(Matmul(), [note])
    else:
        matmul, note = _measured(chosen, family, denoiser, device, min(rows, _MOST_ROWS), timer or cuda_timer)
        # all processes go the first one's way
        (matmul,) = broadcast_object_list([matmul])
        decided = Decided(matmul, [note])
    assert decided.matmul is not None
    compute_by(denoiser, decided.matmul)
    return decided


def _measured(
    chosen: WeightFormat,
    family: ModelFamily,
    denoiser: nn.Module,
    device: torch.device,
    rows: int,
    timer: Timer,
) -> tuple[Matmul, str]:
    """The fastest ways for the sizes of this model and so many rows, and what is told of them."""
    skipped = {id(layer) for part in family.modulation(denoiser).layers for layer in part.modules()}  # a row per sample
    layers = [layer for layer in quantized_layers(denoiser).values() if id(layer) not in skipped]
    codes: list[Any] = [layer.weight_codes for layer in layers]
    shapes = Counter((len(own), own.shape[1]) for own in codes)
    largest = sorted(shapes, key=lambda shape: -shapes[shape] * shape[0] * shape[1])[:_MOST_SIZES]
    dtype = next(denoiser.parameters()).dtype
    sizes = {shape: shapes[shape] for shape in largest}
    saved = sum(own.numel() * (dtype.itemsize - 1) for own in codes)
    try:
        times = measure(chosen, sizes, rows, device=device, dtype=dtype, timer=timer)
    except torch.OutOfMemoryError:
        note = f"matrix products with {chosen.name}: no memory is left to measure them; matrices are dequantised"
        return Matmul(), note
    return times.best, describe(times, chosen, rows=rows, dtype=dtype, saved_bytes=saved)


def _refuse_missing(chosen: WeightFormat, capability: tuple[int, int], asked: str) -> None:
    assert chosen.arithmetic is not None
    if capability < chosen.arithmetic.capability:
        own, needed = (".".join(map(str, numbers)) for numbers in (capability, chosen.arithmetic.capability))
        raise ConfigError(
            f"{asked}: this GPU has no {chosen.name} arithmetic (compute capability {own}, and it begins with "
            f"{needed}); use --quantized_matmul dequantize"
        )


def _words(matmul: Matmul) -> str:
    titles = {DEQUANTIZE: "dequantised", EIGHT_BIT: "in 8 bits"}
    return f"forward {titles[matmul.forward]}, backward {titles[matmul.backward]}"
