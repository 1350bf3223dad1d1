"""The losses of the first 20 steps of the miniatures, held to stored values; and what may not move losses.

``UPDATE_GOLDEN=1`` writes the files anew; say why in the commit. A file names what the last bits of its values come
from: torch, the instructions and the maker of the CPU, and the number of threads. Where these are the same the values
must be. Elsewhere sums are made in another order: there the losses of the first two steps, which the updates hardly
touch, must agree to a part in 10^5, and the others to one in 10^3, for what AdamW makes of a gradient near zero isn't
continuous.

Each entry of ``SAME`` changes how a step is computed and not what, on the tests' smaller models and with a continuous
optimizer. Its bound is in units in the last place (fp32) of the loss, over 12 steps; 0 is exact.
"""

import json
import os
import platform
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import Trainer
from tests.training.ranks import in_processes
from tools.miniature_sana import make_sana
from tools.miniature_sd import make_sd
from tools.miniature_sd3 import make_sd3

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
STEPS = 20
SAME_STEPS = 12
FIRST = 2
MEMORY = {"cache_latents": True, "cache_text_encoder_outputs": True}
DISK = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
ONLINE = {"cache_latents": None, "cache_text_encoder_outputs": None}
WORKERS = {"max_data_loader_n_workers": 2}
CONTINUOUS = {"optimizer_type": "SGDNesterov", "learning_rate": 0.05, "max_grad_norm": 0}
CONTINUOUS |= {"max_train_steps": SAME_STEPS}


@dataclass(frozen=True)
class Same:
    """Options that must not change the mathematics.

    Attributes:
        bound: In how many units in the last place a loss may differ from the reference's.
        why: Why it may.
        options: What is changed.
        batch_size: Of the dataset.
        processes: How many.
    """

    bound: int
    why: str
    options: dict = field(default_factory=dict)
    batch_size: int = 4
    processes: int = 1


ONE_BY_ONE = {"gradient_accumulation_steps": 4}
OTHER_SUMS = "the same numbers are summed in another order"
ENCODED_ALONE = "encoders see other batches, which moves the last bits of what they answer"
SAME = {
    "caches on disk": Same(0, "the same bytes, read from files", DISK),
    "2 workers": Same(0, "a batch depends on its plan alone", WORKERS),
    "latents encoded ahead": Same(8, ENCODED_ALONE, {"cache_latents": None, "vae_cache_disable": True}),
    "no caches, persistent workers": Same(
        8, ENCODED_ALONE, {**ONLINE, **WORKERS, "persistent_data_loader_workers": True}
    ),
    "checkpointing": Same(0, "the same kernels compute the same numbers again", {"gradient_checkpointing": True}),
    "every second block checkpointed": Same(
        0, "as above", {"gradient_checkpointing": True, "gradient_checkpointing_interval": 2}
    ),
    "fused backward": Same(0, "each weight's step is the same step", {"fused_backward_pass": True}),
    "2 micro-batches of 2": Same(8, OTHER_SUMS, {"gradient_accumulation_steps": 2}, batch_size=2),
    "4 micro-batches of 1": Same(8, OTHER_SUMS, ONE_BY_ONE, batch_size=1),
    "2 processes": Same(8, OTHER_SUMS, batch_size=2, processes=2),
    "2 processes, 2 micro-batches each": Same(8, OTHER_SUMS, {"gradient_accumulation_steps": 2}, 1, processes=2),
}


def trainer_of(family: str, model: Path, folder: Path) -> Trainer:
    photos = Path(__file__).resolve().parents[2] / "examples" / "data" / "photos"
    four = folder / "photos"
    four.mkdir()
    for name in ("chelsea", "camera", "coffee", "clock_motion"):
        for ending in (".png", ".txt"):
            shutil.copy(photos / f"{name}{ending}", four)
    return Trainer(model, four, folder, family, job="full" if family == "sana" else "adapter")


