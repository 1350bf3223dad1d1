"""State that waits on the host changes nothing of the steps, whoever reads it has to wait, and it comes ahead."""

import pytest
import torch
from torch import nn

from library.config.optimizer import OPTIMIZER_NAMES, OptimizerConfig
from library.memory.state_offload import SMALLEST, StateOffload
from library.optimizers.kahan import KahanSummation
from library.optimizers.one_by_one import OneByOne
from library.optimizers.rounding import Rounding
from library.training.optimizers import create_optimizer, load_optimizer_state
from tests.memory.late_state import NOTHING, LateStateTransfers

CPU = torch.device("cpu")
SHAPES = ((128, 128), (128,), (132, 128, 1, 1), (256, 256), (128, 130), (16, 1, 3, 3))
NAMES = [
    name
    for name in OPTIMIZER_NAMES
    if not OptimizerConfig(optimizer_type=name).over_all_parameters and not name.startswith("Paged")
]


class Problem:
    """A few weights and their optimizer, its state on the host or not."""

    def __init__(self, name="AdamW", dtype=torch.float32, rounding=None, away=True, backwards=False, shapes=SHAPES):
        generator = torch.Generator().manual_seed(1)
        self.weights = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
        groups = [{"params": self.weights[:3], "lr": 1e-2}, {"params": self.weights[3:], "lr": 1e-3}]
        self.optimizer = create_optimizer(name, (), groups, learning_rate=1.0, device=CPU).optimizer
        self.transfers = LateStateTransfers()
        self.turns = self.weights[::-1] if backwards else self.weights
        self.home = StateOffload(self.optimizer, self.weights, CPU, self.transfers) if away else None
        self.one_by_one = OneByOne(self.optimizer, rounding, self.home)

    def step(self, number, without=()):
        for weight in self.turns:
            place = next(place for place, own in enumerate(self.weights) if own is weight)
            if place not in without:
                generator = torch.Generator().manual_seed(100 * number + place)
                gradient = torch.randn(weight.shape, generator=generator).to(weight.dtype)
                self.one_by_one.step(weight, gradient, number)
        self.one_by_one.finish()

    def equals(self, other):
        return all(torch.equal(own, theirs) for own, theirs in zip(self.weights, other.weights))


def flat(state):
    """All tensors of a state dict by their path."""
    if isinstance(state, torch.Tensor):
        return {(): state}
    items = state.items() if isinstance(state, dict) else enumerate(state) if isinstance(state, list) else ()
    return {(key, *path): tensor for key, value in items for path, tensor in flat(value).items()}


def same_tensors(state, other):
    own, theirs = flat(state), flat(other)
    return own.keys() == theirs.keys() and all(
        own[path].dtype == theirs[path].dtype and torch.equal(own[path], theirs[path]) for path in own
    )


@pytest.mark.parametrize(
    ("name", "backwards"), [*((name, False) for name in NAMES), ("AdamW", True), ("AdamW8bit", True), ("CAME", True)]
)
def test_steps_and_state_are_those_of_state_on_the_device(name, backwards):
    plain, away = Problem(name, away=False, backwards=backwards), Problem(name, backwards=backwards)
    for number in range(3):
        plain.step(number)
        away.step(number)
        assert away.equals(plain), number
    assert same_tensors(away.optimizer.state_dict(), plain.optimizer.state_dict())
    assert away.optimizer.state_dict()["param_groups"] == plain.optimizer.state_dict()["param_groups"]


@pytest.mark.parametrize("rounding", [Rounding(3), KahanSummation()], ids=["stochastic", "kahan"])
@pytest.mark.parametrize("name", ["AdamW", "CAME8bit", "AdamW8bit"])
def test_so_are_those_of_bf16_weights(name, rounding):
    plain, away = (Problem(name, torch.bfloat16, rounding, away=away) for away in (False, True))
    for number in range(3):
        plain.step(number)
        away.step(number)
        assert away.equals(plain), number
    assert same_tensors(away.optimizer.state_dict(), plain.optimizer.state_dict())


def test_state_waits_on_the_host_and_the_device_has_four_slots():
    away = Problem()
    away.step(0)
    large = [weight for weight in away.weights if weight.nbytes >= SMALLEST]
    assert away.home.host_bytes == sum(2 * weight.nbytes for weight in large)
    largest = max(2 * weight.nbytes for weight in large)
    assert 4 * largest <= away.home.device_bytes <= 4 * (largest + 1024)
    for weight in away.weights:
        for value in away.optimizer.state[weight].values():
            assert (value.nbytes >= SMALLEST) == any(value is tensor for tensor in away.transfers.hosts)
    away.step(1)
    assert len(away.transfers.hosts) == 2 * len(large)  # no place on the host is made twice


