"""The state of a run, which a resumed run goes on from. It appears whole or not at all."""

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.config.errors import ConfigError
from library.io.atomic import atomic_folder, write_text
from library.io.header import read_header
from library.io.manifest import write_manifest
from library.io.pickles import check_pickle
from library.io.safetensors import load_tensors, save_tensors
from library.io.torch_files import save_torch
from library.memory.state_offload import SMALLEST
from library.training import sharded_states
from library.training.configured import changed_arguments, group_settings, take_settings
from library.training.finite_optimizer import refuse_non_finite_optimizer
from library.training.optimizers import load_optimizer_state
from library.training.run import Run
from library.training.save_errors import saving_together
from library.training.saved_weights import refuse_non_finite_weights
from library.training.state_files import AVERAGE, OPTIMIZER, PROGRESS, STATE_FORMAT, TRAINABLE


def save_state(run: Run, stem: str, done: int) -> Path | None:
    """Write everything that a resumed run needs into the folder ``<stem>-state``. Every process calls it.

    What was logged by then is on the disk before the state can be seen: a resumed run doesn't log it again.

    Returns:
        The folder, on the main process.

    Raises:
        SaveFailed: It can't be written; older states are as they were.
        ConfigError: A weight is not finite.
    """
    target = Path(run.config.saving.output_dir) / f"{stem}-state"
    main = run.accelerator.is_main_process
    if run.one_by_one is not None:
        run.one_by_one.settle()
    with saving_together(run, lambda: _size(run)):
        if main or run.sharded:
            refuse_non_finite_weights(run, done)
            refuse_non_finite_optimizer(run, done)
        parts = sharded_states.write(run, target) if run.sharded else None
        if main:
            run.trackers.sync()
            with atomic_folder(target) as folder:
                _write_tensors(run, folder, parts)
                write_text(folder / PROGRESS, json.dumps(_progress(run, done), indent=1, allow_nan=False))
                write_manifest(folder)
    run.last_state = target
    return target if main else None


def _write_tensors(run: Run, folder: Path, parts: Path | None) -> None:
    """Write what is trained; ``parts`` has the tensors already where all processes have written their parts of them."""
    average = run.average.tensors() if run.average is not None else {}
    state = _optimizer_state(run)
    if parts is not None:
        os.rename(parts, folder / sharded_states.SHARDED)
        average, state["optimizer"] = {}, sharded_states.optimizer_rest(state["optimizer"])
    else:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in run.trainable.state_dict().items()}
        save_tensors(tensors, folder / TRAINABLE, {})
    save_torch(state, folder / OPTIMIZER)
    if run.average is not None:
        save_tensors(average, folder / AVERAGE, {"updates": str(run.average.updates)})


def _progress(run: Run, done: int) -> dict[str, Any]:
    """The light part of the state."""
    return {
        "format": STATE_FORMAT,
        "saved": time.time(),
        "step": done,
        "max_steps": run.max_steps,
        "seed": run.seed,
        "average": run.average is not None,
        "plan": run.plan.fingerprint(),
        **run.origin,
        "history": run.history.state(),
        "dropped": run.dropped.as_dict(),
        "settings": run.config.as_dict(),
    }


def _size(run: Run) -> int:
    """About how many bytes a state has."""
    tensors = list(run.trainable.state_dict().values())
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    kept = [state for state in inner.state.values() if isinstance(state, dict)]
    tensors += [value for state in kept for value in state.values() if isinstance(value, Tensor)]
    tensors += run.average.tensors().values() if run.average is not None else ()
    return sum(tensor.nbytes for tensor in tensors)


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


def restore_state(run: Run, folder: str, progress: dict[str, Any]) -> None:
    """Put the weights, the optimizer, the schedule and the losses back to where the state was saved.

    Learning rates are those of the run's configuration, and so are arguments of the optimizer that differ from those
    of the run that saved.
    """
    refuse_other_weights(folder, run.trainable)
    check_pickle(Path(folder) / OPTIMIZER)
    state = torch.load(Path(folder) / OPTIMIZER, map_location="cpu", weights_only=True)
    inner = getattr(run.optimizer, "optimizer", run.optimizer)
    configured = group_settings(inner)
    spread = run.sharded or sharded_states.is_sharded(Path(folder))
    try:
        if spread:
            sharded_states.read(run, Path(folder), state["optimizer"], weights=TRAINABLE, average=AVERAGE)
        else:
            run.trainable.load_state_dict(dict(load_tensors(read_header(Path(folder) / TRAINABLE))))
            on_host = SMALLEST if run.config.memory.optimizer_state_on_host else None
            with run.swap.stand_ins() if run.swap is not None else contextlib.nullcontext():
                load_optimizer_state(inner, state["optimizer"], smallest_on_host=on_host)
    except (ValueError, KeyError) as error:
        raise ConfigError(
            f"--resume {folder}: the optimizer's state doesn't fit this --optimizer_type: {error}"
        ) from error
    if run.average is not None:
        header = read_header(Path(folder) / AVERAGE)
        tensors = run.average.tensors() if spread else dict(load_tensors(header))
        run.average.load(tensors, int(header.metadata["updates"]))
    run.schedule.load_state_dict({**run.schedule.state_dict(), **state["schedule"]})
    arguments = changed_arguments(run.config.optimizer.optimizer_args, progress["settings"]["optimizer_args"])
    take_settings(inner, run.schedule, configured, arguments)
    if run.accelerator.scaler is not None and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    run.history.restore(progress["history"])
    run.dropped.restore(progress.get("dropped", {}))


def refuse_other_weights(folder: str, trainable: nn.Module) -> None:
    """Compare the trained weights of a run state with this run's, from its header alone.

    Raises:
        ConfigError: They are of other layers or sizes.
    """
    sharded = sharded_states.is_sharded(Path(folder))
    saved = sharded_states.saved_shapes(Path(folder)) if sharded else read_header(Path(folder) / TRAINABLE).shapes
    own = {name: tuple(tensor.shape) for name, tensor in trainable.state_dict().items()}
    differing = [name for name in sorted(set(saved) | set(own)) if saved.get(name) != own.get(name)]
    if differing:
        raise ConfigError(
            f"--resume {folder}: what it trains is something else than in this configuration, {len(differing)} tensors "
            f"differ, first {differing[0]}; use the options that the state was saved with"
        )
