import pytest

from library.config.ema import EmaConfig
from library.config.errors import ConfigError
from tests.config.test_run import run_config


@pytest.mark.parametrize(
    "options",
    [
        {"ema_decay": 0.9},
        {"ema_update_interval": 2},
        {"ema_device": "accelerator"},
        {"ema_validation": "none"},
        {"ema_save_raw": True},
    ],
)
def test_nothing_acts_without_an_average(options):
    (name,) = options
    with pytest.raises(ConfigError, match=f"--{name} does nothing without --use_ema"):
        EmaConfig(**options)
    assert EmaConfig(use_ema=True, **options)


def test_a_decay_of_one_averages_nothing():
    with pytest.raises(ConfigError, match="--ema_decay 1 never changes"):
        EmaConfig(use_ema=True, ema_decay=1)


def test_schedule_free_optimizers_average_by_themselves():
    (problem,) = run_config("--use_ema", "--optimizer_type", "AdamWScheduleFree").problems()
    assert "which averages the weights by itself" in problem
