"""One optimizer step once more, from its replay bundle: the same numbers, and where they stop being finite."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.families import create_family
from library.families.protocols import ModelFamily, TextEncodingStrategy
from library.io.header import read_header
from library.io.safetensors import is_finite, load_tensors
from library.records import Batch, TensorRecord
from library.training.bundle import Bundle, StepNumbers
from library.training.encoders import load_encoders
from library.training.full_model import DENOISER
from library.training.gradients import gradient_norm
from library.training.jobs import job_of
from library.training.loop import loss_sums
from library.training.model_side import component_types, load_model_side
from library.training.on_non_finite import bad_gradients
from library.training.precision import resolve_precision
from library.training.quantized_matmul import saved_matmul
from library.training.setup import has_accelerator, start_accelerator
from library.training.step import training_loss

log = logging.getLogger(__name__)

_SUMS_TOLERANCE = 1e-5


@dataclass(frozen=True)
class ReplayedRun:
    """As much of a run as a step reads; see ``StepRun``. What is encoded already needs no VAE."""

    config: RunConfig
    seed: int
    family: ModelFamily
    accelerator: Accelerator
    device: torch.device
    denoiser: nn.Module
    trainable: Any
    text: TextEncodingStrategy
    text_encoders: Mapping[str, nn.Module]
    trains_text_encoders: bool
    parameters: list[nn.Parameter]
    vae: nn.Module | None = None
    sharded: bool = False


@dataclass
class Replay:
    """What came out when the step was done again.

    Attributes:
        numbers: Loss and gradient norm; no parameters.
        per_sample: Process, sample, and its loss before it is weighted.
        bad_inputs: What of the batches isn't finite, for people.
        bad_weights: Trained weights that weren't finite before the step.
        first_layer: The first layer whose output wasn't finite, and whether its input was; None: all were.
        bad_gradients: Parameters whose gradient isn't finite, in the order of the model.
    """

    numbers: StepNumbers
    per_sample: list[tuple[int, str, float]] = field(default_factory=list)
    bad_inputs: list[str] = field(default_factory=list)
    bad_weights: list[str] = field(default_factory=list)
    first_layer: str | None = None
    bad_gradients: list[str] = field(default_factory=list)


def replay(bundle: Bundle, config: RunConfig) -> Replay:
    """This does the step of a bundle again, every micro-batch of every process in turn.

    Args:
        bundle: The bundle.
        config: The run's options, without its data.

    Raises:
        ConfigError: The model isn't the one that the weights belong to, or isn't there.
    """
    if not has_accelerator():
        torch.set_num_threads(bundle.facts["processes"][0]["threads"])  # how many add up moves the last bits
    run = _load(bundle, config)
    parameters, result = run.parameters, Replay(StepNumbers(0.0, None))
    result.bad_weights = [name for name, tensor in run.trainable.state_dict().items() if not is_finite(tensor)]
    totals = torch.zeros(5, device=run.device)
    gradients: list[Tensor | None] = [None] * len(parameters)
    processes = len(bundle.facts["processes"])
    with _first_bad_output({DENOISER: run.denoiser, **run.text_encoders}, result):
        for process in range(processes):
            sums = torch.zeros(5, device=run.device)
            for batch in bundle.batches(process, run.text):
                result.bad_inputs += _bad_inputs(batch)
                share = training_loss(run, batch, step_samples=bundle.facts["step_samples"])
                sums += loss_sums(batch, share)
                result.per_sample += [(process, *row) for row in zip(batch.keys, share.per_sample.tolist())]
                run.accelerator.backward(share.loss)
            totals = sums if process == 0 else totals + sums
            if processes > 1:
                gradients = _taken(parameters, gradients)
    for parameter, gradient in zip(parameters, gradients):
        if processes > 1:
            parameter.grad = gradient
    result.bad_gradients = list(bad_gradients(run.trainable.named_parameters()))
    norm = gradient_norm(run, parameters).item()
    result.numbers = StepNumbers(totals[0].item(), norm)
    return result


def agrees(bundle: Bundle, now: StepNumbers) -> bool:
    """Whether the numbers are the bundle's: to the bit, or up to rounding where its sums had another order."""
    then = bundle.numbers
    pairs = [(then.loss, now.loss)]
    if then.gradient_norm is not None and now.gradient_norm is not None:
        pairs.append((then.gradient_norm, now.gradient_norm))
    if not bundle.facts["same_sums"]:
        return all(_same(one, other) or abs(one - other) <= _SUMS_TOLERANCE * abs(one) for one, other in pairs)
    return all(_same(one, other) for one, other in pairs)


