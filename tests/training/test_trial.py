"""A step without numbers takes what the step with numbers takes."""

import pytest
import torch
from accelerate.state import AcceleratorState, PartialState

from bench.synthetic_run import Setting, foresee, make_run
from library.config.memory import MemoryConfig
from library.config.training import TrainingConfig
from library.memory.allocations import BLOCK, Allocations
from library.memory.plain_transfers import Traffic
from library.training.loop import optimize
from library.training.trial import BASE, GRADIENTS, KEPT, STATE, TRAINED
from networks.lora import inject
from networks.settings import AdapterSettings

RECOMPUTE = {"gradient_checkpointing": True}
ADAPTER = {
    "plain": {},
    "recomputed": RECOMPUTE,
    "every second": {**RECOMPUTE, "gradient_checkpointing_interval": 2},
    "attention kept": {**RECOMPUTE, "gradient_checkpointing_keep_attention": True},
    "swapped": {"blocks_to_swap": 4},
    "swapped, recomputed, offloaded": {"blocks_to_swap": 2, **RECOMPUTE, "cpu_offload_checkpointing": True},
    "int8": {"base_model_precision": "int8"},
    "nf4, swapped": {"base_model_precision": "nf4", "blocks_to_swap": 3},
}
FULL = {
    "all weights": {},
    "all weights, recomputed": RECOMPUTE,
    "all weights, fused": {"fused_backward_pass": True},
    "all weights, swapped": {"fused_backward_pass": True, "blocks_to_swap": 3, **RECOMPUTE},
    "all weights, state on the host": {"fused_backward_pass": True, "offload_optimizer_device": "cpu"},
}


def setting(family, *, full=False, precision="bf16", optimizer="AdamW", training=None, **memory):
    training = TrainingConfig(mixed_precision=precision, **(training or {}))
    rank = None if full else 4
    memory = MemoryConfig(**memory)
    return Setting(family, "tiny", 128, 2, rank, precision, memory, training, optimizer)


def counted(setting):
    """Peak, operations and copies of the second step on the host with numbers, and what was foreseen."""
    for state in (AcceleratorState, PartialState):
        state._reset_state(**({"reset_partial_state": True} if state is AcceleratorState else {}))
    allocations, traffic = Allocations("cpu"), Traffic()
    made = make_run(setting, allocations, traffic)
    with allocations:
        optimize(made.run, 0)
        allocations.start("the step")
        traffic.up = traffic.down = 0
        optimize(made.run, 1)
    return allocations, traffic, made.forecast


FEW = ("all weights", "all weights, swapped")


def check(setting):
    allocations, traffic, foreseen = counted(setting)
    assert foreseen.peak == pytest.approx(allocations.peak, rel=0.01)
    assert foreseen.operations == allocations.operations
    assert (foreseen.up, foreseen.down) == (traffic.up, traffic.down)
    assert sum(foreseen.components.values()) == foreseen.peak
    return foreseen


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *[("sana", name) for name in ADAPTER],
        *[("sd3", name) for name in ("attention kept", "plain", "swapped, recomputed, offloaded", "int8")],
        *[("sd", name) for name in ("plain", "swapped, recomputed, offloaded", "int8")],
    ],
)
def test_an_adapters_step_is_foreseen(family, name):
    foreseen = check(setting(family, **ADAPTER[name]))
    assert bool(foreseen.up) == ("blocks_to_swap" in ADAPTER[name])


@pytest.mark.parametrize(
    ("family", "name"),
    [*[("sana", name) for name in FULL], *[(name, case) for name in ("sd3", "sd") for case in FEW]],
)
def test_a_whole_models_step_is_foreseen(family, name):
    check(setting(family, full=True, **FULL[name]))


@pytest.mark.parametrize(
    "case",
    [
        {"precision": "no"},
        {"full": True, "optimizer": "Adafactor"},
        {
            "full": True,
            "optimizer": "CAME",
            "training": {"full_bf16": True, "stochastic_rounding": True},
            "fused_backward_pass": True,
        },
        {"training": {"gradient_accumulation_steps": 2}},
    ],
    ids=["fp32", "Adafactor", "rounded CAME", "accumulated"],
)
def test_other_settings_are_foreseen(case):
    check(setting("sana", **case))


