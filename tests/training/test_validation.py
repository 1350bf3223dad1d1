"""The validation loss: the same pictures at the same noise, whatever else the run does and however many processes."""

import json
import math
import shutil
import statistics
from types import SimpleNamespace

import pytest
import torch

from library.training import validation
from library.training.hooks import validate
from library.training.validation import LEVELS, ValidationResult, stratified_quantiles
from tests.training.ranks import in_processes

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
ON_DISK = {
    "cache_latents_to_disk": True,
    "cache_text_encoder_outputs_to_disk": True,
    "network_train_unet_only": True,
}


def test_every_picture_is_measured_once_in_each_share_of_the_noise_levels():
    keys = [f"0/0/{number}.png" for number in range(200)]
    quantiles = stratified_quantiles(7, keys)
    assert quantiles.shape == (LEVELS, 200) and quantiles.dtype == torch.float64
    for share, row in enumerate(quantiles.tolist()):
        assert all(share / LEVELS < quantile < (share + 1) / LEVELS for quantile in row)
        assert len(set(row)) == 200
        assert statistics.mean(row) == pytest.approx((share + 0.5) / LEVELS, abs=0.02)
    within = quantiles * LEVELS - torch.arange(LEVELS)[:, None]
    assert not torch.allclose(within[0], within[1], atol=0.01)  # each share has its own draw


def test_noise_levels_depend_on_the_picture_and_the_seed_alone():
    alone = stratified_quantiles(7, ["0/0/b.png"])
    assert torch.equal(stratified_quantiles(7, ["0/0/a.png", "0/0/b.png"])[:, 1:], alone)
    assert not torch.equal(stratified_quantiles(8, ["0/0/b.png"]), alone)


def test_the_result_is_the_mean_with_its_standard_error_over_pictures():
    losses = [[1.0, 2.0, 3.0, 4.0], [2.0, 2.0, 2.0, 2.0], [0.5, 1.5, 3.5, 6.5]]
    result = ValidationResult.of(losses)
    means = [2.5, 2.0, 3.0]
    assert result.mean == pytest.approx(2.5)
    assert result.standard_error == pytest.approx(statistics.stdev(means) / math.sqrt(3))
    assert result.levels == pytest.approx((3.5 / 3, 5.5 / 3, 8.5 / 3, 12.5 / 3))
    assert ValidationResult.of(losses[::-1]) == result
    assert ValidationResult.of(losses[:1]).standard_error == 0


@pytest.fixture
def held_out(trainer):
    """Three pictures for validation in batches of one, and one to train on."""
    others = shutil.copytree(trainer.photos, trainer.folder / "others")
    for name in ("camera", "coffee", "clock_motion"):
        (trainer.photos / f"{name}.png").unlink()
    (others / "chelsea.png").unlink()
    path = trainer.folder / "held_out.toml"
    path.write_text(
        f'{trainer.dataset().read_text()}[[datasets]]\nresolution = 64\nrole = "validation"\nmin_bucket_reso = 32\n'
        f"bucket_reso_steps = 32\n[[datasets.subsets]]\nimage_dir = {json.dumps(str(others))}\n"
    )
    return path


def measured(log: list[dict]) -> list[dict]:
    return [line for line in log if "loss/validation" in line]


def test_a_validation_dataset_is_measured_and_never_trained_on(trainer, held_out):
    seen: set[str] = set()

    def act(run):
        (hook,) = [hook for hook in run.hooks if getattr(hook.act, "__qualname__", "").startswith(validate.__name__)]
        plan = [micro_batch for step in range(8) for micro_batch in run.plan.step(step)]
        seen.update(run.plan._samples[visit.sample].key for micro_batch in plan for visit in micro_batch.visits)
        hook.act(run, 1)

    trainer.with_run("out", act, **CACHED, dataset_config=held_out)
    assert seen == {"0/0/chelsea.png"}
    (line,) = measured(trainer.log("out"))
    levels = [line[f"loss/validation/level_{number}"] for number in range(1, LEVELS + 1)]
    assert statistics.mean(levels) == pytest.approx(line["loss/validation"], rel=1e-6)
    assert line["loss/validation_standard_error"] > 0


