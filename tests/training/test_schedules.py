import pytest
import torch
from transformers.optimization import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_cosine_with_min_lr_schedule_with_warmup,
    get_inverse_sqrt_schedule,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
    get_wsd_schedule,
)

from library.config.errors import ConfigError
from library.config.optimizer import OptimizerConfig
from library.training.schedules import create_schedule, current_learning_rates, learning_rate_multiplier

STEPS, WARMUP = 200, 20


def oracle(make, **settings):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    schedule = make(optimizer, **settings)
    return [schedule.lr_lambdas[0](step) for step in range(STEPS + 1)]


def ours(**settings):
    multiplier = learning_rate_multiplier(OptimizerConfig(learning_rate=1e-3, **settings), max_steps=STEPS)
    return [multiplier(step) for step in range(STEPS + 1)]


WARM = {"num_warmup_steps": WARMUP}
WHOLE = {**WARM, "num_training_steps": STEPS}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"lr_scheduler": "constant_with_warmup"}, lambda: oracle(get_constant_schedule_with_warmup, **WARM)),
        ({"lr_scheduler": "linear"}, lambda: oracle(get_linear_schedule_with_warmup, **WHOLE)),
        ({"lr_scheduler": "cosine"}, lambda: oracle(get_cosine_schedule_with_warmup, **WHOLE)),
        (
            {"lr_scheduler": "cosine_with_restarts", "lr_scheduler_num_cycles": 3},
            lambda: oracle(get_cosine_with_hard_restarts_schedule_with_warmup, **WHOLE, num_cycles=3),
        ),
        (
            {"lr_scheduler": "polynomial", "lr_scheduler_power": 2.0},
            lambda: oracle(get_polynomial_decay_schedule_with_warmup, **WHOLE, power=2.0),
        ),
        ({"lr_scheduler": "inverse_sqrt"}, lambda: oracle(get_inverse_sqrt_schedule, **WARM)),
        (
            {"lr_scheduler": "inverse_sqrt", "lr_scheduler_timescale": 50},
            lambda: oracle(get_inverse_sqrt_schedule, **WARM, timescale=50),
        ),
        (
            {"lr_scheduler": "cosine_with_min_lr", "lr_scheduler_min_lr_ratio": 0.1},
            lambda: oracle(get_cosine_with_min_lr_schedule_with_warmup, **WHOLE, num_cycles=0.5, min_lr_rate=0.1),
        ),
        (
            {"lr_scheduler": "warmup_stable_decay", "lr_decay_steps": 0.25, "lr_scheduler_min_lr_ratio": 0.1},
            lambda: oracle(get_wsd_schedule, **WHOLE, num_decay_steps=50, min_lr_ratio=0.1, num_cycles=0.5),
        ),
    ],
)
def test_schedules_equal_the_fields_own(settings, expected):
    assert ours(lr_warmup_steps=WARMUP, **settings) == pytest.approx(expected(), abs=1e-12)


def test_warmup_as_a_fraction():
    assert ours(lr_scheduler="linear", lr_warmup_steps=0.1) == ours(lr_scheduler="linear", lr_warmup_steps=WARMUP)


def test_piecewise_constant():
    factors = ours(lr_scheduler="piecewise_constant", lr_scheduler_args=("step_rules=1:10,0.1:20,0.005",))
    assert [factors[step] for step in (0, 9, 10, 19, 20, 200)] == [1, 1, 0.1, 0.1, 0.005, 0.005]


def test_broken_rules_are_explained():
    with pytest.raises(ConfigError, match="multiplier:until step"):
        ours(lr_scheduler="piecewise_constant", lr_scheduler_args=("step_rules=1-10",))


def test_a_class_of_torch_by_name_and_its_wrong_arguments():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    config = OptimizerConfig(lr_scheduler_type="StepLR", lr_scheduler_args=("step_size=2", "gamma=0.5"))
    schedule = create_schedule(config, optimizer, max_steps=10)
    rates = []
    for _ in range(5):
        rates.append(current_learning_rates(optimizer)["group0"])
        optimizer.step()
        schedule.step()
    assert rates == [1.0, 1.0, 0.5, 0.5, 0.25]
    with pytest.raises(ConfigError, match="StepLR says"):
        create_schedule(
            OptimizerConfig(lr_scheduler_type="StepLR", lr_scheduler_args=("size=2",)), optimizer, max_steps=1
        )
