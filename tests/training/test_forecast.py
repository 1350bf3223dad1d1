"""What is foreseen of a run beside its step, and what is said of it."""

import dataclasses
import math

import pytest
import torch

from library.config.dataset import DatasetConfig, SubsetConfig
from library.config.errors import ConfigError
from library.data.buckets import place_all
from library.records import Resolution, Sample
from library.training import before_start, setup
from library.training.device_rates import Rates, measured_rates
from library.training.forecast import CAPTIONS, CONTEXT, DECODING, PICTURES, STEP, largest_shape
from library.training.forecast_lines import forecast_lines
from library.training.precision import resolve_precision
from library.training.trial import MicroBatchShape

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
GIB = 2**30


@pytest.fixture(params=["sd3", "sana"])
def job(request, tiny_file, tiny_sana_file, photos, tmp_path):
    from tests.conftest import Trainer

    checkpoint = tiny_file if request.param == "sd3" else tiny_sana_file
    return Trainer(checkpoint, photos, tmp_path, request.param)


@pytest.fixture
def one(tiny_sana_file, photos, tmp_path):
    """One family, where the other would say the same."""
    from tests.conftest import Trainer

    return Trainer(tiny_sana_file, photos, tmp_path, "sana")


def configured(trainer, **options):
    """The configuration that these options make, and the family."""
    from library.cli import SCRIPTS, checked_configuration
    from library.config.command_line import read_command_line
    from library.families import create_family

    script = SCRIPTS[trainer.script.removesuffix(".py")]
    command_line = read_command_line(script.groups, trainer.arguments("out", **options))
    config, problems = checked_configuration(script, command_line)
    assert not problems
    return config, create_family(config.family_name, config)


def foreseen(trainer, *, cuda=True, **options):
    config, family = configured(trainer, **options)
    precision = resolve_precision(config, accelerator_available=cuda)
    shape = MicroBatchShape(2, Resolution(64, 64))
    return before_start.foresee(config, family, shape, precision, cuda=cuda), config, family