def test_eight_bit_optimizers_are_foreseen():
    pytest.importorskip("bitsandbytes")
    check(setting("sana", full=True, optimizer="AdamW8bit"))


@pytest.mark.parametrize("family", ["sd3", "sana", "sd"])
@pytest.mark.parametrize("full", [False, True], ids=["adapter", "full"])
def test_components_are_those_of_plain_arithmetic(family, full):
    from importlib import import_module

    synthetic = import_module(f"library.families.{family}.synthetic")
    denoiser = synthetic.meta_denoiser(synthetic.SIZES["tiny"])
    parameters = sum(parameter.numel() for parameter in denoiser.parameters())
    buffers = sum(buffer.numel() for buffer in denoiser.buffers())
    foreseen = foresee(setting(family, full=full), cuda=True)
    parts, trained = foreseen.components, foreseen.trained
    near = {"rel": 0.02}  # small tensors fill whole blocks of the allocator
    if full:
        assert trained == parameters
        assert parts.get(BASE, 0) == pytest.approx(4 * buffers, **near)
    else:
        assert parts[BASE] == pytest.approx(2 * (parameters + buffers), **near)
    assert parts[TRAINED] == pytest.approx(4 * trained, **near)
    made = denoiser
    if not full:
        targets = synthetic.synthetic_family("tiny").adapter_targets
        made = inject({"denoiser": denoiser}, targets, AdapterSettings(rank=4, alpha=1.0))
    blocks = BLOCK * len(list(made.parameters()))  # each weight's count of steps
    assert parts[STATE] == pytest.approx(8 * trained + blocks, **near)  # two moments, and the counts
    assert 0 <= parts.get(GRADIENTS, 0) <= 1.1 * 4 * trained
    assert foreseen.resident == pytest.approx(parts.get(BASE, 0) + parts[TRAINED] + parts[STATE], rel=0.05)


def test_a_trial_leaves_the_generator_alone():
    chosen = setting("sana")
    config = chosen.config
    from library.families.sana import synthetic
    from library.training.precision import resolve_precision
    from library.training.trial import try_step

    family = synthetic.synthetic_family("tiny")
    denoiser = synthetic.meta_denoiser(synthetic.SIZES["tiny"]).to(torch.bfloat16)
    precision, before = resolve_precision(config, accelerator_available=True), torch.get_rng_state()
    try_step(config, family, denoiser, family.text_shapes(2), chosen.shape, precision, cuda=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_is_kept_is_much_less_when_it_is_computed_again():
    plain, recomputed = (foresee(setting("sd3", **memory), cuda=True) for memory in ({}, RECOMPUTE))
    assert recomputed.components[KEPT] < plain.components[KEPT] / 4
    assert recomputed.operations > 1.3 * plain.operations


def published(size, family, *, full=False, **memory):
    chosen = Setting(family, size, 1024, 1, None if full else 16, "bf16", MemoryConfig(**memory))
    return foresee(chosen, cuda=True).operations / 1e12


@pytest.mark.parametrize(
    ("memory", "teraflops"), [pytest.param({}, 26.8, id="plain"), pytest.param(RECOMPUTE, 38.1, id="recomputed")]
)
def test_operations_are_those_counted_for_sd3(memory, teraflops):
    """Medium at 1024 px with 333 text tokens; attention's backward pass counts twice its forward pass."""
    assert published("sd3.5-medium", "sd3", **memory) == pytest.approx(teraflops, rel=0.02)


@pytest.mark.parametrize(
    ("full", "memory", "teraflops"),
    [pytest.param(False, {}, 5.9, id="adapter"), pytest.param(True, {}, 8.9, id="all weights")],
)
def test_operations_are_those_counted_for_sana(full, memory, teraflops):
    """At 1024 px: 1.6B, two and three times its forward pass of 2.97."""
    assert published("sana-1.6b", "sana", full=full, **memory) == pytest.approx(teraflops, rel=0.02)


def test_a_large_model_is_foreseen_without_its_memory():
    """Weights of 15 GiB, and the process grows by less than one; the operations are those counted at 1024 px."""
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    foreseen = foresee(Setting("sd3", "sd3.5-large", 1024, 1, 16, "bf16"), cuda=True)
    assert foreseen.peak > 16 << 30
    assert foreseen.operations / 1e12 == pytest.approx(69.6, rel=0.02)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 1 << 20
