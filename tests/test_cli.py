"""The command line from outside: errors, exit codes, --help, --dry_run, and the golden list of option names."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from library import cli
from library.cli import configure_logging, main
from library.config.command_line import InvocationConfig, describe
from library.config.config_file import read_toml
from library.config.errors import ConfigError
from library.config.logging import LoggingConfig
from library.config.options import all_options, canonical_names
from library.config.run import training_groups
from library.families import family_options
from library.version import VERSION
from tools.make_option_pages import pages, stale_pages

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "golden"


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    from tools.miniature_sd3 import make_sd3

    return make_sd3(tmp_path_factory.mktemp("model"))


@pytest.fixture
def dataset(tmp_path):
    from PIL import Image

    folder = tmp_path / "cats"
    folder.mkdir()
    for index in range(3):
        Image.new("RGB", (64, 64), (index, 0, 0)).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"cat {index}")
    path = tmp_path / "dataset.toml"
    path.write_text(
        "[general]\nresolution = 64\nmin_bucket_reso = 32\nbucket_reso_steps = 16\nbatch_size = 2\n"
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{folder}'\nnum_repeats = 2\n"
    )
    return path


@pytest.fixture
def arguments(checkpoint, dataset, tmp_path):
    return [
        *("--pretrained_model_name_or_path", str(checkpoint), "--dataset_config", str(dataset)),
        *("--output_dir", str(tmp_path / "output"), "--network_train_unet_only"),
    ]


@pytest.fixture
def trained(monkeypatch):
    """The configurations that reach training; nothing is trained."""
    import types

    configs = []

    def run_training(config):
        configs.append(config)
        return 0

    setup = types.SimpleNamespace(run_training=run_training)
    monkeypatch.setitem(sys.modules, "library.training.setup", setup)
    rehearsal = types.SimpleNamespace(rehearsal=lambda config, *data: ["trained: denoiser"])
    monkeypatch.setitem(sys.modules, "library.training.rehearsal", rehearsal)
    monkeypatch.setattr(cli, "configure_logging", lambda config: None)
    return configs


def run(argv, capsys):
    code = main("sd3", job="adapter", argv=argv)
    printed = capsys.readouterr()
    return code, printed.out, printed.err.splitlines()


def run_script(*argv):
    command = [sys.executable, "-X", "importtime", "sd3_train_network.py", *argv]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_errors_are_lines_on_stderr(capsys):
    code, out, err = run(["--network_dimm", "4", "--clip_skip", "2", "--fp8_base", "--lora_rank=4"], capsys)
    assert code == 2
    assert out == ""
    assert err[:4] == [
        "error: unknown option --network_dimm; did you mean --network_dim?",
        "error: --clip_skip does nothing for sd3: SD3 always takes CLIP's penultimate layer. Remove it",
        "error: --fp8_base is not supported: its fp8 has no scales. Use --base_model_precision fp8, which has one for "
        "each output",
        "error: --lora_rank is called --network_dim here",
    ]
    assert any("--pretrained_model_name_or_path" in line for line in err)
    assert any("--dataset_config" in line for line in err)
    assert all(line.startswith("error: ") for line in err)


def test_every_kind_of_mistake_comes_at_once(arguments, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 100\n")
    config_file = tmp_path / "run.toml"
    config_file.write_text("seeed = 3")
    wrong = [
        *("--network_dim", "0", "--lr_warmup_steps", "10", "--vae_batch_size", "2"),
        *("--sample_prompts", str(prompts), "--sample_at_first", "--config_file", str(config_file)),
    ]
    code, _, err = run([*arguments, *wrong], capsys)
    assert code == 2
    for part in ("seeed", "--network_dim", "--lr_warmup_steps", "--vae_batch_size", "width 100 isn't a multiple of 16"):
        assert sum(part in line for line in err) == 1, part
    assert len(err) == 5


def test_no_contradiction_is_built_on_a_refused_value(arguments, capsys):
    code, _, err = run([*arguments, "--vae_batch_size", "many"], capsys)
    assert code == 2
    assert err == ["error: --vae_batch_size: expected a whole number of at least 1, got 'many'"]


def test_the_defaults_of_a_refused_group_are_not_blamed(arguments, capsys):
    code, _, err = run([*arguments, "--cache_text_encoder_outputs", "--network_args", "rank_dropout"], capsys)
    assert code == 2
    assert len(err) == 1
    assert "rank_dropout" in err[0]


@pytest.mark.parametrize("words", [["nowhere.toml"], []])
def test_without_the_configuration_file_nothing_else_is_missed(words, capsys):
    code, _, err = run(["--config_file", *words], capsys)
    assert code == 2
    assert len(err) == 1
    assert "--config_file" in err[0]


def test_a_wrong_checkpoint_is_found_from_its_header(arguments, tmp_path, capsys):
    (tmp_path / "wrong.safetensors").write_bytes(b"\x02\0\0\0\0\0\0\0{}")
    code, _, err = run([*arguments, "--pretrained_model_name_or_path", str(tmp_path / "wrong.safetensors")], capsys)
    assert code == 2
    assert any("wrong.safetensors" in line for line in err)


def test_what_is_right_reaches_training(arguments, trained, capsys):
    code, _, err = run([*arguments, "--network_dim", "8"], capsys)
    assert (code, err) == (0, [])
    (config,) = trained
    assert config.network.network_dim == 8
    assert config.family_name == "sd3"
    assert config.provenance["network_dim"] == "typed"
    assert config.datasets[0].batch_size == 2


def test_a_late_error_is_a_line_too(arguments, trained, monkeypatch, capsys):
    def run_training(config):
        raise ConfigError("first\nsecond")

    monkeypatch.setattr(sys.modules["library.training.setup"], "run_training", run_training)
    assert run(arguments, capsys) == (2, "", ["error: first", "error: second"])


def test_interrupt(arguments, trained, monkeypatch, capsys):
    def run_training(config):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["library.training.setup"], "run_training", run_training)
    assert run(arguments, capsys)[0] == 130


def test_errors_are_printed_once_per_machine(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run(["--nonsense"], capsys) == (2, "", [])


def test_version(capsys):
    assert run(["--version"], capsys) == (0, f"atelier {VERSION}\n", [])
    assert read_toml(ROOT / "pyproject.toml")["project"]["version"] == VERSION


def test_help_wins_over_mistakes(capsys):
    code, out, err = run(["--network_dimm", "4", "--help"], capsys)
    assert (code, err) == (0, [])
    assert out.startswith("usage: python sd3_train_network.py")
    assert "--network_dim N" in out


def test_help_is_light():
    result = run_script("--help")
    assert result.returncode == 0
    assert "Optimizer and learning rate:" in result.stdout
    for heavy in ("torch", "numpy", "PIL", "transformers", "accelerate"):
        assert f" {heavy}\n" not in result.stderr


def test_help_is_quick():
    """Measured in CPU seconds, so that other work on the machine doesn't count; the best of three."""
    resource = pytest.importorskip("resource")

    def cpu_seconds():
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        return used.ru_utime + used.ru_stime

    times = []
    for _ in range(3):
        before = cpu_seconds()
        subprocess.run([sys.executable, "sd3_train_network.py", "--help"], cwd=ROOT, capture_output=True, check=True)
        times.append(cpu_seconds() - before)
    assert min(times) < 0.3


