"""Optimizers do what their papers say, in steps of all weights together, one by one, and in a fused backward pass.

The references are written from the papers in fp64: AdamW (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2),
Adafactor (Shazeer and Stern 2018, arXiv:1804.04235, algorithms 4 and 5), CAME (Luo et al. 2023, arXiv:2307.02047,
algorithm 2), Lion (Chen et al. 2023, arXiv:2302.06675, algorithm 2), momentum (Sutskever et al. 2013).
"""

import pytest
import torch
from torch import nn

from library.optimizers.one_by_one import OneByOne
from library.training.fused_backward import FusedBackward
from library.training.optimizers import create_optimizer

CPU = torch.device("cpu")
RATE = 1e-2


def adamw(weight, gradient, kept, step, decay):
    kept["m"] = 0.9 * kept.get("m", 0) + 0.1 * gradient
    kept["v"] = 0.999 * kept.get("v", 0) + 0.001 * gradient**2
    m, v = kept["m"] / (1 - 0.9**step), kept["v"] / (1 - 0.999**step)
    return weight - RATE * (m / (v.sqrt() + 1e-8) + decay * weight)


def lion(weight, gradient, kept, step, decay):
    before = kept.get("m", torch.zeros_like(weight))
    kept["m"] = 0.99 * before + 0.01 * gradient
    return weight - RATE * ((0.9 * before + 0.1 * gradient).sign() + decay * weight)


def momentum(*, nesterov):
    def stepped(weight, gradient, kept, step, decay):
        gradient = gradient + decay * weight
        kept["m"] = 0.9 * kept["m"] + gradient if "m" in kept else gradient
        return weight - RATE * (gradient + 0.9 * kept["m"] if nesterov else kept["m"])

    return stepped


def factored(kept, name, squared, beta):
    """The running average of ``squared`` as the product of its rows' and columns' sums over the sum of all."""
    kept[name + "R"] = beta * kept.get(name + "R", 0) + (1 - beta) * squared.sum(1)
    kept[name + "C"] = beta * kept.get(name + "C", 0) + (1 - beta) * squared.sum(0)
    return torch.outer(kept[name + "R"], kept[name + "C"]) / kept[name + "R"].sum()


def second_moment(kept, squared, beta):
    if squared.ndim == 2:
        return factored(kept, "v", squared, beta)
    kept["v"] = beta * kept.get("v", 0) + (1 - beta) * squared
    return kept["v"]


def clipped(update):
    return update / max(1.0, update.square().mean().sqrt().item())


def adafactor(weight, gradient, kept, step, decay):
    update = clipped(gradient / second_moment(kept, gradient**2 + 1e-30, 1 - step**-0.8).sqrt())
    return weight - RATE * (update + decay * weight)


def came(weight, gradient, kept, step, decay):
    update = clipped(gradient / second_moment(kept, gradient**2 + 1e-30, 0.999).sqrt())
    kept["m"] = 0.9 * kept.get("m", 0) + 0.1 * update
    moved = kept["m"]
    if weight.ndim == 2:
        moved = moved / factored(kept, "u", (update - kept["m"]) ** 2 + 1e-16, 0.9999).sqrt()
    return weight - RATE * (moved + decay * weight)


REFERENCES = {
    "AdamW": adamw,
    "PagedAdamW": adamw,
    "PagedAdamW32bit": adamw,
    "AdamW8bit": adamw,
    "PagedAdamW8bit": adamw,
    "Adafactor": adafactor,
    "CAME": came,
    "CAME8bit": came,
    "Lion": lion,
    "Lion8bit": lion,
    "PagedLion8bit": lion,
    "SGDNesterov": momentum(nesterov=True),
    "SGDNesterov8bit": momentum(nesterov=False),  # bitsandbytes takes the word and ignores it
}