def losses(trainer: Trainer, same: Same, **options) -> list[float]:
    """The losses with what is changed."""
    dataset = trainer.folder / f"batches-of-{same.batch_size}.toml"
    text = trainer.dataset(dataset="enable_bucket = false").read_text()
    if trainer.family == "sd":  # at 64 px its lowest level has one position, of which a norm keeps little but the sign
        text = text.replace("resolution = 64", "resolution = 128")
    dataset.write_text(text.replace("batch_size = 2", f"batch_size = {same.batch_size}"))
    options = {**MEMORY, "dataset_config": dataset, "max_train_steps": STEPS, **options, **same.options}
    if trainer.network:
        options |= {"network_train_unet_only": True}
    output = f"out {len(list(trainer.folder.glob('out *')))}"
    if same.processes == 1:
        assert trainer(output, **options) == 0
    else:
        assert in_processes(same.processes, lambda rank: trainer(output, **options)) == [0] * same.processes
    return list(trainer.losses(output).values())


@pytest.fixture(scope="module", params=["sd3", "sana", "sd"])
def tiny(request, tmp_path_factory, tiny_file, tiny_sana_file, tiny_sd_file):
    """A trainer of the tests' model, and the losses that others are held to."""
    model = {"sd3": tiny_file, "sana": tiny_sana_file, "sd": tiny_sd_file}[request.param]
    trainer = trainer_of(request.param, model, tmp_path_factory.mktemp(request.param))
    return trainer, losses(trainer, Same(0, ""), **CONTINUOUS)


def ulps(one: list[float], other: list[float]) -> int:
    """The largest distance between fp32 losses, in units in the last place."""
    assert len(one) == len(other) == SAME_STEPS
    bits = [np.array(losses, dtype=np.float32).view(np.int32).astype(np.int64) for losses in (one, other)]
    return int(np.abs(bits[0] - bits[1]).max())


def here() -> dict[str, str | int]:
    """What the last bits depend on."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    maker = next((line.split(":")[1].strip() for line in lines if line.startswith("vendor_id")), platform.machine())
    return {
        "torch": torch.__version__,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "maker": maker,
        "threads": torch.get_num_threads(),
    }


@pytest.mark.parametrize(("family", "make"), [("sd3", make_sd3), ("sana", make_sana), ("sd", make_sd)])
def test_the_first_losses_are_those_of_before(family, make, tmp_path):
    trainer = trainer_of(family, make(tmp_path / "miniature"), tmp_path)
    found = losses(trainer, Same(0, "", batch_size=2), learning_rate=1e-3)
    path = GOLDEN / f"losses_{family}.json"
    if os.environ.get("UPDATE_GOLDEN"):
        stored = {"made_with": here(), "losses": [loss.hex() for loss in found]}
        path.write_text(json.dumps(stored, indent=1) + "\n")
    stored = json.loads(path.read_text())
    expected = [float.fromhex(loss) for loss in stored["losses"]]
    assert len(expected) == STEPS
    if stored["made_with"] == here():
        assert found == expected
        return
    assert found[:FIRST] == pytest.approx(expected[:FIRST], rel=1e-5)
    assert found == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("name", SAME)
def test_what_must_not_change_the_losses_does_not(tiny, name):
    trainer, expected = tiny
    found = ulps(losses(trainer, SAME[name], **CONTINUOUS), expected)
    print(f"{trainer.family}: {name}: {found} ulps")
    assert found <= SAME[name].bound, f"{found} units in the last place; {SAME[name].why}"


def test_the_losses_would_show_a_change(tiny):
    trainer, expected = tiny
    slightly = {"noise_offset": 1e-4} if trainer.family == "sd" else {"training_shift": 1.00001}
    assert ulps(losses(trainer, Same(0, ""), **{**CONTINUOUS, "seed": 8}), expected) > 10**5
    assert ulps(losses(trainer, Same(0, ""), **CONTINUOUS, **slightly), expected) > 8
