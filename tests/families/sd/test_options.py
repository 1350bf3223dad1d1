"""What the command line says about the objective: what the files decide, what fits, and what is for other models."""

import dataclasses
import json
from types import SimpleNamespace

import pytest

from library.cli import SCRIPTS, Script, checked_configuration, refused_options
from library.config.command_line import read_command_line
from library.config.ddpm import DdpmConfig
from library.config.loss import LossConfig
from library.config.memory import MemoryConfig
from library.config.model import ModelConfig
from library.config.options import all_options
from library.dry_run import look
from library.families import FAMILIES, create_family, family_options
from library.families.sd.family import create
from library.families.sd.files import locate
from library.families.sd.options import SdOptions

FLOW_SCRIPTS = [script for script in SCRIPTS.values() if "flow" in family_options(script.family).OBJECTIVE_GROUPS]
SD_SCRIPTS = [script for script in SCRIPTS.values() if script.family == "sd"]


@pytest.fixture
def check(tiny_sd, sd_trainer):
    """The resolved configuration of a model, and what is wrong."""

    def checked(checkpoint, **options):
        trainer = dataclasses.replace(sd_trainer, checkpoint=checkpoint)
        script = Script("sd", "adapter")
        line = read_command_line(script.groups, trainer.arguments("out", **options), refusals=refused_options("sd"))
        return checked_configuration(script, line)

    return checked


def test_a_folder_decides_what_the_model_predicts(tiny_sd, check, tmp_path):
    for prediction, velocity in (("v_prediction", True), ("epsilon", False)):
        folder = tiny_sd.folder(tmp_path / prediction, prediction=prediction)
        config, problems = check(folder, debiased_estimation_loss=True)
        assert problems == [] and config.ddpm.v_parameterization is velocity
        source = config.provenance["v_parameterization"]
        assert source.startswith("derived: the files of ") and source.endswith(f"({prediction})")
        agreed, wrong = ("v_parameterization", "no-v_parameterization")[:: 1 if velocity else -1]
        assert check(folder, **{agreed: True})[1] == []
        (told,) = check(folder, **{wrong: True})[1]
        assert told.startswith(f"--{wrong}: the files of {folder}") and told.endswith(f"({prediction}); remove it")


def test_a_folder_decides_how_its_schedule_ends(tiny_sd, check, tmp_path):
    for prediction in ("v_prediction", "epsilon"):
        folder = tiny_sd.folder(tmp_path / prediction, prediction=prediction)
        schedule = {"prediction_type": prediction, "rescale_betas_zero_snr": True}
        (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(schedule))
        config, problems = check(folder)
        assert problems == [] and bool(config.ddpm.zero_terminal_snr) is (prediction == "v_prediction")
        ddpm = create_family("sd", config).objective.ddpm
        assert ddpm.zero_terminal_snr is ddpm.v_parameterization is (prediction == "v_prediction")
        if prediction == "v_prediction":
            assert config.provenance["zero_terminal_snr"].startswith("derived: ")
            answered, problems = check(folder, **{"no-zero_terminal_snr": True})
            assert problems == [] and create_family("sd", answered).objective.ddpm.zero_terminal_snr is False