def test_validation_repeats_itself_and_any_share_of_processes_gives_the_same(trainer, held_out, monkeypatch):
    def act(run):
        (hook,) = [hook for hook in run.hooks if getattr(hook.act, "__qualname__", "").startswith(validate.__name__)]
        (found,) = [cell.cell_contents for cell in hook.act.__closure__]
        results = [found.measure(run), found.measure(run)]
        everything: list[list[list[float]]] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(validation, "gather", lambda own, run: everything.append(own) or own or [[0.0] * LEVELS])
            for count in (2, 3, 5):
                everything.clear()
                for rank in range(count):
                    # the processes that there would be
                    of_rank = SimpleNamespace(process_index=rank, num_processes=count)
                    found.measure(Several(run, of_rank))
                assert sum(map(len, everything)) == 3
                assert [len(own) for own in everything] == [len(range(rank, 3, count)) for rank in range(count)]
                results.append(ValidationResult.of([losses for own in everything for losses in own]))
        return results

    first, *others = trainer.with_run("out", act, **CACHED, dataset_config=held_out)
    assert all(other == first for other in others)


class Several:
    """A run as one of several processes sees it."""

    def __init__(self, run, processes):
        self._run = run
        self.accelerator = Accelerator(run.accelerator, processes)

    def __getattr__(self, name):
        return getattr(self._run, name)


class Accelerator:
    def __init__(self, accelerator, processes):
        self._accelerator, self._processes = accelerator, processes

    def __getattr__(self, name):
        source = self._processes if hasattr(self._processes, name) else self._accelerator
        return getattr(source, name)


def test_two_processes_measure_what_one_measures(trainer, held_out):
    options = {**ON_DISK, "dataset_config": held_out, "learning_rate": 1e-30, "max_train_steps": 1}
    assert in_processes(2, lambda rank: trainer("two", **options)) == [0, 0]
    assert trainer("one", **options) == 0
    (two,), (one,) = measured(trainer.log("two")), measured(trainer.log("one"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"validate_every_n_steps": 2}, [2, 4]),
        ({"validate_every_n_epochs": 2}, [2, 4]),
        ({}, [1, 2, 3, 4]),
        ({"validate_every_n_epochs": 3}, [3]),
    ],
)
def test_it_is_measured_when_it_was_asked_for(trainer, held_out, options, steps):
    assert trainer("out", **CACHED, **options, dataset_config=held_out) == 0
    lines = measured(trainer.log("out"))
    assert [line["step"] for line in lines] == steps
    assert len({line["loss/validation"] for line in lines}) == len(steps)


def test_at_most_so_many_batches_are_measured(trainer, held_out, monkeypatch):
    counts = []
    of = ValidationResult.of
    monkeypatch.setattr(
        validation.ValidationResult, "of", classmethod(lambda cls, losses: counts.append(len(losses)) or of(losses))
    )
    for limit in (None, 2, 9):
        assert trainer("out", **CACHED, dataset_config=held_out, max_train_steps=1, max_validation_steps=limit) == 0
    assert counts == [3, 2, 3]


def test_a_split_is_measured_where_epochs_differ_in_length(trainer):
    others = shutil.copytree(trainer.photos, trainer.folder / "others")
    dataset = trainer.dataset(
        general="validation_split = 0.3",
        subset=f"end_epoch = 1\n[[datasets.subsets]]\nimage_dir = {json.dumps(str(others))}\nnum_repeats = 3",
    )
    assert trainer("out", **CACHED, dataset_config=dataset, max_train_epochs=3, max_train_steps=None) == 0
    log = trainer.log("out")
    ends = [line["step"] for line in log if "loss/epoch_average" in line]
    assert [line["step"] for line in measured(log)] == ends
    epochs = [line["epoch"] for line in log if "epoch" in line]
    lengths = [epochs.count(epoch) for epoch in (1, 2, 3)]
    assert lengths[0] > lengths[1] == lengths[2]
    assert ends == [lengths[0], lengths[0] + lengths[1], sum(lengths)]
