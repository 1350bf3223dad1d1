import pytest
import torch

from library.config.errors import ConfigError
from library.config.optimizer import OPTIMIZER_NAMES
from library.training.optimizers import OPTIMIZERS, create_optimizer, load_optimizer_state, set_training_mode

CPU = torch.device("cpu")


def problem():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(64, 64))
    target = torch.randn(64, 64)
    return weight, lambda: ((weight - target) ** 2).mean()


def create(name, weight, *arguments, learning_rate=1e-2):
    return create_optimizer(name, arguments, [{"params": [weight], "lr": learning_rate}], learning_rate=1.0, device=CPU)


def test_every_name_of_the_option_has_its_optimizer():
    assert {name.lower() for name in OPTIMIZER_NAMES} == set(OPTIMIZERS)


@pytest.mark.parametrize("name", OPTIMIZER_NAMES)
def test_it_lowers_a_loss(name):
    weight, loss_of = problem()
    adaptive = name.startswith("DAdapt") or name == "Prodigy"
    rate = 1.0 if adaptive else 10.0 if "SGD" in name else 1e-2
    optimizer = create(name, weight, learning_rate=rate).optimizer
    set_training_mode(optimizer, True)
    first = loss_of().item()
    for _ in range(30):
        optimizer.zero_grad()
        loss_of().backward()
        optimizer.step()
    set_training_mode(optimizer, False)
    assert loss_of().item() < first


def test_adamw_is_torchs():
    weight, _ = problem()
    ours = create("adamw", weight, "weight_decay=0.1", "betas=(0.8, 0.9)").optimizer
    assert type(ours) is torch.optim.AdamW
    assert ours.param_groups[0]["weight_decay"] == 0.1
    assert ours.param_groups[0]["betas"] == (0.8, 0.9)
    assert ours.param_groups[0]["lr"] == 1e-2


def test_a_dotted_class_is_taken():
    weight, _ = problem()
    created = create("torch.optim.Adamax", weight, "eps=1e-6")
    assert type(created.optimizer) is torch.optim.Adamax
    assert created.label == "torch.optim.adamax.Adamax(eps=1e-06)"


def test_an_unknown_argument_is_named_with_the_nearest():
    weight, _ = problem()
    with pytest.raises(ConfigError, match="AdamW has no argument 'weight_decai'; did you mean weight_decay"):
        create("AdamW", weight, "weight_decai=0.1")


def test_a_learning_rate_among_the_arguments_is_refused():
    weight, _ = problem()
    with pytest.raises(ConfigError, match="--learning_rate, not lr="):
        create("AdamW", weight, "lr=0.1")


def test_a_missing_package_is_named():
    weight, _ = problem()
    with pytest.raises(ConfigError, match="pip install no_such_package"):
        create("no_such_package.Optimizer", weight)


def test_relative_step_says_that_it_sets_the_rate():
    weight, _ = problem()
    created = create("Adafactor", weight, "relative_step=True", "scale_parameter=True", "warmup_init=True")
    assert any("--learning_rate is not used" in note for note in created.notes)


def test_8bit_on_a_cpu_says_so():
    weight, _ = problem()
    assert any("no accelerator" in note for note in create("AdamW8bit", weight).notes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", [*OPTIMIZER_NAMES, "torch.optim.NAdam"])
def test_a_loaded_state_goes_on_exactly(name, dtype, tmp_path):
    def made():
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.randn(64, 96).to(dtype))
        return weight, create(name, weight).optimizer

    def step(weight, optimizer, number):
        set_training_mode(optimizer, True)
        weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(number)).to(dtype)
        optimizer.step()

    weight, optimizer = made()
    for number in range(3):
        step(weight, optimizer, number)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    again, fresh = made()
    again.data.copy_(weight.data)
    load_optimizer_state(fresh, torch.load(tmp_path / "state.pt", weights_only=True))
    for number in range(3, 6):
        step(weight, optimizer, number)
        step(again, fresh, number)
        assert torch.equal(again, weight), number


def test_paged_state_is_loaded_into_paged_memory(monkeypatch):
    weight, loss_of = problem()
    optimizer = create("PagedAdamW8bit", weight).optimizer
    loss_of().backward()
    optimizer.step()
    fresh = create("PagedAdamW8bit", weight).optimizer
    pages = []

    def page(parameter, dtype):
        pages.append(torch.full_like(parameter, 7, dtype=dtype))
        return pages[-1]

    monkeypatch.setattr(fresh, "get_state_buffer", page)  # which a CPU has none of
    load_optimizer_state(fresh, optimizer.state_dict())
    state = fresh.state[weight]
    assert state["state1"] is pages[0] and state["state2"] is pages[1]
    assert all(torch.equal(state[name], optimizer.state[weight][name]) for name in ("state1", "state2", "absmax1"))


def test_momentum_that_is_not_nesterovs_is_said_to_be_so():
    weight, _ = problem()
    assert any("its momentum is plain" in note for note in create("SGDNesterov8bit", weight).notes)
    assert not create("SGDNesterov", weight).notes
