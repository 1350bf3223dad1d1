"""SimpleTuner's configurations come through whole: every key is translated, not needed, or named as left out."""

import json

import pytest

from library.config.command_line import read_command_line
from library.config.config_file import read_toml
from library.config.dataset import read_datasets
from library.config.run import make_run_config, training_groups
from library.families import family_options
from library.records import Resolution
from library.sampling.prompts import read_prompts
from tools.import_simpletuner import main, translate_config
from tools.simpletuner_data import translate_backends

PICTURES = {
    "id": "animals",
    "type": "local",
    "crop": True,
    "crop_aspect": "square",
    "crop_style": "center",
    "resolution": 1024,
    "minimum_image_size": 0,
    "maximum_image_size": 1024,
    "target_downsample_size": 1024,
    "resolution_type": "pixel_area",
    "cache_dir_vae": "cache/vae",
    "instance_data_dir": "animals",
    "disabled": False,
    "skip_file_discovery": "",
    "caption_strategy": "filename",
    "metadata_backend": "discovery",
}
TEXTS = {"id": "texts", "type": "local", "dataset_type": "text_embeds", "default": True, "cache_dir": "c"}
LORA = {
    "--model_type": "lora",
    "model_family": "sd3",
    "pretrained_model_name_or_path": "somebody/sd3.5-large",
    "output_dir": "models",
    "validation_resolution": "1024x1024,1280x768",
    "validation_guidance": 3.0,
    "validation_prompt": "a striped animal",
    "resume_from_checkpoint": "latest",
    "base_model_precision": "int8-quanto",
    "text_encoder_1_precision": "no_change",
    "optimizer": "adamw_bf16",
    "--validation_guidance_skip_layers": [7, 8, 9],
    "--flow_schedule_auto_shift": True,
    "--flow_use_uniform_schedule": "true",
    "lora_rank": "8",
    "max_train_steps": 100,
    "push_to_hub": False,
    "made_up": 1,
}


