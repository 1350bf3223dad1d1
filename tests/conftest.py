import gc
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.s3_server import s3_bucket, s3_environment, s3_server  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PHOTOS = ROOT / "examples" / "data" / "photos"
sys.path.insert(0, str(ROOT))


def pytest_collection_finish() -> None:
    leave_the_old_alone()


def leave_the_old_alone() -> None:
    """A run collects garbage between models; among all that a test process keeps, that would take half its time."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def photos(tmp_path) -> Path:
    """Four photographs with captions, of two shapes."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for name in ("chelsea.png", "camera.png", "coffee.png", "clock_motion.png"):
        shutil.copy(PHOTOS / name, folder)
        shutil.copy((PHOTOS / name).with_suffix(".txt"), folder)
    return folder


@dataclass(frozen=True)
class Trainer:
    """Runs a training script on a tiny model and four photographs, in this process."""

    checkpoint: Path
    photos: Path
    folder: Path
    family: str = "sd3"
    job: str = "adapter"

    @property
    def script(self) -> str:
        """Its file name."""
        from library.cli import Script

        return f"{Script(self.family, self.job).name}.py"

    @property
    def network(self) -> bool:
        """Whether it trains adapters."""
        return self.job == "adapter"

    def arguments(self, output: str, **options) -> list[str]:
        """The command line: enough defaults to train, changed and extended by ``options`` (None removes one)."""
        settings = {
            "pretrained_model_name_or_path": self.checkpoint,
            "dataset_config": self.dataset(),
            "output_dir": self.folder / output,
            "output_name": "run",
            **({"network_dim": 2, "network_alpha": 2} if self.network else {}),
            "learning_rate": 1e-2 if self.network else 1e-3,
            "mixed_precision": "no",
            "max_train_steps": 4,
            "max_data_loader_n_workers": 0,
            "seed": 7,
            **options,
        }
        words: list[str] = []
        for name, value in settings.items():
            if value is True:
                words.append(f"--{name}")
            elif isinstance(value, (list, tuple)):
                words += [f"--{name}", *map(str, value)]
            elif value is not None:
                words += [f"--{name}", str(value)]
        return words

    def dataset(self, dataset: str = "", subset: str = "", general: str = "") -> Path:
        """A dataset TOML over the photographs at 64 px, in batches of two."""
        from library.families import family_options

        path = self.folder / f"dataset-{abs(hash((dataset, subset, general)))}.toml"
        being_written = path.with_suffix(f".{os.getpid()}")  # another process may be reading it
        step = max(32, family_options(self.family).RESOLUTION_STEP)
        being_written.write_text(
            f"[general]\n{general}\n[[datasets]]\nresolution = 64\nbatch_size = 2\nmin_bucket_reso = {step}\n"
            f"bucket_reso_steps = {step}\n{dataset}\n[[datasets.subsets]]\nimage_dir = {json.dumps(str(self.photos))}\n"
            f"{subset}\n"
        )
        being_written.replace(path)
        return path

    def __call__(self, output: str, **options) -> int:
        """Train; returns the exit code."""
        from accelerate.state import AcceleratorState, PartialState

        from library.cli import main

        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState._reset_state()
        try:
            return main(self.family, job=self.job, argv=self.arguments(output, **options))
        finally:
            logging.getLogger().handlers.clear()
            leave_the_old_alone()

    def launch(self, processes: int, output: str, **options) -> None:
        """Train in so many processes on gloo."""
        environment = {
            **os.environ,
            "ACCELERATE_USE_CPU": "true",
            "OMP_NUM_THREADS": "1",
            "TOKENIZERS_PARALLELISM": "false",
        }
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--standalone"]
        command += [self.script, *self.arguments(output, **options)]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]

    def with_run(self, output: str, act: Callable[[Any], Any], **options) -> Any:
        """What ``act`` makes of the run that is set up with these options; nothing is trained."""
        from library.training import setup

        made = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(setup, "train", lambda run: made.append(act(run)))
            assert self(output, **options) == 0
        return made[0]

    def log(self, output: str) -> list[dict]:
        """The lines of the log."""
        lines = (self.folder / output / "run-log.jsonl").read_text().splitlines()
        return [json.loads(line) for line in lines]

    def weights(self, output: str, stem: str = "run") -> dict:
        """The tensors of a saved file."""
        from safetensors.torch import load_file

        return load_file(self.folder / output / f"{stem}.safetensors")

    def losses(self, output: str) -> dict[int, float]:
        """Optimizer step -> loss, from the log."""
        return {entry["step"]: entry["loss/current"] for entry in self.log(output) if "loss/current" in entry}


@pytest.fixture
def unforeseen(monkeypatch) -> None:
    """No forecast, for who watches the trainer's own code: a forecast takes a step of it, without numbers."""
    from library.training import setup

    monkeypatch.setattr(setup, "starting_lines", lambda *arguments: [])


@pytest.fixture
def trainer(tiny_file, photos, tmp_path) -> Trainer:
    return Trainer(tiny_file, photos, tmp_path)


@pytest.fixture
def full_trainer(tiny_file, photos, tmp_path) -> Trainer:
    """Trains all of a tiny SD3."""
    return Trainer(tiny_file, photos, tmp_path, job="full")


@pytest.fixture
def sana_trainer(tiny_sana_file, photos, tmp_path) -> Trainer:
    """Trains all of a tiny Sana."""
    return Trainer(tiny_sana_file, photos, tmp_path, "sana", job="full")


@pytest.fixture
def sd_trainer(tiny_sd_file, photos, tmp_path) -> Trainer:
    """Trains adapters on a tiny Stable Diffusion 1.x."""
    return Trainer(tiny_sd_file, photos, tmp_path, "sd")


@pytest.fixture
def sd_full_trainer(tiny_sd_file, photos, tmp_path) -> Trainer:
    """Trains all of a tiny Stable Diffusion 1.x."""
    return Trainer(tiny_sd_file, photos, tmp_path, "sd", job="full")


@pytest.fixture(scope="session")
def tiny_sd_file(tmp_path_factory):
    """A tiny Stable Diffusion 1.x in one file, with its tokenizer beside it."""
    from tests.tiny import TINY_SD
    from tools.miniature_sd import make_sd

    return make_sd(tmp_path_factory.mktemp("sd"), sizes=TINY_SD)


@pytest.fixture(scope="session")
def tiny_sana_file(tmp_path_factory):
    """A tiny Sana in one file, with its tokenizer beside it."""
    from tests.tiny import TINY_SANA
    from tools.miniature_sana import make_sana

    return make_sana(tmp_path_factory.mktemp("sana"), sizes=TINY_SANA)


@pytest.fixture(scope="session")
def tiny_file(tmp_path_factory):
    """A tiny SD3 in one file, with tokenizers beside it."""
    from tests.tiny import TINY_SD3
    from tools.miniature_sd3 import make_sd3

    return make_sd3(tmp_path_factory.mktemp("sd3"), sizes=TINY_SD3)
