"""The replay bundle: a folder with all that one optimizer step was made of, so that it can be done again.

Beside numbers that aren't finite it keeps what led to them, so this is the one place where such numbers are written.
Nothing in it is pickled.
"""

import dataclasses
import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import accelerate
import torch
from torch import Tensor

from library.config.errors import ConfigError
from library.config.resolved import resolved_toml
from library.families.protocols import TextEncodingStrategy
from library.io.atomic import atomic_folder
from library.io.header import read_header
from library.io.safetensors import load_tensors, save_as_it_is
from library.records import Batch, Resolution, TensorRecord
from library.training.quantized_matmul import QUANTIZED_MATMUL
from library.training.run import Run
from library.training.shards import gathered
from library.training.step import encoded
from library.version import VERSION

BUNDLE_FORMAT = 1
FACTS, SETTINGS, TRAINABLE = "bundle.json", "settings.toml", "trainable.safetensors"


@dataclass(frozen=True)
class StepNumbers:
    """What came out of a step.

    Attributes:
        loss: The sum over all processes.
        gradient_norm: Before clipping; None: there was none.
        parameters: Of each process, the first parameter whose gradient wasn't finite; None: none, or not looked at.
    """

    loss: float
    gradient_norm: float | None
    parameters: tuple[str | None, ...] = ()

    def as_dict(self) -> dict[str, Any]:
        """For JSON, which has no word for what isn't finite: numbers are texts."""
        norm = None if self.gradient_norm is None else repr(self.gradient_norm)
        return {"loss": repr(self.loss), "gradient_norm": norm, "parameters": list(self.parameters)}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "StepNumbers":
        """The inverse of ``as_dict``."""
        norm = facts["gradient_norm"]
        return cls(float(facts["loss"]), None if norm is None else float(norm), tuple(facts["parameters"]))


@dataclass(frozen=True)
class Bundle:
    """A bundle that was read. The weights stay in their file.

    Attributes:
        folder: Where it is.
        facts: All that isn't tensors.
        numbers: What came out.
    """

    folder: Path
    facts: Mapping[str, Any]
    numbers: StepNumbers

    @property
    def settings(self) -> Path:
        """The options of the run."""
        return self.folder / SETTINGS

    @property
    def weights(self) -> Path:
        """The trained weights from before the step."""
        return self.folder / TRAINABLE

    @property
    def has_tokens(self) -> bool:
        """Whether the text encoders are part of the step."""
        return any("tokens" in batch["records"] for part in self.facts["processes"] for batch in part["batches"])

    def batches(self, process: int, text: TextEncodingStrategy) -> list[Batch]:
        """The micro-batches of one process."""
        tensors = dict(load_tensors(read_header(self.folder / _part_name(process))))
        described = self.facts["processes"][process]["batches"]
        return [_unpacked(number, facts, tensors, text) for number, facts in enumerate(described)]


def write_bundle(
    run: Run, kind: str, step: int, batches: Sequence[Batch], numbers: StepNumbers, *, weights_are_of_before: bool
) -> str:
    """Write the bundle of a step, with the parts of all processes; every process calls it.

    Args:
        run: The run, its weights as they were before the step where that is still so.
        kind: Goes into the folder's name.
        step: Counted from 0.
        batches: This process's micro-batches, as they came from the loader.
        numbers: What came out.
        weights_are_of_before: Whether no weight has stepped yet.

    Returns:
        What to tell people: where it is and how to use it, or why there is none.
    """
    target = Path(run.config.saving.output_dir) / f"{run.config.saving.output_name}-{kind}-step{step + 1:08d}"
    described, tensors = [], dict[str, Tensor]()
    for number, batch in enumerate(batches):
        facts, named = _packed(number, encoded(run, batch))
        described.append(facts)
        tensors |= named
    part = {
        "batches": described,
        "device": _device_name(run.device),
        "torch_device": str(run.device),
        "threads": torch.get_num_threads(),
    }
    parts = _on_the_first(run, (part, tensors))
    weights = run.trainable.state_dict()
    weights = gathered(weights) if run.sharded else {name: tensor.detach().cpu() for name, tensor in weights.items()}
    if not run.accelerator.is_main_process:
        return f"The first process writes the replay bundle {target}"
    micro_batches, scaler = run.plan.step(step), run.accelerator.scaler
    facts = {
        "format": BUNDLE_FORMAT,
        "step": step + 1,
        "seed": run.seed,
        "script": run.config.script,
        "gradient_accumulation_steps": run.config.training.gradient_accumulation_steps,
        "step_samples": micro_batches[0].step_samples,
        "weights_are_of_before": weights_are_of_before,
        # the order of a sum over more than two can't be had again, nor that of a norm over parts
        "same_sums": len(parts) <= 2 and not run.sharded,
        "loss_scale": scaler.get_scale() if scaler is not None else None,
        **{name: run.origin[name] for name in (QUANTIZED_MATMUL,) if name in run.origin},
        "numbers": numbers.as_dict(),
        "versions": {
            "atelier": VERSION,
            "torch": torch.__version__,
            "accelerate": accelerate.__version__,
            "python": platform.python_version(),
        },
        "processes": [part for part, _ in parts],
    }
    try:
        with atomic_folder(target) as folder:
            for process, (_, own) in enumerate(parts):
                save_as_it_is(own, folder / _part_name(process))
            save_as_it_is(weights, folder / TRAINABLE)
            (folder / SETTINGS).write_text(resolved_toml(run.config, seed=run.seed), encoding="utf-8")
            (folder / FACTS).write_text(json.dumps(facts, indent=1, allow_nan=False), encoding="utf-8")
    except OSError as error:
        return f"The replay bundle {target} can't be written ({error.strerror or error})"
    size = sum(file.stat().st_size for file in target.iterdir())
    return f"Do this step again with `python tools/replay.py {target}` ({size / 1e6:,.1f} MB)"


