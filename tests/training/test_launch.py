"""A launch that runs fewer processes than it was asked for is refused, and no other."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.config.errors import ConfigError
from library.training import launch
from library.training.launch import asked_processes, check_launch, check_started

OWN = ["sd3_train.py", "--output_dir", "out", "--num_processes", "9"]
BIN = "/env/bin/"


def asked(*words, own=OWN, script=("sd3_train.py",), **environment):
    command = [*words, *script, *own[1:]]
    found = asked_processes(command, own, {"HF_HOME": "/nowhere", **environment})
    return None if found is None else (found.processes, found.machines)


@pytest.mark.parametrize(
    "call",
    [
        [f"{BIN}python3", f"{BIN}accelerate", "launch"],
        [f"{BIN}python", f"{BIN}accelerate-launch"],
        ["python", "-m", "accelerate.commands.launch"],
        ["python", "-u", "-m", "accelerate.commands.accelerate_cli", "launch"],
        ["python", f"{BIN}lib/accelerate/commands/launch.py"],
        [r"python.exe", "accelerate.exe", "launch"],
    ],
)
def test_every_way_to_call_the_launcher_is_read(call):
    assert asked(*call, "--cpu", "--num_processes", "2") == (2, 1)
    assert asked(*call, "--num-processes=4", "--num_machines", "2", "--quiet") == (4, 2)
    assert asked(*call, "--cpu") is None
    assert asked(*call, "--cpu", "--num_processes", "2", "-m", script=("package.train",)) == (2, 1)


def test_what_is_no_such_launch_says_nothing():
    assert asked(f"{BIN}python", f"{BIN}torchrun", "--nproc_per_node", "2") is None
    assert asked("bash", "-c") is None
    assert asked(f"{BIN}python", f"{BIN}accelerate", "config") is None
    # it launched a shell, which started this script with other words
    launched = [f"{BIN}python", f"{BIN}accelerate", "launch", "--num_processes", "2", "--no_python", "run.sh"]
    assert asked_processes(launched, OWN, {}) is None
    assert asked(f"{BIN}python", f"{BIN}accelerate", "launch", "--num_processes", "two") is None
    assert asked(f"{BIN}python", f"{BIN}accelerate", "launch", "--tpu", "--num_processes", "8") is None
    assert asked_processes([], OWN, {}) is None


def test_the_configuration_file_counts_where_the_launcher_reads_it(tmp_path):
    folder = tmp_path / "accelerate"
    folder.mkdir()
    (folder / "default_config.yaml").write_text("num_processes: 8\nnum_machines: 2\n")
    (tmp_path / "own.yaml").write_text("num_processes: 3\n")
    call = [f"{BIN}python", f"{BIN}accelerate", "launch"]
    assert asked(*call, HF_HOME=str(tmp_path)) == (8, 2)
    assert asked(*call, "--num_processes", "4", HF_HOME=str(tmp_path)) == (4, 2)
    assert asked(*call, "--cpu", HF_HOME=str(tmp_path)) is None
    assert asked(*call, "--config_file", str(tmp_path / "own.yaml"), HF_HOME=str(tmp_path)) == (3, 1)
    (tmp_path / "own.yaml").write_text("[not yaml")
    assert asked(*call, "--config_file", str(tmp_path / "own.yaml")) is None


@pytest.mark.parametrize(
    ("words", "environment"),
    [
        (["--multi_gpu", "--num_processes", "16", "--num_machines", "2"], {"WORLD_SIZE": "16", "RANK": "3"}),
        (["--num_processes", "1"], {}),
        (["--num_processes", "2"], {"OMPI_COMM_WORLD_SIZE": "2"}),
        (["--num_processes", "2"], {"WORLD_SIZE": "4"}),
    ],
)
def test_a_launch_that_runs_enough_passes(monkeypatch, words, environment):
    monkeypatch.setattr(launch, "parent_command", lambda: ["python", "accelerate", "launch", *words, *OWN])
    check_launch(OWN, environment)


def test_a_number_that_the_machines_cannot_share_is_refused(monkeypatch):
    words = ["--multi_gpu", "--num_processes", "5", "--num_machines", "2"]
    monkeypatch.setattr(launch, "parent_command", lambda: ["python", "accelerate", "launch", *words, *OWN])
    with pytest.raises(ConfigError, match=r"asks for 5 processes, and 4 run: 2 machines .* give a multiple of 2"):
        check_launch(OWN, {"WORLD_SIZE": "4"})


def test_processes_that_would_train_apart_are_refused():
    check_started(2, {"WORLD_SIZE": "2", "RANK": "0"})
    check_started(1, {"WORLD_SIZE": "2"})  # left over from something else: no process has a place in it
    with pytest.raises(ConfigError, match=r"2 processes were started .* ACCELERATE_USE_CPU=true"):
        check_started(1, {"WORLD_SIZE": "2", "RANK": "1"})


def test_the_real_launcher_is_found_out_before_torch_is_loaded(full_trainer):
    trainer = full_trainer
    environment = {**os.environ, "HF_HOME": str(trainer.folder), "OMP_NUM_THREADS": "1"}
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    command = [*launcher, "--quiet", trainer.script, *trainer.arguments("out", dry_run=True)]
    done = subprocess.run(
        command,
        cwd=Path(__file__).parents[2],
        env={**environment, "PYTHONPROFILEIMPORTTIME": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    lines = done.stderr.splitlines()
    (error,) = [line for line in lines if line.startswith("error")]
    assert error == (
        "error: accelerate launch --num_processes 2 asks for 2 processes, and 1 runs: accelerate launch starts one on "
        "a CPU; use ACCELERATE_USE_CPU=true torchrun --nproc_per_node 2 sd3_train.py ..."
    )
    assert done.returncode != 0 and not (trainer.folder / "out").exists()
    child = lines[max(index for index, line in enumerate(lines) if "| site" in line) :]
    assert any("psutil" in line for line in child)
    assert not any(line.endswith("| torch") or line.endswith(" torch") for line in child)


def test_a_script_leaves_its_group_of_processes_and_a_call_does_not(monkeypatch):
    from library import cli

    group, left = torch.distributed, []
    monkeypatch.setattr(cli, "_run", lambda script, arguments: 0)
    monkeypatch.setattr(group, "is_initialized", lambda: True)
    monkeypatch.setattr(group, "destroy_process_group", lambda: left.append(True))
    assert cli.main("sd3", job="adapter", argv=[]) == 0 and left == []
    assert cli.main("sd3", job="adapter") == 0 and left == [True]
    monkeypatch.setattr(group, "is_initialized", lambda: False)
    assert cli.main("sd3", job="adapter") == 0 and left == [True]
