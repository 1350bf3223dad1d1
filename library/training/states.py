"""The state of a run, which a resumed run goes on from. It appears whole or not at all."""

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.config.run import RunConfig
from library.io.atomic import atomic_folder
from library.io.header import read_header
from library.io.safetensors import load_tensors, save_tensors
from library.training.ema import WeightAverage
from library.training.finite_optimizer import refuse_non_finite_optimizer
from library.training.optimizers import load_optimizer_state
from library.training.run import Run
from library.training.saved_weights import refuse_non_finite_weights

STATE_FORMAT = 1
TRAINABLE, AVERAGE, OPTIMIZER, PROGRESS = "trainable.safetensors", "ema.safetensors", "optimizer.pt", "state.json"


def save_state(run: Run, stem: str, done: int) -> Path | None:
    """Write everything that a resumed run needs into the folder ``<stem>-state``."""
    target = Path(run.config.saving.output_dir) / f"{stem}-state"
    if not run.accelerator.is_main_process:
        run.last_state = target
        return None
    refuse_non_finite_weights(run, done)
    refuse_non_finite_optimizer(run, done)
    with atomic_folder(target) as folder:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in run.trainable.state_dict().items()}
        save_tensors(tensors, folder / TRAINABLE, {})
        torch.save(_optimizer_state(run), folder / OPTIMIZER)
        files = [TRAINABLE, OPTIMIZER]
        if run.average is not None:
            save_tensors(run.average.tensors(), folder / AVERAGE, {"updates": str(run.average.updates)})
            files.append(AVERAGE)
        progress = {
            "format": STATE_FORMAT,
            "step": done,
            "seed": run.seed,
            "plan": run.plan.fingerprint(),
            "steps_per_epoch": run.plan.steps_per_epoch,
            "history": run.history.state(),
            "dropped": run.dropped.as_dict(),
            "settings": run.config.as_dict(),
            "checksums": {name: _checksum(folder / name) for name in files},
        }
        (folder / PROGRESS).write_text(json.dumps(progress, indent=1, allow_nan=False), encoding="utf-8")
    run.last_state = target
    return target


def _optimizer_state(run: Run) -> dict[str, Any]:
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    scaler = run.accelerator.scaler
    return {
        "optimizer": inner.state_dict(),
        "schedule": _plain(run.schedule.state_dict()),
        "scaler": scaler.state_dict() if scaler is not None else None,
    }


def _plain(state: dict[str, Any]) -> dict[str, Any]:
    """The part of a schedule's state that is data; functions come from the configuration again."""
    return {
        key: value
        for key, value in state.items()
        if isinstance(value, (int, float, str, bool, list, tuple, dict, Tensor, type(None))) and key != "lr_lambdas"
    }


def _checksum(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def resumed_progress(config: RunConfig) -> dict[str, Any] | None:
    """The light part of the state that ``--resume`` names; None without it.

    Raises:
        ConfigError: It is no run state, a file of it is damaged, or it lacks something that the run needs.
    """
    folder = config.training.resume
    if not folder:
        return None
    progress = read_progress(folder)
    if config.ema.use_ema and AVERAGE not in progress["checksums"]:
        raise ConfigError(
            f"--resume {folder}: --use_ema, but the state was saved without a moving average; leave it out, or start a "
            "new run"
        )
    return progress


def read_progress(folder: str) -> dict[str, Any]:
    """The light part of a run state, after checking that every file of it is whole.

    Raises:
        ConfigError: ``folder`` is no run state, or a file of it is damaged.
    """
    path = Path(folder) / PROGRESS
    if not path.is_file():
        raise ConfigError(f"--resume {folder}: not a run state, it has no {PROGRESS}; give a folder named ...-state")
    try:
        progress: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        found, checksums = progress["format"], progress["checksums"]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"--resume {folder}: {PROGRESS} is damaged ({error}); resume from an older state") from error
    if found != STATE_FORMAT:
        raise ConfigError(f"--resume {folder}: written in format {found}, this version reads {STATE_FORMAT}")
    for name, checksum in checksums.items():
        file = path.parent / name
        if not file.is_file() or _checksum(file) != checksum:
            raise ConfigError(f"--resume {folder}: {name} is missing or damaged; resume from an older state")
    return progress


def restore_state(run: Run, folder: str, progress: dict[str, Any]) -> None:
    """Put the weights, the optimizer, the schedule and the losses back to where the state was saved."""
    refuse_other_weights(folder, run.trainable)
    run.trainable.load_state_dict(dict(load_tensors(read_header(Path(folder) / TRAINABLE))))
    state = torch.load(Path(folder) / OPTIMIZER, map_location="cpu", weights_only=True)
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    try:
        load_optimizer_state(inner, state["optimizer"])
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"--resume {folder}: the optimizer's state doesn't fit this --optimizer_type: {error}"
        ) from error
    if run.average is not None:
        _restore_average(run.average, Path(folder) / AVERAGE)
    run.schedule.load_state_dict({**run.schedule.state_dict(), **state["schedule"]})
    if run.accelerator.scaler is not None and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.history.restore(progress["history"])
    run.dropped.restore(progress.get("dropped", {}))


def _restore_average(average: WeightAverage, path: Path) -> None:
    header = read_header(path)
    average.load(dict(load_tensors(header)), int(header.metadata["updates"]))


def refuse_other_weights(folder: str, trainable: nn.Module) -> None:
    """Compare the trained weights of a run state with this run's, from its header alone.

    Raises:
        ConfigError: They are of other layers or sizes.
    """
    saved = read_header(Path(folder) / TRAINABLE).shapes
    own = {name: tuple(tensor.shape) for name, tensor in trainable.state_dict().items()}
    differing = [name for name in sorted(set(saved) | set(own)) if saved.get(name) != own.get(name)]
    if differing:
        raise ConfigError(
            f"--resume {folder}: what it trains is something else than in this configuration, {len(differing)} tensors "
            f"differ, first {differing[0]}; use the options that the state was saved with"
        )
