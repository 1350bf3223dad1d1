"""Runs that are killed again and again, at any moment, end as if nothing had happened."""

import json
import random
import re
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from library.config.config_file import read_toml
from library.training.state_files import read_progress
from tests.training.life_server import Life, life_server
from tools.cache import main as cache_tool

pytestmark = pytest.mark.kills

KILLS = 55
ROTATED = re.compile(r"run-step\d{8}")
"""For each kind of training; together more than a hundred."""


def options(trainer, output: str) -> list[str]:
    """A run that writes most of the time: adapters or models, states, samples, validation, the cache."""
    prompts = trainer.folder / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 5\n")
    return trainer.arguments(
        output,
        cache_latents_to_disk=True,
        cache_text_encoder_outputs_to_disk=True,
        **({"network_train_unet_only": True} if trainer.network else {}),
        dataset_config=trainer.dataset(general="validation_split = 0.25"),
        max_train_steps=8,
        gradient_accumulation_steps=2,
        lr_scheduler="cosine",
        use_ema=True,
        ema_save_raw=True,
        ema_decay=0.5,
        save_every_n_steps=1,
        save_last_n_steps=2,
        save_every_n_epochs=2,
        save_state=True,
        sample_prompts=prompts,
        sample_every_n_steps=2,
        validate_every_n_steps=3,
        resume="auto",
    )


@pytest.mark.parametrize("job", ["trainer", "sana_trainer"])
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bytes(job, request):
    trainer, chance = request.getfixturevalue(job), random.Random(job)
    said = trainer.folder / "said.log"
    kills = runs = 0
    with life_server() as server:

        def live(output: str, **when) -> int:
            folder = str(trainer.folder / output)
            life = Life(trainer.family, trainer.job, options(trainer, output), folder, str(said), **when)
            nonlocal whole
            death = server.live(life)
            whole = whole or death
            return death.code

        whole = None
        assert live("whole") == 0, said.read_text()[-3000:]
        while kills < KILLS:
            runs += 1
            output = f"killed-{runs}"
            while (code := live(output, **moment(chance, whole.seconds, whole.changes))) == -signal.SIGKILL:
                kills += 1
                check_files(trainer.folder / output)
            assert code == 0, said.read_text()[-3000:]
            check_files(trainer.folder / output)
            made, expected = content(trainer.folder / output), content(trainer.folder / "whole")
            # killed after its last state, the run is complete, and what the rotation would have removed stays
            assert {name: made[name] for name in made if name in expected or not ROTATED.match(name)} == expected
    print(f"{job}: {kills} kills in {runs} runs")


def moment(chance: random.Random, seconds: float, changes: int) -> dict:
    """When to kill a process: at any time, at any change of a file, or a moment after one."""
    kind = chance.random()
    if kind < 0.4:
        return {"after_seconds": chance.uniform(0, seconds)}
    return {"at_change": chance.randint(1, changes), "delay": 0.0 if kind < 0.7 else chance.uniform(0, 0.003)}


def check_files(folder: Path) -> None:
    """Every visible file is complete."""
    if not folder.exists():
        return
    for path in visible(folder):
        if path.suffix == ".safetensors":
            assert all(tensor.isfinite().all() for tensor in load_file(path).values() if tensor.is_floating_point())
        elif path.suffix == ".png":
            Image.open(path).load()
        elif path.suffix == ".jsonl":
            for line in path.read_text().splitlines():
                json.loads(line)
        elif path.suffix == ".toml":
            read_toml(path)
    for state in folder.glob("*-state"):
        read_progress(str(state))
    if any((folder / "cache").rglob("*.safetensors")):
        assert cache_tool(["verify", str(folder / "cache")]) == 0


def visible(folder: Path) -> list[Path]:
    """The files that no hidden name hides, the cache apart."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [
        path
        for path in paths
        if path.relative_to(folder).parts[0] != "cache"
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]


def content(folder: Path) -> dict[str, object]:
    """What a run has made, without what depends on the clock; whatever is left over counts too."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if not path.is_file() or name.startswith("cache"):
            continue
        if path.suffix == ".safetensors":
            found[name] = plain(load_file(path))
        elif path.suffix in (".png", ".jsonl"):
            found[name] = path.read_bytes()
        elif path.suffix == ".pt":
            found[name] = plain(torch.load(path, weights_only=True))
        elif path.name == "state.json":
            progress = json.loads(path.read_text())
            found[name] = {key: progress[key] for key in ("step", "seed", "history")}
        else:
            found[name] = None
    return found


def plain(value: object) -> object:
    """A nested value with each tensor's bytes in its place."""
    if isinstance(value, torch.Tensor):
        return str(value.dtype), tuple(value.shape), value.reshape(-1).view(torch.uint8).numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(inner) for key, inner in value.items()}
    return [plain(inner) for inner in value] if isinstance(value, (list, tuple)) else value
