"""An update that the device drops leaves the optimizer as it was."""

import pytest
import torch
from torch import nn

from library.training.guarded_update import GuardedUpdate, takes_guard


def problem():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(3, size, generator=generator)) for size in (2, 5, 7)]


def give_gradients(parameters, number, value=None):
    generator = torch.Generator().manual_seed(number)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        if value is not None:
            parameter.grad.fill_(value)


def leaves(optimizer, parameters):
    state = {
        (number, name): value
        for number, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }
    return state | {(number, ""): parameter.detach() for number, parameter in enumerate(parameters)}


@pytest.mark.parametrize("dropped", [(), (0,), (2,), (0, 1, 3)], ids=str)
@pytest.mark.parametrize(
    ("optimizer_class", "settings"),
    [
        (torch.optim.AdamW, {}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.Adam, {"weight_decay": 0.1}),
        (torch.optim.SGD, {"momentum": 0.9, "weight_decay": 0.1}),
        (torch.optim.SGD, {}),
        (torch.optim.Adagrad, {}),
    ],
    ids=["AdamW", "amsgrad", "Adam", "momentum", "SGD", "Adagrad"],
)
def test_a_dropped_update_never_was(optimizer_class, settings, dropped):
    expected, guarded = problem(), problem()
    plain, watched = (optimizer_class(some, lr=0.1, fused=True, **settings) for some in (expected, guarded))
    assert takes_guard(watched)
    guard = GuardedUpdate(watched, watched)
    for number in range(5):
        give_gradients(guarded, number, torch.nan if number in dropped else None)
        guard.step(torch.tensor(float(number in dropped)))
        if number in dropped:
            guard.forget()
        else:
            give_gradients(expected, number)
            plain.step()
        one, other = leaves(plain, expected), leaves(watched, guarded)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not hasattr(watched, "found_inf")


def test_a_weight_that_comes_later_keeps_what_others_have():
    parameters = problem()
    guard = GuardedUpdate(optimizer := torch.optim.AdamW(parameters, fused=True), optimizer)
    give_gradients(parameters[:2], 0)
    guard.step(torch.tensor(0.0))
    give_gradients(parameters, 1)
    guard.step(torch.tensor(1.0))
    guard.forget()
    assert [parameter in optimizer.state for parameter in parameters] == [True, True, False]
    assert all(optimizer.state[parameter]["step"] == 1 for parameter in parameters[:2])


class Own(torch.optim.AdamW):
    """Somebody's own."""


def test_who_looks_at_what_the_device_found():
    parameters = problem()
    groups = [{"params": parameters[:1], "fused": False}, {"params": parameters[1:]}]
    assert takes_guard(torch.optim.AdamW(parameters, fused=True))
    assert not takes_guard(torch.optim.AdamW(parameters))
    assert not takes_guard(torch.optim.AdamW(groups, fused=True))
    assert not takes_guard(torch.optim.Adafactor(parameters))
    assert not takes_guard(Own(parameters, fused=True))