@pytest.mark.parametrize("content", ['{"prediction_type": ', "[]", "\x00"])
def test_a_damaged_schedule_is_an_error_and_a_missing_one_says_nothing(tiny_sd, sd_trainer, tmp_path, capsys, content):
    folder = tiny_sd.folder(tmp_path / "base", prediction="v_prediction")
    train = dataclasses.replace(sd_trainer, checkpoint=folder)
    schedule = folder / "scheduler" / "scheduler_config.json"
    schedule.write_text(content)
    assert train("out", max_train_steps=1) == 2
    (told,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert str(schedule) in told
    schedule.unlink()
    assert locate(ModelConfig(pretrained_model_name_or_path=str(folder)), SdOptions()).v_prediction is None


def test_a_second_generation_file_that_says_nothing_is_warned_about(tiny_sd, check, tmp_path):
    path = tiny_sd.single_file(tmp_path / "model.safetensors")
    config, problems = check(path)
    assert problems == [] and config.ddpm.v_parameterization is False
    warned = [line for line in look(config)[0] if "does not say what it predicts" in line]
    assert [line.startswith("warning: ") for line in warned] == [True] * tiny_sd.is_v2
    for answer in ("v_parameterization", "no-v_parameterization"):
        answered, problems = check(path, **{answer: True})
        assert problems == [] and answered.ddpm.v_parameterization is (answer == "v_parameterization")
        assert not [line for line in look(answered)[0] if "does not say" in line]


def test_options_must_fit_what_the_files_say(tiny_sd, check, tmp_path):
    velocity = tiny_sd.folder(tmp_path / "v", prediction="v_prediction")
    noise = tiny_sd.folder(tmp_path / "noise")
    silent = tiny_sd.single_file(tmp_path / "model.safetensors")
    for options, fits in (
        ({"zero_terminal_snr": True}, velocity),
        ({"scale_v_pred_loss_like_noise_pred": True}, velocity),
        ({"v_pred_like_loss": 0.5}, noise),
    ):
        (name,) = options
        for model in (velocity, noise):
            problems = check(model, **options)[1]
            assert [problem.split()[0] for problem in problems] == [f"--{name}"] * (model != fits), (name, model)
        assert bool(check(silent, **options)[1]) is (fits == velocity)
        assert bool(check(silent, **options, v_parameterization=True)[1]) is (fits == noise)


def test_huber_follows_the_schedule_where_nobody_says_otherwise(tiny_sd, check, tmp_path):
    path = tiny_sd.single_file(tmp_path / "model.safetensors")
    config, problems = check(path, loss_type="huber")
    assert problems == [] and config.loss.huber_schedule == "snr"
    assert config.provenance["huber_schedule"].startswith("derived: the default of Stable Diffusion ")
    assert check(path)[0].loss.huber_schedule is None
    assert check(path, loss_type="huber", huber_schedule="constant")[0].loss.huber_schedule == "constant"


def refused_names(script, groups):
    own = all_options(script.groups)
    return [option for name, option in all_options(groups).items() if name not in own]


def told_about(script, option):
    words = [f"--{option.name}"] if option.is_switch else [f"--{option.name}", "1"]
    return read_command_line(script.groups, words, refusals=refused_options(script.family)).problems


@pytest.mark.parametrize("script", FLOW_SCRIPTS, ids=lambda script: script.name)
def test_flow_models_refuse_every_option_of_noise_prediction(script):
    options = refused_names(script, {"family": SdOptions, "ddpm": DdpmConfig})
    assert len(options) == len(all_options({"family": SdOptions, "ddpm": DdpmConfig})) - 2, "all but the timesteps"
    for option in options:
        (told,) = told_about(script, option)
        assert told.startswith(f"--{option.name} does nothing for {script.family}: "), told
        assert "emove" in told or "se " in told, told


@pytest.mark.parametrize("script", SD_SCRIPTS, ids=lambda script: script.name)
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"sd"}))
def test_noise_prediction_refuses_every_option_of_flow_models(script, family):
    module = family_options(family)
    options = refused_names(script, {"family": module.OPTIONS, **module.OBJECTIVE_GROUPS})
    assert "timestep_sampling" in {option.name for option in options}
    for option in options:
        (told,) = told_about(script, option)
        assert told.startswith(f"--{option.name} does nothing for sd: "), told
        assert "emove" in told or "se " in told, told


OF_WHOLE_MODELS = (
    *("no_token_padding", "stop_text_encoder_training", "learning_rate_te", "diffusers_xformers", "use_safetensors"),
    *("train_text_encoder", "save_model_as", "xformers"),
)
"""Options of kohya's scripts for all weights of these models that its adapter script doesn't have."""


@pytest.mark.parametrize("name", OF_WHOLE_MODELS)
def test_options_of_kohyas_scripts_for_whole_models_are_honoured_or_refused(name):
    assert (name in all_options(Script("sd", "full").groups)) != (name in refused_options("sd"))


def test_snr_is_no_schedule_of_a_flow_model():
    for script in FLOW_SCRIPTS:
        line = read_command_line(script.groups, ["--loss_type", "huber", "--huber_schedule", "snr"])
        problems = checked_configuration(script, line)[1]
        assert any(problem.startswith("--huber_schedule snr does nothing for flow matching") for problem in problems)


def test_a_family_made_for_pictures_follows_the_files_too(tiny_sd, tmp_path):
    def made(path, **options):
        groups = {"family": SdOptions(), "ddpm": DdpmConfig(**options), "loss": LossConfig(), "memory": MemoryConfig()}
        return create(SimpleNamespace(model=ModelConfig(pretrained_model_name_or_path=str(path)), **groups))

    velocity = made(tiny_sd.folder(tmp_path / "v", prediction="v_prediction"))
    assert velocity.objective.ddpm.v_parameterization is True
    assert velocity.description.base_model_version == ("sd_v2_v" if tiny_sd.is_v2 else "sd_v1_v")
    silent = tiny_sd.single_file(tmp_path / "model.safetensors")
    assert made(silent).objective.ddpm.v_parameterization is False
    answered = made(silent, v_parameterization=True)
    assert answered.objective.ddpm.v_parameterization is True and answered.description.native_resolution.width == 768