def numbers(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_phases_beside_the_step_have_their_weights(job):
    prompts = job.folder / "prompts.txt"
    prompts.write_text("a cat\n")
    cached, _, family = foreseen(job, **CACHED, sample_prompts=prompts, sample_every_n_steps=1)
    vae = 4 * numbers(family.load_vae(device="meta", dtype=torch.float32))
    encoders = 4 * sum(map(numbers, family.load_text_encoders(device="meta", dtype=torch.float32).values()))
    assert cached.phases[CAPTIONS] == pytest.approx(encoders, rel=0.01)
    assert vae < cached.phases[PICTURES] < cached.phases[DECODING]
    assert cached.host["the VAE, for samples"] == pytest.approx(vae, rel=0.05)
    assert cached.peak == max(cached.phases.values()) + CONTEXT
    whole, _, _ = foreseen(job, network_train_unet_only=True)
    assert CAPTIONS not in whole.phases and DECODING not in whole.phases
    assert whole.phases[STEP] == pytest.approx(cached.phases[STEP] + vae + encoders, rel=0.02)


def test_on_the_host_no_context_is_taken(one):
    assert foreseen(one, cuda=False, **CACHED)[0].context == 0


def test_an_average_on_the_host_waits_there_and_one_on_the_device_is_counted(one):
    average = {"use_ema": True, "ema_decay": 0.9}
    plain = foreseen(one, **CACHED)[0]
    host = foreseen(one, **CACHED, **average, ema_device="cpu")[0]
    device = foreseen(one, **CACHED, **average, ema_device="accelerator")[0]
    size = 4 * plain.step.trained
    assert host.step.peak == plain.step.peak and host.host["moving average"] == 2 * size
    assert device.step.peak - plain.step.peak == pytest.approx(size, rel=0.3)  # in whole blocks of the allocator


def test_trained_text_encoders_are_named_as_what_is_not_foreseen(trainer):
    found, _, _ = foreseen(trainer)
    assert found.unseen and "not foreseen: the gradients" in "\n".join(forecast_lines(found))


def test_an_optimizer_with_a_mode_for_training_is_foreseen(one):
    assert foreseen(one, **CACHED, optimizer_type="AdamWScheduleFree")[0].step.trained


def test_an_adapter_that_goes_on_from_a_file_is_foreseen(one):
    assert one("start", **CACHED, max_train_steps=1) == 0
    weights = one.folder / "start" / "run.safetensors"
    assert foreseen(one, **CACHED, network_weights=weights)[0].step == foreseen(one, **CACHED)[0].step


def test_the_largest_micro_batch_is_found(job):
    config, family = configured(job, **CACHED)
    small, large = (
        DatasetConfig(
            resolution=Resolution(side, side),
            batch_size=rows,
            enable_bucket=True,
            min_bucket_reso=32,
            bucket_reso_steps=32,
            subsets=(SubsetConfig(image_dir="x"),),
        )
        for side, rows in ((128, 3), (64, 8))
    )
    config = dataclasses.replace(config, datasets=(small, large))
    latents = family.latents.format
    shape = largest_shape(config, latents)
    assert shape.rows == 3 and shape.resolution.area <= 128 * 128

    def sample(dataset, size):
        return Sample(key="a", path="", content="", captions=("",), size=size, dataset=dataset, subset=0)

    samples = [sample(0, Resolution(500, 500)), *(sample(1, Resolution(500, 500)) for _ in range(20))]
    placements = place_all(samples, config.datasets, latents.resolution_step)
    assert largest_shape(config, latents, samples, placements) == MicroBatchShape(8, Resolution(64, 64))


def test_lines_say_what_is_needed_where_and_for_how_long(one):
    found, _, _ = foreseen(one, **CACHED)
    step = dataclasses.replace(found.step, operations=2e12, up=30 * GIB, down=GIB)
    found = dataclasses.replace(found, step=step)
    rates = Rates(1e12, 10 * GIB, "imagined")
    assert rates.seconds(2e12, 30 * GIB, GIB) == 3 and rates.seconds(2e12, 0, 0) == 2
    text = "\n".join(forecast_lines(found, rates=rates, steps=2400, free=20 * GIB))
    assert "forecast: at most 5" in text and "512 MiB of them for CUDA itself, 20.0 GiB are free" in text
    assert "2 TFLOP for 2 pictures, 30.0 GiB to the device and 1.0 GiB back" in text
    assert "at least 3 s, 2.0 h for 2400 steps, at 1 TFLOP/s (imagined)" in text


def test_rates_are_measured():
    rates = measured_rates(torch.device("cpu"), torch.float32)
    assert 1e8 < rates.operations < 1e15 and rates.copied is None and "measured" in rates.title
    assert measured_rates(torch.device("cpu"), torch.float32) is rates  # once in a process


class Unusual(Exception):
    """Of a package of others."""


def test_what_can_not_be_foreseen_is_said_and_stops_nothing(one, capsys, monkeypatch):
    def fails(*args, **options):
        raise Unusual("no meta kernel for this\nand a long explanation")

    def refuses(*args, **options):
        raise ConfigError("a file has no numbers\nand another")

    monkeypatch.setattr(before_start, "forecast", fails)
    assert one("out", **CACHED, dry_run=True) == 0
    assert "forecast: none (Unusual: no meta kernel for this)" in capsys.readouterr().out
    assert one("out", **CACHED, fit="8GiB") == 2
    assert "--fit 8GiB: the run can't be foreseen" in capsys.readouterr().err
    monkeypatch.setattr(before_start, "foresee", refuses)
    assert one("out", **CACHED, max_train_steps=1) == 0
    assert "forecast: none (a file has no numbers)" in capsys.readouterr().err


def test_a_dry_run_says_what_the_run_would_take(job, capsys):
    assert job("out", **CACHED, dry_run=True) == 0
    told = capsys.readouterr().out
    assert "forecast: at most" in told and "the step's peak: base weights" in told and "at least" in told
    assert not (job.folder / "out").exists()


def test_fitting_prints_options_and_stops(one, capsys):
    assert one("out", **CACHED, fit="1GiB") == 0
    told = capsys.readouterr().out
    assert "--fit 1GiB: " in told and "paste: nothing, the settings fit as they are" in told
    assert "nothing was loaded or written (--fit)" in told
    assert not (one.folder / "out").exists()
    assert one("out", **CACHED, fit="auto") == 2
    assert "--fit auto: this machine has no GPU" in capsys.readouterr().err


def test_fitting_finds_settings_that_are_foreseen_to_fit(one, capsys):
    plain = foreseen(one, **CACHED)[0]
    recomputed = foreseen(one, **CACHED, gradient_checkpointing=True)[0]
    budget = math.ceil((plain.peak + recomputed.peak) / 2 / 2**20)
    assert one("out", **CACHED, fit=f"{budget}MiB", blocks_to_swap=0) == 0
    assert "paste: --gradient_checkpointing" in capsys.readouterr().out


def test_automatic_swapping_is_resolved_and_written_down(job, capsys):
    assert job("out", **CACHED, blocks_to_swap="auto", max_train_steps=1) == 0
    assert "--blocks_to_swap auto: 0, the model is in host memory already" in capsys.readouterr().err
    written = (job.folder / "out" / "run-run.toml").read_text()
    assert "blocks_to_swap = 0  # derived: auto, no accelerator" in written


def test_automatic_swapping_takes_what_the_device_lacks(one, monkeypatch):
    config, family = configured(one, **CACHED, blocks_to_swap="auto")
    precision = resolve_precision(config, accelerator_available=True)
    shape = MicroBatchShape(2, Resolution(64, 64))
    device = torch.device("cuda")

    def found(free):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, free))
        changed, notes = before_start.with_found_swaps(config, family, precision, device, shape)
        return changed.memory.blocks_to_swap, notes[0]

    plain = dataclasses.replace(config, memory=dataclasses.replace(config.memory, blocks_to_swap=0))
    needed = before_start.foresee(plain, family, shape, precision, cuda=True).peak
    assert found(needed - CONTEXT)[0] == 0  # this process has taken the context already
    assert found(needed - CONTEXT - 1)[0] > 0
    count, note = found(0)
    assert count == family.description.blocks and note.startswith("warning: ") and "--fit auto" in note