def numbers(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradient(shape, step, number):
    return numbers(*shape, seed=10 * step + number) * 10.0**-number + 0.1


def trained(name, shapes, decay, way, steps):
    """Weights after some steps, taken in one of three ways."""
    weights = [nn.Parameter(numbers(*shape, seed=number)) for number, shape in enumerate(shapes)]
    groups = [{"params": weights, "lr": RATE}]
    arguments = [f"weight_decay={decay}"]
    optimizer = create_optimizer(name, arguments, groups, learning_rate=RATE, device=CPU).optimizer
    one_by_one = OneByOne(optimizer) if way != "together" else None
    fused = FusedBackward(one_by_one, weights, shapes) if way == "fused" else None
    for step in range(1, steps + 1):
        gradients = [gradient(shape, step, number) for number, shape in enumerate(shapes)]
        if fused is not None:
            loss = sum((weight * own).sum() for weight, own in zip(weights, gradients))
            fused.start(step, loss, ())
            loss.backward()
            fused.finish()
            continue
        for weight, own in zip(weights, gradients):
            if one_by_one is not None:
                one_by_one.step(weight, own, step)
            weight.grad = own
        if one_by_one is not None:
            one_by_one.finish()
        else:
            optimizer.step()
    return [weight.detach() for weight in weights], optimizer


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", REFERENCES)
def test_it_is_its_reference(name, decay):
    # below 4096 and 16384 numbers 8-bit optimizers keep fp32
    shapes = [(24, 40), (40,), (9, 7)]
    expected = [numbers(*shape, seed=number).double() for number, shape in enumerate(shapes)]
    kept = [{} for _ in shapes]
    for step in range(1, 9):
        for number, shape in enumerate(shapes):
            own = gradient(shape, step, number).double()
            expected[number] = REFERENCES[name](expected[number], own, kept[number], step, decay)
    for way in ("together", "one by one", "fused"):
        found, _ = trained(name, shapes, decay, way, 8)
        for weight, reference in zip(found, expected):
            assert (weight - reference).abs().max() <= 2e-6 * max(1, reference.abs().max()), way


@pytest.mark.parametrize("name", [*REFERENCES, "StableAdamW"])
def test_a_fused_backward_pass_has_the_same_bits(name):
    shapes = [(128, 160), (160,), (70, 70)]  # of each, 8-bit state too
    together, _ = trained(name, shapes, 0.1, "together", 3)
    fused, _ = trained(name, shapes, 0.1, "fused", 3)
    assert all(torch.equal(whole, single) for whole, single in zip(together, fused))


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit", "Lion8bit", "PagedLion8bit", "SGDNesterov8bit"])
def test_8_bit_state_is_the_reference_rounded_to_its_codes(name, decay):
    """Each step is the reference's from what the codes mean, and stores the nearest codes, nearly always."""

    def meant(state, which):
        code, largest = state[f"qmap{which}"].double(), state[f"absmax{which}"].double()
        return (code[state[f"state{which}"].long()].view(-1, 256) * largest[:, None]).view(shape)

    shape = (64, 128)
    weight = nn.Parameter(numbers(*shape, seed=0))
    groups = [{"params": [weight], "lr": RATE}]
    optimizer = create_optimizer(name, [f"weight_decay={decay}"], groups, learning_rate=RATE, device=CPU).optimizer
    for step in range(1, 6):
        own = numbers(*shape, seed=step) + 0.3
        before = weight.detach().double()
        state = optimizer.state.get(weight)
        kept = {"m": meant(state, 1)} if state else {}
        if state and "state2" in state:
            kept["v"] = meant(state, 2)
        expected = REFERENCES[name](before, own.double(), kept, step, decay)
        weight.grad = own
        optimizer.step()
        assert (weight - expected).abs().max() <= 1e-6
        state = optimizer.state[weight]
        assert state["state1"].dtype == torch.uint8
        for which, exact in enumerate(kept.values(), 1):
            codes = state[f"qmap{which}"].double().sort().values
            largest = exact.view(-1, 256).abs().amax(1, keepdim=True)
            assert torch.allclose(state[f"absmax{which}"].double(), largest[:, 0], rtol=1e-5)
            relative = (exact.view(-1, 256) / largest).contiguous()
            above = torch.searchsorted(codes, relative).clamp(1, len(codes) - 1)
            gap = (codes[above] - codes[above - 1]) * largest
            off = (meant(state, which) - exact).view(-1, 256).abs()
            # its search for the nearest code misses now and then, but never by more than the widest gap
            assert (off <= 0.501 * gap).double().mean().item() > 0.95
            assert (off <= codes.diff().max() * largest).all().item()
