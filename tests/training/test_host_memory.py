import pytest
import torch

from library.config.errors import ConfigError
from library.training.host_memory import check_host_memory
from library.training.precision import resolve_precision
from tests.conftest import Trainer
from tests.training.test_forecast import configured

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True}
FUSED = {"fused_backward_pass": True, "max_grad_norm": 0}
GPU, MIB = torch.device("cuda"), 2**20


@pytest.mark.parametrize(
    ("network", "options", "told"),
    [
        (True, {"blocks_to_swap": 3}, "--blocks_to_swap would keep"),
        (
            True,
            {"blocks_to_swap": 1, "gradient_checkpointing": True, "cpu_offload_checkpointing": True},
            "--blocks_to_swap and --cpu_offload_checkpointing would keep",
        ),
        (False, {**FUSED, "offload_optimizer_device": "cpu"}, "--offload_optimizer_device cpu would keep"),
    ],
)
def test_what_does_not_fit_into_host_memory_is_refused(tiny_sana_file, photos, tmp_path, network, options, told):
    trainer = Trainer(tiny_sana_file, photos, tmp_path, "sana", job="adapter" if network else "full")
    if network:
        options = {**options, "network_train_unet_only": True}
    config, family = configured(trainer, **CACHED, **options)
    precision = resolve_precision(config, accelerator_available=True)
    with pytest.raises(ConfigError, match=f"{told} .* in host memory, and 0.00098 MiB are free; swap fewer blocks"):
        check_host_memory(config, family, precision, GPU, available=1024)
    check_host_memory(config, family, precision, GPU, available=64 * MIB)
    check_host_memory(config, family, precision, torch.device("cpu"), available=0)


def test_each_process_of_a_machine_keeps_its_own(tiny_sana_file, photos, tmp_path, monkeypatch):
    trainer = Trainer(tiny_sana_file, photos, tmp_path, "sana")
    config, family = configured(trainer, **CACHED, blocks_to_swap=3, network_train_unet_only=True)
    precision = resolve_precision(config, accelerator_available=True)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4096")
    with pytest.raises(ConfigError, match="in each of 4096 processes, and 64 MiB are free"):
        check_host_memory(config, family, precision, GPU, available=64 * MIB)


def test_without_such_options_nothing_is_foreseen(tiny_sana_file, photos, tmp_path):
    config, family = configured(
        Trainer(tiny_sana_file, photos, tmp_path, "sana"), **CACHED, network_train_unet_only=True
    )
    check_host_memory(config, family, resolve_precision(config, accelerator_available=True), GPU, available=0)