def read_bundle(folder: Path) -> Bundle:
    """This reads what isn't tensors.

    Raises:
        ConfigError: It is no bundle, is damaged, or another version's.
    """
    path = folder / FACTS
    if not path.is_file():
        raise ConfigError(f"{folder}: not a replay bundle, it has no {FACTS}")
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        found = facts["format"]
        if found != BUNDLE_FORMAT:
            raise ConfigError(f"{folder}: written in format {found}, this version reads {BUNDLE_FORMAT}")
        for part in facts["processes"]:
            _require(part, "batches", "device", "torch_device", "threads")
            for batch in part["batches"]:
                _require(batch, "keys", "visits", "captions", "resolution", "records")
        _require(
            facts,
            "step",
            "seed",
            "script",
            "step_samples",
            "weights_are_of_before",
            "same_sums",
            "loss_scale",
            "versions",
        )
        return Bundle(folder, facts, StepNumbers.of(facts["numbers"]))
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{folder}: {FACTS} is damaged ({type(error).__name__}: {error})") from error


def _require(facts: Mapping[str, Any], *names: str) -> None:
    for name in names:
        facts[name]


def _packed(number: int, batch: Batch) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A micro-batch as what JSON knows and as named tensors; ``number`` keeps those of several apart."""
    facts: dict[str, Any] = {"records": []}
    tensors: dict[str, Tensor] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, TensorRecord):
            facts["records"].append(field.name)
            tensors |= {f"{number}.{field.name}.{name}": tensor for name, tensor in value.tensors().items()}
        elif isinstance(value, Tensor):
            tensors[f"{number}.{field.name}"] = value
        elif value is not None:
            facts[field.name] = list(value)
    return facts, {name: tensor.detach().cpu() for name, tensor in tensors.items()}


def _unpacked(
    number: int, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], text: TextEncodingStrategy
) -> Batch:
    own = {name.partition(".")[2]: tensor for name, tensor in tensors.items() if name.split(".")[0] == str(number)}
    classes = {"text": text.record, "tokens": lambda: type(text.tokenize([""]))}
    values: dict[str, Any] = {name: tensor for name, tensor in own.items() if "." not in name}
    for name in facts["records"]:
        parts = {key.partition(".")[2]: tensor for key, tensor in own.items() if key.startswith(f"{name}.")}
        values[name] = classes[name]().from_tensors(parts)
    return Batch(
        keys=tuple(facts["keys"]),
        visits=tuple(facts["visits"]),
        captions=tuple(facts["captions"]),
        resolution=Resolution(*facts["resolution"]),
        **values,
    )


def _part_name(process: int) -> str:
    return f"process{process}.safetensors"


def _on_the_first(run: Run, part: Any) -> list[Any]:
    """The parts of all processes, on the first one; the others get nothing."""
    if run.accelerator.num_processes == 1:
        return [part]
    received: list[Any] = [None] * run.accelerator.num_processes
    torch.distributed.gather_object(part, received if run.accelerator.is_main_process else None, dst=0)
    return received


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return platform.processor() or platform.machine()