def _same(one: float, other: float) -> bool:
    return one == other or (one != one and other != other)


def _load(bundle: Bundle, config: RunConfig) -> ReplayedRun:
    """The model, with the weights of the bundle."""
    job, seed = job_of(config), int(bundle.facts["seed"])
    family: ModelFamily = create_family(config.family_name, config)
    precision = resolve_precision(config, accelerator_available=has_accelerator())
    accelerator = start_accelerator(config, precision)
    _, trained = component_types(config, family, job, precision)
    device = _device(bundle, accelerator)
    encoders = load_encoders(config, family, precision, device, trained) if bundle.has_tokens else {}
    before = saved_matmul(bundle.facts)
    model = load_model_side(config, family, job, encoders, device, precision, seed=seed, matmul=before)
    header, own = read_header(bundle.weights), model.trainable.state_dict()
    differing = [name for name in sorted({*header.tensors, *own}) if header.shapes.get(name) != _shape(own.get(name))]
    if differing:
        raise ConfigError(
            f"{bundle.weights}: {len(differing)} tensors are not those of this model and these options, first "
            f"{differing[0]}; give the model and the options of the run"
        )
    model.trainable.load_state_dict(dict(load_tensors(header)))
    optimizer = accelerator.prepare(model.created.optimizer)
    model.trainable.train()
    scale = bundle.facts["loss_scale"]
    if accelerator.scaler is not None and scale is not None:
        accelerator.scaler.load_state_dict({**accelerator.scaler.state_dict(), "scale": scale})
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return ReplayedRun(
        config,
        seed,
        family,
        accelerator,
        device,
        model.denoiser,
        model.trainable,
        family.text_strategy(),
        encoders,
        bundle.has_tokens,
        parameters,
    )


def _device(bundle: Bundle, accelerator: Accelerator) -> torch.device:
    """Where the step runs: on a CPU, under the name that it had there.

    One process calls it ``cpu`` and works on weights where the file has them in memory; several call it ``cpu:0``, to
    which torch copies them. Where a number begins in memory decides how kernels add.
    """
    then = torch.device(bundle.facts["processes"][0]["torch_device"])
    return then if then.type == accelerator.device.type == "cpu" else accelerator.device


def _shape(tensor: Tensor | None) -> tuple[int, ...] | None:
    return None if tensor is None else tuple(tensor.shape)


def _taken(parameters: Sequence[nn.Parameter], before: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Takes the gradients of one process away and adds them to those before, as summing over processes does."""
    sums = []
    for parameter, total in zip(parameters, before):
        own = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        parameter.grad = None
        sums.append(own if total is None else total + own)
    return list(sums)


def _bad_inputs(batch: Batch) -> Iterator[str]:
    """The parts of a batch that aren't finite, with the sample."""
    for name in ("latents", "noise", "mask", "loss_weight", "text"):
        value = getattr(batch, name)
        tensors = value.tensors() if isinstance(value, TensorRecord) else {} if value is None else {"": value}
        for part, tensor in tensors.items():
            for row, key in enumerate(batch.keys):
                if not is_finite(tensor[row]):
                    yield f"{name}{'.' if part else ''}{part} of {key}"


@contextmanager
def _first_bad_output(roots: Mapping[str, nn.Module], result: Replay) -> Iterator[None]:
    """Inside, the first layer whose output isn't finite is noted. A layer is done before what contains it."""

    def looking(name: str) -> Any:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            if result.first_layer is None and not all(map(is_finite, _tensors(output))):
                fed = "finite" if all(map(is_finite, _tensors(arguments))) else "not finite either"
                result.first_layer = f"{name} ({type(module).__name__}); its input was {fed}"

        return look

    hooks = [
        module.register_forward_hook(looking(f"{root}.{path}" if path else root))
        for root, top in roots.items()
        for path, module in top.named_modules()
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in what a layer takes or gives."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, TensorRecord):
        yield from value.tensors().values()
    elif isinstance(value, Mapping):
        for inner in value.values():
            yield from _tensors(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _tensors(inner)