def test_every_run_is_foreseen_once_before_anything_is_loaded(one, capsys):
    assert one("out", **CACHED, max_train_steps=1) == 0
    before, after = capsys.readouterr().err.split("loading the VAE", 1)
    assert before.count("forecast: at most") == 1 and "forecast" not in after
    written = (one.folder / "out" / "run-run.toml").read_text()
    assert written.count("# forecast: at most") == 1 and "#   each step: " in written


def test_a_model_that_processes_share_is_said_not_to_be_foreseen(one):
    config, family = configured(one, **CACHED)
    precision = resolve_precision(config, accelerator_available=False)
    lines = setup.foreseen(config, family, precision, sharding=object(), accelerator=None, data=None, report=None)
    assert lines == ["forecast: none (what processes take that share a model isn't foreseen)"]


def test_a_run_that_may_not_fit_is_warned_and_goes_on(one, monkeypatch):
    config, family = configured(one, **CACHED)
    shape, rates = MicroBatchShape(2, Resolution(64, 64)), Rates(1.0, None, "imagined")
    precision = resolve_precision(config, accelerator_available=False)
    lines = list(before_start._lines(config, family, precision, shape, rates, 1 << 20, None, cuda=False))
    assert lines[0].startswith("warning: this run may need") and "--fit auto" in lines[0]
    assert setup.WARNING == "warning: "
