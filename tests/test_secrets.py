"""Keys, tokens and logins never reach anything that is written or printed."""

import json
import os
import subprocess
import sys

import pytest

from library.cli import SCRIPTS
from library.config.command_line import without_typed_secrets
from library.config.generate import GenerateConfig
from library.config.logging import SECRET_VARIABLES
from library.config.options import all_options
from tests.conftest import ROOT

KEY = "0123456789abcdef0123456789abcdef0badc0de"
PASSWORD = "pa55wordpa55word"
LOGIN = f"someone:{PASSWORD}"
IN_ENVIRONMENT = {"HF_TOKEN": "hf_tokentokentoken", "AWS_SECRET_ACCESS_KEY": "awssecretawssecret"}


def holders(folder, *tokens):
    """The files that hold one of the tokens, in their bytes or names."""
    found = []
    for path in folder.rglob("*"):
        if path.is_file():
            content = path.read_bytes() + str(path).encode()
            found += [path for token in tokens if token.encode() in content]
    return found


def test_every_option_that_sounds_like_a_secret_is_one():
    groups = [*(script.groups for script in SCRIPTS.values()), {"generate": GenerateConfig}]
    options = {name: own for some in groups for name, own in all_options(some).items()}
    secret = {name for name, own in options.items() if own.secret}
    words = ("api_key", "password", "secret", "webhook", "credential")
    assert secret == {name for name in options if any(word in name for word in words)} == {"wandb_api_key"}
    assert set(SECRET_VARIABLES) <= secret


def test_a_run_writes_no_secret_anywhere(trainer):
    pytest.importorskip("wandb")
    pytest.importorskip("tensorboard")
    folder = trainer.folder
    home = folder / "home"
    home.mkdir()
    options = {
        "wandb_api_key": KEY,
        "log_with": "all",
        "log_config": True,
        "logging_dir": folder / "logs",
        "cache_latents_to_disk": True,
        "network_train_unet_only": True,
        "save_state": True,
        "max_train_steps": 1,
    }
    environment = {**os.environ, **IN_ENVIRONMENT, "WANDB_MODE": "offline", "HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, trainer.script, *trainer.arguments("output", **options)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    tokens = KEY, *IN_ENVIRONMENT.values()
    assert not any(token in done.stdout + done.stderr for token in tokens)
    assert list(folder.rglob("*.wandb")) and list(folder.rglob("*tfevents*")) and list(folder.rglob("state.json"))
    assert not holders(folder, *tokens)
    (resolved,) = (folder / "output").glob("*.toml")
    assert "# wandb_api_key was given and is never written; type it again, or set WANDB_API_KEY" in resolved.read_text()


@pytest.mark.parametrize(
    "options",
    [
        {"wandb_api_key": KEY},  # does nothing without wandb
        {"wandb_api_key": [KEY, KEY], "log_with": "wandb"},
        {"wandb_api_keys": KEY},
        {"cache_dir": f"s3://{LOGIN}@bucket/cache", "cache_latents_to_disk": True},
        {"cache_dir": f"https://host/cache?X-Amz-Signature={KEY}", "cache_latents_to_disk": True},
        {"training_comment": f"from https://{LOGIN}@host/x"},
        {"train_data_dir": f"ftp://{LOGIN}@host/pictures", "dataset_config": None},
    ],
)
@pytest.mark.parametrize("dry_run", [True, None])
def test_errors_about_a_secret_do_not_show_it(trainer, capfd, options, dry_run):
    assert trainer("output", **options, dry_run=dry_run) == 2
    printed = "".join(capfd.readouterr())
    assert printed.startswith("error: ")
    assert KEY not in printed and PASSWORD not in printed
    assert not (trainer.folder / "output").exists()


@pytest.mark.parametrize("key", ["image_dir", "metadata_file", "conditioning_data_dir"])
def test_an_address_with_a_login_in_a_dataset_is_refused(trainer, capfd, key):
    folder = "" if key == "image_dir" else f"image_dir = {json.dumps(str(trainer.photos))}\n"
    dataset = trainer.folder / "dataset.toml"
    sizes = "resolution = 64\nmin_bucket_reso = 32\nbucket_reso_steps = 32"
    address = f'{key} = "https://{LOGIN}@host/x.json"'
    dataset.write_text(f"[[datasets]]\n{sizes}\n[[datasets.subsets]]\n{folder}{address}\n")
    assert trainer("output", dataset_config=dataset) == 2
    printed = "".join(capfd.readouterr())
    assert f"datasets[0].subsets[0].{key}: the address has a login" in printed and PASSWORD not in printed


def test_a_storage_that_does_not_answer_is_named_without_its_login(trainer, capfd, monkeypatch):
    pytest.importorskip("obstore")
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{LOGIN}@127.0.0.1:9")
    for name, value in {"AWS_ALLOW_HTTP": "true", "AWS_ACCESS_KEY_ID": KEY, **IN_ENVIRONMENT}.items():
        monkeypatch.setenv(name, value)
    dataset = trainer.folder / "dataset.toml"
    dataset.write_text("[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = 's3://far-away/x'\n")
    assert trainer("output", dataset_config=dataset, min_bucket_reso=32, bucket_reso_steps=32) == 2
    printed = "".join(capfd.readouterr())
    assert "far-away" in printed
    assert not any(token in printed for token in (PASSWORD, KEY, *IN_ENVIRONMENT.values()))
    assert not holders(trainer.folder, PASSWORD, KEY)


def test_typed_secrets_are_hidden_from_other_programs():
    words = [
        "--network_dim",
        "4",
        "--wandb_api_key",
        KEY,
        KEY,
        "--seed",
        "1",
        f"--wandb_api_key={KEY}",
        "--cache_latents",
    ]
    shown = without_typed_secrets(SCRIPTS["sd3_train_network"].groups, words)
    assert shown == [
        *(
            "--network_dim",
            "4",
            "--wandb_api_key",
            "***",
            "***",
            "--seed",
            "1",
            "--wandb_api_key=***",
            "--cache_latents",
        ),
    ]


def test_log_messages_hold_no_login(trainer, tmp_path):
    import logging

    from library.cli import configure_logging
    from library.config.logging import LoggingConfig

    before = logging.getLogger().handlers[:]
    try:
        configure_logging(LoggingConfig(console_log_file=str(tmp_path / "log.txt")))
        logging.getLogger("library").info("GET %s failed\x1b[31m", f"https://{LOGIN}@host/x?sig={KEY}")
        for handler in logging.getLogger().handlers:
            handler.close()
    finally:
        logging.getLogger().handlers[:] = before
    text = (tmp_path / "log.txt").read_text()
    assert "GET https://***@host/x?*** failed\\x1b[31m" in text


def test_a_broken_file_of_credentials_is_not_quoted(tmp_path, monkeypatch):
    from library.io.remote import s3_settings

    file = tmp_path / "credentials"
    file.write_text(f"[default]\n{KEY}\n")
    environment = {"AWS_SHARED_CREDENTIALS_FILE": str(file), "AWS_CONFIG_FILE": os.devnull}
    with pytest.raises(OSError, match="not of the form") as caught:
        s3_settings(environment)
    assert KEY not in str(caught.value)