@pytest.fixture
def configuration(tmp_path, monkeypatch):
    """Writes both files and imports them; the folder that they lie in is the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "animals").mkdir()
    (tmp_path / "faces").mkdir()

    def write(config, backends):
        (tmp_path / "config").mkdir(exist_ok=True)
        (tmp_path / "config" / "config.json").write_text(json.dumps(config))
        (tmp_path / "config" / "multidatabackend.json").write_text(json.dumps(backends))
        return main(["config/config.json", "--output_dir", "out"])

    return write


def imported(job="adapter"):
    """The run configuration that the written files give, and what is wrong with it."""
    groups = training_groups(family_options("sd3"), job=job)
    line = read_command_line(groups, ["--config_file", "out/run.toml"])
    read = {name: line.groups[name] for name in ("data", "pictures", "captions")}
    datasets = read_datasets(*read.values(), resolution_step=16)
    config = make_run_config("sd3", "sd3_train_network.py", line.groups, line.provenance, datasets)
    return config, [*line.problems, *config.problems()]


def test_a_lora_configuration_comes_through_whole(configuration, capsys):
    assert configuration(LORA, [PICTURES, TEXTS]) == 0
    config, problems = imported()
    assert problems == []
    assert config.network.network_dim == 8 and config.network.network_alpha == 8
    assert config.optimizer.optimizer_type == "AdamW"
    assert config.training.full_bf16 and config.training.stochastic_rounding
    assert config.flow.density == "uniform" and config.flow.flow_schedule_auto_shift
    assert config.flow.weighting_scheme == "sigma_sqrt"
    assert config.sampling.validation_guidance_skip_layers == (7, 8, 9)
    (dataset,) = config.datasets
    assert (dataset.resolution, dataset.crop, dataset.maximum_image_size) == (Resolution(1024, 1024), True, 1024)
    assert (dataset.subsets[0].image_dir, dataset.subsets[0].captions_from) == ("animals", "filename")
    prompts = read_prompts("out/prompts.txt", native_resolution=Resolution(512, 512), resolution_step=16, seed=0)
    assert [(p.prompt, p.width, p.height, p.scale) for p in prompts] == [
        ("a striped animal", 1024, 1024, 3.0),
        ("a striped animal", 1280, 768, 3.0),
    ]
    said = capsys.readouterr().out
    assert config.memory.base_format == "int8" and config.training.resume == "auto"
    assert "  made_up 1" in said
    assert "push_to_hub" not in said and "text_encoder_1_precision" not in said


LYCORIS = {
    "algo": "lokr",
    "multiplier": 1.0,
    "linear_dim": 10000,
    "linear_alpha": 1,
    "factor": 16,
    "apply_preset": {
        "target_module": ["Attention", "FeedForward"],
        "module_algo_map": {"Attention": {"factor": 16}, "FeedForward": {"factor": 8}},
    },
}


def adapter_of(configuration, tmp_path, lycoris, **changes):
    (tmp_path / "config").mkdir(exist_ok=True)
    (tmp_path / "config" / "lycoris_config.json").write_text(json.dumps(lycoris))
    assert configuration({**LORA, "lora_type": "lycoris", **changes}, [PICTURES, TEXTS]) == 0
    config, problems = imported()
    assert problems == []
    return config.network


def test_lycoris_settings_come_from_its_file(configuration, tmp_path, capsys):
    network = adapter_of(configuration, tmp_path, LYCORIS)
    assert (network.method, network.network_dim, network.network_alpha) == ("lokr", 10000, 1.0)
    # SimpleTuner's rank of an ordinary LoRA doesn't act there.
    assert network.network_args == (
        "algo=lokr",
        "factor=16",
        "x_mod_dim=0",
        "context_mod_dim=0",
        "x_attn_factor=16",
        "context_attn_factor=16",
        "x_mlp_factor=8",
        "context_mlp_factor=8",
    )
    assert "network_args algo=lokr factor=16" in capsys.readouterr().out

    from library.families.sd3.adapter_targets import adapter_targets
    from networks.settings import read_settings

    settings = read_settings(network, adapter_targets(depth=2, dual_attention_blocks=(0,)))
    assert settings.factor == 16 and settings.type_factors["x_mlp_dim"] == 8 and settings.type_ranks["x_mod_dim"] == 0


def test_lycoris_settings_without_counterpart_are_named(configuration, tmp_path, capsys):
    odd = {**LYCORIS, "full_matrix": True, "multiplier": 2.0, "use_scalar": True, "dora_wd": False}
    odd["apply_preset"] = {"target_module": ["Attention", "Lamp"], "name_algo_map": {"a": {"factor": 2}}}
    network = adapter_of(configuration, tmp_path, odd, lycoris_config="lycoris_config.json")
    assert "full_matrix=true" in network.network_args and "x_mlp_dim=0" in network.network_args
    assert (network.network_dim, network.network_alpha) == (4, 1.0)  # the defaults, which don't act
    said = capsys.readouterr().out
    for part in ("multiplier 2.0", "use_scalar True", "target_module Lamp", "apply_preset.name_algo_map"):
        assert f"  lycoris_config {part}" in said
    assert "dora_wd" not in said


def test_a_lycoris_file_that_is_missing_is_an_error(configuration, capsys):
    assert configuration({**LORA, "lora_type": "lycoris"}, [PICTURES, TEXTS]) == 2
    assert "config/lycoris_config.json: no such file" in capsys.readouterr().err
    assert configuration({**LORA, "lycoris_config": "a.json"}, [PICTURES, TEXTS]) == 0
    assert "lycoris_config a.json: lora_type isn't lycoris" in capsys.readouterr().out


def test_every_key_is_written_or_named(configuration, capsys):
    config = {**LORA, "use_ema": True, "webhook_config": "hook.json", "seed": 7, "learning_rate": 1e-5}
    configuration(config, [PICTURES, TEXTS])
    said, run = capsys.readouterr().out, read_toml_text("out/run.toml")
    answered = {"model_type", "model_family", "push_to_hub", "text_encoder_1_precision"}
    prompts = {key for key in config if key.startswith("validation_") and "skip" not in key}
    renamed = {"optimizer": "optimizer_type", "lora_rank": "network_dim", "resume_from_checkpoint": "resume"}
    for key in config:
        key = key.lstrip("-")
        assert key in answered | prompts or renamed.get(key, key) in run or f"  {key} " in said, key


@pytest.mark.parametrize(
    ("options", "every"),
    [
        ({"validation_preview": "true", "validation_preview_steps": 4}, 4),
        ({"validation_preview": True}, 1),
        ({"validation_preview": False, "validation_preview_steps": 4}, None),
        ({"validation_preview_steps": 4}, None),
    ],
)
def test_previews_come_through_where_they_are_on(configuration, options, every):
    assert configuration({**LORA, **options}, [PICTURES, TEXTS]) == 0
    config, problems = imported()
    assert problems == []
    assert config.sampling.preview_every == every


def test_a_moving_average_comes_through(configuration, capsys):
    average = {"use_ema": True, "ema_decay": 0.999, "ema_update_interval": 5, "ema_device": "accelerator"}
    assert configuration({**LORA, **average, "ema_cpu_only": True}, [PICTURES, TEXTS]) == 0
    config, problems = imported()
    assert problems == []
    assert (config.ema.use_ema, config.ema.ema_decay, config.ema.ema_update_interval) == (True, 0.999, 5)
    assert (config.ema.ema_device, config.ema.ema_validation) == ("accelerator", "comparison")
    assert "  ema_cpu_only true: use --ema_device cpu" in capsys.readouterr().out


@pytest.mark.parametrize("use", [{}, {"use_ema": False}, {"use_ema": "false"}])
def test_settings_of_no_average_are_left_out(configuration, capsys, use):
    assert configuration({**LORA, **use, "ema_decay": 0.999, "ema_validation": "none"}, [PICTURES, TEXTS]) == 0
    config, problems = imported()
    assert problems == [] and not config.ema.use_ema
    said = capsys.readouterr().out
    assert "  ema_decay 0.999: nothing is averaged without use_ema" in said and "  ema_validation " in said


def test_an_average_beside_an_optimizers_own_is_left_out(configuration, capsys):
    own = {"optimizer": "AdamWScheduleFree", "use_ema": True, "ema_decay": 0.999}
    assert configuration({**LORA, **own}, [PICTURES, TEXTS]) == 0
    assert imported()[1] == []
    assert "  use_ema: AdamWScheduleFree averages the weights by itself" in capsys.readouterr().out


def read_toml_text(path):
    with open(path, encoding="utf-8") as file:
        return file.read()


def test_full_fine_tunes_have_no_teacher(configuration, capsys):
    config = {"model_type": "full", "model_family": "sana", "learning_rate": 1e-5, "optimizer": "optimi-adamw"}
    faces = {**PICTURES, "id": "faces", "instance_data_dir": "faces", "is_regularisation_data": True, "repeats": 9}
    uncropped = {**PICTURES, "crop": False, "caption_strategy": "instanceprompt", "instance_prompt": "an animal"}
    assert configuration(config, [faces, uncropped, TEXTS]) == 0
    said = capsys.readouterr().out
    assert "faces: is_regularisation_data left out" in said and "animals: maximum_image_size left out" in said
    assert "python sana_train.py --config_file out/run.toml" in said
    document = read_toml_file("out/dataset.toml")
    first, second = document["datasets"]
    assert first["subsets"][0]["num_repeats"] == 10 and "is_regularisation_data" not in first
    assert second["subsets"][0]["class_tokens"] == "an animal" and "crop" not in second
    run = read_toml_file("out/run.toml")
    assert (run["learning_rate"], run["timestep_sampling"], run["training_shift"]) == (1e-5, "sigmoid", 3.0)


def read_toml_file(path):
    from pathlib import Path

    return read_toml(Path(path))


def test_backends_of_every_kind():
    backends = [
        {"id": "bucket", "type": "aws", "aws_bucket_name": "mine", "aws_data_prefix": "pictures/", "resolution": 512},
        {
            "id": "listed",
            "instance_data_dir": "p",
            "caption_strategy": "parquet",
            "parquet": {"path": "p.parquet", "filename_column": "id", "caption_column": "text", "width_column": "w"},
            "resolution": 1.0,
            "resolution_type": "area",
        },
        {"id": "sheet", "instance_data_dir": "p", "caption_strategy": "csv", "csv_file": "p.csv", "resolution": 512},
        {"id": "masked", "instance_data_dir": "p", "conditioning_data": "masks", "resolution": 512},
        {"id": "masks", "dataset_type": "conditioning", "conditioning_type": "mask", "instance_data_dir": "m"},
        {"id": "check", "dataset_type": "eval", "instance_data_dir": "e", "resolution": 512},
        {"id": "film", "dataset_type": "video", "instance_data_dir": "v"},
        {"id": "hub", "type": "huggingface", "dataset_name": "x"},
        {
            "id": "tags",
            "instance_data_dir": "t",
            "resolution": 512,
            "caption_strategy": "textfile",
            "caption_shuffle": {"enable": True, "count": 3, "position_start": 1},
            "instance_prompt": "sks",
            "prepend_instance_prompt": True,
            "is_regularisation_data": True,
            "start_epoch": 3,
            "probability": 0.5,
        },
    ]
    datasets = translate_backends(backends, adapters=True)
    by_name = dict(zip(datasets.names, datasets.tables))
    subsets = {name: table["subsets"][0] for name, table in by_name.items()}
    assert list(by_name) == ["bucket", "listed", "sheet", "masked", "check", "tags"]
    assert subsets["bucket"]["image_dir"] == "s3://mine/pictures"
    assert by_name["listed"]["resolution"] == 1.0
    assert subsets["listed"]["metadata_file"] == "p.parquet" and subsets["listed"]["filename_column"] == "id"
    assert subsets["sheet"]["metadata_file"] == "p.csv"
    assert subsets["masked"]["conditioning_data_dir"] == "m"
    assert by_name["check"]["role"] == "validation"
    assert subsets["tags"]["keep_tokens"] == 1 and subsets["tags"]["caption_prefix"] == "sks"
    assert by_name["tags"]["is_regularisation_data"] and by_name["tags"]["start_epoch"] == 3
    left_out = "\n".join(datasets.left_out)
    assert all(name in left_out for name in ("film: dataset_type video", "hub: type huggingface", "parquet.width"))


@pytest.mark.parametrize(
    ("config", "backends", "error"),
    [
        ({"model_family": "flux"}, [PICTURES], "model_family flux: known here are sd3, sana"),
        (LORA, [TEXTS], "no backend with pictures"),
        (LORA, {"a": 1}, "expected a list of objects"),
        ([], [PICTURES], "expected an object"),
    ],
)
def test_what_cannot_be_imported_is_one_line(configuration, capsys, config, backends, error):
    assert configuration(config, backends) == 2
    captured = capsys.readouterr().err
    assert captured.startswith("error: ") and error in captured and captured.count("\n") == 1


def test_files_that_are_there_stay(configuration, capsys):
    assert configuration(LORA, [PICTURES]) == 0
    assert configuration(LORA, [PICTURES]) == 2
    assert "out/run.toml is there already" in capsys.readouterr().err
    assert main(["nowhere.json"]) == 2
    assert "nowhere.json: no such file" in capsys.readouterr().err


def test_unknown_optimizers_and_odd_values_are_named():
    translation = translate_config(
        {"model_family": "sd3", "model_type": "lora", "optimizer": "magic", "max_train_steps": "many", "seed": "5"}
    )
    assert [line.split()[0] for line in translation.left_out] == ["optimizer", "max_train_steps"]
    assert translation.values["seed"] == 5
