"""Optimizers on a GPU. Run with ``bash run_tests.sh -m gpu`` on a machine that has one."""

import pytest
import torch
from torch import nn

from library.memory.state_offload import SMALLEST, StateOffload
from library.memory.state_transfers import CudaStateTransfers
from library.optimizers.kahan import KahanSummation
from library.optimizers.one_by_one import OneByOne
from library.optimizers.rounding import Rounding
from library.training.optimizers import create_optimizer, load_optimizer_state

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

CACHED = {"cache_latents": True, "cache_text_encoder_outputs": True, "network_train_unet_only": True}
AWAY = {"offload_optimizer_device": "cpu"}
PAGED = ["PagedAdamW", "PagedAdamW32bit", "PagedAdamW8bit", "PagedLion8bit"]
DEVICE = torch.device("cuda")


def made(name, dtype=torch.float32, sides=(512, 512, 300)):
    generator = torch.Generator().manual_seed(1)
    weights = [nn.Parameter(torch.randn(side, 512, generator=generator).to(DEVICE, dtype)) for side in sides]
    groups = [{"params": weights, "lr": 1e-3}]
    return weights, create_optimizer(name, (), groups, learning_rate=1.0, device=DEVICE).optimizer


def step(one_by_one, weights, number):
    for place, weight in enumerate(weights):
        generator = torch.Generator().manual_seed(100 * number + place)
        one_by_one.step(weight, torch.randn(weight.shape, generator=generator).to(weight), number)
    one_by_one.finish()


@pytest.mark.parametrize("name", PAGED)
def test_paged_state_is_paged_again_when_it_is_loaded(name, tmp_path):
    weights, optimizer = made(name)
    one_by_one = OneByOne(optimizer)
    for number in range(2):
        step(one_by_one, weights, number)
    assert all(optimizer.state[weight]["state1"].is_paged for weight in weights)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again, fresh = made(name)
    for weight, other in zip(again, weights):
        weight.data.copy_(other.data)
    load_optimizer_state(fresh, torch.load(tmp_path / "state.pt", map_location="cpu", weights_only=True))
    assert all(fresh.state[weight]["state1"].is_paged for weight in again)
    resumed = OneByOne(fresh)
    for number in range(2, 4):
        step(one_by_one, weights, number)
        step(resumed, again, number)
    assert all(torch.equal(first, second) for first, second in zip(weights, again))


@pytest.mark.parametrize("name", ["AdamW8bit", *PAGED])
def test_bitsandbytes_trains_as_on_the_host(trainer, monkeypatch, name):
    assert trainer("gpu", **CACHED, optimizer_type=name) == 0
    with monkeypatch.context() as patch:
        patch.setenv("ACCELERATE_USE_CPU", "true")
        assert trainer("host", **CACHED, optimizer_type=name) == 0
    assert trainer.losses("gpu") == pytest.approx(trainer.losses("host"), rel=0.1)


@pytest.mark.parametrize("name", ["AdamW", "Adafactor", "CAME", "CAME8bit", "Lion", "AdamW8bit"])
def test_a_fused_backward_pass_changes_nothing(trainer, name):
    options = {**CACHED, "optimizer_type": name, "max_grad_norm": 0}
    assert trainer("whole", **options) == 0
    assert trainer("fused", **options, fused_backward_pass=True) == 0
    whole, fused = trainer.weights("whole"), trainer.weights("fused")
    assert all(torch.equal(whole[key], fused[key]) for key in whole)


def test_bf16_with_kahan_summation_is_fp32():
    (weights, optimizer), (wide, whole) = made("AdamW", torch.bfloat16), made("AdamW", torch.bfloat16)
    for weight in wide:
        weight.data = weight.data.float()
    kahan, plain = OneByOne(optimizer, KahanSummation()), OneByOne(whole)
    for number in range(5):
        for place, (weight, other) in enumerate(zip(weights, wide)):
            generator = torch.Generator().manual_seed(100 * number + place)
            gradient = torch.randn(weight.shape, generator=generator).to(weight)
            kahan.step(weight, gradient, number)
            plain.step(other, gradient.float(), number)
        kahan.finish()
        plain.finish()
    for weight, other in zip(weights, wide):
        assert torch.equal(KahanSummation().widened(weight, dict(optimizer.state[weight])), other)


