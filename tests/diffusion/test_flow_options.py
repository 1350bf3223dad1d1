import subprocess
import sys

import pytest

from library.config.errors import ConfigError
from library.config.flow import FlowConfig, flow_problems
from library.config.loss import LossConfig


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_timestep": 900, "max_timestep": 500}, "--min_timestep 900 must be below --max_timestep 500"),
        ({"min_timestep": 500, "max_timestep": 500}, "--min_timestep 500 must be below"),
        ({"min_timestep": -5}, "--min_timestep -5"),
        ({"max_timestep": 1001}, "--max_timestep 1001"),
        ({"weighting_scheme": "logit_normal", "logit_std": 0.0}, "--logit_std 0.0 must be above 0"),
        ({"timestep_sampling": "sigmoid", "sigmoid_scale": -1.0}, "--sigmoid_scale -1.0 must be above 0"),
        ({"training_shift": 0.0}, "--training_shift 0.0 must be above 0"),
        ({"training_shift": 3.0, "flow_schedule_auto_shift": True}, "exclude each other"),
        ({"flow_use_uniform_schedule": True, "timestep_sampling": "mode"}, "contradicts --timestep_sampling mode"),
        ({"flow_use_uniform_schedule": True, "weighting_scheme": "mode"}, "contradicts --weighting_scheme mode"),
        ({"timestep_sampling": "sigmoid", "weighting_scheme": "logit_normal"}, "--timestep_sampling sigmoid contrad"),
        ({"logit_mean": 0.5}, "--logit_mean 0.5 does nothing"),
        ({"logit_std": 0.5, "weighting_scheme": "cosmap"}, "--logit_std 0.5 does nothing"),
        ({"mode_scale": 0.5, "weighting_scheme": "logit_normal"}, "add --timestep_sampling mode|remove it"),
        ({"sigmoid_scale": 2.0}, "--sigmoid_scale 2.0 does nothing"),
    ],
)
def test_contradictions_are_refused(options, message):
    with pytest.raises(ConfigError, match=f"(?i){message}") as caught:
        FlowConfig(**options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "density"),
    [
        ({}, "uniform"),
        ({"weighting_scheme": "none"}, "uniform"),
        ({"weighting_scheme": "logit_normal"}, "logit_normal"),
        ({"weighting_scheme": "logit_normal", "timestep_sampling": "logit_normal"}, "logit_normal"),
        ({"weighting_scheme": "sigma_sqrt", "timestep_sampling": "mode", "mode_scale": 0.8}, "mode"),
        ({"flow_use_uniform_schedule": True, "timestep_sampling": "uniform"}, "uniform"),
    ],
)
def test_density(options, density):
    assert FlowConfig(**options).density == density


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"huber_c": 0.2}, "--huber_c 0.2 does nothing with --loss_type l2"),
        ({"loss_type": "l1", "huber_schedule": "constant"}, "--huber_schedule constant does nothing"),
        ({"loss_type": "huber", "huber_c": 0.0}, "--huber_c 0.0 must be above 0"),
        ({"loss_type": "huber", "huber_scale": -1.0}, "--huber_scale -1.0 must be above 0"),
    ],
)
def test_loss_options(options, message):
    with pytest.raises(ConfigError, match=message):
        LossConfig(**options)


def test_snr_is_a_problem_for_flow():
    (problem,) = flow_problems(FlowConfig(), LossConfig(loss_type="huber", huber_schedule="snr"))
    assert "--huber_schedule snr" in problem
    assert flow_problems(FlowConfig(), LossConfig(loss_type="huber")) == []


def test_options_are_light():
    code = (
        "import sys, library.config.flow, library.config.sampling; "
        "assert not {'torch', 'numpy', 'PIL', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_idle_options_stay_out_of_saved_files():
    assert set(FlowConfig().idle_options) == {"logit_mean", "logit_std", "mode_scale", "sigmoid_scale"}
    automatic = FlowConfig(weighting_scheme="logit_normal", flow_schedule_auto_shift=True)
    assert set(automatic.idle_options) == {"mode_scale", "sigmoid_scale", "training_shift"}
    assert set(LossConfig().idle_options) == {"huber_schedule", "huber_c", "huber_scale"}
    assert LossConfig(loss_type="huber").idle_options == ()
