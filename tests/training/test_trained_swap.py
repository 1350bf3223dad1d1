"""A full fine-tune whose blocks take turns on the device ends with the bytes of one whose blocks all stay there."""

from dataclasses import replace
from importlib import import_module

import pytest
import torch

from library.config.memory import MemoryConfig
from library.families import FAMILIES
from library.optimizers.one_by_one import OneByOne
from library.optimizers.rounding import Rounding
from library.records import NoisedLatents
from library.training import placing
from library.training.comparing import compare_runs, contents, difference
from library.training.fused_backward import FusedBackward
from library.training.optimizers import create_optimizer
from library.training.precision import Precision
from tests.training.late_moves import move_late

FUSED = {"fused_backward_pass": True, "max_grad_norm": 0}
CACHED = {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
ROUNDED = {"mixed_precision": "bf16", "full_bf16": True, "stochastic_rounding": True}
STEPS, DEPTH = 2, 4


@pytest.fixture
def on_a_device(monkeypatch):
    """Weights and checkpoints move as if there were an accelerator; returns the transfers that were made."""
    return move_late(monkeypatch)


def trained(monkeypatch, family_name, memory, *, optimizer="AdamW", dtype=torch.float32, mixed=False):
    """Losses, answers between the steps, weights and state of a tiny denoiser that is trained whole."""
    synthetic, device = import_module(f"{FAMILIES[family_name]}.synthetic"), torch.device("cpu")
    if family_name == "sd3":  # its tiny size takes seconds to train
        monkeypatch.setitem(synthetic.SIZES, "tiny", replace(synthetic.TINY, width=64, num_heads=1))
    family = synthetic.synthetic_family("tiny")
    denoiser = synthetic.synthetic_denoiser("tiny", device=device, dtype=dtype).requires_grad_(True)
    assert len(family.blocks(denoiser)) == DEPTH
    precision = Precision("bf16" if mixed else "no", dtype, dtype)
    swap, notes = placing.place_trained(memory, family, denoiser, device, precision)
    keeps_casts = swap is not None and mixed and not memory.gradient_checkpointing
    assert any("bf16 copies" in note for note in notes) is keeps_casts
    placing.save_activations(memory, list(family.blocks(denoiser)), device)
    parameters, names = list(denoiser.parameters()), [name for name, _ in denoiser.named_parameters()]
    rate = 1e-4
    created = create_optimizer(optimizer, (), [{"params": parameters, "lr": rate}], learning_rate=rate, device=device)
    rounding = Rounding(7) if dtype == torch.bfloat16 else None
    fused = FusedBackward(
        OneByOne(created.optimizer, rounding), parameters, names, swap.changed if swap is not None else None
    )
    if swap is not None:
        swap.settle = fused.settle
    text = synthetic.synthetic_text("tiny", 2, device="cpu", dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    noise = torch.randn((2, family.latents.format.channels, 4, 4), generator=generator)
    noised = NoisedLatents(x_t=noise, sigma=torch.tensor([0.3, 0.8]))

    def answer():
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            return family.predict(denoiser, noised, text).float()

    out = {}
    for step in range(STEPS):
        loss = (answer() - noise).square().mean()
        fused.start(step, loss, ["a"])
        loss.backward()
        out |= {f"loss {step}": loss.detach(), f"norm {step}": fused.finish()}
        with torch.no_grad():
            out[f"answer {step}"] = answer()
    out |= {name: tensor.clone() for name, tensor in denoiser.state_dict().items()}
    for number, values in created.optimizer.state_dict()["state"].items():
        out |= {f"{name} of {number}": value for name, value in values.items()}
    return out


@pytest.mark.parametrize(
    "how",
    [
        pytest.param({}, id="AdamW"),
        pytest.param({"mixed": True}, id="mixed precision"),
        pytest.param({"optimizer": "CAME8bit", "dtype": torch.bfloat16}, id="CAME8bit rounded"),
    ],
)
@pytest.mark.parametrize("family", ["sd3", "sana"])
def test_a_denoiser_learns_the_same_bits(family, how, request, monkeypatch):
    plain = trained(monkeypatch, family, MemoryConfig(), **how)
    made = request.getfixturevalue("on_a_device")
    again = {"gradient_checkpointing": True}
    variants = [
        {"blocks_to_swap": 1},
        {"blocks_to_swap": 2, **again},
        {"blocks_to_swap": 3, **again, "gradient_checkpointing_interval": 2},
        {"blocks_to_swap": DEPTH, **again, "cpu_offload_checkpointing": True},
    ]
    for options in variants if how == {} else variants[:: DEPTH - 1]:
        moved = trained(monkeypatch, family, MemoryConfig(**options), **how)
        assert moved.keys() == plain.keys()
        assert [name for name in plain if difference(moved[name], plain[name])] == [], options
    assert all(transfers.sent for transfers in made)


@pytest.fixture(params=["sd3", "sana", "sd"])
def trainer(request, tiny_file, tiny_sana_file, tiny_sd_file, photos, tmp_path):
    """Trains the whole of a tiny model and looks at it in between."""
    from tests.conftest import Trainer

    checkpoint = {"sd3": tiny_file, "sana": tiny_sana_file, "sd": tiny_sd_file}[request.param]
    return Trainer(checkpoint, photos, tmp_path, request.param, job="full")


def test_a_run_with_everything_ends_with_the_same_bytes(trainer, tmp_path, request):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --l 1 --d 5\n")
    options = {**FUSED, **CACHED, **ROUNDED, "optimizer_type": "CAME8bit", "cache_dir": tmp_path / "cache"}
    options |= {"sample_prompts": prompts, "sample_every_n_steps": 2, "max_train_steps": 3, "save_state": True}
    options |= {"use_ema": True, "ema_save_raw": True, "ema_validation": "comparison", "save_every_n_steps": 2}
    options |= {"validation_split": 0.5, "validate_every_n_steps": 2, "save_state_on_train_end": True}
    if trainer.family != "sana":
        options |= {"train_text_encoder": True, "cache_text_encoder_outputs_to_disk": None}
    else:
        options["ema_device"] = "accelerator"
    assert trainer("plain", **options) == 0
    made = request.getfixturevalue("on_a_device")
    assert trainer("moved", **options, blocks_to_swap=2) == 0
    assert compare_runs(tmp_path / "plain", tmp_path / "moved").differences == []
    state = tmp_path / "moved" / "run-step00000002-state"
    assert trainer("resumed", **options, blocks_to_swap=3, gradient_checkpointing=True, resume=state) == 0
    assert len(made) == 2 and all(transfers.sent for transfers in made)
    for name in ("run.safetensors", "run_raw.safetensors", "run-state/optimizer.pt", "run-state/ema.safetensors"):
        one, other = contents(tmp_path / "plain" / name), contents(tmp_path / "resumed" / name)
        compared = [key for key in one if key != "metadata ss_gradient_checkpointing"]
        assert [key for key in compared if difference(one[key], other[key])] == [], name


def test_a_gradient_that_is_no_number_takes_both_back_to_the_same_state(full_trainer, tmp_path, request, monkeypatch):
    arrive, struck = FusedBackward._arrive, []

    def strike(self, number, parameter):
        if self._step == 2 and ".1.x_block.mlp" in self.names[number] and struck[-1:] != [id(self)]:
            struck.append(id(self))
            parameter.grad.mul_(torch.nan)
        arrive(self, number, parameter)

    monkeypatch.setattr(FusedBackward, "_arrive", strike)
    options = {**FUSED, **CACHED, "cache_dir": tmp_path / "cache", "on_nonfinite": "rollback", "save_state": True}
    options |= {"save_every_n_steps": 2, "max_train_steps": 4}
    assert full_trainer("plain", **options) == 0
    request.getfixturevalue("on_a_device")
    assert full_trainer("moved", **options, blocks_to_swap=3) == 0
    assert len(struck) == 2
    found = compare_runs(tmp_path / "plain", tmp_path / "moved").differences
    assert [difference for difference in found if not difference.place.endswith("settings.toml")] == []