@pytest.mark.parametrize("rounding", [None, Rounding(3), KahanSummation()], ids=["none", "stochastic", "kahan"])
@pytest.mark.parametrize("name", ["AdamW", "Lion", "CAME8bit", "AdamW8bit"])
def test_state_on_the_host_has_the_same_bits(name, rounding):
    dtype = torch.float32 if rounding is None else torch.bfloat16
    results = []
    for away in (False, True):
        weights, optimizer = made(name, dtype, sides=(512, 300, 512, 400, 640, 512, 300))
        home = StateOffload(optimizer, weights, DEVICE, CudaStateTransfers(DEVICE)) if away else None
        one_by_one = OneByOne(optimizer, rounding, home)
        for number in range(6):
            step(one_by_one, weights, number)
        results.append((weights, optimizer.state_dict()))
        if home is not None:
            large = [value for state in optimizer.state.values() for value in state.values() if is_large(value)]
            assert large and all(value.is_pinned() for value in large)
    assert all(torch.equal(own, theirs) for own, theirs in zip(results[0][0], results[1][0]))
    own, theirs = (flat(state) for _, state in results)
    assert own.keys() == theirs.keys() and all(torch.equal(own[path], theirs[path]) for path in own)


def is_large(value):
    return isinstance(value, torch.Tensor) and value.nbytes >= SMALLEST


def flat(state):
    if isinstance(state, torch.Tensor):
        return {(): state.cpu()}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {(key, *path): tensor for key, value in items for path, tensor in flat(value).items()}


def test_state_on_the_host_takes_four_slots_of_the_device():
    weights = [nn.Parameter(torch.randn(1024, 1024, device=DEVICE)) for _ in range(24)]
    one = 2 * 4 * 1024 * 1024
    optimizer = create_optimizer("AdamW", (), [{"params": weights, "lr": 1e-3}], learning_rate=1.0, device=DEVICE)
    home = StateOffload(optimizer.optimizer, weights, DEVICE, CudaStateTransfers(DEVICE))
    one_by_one = OneByOne(optimizer.optimizer, home=home)
    gradient = torch.randn(1024, 1024, device=DEVICE)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    for number in range(3):
        for weight in weights:
            one_by_one.step(weight, gradient, number)
        one_by_one.finish()
    assert home.device_bytes == 4 * one and home.host_bytes == 24 * one
    assert torch.cuda.max_memory_allocated() - before < 6.5 * one  # a fresh state beside them, at first


@pytest.mark.parametrize("fused", [{}, {"fused_backward_pass": True}], ids=["whole", "fused"])
def test_a_run_with_its_state_on_the_host_ends_and_resumes_with_the_same_bytes(trainer, monkeypatch, fused):
    from library.memory import state_offload
    from library.training import states

    for module in (state_offload, states):
        monkeypatch.setattr(module, "SMALLEST", 256)  # tiny models' state moves, too
    options = {**CACHED, **fused, "max_grad_norm": 0, "network_dim": 8, "max_train_steps": 4}
    assert trainer("plain", **options) == 0
    assert trainer("away", **options, **AWAY, save_every_n_steps=2, save_state=True) == 0
    state = trainer.folder / "away" / "run-step00000002-state"
    assert trainer("resumed", **options, **AWAY, resume=state) == 0
    plain = trainer.weights("plain")
    for name in ("away", "resumed"):
        weights = trainer.weights(name)
        assert all(torch.equal(plain[key], weights[key]) for key in plain), name