@pytest.mark.parametrize("backwards", [False, True], ids=["forwards", "backwards"])
def test_state_is_sent_for_two_parameters_ahead(backwards):
    away = Problem(backwards=backwards)
    away.step(0)
    away.step(1)  # in the order of the parameters; the second one is learnt from
    away.transfers.happened.clear()
    for number in range(2, 4):
        away.step(number)
    large = [place for place, weight in enumerate(away.weights) if weight.nbytes >= SMALLEST]
    order = (large[::-1] if backwards else large) * 2
    happened = away.transfers.happened
    assert [owner for what, owner in happened if what == "used"] == order
    fetched = [owner for what, owner in happened if what == "fetched"]
    assert fetched == [*order, *order][2 : len(order) + 2]  # each once, the first two before the step
    asked, used = ([at for at, (what, _) in enumerate(happened) if what == kind] for kind in ("fetched", "used"))
    for turn in range(2, 2 * len(large)):
        before = turn - 1 if turn % len(large) >= 2 else len(large)
        assert asked[turn - 2] < used[before], turn


def test_a_step_in_another_order_or_of_fewer_weights_is_right_all_the_same():
    plain, away = Problem(away=False), Problem()
    for number, (backwards, without) in enumerate([(0, ()), (1, ()), (0, (2,)), (1, (0, 3)), (0, ()), (0, ())]):
        for problem in (plain, away):
            problem.turns = problem.weights[::-1] if backwards else problem.weights
            problem.step(number, without)
    assert away.equals(plain)
    assert same_tensors(away.optimizer.state_dict(), plain.optimizer.state_dict())


def test_a_slot_is_not_used_again_before_its_state_is_home():
    plain, away = (Problem(away=away, shapes=[(128, 128)] * 7) for away in (False, True))
    for number in range(2):  # in the first one nothing is fetched, so nothing else waits
        plain.step(number)
        away.step(number)
        assert same_tensors(away.optimizer.state_dict(), plain.optimizer.state_dict())


def test_state_that_is_read_before_it_is_home_is_no_number():
    away = Problem()
    away.step(0)
    away.step(1)
    value = away.optimizer.state[away.weights[-3]]["exp_avg"]
    assert value.isnan().all()
    away.one_by_one.settle()
    assert value.isfinite().all()
    assert (away.transfers.slots[0] == NOTHING).all()  # and nothing stays behind


@pytest.mark.parametrize("name", ["AdamW", "CAME8bit", "AdamW8bit", "StableAdamW", "Lion8bit"])
@pytest.mark.parametrize("at_once", [False, True], ids=["fresh", "in the same run"])
def test_a_loaded_state_goes_on_exactly(name, at_once, tmp_path):
    whole = Problem(name)
    for number in range(2):
        whole.step(number)
    torch.save(whole.optimizer.state_dict(), tmp_path / "state.pt")
    weights = [weight.detach().clone() for weight in whole.weights]
    for number in range(2, 4):
        whole.step(number)
    again = Problem(name)
    if at_once:  # what is on its way is of the state before
        again.step(7)
        again.step(8)
    for weight, own in zip(again.weights, weights):
        weight.data.copy_(own)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    load_optimizer_state(again.optimizer, state, smallest_on_host=SMALLEST)
    for number in range(2, 4):
        again.step(number)
    assert again.equals(whole)
    assert same_tensors(again.optimizer.state_dict(), whole.optimizer.state_dict())


@pytest.mark.parametrize("name", ["AdamW", "AdamW8bit"])
def test_a_large_state_stays_on_the_host_when_it_is_loaded(name):
    whole = Problem(name)
    whole.step(0)
    saved = whole.optimizer.state_dict()
    again = Problem(name, away=False)
    moved = []
    with torch.utils._device.DeviceContext("cpu"):
        to = torch.Tensor.to

        def watched(tensor, *args, **kwargs):
            moved.append(tensor.nbytes)
            return to(tensor, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "to", watched)
            load_optimizer_state(again.optimizer, saved, smallest_on_host=SMALLEST)
    assert max(moved, default=0) < SMALLEST
    assert same_tensors(again.optimizer.state_dict(), saved)


class Swapping(torch.optim.Optimizer):
    """Keeps two tensors that change places at each step, and one that grows and changes its type."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1.0})

    @torch.no_grad()
    def step(self, closure=None):
        for weight in self.param_groups[0]["params"]:
            state = self.state[weight]
            if not state:
                state.update(now=weight.grad.clone(), before=-weight.grad, log=weight.grad.half())
            else:
                state["now"], state["before"] = state["before"].add_(weight.grad), state["now"]
                state["log"] = torch.cat([state["log"].float(), weight.grad])[: 2 * len(weight)]
            weight.sub_(state["now"] * state["log"].float().mean())


def test_tensors_that_change_places_and_forms_are_kept_apart():
    results = []
    for away in (False, True):
        weight = nn.Parameter(torch.ones(200, 128))
        optimizer, transfers = Swapping([weight]), LateStateTransfers()
        home = StateOffload(optimizer, [weight], CPU, transfers) if away else None
        one_by_one = OneByOne(optimizer, home=home)
        for step in range(4):
            one_by_one.step(weight, torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)), step)
            one_by_one.finish()
        results.append((weight.detach().clone(), optimizer.state_dict()))
    assert torch.equal(results[0][0], results[1][0])
    assert same_tensors(results[0][1], results[1][1])
