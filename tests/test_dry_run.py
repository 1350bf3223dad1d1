"""What ``--dry_run`` says of the data, and that it needs no torch for it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from library.cli import SCRIPTS, checked_configuration
from library.config.command_line import read_command_line
from library.config.errors import ConfigError
from library.config.run import training_groups
from library.dry_run import report
from library.families import family_options

ROOT = Path(__file__).resolve().parent.parent
LONG = "a red cat " * 60


def configuration(arguments):
    command_line = read_command_line(training_groups(family_options("sd3"), job="adapter"), arguments)
    config, problems = checked_configuration(SCRIPTS["sd3_train_network"], command_line)
    assert not problems
    return config


@pytest.fixture
def arguments(trainer):
    (trainer.photos / "camera.txt").write_text(LONG)
    return trainer.arguments("output", network_train_unet_only=True)


def test_the_report_follows_the_model(arguments):
    lines = report(configuration(arguments))
    assert lines[0].startswith("model: Stable Diffusion 3.5 medium")
    assert "warning: 1 caption is longer than the 77 tokens that CLIP-L and CLIP-G read; T5 can take it" in lines
    assert any(line.startswith("datasets[0]: 4 pictures at 64x64") for line in lines)
    assert lines[-1].startswith("steps: 4 optimizer steps")


def test_the_cache_is_reckoned_with_the_models_features(arguments):
    lines = report(configuration([*arguments, "--cache_text_encoder_outputs"]))
    (line,) = [line for line in lines if line.startswith("cache, at most")]
    numbers = 5 * (77 * (64 + 128) + 64 + 128 + 256 * 256)  # four captions and the empty one
    assert f"text features {4 * numbers / 2**20:.2g} MiB" in line


def test_without_tokenizers_on_disk_windows_are_told_later(arguments, tiny_file, tmp_path, monkeypatch):
    asked = []

    def snapshot_download(hub_id, **options):
        asked.append(options.get("local_files_only"))
        raise OSError("not on disk")

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    alone = tmp_path / "model" / tiny_file.name
    alone.parent.mkdir()
    shutil.copy(tiny_file, alone)
    config = configuration([*arguments, "--pretrained_model_name_or_path", str(alone)])
    lines = report(config)
    assert lines[-1].startswith("captions: whether one is too long for an encoder is told when training starts")
    assert asked == [True] and not any("longer than" in line for line in lines)


def test_steps_without_pictures_stop_it(arguments, trainer):
    dataset = trainer.dataset(subset="end_step = 2")
    with pytest.raises(ConfigError, match="no subset is used from step 3"):
        report(configuration([*arguments, "--dataset_config", str(dataset)]))


def test_nothing_is_written(arguments, trainer):
    report(configuration(arguments))
    assert not (trainer.folder / "output").exists()


def test_it_loads_no_torch(arguments):
    code = (
        "import sys\n"
        "from tests.test_dry_run import configuration\n"
        "from library.dry_run import report\n"
        f"lines = report(configuration({arguments!r}))\n"
        "assert any('longer than' in line for line in lines), lines\n"
        "assert 'torch' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