def test_dry_run_shows_configuration_and_plan(arguments, tmp_path, capsys):
    code, out, err = run([*arguments, "--dry_run", "--max_train_epochs", "5", "--network_dim", "8"], capsys)
    assert (code, err) == (0, [])
    assert "network_dim = 8  # typed" in out
    assert "model: Stable Diffusion 3.5 medium" in out
    assert "datasets[0]: 3 pictures at 64x64, 6 visits per epoch in batches of 2" in out
    assert "   64x64         3       6        3" in out.splitlines()
    assert "steps: 15 optimizer steps, 3 per epoch, 5 epochs" in out
    assert not (tmp_path / "output").exists()


def test_dry_run_counts_processes(arguments, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    _, out, _ = run([*arguments, "--dry_run", "--gradient_accumulation_steps", "2"], capsys)
    assert "1600 optimizer steps, 1 per epoch, 1600 epochs; 2 processes, 2 micro-batches per step each" in out


def test_dry_run_finds_bad_pictures(arguments, tmp_path, capsys):
    (tmp_path / "cats" / "bad.png").write_bytes(b"no picture")
    (tmp_path / "cats" / "bad.txt").write_text("a bad cat")
    code, _, err = run([*arguments, "--dry_run"], capsys)
    assert code == 2
    assert any("bad.png" in line for line in err)


def test_dry_run_output_runs_again(arguments, trained, tmp_path, capsys):
    _, out, _ = run([*arguments, "--dry_run", "--network_dim", "8"], capsys)
    path = tmp_path / "again.toml"
    path.write_text(out.split("\n\nmodel: ")[0])
    assert run(["--config_file", str(path)], capsys)[0] == 0
    assert trained[0].network.network_dim == 8


def test_dry_run_checks_the_adapter_too(arguments, capsys):
    code, out, _ = run([*arguments, "--dry_run"], capsys)
    assert code == 0 and "trained: denoiser" in out.splitlines()
    code, _, err = run([*arguments, "--dry_run", "--network_args", "x_attn=0"], capsys)
    assert (code, err) == (2, ["error: --network_args: unknown name x_attn; did you mean x_attn_dim?"])


def test_messages_go_to_a_file(tmp_path):
    path = tmp_path / "logs" / "run.log"
    root = logging.getLogger()
    before = list(root.handlers), root.level
    try:
        configure_logging(
            LoggingConfig(console_log_file=str(path), console_log_level="WARNING", console_log_simple=True)
        )
        logging.getLogger("library").info("quiet")
        logging.getLogger("library").warning("loud")
        root.handlers[0].close()
    finally:
        root.handlers[:], root.level = before
    assert path.read_text() == "loud\n"


def test_messages_touch_no_random_generator(tmp_path):
    import random

    state = random.getstate()
    root = logging.getLogger()
    before = list(root.handlers), root.level
    try:
        configure_logging(LoggingConfig(console_log_file=str(tmp_path / "run.log")))
        logging.getLogger("library").info("hello")
        root.handlers[0].close()
    finally:
        root.handlers[:], root.level = before
    assert random.getstate() == state


@pytest.mark.parametrize("script", cli.SCRIPTS)
def test_option_names_are_the_golden_ones(script):
    groups = {"invocation": InvocationConfig, **cli.SCRIPTS[script].groups}
    names = "".join(f"{name}\n" for name in sorted(canonical_names(all_options(groups))))
    golden = GOLDEN / f"options_{script}.txt"
    if os.environ.get("UPDATE_GOLDEN"):
        golden.write_text(names)
    assert names == golden.read_text(), "a changed option name breaks people's scripts; UPDATE_GOLDEN=1 accepts it"


def test_every_option_says_what_happens_by_default():
    groups = training_groups(family_options("sd3"), job="adapter")
    for name, declared in all_options(groups).items():
        assert "default" in describe(declared).lower(), name
        assert declared.help.rstrip(")").endswith("."), name


def test_option_pages_are_up_to_date():
    assert pages()
    assert list(stale_pages(ROOT / "docs" / "options")) == [], "run python tools/make_option_pages.py"


def test_what_stops_one_process_alone_is_told_by_it(monkeypatch, capsys):
    def run(*arguments, **options):
        raise ConfigError("the disk is full")

    monkeypatch.setattr(cli, "_run", run)
    for rank, begins in (("0", "error: the disk"), ("3", "error in process 3: the disk")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        assert cli.main("sd3", job="adapter", argv=[]) == 2
        assert capsys.readouterr().err.startswith(begins)


def test_options_about_a_dataset_that_is_wrong_are_not_blamed_too(tmp_path, capsys):
    dataset = tmp_path / "dataset.toml"
    dataset.write_text("[[datasets]]\nresolutoin = 64\n")
    words = ["--dataset_config", str(dataset), "--cache_text_encoder_outputs", "--caption_variants", "4"]
    assert main("sd3", job="adapter", argv=[*words, "--validate_every_n_steps", "5", "--masked_loss"]) == 2
    errors = capsys.readouterr().err
    assert "resolutoin" in errors
    assert not any(name in errors for name in ("--caption_variants", "--validate_every_n_steps", "--masked_loss"))
