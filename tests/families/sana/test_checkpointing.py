"""Gradient checkpointing on Sana: what autograd keeps for the backward pass falls, block by block."""

import pytest
import torch

from library.families.sana.linear_dit import LinearDiT
from library.families.sana.synthetic import TINY, synthetic_family, synthetic_text
from library.memory.checkpointing import enable_checkpointing
from library.nn.attention import sdpa
from library.records import NoisedLatents
from networks.lora import inject
from networks.settings import AdapterSettings

FAMILY = synthetic_family("tiny")
ROWS, SIDE = 2, 8


def denoiser(trained, interval):
    """With a trained adapter or all weights trained, and every ``interval``-th block checkpointed."""
    torch.manual_seed(0)
    dit = LinearDiT(TINY, attention=sdpa).requires_grad_(trained == "everything")
    network = None
    if trained == "adapter":
        network = inject({"denoiser": dit}, FAMILY.adapter_targets, AdapterSettings(rank=4, alpha=4.0))
    if interval:
        enable_checkpointing(list(FAMILY.blocks(dit)), interval)
    return dit, network


def predict(dit, dtype=None):
    generator = torch.Generator().manual_seed(1)
    noised = NoisedLatents(torch.randn(ROWS, 32, SIDE, SIDE, generator=generator), torch.tensor([0.3, 0.9]))
    text = synthetic_text("tiny", ROWS, device="cpu", dtype=torch.float32)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        return FAMILY.predict(dit, noised, text)


def saved_bytes(trained, interval, dtype=None):
    """What autograd keeps, each memory once; weights lie there anyway."""
    dit, network = denoiser(trained, interval)
    own = {parameter.untyped_storage().data_ptr() for parameter in dit.parameters()}
    own |= {parameter.untyped_storage().data_ptr() for parameter in network.parameters()} if network else set()
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = predict(dit, dtype)
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del output
    kept.clear()
    return total


@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["fp32", "bf16 autocast"])
@pytest.mark.parametrize("trained", ["adapter", "everything"])
def test_what_is_kept_falls_with_every_checkpointed_block(trained, dtype):
    whole = saved_bytes(trained, None, dtype)
    kept = {interval: saved_bytes(trained, interval, dtype) for interval in (1, 2, 3, TINY.depth + 1)}
    per_block = (whole - kept[1]) / TINY.depth
    assert kept[1] < whole / 3, "with all blocks checkpointed hardly anything but their inputs is kept"
    for interval, found in kept.items():
        blocks = len(range(0, TINY.depth, interval))
        assert whole - found == pytest.approx(per_block * blocks, rel=0.1), interval


def test_a_checkpointed_block_keeps_its_tokens_and_little_else():
    one_input = ROWS * SIDE * SIDE * TINY.width * 4
    outside = saved_bytes("everything", None) - TINY.depth * block_bytes()
    inside = saved_bytes("everything", 1) - outside
    assert inside < 1.5 * TINY.depth * one_input


def block_bytes():
    """What one block keeps when it isn't checkpointed."""
    return (saved_bytes("everything", 2) - saved_bytes("everything", 1)) / (TINY.depth // 2)


@pytest.mark.parametrize("interval", [1, 2, 3])
@pytest.mark.parametrize("trained", ["adapter", "everything"])
def test_gradients_are_bit_equal(trained, interval):
    gradients = []
    for chosen in (None, interval):
        dit, network = denoiser(trained, chosen)
        if network:
            with torch.no_grad():
                for parameter in network.parameters():
                    parameter.normal_(std=0.05, generator=torch.Generator().manual_seed(parameter.numel()))
        predict(dit).square().mean().backward()
        gradients.append([parameter.grad for parameter in (network or dit).parameters()])
    assert all(torch.equal(one, other) and one.any() for one, other in zip(*gradients))
