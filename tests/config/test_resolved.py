"""The resolved configuration starts the same run again."""

import dataclasses
import sys

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from library.config.command_line import read_command_line
from library.config.config_file import read_toml
from library.config.resolved import resolved_toml, toml_value
from library.config.run import make_run_config, training_groups
from library.families import family_options
from tests.config.test_run import dataset, run_config

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ARGV = (
    *("--pretrained_model_name_or_path", 'odd "name" \\ é.safetensors', "--resolution", "832,1216"),
    *("--network_dim", "16", "--network_alpha", "1", "--network_args", "rank_dropout=0.1", "x_attn_dim=4"),
    *("--learning_rate", "3e-5", "--text_encoder_lr", "1e-5", "2e-5", "--cache_latents_to_disk", "--no-enable_bucket"),
    *("--lr_scheduler", "cosine", "--lr_warmup_steps", "10%", "--sample_prompts", "p.txt", "--sample_at_first"),
    *("--log_with", "wandb", "--wandb_api_key", "hunter2", "--training_comment", "tab\there", "--seed", "7"),
)


def groups_of(config):
    names = training_groups(family_options("sd3"), job="adapter")
    return {name: getattr(config, name) for name in names}


def read_back(path):
    line = read_command_line(training_groups(family_options("sd3"), job="adapter"), ["--config_file", str(path)])
    assert not line.problems
    return make_run_config("sd3", "sd3_train_network.py", line.groups, line.provenance, (dataset(),))


@pytest.mark.parametrize("argv", [(), ARGV])
def test_round_trip(tmp_path, argv):
    config = run_config(*argv)
    path = tmp_path / "resolved.toml"
    path.write_text(resolved_toml(config), encoding="utf-8")
    again = groups_of(read_back(path))
    expected = groups_of(config)
    expected["logging"] = dataclasses.replace(expected["logging"], wandb_api_key=None)
    assert again == expected


def test_resolving_twice_changes_nothing(tmp_path):
    path = tmp_path / "resolved.toml"
    path.write_text(resolved_toml(run_config(*ARGV)), encoding="utf-8")
    assert read_toml(path) == tomllib.loads(resolved_toml(read_back(path)))


def test_says_where_values_come_from(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("max_train_steps = 10")
    lines = resolved_toml(run_config("--config_file", str(path), "--seed", "7", "--cache_latents_to_disk")).splitlines()
    assert "max_train_steps = 10  # from mine.toml" in lines
    assert "seed = 7  # typed" in lines
    assert "learning_rate = 0.0001  # derived: adapters start at 0.0001" in lines
    assert "cache_latents = true  # derived from other options" in lines
    assert "# network_dim = 4  # default" in lines
    assert "[training]" in lines


def test_a_typed_default_stays_typed():
    assert "network_dim = 4  # typed" in resolved_toml(run_config("--network_dim", "4")).splitlines()


def test_secrets_stay_out():
    assert "hunter2" not in resolved_toml(run_config(*ARGV))


def test_a_drawn_seed_is_written():
    assert tomllib.loads(resolved_toml(run_config(), seed=99))["training"]["seed"] == 99
    assert tomllib.loads(resolved_toml(run_config("--seed", "7"), seed=7))["training"]["seed"] == 7
    assert "seed" not in tomllib.loads(resolved_toml(run_config())).get("training", {})


def test_datasets_are_described():
    assert '#   subsets[0]: pictures in "cats", num_repeats 1' in resolved_toml(run_config()).splitlines()


@given(
    st.recursive(
        st.booleans()
        | st.integers(-(2**63), 2**63 - 1)
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(st.characters(exclude_categories=["Cs"])),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=5,
    )
)
@example('a\x7f\x00\x1f\u2028\\"é😀')
@example([[], 1e-5, -1e300])
@settings(max_examples=200, deadline=None)
def test_values_are_toml(value):
    assert tomllib.loads(f"x = {toml_value(value)}")["x"] == value
